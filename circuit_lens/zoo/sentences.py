"""One sentence of the corpus: its tokens, and what the generator knows about every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from circuit_lens.zoo.templates import OPERATIONS

Variables = dict[str, tuple[str | None, ...]]

# What the answers of a family are, where no relation is asked for.
_ANSWER_KINDS = {
    "city": "place",
    "cross": "opposite",
    "antonym": "opposite",
    "neutral": "topic or sign",
    "identity": "copy",
    "filler": "day or month",
}


@dataclass(frozen=True, slots=True)
class Mention:
    """What fills a slot of a template.

    ``text``: tokens separated by spaces. ``facts``: variable -> value, true of the mention's last token (the pieces
    before it do not say yet what is meant). ``name``: a name whose pieces before the last may be hidden from later
    positions in training. ``answer``: determined by what stands before it.
    """

    text: str
    facts: Mapping[str, str] = field(default_factory=dict)
    name: bool = False
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """A mention in its sentence: tokens ``start`` up to and including ``end``."""

    start: int
    end: int
    mention: Mention


@dataclass(frozen=True, slots=True)
class Sentence:
    """Tokens and the mentions among them; positions count from 0 without a beginning-of-sequence token."""

    family: str
    tokens: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def question(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens before the last answer, and that answer's tokens."""
        span = [span for span in self.spans if span.mention.answer][-1]
        return self.tokens[: span.start], self.tokens[span.start : span.end + 1]

    def answer_positions(self) -> list[int]:
        """Positions of tokens that are determined by what stands before them."""
        return [i for span in self.spans if span.mention.answer for i in range(span.start, span.end + 1)]

    def variables(self) -> Variables:
        """Variable -> value at every position (``None``: no value there).

        ``x``: the token at this position is the last of a mention with ``x = value``.
        ``about x``: an earlier mention of this sentence had ``x = value``, the latest one counts.
        ``operation``: this token names the operation on the operand, and ``about operation`` everything after it.
        ``answer``: the *next* token is determined, and is this token.
        ``answer kind``: an answer begins at the next token, and it is of this kind: the relation asked for, or what
        the family asks for.
        """
        n_tokens = len(self.tokens)
        values: dict[str, list[str | None]] = {}

        def put(variable: str, position: int, value: str) -> None:
            values.setdefault(variable, [None] * n_tokens)[position] = value

        facts_at: dict[int, dict[str, str]] = {
            i: {"operation": OPERATIONS[token]} for i, token in enumerate(self.tokens) if token in OPERATIONS
        }
        if self.family == "translation":
            facts_at |= {i: {"operation": "translation"} for i, t in enumerate(self.tokens) if t in ("word", ",")}
        for span in self.spans:
            facts_at.setdefault(span.end, {}).update(span.mention.facts)
            if span.mention.answer:
                for position in range(max(span.start, 1), span.end + 1):
                    put("answer", position - 1, self.tokens[position])
        latest: dict[str, str] = {}
        starts = {span.start - 1 for span in self.spans if span.mention.answer}
        for position in range(n_tokens):
            for variable, value in latest.items():
                put(f"about {variable}", position, value)
            for variable, value in facts_at.get(position, {}).items():
                put(variable, position, value)
                latest[variable] = value
            if position in starts:
                put("answer kind", position, latest.get("relation") or _ANSWER_KINDS.get(self.family, self.family))
        return {variable: tuple(column) for variable, column in values.items()}


@cache
def _pieces(template: str) -> tuple[tuple[bool, str], ...]:
    """The template's parts: (is a slot, slot name or literal token)."""
    return tuple((piece[0] == "{", piece.strip("{}")) for piece in template.split())


def fill(family: str, template: str, mentions: Mapping[str, Mention]) -> Sentence:
    """The template with its slots filled; a slot that ``mentions`` lacks raises ``KeyError``."""
    tokens: list[str] = []
    spans: list[Span] = []
    for is_slot, piece in _pieces(template):
        if not is_slot:
            tokens.append(piece)
            continue
        mention = mentions[piece]
        start = len(tokens)
        tokens.extend(mention.text.split())
        spans.append(Span(start, len(tokens) - 1, mention))
    return Sentence(family, tuple(tokens), tuple(spans))

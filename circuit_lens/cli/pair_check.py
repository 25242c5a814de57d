"""Whether a model and its dictionaries belong together, measured on text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from circuit_lens.errors import CircuitLensError, TokensError

if TYPE_CHECKING:
    from torch import Tensor

    from circuit_lens.evaluation.figures import OutputFigures
    from circuit_lens.replacement_model import ReplacementModel

# Explained variance below which a dictionary is of no use, and below which it deserves a word.
BROKEN_BELOW, WEAK_BELOW = 0.0, 0.3
_WORDS, _CHUNKS = 60, 64
_PROSE = """
The river rises in the hills north of the old town and runs for about ninety miles before it reaches the sea. In the
spring, when the snow melts, it floods the meadows, and the farmers move their sheep to higher ground.
Most people who work in the city live outside it. They take the early train, read the news or sleep, and are at their
desks by nine. In the evening the same train takes them home again, and the offices stand empty until the morning.
She opened the letter at the kitchen table. It was from her brother, who had gone to Paris to study music, and it was
three pages long. He wrote about the rain, the price of bread, and a concert that he would never forget.
Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. A cook who moves from
the coast to the hills has to learn again how long an egg takes.
def mean(values): return sum(values) / len(values)
In 1969 two men walked on the Moon for the first time, and about six hundred million people watched them on television.
"""


def is_broken(output: OutputFigures) -> bool:
    """Whether a dictionary is of no use with this model: never active, or worse than a constant."""
    return not output.explained_variance >= BROKEN_BELOW or output.l0 == 0.0


def verdict(output: OutputFigures) -> str:
    """Return what is wrong or remarkable about a dictionary, "" for a good one."""
    if output.l0 == 0.0:
        return "no feature is ever active"
    if is_broken(output):
        return "worse than its mean: another input hook, or processed weights"
    if output.explained_variance < WEAK_BELOW:
        return "weak: much of this layer will be error"
    return "dense: graphs will be large" if output.l0 > output.n_features / 4 else ""


def default_text(bundled: bool) -> str:
    """Return text to check on: the corpus' own for a bundled model, which knows no other words; else plain English."""
    if not bundled:
        return _PROSE
    from circuit_lens.zoo.corpus import Corpus

    return "\n".join(" ".join(sentence.tokens) for sentence in Corpus().take(2000, seed=1))


def chunks(rm: ReplacementModel, text: str) -> list[Tensor]:
    """Return the text as prompts of at most some dozens of words, a line at a time.

    Raises:
        TokensError: no words, or words that the model does not know.
    """
    from circuit_lens.running import to_tokens

    found = [to_tokens(rm.model, words) for line in text.splitlines() for words in _pieces(line)][:_CHUNKS]
    found = [tokens for tokens in found if len(tokens) > 1]
    if not found:
        raise TokensError("the text to check on has no words")
    return found


def _pieces(line: str) -> Iterator[str]:
    words = line.split()
    for start in range(0, len(words), _WORDS):
        yield " ".join(words[start : start + _WORDS])


def check_local(rm: ReplacementModel, tokens: Tensor) -> tuple[dict[str, float], str]:
    """Build one local replacement with all its checks; return what they measured, and what is wrong, or ""."""
    try:
        local = rm.local(tokens)
    except CircuitLensError as error:
        return {}, str(error)
    note = local.engine_note if local.engine_note.startswith("fallback") else ""
    figures = {name: float(value) for name, value in local.checks.items() if isinstance(value, int | float)}
    return figures, note

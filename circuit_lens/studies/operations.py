"""The operation on a word exchanged: opposite -> synonym, opposite -> the same meaning; and what languages share.

The published intervention puts "synonym" in place of "antonym" and gets a synonym. Here the operation stands at two
places: at the closing quote after the operand (where it is combined with the operand, if the sentence has named it
already), and at the last position (where the English synonym templates differ from the opposite templates). The table
tries both, also where it cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuit_lens.graph.edits import Intervention
from circuit_lens.graph.overlap import Overlap, overlap
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.studies.controls import random_features
from circuit_lens.studies.lab import Job, swap, swap_deltas
from circuit_lens.studies.multilingual import Item, Words
from circuit_lens.studies.tables import Cell, Failure, Row, StudyTable
from circuit_lens.zoo import templates
from circuit_lens.zoo.evaluate import token_ids
from circuit_lens.zoo.words import LANGUAGES, SYNONYMS

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus

QUOTE_SHARES, QUOTE_LAYERS = (0.3, 0.3), (1,)
LAST_SHARES, LAST_LAYERS = (0.5, 0.1), (0, 1, 2, 3)
FACTORS = ((-1.0, 2.0), (0.0, 1.0))
N_DONORS = 30
SAME = {name: templates.TRANSLATION_WITHIN[name] for name in LANGUAGES}
BEFORE = {"English": (0, 1, 2), "French": (0, 1), "Spanish": (0, 1), "Chinese": (2,)}
"""Templates that name the opposite before the operand; the others name it after, so the quote cannot know it."""


@dataclass(frozen=True)
class Operation:
    """An exchange of operations: tested questions, the answers wanted, and the questions that choose features.

    Attributes:
        name: What becomes what, where.
        tested: Questions about opposites.
        wanted: For each, the ids of the answers that count.
        own, other: Questions of the two operations about other words, for the contrast and the recorded mean.
        where: ``"quote"``: after the operand; ``"last"``: at the last position.
        groups: For each tested question, the pair it is about; questions about that pair choose nothing.
    """

    name: str
    tested: Sequence[Item]
    wanted: Sequence[frozenset[int]]
    own: Sequence[Item]
    other: Sequence[Item]
    where: str


class _Contrast:
    """The two supernodes of an exchange, without the questions about one pair."""

    def __init__(self, words: Words, one: Operation) -> None:
        self.words, self.one = words, one
        self.shares, self.layers = (LAST_SHARES, LAST_LAYERS) if one.where == "last" else (QUOTE_SHARES, QUOTE_LAYERS)
        self.on = {which: self._on(items) for which, items in (("own", one.own), ("other", one.other))}
        self.pairs = {
            which: torch.tensor([i.pair for i in items]) for which, items in (("own", one.own), ("other", one.other))
        }

    def _on(self, items: Sequence[Item]) -> Tensor:
        return (self.words.lab.acts([(self.words.text(i)[0], self.at(i)) for i in items]) > 0).float()

    def at(self, item: Item) -> int:
        text, operand = self.words.text(item)
        return operand + 1 if self.one.where == "quote" else len(text.split())

    def parts(self, item: Item) -> tuple:
        """Return what :func:`swap` takes."""
        share = {which: on[self.pairs[which] != item.pair].mean(0) for which, on in self.on.items()}
        low, high = self.shares
        lab, at = self.words.lab, self.at(item)
        masks = [(share[a] >= low - 1e-6) & (share[b] <= high + 1e-6) for a, b in (("own", "other"), ("other", "own"))]
        off, on = (lab.members(mask, at, self.layers) for mask in masks)
        donors = [i for i in self.one.other if i.pair != item.pair]
        donors = donors[:: max(1, len(donors) // N_DONORS)][:N_DONORS]
        return (
            self.words.recording(item),
            off,
            on,
            [self.words.recording(d) for d in donors],
            [self.at(d) for d in donors],
        )


def _row(words: Words, one: Operation, n: int | None, seed: int) -> Row:
    """Return how often the other operation's answer comes."""
    own = zip(one.tested, one.wanted, words.right(one.tested), strict=True)
    kept = [(item, wanted) for item, wanted, ok in own if ok and words.answer(item) not in wanted]
    if n is not None and n < len(kept):
        kept = Random(seed).sample(kept, n)
    contrast = _Contrast(words, one)
    parts = [contrast.parts(item) for item, _ in kept]

    def random(i: int) -> list[Intervention]:
        recording, off, on, donors, at = parts[i]
        return random_features(words.lab, swap_deltas(recording, off, on, FACTORS[0], donors, at), seed=seed * 1009 + i)

    variants: list[tuple[str, Callable[[int], list[Intervention]]]] = [
        (f"{f[0]:g}/{f[1]:g}", lambda i, f=f: swap(parts[i][0], parts[i][1], parts[i][2], f, parts[i][3], parts[i][4]))
        for f in FACTORS
    ]
    variants.append(("random features", random))
    tokens = words.lab.run([Job(parts[i][0], make(i)) for _, make in variants for i in range(len(kept))])
    cells: dict[str, Cell] = {}
    for number, (what, _) in enumerate(variants):
        got = tokens[number * len(kept) : (number + 1) * len(kept)]
        cells[what] = Rate.of(g in wanted for g, (_, wanted) in zip(got, kept, strict=True))
    failures = tuple(
        Failure(words.text(item)[0], " or ".join(words.lab.token(w) for w in sorted(wanted)), words.lab.token(g))
        for g, (item, wanted) in zip(tokens, kept, strict=False)
        if g not in wanted
    )
    return Row(one.name, cells, failures)


def operation_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int | None = None, seed: int = 0, name: str = "",
    words: Words | None = None, languages: Sequence[str] = LANGUAGES[1:],
) -> StudyTable:  # fmt: skip
    """Exchange the operation: in English for a synonym, in every language for the same meaning."""
    words = Words(rm, corpus) if words is None else words
    listed = [*_synonyms(words), *_same_meaning(words, languages)]
    notes = (
        "Closing quote: layer 1, shares >= .3 and <= .3; last position: all layers, >= .5 and <= .1; recorded as the "
        f"mean over up to {N_DONORS} questions of the other operation about other pairs. Same meaning: held-out pairs "
        "of the language, chosen on pairs that are held out nowhere; synonyms: English has no held-out pairs, "
        "the asked pair is left out.",
        "An exchange at the closing quote fails where the sentence names the operation only afterwards, and for "
        "English synonyms, which the model tells from opposites at the last position.",
    )
    of = f" ({name})" if name else ""
    return StudyTable(f"Operation exchanged{of}", tuple(_row(words, one, n, seed) for one in listed), notes)


def _synonyms(words: Words) -> list[Operation]:
    """English opposites made synonyms, at both places."""
    known: dict[str, set[str]] = {}
    for a, b in SYNONYMS:
        known.setdefault(a, set()).add(b)
        known.setdefault(b, set()).add(a)
    pairs = [(p.index, side) for p in words.corpus.antonyms for side in (0, 1) if p.words["English"][side] in known]
    opposite, synonym = templates.ANTONYM["English"][0], templates.SYNONYM[0]
    own = [Item("English", opposite, p, side, "English") for p, side in pairs]
    other = [Item("English", synonym, p, side, "English") for p, side in pairs]
    texts = [words.corpus.antonyms[p].words["English"][side] for p, side in pairs]
    wanted = [frozenset(token_ids(words.lab.model, sorted(known[text]))) for text in texts]
    return [
        Operation("English opposite -> synonym, closing quote", own, wanted, own, other, "quote"),
        Operation("English opposite -> synonym, last position", own, wanted, own, other, "last"),
    ]


def _same_meaning(words: Words, languages: Sequence[str]) -> list[Operation]:
    """Opposites made the same meaning in three languages, operands of the other languages."""
    found = []
    for language in languages:
        before = [templates.ANTONYM[language][i] for i in BEFORE[language]]
        after = [t for t in templates.ANTONYM[language] if t not in before]

        def items(texts: Sequence[str], pairs: Sequence[int], language: str = language) -> list[Item]:
            others = [name for name in LANGUAGES if name != language]
            return [
                Item(language, t, p, side, other) for t in texts for p in pairs for side in (0, 1) for other in others
            ]

        trained = words.trained_pairs
        own, other = items(before, trained), items(SAME[language], trained)
        for texts, what in ((before, "named before"), (after, "named after")):
            tested = items(texts, words.held(language))
            wanted = [frozenset([words.word(language, i.pair, i.side)]) for i in tested]
            name = f"{language} opposite -> same meaning, closing quote, {what} the operand"
            found.append(Operation(name, tested, wanted, own, other, "quote"))
    return found


# What languages share


def overlap_graph(
    rm: ReplacementModel, words: Words, pair: int = 0, side: int = 0, *, languages: Sequence[str] = LANGUAGES[:3]
) -> Overlap:
    """Return what the graphs of one word's opposite have in common in several languages, operand and last aligned."""
    items = [Item(name, templates.ANTONYM[name][0], pair, side, name) for name in languages]
    graphs = {i.language: rm.attribute(words.text(i)[0], targets=[words.answer(i)], progress=False) for i in items}
    at = [words.text(i)[1] for i in items]
    roles = {"operand": at, "closing quote": [one + 1 for one in at], "last": [-1] * len(items)}
    return overlap(graphs, align=roles)


def overlap_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int = 10, name: str = "", words: Words | None = None,
) -> StudyTable:  # fmt: skip
    """How much graphs of the same word in two languages share, and graphs of different words in one language pair."""
    words = Words(rm, corpus) if words is None else words
    chosen = words.trained_pairs[:n]
    graphs = {
        (language, p): rm.attribute(
            words.text(Item(language, templates.ANTONYM[language][0], p, 0, language))[0],
            targets=[words.word(language, p, 1)],
            progress=False,
        )
        for language in LANGUAGES
        for p in chosen
    }
    rows = []
    for a, b in (("English", "French"), ("English", "Spanish"), ("French", "Spanish"), ("English", "Chinese")):
        found: dict[str, list[float]] = {}
        for number, p in enumerate(chosen):
            other = chosen[(number + 1) % len(chosen)]
            for what, q in (("same word", p), ("other word", other)):
                items = [Item(x, templates.ANTONYM[x][0], y, 0, x) for x, y in ((a, p), (b, q))]
                at = [words.text(i)[1] for i in items]
                roles = {"operand": at, "closing quote": [one + 1 for one in at], "last": [-1, -1]}
                one = overlap([graphs[a, p], graphs[b, q]], align=roles).pairs[0]
                found.setdefault(f"nodes, {what}", []).append(one.nodes_weighted)
                found.setdefault(f"edges, {what}", []).append(one.edges_weighted)
        rows.append(Row(f"{a} and {b}", {key: Mean.of(values) for key, values in found.items()}))
    note = (
        "Sum of the smaller over sum of the larger influence (nodes) or carried influence (edges) of what both graphs "
        "have at the operand, the closing quote and the last position; other word: the next pair's graph."
    )
    return StudyTable(f"What graphs of two languages share{f' ({name})' if name else ''}", tuple(rows), (note,))

"""One concept in several languages: language, operand and operation exchanged (Biology, section "Multilingual").

'Le contraire de " petit " est "' -> grand. Right is the answer that follows from what was put in, as the most probable
next token. Items are held out: the pair was never opposed in that language, and no supernode was chosen on any pair
that is held out in any language. Only items that are answered right as they are, and whose counterpart (the other
language, the other operand) is answered right too, count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from circuit_lens.graph.edits import Intervention
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.rates import Rate
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.interventions.recording import Recording
from circuit_lens.studies.controls import add_vector, random_features
from circuit_lens.studies.lab import Job, Lab, active, swap, swap_deltas
from circuit_lens.studies.tables import Cell, Failure, Row, StudyTable
from circuit_lens.zoo import templates
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.evaluate import token_ids
from circuit_lens.zoo.words import LANGUAGES

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel

TESTED = LANGUAGES[1:]
LANGUAGE_SHARES, LANGUAGE_LAYERS, LANGUAGE_FACTORS = (0.3, 0.1), (0, 1, 2), (-1.0, 2.0)
OPERAND_LAYERS, OPERAND_FACTORS = (0, 1), (0.0, 2.0)
DEPTH = 2
"""Block after which whole last positions are exchanged."""
N_DONORS = 24
"""Trained prompts over which a language's activations are averaged."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question: an operand of a pair, in a language's template, the operand of that language or another."""

    language: str
    template: str
    pair: int
    side: int
    operand_language: str

    def __str__(self) -> str:
        return f"{self.language} pair {self.pair}.{self.side} in {self.template!r}"


class Words:
    """Questions about opposites, with what is active on them.

    Args:
        rm: A bundled model with dictionaries.
        corpus: Its corpus.
        lab: Recordings to share.
    """

    def __init__(self, rm: ReplacementModel, corpus: Corpus | None = None, *, lab: Lab | None = None) -> None:
        self.lab = Lab(rm) if lab is None else lab
        self.corpus = Corpus() if corpus is None else corpus
        self.held_pairs = {index for _, index in self.corpus.held_antonyms}
        self.trained_pairs = [p.index for p in self.corpus.antonyms if p.index not in self.held_pairs]

    def text(self, item: Item) -> tuple[str, int]:
        """Return an item's prompt and the position of its operand."""
        pair = self.corpus.antonyms[item.pair]
        sentence = self.corpus.antonym_about(pair, item.side, item.language, item.template, item.operand_language)
        span = [s for s in sentence.spans if not s.mention.answer][-1]
        return " ".join(sentence.question[0]), span.end + 1

    def word(self, language: str, pair: int, side: int) -> int:
        """Return the id of a word."""
        return token_ids(self.lab.model, [self.corpus.antonyms[pair].words[language][side]])[0]

    def answer(self, item: Item, language: str | None = None) -> int:
        """Return the id of the opposite, in the item's language or another."""
        return self.word(language or item.language, item.pair, 1 - item.side)

    def recording(self, item: Item) -> Recording:
        """Return the clean run of an item."""
        return self.lab.record(self.text(item)[0])

    def items(self, language: str, pairs: Sequence[int], *, templates_: Sequence[str] | None = None) -> list[Item]:
        """Return the items of some pairs in a language's own templates."""
        used = templates.ANTONYM[language] if templates_ is None else templates_
        return [Item(language, t, p, side, language) for p in pairs for t in used for side in (0, 1)]

    def held(self, language: str) -> list[int]:
        """Return the pairs that were never opposed in a language."""
        return sorted(index for name, index in self.corpus.held_antonyms if name == language)

    def right(self, items: Sequence[Item]) -> list[bool]:
        """Return whether items are answered right."""
        best = self.lab.answers([self.text(item)[0] for item in items])
        return [b == self.answer(item) for b, item in zip(best, items, strict=True)]

    def acts(self, items: Sequence[Item], *, last: bool) -> Tensor:
        """Return activations at the last position or at the operand, ``[n_item, n_column]``."""
        return self.lab.acts([(text, -1 if last else at) for text, at in map(self.text, items)])


Make = Callable[[int], list[Intervention]]


def count(
    words: Words,
    name: str,
    items: Sequence[Item],
    wanted: Sequence[int],
    variants: Sequence[tuple[str, Make]],
    *,
    failures_of: int = 0,
) -> Row:
    """Return a row: for each variant, how often an item's run gives the wanted token."""
    jobs = [Job(words.recording(item), make(i)) for _, make in variants for i, item in enumerate(items)]
    tokens = words.lab.run(jobs)
    cells: dict[str, Cell] = {}
    failures: list[Failure] = []
    for number, (what, _) in enumerate(variants):
        got = tokens[number * len(items) : (number + 1) * len(items)]
        cells[what] = Rate.of(g == w for g, w in zip(got, wanted, strict=True))
        if number == failures_of:
            failures = [
                Failure(words.text(item)[0], words.lab.token(w), words.lab.token(g))
                for item, w, g in zip(items, wanted, got, strict=True)
                if g != w
            ]
    return Row(name, cells, tuple(failures))


# Language


class Languages:
    """The supernode of each language at the last position, chosen on pairs that no language holds out."""

    def __init__(self, words: Words, *, shares: tuple[float, float] = LANGUAGE_SHARES, seed: int = 0) -> None:
        self.words = words
        listed = {name: words.items(name, words.trained_pairs) for name in LANGUAGES}
        on = {name: (words.acts(items, last=True) > 0).float().mean(0) for name, items in listed.items()}
        self.masks = {name: self._mask(on, name, shares) for name in LANGUAGES}
        rng = random.Random(seed)
        self.donors = {
            name: [words.recording(item) for item in rng.sample(items, N_DONORS)] for name, items in listed.items()
        }

    @staticmethod
    def _mask(on: dict[str, Tensor], name: str, shares: tuple[float, float]) -> Bool[Tensor, "n_column"]:
        others = torch.stack([on[other] for other in LANGUAGES if other != name]).mean(0)
        return (on[name] >= shares[0] - 1e-6) & (others <= shares[1] + 1e-6)

    def members(self, name: str, recording: Recording) -> tuple[Feature, ...]:
        """Return a language's features at a recording's last position."""
        return self.words.lab.members(self.masks[name], recording.n_pos - 1, LANGUAGE_LAYERS)

    def off(self, item: Item, factor: float) -> list[Intervention]:
        """Return the item's language inhibited."""
        recording = self.words.recording(item)
        on = active(recording, self.members(item.language, recording))
        return [Supernode(item.language, on).scale(factor)] if on else []

    def parts(
        self, item: Item, other: str
    ) -> tuple[Recording, Sequence[Feature], Sequence[Feature], list[Recording], list[int]]:
        """Return what :func:`swap` takes."""
        recording, donors = self.words.recording(item), self.donors[other]
        off, on = self.members(item.language, recording), self.members(other, recording)
        return recording, off, on, donors, [d.n_pos - 1 for d in donors]

    def swap(self, item: Item, other: str, factors: tuple[float, float] = LANGUAGE_FACTORS) -> list[Intervention]:
        """Return the item's language exchanged for another."""
        recording, off, on, donors, at = self.parts(item, other)
        return swap(recording, off, on, factors, donors, at)

    def random(self, item: Item, other: str, seed: int) -> list[Intervention]:
        """Return random features that write as much."""
        recording, off, on, donors, at = self.parts(item, other)
        deltas = swap_deltas(recording, off, on, LANGUAGE_FACTORS, donors, at)
        return random_features(self.words.lab, deltas, seed=seed)


def language_items(words: Words, source: str, target: str) -> list[Item]:
    """Return the held-out items of a language that are right in it, in templates of the other too."""
    items = words.items(source, words.held(source))
    there = words.items(target, words.held(source))
    right_there: dict[tuple[int, int], bool] = {}
    for item, ok in zip(there, words.right(there), strict=True):
        key = item.pair, item.side
        right_there[key] = right_there.get(key, True) and ok
    return [
        item for item, ok in zip(items, words.right(items), strict=True) if ok and right_there[item.pair, item.side]
    ]


def language_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, name: str = "", words: Words | None = None,
    sources: Sequence[str] = TESTED, targets: Sequence[str] = LANGUAGES, seed: int = 0,
) -> StudyTable:  # fmt: skip
    """Exchange the language at the last position: the answer comes in the other language."""
    words = Words(rm, corpus) if words is None else words
    languages, rows = Languages(words, seed=seed), []
    means = {language: _mean_residual(words, words.items(language, words.trained_pairs)) for language in LANGUAGES}
    for source in sources:
        for target in targets:
            if target == source:
                continue
            items = language_items(words, source, target)
            mean = means[target] - means[source]
            whole = _counterparts(words, items, target)
            variants: list[tuple[str, Make]] = [
                ("-1/2", lambda i, t=target, it=items: languages.swap(it[i], t)),
                ("0/1", lambda i, t=target, it=items: languages.swap(it[i], t, (0.0, 1.0))),
                ("random features", lambda i, t=target, it=items: languages.random(it[i], t, seed * 1009 + i)),
                ("mean difference", lambda i, m=mean, it=items: _last(words, it[i], m[DEPTH])),
                ("whole position", lambda i, w=whole, it=items: _last(words, it[i], w[i])),
            ]
            wanted = [words.answer(item, target) for item in items]
            rows.append(count(words, f"{source} -> {target}", items, wanted, variants))
    low, high = LANGUAGE_SHARES
    notes = (
        f"Members: last position, layers 0-2, active on >= {low:g} of a language's trained questions and <= {high:g} "
        f"of the others' (mean); recorded as the mean over {N_DONORS} trained questions of the other language.",
        "n = held-out (pair, side, template), right in both languages. Mean difference: of trained questions, at the "
        "last position after block 2. Whole position: that of the same question in the other language, there too.",
    )
    return StudyTable(f"Language exchanged{_of(name)}", tuple(rows), notes)


def language_off_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, name: str = "", words: Words | None = None,
) -> StudyTable:  # fmt: skip
    """Inhibit the language at the last position, and count the language of the answer."""
    words = Words(rm, corpus) if words is None else words
    languages, rows = Languages(words), []
    for source in TESTED:
        items = words.items(source, words.held(source))
        items = [item for item, ok in zip(items, words.right(items), strict=True) if ok]
        for factor in (0.0, -1.0, -2.0):
            tokens = words.lab.run([Job(words.recording(item), languages.off(item, factor)) for item in items])
            cells: dict[str, Cell] = {
                f"opposite in {language}": Rate.of(
                    t == words.answer(item, language) for t, item in zip(tokens, items, strict=True)
                )
                for language in LANGUAGES
            }
            rows.append(Row(f"{source} x {factor:g}", cells))
    note = "n = held-out items answered right; the published model falls back on English."
    return StudyTable(f"Language inhibited{_of(name)}", tuple(rows), (note,))


def _mean_residual(words: Words, items: Sequence[Item]) -> Tensor:
    return words.lab.residuals([(words.text(item)[0], -1) for item in items]).mean(1)


def _counterparts(words: Words, items: Sequence[Item], target: str) -> Tensor:
    """Return the residual of each item's counterpart in another language minus its own, at the last position."""
    there = [Item(target, templates.ANTONYM[target][0], i.pair, i.side, target) for i in items]
    places = [[(words.text(item)[0], -1) for item in listed] for listed in (there, items)]
    return words.lab.residuals(places[0])[DEPTH] - words.lab.residuals(places[1])[DEPTH]


def _last(words: Words, item: Item, vector: Tensor) -> list[Intervention]:
    return add_vector(vector, DEPTH, words.recording(item).n_pos - 1, "mean difference")


def _of(name: str) -> str:
    return f" ({name})" if name else ""


# Operand


@dataclass(frozen=True, slots=True)
class OperandSwap:
    """An item, the item with another operand, and that operand's English question."""

    base: Item
    new: Item
    english: Item


def operand_swaps(
    words: Words, language: str, *, held: bool = True, n: int | None = None, seed: int = 0
) -> list[OperandSwap]:
    """Return pairs of questions of one language and template, both right, whose English counterparts are right too."""
    items = words.items(language, words.held(language) if held else words.trained_pairs)
    english = [Item("English", templates.ANTONYM["English"][0], i.pair, i.side, "English") for i in items]
    ok = zip(items, words.right(items), words.right(english), strict=True)
    kept = [item for item, here, there in ok if here and there]
    found = []
    for base in kept:
        for new in kept:
            if new.template == base.template and new.pair != base.pair:
                there = Item("English", templates.ANTONYM["English"][0], new.pair, new.side, "English")
                found.append(OperandSwap(base, new, there))
    return found if n is None or n >= len(found) else random.Random(seed).sample(found, n)


def _operand_parts(
    words: Words, one: OperandSwap
) -> tuple[Recording, Sequence[Feature], Sequence[Feature], list[Recording], list[int]]:
    recording, donor = words.recording(one.base), words.recording(one.english)
    at, there = words.text(one.base)[1], words.text(one.english)[1]
    layers = set(OPERAND_LAYERS)
    off = [Feature(layer, at, i, site) for site, layer, i in recording.active_at(at) if layer in layers]
    on = [Feature(layer, at, i, site) for site, layer, i in donor.active_at(there) if layer in layers]
    return recording, off, on, [donor], [there]


def operand_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int | None = 120, seed: int = 0, name: str = "",
    words: Words | None = None, held: bool = True,
) -> StudyTable:  # fmt: skip
    """Exchange the operand by what another one switches on in an English question.

    Args:
        rm: A bundled model with dictionaries.
        corpus: Its corpus.
        n: Swaps per language, drawn with ``seed``; None: all.
        seed: Of the draw and of the random control.
        name: The model's name.
        words: Recordings to share.
        held: Held-out pairs; False: trained ones, on which the factors were chosen.
    """
    words = Words(rm, corpus) if words is None else words
    rows = [_operand_row(words, language, held, n, seed) for language in TESTED]
    notes = (
        "off: all features active at the operand in layers 0-1; on: those active at the other operand in its English "
        "question. Factors 0/2 chosen on trained pairs (see their table). n = (item, new operand).",
        "Whole position: the English operand's residual stream after block 0 in place of the own one.",
    )
    what = "held-out" if held else "trained"
    return StudyTable(f"Operand exchanged, recorded in English, {what} pairs{_of(name)}", tuple(rows), notes)


def _operand_row(words: Words, language: str, held: bool, n: int | None, seed: int) -> Row:
    swaps = operand_swaps(words, language, held=held, n=n, seed=seed)
    parts = [_operand_parts(words, one) for one in swaps]
    base = words.lab.residuals([words.text(one.base) for one in swaps])[0]
    new = words.lab.residuals([words.text(one.english) for one in swaps])[0]

    def by(factors: tuple[float, float]) -> Make:
        return lambda i: swap(parts[i][0], parts[i][1], parts[i][2], factors, parts[i][3], parts[i][4])

    def control(i: int) -> list[Intervention]:
        recording, off, on, donors, at = parts[i]
        deltas = swap_deltas(recording, off, on, OPERAND_FACTORS, donors, at)
        return random_features(words.lab, deltas, seed=seed * 1009 + i)

    variants: list[tuple[str, Make]] = [
        ("0/2", by((0.0, 2.0))),
        ("0/1", by((0.0, 1.0))),
        ("-1/2", by((-1.0, 2.0))),
        ("random features", control),
        ("whole position", lambda i: add_vector(new[i] - base[i], 0, words.text(swaps[i].base)[1], "operand")),
    ]
    wanted = [words.answer(one.new) for one in swaps]
    return count(words, language, [one.base for one in swaps], wanted, variants)

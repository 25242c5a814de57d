"""The same entities cut into one, two and three tokens: how far tokenisation decides where they resolve.

Ghandeharioun et al. 2024 (§4.3) and work on names of several tokens compare entities of different lengths, which differ
in more than that. In `capitals-cut` every city is written in all three ways, so the comparison is paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.studies.patch_items import SOURCE, Item, descriptions, some
from circuit_lens.studies.patch_tables import (
    CHOICE,
    CONTROLS,
    RECOMPUTES,
    Reading,
    difference,
    into_table,
    layer_title,
    read,
    titled,
)
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.cut_names import FORMS, CutCorpus, cut, ending
from circuit_lens.zoo.places import City

STATE = "Fact : the state containing x is"
QUESTIONS: dict[str, tuple[Callable[[], Target], str]] = {
    "description": (descriptions, "city in {state}"),
    "state": (lambda: Target(STATE, name="state", which="all"), "{state}"),
}
"""Name: (target prompt, answer)."""
PAIRS = ((2, 1), (3, 1), (3, 2))
MAX_NEW_TOKENS = 5


@dataclass(frozen=True)
class CutReading:
    """One question about the same entities in all forms.

    Attributes:
        question: One of `QUESTIONS`.
        forms: By number of tokens, read at the last; the entities are in the same order.
        early: Likewise, read one token too early: at the piece before the last, or at the word before the name.
    """

    question: str
    forms: Mapping[int, Reading]
    early: Mapping[int, Reading]

    @cached_property
    def first(self) -> dict[int, Float[ndarray, "n_items"]]:
        """The first source layer at which each entity is right by any target layer; NaN where it never is."""
        return {n: reading.first for n, reading in self.forms.items()}

    @cached_property
    def hard(self) -> Bool[ndarray, "n_items"]:
        """Entities whose last piece alone, by any target layer, does not say the answer."""
        reading = self.forms[FORMS[-1]]
        piece = reading.result.source_layers.index(EMBEDDING)
        return np.logical_not(np.any(reading.right[:, piece], axis=1))

    def column(self, n: int, source: int, target: int) -> Bool[ndarray, "n_items"]:
        """Whether each entity in ``n`` tokens is right, by the numbers of a cell."""
        return self.forms[n].right[:, source, target]


def cut_items(cities: Sequence[City], n: int, question: str, *, early: bool = False) -> list[Item]:
    """Return the cities in ``n`` tokens with the answer to a question, named by their whole name.

    Args:
        cities: What is asked about.
        n: Tokens of each name.
        question: One of `QUESTIONS`.
        early: Leave out the last token of the name.
    """
    found = []
    for city in cities:
        pieces = cut(city.name, n)[: n - 1 if early else n]
        prompt = SOURCE.format(name=" ".join(pieces)).strip()
        answer = QUESTIONS[question][1].format(state=city.place.name)
        found.append(Item(city.name, prompt, answer, "city", ending(city.name), n))
    return found


def read_cuts(
    model: HookedModel, corpus: CutCorpus | None = None, *, n: int | None = None, questions: Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> list[CutReading]:  # fmt: skip
    """Read entities in all forms from all layers into all layers.

    Args:
        model: A model that knows them in all forms.
        corpus: Its facts; None: those of `capitals-cut`.
        n: Entities, the same in all forms, drawn with a seed; None: all.
        questions: Some of `QUESTIONS`; none: all.
        layers: Source and target layers; None: all.
    """
    cities = some((corpus or CutCorpus()).cities, n)
    found = []
    for question in questions or QUESTIONS:
        target = QUESTIONS[question][0]()
        forms, early = ({k: cut_items(cities, k, question, early=cropped) for k in FORMS} for cropped in (False, True))
        found.append(
            CutReading(
                question,
                {k: read(model, one, target, max_new_tokens=MAX_NEW_TOKENS, layers=layers) for k, one in forms.items()},
                {k: read(model, one, target, max_new_tokens=MAX_NEW_TOKENS, layers=layers) for k, one in early.items()},
            )
        )
    return found


def cuts_table(cuts: Sequence[CutReading], *, name: str = "") -> StudyTable:
    """How many entities are right by one fixed cell in each form, beside the controls.

    Args:
        cuts: See `read_cuts`.
        name: Of the model, for the title.
    """
    rows = []
    for one in cuts:
        for n, reading in one.forms.items():
            targets = [layer for layer in reading.result.target_layers if isinstance(layer, int)]
            for first in (EMBEDDING, 1):
                into = "all target layers" if first == EMBEDDING else f"target layers {first} and later"
                part = reading.part(target_layers=[layer for layer in targets if layer >= first])
                rows.append(Row(f"{one.question}: {_tokens(n)}, {into}", part.cells(), part.failures()))
        for n, reading in one.early.items():
            cells = {key: cell for key, cell in reading.cells().items() if key != "any cell"}
            rows.append(Row(f"{one.question}: {_tokens(n)}, read one token too early", cells))
    first = cuts[0].forms[FORMS[0]]
    notes = (
        f"The same {len(first.items)} cities in every row, written in one, two and three tokens, each as often in "
        "training. Source "
        f"{SOURCE!r}, read at the last token, which is the same in the forms of two and three; targets "
        + " and ".join(repr(one.forms[FORMS[0]].result.targets[0]) for one in cuts)
        + "; right: the text begins with the whole answer. The halves of the choice are the same cities in every form.",
        "In training the pieces before the last were hidden from what follows the name in most mentions, so the last "
        "token had to carry the city: a language model is under no such pressure.",
        "Too early: read at the piece before the last, which with what precedes it is this city's alone here; of one "
        "token that is the word before the name, the same for all.",
        CHOICE,
        CONTROLS,
        RECOMPUTES,
    )
    return StudyTable(titled("The same entities in one, two and three tokens", name), tuple(rows), notes)


def cut_layers_table(cuts: Sequence[CutReading], *, name: str = "") -> StudyTable:
    """At which layer the same entity resolves in each form, with paired differences to its form of one token.

    Args:
        cuts: See `read_cuts`.
        name: Of the model, for the title.
    """
    rows = []
    for one in cuts:
        targets = list(one.forms[FORMS[0]].result.target_layers)
        into = targets.index(EMBEDDING)
        for n, reading in one.forms.items():
            for s, layer in enumerate(reading.result.source_layers):
                assert layer is not None, "states of prompts have layers"
                same = targets.index(layer)
                cells = reading.from_layer(s)
                if n != FORMS[0]:
                    cells["into embedding, minus one token"] = difference(
                        one.column(n, s, into), one.column(FORMS[0], s, into)
                    )
                    if layer != EMBEDDING:
                        cells["into the same layer, minus one token"] = difference(
                            one.column(n, s, same), one.column(FORMS[0], s, same)
                        )
                rows.append(Row(f"{one.question}: {_tokens(n)}: {layer_title(layer)}", cells))
    notes = (
        "First right here: by any target layer, and at no earlier source layer. Minus one token: the same city in this "
        "form and in one token, paired, with 95 % bootstrap intervals.",
        RECOMPUTES,
    )
    return StudyTable(titled("At which layer the same entities resolve", name), tuple(rows), notes)


def cut_targets_table(cuts: Sequence[CutReading], *, name: str = "") -> StudyTable:
    """How many entities are right by each target layer in each form, beside the re-embedded token there.

    Args:
        cuts: See `read_cuts`.
        name: Of the model, for the title.
    """
    readings = {f"{one.question}: {_tokens(n)}": reading for one in cuts for n, reading in one.forms.items()}
    return into_table(titled("The same entities by target layer", name), readings, (RECOMPUTES,))


def first_layers_table(cuts: Sequence[CutReading], *, name: str = "") -> StudyTable:
    """The first layer at which entities are right, form by form, and paired differences of forms.

    Args:
        cuts: See `read_cuts`.
        name: Of the model, for the title.
    """
    rows = []
    for one in cuts:
        for n in FORMS:
            counts = Counter(one.first[n][np.isfinite(one.first[n])].astype(int).tolist())
            cells: dict[str, Cell] = {
                "first layer": Mean.of(one.first[n].tolist()),
                "first layer, last piece wrong": Mean.of(one.first[n][one.hard].tolist()),
                "which": "; ".join(f"{layer_title(layer)}: {counts[layer]}" for layer in sorted(counts)),
                "never right": int(np.isnan(one.first[n]).sum()),
            }
            rows.append(Row(f"{one.question}: {_tokens(n)}", cells))
        for more, fewer in PAIRS:
            gap = one.first[more] - one.first[fewer]
            both = gap[np.isfinite(gap)]
            chosen = one.forms[more].chosen.right, one.forms[fewer].chosen.right
            cells = {
                "first layer": Mean.of(gap.tolist()),
                "first layer, last piece wrong": Mean.of(gap[one.hard].tolist()),
                "later": Rate.of((both > 0).tolist()),
                "earlier": Rate.of((both < 0).tolist()),
                "best fixed cell": difference(*chosen),
            }
            rows.append(Row(f"{one.question}: {_tokens(more)} minus {_tokens(fewer)}", cells))
    notes = (
        "First layer: the first source layer from which any target layer is right, the embedding counted as -1, over "
        "the cities that are ever right; differences are paired, over those that are in both forms, with 95 % "
        "bootstrap intervals. Last piece wrong: the cities that the embedding of the last piece gets wrong at every "
        "target layer, the same in all rows; of the others it is right by the share of its family (next tables). "
        "Later, earlier: cities that the first form needs a later or an earlier layer for.",
    )
    return StudyTable(titled("The first layer of the same entities", name), tuple(rows), notes)


def last_piece_table(cuts: Sequence[CutReading], *, name: str = "") -> StudyTable:
    """What the last token says by itself: the embedding moved into the embedding.

    Args:
        cuts: See `read_cuts`.
        name: Of the model, for the title.
    """
    rows = []
    for one in cuts:
        for n, reading in one.forms.items():
            s, t = reading.result.source_layers.index(EMBEDDING), list(reading.result.target_layers).index(EMBEDDING)
            right = one.column(n, s, t)
            family: dict[str, Counter[str]] = {}
            for item in reading.items:
                family.setdefault(item.family, Counter())[str(item.answer)] += 1
            every = {str(item.answer) for item in reading.items}
            wrong = np.flatnonzero(~right)
            others = [set(family[reading.items[i].family]) - {str(reading.items[i].answer)} for i in wrong]
            said = [reading.said(int(i), s, t) for i in wrong]
            cells: dict[str, Cell] = {
                "right": Rate.of(right.tolist()),
                "another of the family": Rate.of(
                    any(text.startswith(answer) for answer in known) for text, known in zip(said, others, strict=True)
                ),
            }
            if len(wrong):
                cells["by chance"] = float(np.mean([len(known) / (len(every) - 1) for known in others]))
            cells["at most, by the last piece"] = sum(max(one.values()) for one in family.values()) / len(right)
            rows.append(Row(f"{one.question}: {_tokens(n)}", cells))
    notes = (
        "The embedding of the last token, moved into the embedding, which is that token written in the prompt. Another "
        "of the family: of the wrong ones, how many say the answer of another city that ends in the same piece; by "
        "chance: how many would if they said any other answer of the table. At most: cities right if the "
        "commonest answer of every last piece were said. A whole name ends in no piece: its family is that of its cut "
        "forms.",
    )
    return StudyTable(titled("What the last piece of a name says", name), tuple(rows), notes)


def cut_tables(
    model: HookedModel, corpus: CutCorpus | None = None, *, n: int | None = None, name: str = ""
) -> list[StudyTable]:
    """Run the study and return all its tables.

    Args:
        model: See `read_cuts`.
        corpus: Likewise.
        n: Likewise.
        name: Of the model, for the titles.
    """
    cuts = read_cuts(model, corpus, n=n)
    makers = cuts_table, cut_targets_table, first_layers_table, cut_layers_table, last_piece_table
    return [make(cuts, name=name) for make in makers]


def _tokens(n: int) -> str:
    return f"{['one', 'two', 'three'][n - 1]} token{'s' * (n > 1)}"

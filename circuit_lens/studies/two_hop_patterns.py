"""What inhibiting and injecting the supernodes of a two-hop question does to the others (Biology, figures 3 to 5).

The published observations on "Dallas", as they are counted here for every prompt:

- "say a capital" off: saying this capital goes down, and the answer becomes the state;
- "capital" off: the same in part;
- the state off: saying this capital goes down, saying a capital stays, and the answer becomes another place's capital;
- the word "state" off: nearly nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuit_lens.errors import InterventionError
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.studies.circuit import (
    CAPITAL,
    NODES,
    SAY_A_CAPITAL,
    SAY_THIS,
    STATE,
    STATE_WORD,
    Circuits,
    Shares,
)
from circuit_lens.studies.places import Places
from circuit_lens.studies.tables import Cell, Failure, Row, StudyTable
from circuit_lens.zoo import templates

if TYPE_CHECKING:
    from circuit_lens.interventions.run import Run
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus

KINDS = ("state", "country", "province")
HALF, ALL = 0.5, 0.8
"""An activation that went down is below the first share of the clean one, one that stayed is above it; nearly nothing
happened where it is above the second."""
SAY, FACTOR = Shares(0.5, 0.5), -2.0
"""Shares of what is said and factor of the inhibition: the choice on trained cities (:func:`pattern_choice_table`)."""
CHOICES = tuple((Shares(low, high), f) for low, high in ((0.5, 0.3), (0.5, 0.5), (0.7, 0.3)) for f in (-1.0, -2.0))

CHECKS: tuple[tuple[str, str], ...] = (
    ("say a capital off: say this capital down", SAY_A_CAPITAL),
    ("say a capital off: answer is the state", SAY_A_CAPITAL),
    ("capital (word) off: say a capital down", CAPITAL),
    ("capital (word) off: say this capital less than clean", CAPITAL),
    ("capital (word) off: answer no longer the capital", CAPITAL),
    ("the state off: say this capital down", STATE),
    ("the state off: say a capital stays", STATE),
    ("the state off: answer is another place's capital", STATE),
    ("state (word) off: say this capital nearly unchanged", STATE_WORD),
    ("state (word) off: answer unchanged", STATE_WORD),
)
ORDERS = (
    "order of say this capital: the state off < capital (word) off < state (word) off",
    "order of say this capital: say a capital off < capital (word) off < state (word) off",
)


@dataclass(frozen=True)
class Outcome:
    """One supernode inhibited on one prompt: the others' activation fractions, and what kind of answer came."""

    fractions: dict[str, float]
    answer: str
    kind: str


@dataclass(frozen=True)
class Measured:
    """One prompt: every supernode inhibited in turn."""

    name: str
    outcomes: dict[str, Outcome]

    def check(self, name: str) -> bool | None:
        """Return whether a published observation holds; None where a supernode is missing or off anyway."""
        node = dict(CHECKS)[name]
        if node not in self.outcomes:
            return None
        one = self.outcomes[node]
        this, a_capital = one.fractions.get(SAY_THIS), one.fractions.get(SAY_A_CAPITAL)
        if this is None or a_capital is None:
            return None
        return {
            "say this capital down": this <= HALF,
            "say a capital down": a_capital <= HALF,
            "say a capital stays": a_capital >= HALF,
            "say this capital less than clean": this < ALL,
            "say this capital nearly unchanged": this >= ALL,
            "answer is the state": one.kind == "the place",
            "answer no longer the capital": one.kind != "own capital",
            "answer is another place's capital": one.kind == "another capital",
            "answer unchanged": one.kind == "own capital",
        }[name.split(": ")[1]]

    def order(self, first: str) -> bool | None:
        """Return whether say this capital goes down most with ``first`` off, then "capital", then "state"."""
        values = [self.outcomes[n].fractions.get(SAY_THIS) for n in (first, CAPITAL, STATE_WORD) if n in self.outcomes]
        if len(values) < 3 or None in values:
            return None
        return values[0] < values[1] < values[2]  # type: ignore[operator]


class Answers:
    """Says what kind of answer a token is."""

    def __init__(self, places: Places) -> None:
        first = places.lab.first_token
        self.first = {p.name: (first(p.relations["capital"]), first(p.name)) for p in places.corpus.places}
        self.capitals = {capital for capital, _ in self.first.values()}

    def kind(self, place: str, token: int) -> str:
        """Return ``"own capital"``, ``"the place"``, ``"another capital"`` or ``"other"``."""
        capital, name = self.first[place]
        if token == capital:
            return "own capital"
        if token == name:
            return "the place"
        return "another capital" if token in self.capitals else "other"


def _items(places: Places, *, held: bool, n: int | None, seed: int) -> list[tuple[int, int]]:
    """Return questions (city, template) about American cities that are answered right."""
    cities = [i for i in range(len(places.cities)) if bool(places.held[i]) is held]
    cities = [i for i in cities if places.cities[i].place.kind == "state"]
    items = [(i, t) for i in cities for t in range(len(templates.TWO_HOP))]
    if n is not None and n < len(items):
        items = random.Random(seed).sample(items, n)
    right = places.lab.right([places.question(i, t) for i, t in items])
    return [item for item, ok in zip(items, right, strict=True) if ok]


def _measure(circuits: Circuits, items: Sequence[tuple[int, int]], factor: float) -> list[Measured]:
    """Inhibit every supernode of every question in turn."""
    places, answers, found = circuits.places, Answers(circuits.places), []
    for city, template in items:
        nodes, outcomes = circuits.nodes(city, template), {}
        recording = places.recording(city, template)
        for name, node in nodes.items():
            try:
                run = circuits.lab.rm.intervene(recording, node.scale(factor))
            except InterventionError:  # no member is active on this prompt
                continue
            token = int(run.logits[-1].argmax())
            fractions = {other: _fraction(run, it) for other, it in nodes.items()}
            kind = answers.kind(places.names[city], token)
            outcomes[name] = Outcome(
                {k: v for k, v in fractions.items() if v is not None}, places.lab.token(token), kind
            )
        found.append(Measured(f"{places.cities[city].name}, template {template}", outcomes))
    return found


def _fraction(run: Run, node: Supernode) -> float | None:
    """Return ``run.activation(node)``, read off all members at once; None where it was off on the clean run."""
    now = before = 0.0
    for layer, site in {(f.layer, f.site) for f in node}:
        d = run.recording.binding.dictionary(layer, site)
        pos, index = zip(*((int(f.pos), f.index) for f in node if f.site == site), strict=True)
        now += float(run.acts[d.site][list(pos), list(index)].sum())
        before += float(run.recording.acts(d)[list(pos), list(index)].sum())
    return now / before if before else None


def ablation_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int | None = None, seed: int = 0, name: str = "",
    places: Places | None = None,
) -> list[StudyTable]:  # fmt: skip
    """Inhibit each supernode in questions about held-out cities: activation fractions, answers, published pattern.

    Args:
        rm: A bundled model with dictionaries.
        corpus: Its corpus.
        n: Questions (held-out city, template), drawn with ``seed``; None: all that are answered right.
        seed: Of the draw.
        name: The model's name.
        places: Cities of all kinds with recordings to share.
    """
    places = Places(rm, corpus, kinds=KINDS) if places is None else places
    circuits = Circuits(places, say=SAY)
    measured = _measure(circuits, _items(places, held=True, n=n, seed=seed), FACTOR)
    of = f" ({name})" if name else ""
    note = (
        f"Activations as a share of the clean run's (1 unchanged, 0 off), mean over questions with a bootstrap "
        f"interval; every supernode is scaled by {FACTOR:g}, its members chosen on trained cities (shares of what is "
        f"said: >= {SAY.low:g} and <= {SAY.high:g}; words and state: >= .5 and <= .3)."
    )
    fractions = StudyTable(f"Inhibition of supernodes, held-out cities{of}", tuple(_fraction_rows(measured)), (note,))
    limits = (
        f"Down: at most {HALF:g} of clean; stays: at least {HALF:g}; nearly unchanged: at least {ALL:g}. n: questions.",
        "The state's supernode is chosen on neutral prompts, the others on two-hop questions about trained cities.",
    )
    return [fractions, StudyTable(f"Published pattern, share of prompts{of}", tuple(_check_rows(measured)), limits)]


def _fraction_rows(measured: Sequence[Measured]) -> list[Row]:
    rows = []
    for node in NODES:
        outcomes = [m.outcomes[node] for m in measured if node in m.outcomes]
        cells: dict[str, Cell] = {
            other: Mean.of([o.fractions[other] for o in outcomes if other in o.fractions]) for other in NODES
        }
        for kind in ("own capital", "the place", "another capital"):
            cells[f"answer: {kind}"] = Rate.of(o.kind == kind for o in outcomes)
        rows.append(Row(f"{node} off", cells))
    return rows


def _check_rows(measured: Sequence[Measured]) -> list[Row]:
    rows = []
    for name, node in CHECKS:
        held = [(m, m.check(name)) for m in measured]
        failures = tuple(Failure(m.name, name.split(": ")[1], m.outcomes[node].answer) for m, ok in held if ok is False)
        rows.append(Row(name, {"holds": Rate.of(ok for _, ok in held if ok is not None)}, failures))
    for name, first in zip(ORDERS, (STATE, SAY_A_CAPITAL), strict=True):
        ordered = [m.order(first) for m in measured]
        rows.append(Row(name, {"holds": Rate.of(ok for ok in ordered if ok is not None)}))
    return rows


def pattern_choice_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int = 40, seed: int = 1, name: str = "",
    places: Places | None = None,
) -> StudyTable:  # fmt: skip
    """How many of the published observations hold on trained cities, by what makes "say ..." and by the factor."""
    places = Places(rm, corpus, kinds=KINDS) if places is None else places
    items = _items(places, held=False, n=n, seed=seed)
    rows = []
    for shares, factor in CHOICES:
        measured = _measure(Circuits(places, say=shares), items, factor)
        checks = [ok for m in measured for check, _ in CHECKS if (ok := m.check(check)) is not None]
        orders = [ok for m in measured for node in (STATE, SAY_A_CAPITAL) if (ok := m.order(node)) is not None]
        cells = {"observations": Rate.of(checks), "orders": Rate.of(orders)}
        rows.append(Row(f"say: >= {shares.low:g}, <= {shares.high:g}; factor {factor:g}", cells))
    of = f" ({name})" if name else ""
    return StudyTable(f"Choice of shares and factor, trained cities{of}", tuple(rows))


def injection_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int = 60, seed: int = 0, name: str = "",
    places: Places | None = None,
) -> StudyTable:  # fmt: skip
    """Inject another state, a country, a province into questions about held-out American cities.

    The own state is scaled by -1 and the other place's supernode set to twice its mean over its trained cities; the
    question goes on asking for "the state". Fractions: the own "say this capital" against the clean run, the other
    place's against its own question.
    """
    places = Places(rm, corpus, kinds=KINDS) if places is None else places
    circuits, answers = Circuits(places, say=SAY), Answers(places)
    held = [i for i in range(len(places.cities)) if bool(places.held[i])]
    right = dict(zip(held, places.lab.right([places.question(i) for i in held]), strict=True))
    sources = [i for i in held if places.cities[i].place.kind == "state" and right[i]]
    rows = []
    for kind, what in (("state", "another state"), ("country", "a country"), ("province", "a Canadian province")):
        donors = [i for i in range(len(places.cities)) if places.cities[i].place.kind == kind and right.get(i, False)]
        if kind == "province" and len(donors) < 2:  # hardly any is held out; the source is
            donors = [i for i in range(len(places.cities)) if places.cities[i].place.kind == kind]
        pairs = [(a, b) for a in sources for b in donors if places.names[a] != places.names[b]]
        pairs = [(a, b) for a, b in pairs if answers.first[places.names[a]][0] != answers.first[places.names[b]][0]]
        rows.append(_injected(circuits, random.Random(seed).sample(pairs, min(n, len(pairs))), what))
    of = f" ({name})" if name else ""
    return StudyTable(f"Injection of another place at the city{of}", tuple(rows))


def _injected(circuits: Circuits, pairs: Sequence[tuple[int, int]], what: str) -> Row:
    places = circuits.places
    hits, own, other, failures, probabilities = [], [], [], [], []
    for a, b in pairs:
        recording, theirs = places.recording(a), places.recording(b)
        run = circuits.lab.rm.intervene(recording, places.swap(a, b))
        token, wanted = int(run.logits[-1].argmax()), places.answer(places.cities[b])
        hits.append(token == wanted)
        probabilities.append(float(run.logits[-1].softmax(-1)[wanted]))
        if token != wanted:
            failures.append(
                Failure(
                    f"{places.cities[a].name} -> {places.names[b]}", places.lab.token(wanted), places.lab.token(token)
                )
            )
        said, there = circuits.said(a, recording.n_pos - 1), circuits.said(b, recording.n_pos - 1)
        if said is not None:
            own.append(run.activation(said))
        if there is not None:
            before = theirs.active_at(theirs.n_pos - 1)
            now = math.fsum(run.feature(f).after for f in there)
            clean = math.fsum(before.get((str(f.site), f.layer, f.index), 0.0) for f in there)
            other.append(now / clean if clean else float("nan"))
    cells: dict[str, Cell] = {
        "its capital": Rate.of(hits),
        "its probability": Mean.of(probabilities),
        "say own capital": Mean.of(own),
        "say its capital": Mean.of(other),
    }
    return Row(what, cells, tuple(failures))

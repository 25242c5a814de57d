"""Two-hop reasoning: the state of the asked city exchanged for another (Lindsey et al. 2025, Biology, section 3).

"Fact: the capital of the state containing Dallas is" -> Austin. The features of Texas at "Dallas" are inhibited and
those of another state injected; right is the other state's capital as the most probable next token. Cities tested are
held out: the model never saw them in a two-hop question, and no supernode was chosen on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from circuit_lens.graph.edits import Intervention
from circuit_lens.graph.rates import Rate
from circuit_lens.interventions.recording import Recording
from circuit_lens.studies.controls import add_vector, random_dictionaries, random_features
from circuit_lens.studies.lab import Job, Question, swap, swap_deltas
from circuit_lens.studies.places import RULE, Places, Rule
from circuit_lens.studies.tables import Failure, Row, StudyTable
from circuit_lens.zoo import templates
from circuit_lens.zoo.corpus import Corpus

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel

FACTORS = ((0.0, 1.0), (-1.0, 2.0), (-2.0, 2.0))
HEADLINE = "-1/2, mean of trained cities"
DONOR, UNCHANGED = "donor's capital", "unchanged"
Make = Callable[[int, int], list[Intervention]]


def swap_rows(
    places: Places, pairs: Sequence[tuple[int, int]], rows: Sequence[tuple[str, Make]], template: int = 0
) -> list[Row]:
    """Return a row per way of changing: how often the donor's answer comes, and how often the own one stays."""
    jobs = [Job(places.recording(a, template), make(a, b)) for _, make in rows for a, b in pairs]
    tokens = places.lab.run(jobs)
    found = []
    for number, (name, _) in enumerate(rows):
        got = tokens[number * len(pairs) : (number + 1) * len(pairs)]
        wanted = [places.answer(places.cities[b]) for _, b in pairs]
        own = [places.answer(places.cities[a]) for a, _ in pairs]
        failures = tuple(
            Failure(f"{places.cities[a].name} -> {places.names[b]}", places.lab.token(w), places.lab.token(g))
            for (a, b), w, g in zip(pairs, wanted, got, strict=True)
            if w != g
        )
        cells = {
            DONOR: Rate.of(g == w for g, w in zip(got, wanted, strict=True)),
            UNCHANGED: Rate.of(g == o for g, o in zip(got, own, strict=True)),
        }
        found.append(Row(name, cells, failures))
    return found


def swap_table(
    rm: ReplacementModel,
    corpus: Corpus | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    controls: bool = True,
    factors: Sequence[tuple[float, float]] = FACTORS,
    wider: bool = True,
    name: str = "",
    places: Places | None = None,
) -> StudyTable:
    """Exchange the state in two-hop questions about held-out cities, with ceilings and controls.

    Args:
        rm: A bundled model with dictionaries.
        corpus: The corpus it was trained on.
        n: Ordered pairs of held-out cities of different states, drawn with ``seed``; None: all of them.
        seed: Of the pairs and of the random controls.
        factors: Factors of the own state's clean and of the other one's recorded activations.
        wider: Rows and controls with ``min_share`` .3 too.
        controls: Ceilings, random features, other states and random dictionaries too.
        name: The model's name, for the title.
        places: Cities with recordings to share.
    """
    places = Places(rm, corpus) if places is None else places
    pairs = places.pairs(held=True, n=n, seed=seed)
    rows = swap_rows(places, pairs, _variants(places, factors, wider))
    if controls:
        rows += swap_rows(places, pairs, [*_ceilings(places), *_random(places, pairs, seed)])
        rows += _wrong_state(places, pairs, seed)
        rows += _random_dictionaries(rm, places, pairs, seed, wider)
        rows += specificity(places, pairs, seed=seed)
    return StudyTable(
        f"Two-hop swap of the state at the city, held-out cities{_of(name)}",
        tuple(_short(row) for row in rows),
        (
            f"Headline rule: {RULE}; chosen on trained cities. n = ordered pairs of held-out cities, both right.",
            "0/1 is the plain exchange; -1/2 and -2/2 inhibit the own state and double the other one.",
            "donor prompt: activations recorded on the donor city's own question instead of the mean over its state's "
            "trained cities; one city does not switch on every feature of its state, and more pairs fail.",
            "untrained dictionary: random encoders and decoders, as many active features; random encoder, fitted "
            "decoder: its decoder is a regression on the model's MLP outputs, so it is no untrained dictionary.",
        ),
    )


def _of(name: str) -> str:
    return f" ({name})" if name else ""


def _short(row: Row) -> Row:
    """Keep the failures only of rows that are meant to succeed."""
    return row if row.rate.share >= 0.5 else replace(row, failures=())


def _variants(places: Places, factors: Sequence[tuple[float, float]], wider: bool) -> list[tuple[str, Make]]:
    """The swap by factors, what it is recorded on, and the wider rule."""
    rows: list[tuple[str, Make]] = []
    for recorded, what in (("mean", "mean of trained cities"), ("donor", "donor prompt")):
        for off, on in factors:
            rule = Rule(off=off, on=on, recorded=recorded)
            rows.append((f"{off:g}/{on:g}, {what}", _by(places, rule)))
    for recorded, what in (("mean", "mean of trained cities"), ("donor", "donor prompt")):
        for off, on in factors[:2] if wider else ():
            rule = Rule(min_share=0.3, off=off, on=on, recorded=recorded)
            rows.append((f"{off:g}/{on:g}, {what}, wider (min_share .3)", _by(places, rule)))
    return rows


def _by(places: Places, rule: Rule) -> Make:
    return lambda a, b: places.swap(a, b, rule)


def _ceilings(places: Places) -> list[tuple[str, Make]]:
    """What exchanging the whole position, or adding the difference of the states' means, does after each block."""
    cities = range(len(places.cities))
    residuals = places.lab.residuals([(q.text, q.at) for q in (places.question(i) for i in cities)])
    rows: list[tuple[str, Make]] = []

    for layer in range(len(residuals) - 1):

        def whole(a: int, b: int, layer: int = layer) -> list[Intervention]:
            vector = residuals[layer, b] - residuals[layer, a]
            return add_vector(vector, layer, places.question(a).at, "position")

        def difference(a: int, b: int, layer: int = layer) -> list[Intervention]:
            vector = residuals[layer, places.siblings(b)].mean(0) - residuals[layer, places.siblings(a)].mean(0)
            return add_vector(vector, layer, places.question(a).at, "mean difference")

        rows.append((f"ceiling: whole position, after block {layer}", whole))
        rows.append((f"ceiling: mean difference of the states, after block {layer}", difference))
    return rows


def _random(places: Places, pairs: Sequence[tuple[int, int]], seed: int) -> list[tuple[str, Make]]:
    """Random features that write as much."""
    numbers = {pair: number for number, pair in enumerate(pairs)}

    def make(a: int, b: int) -> list[Intervention]:
        at = places.question(a).at
        off, on = places.supernode(a, at), places.supernode(b, at)
        deltas = swap_deltas(places.recording(a), off, on, RULE.factors, *places.donors(b, RULE.recorded))
        return random_features(places.lab, deltas, seed=seed * 100_003 + numbers[a, b])

    return [("control: random features, same norm per layer", make)]


def _wrong_state(places: Places, pairs: Sequence[tuple[int, int]], seed: int) -> list[Row]:
    """A third state's supernode: the donor's capital must not come, the third's must."""
    cities = sorted({city for pair in pairs for city in pair})
    third: dict[tuple[int, int], int] = {}
    for number, (a, b) in enumerate(pairs):
        others = [c for c in cities if places.names[c] not in (places.names[a], places.names[b])]
        third[a, b] = random.Random(seed * 100_003 + number).choice(others)
    make: Make = lambda a, b: places.swap(a, third[a, b])  # noqa: E731
    (row,) = swap_rows(places, pairs, [("control: a third state's supernode", make)])
    tokens = places.lab.run([Job(places.recording(a), make(a, b)) for a, b in pairs])
    wanted = [places.answer(places.cities[third[pair]]) for pair in pairs]
    hits = Rate.of(t == w for t, w in zip(tokens, wanted, strict=True))
    return [replace(row, cells={**row.cells, "third state's capital": hits})]


def _random_dictionaries(
    rm: ReplacementModel, places: Places, pairs: Sequence[tuple[int, int]], seed: int, wider: bool
) -> list[Row]:
    """The same swap with dictionaries that were not trained."""
    rows = []
    kinds: tuple[tuple[Literal["untrained", "fitted"], str], ...] = (
        ("untrained", "untrained dictionary"),
        ("fitted", "random encoder, fitted decoder"),
    )
    for kind, what in kinds:
        other = Places(random_dictionaries(rm, kind, corpus=places.corpus, seed=seed), places.corpus)
        for wide in ("", ", wider (min_share .3)")[: 1 + wider]:
            rule = replace(RULE, min_share=0.3) if wide else RULE
            rows += swap_rows(other, pairs, [(f"control: {what}{wide}", _by(other, rule))])
    return rows


# Specificity


def specificity(places: Places, pairs: Sequence[tuple[int, int]], *, n: int = 60, seed: int = 0) -> list[Row]:
    """Return how often the same swap leaves answers alone that have nothing to do with the state.

    The city is mentioned and its state swapped exactly as in the headline row, and then something else is asked:
    "Maria lives in Dallas . The opposite of " small " is "", "Maria lives in Dallas . The capital of France is". Only
    questions answered right before count; right is the same answer after. As a third row, the donor's supernode is
    injected into the same questions without a city, at their first word.
    """
    rng = random.Random(seed)
    chosen = [pairs[i] for i in sorted(rng.sample(range(len(pairs)), min(n, len(pairs))))]
    rows = []
    for what, ask in (("an opposite", _opposite), ("the capital of a named country", _capital)):
        items = [(a, b, *ask(places, rng)) for a, b in chosen]
        rows.append(_unrelated(places, items, f"specificity: city mentioned, asked for {what}", mention=True))
    items = [(a, b, *_opposite(places, rng)) for a, b in chosen]
    rows.append(_unrelated(places, items, "specificity: no city, injected at the first word", mention=False))
    return rows


def _opposite(places: Places, rng: random.Random) -> tuple[tuple[str, ...], int]:
    pairs = [p for p in places.corpus.antonyms if all(i != p.index for _, i in places.corpus.held_antonyms)]
    pair, side = rng.choice(pairs), rng.randrange(2)
    sentence = places.corpus.antonym_about(pair, side, "English", templates.ANTONYM["English"][0])
    prompt, answer = sentence.question
    return prompt, places.lab.first_token(answer[0])


def _capital(places: Places, rng: random.Random) -> tuple[tuple[str, ...], int]:
    place = rng.choice([p for p in places.corpus.places if p.kind == "country"])
    prompt, answer = places.corpus.place_about(place, "capital", templates.PLACE[0]).question
    return prompt, places.lab.first_token(answer[0])


def _unrelated(
    places: Places, items: Sequence[tuple[int, int, tuple[str, ...], int]], name: str, *, mention: bool
) -> Row:
    """Swap in prompts whose answer has nothing to do with it."""
    questions, jobs = [], []
    for a, _, asked, answer in items:
        before = ("Maria", "lives", "in", *places.cities[a].name.split(), ".") if mention else ()
        words = (*before, *asked)
        text, at = places.lab.text(words), places.lab.position(words, len(before) - 2 if mention else 0)
        questions.append(Question(text, at, answer, text))
    right = places.lab.right(questions)
    kept = [(q, item) for q, item, ok in zip(questions, items, right, strict=True) if ok]
    for q, (a, b, _, _) in kept:
        recording = places.lab.record(q.text)
        jobs.append(Job(recording, _swap_here(places, recording, a, b, q.at)))
    tokens = places.lab.run(jobs)
    failures = tuple(
        Failure(f"{q.name} (as in {places.names[item[1]]})", places.lab.token(q.answer), places.lab.token(t))
        for (q, item), t in zip(kept, tokens, strict=True)
        if t != q.answer
    )
    return Row(name, {UNCHANGED: Rate.of(t == q.answer for (q, _), t in zip(kept, tokens, strict=True))}, failures)


def _swap_here(places: Places, recording: Recording, a: int, b: int, at: int) -> list[Intervention]:
    off, on = places.supernode(a, at), places.supernode(b, at)
    return swap(recording, off, on, RULE.factors, *places.donors(b, RULE.recorded))


# The choice of the rule


def choice_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int = 60, seed: int = 1, name: str = "",
    places: Places | None = None,
) -> StudyTable:  # fmt: skip
    """The swap on trained cities by the shares that make a supernode: what the headline rule was chosen from.

    A trained city's supernode is chosen, and its mean recorded, on its state's other trained cities.
    """
    places = Places(rm, corpus) if places is None else places
    pairs = places.pairs(held=False, n=n, seed=seed)
    rows = []
    for low in (0.3, 0.5, 0.7):
        for high in (0.1, 0.3, 0.5):
            rules = [Rule(min_share=low, max_share=high, recorded=recorded) for recorded in ("mean", "donor")]
            made = swap_rows(places, pairs, [(rule.recorded, _by(places, rule)) for rule in rules])
            members = [float(places.mask(a, low, high).sum()) for a, _ in pairs]
            cells = {
                "recorded as mean": made[0].cells[DONOR],
                "recorded on the donor prompt": made[1].cells[DONOR],
                "members": fmean(members),
            }
            rows.append(Row(f"min_share {low:g}, max_share {high:g}", cells))
    note = (
        "Factors -1/2. The rule, min_share .5 and max_share .3, is for all models: on capitals the smallest supernode "
        "that reaches, recorded as mean, what the largest reach."
    )
    return StudyTable(f"Choice of the rule, trained cities{_of(name)}", tuple(rows), (note,))

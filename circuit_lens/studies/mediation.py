"""Direct and indirect path: how much of a city's effect on its answer runs through the state, by graph and by clamping.

The graph's share is linear: of the effect of the city's token embedding on the answer's logit, what passes the features
of the state's supernode at the city. The measured share is live: the embedding is changed, with everything reacting,
once freely and once with the supernode clamped at its clean activations; the share is 1 - clamped / free.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuit_lens.graph.edits import Direction, Intervention
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.rates import Mean
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.interventions.recording import Recording
from circuit_lens.studies.lab import Lab, Question, active
from circuit_lens.studies.places import Places
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo import templates

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus

N_MEAN = 40
"""Trained cities of which the mean embedding is taken."""


def mediation_table(
    rm: ReplacementModel, corpus: Corpus | None = None, *, n: int = 42, seed: int = 0, name: str = "",
    places: Places | None = None,
) -> StudyTable:  # fmt: skip
    """The mediated share in questions about held-out cities: by the graph, and by clamping the state's features.

    Args:
        rm: A bundled model with dictionaries.
        corpus: Its corpus.
        n: Questions, drawn with ``seed`` from all held-out American cities and templates.
        seed: Of the draw and of the control.
        name: The model's name.
        places: Cities with recordings to share.
    """
    places = Places(rm, corpus) if places is None else places
    cities = [i for i in range(len(places.cities)) if bool(places.held[i]) and places.cities[i].place.kind == "state"]
    items = [(i, t) for i in cities for t in range(len(templates.TWO_HOP))]
    items = random.Random(seed).sample(items, min(n, len(items)))
    right = places.lab.right([places.question(i, t) for i, t in items])
    values: dict[str, list[dict[str, float]]] = {
        "the state's supernode": [],
        "control: as many other active features": [],
    }
    for number, (item, ok) in enumerate(zip(items, right, strict=True)):
        if ok:
            for name_, found in zip(values, _measure(places, *item, seed=seed + number), strict=True):
                values[name_].append(found)
    rows = []
    for name_, listed in values.items():
        keys = dict.fromkeys(key for one in listed for key in one)
        cells: dict[str, Cell] = {key: Mean.of([one[key] for one in listed if key in one]) for key in keys}
        rows.append(Row(name_, cells))
    of = f" ({name})" if name else ""
    notes = (
        "Linear: graph.mediation from the city's token to the answer's logit through the features at the city.",
        "Clamped: the token's embedding replaced by the mean of trained cities of other states, or by one of "
        "theirs; the group held at its clean activations, everything else live. The two differ in what "
        "reacts: the linear share freezes attention and norms, and takes the whole embedding as the cause, what "
        "cities have in common included.",
        "The rest of 1 is the direct path. Control: as many features drawn from the others active at the city.",
    )
    return StudyTable(f"Share of the city's effect that runs through its state{of}", tuple(rows), notes)


def _measure(places: Places, city: int, template: int, *, seed: int) -> list[dict[str, float]]:
    """Return the shares through the state's supernode and through random other features of one question."""
    question, recording = places.question(city, template), places.recording(city, template)
    graph = places.lab.rm.attribute(question.text, targets=[question.answer], progress=False)
    source, target = graph.node(f"P{question.at} token"), graph.best_logit
    members = places.supernode(city, question.at)
    others = [f for f in graph_features(recording, question.at) if f not in set(members)]
    on = active(recording, members)
    drawn = random.Random(seed).sample(others, min(len(on), len(others)))
    found = []
    for group in (members, tuple(drawn)):
        there = active(recording, group)
        one: dict[str, float] = {}
        if there:
            one["linear (graph)"] = graph.mediation(source.id, target.id, through=there).share
        for what, change in _changes(places, city, recording, question.at, seed=seed):
            free = _effect(places.lab, recording, question.answer, [change])
            clamped = _effect(places.lab, recording, question.answer, [change, *_clamp(recording, group)])
            one[what] = 1 - clamped / free if free else float("nan")
        found.append(one)
    return found


def graph_features(recording: Recording, pos: int) -> list[Feature]:
    """Return the features active at a position."""
    return [Feature(layer, pos, index, site) for site, layer, index in recording.active_at(pos)]


def _changes(places: Places, city: int, recording: Recording, pos: int, *, seed: int) -> list[tuple[str, Intervention]]:
    """Return the changes of the token's embedding."""
    embedding = places.lab.model.W_E.detach()
    others = [q for name, q in _trained(places) if name != places.names[city]]
    ids = torch.tensor([int(places.lab.record(q.text).tokens[q.at]) for q in others])
    own, drawn = embedding[recording.tokens[pos]], embedding[ids[random.Random(seed).randrange(len(ids))]]
    mean = Direction(embedding[ids].mean(0) - own, 0, pos, "hook_resid_pre", "mean embedding").add(1.0)
    other = Direction(drawn - own, 0, pos, "hook_resid_pre", "another city").add(1.0)
    return [("clamped, mean embedding", mean), ("clamped, embedding of another city", other)]


def _trained(places: Places) -> list[tuple[str, Question]]:
    """Return questions about some trained American cities, with their states."""
    cities = [i for i in range(len(places.cities)) if not places.held[i] and places.cities[i].place.kind == "state"]
    return [(places.names[i], places.question(i)) for i in random.Random(0).sample(cities, N_MEAN)]


def _clamp(recording: Recording, group: Sequence[Feature]) -> list[Intervention]:
    """Return interventions that hold features at their clean activations, also those that are off."""
    on = active(recording, group)
    off = [f for f in group if f not in set(on)]
    held = [Supernode("held on", on).scale(1.0)] if on else []
    return held + ([Supernode("held off", off).set(0.0)] if off else [])


def _effect(lab: Lab, recording: Recording, answer: int, interventions: list[Intervention]) -> float:
    """Return the change of the answer's logit, against the mean logit."""
    run = lab.rm.intervene(recording, interventions)
    now, before = run.logits[-1].double(), run.clean_logits[-1].double()
    return float((now[answer] - now.mean()) - (before[answer] - before.mean()))

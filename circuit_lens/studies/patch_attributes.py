"""Attributes read without examples, beside a linear probe on the same states (Ghandeharioun et al. 2024, §4.2)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.metrics import How, best_fixed
from circuit_lens.patchscopes.sources import EMBEDDING, Vectors
from circuit_lens.protocols import HookedModel
from circuit_lens.studies.patch_items import Relation, relations, some
from circuit_lens.studies.patch_tables import (
    AGAIN,
    CHOICE,
    CONTROLS,
    RECOMPUTES,
    Into,
    Reading,
    difference,
    layer_title,
    read,
    sources,
    titled,
)
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

FOLDS = 3
STEPS = 300
RARE = 10


@dataclass(frozen=True)
class Attribute:
    """A relation, read and probed.

    Attributes:
        relation: What is asked.
        reading: The grid.
        probed: Numbers of the items whose class has another member.
        probe: Whether the probe is right about each of these, by source layer.
    """

    relation: Relation
    reading: Reading
    probed: tuple[int, ...]
    probe: Bool[ndarray, "n_probed n_layers"]

    @property
    def n_classes(self) -> int:
        """Classes that are probed."""
        return len({self.reading.answers[i] for i in self.probed})


def deal_folds(labels: Sequence[str], seed: int = 0) -> list[int]:
    """Return a fold for each item, dealt class by class, so that no class with two members is all in one fold.

    >>> deal_folds(["a", "b", "a", "b"])[0] != deal_folds(["a", "b", "a", "b"])[2]
    True
    """
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    fold, dealt = [0] * len(labels), 0
    for label in sorted(set(labels)):
        for i in order:
            if labels[i] == label:
                fold[i], dealt = dealt % FOLDS, dealt + 1
    return fold


def probe_right(states: Float[ndarray, "n_items d_model"], labels: Sequence[str], seed: int = 0) -> list[bool]:
    """Return whether a multinomial logistic regression, cross-validated on 3 folds, is right about each item.

    States are standardised on the training folds; the penalty is scikit-learn's default (C = 1).

    Args:
        states: One per item.
        labels: Classes; each has at least two members.
        seed: Of the folds.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fold, names, found = np.array(deal_folds(labels, seed)), np.array(labels), np.zeros(len(labels), dtype=bool)
    for k in range(FOLDS):
        test = fold == k
        if not test.any():
            continue
        if len(set(names[~test])) < 2:
            found[test] = names[test] == names[~test][0]
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            model.fit(states[~test], names[~test])
        found[test] = model.predict(states[test]) == names[test]
    return found.tolist()


def read_attributes(
    model: HookedModel,
    asked: Sequence[Relation] | None = None,
    *,
    n: int | None = None,
    max_new_tokens: int = 4,
    how: How = "starts",
    layers: Sequence[int] | None = None,
    probe: bool = True,
) -> list[Attribute]:
    """Read all relations from all layers into all layers, and probe the same states.

    Args:
        model: A model that knows the answers.
        asked: The relations; None: all of the corpus.
        n: Items per relation; None: all.
        max_new_tokens: Tokens to generate.
        how: Where an answer must stand.
        layers: Source and target layers; None: all.
        probe: Fit probes.
    """
    states: dict[tuple[str, ...], Vectors] = {}
    found = []
    for relation in relations(Corpus()) if asked is None else asked:
        chosen = replace(relation, items=tuple(some(relation.items, n)))
        key = tuple(item.prompt for item in chosen.items)
        vectors = states[key] = states[key] if key in states else sources(model, chosen.items, layers)
        reading = read(
            model, chosen.items, chosen.target, max_new_tokens=max_new_tokens, how=how, vectors=vectors, layers=layers
        )
        labels = [str(item.answer) for item in chosen.items]
        counts = Counter(labels)
        probed = [i for i, label in enumerate(labels) if counts[label] > 1] if probe else []
        hits = np.zeros((len(probed), len(vectors.layers or ())), dtype=bool)
        if len({labels[i] for i in probed}) > 1:
            values = vectors.values[probed, :, 0].double().cpu().numpy()
            for layer in range(hits.shape[1]):
                hits[:, layer] = probe_right(values[:, layer], [labels[i] for i in probed])
        else:
            probed, hits = [], hits[:0]
        found.append(Attribute(chosen, reading, tuple(probed), hits))
    return found


def attributes_table(read_all: Sequence[Attribute], *, name: str = "") -> StudyTable:
    """How many attributes are right, by relation.

    Args:
        read_all: See `read_attributes`.
        name: Of the model, for the title.
    """
    rows = [Row(one.relation.name, one.reading.cells(), one.reading.failures()) for one in read_all]
    every = [one.reading for one in read_all]
    fixed = np.concatenate([one.chosen.right for one in every])
    total: dict[str, Cell] = {"best fixed cell": Rate.of(fixed.tolist()), "which": "one for each relation"}
    embedded = [one.embedded for one in every if one.embedded is not None]
    if len(embedded) == len(every):
        total["embedding patch"] = Rate.of(np.concatenate(embedded).tolist())
        total["gain over it"] = difference(fixed, np.concatenate(embedded))
    total |= {
        "unpatched": _sum([one.accuracy.unpatched for one in every]),
        "any target layer, mean over layers": float(
            np.mean(np.concatenate([one.right[:, one.inner].any(2).mean(1) for one in every]))
        ),
        "any cell": _sum([one.accuracy.any_layer for one in every]),
    }
    rows.append(Row("all relations", total))
    targets = dict.fromkeys(one.reading.result.targets[0] for one in read_all)
    notes = (
        "Read at the last token of a neutral sentence into: " + "; ".join(targets) + ".",
        "The paper's figure is 'any target layer', a maximum over target layers, averaged over source layers.",
        CHOICE,
        CONTROLS,
        RECOMPUTES,
    )
    return StudyTable(titled("Attributes without examples", name), tuple(rows), notes)


def attribute_targets_table(read_all: Sequence[Attribute], *, name: str = "") -> StudyTable:
    """How many attributes are right by each target layer, beside the re-embedded token there.

    Args:
        read_all: See `read_attributes`.
        name: Of the model, for the title.
    """
    every = {one.relation.name: one.reading.into() for one in read_all if len(one.relation.items) > 1}
    rows = []
    for same in zip(*every.values(), strict=True):
        again = [one.again for one in same if one.again is not None]
        whole = Into(
            same[0].layer,
            "one for each relation",
            np.concatenate([one.right for one in same]),
            np.concatenate(again) if len(again) == len(same) else None,
        )
        rows.append(Row(f"all relations: into {layer_title(whole.layer)}", whole.cells()))
    for label, found in every.items():
        gains = {f"gain into {layer_title(one.layer)}": one.cells().get("gain") for one in found}
        rows.append(Row(label, {title: gain for title, gain in gains.items() if gain is not None}))
    return StudyTable(titled("Attributes by target layer", name), tuple(rows), (AGAIN, RECOMPUTES))


def probe_table(read_all: Sequence[Attribute], *, name: str = "") -> StudyTable:
    """The best fixed cell beside the best layer of a probe, on the items that can be probed.

    Args:
        read_all: See `read_attributes`.
        name: Of the model, for the title.
    """
    rows, patched, probed, rare = [], [], [], []
    for one in read_all:
        n_items = len(one.relation.items)
        cells: dict[str, Cell] = {"items": n_items, "can be probed": len(one.probed), "classes": one.n_classes}
        if len(one.probed) > 1:
            part = one.reading.part(items=one.probed)
            first, second = part.chosen.right, best_fixed(one.probe[:, part.inner]).right
            patched.append(first)
            probed.append(second)
            if len(one.probed) / one.n_classes < RARE:
                rare.append((first, second))
            embedded = part.result.source_layers.index(EMBEDDING)
            cells |= _both(first, second) | {"probe of the embedding": Rate.of(one.probe[:, embedded].tolist())}
            cells["any target layer, mean over layers"] = float(part.right[:, part.inner].any(2).mean())
            cells["probe, mean over layers"] = float(one.probe[:, part.inner].mean())
        rows.append(Row(one.relation.name, cells))
    if patched:
        rows.append(Row("all relations", _both(np.concatenate(patched), np.concatenate(probed))))
    if rare:
        both = np.concatenate([a for a, _ in rare]), np.concatenate([b for _, b in rare])
        rows.append(Row(f"relations with fewer than {RARE} items a class", _both(*both)))
    notes = (
        f"Probe: multinomial logistic regression on the standardised state of one layer, {FOLDS} folds; its layer, as "
        "the cell, is chosen on one half of the items and scored on the other. Classes with one member cannot be "
        "probed (a capital is nobody else's): both are compared on the items that are left.",
        "The probe learns the relation from a few items; the patchscope asks a model that was trained on all of them. "
        "What is better here says nothing of what a probe could read with more data.",
    )
    return StudyTable(titled("Attributes: patchscope and probe", name), tuple(rows), notes)


def attribute_layers_table(read_all: Sequence[Attribute], *, name: str = "") -> StudyTable:
    """All relations together, by source layer.

    Args:
        read_all: See `read_attributes`.
        name: Of the model, for the title.
    """
    rows = []
    for s, layer in enumerate(read_all[0].reading.result.source_layers):
        any_target = [one.reading.right[:, s].any(1) for one in read_all]
        fixed = [best_fixed(one.reading.right[:, s]).right for one in read_all]
        same = [one.reading.right[:, s, s] for one in read_all]
        common = [one for one in read_all if len(one.probed) > 1]
        cells: dict[str, Cell] = {
            "any target layer": Rate.of(np.concatenate(any_target).tolist()),
            "best fixed target layer": Rate.of(np.concatenate(fixed).tolist()),
            "the same layer": Rate.of(np.concatenate(same).tolist()),
        }
        if common:
            on = [best_fixed(one.reading.right[list(one.probed), s]).right for one in common]
            probe = [one.probe[:, s] for one in common]
            cells["best fixed target layer, items that can be probed"] = Rate.of(np.concatenate(on).tolist())
            cells["probe, the same items"] = Rate.of(np.concatenate(probe).tolist())
            cells["patchscope - probe"] = difference(np.concatenate(on), np.concatenate(probe))
        rows.append(Row(layer_title(layer), cells))
    notes = (
        "The embedding row is the control: moved into the embedding, it is the last token of the name written in the "
        "prompt, which answers whatever the model knows about that token.",
        RECOMPUTES,
    )
    return StudyTable(titled("Attributes, layer by layer", name), tuple(rows), notes)


def _both(first: ndarray, second: ndarray) -> dict[str, Cell]:
    gap: Mean = difference(first, second)
    return {"patchscope": Rate.of(first.tolist()), "probe": Rate.of(second.tolist()), "difference": gap}


def _sum(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(rate.right for rate in rates), sum(rate.asked for rate in rates))

"""The card's figures about effects: of features on the target, of features on each other, of layers on layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from circuit_lens.graph.card_tables import PAIR_PREDICTORS, PREDICTORS, Figure
from circuit_lens.graph.influence import influence
from circuit_lens.graph.statistics import NAN, bootstrap, spearman
from circuit_lens.interventions.gradients import Live, Tape
from circuit_lens.interventions.study import Pairs, Study


def node_effects(study: Study) -> dict[str, Figure]:
    """Predictors of each feature's effect on the target."""
    predicted = _node_predictions(study)
    figures = {}
    for p in PREDICTORS:
        figures |= study.score(f"nodes/{p.key}", predicted[p.key], study.live, signed=p.signed)
    graphs = [p.key for p in PREDICTORS if p.group == "graph"]
    size = np.abs(study.live)

    def difference(at: Int[np.ndarray, "n"]) -> float:
        """The gradient's |ρ| minus the graph's best, which is found anew in every resample."""
        found = {key: spearman(np.abs(predicted[key][at]), size[at]) for key in ("gradient", *graphs)}
        finite = [found[key] for key in graphs if np.isfinite(found[key])]
        return found["gradient"] - max(finite) if finite else NAN

    low, high = study.interval(difference, len(size))
    value = difference(np.arange(len(size)))
    figures["nodes/gradient_minus_graph/abs_spearman"] = Figure(value, low, high, len(size))
    return figures | {"counts/nodes": Figure(float(len(size)), n=1), "counts/able": Figure(float(study.n_able), n=1)}


def _node_predictions(study: Study) -> dict[str, Float[np.ndarray, "n"]]:
    graph, at, delta, share = study.graph, study.node_of[study.sources], study.runs.delta, study.share
    row = graph.nodes.row_of(study.read.node.id)
    assert row is not None
    start = graph.logit_weight.new_zeros(graph.nodes.n_logits)  # this target alone is measured
    start[study.read.node.id - graph.nodes.n_sources] = 1.0
    found = influence(
        graph.adjacency, start, nodes=graph.nodes, convention="paper", totals=graph.row_totals(convention="paper")
    )

    def gradient(*, attention: bool, norms: bool, errors: bool) -> Float[np.ndarray, "n"]:
        tape = Tape(
            study.recording.binding, study.recording.tokens[None],
            Live(attention=attention, norms=norms, errors=errors, mlps=bool(study.linear)),
        )  # fmt: skip
        return study.at_sources(tape.of_logits(lambda logits: study.read.of(logits[0]))) * delta

    return {
        "influence": found.numpy()[at] * np.abs(share),
        "total": graph.total_effect(study.read.node).numpy()[at] * share,
        "direct": graph.adjacency[row].double().numpy()[at] * share,
        "total_norms": gradient(attention=False, norms=True, errors=False),
        "total_norms_attention": gradient(attention=True, norms=True, errors=False),
        "gradient": gradient(attention=True, norms=True, errors=True),
        "gradient_attention_frozen": gradient(attention=False, norms=True, errors=True),
        "activation": np.abs(delta),
        "matched": np.where(study.matched >= 0, study.live[study.matched], NAN),
    }


def pair_effects(study: Study) -> dict[str, Figure]:
    """Predictors of feature → feature effects: on every pair, and where the graph claims a knock-on effect.

    All predictors are compared on the same pairs: of all ablated features with some targets that were drawn.
    """
    felt = study.active.downstream(study.sources) & (study.node_of >= 0)
    targets = np.sort(study.rng.permutation(np.flatnonzero(felt.any(0)))[: study.settings.knock_on_targets])
    felt[:, np.setdiff1d(np.arange(felt.shape[1]), targets)] = False
    figures: dict[str, Figure] = {}
    if not len(targets):
        return {"counts/knock_on_pairs": Figure(0.0, n=1), "counts/pairs": Figure(0.0, n=1)}
    gradients = _gradients(study, targets)
    for part, chosen in (("pairs", felt), ("knock_on", felt & _claimed(study, targets))):
        rows, columns = np.nonzero(chosen)
        figures[f"counts/{part if part == 'pairs' else 'knock_on_pairs'}"] = Figure(float(len(rows)), n=1)
        if len(rows):
            figures |= _pair_scores(study, part, (rows, columns), gradients)
    return figures


def _claimed(study: Study, targets: Int[np.ndarray, "n_target"]) -> Bool[np.ndarray, "n n_active"]:
    """Return the pairs on which the graph claims an effect that runs through other features."""
    edge, total = np.abs(np.nan_to_num(study.edge_pre)), np.abs(np.nan_to_num(study.said_pre))
    least = 1e-6 * total[:, targets].max(initial=0.0)  # less is rounding
    return (edge <= study.settings.edge_share * total) & (total > least)


def _gradients(study: Study, targets: Int[np.ndarray, "n_target"]) -> Float[np.ndarray, "n n_active"]:
    """Return gradient times change at every source, by a live backward pass from each target feature."""
    tape = Tape(study.recording.binding, study.recording.tokens[None], Live())
    found = np.full(study.live_pre.shape, NAN)
    for target in targets:
        feature = study.active.features[target]
        slopes = study.at_sources(tape.of_feature(str(feature.site), int(feature.pos), feature.index))
        found[:, target] = slopes * study.runs.delta
    return found


def _pair_scores(
    study: Study, part: str, pairs: Pairs, gradients: Float[np.ndarray, "n n_active"]
) -> dict[str, Figure]:
    rows, columns = pairs
    live, other = study.live_pre[rows, columns], study.matched[rows]
    predicted: Mapping[str, Float[np.ndarray, "n"]] = {
        "total": study.said_pre[rows, columns],
        "direct": study.edge_pre[rows, columns],
        "gradient": gradients[rows, columns],
        "activation": np.abs(study.runs.delta[rows]),
        "matched": np.where(other >= 0, study.live_pre[other, columns], NAN),
    }
    figures = {}
    for p in PAIR_PREDICTORS:
        figures |= study.score(f"{part}/{p.key}", predicted[p.key], live, signed=p.signed, pairs=pairs)
    for key in ("gradient", "direct"):

        def difference(at: Int[np.ndarray, "n"], key: str = key) -> float:
            return spearman(predicted[key][at], live[at]) - spearman(predicted["total"][at], live[at])

        low, high = study.interval(difference, len(live), pairs)
        value = difference(np.arange(len(live)))
        figures[f"{part}/{key}_minus_graph/spearman"] = Figure(value, low, high, len(live))
    return figures


def faithfulness(study: Study) -> dict[str, Figure]:
    """Cosine and normalised error of the predicted change of a layer's nodes, by distance in layers."""
    figures = {}
    layers, known = study.active.layer, study.node_of >= 0
    for distance in range(1, study.n_layers):
        cosines, errors = [], []
        changes = []
        for i, source in enumerate(study.sources):
            here = known & (layers == layers[source] + distance)
            changes.append((study.live_pre[i, here], study.said_pre[i, here]))
        largest = max((float(real @ real) for real, _ in changes), default=0.0)
        for real, said in changes:
            size = float(real @ real)
            if size <= 1e-10 * largest:  # no change but rounding
                continue
            product = np.sqrt(size * float(said @ said))
            cosines.append(float(real @ said) / product if product > 0 else 0.0)
            errors.append(float(((said - real) ** 2).sum()) / size)
        for key, values, middle in (("cosine", cosines, np.mean), ("error", errors, np.median)):
            found = np.array(values)
            low, high = bootstrap(
                len(found), lambda at, v=found, m=middle: float(m(v[at])), samples=study.settings.samples,
                seed=study.settings.seed,
            )  # fmt: skip
            value = float(middle(found)) if len(found) else NAN
            figures[f"faithfulness/{distance}/{key}"] = Figure(value, low, high, len(found))
    return figures

"""Effects in contrast graphs: along features that switch, what all leaves do in total is the target's change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuit_lens import logit_difference, token_logits
from circuit_lens.attribution.contrast import ContrastModel
from circuit_lens.dictionaries.points import Place
from circuit_lens.graph.graph import AttributionGraph
from tests.invariants.test_contrast import FORMS_ON_CLASSES, SOME, N, contrast, local


@pytest.mark.parametrize(("name", "kind", "form"), FORMS_ON_CLASSES)
def test_total_effects_of_all_leaves_sum_to_the_targets_change(name, kind, form):
    graph = contrast(name, kind, form)
    nodes, n = graph.nodes, graph.nodes.n_features
    switching = int((nodes.activation[:n] - graph.target_value[:n]).abs().gt(1e-6).sum())
    assert switching > 5
    h = graph.target_value[:n]
    for target in range(nodes.n_sources, len(nodes)):
        row = nodes.row_of(target)
        total = graph.total_effect(target)
        leaves, own = float(total[n:].sum()), float((total[:n] / h * graph.target_bias[:n]).sum())
        value = float(graph.target_value[row])
        scale = float(total.abs().sum())
        assert abs(leaves + own + float(graph.target_bias[row]) - value) < 1e-11 * scale
        # Negative control: the gain of one run's features, 1 / activation, is wrong where features switch.
        wrong = _total(graph, row, 1 / nodes.activation[:n])
        own = float((wrong[:n] / nodes.activation[:n] * graph.target_bias[:n]).sum())
        assert abs(float(wrong[n:].sum()) + own + float(graph.target_bias[row]) - value) > 1e-6


def _total(graph: AttributionGraph, row: int, gain: Tensor) -> Tensor:
    n = graph.nodes.n_features
    step = gain[:, None] * graph.adjacency[:n]
    on = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - step[:, :n].T, graph.adjacency[row, :n])
    return graph.adjacency[row] + on @ step


@pytest.mark.parametrize(("name", "kind"), [*SOME, ("llama", "hooked")])
def test_total_effect_is_what_adding_a_source_does_when_features_follow_their_secants(name, kind):
    """Done by hand on the two runs' own maps, with features that react; leaves at zero give the baseline's values."""
    secant = local(name, kind)
    graph = secant.attribute([token_logits(4), logit_difference(5, 9, pos=4)], progress=False)
    nodes, n = graph.nodes, graph.nodes.n_features
    ones = torch.ones(nodes.n_sources - n, dtype=torch.float64)
    whole, acts = run_by_hand(secant, graph, ones)
    assert float((whole - graph.target_value[n:]).abs().max()) < 1e-10
    assert float((acts - nodes.activation[:n]).abs().max()) < 1e-9
    baseline, acts = run_by_hand(secant, graph, 0 * ones, bias=0.0)
    assert float(baseline.abs().max()) == float(acts.abs().max()) == 0.0
    effects = torch.stack([graph.total_effect(t) for t in range(nodes.n_sources, len(nodes))])
    for leaf in torch.arange(len(ones))[::5].tolist():
        more = ones.clone()
        more[leaf] = 2.0
        moved = run_by_hand(secant, graph, more)[0] - whole
        assert float((moved - effects[:, n + leaf]).abs().max()) < 1e-9 * float(effects.abs().max())


def run_by_hand(
    secant: ContrastModel, graph: AttributionGraph, leaves: Tensor, bias: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Run the secant model forwards, leaf sources times ``leaves``; return targets and changes of activations."""
    sources, nodes, n = secant.sources, graph.nodes, graph.nodes.n_features
    runs = secant.clean.frozen, secant.baseline.frozen
    member = secant.all_columns.member
    slope = nodes.activation[:n] / graph.target_value[:n]
    rows = secant.feature_targets(range(n)).vectors
    acts = torch.zeros(n, dtype=torch.float64)

    def at(layer: int, *places: Place) -> Tensor:
        total = torch.zeros_like(runs[0].tokens)
        for i, point in enumerate(sources.points):
            if point.layer == layer and point.place in places:
                own = member[sources.column(i) : sources.column(i) + N] - n
                total += leaves[own, None] * point.vectors
        return total

    x = torch.zeros_like(runs[0].tokens)
    for layer in range(3):
        x = x + at(layer, Place.PRE_EDIT)
        mid = x + sum(r.attention[layer].linear(x) for r in runs) / 2 + at(layer, Place.ATTENTION, Place.MID_EDIT)
        base = x if runs[0].parallel else mid
        read = sum(r.ln2[layer].apply_output(base) for r in runs) / 2
        out = at(layer, Place.MLP_WRITE, Place.POST_EDIT)
        path = sources.paths[layer]
        assert path is not None
        out = out + path.linear(base)
        f = sources.features[layer]
        here = slice(f.start, f.start + len(f))
        pre = (rows[here] * read[f.pos]).sum(-1) + bias * graph.target_bias[here]
        acts[here] = slope[here] * pre
        out.index_add_(0, f.pos, acts[here, None] * f.dictionary.decoder_rows(f.index, torch.float64)[:, 0])
        x = mid + out
    final = sum(r.ln_final.apply_output(x) for r in runs) / 2
    wanted = secant.resolve([token_logits(4), logit_difference(5, 9, pos=4)])
    values = torch.stack([final[r.pos] @ r.vector + bias * r.bias for r in wanted])
    return values, acts


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_paths_and_mediation_add_up_with_features_that_switch(name, kind):
    graph = contrast(name, kind, ("transcoder", {"layers": (1, 2)}), targets=token_logits(4))
    source, target = graph.node("P4 token"), graph.best_logit
    total = float(graph.total_effect(target)[source.id])
    paths = graph.paths(source, target, k=100_000)
    assert sum(path.weight for path in paths) == pytest.approx(total, abs=1e-10)
    through = [i for i in range(graph.nodes.n_features) if int(graph.nodes.layer[i]) == 2]
    mediation = graph.mediation(source, target, through=through)
    passing = sum(path.weight for path in paths if any(node.layer == 2 for node in path.nodes[1:-1]))
    assert mediation.through == pytest.approx(passing, abs=1e-10)
    circuit = graph.prune(node_threshold=0.9, edge_threshold=0.99, convention="conserving")
    assert circuit.nodes.pre_activation is not None

"""One row is the graph's row, and heads and bypass sum to the edge they split."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from circuit_lens import direction, logit_difference
from circuit_lens.attribution.linear_maps import FrozenAttention
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.attribution.targets import stack
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, TargetError
from circuit_lens.graph.nodes import NodeKind
from tests import builders
from tests.invariants import cases
from tests.invariants.test_conservation import spread_metric
from tests.invariants.test_patches import edit

N = 6
SETTINGS: list[dict[str, Any]] = [
    {},
    {"norms": "linear", "mlp": "jacobian"},
    {"fwd_hooks": [("blocks.1.hook_resid_pre", edit)]},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=["default", "linear", "patched"])
@pytest.mark.parametrize("name", builders.ARCHITECTURES)
def test_rows_and_heads_give_the_graphs_edges(name, setting):
    layers = (0, 2) if "mlp" in setting else None
    local = cases.local(
        cases.pair(name, "hooked", "jumprelu_skip", "mlp.hook_in", layers=layers), cases.tokens(N), **setting
    )
    targets = [5, logit_difference(3, 9, pos=2), direction(torch.ones(builders.D_MODEL)), spread_metric]
    graph = local.attribute(targets, progress=False)
    sources = []
    for kind in NodeKind:
        ids = list(cases.ids(graph, kind)) if kind is not NodeKind.LOGIT else []
        sources += [graph.node(i) for i in (ids[:1] + ids[-1:])]
    last = graph.node(graph.nodes.n_features - 1).feature
    rows = [(t, graph.nodes.n_features + i) for i, t in enumerate(targets)] + [(last, graph.nodes.n_features - 1)]
    for target, at in rows:
        row, expected = local.row(target), graph.adjacency[at]
        scale = float(expected.abs().max())
        assert float((row.values - expected).abs().max()) < 1e-12 * scale
        assert row.names == tuple(cases.names(graph)[: graph.nodes.n_sources])
        assert abs(row.bias - float(graph.target_bias[at])) < 1e-12 * max(1, abs(row.bias))
        assert abs(float(row.values.sum()) + row.bias - row.value) < 1e-10
        for source in sources:
            split = local.heads(source, target)
            assert abs(split.edge - float(expected[source.id])) < 1e-11 * max(scale, abs(split.bypass))
            assert float((split.by_position.sum(-1) - split.heads).abs().max()) < 1e-12 * max(1, scale)


def without(local: LocalReplacementModel, pos: int, closed: set[tuple[int, int]]) -> LocalReplacementModel:
    """Return the local model in which the given heads bring nothing to position ``pos``."""
    attention = []
    for layer, frozen in enumerate(local.frozen.attention):
        pattern = frozen.pattern.clone()
        for head in range(frozen.n_heads):
            if (layer, head) in closed:
                pattern[head, pos] = 0
        attention.append(FrozenAttention(frozen.weights, pattern, frozen.norm_in, frozen.norm_out))
    other = object.__new__(LocalReplacementModel)
    other.__dict__.update({k: v for k, v in vars(local).items() if k != "_sweep"})
    other.frozen = dataclasses.replace(local.frozen, attention=attention)
    return other


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "hooked"), ("gemma2", "bridge")])
def test_a_heads_share_is_what_closing_it_takes_away(name, kind):
    """Heads of later layers closed at the target's position, a head's share is what its own closing changes."""
    local = cases.local(cases.pair(name, kind, "skip"), cases.tokens(N))
    targets, pos = stack(local.resolve(5)), N - 1
    feature = local.sources.features[0]
    strongest = int(local.rows(targets)[0, : len(feature)].abs().argmax())
    source = cases.attribute(local.binding and cases.pair(name, kind, "skip"), cases.tokens(N), 5).node(strongest)
    split = local.heads(source, 5)
    n_layers, n_heads = split.heads.shape
    for layer in range(n_layers):
        later = {(above, head) for above in range(layer + 1, n_layers) for head in range(n_heads)}
        before = without(local, pos, later).rows(targets)[0, strongest]
        for head in range(n_heads):
            after = without(local, pos, later | {(layer, head)}).rows(targets)[0, strongest]
            assert abs(float(before - after) - float(split.heads[layer, head])) < 1e-12
    everything = {(layer, head) for layer in range(n_layers) for head in range(n_heads)}
    assert abs(float(without(local, pos, everything).rows(targets)[0, strongest]) - split.bypass) < 1e-12
    assert float(split.heads.abs().max()) > 1e-5  # negative control: heads do carry something


def test_what_has_no_row_or_no_heads_is_an_error():
    rm = cases.pair("gpt2")
    local = cases.local(rm, cases.tokens(N))
    for call in (local.row, lambda target: local.heads("P0 token", target)):
        with pytest.raises(TargetError, match="these are 2"):
            call([5, 6])
    with pytest.raises(NodeNotFoundError, match="no source 'P0 tokn'; nearest: P0 token"):
        local.heads("P0 tokn", 5)
    with pytest.raises(ConsistencyError, match="frozen attention"):
        cases.local(rm, cases.tokens(N), attention="linear").heads("P0 token", 5)

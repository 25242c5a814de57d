"""Fewer nodes, the same rows: what is chosen depends on nothing but the prompt, and nothing vanishes."""

from __future__ import annotations

import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import ConsistencyError, GraphError, NodeNotFoundError
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

N = 6


def shared(graph: AttributionGraph, full: AttributionGraph) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entries of the graph that are no rest, and the full graph's at the same targets and sources."""
    of_full = {name: i for i, name in enumerate(cases.names(full))}
    names = cases.names(graph)
    sources = [i for i in range(graph.nodes.n_sources) if graph.node(i).kind is not NodeKind.REST]
    there = [of_full[names[i]] for i in sources]
    rows = [full.nodes.row_of(of_full[names[i]]) for i in graph.nodes.rows.tolist()]
    return graph.adjacency[:, sources], full.adjacency[rows][:, there]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().amax(1) / b.abs().amax(1)).max())


@pytest.mark.parametrize(("name", "kind"), [(n, "hooked") for n in builders.ARCHITECTURES] + [("gemma2", "bridge")])
def test_rows_of_a_smaller_graph_are_the_full_graphs_and_conserve(name, kind):
    rm = cases.pair(name, kind, "jumprelu")
    full = cases.attribute(rm, cases.tokens(N), [5, 6])
    for k in (0, 37, full.nodes.n_features, 10**6) if kind == "hooked" else (37,):
        graph = cases.attribute(rm, cases.tokens(N), [5, 6], max_features=k, rerank_every=10)
        assert graph.nodes.n_features == min(k, full.nodes.n_features)
        counts = [graph.node(i).index for i in cases.ids(graph, NodeKind.REST)]
        assert graph.nodes.n_features + sum(counts) == full.nodes.n_features
        assert relative(*shared(graph, full)) < 1e-12
        assert float(cases.gaps(graph).max()) < 1e-10
    graph = cases.attribute(rm, cases.tokens(N), [5, 6], max_features=37)
    left = graph.adjacency.clone()
    left[:, graph.nodes.slice_of(NodeKind.REST)] = 0  # negative control: what rest nodes hold is needed
    assert float((left.sum(1) + graph.target_bias - graph.target_value).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "engine"), [("gpt2", "fast"), ("pythia", "fast"), ("gemma2", "reference")])
def test_any_batch_size_gives_the_same_graph(name, engine, dtype):
    rm = cases.pair(name, "hooked", "skip", dtype=dtype)
    for k in (None, 25):
        graphs = [
            cases.attribute(
                rm, cases.tokens(N), max_features=k, rerank_every=6, batch_size=b, engine=engine, check=False
            )
            for b in ((None, 7, 64) if engine == "reference" else (None, 1, 7, 64))
        ]
        for graph in graphs[1:]:
            assert cases.difference(graph, graphs[0]) < (1e-12 if dtype is torch.float64 else 1e-6)
    other = cases.attribute(rm, cases.tokens(N), max_features=24, rerank_every=6, check=False)
    assert cases.names(other) != cases.names(graphs[0])  # negative control: another number is another graph


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ties_go_to_the_lower_index(name):
    """Twins have the same influence on everything; of a pair of them the lower index is chosen first."""
    model = builders.build(name)
    saes = builders.transcoders(model)
    half = saes[0].W_enc.shape[1] // 2
    for sae in saes:
        for weight in (sae.W_enc.data, sae.b_enc.data):
            weight[..., half:] = weight[..., :half]
        sae.W_dec.data[half:] = sae.W_dec.data[:half]
    rm = ReplacementModel(model, saes)
    lonely = 0
    for k in range(1, 16):
        graph = cases.attribute(rm, cases.tokens(N), 5, max_features=k, check=False)
        features = {(n.layer, n.pos, n.index) for n in map(graph.node, range(graph.nodes.n_features))}
        for layer, pos, index in features:
            assert index < half or (layer, pos, index - half) in features
            lonely += index < half and (layer, pos, index + half) not in features
    assert lonely > 0  # negative control: pairs were torn apart


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge")])
def test_an_expanded_graph_has_the_full_graphs_rows(name, kind, tmp_path):
    rm = cases.pair(name, kind, "jumprelu")
    full = cases.attribute(rm, cases.tokens(N), [5, 6])
    graph = cases.attribute(rm, cases.tokens(N), [5, 6], max_features=12)
    rest = max(map(graph.node, cases.ids(graph, NodeKind.REST)), key=lambda n: n.index)
    wider = graph.expand(rest)
    assert wider.nodes.n_features == 12 + rest.index
    assert wider.nodes.count(NodeKind.REST) == graph.nodes.count(NodeKind.REST) - 1
    assert relative(*shared(wider, full)) < 1e-12
    assert float(cases.gaps(wider).max()) < 1e-10

    graph.save(tmp_path / "graph.safetensors")
    loaded = cl.load_graph(tmp_path / "graph.safetensors")
    local = cases.local(rm, cases.tokens(N))
    there = set(cases.names(graph))
    feature = next(n for n in map(full.node, range(full.nodes.n_features)) if n.name not in there).feature
    for ref in (feature, loaded.node(rest.name)):
        more = local.expand(loaded, ref)
        assert more.nodes.n_features == 12 + (1 if ref is feature else rest.index)
        assert relative(*shared(more, full)) < 1e-12
    with pytest.raises(GraphError, match=r"local\.expand"):
        loaded.expand(rest.name)
    with pytest.raises(NodeNotFoundError, match="already has a row"):
        local.expand(loaded, loaded.node(0))
    with pytest.raises(NodeNotFoundError, match="only rest nodes"):
        local.expand(loaded, "P0 token")
    with pytest.raises(ConsistencyError, match="another prompt"):
        cases.local(rm, cases.tokens(N, seed=1)).expand(loaded, feature)
    with pytest.raises(ConsistencyError, match="other settings"):
        cases.local(rm, cases.tokens(N), norms="linear").expand(loaded, feature)
    with pytest.raises(ConsistencyError, match="other weights"):
        cases.local(cases.pair(name, kind, "skip"), cases.tokens(N)).expand(loaded, feature)

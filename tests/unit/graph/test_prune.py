from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_lens.errors import GraphError
from circuit_lens.graph import AttributionGraph, NodeKind
from circuit_lens.graph.prune import cumulative_share, prune_definition, top_share, top_share_definition
from tests.unit.graph.graphs import hand_graph, random_graph
from tests.unit.graph.test_influence import CONVENTIONS, GRAPHS, MakeGraph

THRESHOLDS = st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.98, 1.0])


def full_masks(circuit: AttributionGraph, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks over the full graph's square matrix that a circuit stands for."""
    assert circuit.pruning is not None
    ids = circuit.pruning.node_ids
    nodes = torch.zeros(n, dtype=torch.bool)
    nodes[ids] = True
    edges = torch.zeros(n, n, dtype=torch.bool)
    edges[ids[:, None], ids] = circuit.dense() != 0
    return nodes, edges


@given(GRAPHS, CONVENTIONS, THRESHOLDS, THRESHOLDS)
def test_pruning_keeps_the_nodes_and_edges_of_the_published_algorithm(
    make: MakeGraph, convention: str, node_threshold: float, edge_threshold: float
) -> None:
    graph = make()
    options = {"node_threshold": node_threshold, "edge_threshold": edge_threshold, "convention": convention}
    circuit = graph.prune(**options)
    nodes, edges = full_masks(circuit, len(graph.nodes))
    slow = prune_definition(graph.adjacency, graph.logit_weight, nodes=graph.nodes, **options)
    assert torch.equal(nodes, slow[0])
    assert torch.equal(edges, slow[1])


@given(GRAPHS, THRESHOLDS)
def test_a_circuit_keeps_tokens_and_logits_and_no_node_dangles(make: MakeGraph, threshold: float) -> None:
    graph = make()
    circuit = graph.prune(node_threshold=threshold, edge_threshold=threshold)
    for kind in (NodeKind.TOKEN, NodeKind.LOGIT):
        assert circuit.nodes.count(kind) == graph.nodes.count(kind)
    square = circuit.dense() != 0
    f, errors = circuit.nodes.n_features, circuit.nodes.slice_of(NodeKind.ERROR)
    assert square[:, :f].any(0).all()
    assert square[:f].any(1).all()
    assert square[:, errors].any(0).all()


@given(GRAPHS, THRESHOLDS)
def test_every_kept_edge_and_row_is_the_full_graphs(make: MakeGraph, threshold: float) -> None:
    graph = make()
    circuit = graph.prune(node_threshold=threshold)
    assert circuit.pruning is not None
    ids = circuit.pruning.node_ids
    whole, part = graph.dense()[ids][:, ids], circuit.dense()
    assert torch.equal(part[part != 0], whole[part != 0])
    rows = [graph.nodes.row_of(int(ids[i])) for i in circuit.nodes.rows]
    assert torch.equal(circuit.target_value, graph.target_value[rows])
    for i in range(len(ids)):
        node, same = circuit.node(i), graph.node(int(ids[i]))
        assert (node.kind, node.layer, node.pos, node.index, node.label) == (
            same.kind, same.layer, same.pos, same.index, same.label)  # fmt: skip
        assert circuit.node(same).id == i


@given(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0, 1e-12]), st.floats(0, 1e6)), max_size=400),
    st.floats(0.01, 1.0),
    st.sampled_from([2, 8, 1024]),
)
def test_selection_without_sorting_everything_is_selection_by_sorting(
    values: list[float], threshold: float, bins: int
) -> None:
    given_values = torch.tensor(values, dtype=torch.float64)
    fast = top_share(given_values, threshold, bins=bins)
    assert torch.equal(fast, top_share_definition(given_values, threshold))


@pytest.mark.parametrize("kind", ["lognormal", "uniform", "ties", "one giant"])
def test_selection_agrees_with_sorting_on_many_values(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator, dtype=torch.float64)
    values = {
        "lognormal": (3 * values).exp(), "uniform": values.abs(), "ties": values.abs().round(decimals=1),
        "one giant": torch.where(torch.arange(200_000) == 17, 1e9, values.abs()),
    }[kind]  # fmt: skip
    for threshold in (0.1, 0.5, 0.8, 0.98, 0.999999):
        assert torch.equal(top_share(values, threshold), top_share_definition(values, threshold))


def test_of_equal_values_the_first_are_kept() -> None:
    assert top_share(torch.ones(10, dtype=torch.float64), 0.8).tolist() == [True] * 8 + [False] * 2
    assert top_share(torch.ones(5000, dtype=torch.float64), 0.5, bins=8).nonzero().flatten().tolist() == list(
        range(2500)
    )
    assert not top_share(torch.zeros(4, dtype=torch.float64), 0.5).any()
    assert top_share(torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64), 1.0).tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_cumulative_share_is_small_for_the_important_and_one_for_the_rest() -> None:
    shares = cumulative_share(torch.tensor([1.0, 6.0, 0.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.6, 1.0, 0.9], dtype=torch.float64))
    assert cumulative_share(torch.zeros(3, dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]


def test_pruning_says_what_it_took_and_what_it_took_counts_as_error() -> None:
    graph = random_graph(11, per_group=6, n_pos=5)
    circuit = graph.prune(node_threshold=0.5, edge_threshold=0.7)
    p = circuit.pruning
    assert p is not None
    assert p.n_nodes == len(graph.nodes) > len(circuit.nodes)
    assert p.n_edges == graph.n_edges > circuit.n_edges
    assert p.replacement_score == graph.replacement_score
    torch.testing.assert_close(p.influence, graph.influence()[p.node_ids])
    assert circuit.replacement_score < graph.replacement_score
    assert circuit.completeness_score < graph.completeness_score
    assert circuit.scores().shares["pruned"] > 0.05
    assert graph.scores().shares["pruned"] == 0.0
    rows = [graph.nodes.row_of(int(i)) for i in p.node_ids[circuit.nodes.rows]]
    torch.testing.assert_close(circuit.row_totals(), graph.row_totals()[rows])


def test_influence_in_a_circuit_is_at_most_that_in_the_graph_and_some_is_less() -> None:
    graph = random_graph(11, per_group=6, n_pos=5)
    circuit = graph.prune(node_threshold=0.5, edge_threshold=0.7)
    assert circuit.pruning is not None
    inside, outside = circuit.influence(), circuit.pruning.influence
    assert bool((inside <= outside + 1e-12).all())
    assert float(inside.sum()) < 0.99 * float(outside.sum())


def test_a_circuit_can_be_pruned_again_and_still_knows_the_full_graph() -> None:
    graph = random_graph(11, per_group=6, n_pos=5)
    once = graph.prune(node_threshold=0.9, edge_threshold=0.95)
    twice = once.prune(node_threshold=0.6, edge_threshold=0.9)
    assert once.pruning is not None
    assert twice.pruning is not None
    assert len(twice.nodes) < len(once.nodes)
    assert set(twice.pruning.node_ids.tolist()) < set(once.pruning.node_ids.tolist())
    assert twice.pruning.n_nodes == len(graph.nodes)
    for i, full in enumerate(twice.pruning.node_ids.tolist()):
        assert (twice.node(i).kind, twice.node(i).index) == (graph.node(full).kind, graph.node(full).index)
    assert twice.replacement_score <= once.replacement_score + 1e-12


def test_thresholds_of_one_keep_every_node_and_edge_that_carries_influence() -> None:
    graph = hand_graph()
    circuit = graph.prune(node_threshold=1.0, edge_threshold=1.0)
    assert [node.name for node in circuit.find(range(len(circuit.nodes)))] == [
        "L0 P0 #7", "L1 P1 #9", "L0 P1 error", "P0 token", "P1 token", "logit x", "logit y",
    ]  # fmt: skip
    assert circuit.n_edges == 7
    kept = graph.prune(node_threshold=1.0, edge_threshold=1.0, convention="conserving")
    assert kept.nodes.count(NodeKind.BIAS) == 1


@pytest.mark.parametrize("options", [{"node_threshold": 0.0}, {"node_threshold": 1.1}, {"edge_threshold": -0.5},
                                     {"edge_threshold": float("nan")}, {"convention": "x"}])  # fmt: skip
def test_thresholds_outside_zero_to_one_and_unknown_conventions_are_refused(options: dict) -> None:
    with pytest.raises(GraphError, match=r"must be above 0|No convention"):
        hand_graph().prune(**options)


def test_pruning_leaves_the_graph_as_it_was() -> None:
    graph = random_graph(4)
    before = graph.adjacency.clone(), graph.nodes.kind.clone()
    graph.prune(node_threshold=0.4)
    assert torch.equal(graph.adjacency, before[0])
    assert torch.equal(graph.nodes.kind, before[1])


def test_a_graph_without_features_or_edges_prunes_to_tokens_and_logits() -> None:
    for graph in (random_graph(0, per_group=0), random_graph(0, density=0.0), random_graph(1, n_pos=1, per_group=0)):
        circuit = graph.prune()
        assert circuit.nodes.n_features == 0
        assert circuit.nodes.count(NodeKind.TOKEN) == graph.nodes.count(NodeKind.TOKEN)
        assert str(circuit)

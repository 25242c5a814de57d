from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_lens.errors import GraphError
from circuit_lens.graph import AttributionGraph, NodeKind
from circuit_lens.graph.influence import dense, influence_definition
from circuit_lens.graph.scores import scores_definition
from tests.unit.graph.graphs import hand_graph, random_graph

MakeGraph = Callable[[], AttributionGraph]
GRAPHS = st.builds(
    partial,
    st.just(random_graph),
    st.integers(0, 10**6),
    n_layers=st.integers(1, 4),
    n_pos=st.integers(1, 5),
    per_group=st.integers(0, 5),
    n_logits=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    ties=st.booleans(),
    leaves=st.booleans(),
)
CONVENTIONS = st.sampled_from(["paper", "conserving"])


@given(GRAPHS, CONVENTIONS)
def test_influence_by_one_sweep_is_the_sum_of_matrix_powers(make: MakeGraph, convention: str) -> None:
    graph = make()
    slow = influence_definition(graph.adjacency, graph.logit_weight, nodes=graph.nodes, convention=convention)
    torch.testing.assert_close(graph.influence(convention=convention), slow, rtol=1e-12, atol=1e-14)


@given(GRAPHS)
def test_paper_influence_is_blind_to_biases_and_conserving_influence_is_not(make: MakeGraph) -> None:
    graph = make()
    nodes, changed = graph.nodes, graph.adjacency.clone()
    changed[:, nodes.n_paper :] += 1.0
    other = dataclasses.replace(graph, adjacency=changed)
    torch.testing.assert_close(other.influence(), graph.influence(), rtol=0, atol=0)
    if nodes.n_paper < nodes.n_sources:
        assert not torch.allclose(other.influence(convention="conserving"), graph.influence(convention="conserving"))


@given(GRAPHS)
def test_all_influence_that_leaves_the_logits_arrives_at_leaves_unless_rows_are_empty(make: MakeGraph) -> None:
    graph = make()
    full = graph.adjacency.clone()
    full[:, graph.nodes.slice_of(NodeKind.TOKEN).start] += 10.0  # no row is empty now
    full = dataclasses.replace(graph, adjacency=full)
    for convention in ("paper", "conserving"):
        arrived = full.influence(convention=convention)[graph.nodes.n_features :].sum()
        torch.testing.assert_close(arrived, graph.logit_weight.sum(), rtol=1e-12, atol=0)


def test_influence_of_the_hand_graph() -> None:
    # x (0.6): f1 3/4, f0 1/4. f1: f0 1/4, error 1/2, B 1/4. f0 (paper): A 1. y (0.3): B 1.
    graph = hand_graph()
    f1 = 0.6 * 3 / 4
    f0 = 0.6 / 4 + f1 / 4
    expected = [f0, f1, f1 / 2, f0, f1 / 4 + 0.3, 0.0, 0.0, 0.0]
    torch.testing.assert_close(graph.influence(), torch.tensor(expected, dtype=torch.float64))
    # conserving: f0 has A 2/8 and bias 6/8
    expected[3], expected[5] = f0 / 4, f0 * 3 / 4
    torch.testing.assert_close(graph.influence(convention="conserving"), torch.tensor(expected, dtype=torch.float64))


def test_scores_of_the_hand_graph() -> None:
    graph = hand_graph()
    f1, f0 = 0.45, 0.15 + 0.45 / 4
    tokens, error = f0 + f1 / 4 + 0.3, f1 / 2
    everything = f0 + f1 + tokens + error + 0.9
    paper, conserving = graph.scores(), graph.scores(convention="conserving")
    assert paper.replacement == pytest.approx(tokens / (tokens + error), rel=1e-12)
    assert paper.completeness == pytest.approx(1 - f1 * 0.5 / everything, rel=1e-12)
    assert graph.replacement_score == paper.replacement
    assert graph.completeness_score == paper.completeness
    assert conserving.replacement == pytest.approx((tokens - f0 * 3 / 4) / 0.9, rel=1e-12)
    assert conserving.shares["bias"] == pytest.approx(f0 * 3 / 4 / 0.9, rel=1e-12)
    assert "bias" in str(conserving)
    assert paper.shares["bias"] == 0.0


@given(GRAPHS, CONVENTIONS)
def test_scores_are_the_published_formulas(make: MakeGraph, convention: str) -> None:
    graph = make()
    fast = graph.scores(convention=convention)
    slow = scores_definition(graph.adjacency, graph.logit_weight, nodes=graph.nodes, convention=convention)
    for name in ("replacement", "completeness"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=1e-11, nan_ok=True)
    assert fast.shares == pytest.approx(slow.shares, rel=1e-11, abs=1e-14)
    assert sum(fast.shares.values()) == pytest.approx(1.0) or sum(fast.shares.values()) == 0.0


def test_without_errors_both_scores_are_one_and_an_error_lowers_both() -> None:
    graph = random_graph(3, leaves=False, density=1.0)
    edges = graph.adjacency.clone()
    edges[:, graph.nodes.slice_of(NodeKind.ERROR)] = 0.0
    edges[:, graph.nodes.slice_of(NodeKind.TOKEN).start] = 1.0
    clean = dataclasses.replace(graph, adjacency=edges).scores()
    assert clean.replacement == pytest.approx(1.0)
    assert clean.completeness == pytest.approx(1.0)
    edges = edges.clone()
    edges[-1, graph.nodes.slice_of(NodeKind.ERROR).start] = 1.0
    spoilt = dataclasses.replace(graph, adjacency=edges).scores()
    assert spoilt.replacement < 0.999
    assert spoilt.completeness < 0.999


def test_a_graph_without_any_edge_has_no_influence_and_no_scores() -> None:
    graph = random_graph(0, density=0.0)
    assert not graph.influence().any()
    assert graph.replacement_score != graph.replacement_score  # NaN
    assert graph.completeness_score != graph.completeness_score


def test_float32_edges_give_the_influence_of_float64_to_float32_accuracy() -> None:
    graph = random_graph(5, per_group=30, n_pos=6)
    single = dataclasses.replace(
        graph, adjacency=graph.adjacency.float(), target_bias=graph.target_bias.float(),
        target_value=graph.target_value.float(), logit_weight=graph.logit_weight.float(),
    )  # fmt: skip
    torch.testing.assert_close(single.influence(), graph.influence(), rtol=2e-6, atol=1e-8)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(GraphError, match='"paper" and "conserving"'):
        hand_graph().influence(convention="papers")
    with pytest.raises(GraphError, match="convention"):
        hand_graph().scores(convention="")


def test_dense_has_targets_as_rows_and_nothing_in_the_rows_of_leaves() -> None:
    graph = hand_graph()
    square = dense(graph.adjacency, nodes=graph.nodes)
    assert square.shape == (8, 8)
    assert square[6, 1] == 3.0  # x <- f1
    assert square[7, 4] == 4.0  # y <- B
    assert not square[2:6].any()
    assert torch.equal(square, graph.dense())


def test_an_edge_against_the_order_of_the_model_is_refused() -> None:
    graph = hand_graph()
    for at in ((0, 1), (1, 1)):
        edges = graph.adjacency.clone()
        edges[at] = 1e-9
        with pytest.raises(GraphError, match="against the order"):
            dataclasses.replace(graph, adjacency=edges)

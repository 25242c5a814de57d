from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_lens.errors import GraphError
from circuit_lens.graph import AttributionGraph, NodeKind
from circuit_lens.graph.effects import total_effect, total_effect_by_paths, total_effect_definition
from circuit_lens.graph.path_lengths import mean_path_length, mean_path_length_definition
from circuit_lens.graph.paths import strongest_paths, strongest_paths_definition
from tests.unit.graph.graphs import hand_graph, random_graph
from tests.unit.graph.test_influence import GRAPHS, MakeGraph

SMALL = st.builds(
    partial,
    st.just(random_graph),
    st.integers(0, 10**6),
    n_layers=st.integers(1, 3),
    n_pos=st.integers(1, 3),
    per_group=st.integers(0, 3),
    density=st.sampled_from([0.2, 0.7, 1.0]),
    ties=st.booleans(),
)


@given(GRAPHS, st.integers(0, 10**6))
def test_total_effect_by_one_sweep_is_the_matrix_inverse(make: MakeGraph, pick: int) -> None:
    graph = make()
    row = pick % graph.nodes.n_rows
    mask = torch.rand(graph.nodes.n_features, generator=torch.Generator().manual_seed(pick)) < 0.3
    for blocked in (None, mask):
        options = {"nodes": graph.nodes, "row": row, "blocked": blocked}
        fast, slow = total_effect(graph.adjacency, **options), total_effect_definition(graph.adjacency, **options)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@given(SMALL, st.integers(0, 10**6))
def test_what_leaves_and_own_biases_do_in_total_is_the_targets_value(make: MakeGraph, seed: int) -> None:
    """Where features follow what their rows sum to (`pre_activation`), whatever their activation is."""
    graph = make()
    n, value, bias = graph.nodes.n_features, graph.target_value, graph.target_bias
    switched = with_pre_activations(graph)
    for row in range(n, graph.nodes.n_rows):
        total = switched.total_effect(graph.nodes.node_of_row(row))
        own = torch.where(value[:n] == 0, total[:n], total[:n] / value[:n] * bias[:n])
        explained = float(total[n:].sum() + own.sum() + bias[row])
        assert explained == pytest.approx(float(value[row]), abs=1e-9 * (1 + float(total.abs().sum())))


def with_pre_activations(graph: AttributionGraph) -> AttributionGraph:
    """Return the graph with each feature's pre-activation, its row's sum and own bias, beside its activation."""
    pre = torch.full((len(graph.nodes),), torch.nan, dtype=torch.float64)
    pre[: graph.nodes.n_features] = graph.target_value[: graph.nodes.n_features]
    return dataclasses.replace(graph, nodes=dataclasses.replace(graph.nodes, pre_activation=pre))


def test_where_a_pre_activation_is_given_it_is_the_gain_and_not_the_activation() -> None:
    """In a contrast graph the first feature switches on: its activation changes by 2, its pre-activation by 7.5."""
    graph = with_pre_activations(hand_graph())
    assert graph.target_value[:2].tolist() == pytest.approx([7.5, 2 - 0.5 / 3])
    bos = graph.node("P0 token").id
    onto_f0, onto_f1 = 1 + 3 * 1 / float(graph.target_value[1]), 3 / float(graph.target_value[1])
    assert float(graph.total_effect("x")[bos]) == pytest.approx(2 / 7.5 * onto_f0)
    assert graph.mediation("<bos>", "x", through="second").through == pytest.approx(2 / 7.5 * onto_f1)
    paths = graph.paths("<bos>", "x")
    assert [path.weight for path in paths] == pytest.approx([2 / 7.5 * onto_f1, 2 / 7.5])
    definition = total_effect_definition(graph.adjacency, nodes=graph.nodes, row=2)
    torch.testing.assert_close(definition, graph.total_effect("x"))
    circuit = graph.prune(node_threshold=1.0, edge_threshold=1.0, convention="conserving")
    assert float(circuit.total_effect("x")[circuit.node("P0 token").id]) == pytest.approx(2 / 7.5 * onto_f0)


@given(SMALL)
def test_total_effect_is_the_sum_over_all_paths(make: MakeGraph) -> None:
    graph = make()
    row = graph.nodes.n_rows - 1
    total = total_effect(graph.adjacency, nodes=graph.nodes, row=row)
    for source in range(0, graph.nodes.n_sources, 3):
        by_paths = total_effect_by_paths(graph.adjacency, nodes=graph.nodes, row=row, source=source)
        assert float(total[source]) == pytest.approx(by_paths, rel=1e-9, abs=1e-11)


@given(SMALL)
def test_the_weights_of_all_paths_from_a_source_sum_to_its_total_effect(make: MakeGraph) -> None:
    graph = make()
    source = graph.nodes.slice_of(NodeKind.TOKEN).start
    target = graph.best_logit
    paths = graph.paths(source, target, k=100_000)
    assert sum(path.weight for path in paths) == pytest.approx(float(graph.total_effect(target)[source]), abs=1e-9)


def test_total_effect_of_the_hand_graph() -> None:
    # x: f1 3, f0 1 + 3 * 1/4; A: 2 * (f0's 1.75) / 2; B: 3/4 * -1; error: 3/4 * 2; bias: 6 * 1.75 / 2
    expected = torch.tensor([1.75, 3.0, 1.5, 1.75, -0.75, 5.25], dtype=torch.float64)
    torch.testing.assert_close(hand_graph().total_effect("x"), expected)


def test_the_effect_of_an_active_feature_is_what_a_linear_model_does() -> None:
    """A network whose rows conserve: adding a source's contribution once more and recomputing gives total_effect."""
    graph = random_graph(8, per_group=4, n_pos=3, density=0.8)
    nodes, f = graph.nodes, graph.nodes.n_features

    def run(extra: torch.Tensor) -> torch.Tensor:
        act = nodes.activation[:f].clone()
        pre = torch.zeros(nodes.n_rows, dtype=torch.float64)
        for row in range(nodes.n_rows):  # rows stand in the order of computing
            scale = torch.cat([act / nodes.activation[:f], torch.ones(nodes.n_sources - f, dtype=torch.float64)])
            pre[row] = (graph.adjacency[row] * (scale + extra)).sum()
            if row < f:
                clean = float(graph.adjacency[row].sum())
                act[row] = nodes.activation[row] + pre[row] - clean
        return pre

    clean = run(torch.zeros(nodes.n_sources, dtype=torch.float64))
    for source in range(nodes.n_sources):
        extra = torch.zeros(nodes.n_sources, dtype=torch.float64)
        extra[source] = 1.0
        effect = run(extra) - clean
        for logit in range(nodes.n_logits):
            expected = graph.total_effect(nodes.n_sources + logit)[source]
            torch.testing.assert_close(effect[f + logit], expected, rtol=1e-9, atol=1e-10)


@given(
    SMALL,
    st.integers(1, 8),
    st.sampled_from(["effect", "influence"]),
    st.sampled_from([None, 1, 2, 3, 4]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_strongest_paths_are_those_of_walking_every_path(
    make: MakeGraph, k: int, by: str, max_length: int | None, condition: bool, seed: int
) -> None:
    graph = make()
    nodes = graph.nodes
    sources = [
        *range(nodes.slice_of(NodeKind.TOKEN).start, nodes.slice_of(NodeKind.TOKEN).stop),
        *range(min(2, nodes.n_features)),
    ]
    via = torch.rand(nodes.n_features, generator=torch.Generator().manual_seed(seed)) < 0.3 if condition else None
    options = {"nodes": nodes, "sources": sources, "row": nodes.n_rows - 1, "k": k, "by": by, "via": via,
               "max_length": max_length}  # fmt: skip
    fast, slow = strongest_paths(graph.adjacency, **options), strongest_paths_definition(graph.adjacency, **options)
    assert [abs(p.weight) for p in fast] == pytest.approx([abs(p.weight) for p in slow], rel=1e-9)
    every = {p.ids: p.weight for p in strongest_paths_definition(graph.adjacency, **(options | {"k": 10**6}))}
    assert len({p.ids for p in fast}) == len(fast)
    for path in fast:
        assert path.weight == pytest.approx(every[path.ids], rel=1e-12)


def test_paths_of_the_hand_graph() -> None:
    graph = hand_graph()
    paths = graph.paths("<bos>", "x")
    assert [[node.name for node in path.nodes] for path in paths] == [
        ["P0 token", "L0 P0 #7", "logit x"],
        ["P0 token", "L0 P0 #7", "L1 P1 #9", "logit x"],
    ]
    assert [path.weight for path in paths] == pytest.approx([2 / 2 * 1, 2 / 2 * 1 / 4 * 3])
    assert paths[1].edges == (2.0, 1.0, 3.0)
    assert "first" in str(paths[0])
    assert [len(p.nodes) for p in graph.paths("<bos>", "x", through="second")] == [4]
    assert [len(p.nodes) for p in graph.paths("<bos>", "x", max_length=2)] == [3]
    by_influence = graph.paths("<bos>", "x", by="influence", k=1)
    assert by_influence[0].weight == pytest.approx(2 / 8 * 1 / 4)
    negative = graph.paths("the", ["x", "y"])
    assert [path.weight for path in negative] == pytest.approx([4.0, -0.75])


def test_no_path_gives_an_empty_record_that_prints() -> None:
    paths = hand_graph().paths("<bos>", "y")
    assert len(paths) == 0
    assert str(paths) == "(none)"


def test_mediation_of_the_hand_graph() -> None:
    graph = hand_graph()
    through = graph.mediation("<bos>", "x", through="second")
    assert through.total == pytest.approx(1.75)
    assert through.share == pytest.approx(0.75 / 1.75)
    assert graph.mediation("<bos>", "x", through="first").share == pytest.approx(1.0)
    assert graph.mediation("<bos>", "y", through="first").share != 0  # NaN: no effect at all
    both = graph.mediation(["<bos>", "the"], "x", through=["second"])
    assert both.total == pytest.approx(1.0)
    assert both.through == pytest.approx(0.75 - 0.75)
    assert "%" in str(through)


@given(SMALL, st.integers(0, 10**6))
def test_mediation_is_the_weight_of_the_paths_that_pass(make: MakeGraph, seed: int) -> None:
    graph = make()
    f = graph.nodes.n_features
    if f == 0:
        return
    via = (torch.rand(f, generator=torch.Generator().manual_seed(seed)) < 0.4).nonzero().flatten().tolist() or [0]
    source = graph.nodes.slice_of(NodeKind.TOKEN).start
    result = graph.mediation(source, graph.best_logit, through=via)
    passing = graph.paths(source, graph.best_logit, through=via, k=100_000)
    assert result.through == pytest.approx(sum(path.weight for path in passing), abs=1e-9)


def test_no_question_changes_the_graph() -> None:
    graph = random_graph(9)
    before = graph.adjacency.clone(), graph.logit_weight.clone()
    token = graph.nodes.slice_of(NodeKind.TOKEN).start
    graph.total_effect(graph.best_logit)
    graph.mediation(token, graph.best_logit, through=0)
    graph.paths(token, graph.best_logit)
    graph.influence().zero_()
    assert graph.influence().any()
    assert torch.equal(graph.adjacency, before[0])
    assert torch.equal(graph.logit_weight, before[1])


def test_mediation_through_nodes_that_no_path_uses_is_zero() -> None:
    graph = hand_graph()
    edges = graph.adjacency.clone()
    edges[2, 1] = 0.0  # x no longer reads f1
    cut = dataclasses.replace(graph, adjacency=edges)
    assert cut.mediation("<bos>", "x", through="second").share == 0.0


def test_questions_that_make_no_sense_are_errors_that_say_so() -> None:
    graph = hand_graph()
    with pytest.raises(GraphError, match="is of the kind token and has no inputs"):
        graph.paths("<bos>", graph.node("P1 token"))
    with pytest.raises(GraphError, match="is a target and feeds nothing"):
        graph.paths(graph.node("logit x"), "y")
    with pytest.raises(GraphError, match="through"):
        graph.mediation("first", "x", through="first")
    with pytest.raises(GraphError, match="through"):
        graph.mediation("<bos>", "x", through="P1 token")
    with pytest.raises(GraphError, match="through"):
        graph.mediation("<bos>", "x", through=[])
    with pytest.raises(GraphError, match="at least 1"):
        graph.paths("<bos>", "x", k=0)
    with pytest.raises(GraphError, match='by="effect"'):
        graph.paths("<bos>", "x", by="size")


@given(SMALL, st.sampled_from(["influence", "effect"]))
def test_the_mean_path_length_is_that_of_every_path_followed(make: MakeGraph, by: str) -> None:
    graph = make()
    row = graph.nodes.n_rows - 1
    options = {"nodes": graph.nodes, "row": row, "totals": graph.row_totals(), "by": by}
    try:
        fast = mean_path_length(graph.adjacency, **options)
    except GraphError:
        with pytest.raises(ZeroDivisionError):
            mean_path_length_definition(graph.adjacency, **options)
        return
    assert fast == pytest.approx(mean_path_length_definition(graph.adjacency, **options), rel=1e-9, abs=1e-12)
    assert 0 <= fast <= len(graph.nodes.groups)


def test_a_path_length_has_two_weights_and_no_third() -> None:
    graph = hand_graph()
    assert graph.path_length() == pytest.approx(1.3)
    larger = random_graph(3)
    assert larger.path_length(by="influence") != pytest.approx(larger.path_length(by="effect"))
    with pytest.raises(ValueError, match="influence, effect"):
        graph.path_length(by="weight")

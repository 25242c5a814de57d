from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_lens.errors import GraphError, NodeNotFoundError, TokenNotFoundError
from circuit_lens.graph import NodeKind
from tests.unit.graph.graphs import hand_graph, make_graph, random_graph
from tests.unit.graph.test_influence import GRAPHS, MakeGraph


def test_inputs_and_outputs_are_the_row_and_the_column_by_size() -> None:
    graph = hand_graph()
    inputs = graph.inputs("x")
    assert [(edge.source.name, edge.weight) for edge in inputs] == [("L1 P1 #9", 3.0), ("L0 P0 #7", 1.0)]
    assert [edge.share for edge in inputs] == [0.75, 0.25]
    assert [(edge.target.name, edge.weight) for edge in graph.outputs("first")] == [("L1 P1 #9", 1.0), ("logit x", 1.0)]
    assert [edge.weight for edge in graph.inputs("L1 P1 #9", n=2)] == [2.0, 1.0]  # -1 is as large but a later source
    assert "first" in str(inputs)
    assert "second" in inputs._repr_html_()
    with pytest.raises(GraphError, match="is of the kind error and has no inputs"):
        graph.inputs("L0 P1 error")
    with pytest.raises(GraphError, match="feeds nothing"):
        graph.outputs("logit x")


@given(GRAPHS, st.sampled_from([0.0, 0.5, 1.0]))
def test_edges_are_exactly_the_entries_that_pass_the_filter(make: MakeGraph, min_weight: float) -> None:
    graph = make()
    edges = graph.edges(min_weight=min_weight, n=None)
    square = graph.dense()
    assert {(e.target.id, e.source.id) for e in edges} == {
        (t, s) for t, s in square.nonzero().tolist() if abs(float(square[t, s])) >= min_weight
    }
    assert all(float(square[e.target.id, e.source.id]) == e.weight for e in edges)
    sizes = [abs(e.weight) for e in edges]
    assert sizes == sorted(sizes, reverse=True)


def test_edges_between_selectors() -> None:
    graph = hand_graph()
    assert [e.weight for e in graph.edges(source=["first", "second"], target=["x", "y"])] == [3.0, 1.0]
    every = graph.edges(n=None)
    for n in range(len(every) + 2):
        assert graph.edges(n=n) == every[:n]


def test_top_ranks_by_what_it_says_and_filters_by_position_and_kind() -> None:
    graph = hand_graph()
    assert [r.node.name for r in graph.top()] == ["L1 P1 #9", "L0 P0 #7"]
    assert [r.node.name for r in graph.top(by="activation")] == ["L1 P1 #9", "L0 P0 #7"]
    assert [r.score for r in graph.top(by="effect")] == [3.0, 1.75]
    assert [r.score for r in graph.top(by="effect", kind=None, target="y")] == [4.0]
    assert [r.node.name for r in graph.top(pos="<bos>")] == ["L0 P0 #7"]
    assert [r.node.name for r in graph.top(kind="token")] == ["P1 token", "P0 token"]
    assert len(graph.top(1, kind=None)) == 1
    assert graph.top(kind="bias") == ()
    assert [r.node.name for r in graph.top(kind="bias", convention="conserving")] == ["L0 P0 attention bias"]
    assert "influence" in {r.by for r in graph.top()}
    with pytest.raises(TokenNotFoundError):
        graph.top(pos="Austin")
    with pytest.raises(GraphError, match='by="influence"'):
        graph.top(by="size")


def test_a_string_means_a_token_as_source_and_a_logit_as_target_and_alone_must_be_unique() -> None:
    graph = hand_graph()
    same = dataclasses.replace(graph, token_strings=("x", "y"))
    assert same.find("x", role="source")[0].kind is NodeKind.TOKEN
    assert same.find("x", role="target")[0].kind is NodeKind.LOGIT
    with pytest.raises(NodeNotFoundError, match="names 2 nodes"):
        same.node("x")
    assert same.node("logit x").kind is NodeKind.LOGIT
    repeated = dataclasses.replace(graph, token_strings=("a", "a"))
    with pytest.raises(TokenNotFoundError, match="occurs 2 times"):
        repeated.paths("a", "x")
    assert repeated.node("a", which="last").pos == 1


def test_names_that_nothing_has_are_errors_with_the_nearest() -> None:
    graph = hand_graph()
    with pytest.raises(NodeNotFoundError, match="nearest: second"):
        graph.node("secnd")
    with pytest.raises(NodeNotFoundError, match="0 to 7"):
        graph.node(8)
    with pytest.raises(NodeNotFoundError):
        graph.node(-1)
    gone = graph.prune(node_threshold=0.05)
    with pytest.raises(NodeNotFoundError, match="pruned"):
        gone.node(graph.node("L0 P1 error"))


def test_the_text_form_says_prompt_output_scores_and_strongest_features() -> None:
    graph = random_graph(0)
    text = str(graph)
    assert repr(graph) == text
    for part in ("<bos> the capital Dallas", "'out0' 0.700", "paper: replacement score", "conserving:", "strongest"):
        assert part in text
    assert "of " in str(graph.prune()).split("pruned")[1]
    assert "&lt;bos&gt;" in graph._repr_html_()
    assert "<bos>" not in graph._repr_html_()


@pytest.mark.usefixtures("unchecked")
def test_frames_hold_every_node_and_every_edge() -> None:
    graph = random_graph(2).prune(node_threshold=0.9)
    nodes, edges = graph.to_frame(), graph.to_frame("edges")
    assert len(nodes) == len(graph.nodes)
    assert list(nodes["name"]) == [graph.nodes.name(i) for i in range(len(graph.nodes))]
    assert len(edges) == graph.n_edges
    square = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    weights = torch.tensor(edges["weight"].tolist(), dtype=torch.float64)
    square[edges["target"].tolist(), edges["source"].tolist()] = weights
    assert torch.equal(square, graph.dense())
    what: Any = "paths"
    with pytest.raises(GraphError, match="to_frame"):
        graph.to_frame(what)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused() -> None:
    graph = hand_graph()
    with pytest.raises(GraphError, match=r"adjacency must have shape \(4, 6\)"):
        dataclasses.replace(graph, adjacency=graph.adjacency[:3])
    with pytest.raises(GraphError, match="logit_weight must have shape"):
        dataclasses.replace(graph, logit_weight=torch.ones(1, dtype=torch.float64))
    with pytest.raises(GraphError, match="at least one logit"):
        make_graph(graph.nodes.select(torch.arange(6)), torch.zeros(2, 6), n_pos=2, n_layers=2)


def test_a_graph_of_one_token_and_one_logit_answers_every_question() -> None:
    graph = random_graph(0, n_layers=1, n_pos=1, per_group=0, n_logits=1, leaves=False)
    assert graph.top() == ()
    assert graph.best_logit.label == "out0"
    assert len(graph.paths(graph.nodes.slice_of(NodeKind.TOKEN).start, "out0")) <= 1
    assert graph.total_effect("out0").shape == (2,)
    assert str(graph.prune())

from __future__ import annotations

import pytest
import torch

from circuit_lens.errors import GraphError, NodeNotFoundError, TokenNotFoundError
from circuit_lens.graph import Feature, NodeKind, NodeTable, Section, find_position
from circuit_lens.interop import to_json
from tests.unit.graph.graphs import hand_graph, make_graph, random_graph

TOKENS = ("<bos>", "Fact", ":", " the", " capital", " of", " the", " state", " containing", " Dal", "las", " is")


def test_every_kind_has_its_section_in_the_one_order_and_sections_tile_the_table() -> None:
    nodes = random_graph(0).nodes
    ends = [nodes.slice_of(kind) for kind in NodeKind]
    assert [part.start for part in ends] == [0, *(part.stop for part in ends[:-1])]
    assert ends[-1].stop == len(nodes)
    assert all(bool((nodes.kind[part] == int(kind)).all()) for kind, part in zip(NodeKind, ends, strict=True))
    assert nodes.n_sources + nodes.n_logits == len(nodes)


def test_row_of_and_node_of_row_are_inverse_and_leaves_have_no_row() -> None:
    nodes = random_graph(1).nodes
    assert [nodes.row_of(int(i)) for i in nodes.rows] == list(range(nodes.n_rows))
    assert [nodes.node_of_row(r) for r in range(nodes.n_rows)] == nodes.rows.tolist()
    assert all(nodes.row_of(i) is None for i in range(nodes.n_features, nodes.n_sources))


def test_groups_are_the_runs_of_equal_layer_and_site() -> None:
    nodes = random_graph(2).nodes
    groups = [{(int(nodes.layer[i]), int(nodes.site[i])) for i in range(g.start, g.stop)} for g in nodes.groups]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == len(groups)
    assert sum(g.stop - g.start for g in nodes.groups) == nodes.n_features


@pytest.mark.parametrize("seed", range(5))
def test_names_are_unique_and_name_their_node(seed: int) -> None:
    graph = random_graph(seed)
    names = [graph.nodes.name(i) for i in range(len(graph.nodes))]
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        assert graph.node(name).id == i
        assert graph.node(name.upper()).id == i


def test_two_targets_of_one_string_have_two_names() -> None:
    nodes = NodeTable.build([Section(NodeKind.LOGIT, pos=torch.tensor([0, 1]), labels=("x", "x"))])
    assert nodes.name(0) != nodes.name(1)


def test_a_table_out_of_order_is_refused_and_build_puts_sections_in_order() -> None:
    token, logit = (Section(kind, pos=torch.tensor([0])) for kind in (NodeKind.TOKEN, NodeKind.LOGIT))
    nodes = NodeTable.build([logit, token])
    assert nodes.kind.tolist() == [NodeKind.TOKEN, NodeKind.LOGIT]
    with pytest.raises(GraphError, match="order"):
        NodeTable(nodes.kind.flip(0), nodes.layer, nodes.pos, nodes.index, nodes.site, nodes.sites, nodes.activation,
                  nodes.labels)  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layer": [1, 0], "pos": [0, 0], "index": [0, 0]}, "sorted by"),
        ({"layer": [0, 0], "pos": [1, 0], "index": [0, 0]}, "sorted by"),
        ({"layer": [0, 0], "pos": [0, 0], "index": [5, 4]}, "sorted by"),
        ({"layer": [0, 0], "pos": [0, 0], "index": [5, 5]}, "distinct"),
    ],
)
def test_features_out_of_order_or_twice_are_refused(columns: dict[str, list[int]], message: str) -> None:
    given = {name: torch.tensor(values) for name, values in columns.items()}
    with pytest.raises(GraphError, match=message):
        NodeTable.build([Section(NodeKind.FEATURE, activation=torch.ones(2), **given)])


def test_a_site_out_of_range_and_a_kind_given_twice_are_refused() -> None:
    with pytest.raises(GraphError, match="site must index"):
        NodeTable.build([Section(NodeKind.ERROR, pos=torch.tensor([0]), layer=0, site=1)], sites=("",))
    with pytest.raises(GraphError, match="one section"):
        NodeTable.build([Section(NodeKind.TOKEN, pos=torch.tensor([p])) for p in (0, 1)])
    with pytest.raises(GraphError, match="nearest: feature"):
        NodeKind.parse("featur")


@pytest.mark.parametrize(
    ("pos", "which", "expected"),
    [
        (3, None, 3), (-1, None, 11), (" capital", None, 4), ("capital", None, 4), ("the", "last", 6),
        ("the", "first", 3), ("the", 1, 6), ("Dallas", None, 10), (" Dallas is", None, 11),
        ("state containing", None, 8),        ("Fact:", None, 2), ("<bos>", None, 0),
    ],
)  # fmt: skip
def test_a_string_names_one_token_and_a_span_its_last(pos: int | str, which: str | int | None, expected: int) -> None:
    assert find_position(TOKENS, pos, which=which) == expected


def test_words_without_blanks_make_spans_too() -> None:
    assert find_position(("<bos>", "New", "York", "is"), "New York") == 2
    assert find_position(("<|endoftext|>", "The", "ĠEiffel", "ĠTower"), "Eiffel Tower") == 3


@pytest.mark.parametrize(
    ("pos", "which", "message"),
    [
        ("the", None, r"occurs 2 times, at positions \[3, 6\]"),
        ("the", 2, "which=2 is not valid"),
        ("the", -1, "which=-1 is not valid"),
        ("capitl", None, "nearest: capital"),
        ("Dall", None, "no token 'Dall'"),
        ("", None, "no token ''"),
        (12, None, "Position 12 does not exist"),
        (-13, None, "Position -13"),
    ],
)
def test_a_position_that_names_no_token_or_several_is_an_error_that_helps(pos, which, message: str) -> None:
    with pytest.raises(TokenNotFoundError, match=message):
        find_position(TOKENS, pos, which=which)


def test_a_feature_with_a_string_position_finds_its_node_and_a_wrong_one_says_what_is_there() -> None:
    graph = hand_graph()  # tokens "<bos>", " the"
    assert graph.node(Feature(layer=1, pos="the", index=9)).id == 1
    assert graph.node(Feature(layer=1, pos=-1, index=9, site="m.1")).feature == Feature(1, 1, 9, "m.1")
    with pytest.raises(NodeNotFoundError, match="among them 9"):
        graph.node(Feature(layer=1, pos=1, index=8))
    with pytest.raises(NodeNotFoundError, match=r"layers with features are \[0, 1\]"):
        graph.node(Feature(layer=5, pos=1, index=8))
    with pytest.raises(NodeNotFoundError):
        graph.node(Feature(layer=1, pos=1, index=9, site="m.0"))


def test_a_feature_of_a_layer_with_two_dictionaries_needs_its_site() -> None:
    two = Section(NodeKind.FEATURE, pos=torch.zeros(2, dtype=torch.long), layer=0, index=3, site=torch.tensor([0, 1]),
                  activation=torch.ones(2))  # fmt: skip
    logit = Section(NodeKind.LOGIT, pos=torch.tensor([0]), layer=1, labels=("x",))
    nodes = NodeTable.build([two, logit], sites=("attn", "mlp"))
    graph = make_graph(nodes, torch.zeros(3, 2, dtype=torch.float64), n_pos=1, n_layers=1)
    with pytest.raises(NodeNotFoundError, match="give site="):
        graph.node(Feature(0, 0, 3))
    assert graph.node(Feature(0, 0, 3, site="mlp")).id == 1
    assert [graph.nodes.name(i) for i in (0, 1)] == ["L0 P0 #3 (attn)", "L0 P0 #3 (mlp)"]
    assert graph.node("L0 P0 #3 (mlp)").id == 1
    assert [node["node_id"] for node in to_json(graph)["nodes"]] == ["0_attn_3_0", "0_mlp_3_0", "2_0_0"]

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import torch

from circuit_lens.errors import GraphFileError, NodeNotFoundError
from circuit_lens.graph import AttributionGraph, NodeKind, NodeTable, Section
from circuit_lens.graph import store as store_module
from circuit_lens.interop import to_json
from circuit_lens.interop.neuronpedia import cantor
from tests.unit.graph.graphs import hand_graph, make_graph, random_graph


@pytest.fixture
def schema() -> dict:
    """The published schema, from the folder of reference data that CIRCUIT_LENS_DATA names."""
    folder = os.environ.get("CIRCUIT_LENS_DATA")
    if not folder:
        pytest.skip("CIRCUIT_LENS_DATA is not set")
    found = sorted(Path(folder).rglob("graph-schema.json"))
    if not found:
        pytest.skip(f"no graph-schema.json below {folder}")
    return json.loads(found[0].read_text(encoding="utf-8"))


def cases() -> list[AttributionGraph]:
    graph = random_graph(0, per_group=5)
    return [graph, graph.prune(), graph.prune(convention="conserving"), hand_graph(), random_graph(1, per_group=0)]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("all_kinds", [False, True])
def test_the_document_is_valid_by_the_published_schema(schema: dict, number: int, all_kinds: bool) -> None:
    document = json.loads(json.dumps(to_json(cases()[number], all_kinds=all_kinds)))
    jsonschema.validate(document, schema)
    del document["nodes"][0]["clerp"]
    with pytest.raises(jsonschema.ValidationError):  # the control: the schema does refuse
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("all_kinds", [False, True])
def test_ids_are_unique_and_every_link_joins_two_nodes(number: int, all_kinds: bool) -> None:
    document = to_json(cases()[number], all_kinds=all_kinds)
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] for node in document["nodes"]}) == len(ids)
    assert {link[end] for link in document["links"] for end in ("source", "target")} <= set(ids)


def test_the_hand_graph_becomes_these_nodes_and_links() -> None:
    document = to_json(hand_graph())
    assert [node["node_id"] for node in document["nodes"]] == [
        "0_7_0", "1_9_1", "0_-1_1", "E_11_0", "E_12_1", "3_3_1", "3_4_1",
    ]  # fmt: skip
    assert [node["feature"] for node in document["nodes"]] == [cantor(0, 7), cantor(1, 9), -1, 0, 1, 3, 4]
    assert [node["layer"] for node in document["nodes"]] == ["0", "1", "0", "E", "E", "3", "3"]
    assert [node["ctx_idx"] for node in document["nodes"]] == [0, 1, 1, 0, 1, 1, 1]
    assert document["nodes"][0]["clerp"] == "first"
    assert document["nodes"][1]["activation"] == 4.0
    assert [node["is_target_logit"] for node in document["nodes"]] == [False] * 5 + [True, False]
    assert {(link["source"], link["target"], link["weight"]) for link in document["links"]} == {
        ("E_11_0", "0_7_0", 2.0), ("0_7_0", "1_9_1", 1.0), ("E_12_1", "1_9_1", -1.0), ("0_-1_1", "1_9_1", 2.0),
        ("0_7_0", "3_3_1", 1.0), ("1_9_1", "3_3_1", 3.0), ("E_12_1", "3_4_1", 4.0),
    }  # fmt: skip
    everything = to_json(hand_graph(), all_kinds=True)
    assert {node["feature_type"] for node in everything["nodes"]} - {n["feature_type"] for n in document["nodes"]} == {
        "bias"
    }
    assert {"source": "0_bias-attention_0", "target": "0_7_0", "weight": 6.0} in everything["links"]


def test_an_error_never_shares_the_id_of_a_feature() -> None:
    """Layer-0 feature 2 at position 1 and layer 2's error at position 1: the old form 0_layer_position collides."""
    nodes = NodeTable.build(
        [
            Section(NodeKind.FEATURE, pos=torch.tensor([1]), layer=0, index=2, activation=torch.ones(1)),
            Section(NodeKind.ERROR, pos=torch.tensor([1]), layer=2),
            Section(NodeKind.LOGIT, pos=torch.tensor([1]), layer=3, labels=("x",)),
        ]
    )
    graph = make_graph(nodes, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), n_pos=2, n_layers=3)
    assert [node["node_id"] for node in to_json(graph)["nodes"]] == ["0_2_1", "2_-1_1", "4_0_1"]


def test_cantor_pairs_are_the_known_ones_and_never_collide() -> None:
    assert [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 0), cantor(1, 1)] == [0, 1, 2, 3, 4]
    assert len({cantor(layer, index) for layer in range(30) for index in range(200)}) == 6000


def test_influence_is_cumulative_and_only_a_pruned_graph_has_it() -> None:
    graph = random_graph(0, per_group=5)
    document = to_json(graph)
    assert "node_threshold" not in document["metadata"]
    assert {node["influence"] for node in document["nodes"]} == {None}
    circuit = graph.prune(node_threshold=0.7)
    document = to_json(circuit)
    assert document["metadata"]["node_threshold"] == 0.7
    assert document["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.98}
    of_features = [node["influence"] for node in document["nodes"] if "transcoder" in node["feature_type"]]
    strongest = circuit.top(1)[0].node.id
    assert of_features[strongest] == min(of_features) > 0
    assert [node["influence"] for node in document["nodes"] if node["feature_type"] == "logit"] == [None, None]


@pytest.mark.parametrize("label", ['"', 'say "hi" (p=9)', " Austin", "", "\n", "反义词", "a (p=0.5) b"])
def test_readers_find_token_and_probability_in_the_text_of_any_logit(label: str) -> None:
    graph = hand_graph()
    labels = (*graph.nodes.labels[:-2], label, "other")
    nodes = dataclasses.replace(graph.nodes, labels=labels)
    odd = dataclasses.replace(graph, nodes=nodes, token_strings=('"', 'q"q'))
    document = to_json(odd)
    for node in document["nodes"]:
        if node["feature_type"] in ("logit", "embedding"):
            assert node["clerp"].count('"') == 2
        if node["feature_type"] == "logit":  # how both viewers read it
            assert node["clerp"].count("(p=") == 1
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=5e-4)


def test_slug_and_scan_hold_only_letters_that_an_address_may_hold() -> None:
    graph = dataclasses.replace(hand_graph(), prompt='Fact: "the capital/état"?', manifest={"model": "org/Model v2"})
    metadata = to_json(graph)["metadata"]
    assert metadata["slug"] == "fact-the-capital-tat"
    assert metadata["scan"] == "Model-v2"
    assert metadata["prompt"] == graph.prompt
    empty = to_json(dataclasses.replace(graph, prompt="???", manifest={}), slug="../x y", scan="..")["metadata"]
    assert empty["slug"] == "x-y"
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", empty["scan"])
    assert to_json(dataclasses.replace(graph, prompt="???"))["metadata"]["slug"] == "graph"


def test_pins_are_ids_and_a_pin_that_does_not_exist_is_an_error() -> None:
    assert to_json(hand_graph(), pinned=["first", "x"])["qParams"]["pinnedIds"] == ["0_7_0", "3_3_1"]
    with pytest.raises(NodeNotFoundError):
        to_json(hand_graph(), pinned=["nothing"])


def test_weights_of_float32_come_back_exactly() -> None:
    graph = random_graph(3)
    single = dataclasses.replace(
        graph, adjacency=graph.adjacency.float(), target_bias=graph.target_bias.float(),
        target_value=graph.target_value.float(), logit_weight=graph.logit_weight.float(),
    )  # fmt: skip
    links = json.loads(json.dumps(to_json(single, all_kinds=True)))["links"]
    weights = torch.tensor([link["weight"] for link in links], dtype=torch.float32)
    assert torch.equal(weights, single.adjacency[single.adjacency != 0])


def test_the_file_is_the_document_and_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    document = to_json(hand_graph(), tmp_path / "g.json")
    assert json.loads((tmp_path / "g.json").read_text(encoding="utf-8")) == document
    assert (tmp_path / "g.json").read_bytes() == json.dumps(to_json(hand_graph())).encode()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(GraphFileError, match="No space"):
        to_json(hand_graph(), tmp_path / "h.json")
    assert [file.name for file in tmp_path.iterdir()] == ["g.json"]

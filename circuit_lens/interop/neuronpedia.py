"""The attribution-graph JSON that Neuronpedia and the circuit-tracer viewer read.

What the schema does not say, and readers rely on: node ids and jsNodeIds must be unique (one reader joins nodes by
either); an error's id is ``layer_-1_position``, which no feature can have; a feature's number is the Cantor pairing of
layer and index; ``influence`` is cumulative (small is important) and is used only where ``node_threshold`` is set; a
logit's text must hold its token between double quotes and ``(p=...)``; slug and scan are letters, digits, ``_.-``.
Neuronpedia cannot show a graph whose only layer is 0, and refuses files above 100 MB: prune first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import torch

from circuit_lens import __version__
from circuit_lens.graph import AttributionGraph, NodeKind
from circuit_lens.graph.files import atomic_path
from circuit_lens.graph.positions import join_tokens
from circuit_lens.graph.select import NodeRef

# Features of a layer's further sites are numbered from here on: viewers know a feature by its layer and number.
_SITE_STEP = 10_000_000
_TYPES = {
    NodeKind.FEATURE: "cross layer transcoder",  # per-layer ones too
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.TOKEN: "embedding",
    NodeKind.LOGIT: "logit",
    NodeKind.POSITION: "bias",
    NodeKind.BIAS: "bias",
    NodeKind.REST: "unknown",
    NodeKind.PATCH: "unknown",
}
_ALWAYS = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT)


def to_json(
    graph: AttributionGraph,
    path: str | PathLike[str] | None = None,
    *,
    slug: str | None = None,
    scan: str | None = None,
    pinned: Iterable[NodeRef] = (),
    all_kinds: bool = False,
    source_set: str | None = None,
    create_time_ms: int | None = None,
) -> dict[str, Any]:
    """Return a graph as the JSON of Neuronpedia and circuit-tracer's viewer, and write it to ``path`` if given.

    Args:
        graph: the graph, best a pruned one; only then has it influences, and readers a slider.
        path: file to write, all or nothing.
        slug: the graph's name in addresses; by default made from the prompt.
        scan: the model's id; by default the manifest's ``model``. Neuronpedia takes the ids of its own models only.
        pinned: nodes that the viewer shows in its subgraph from the start.
        all_kinds: also positions and biases (as "bias"), rest and patches (as "unknown"), which not every reader
            knows; otherwise these nodes and their edges are left out.
        source_set: Neuronpedia's name for the dictionaries, whose dashboards it then shows.
        create_time_ms: when the graph was made; left out by default, so that equal graphs give equal files.

    Raises:
        GraphFileError: the path cannot be written or the disk is full.
        NodeNotFoundError: a pinned node that the graph does not have.
    """
    kept = [i for i in range(len(graph.nodes)) if all_kinds or NodeKind(int(graph.nodes.kind[i])) in _ALWAYS]
    ids = {i: _node_id(graph, i) for i in kept}
    document = {
        "metadata": _metadata(graph, slug, scan, source_set, create_time_ms),
        "qParams": {
            "linkType": "both",
            "pinnedIds": [ids[node.id] for node in graph.find(pinned) if node.id in ids],
            "clickedId": "",
            "supernodes": [],
            "sg_pos": "",
        },
        "nodes": [_node(graph, i, name) for i, name in ids.items()],
        "links": _links(graph, ids),
    }
    if path is not None:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, allow_nan=False)
    return document


def cantor(layer: int, index: int) -> int:
    """Return the Cantor pairing of layer and index, by which readers number features."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _metadata(
    graph: AttributionGraph, slug: str | None, scan: str | None, source_set: str | None, create_time_ms: int | None
) -> dict[str, Any]:
    """Return what the document says about the graph as a whole."""
    prompt = join_tokens(graph.token_strings) if graph.prompt is None else graph.prompt
    model = graph.manifest.get("model_name", graph.manifest.get("model"))
    if isinstance(model, dict):
        model = model.get("name")
    info: dict[str, Any] = {"generator": {"name": "circuit_lens", "version": __version__}}
    if create_time_ms is not None:
        info["create_time_ms"] = create_time_ms
    metadata: dict[str, Any] = {
        "slug": _address(prompt.lower() if slug is None else slug) or "graph",
        "scan": _address(str(model or "unknown").rsplit("/", 1)[-1] if scan is None else scan) or "unknown",
        "prompt_tokens": list(graph.token_strings),
        "prompt": prompt,
        "schema_version": 1,
        "info": info,
    }
    if source_set is not None:
        metadata["feature_details"] = {"neuronpedia_source_set": source_set}
    if graph.pruning is not None:
        thresholds = {name: getattr(graph.pruning, name) for name in ("node_threshold", "edge_threshold")}
        metadata |= {"node_threshold": graph.pruning.node_threshold, "pruning_settings": thresholds}
    return metadata


def _address(text: str) -> str:
    """Return a text with everything but letters, digits and ``_.-`` made a dash, at most 80 characters long."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:80].strip("-.")


def site_in_id(site: str) -> str:
    """Return a dictionary's hook name as it stands in node ids."""
    return _address(site.replace(".", "-").replace("_", "-"))


def _node_id(graph: AttributionGraph, i: int) -> str:
    """Return the unique id of a node; the site takes part where a layer has several dictionaries."""
    nodes = graph.nodes
    kind, layer, pos = NodeKind(int(nodes.kind[i])), int(nodes.layer[i]), int(nodes.pos[i])
    site = site_in_id(nodes.sites[int(nodes.site[i])])
    if kind is NodeKind.TOKEN:
        return f"E_{int(nodes.index[i])}_{pos}"
    if kind is NodeKind.LOGIT:
        return f"{graph.n_layers + 1}_{int(nodes.index[i])}_{pos}"
    if kind is NodeKind.POSITION:
        return f"E_position_{pos}"
    if kind in (NodeKind.FEATURE, NodeKind.ERROR):
        number = int(nodes.index[i]) if kind is NodeKind.FEATURE else -1
        return f"{layer}_{number}_{pos}" if _one_site(graph, i) else f"{layer}_{site}_{number}_{pos}"
    return f"{layer}_{kind.name.lower()}-{site}_{pos}"


def _one_site(graph: AttributionGraph, i: int) -> bool:
    """Whether all features (or errors) of a node's layer belong to one site."""
    return not graph.nodes.name(i).endswith(")")


def _site_rank(graph: AttributionGraph, i: int) -> int:
    """Return how many other sites of a feature's layer come before its own."""
    if _one_site(graph, i):
        return 0
    nodes, f = graph.nodes, graph.nodes.n_features
    sites = nodes.site[:f][nodes.layer[:f] == nodes.layer[i]].unique_consecutive().tolist()
    return sites.index(int(nodes.site[i]))


def _quoted(text: str) -> str:
    """Return a text between double quotes, with none inside, nor anything that readers take for a probability."""
    return '"' + text.replace('"', "”").replace("(p=", "(p =").replace("\n", "⏎") + '"'


def _node(graph: AttributionGraph, i: int, node_id: str) -> dict[str, Any]:
    """Return one node of the document."""
    node = graph.node(i)
    probability = float(graph.logit_weight[i - graph.nodes.n_sources]) if node.kind is NodeKind.LOGIT else 0.0
    where, token = str(node.layer), _quoted(node.token)
    number, text = -1, node.label
    if node.kind is NodeKind.FEATURE:
        number = cantor(node.layer, node.index + _SITE_STEP * _site_rank(graph, i))
    elif node.kind is NodeKind.ERROR:
        text = f"Error: {node.site or 'mlp'} at {token}"
    elif node.kind is NodeKind.TOKEN:
        where, number, text = "E", node.pos, f"Emb: {token}"
    elif node.kind is NodeKind.LOGIT:
        where, number = str(graph.n_layers + 1), node.index
        text = f"Output {_quoted(node.label)} (p={probability:.3f})"
    elif node.kind is NodeKind.POSITION:
        where, text = "E", f"Position {node.pos}"
    else:
        text = f"{node.kind.name.capitalize()}: {node.site} at {token}"
    pruning, leading = graph.pruning, node.kind is not NodeKind.LOGIT
    return {
        "node_id": node_id,
        "feature": number,
        "layer": where,
        "ctx_idx": node.pos,
        "feature_type": _TYPES[node.kind],
        "token_prob": probability,
        "is_target_logit": node.id == graph.best_logit.id,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": "-".join(node_id.rsplit("_", 1)),
        "clerp": text,
        "influence": float(pruning.cumulative[i]) if pruning is not None and leading else None,
        "activation": node.activation,
    }


def _links(graph: AttributionGraph, ids: dict[int, str]) -> list[dict[str, Any]]:
    """Return the edges that are not zero between the nodes at hand; nine digits hold a float32 exactly."""
    at = graph.adjacency.nonzero()
    weights = graph.adjacency[at[:, 0], at[:, 1]]
    short: Callable[[float], float] = float
    if weights.dtype != torch.float64:
        short = lambda weight: float(f"{weight:.9g}")  # noqa: E731
    targets = graph.nodes.rows[at[:, 0]].tolist()
    return [
        {"source": ids[source], "target": ids[target], "weight": short(weight)}
        for source, target, weight in zip(at[:, 1].tolist(), targets, weights.tolist(), strict=True)
        if source in ids and target in ids
    ]

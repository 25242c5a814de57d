"""Attribution graphs as data: nodes, edges, scores, pruning, paths and files. Nothing here knows a model."""

from circuit_lens.graph.graph import AttributionGraph, Pruning, TopLogits
from circuit_lens.graph.nodes import Feature, Node, NodeKind, NodeTable, Section
from circuit_lens.graph.positions import find_position

__all__ = [
    "AttributionGraph",
    "Feature",
    "Node",
    "NodeKind",
    "NodeTable",
    "Pruning",
    "Section",
    "TopLogits",
    "find_position",
]

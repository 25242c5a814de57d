"""Attribution graphs as data: nodes, edges, scores, pruning, paths and files. Nothing here knows a model."""

from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature, Node, NodeKind, NodeTable, Section
from circuit_lens.graph.positions import find_position
from circuit_lens.graph.records import Edge, Mediation, Path, Pruning, RankedNode, Records, TopLogits
from circuit_lens.graph.scores import Scores
from circuit_lens.graph.store import load_graph, save_graph

__all__ = [
    "AttributionGraph",
    "Edge",
    "Feature",
    "Mediation",
    "Node",
    "NodeKind",
    "NodeTable",
    "Path",
    "Pruning",
    "RankedNode",
    "Records",
    "Scores",
    "Section",
    "TopLogits",
    "find_position",
    "load_graph",
    "save_graph",
]

"""Graphs in the formats of other tools."""

from circuit_lens.interop.neuronpedia import to_json

__all__ = ["to_json"]

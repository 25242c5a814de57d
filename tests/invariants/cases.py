"""Pairs of models and transcoders that the invariants are shown on, and what is measured of a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.builders import ARCHITECTURES, KINDS, Architecture, HookIn, Kind, TranscoderKind

CLASSES = [(name, kind) for name in ARCHITECTURES for kind in KINDS]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"norms": "linear"},
    {"mlp": "jacobian"},
    {"norms": "linear", "mlp": "jacobian"},
    {"engine": "reference"},
    {"attention": "linear"},
    {"attention": "linear", "norms": "linear", "mlp": "jacobian"},
]
# Every setting on every architecture; on bridges, which are slower, those that reach most of what differs there.
SETTINGS_ON_CLASSES = [
    (name, kind, setting)
    for name, kind in CLASSES
    for setting in (SETTINGS if kind == "hooked" else [SETTINGS[0], SETTINGS[3], SETTINGS[6]])
]
RMS: tuple[Architecture, ...] = ("llama", "qwen3", "gemma2")


@functools.cache
def model(name: Architecture, kind: Kind = "hooked", dtype: torch.dtype = torch.float64) -> Any:
    """Return a model shared by the tests, which therefore must leave it as it is."""
    return builders.build(name, kind, dtype=dtype)


@functools.cache
def pair(
    name: Architecture,
    kind: Kind = "hooked",
    transcoder: TranscoderKind = "transcoder",
    hook_in: HookIn = "ln2.hook_normalized",
    dtype: torch.dtype = torch.float64,
    layers: tuple[int, ...] | None = None,
) -> ReplacementModel:
    """Return a shared model with transcoders on the given layers (all of them by default)."""
    shared = model(name, kind, dtype)
    if layers == ():
        return ReplacementModel(shared, [])
    return ReplacementModel(shared, builders.transcoders(shared, transcoder, hook_in=hook_in, layers=layers))


def attribute(rm: ReplacementModel, prompt: Any, targets: Any = None, **options: Any) -> AttributionGraph:
    """Return the graph; transcoders of random models need not reconstruct a prompt well."""
    options = {"min_explained": None, "progress": False} | options
    return rm.attribute(prompt, targets=targets, **options)


def local(rm: ReplacementModel, prompt: Any, **options: Any) -> LocalReplacementModel:
    """Return the local replacement model, like :func:`attribute`."""
    return rm.local(prompt, **({"min_explained": None} | options))


def hooks_in(name: Architecture) -> tuple[HookIn, ...]:
    """Return the input hooks that exist in the architecture."""
    return tuple(h for h in builders.HOOKS_IN if not (name == "pythia" and h == "hook_resid_mid"))


def tokens(n_pos: int = 8, seed: int = 0) -> Tensor:
    """Return one prompt of random tokens, ``[n_pos]``."""
    return builders.random_tokens(n_pos, seed=seed)[0]


def rounding(name: Architecture, kind: Kind) -> float:
    """Return how exactly a float64 model repeats itself: a bridge's RMS norms compute in float32."""
    return 2e-6 if kind == "bridge" and name in RMS else 1e-9


def gaps(graph: AttributionGraph) -> Tensor:
    """Return, per row, by how much sources and own bias miss the target's value."""
    return (graph.adjacency.sum(1) + graph.target_bias - graph.target_value).abs()


def relative_gap(graph: AttributionGraph) -> float:
    """Return the largest gap in units of its row's sum of absolute entries (own bias included)."""
    return float((gaps(graph) / (graph.adjacency.abs().sum(1) + graph.target_bias.abs())).max())


def difference(a: AttributionGraph, b: AttributionGraph) -> float:
    """Return the largest difference of two graphs' edges, relative to the row's largest; inf for other nodes."""
    if names(a) != names(b):
        return float("inf")
    scale = torch.maximum(a.adjacency.abs().amax(1), b.adjacency.abs().amax(1)).clamp_min(1e-300)
    bias = (a.target_bias - b.target_bias).abs().max()
    value = (a.target_value - b.target_value).abs().max()
    return max(float(((a.adjacency - b.adjacency).abs().amax(1) / scale).max()), float(bias), float(value))


def names(graph: AttributionGraph) -> list[str]:
    """Return the names of a graph's nodes, in order."""
    return [graph.nodes.name(i) for i in range(len(graph.nodes))]


def ids(graph: AttributionGraph, kind: NodeKind | str) -> Sequence[int]:
    """Return the ids of the nodes of one kind."""
    part = graph.nodes.slice_of(kind)
    return range(part.start, part.stop)

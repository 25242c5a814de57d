"""Head loadings: an edge split by the attention heads that carry it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.sources import Stage
from circuit_lens.attribution.targets import pull_back, pull_back_spread, stack
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, TargetError, nearest
from circuit_lens.graph.nodes import Feature, Node, NodeKind
from circuit_lens.graph.records import RankedNode

if TYPE_CHECKING:
    from circuit_lens.attribution.replacement import LocalReplacementModel

Vectors = dict[tuple[Stage, int], Float[Tensor, "n_pos d_model"]]


@dataclass(frozen=True, eq=False)
class HeadLoadings:
    """An edge by the head that brings the source to the target's position last.

    Every path from source to target either crosses no attention layer (the bypass) or has a last one, whose output
    lands at the target's position: these shares are disjoint and sum to the edge.

    Attributes:
        source, target: Names.
        heads: Share of each head.
        by_position: The same by the key position it is read from.
        bypass: Share of the paths that cross no attention layer.
    """

    source: str
    target: str
    heads: Float[Tensor, "n_layers n_heads"]
    by_position: Float[Tensor, "n_layers n_heads n_pos"]
    bypass: float

    @property
    def edge(self) -> float:
        """The edge: all shares together."""
        return float(self.heads.sum()) + self.bypass

    def top(self, n: int = 5) -> list[tuple[int, int, float]]:
        """Return the ``n`` heads with the largest shares as (layer, head, share)."""
        flat = self.heads.flatten()
        order = flat.abs().topk(min(n, flat.numel())).indices.tolist()
        n_heads = self.heads.shape[1]
        return [(i // n_heads, i % n_heads, float(flat[i])) for i in order]

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}: {self.edge:+.4f}", f"  {self.bypass:+.4f}  bypass"]
        return "\n".join(lines + [f"  {share:+.4f}  head {layer}.{head}" for layer, head, share in self.top()])


def head_loadings(local: LocalReplacementModel, source: Any, target: Any) -> HeadLoadings:
    """Split the edge from a source to a target; see ``LocalReplacementModel.heads``."""
    frozen = local.frozen
    if not frozen.attention or local.settings.attention == "linear":
        raise ConsistencyError("head loadings need frozen attention and its linear maps, which this local model lacks")
    resolved = local.resolve(target)
    if len(resolved) != 1:
        raise TargetError(f"head loadings have one target, these are {len(resolved)}: {[r.name for r in resolved]}")
    targets = stack(resolved)
    name, vectors = _source(local, source)
    streams = _push(local, vectors)
    if targets.spread:
        at = {p: g for p, g in enumerate(pull_back_spread(frozen, targets, 0)) if bool(g.any())}
    else:
        at = {int(targets.pos[0]): pull_back(frozen, targets, [0], int(targets.pos[0]))[0]}
    n_heads = frozen.attention[0].n_heads
    loadings = frozen.tokens.new_zeros(frozen.n_layers, n_heads, frozen.n_pos)
    bypass = 0.0
    for pos, gradient in at.items():
        bypass += _descend(local, vectors, streams, gradient, pos, resolved[0].layer, loadings)
    return HeadLoadings(name, resolved[0].name, loadings.sum(-1), loadings, bypass)


def _descend(
    local: LocalReplacementModel,
    vectors: Vectors,
    streams: list[Float[Tensor, "n_pos d_model"]],
    g: Float[Tensor, "d_model"],
    pos: int,
    layer: int,
    loadings: Float[Tensor, "n_layers n_heads n_pos"],
) -> float:
    """Follow a gradient down its own position, without attention; add the heads' shares and return the bypass."""
    frozen, paths = local.frozen, local.sources.paths
    bypass = 0.0

    def direct(stage: Stage, layer: int) -> float:
        vector = vectors.get((stage, layer))
        return 0.0 if vector is None else float(g @ vector[pos])

    start = min(layer, frozen.n_layers - 1)
    for current in range(start, -1, -1):
        inside = current == layer  # the target reads this block's MLP branch: its MLP output is not on the way
        side = torch.zeros_like(g)
        if not inside:
            bypass += direct(Stage.MLP, current)
            path = paths[current]
            side = side if path is None else path.adjoint(g[None], pos)[0]
        if not frozen.parallel:
            g, side = g + side, torch.zeros_like(g)
        if not (inside and frozen.parallel):
            bypass += direct(Stage.ATTENTION, current)
            loadings[current] += frozen.attention[current].per_head(g, pos, streams[current])
        g = g + side
        bypass += direct(Stage.PRE, current)
    return bypass


def _push(local: LocalReplacementModel, vectors: Vectors) -> list[Float[Tensor, "n_pos d_model"]]:
    """Push a source forward through the frozen model; return its residual stream before each block."""
    frozen = local.frozen
    x = torch.zeros_like(frozen.tokens)
    streams = []
    for layer in range(frozen.n_layers):
        x = x + vectors.get((Stage.PRE, layer), 0.0)
        streams.append(x)
        mid = x + frozen.attention[layer].linear(x) + vectors.get((Stage.ATTENTION, layer), 0.0)
        path = local.sources.paths[layer]
        base = x if frozen.parallel else mid
        through = 0.0 if path is None else path.linear(base)
        x = mid + through + vectors.get((Stage.MLP, layer), 0.0)
    return streams


def _source(local: LocalReplacementModel, source: Any) -> tuple[str, Vectors]:
    """Return a source's name and the vectors it adds to the residual stream, by place."""
    source = source.node if isinstance(source, RankedNode) else source
    if isinstance(source, Node) and source.kind is not NodeKind.FEATURE:
        source = source.name
    if isinstance(source, (Feature, Node)):
        column = local.column(source)
        features, i = local.record_of(column)
        vectors: Vectors = {}
        for o, layer in enumerate(features.dictionary.out_layers):
            vector = torch.zeros_like(local.frozen.tokens)
            vector[features.pos[i]] = features.vectors[o, i]
            vectors[Stage.MLP, layer] = vector
        return local.source_names[column], vectors
    names = local.source_names
    if source not in names:
        raise NodeNotFoundError(f"there is no source {source!r}{nearest(str(source), names)}; see local.source_names")
    node = names.index(source)
    columns = (local.all_columns.member == node).nonzero()[:, 0].tolist()
    if columns[0] < local.n_active:
        features, i = local.record_of(columns[0])
        feature = Feature(
            features.dictionary.layer, int(features.pos[i]), int(features.index[i]), features.dictionary.site
        )
        return _source(local, feature)
    vectors = {}
    for column in columns:
        index, pos = divmod(column - local.n_active, local.frozen.n_pos)
        point = local.sources.points[index]
        vector = vectors.setdefault((point.stage, point.layer), torch.zeros_like(local.frozen.tokens))
        vector[pos] += point.vectors[pos]
    return source, vectors

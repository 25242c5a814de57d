"""Head loadings: an edge split by the attention heads that carry it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.sources import Sources
from circuit_lens.attribution.targets import pull_back, pull_back_spread, stack
from circuit_lens.dictionaries.points import Place, write_kind
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, TargetError, nearest
from circuit_lens.graph.nodes import Feature, Node, NodeKind
from circuit_lens.graph.records import RankedNode

if TYPE_CHECKING:
    from circuit_lens.attribution.replacement import LocalReplacementModel

Vectors = dict[tuple[int, Place], Float[Tensor, "n_pos d_model"]]


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
    place = targets.places[0]
    if targets.spread:
        at = {p: g for p, g in enumerate(pull_back_spread(frozen, targets, 0)) if bool(g.any())}
    elif place in (Place.HEADS_READ, Place.ATTENTION_READ, Place.MLP_OUT_READ):
        attention = frozen.attention[0]
        width = attention.n_heads * attention.d_head if place is Place.HEADS_READ else frozen.tokens.shape[1]
        at = {int(targets.pos[0]): targets.vectors[0, :width]}
    else:
        at = {int(targets.pos[0]): pull_back(frozen, targets, [0], int(targets.pos[0]))[0]}
    n_heads = frozen.attention[0].n_heads
    loadings = frozen.tokens.new_zeros(frozen.n_layers, n_heads, frozen.n_pos)
    way = _Way(local.sources, frozen, vectors, streams, loadings, resolved[0].layer, place)
    bypass = sum((way.descend(gradient, pos) for pos, gradient in at.items()), 0.0)
    return HeadLoadings(name, resolved[0].name, loadings.sum(-1), loadings, bypass)


@dataclass(eq=False)
class _Way:
    """The way of a target's gradient down its own position, without attention, from where it is read.

    Attributes:
        sources, frozen: The local model.
        vectors: What the source adds, by place.
        streams: The source's residual stream before each block.
        loadings: The heads' shares are added here.
        layer, place: Where the target is read.
    """

    sources: Sources
    frozen: FrozenModel
    vectors: Vectors
    streams: list[Float[Tensor, "n_pos d_model"]]
    loadings: Float[Tensor, "n_layers n_heads n_pos"]
    layer: int
    place: Place

    def descend(self, g: Float[Tensor, "width"], pos: int) -> float:
        """Add the heads' shares of one position's gradient; return the share that bypasses attention."""
        total = 0.0
        for layer in range(min(self.layer, self.frozen.n_layers - 1), -1, -1):
            share, left = self._block(g, pos, layer)
            total += share
            if left is None:
                break
            g = left
        return total

    def _block(self, g: Tensor, pos: int, layer: int) -> tuple[float, Tensor | None]:
        """Pass one block; return the direct share, and what is left of the gradient before it, None for nothing."""
        sources, parallel = self.sources, self.frozen.parallel
        at = self.place if layer == self.layer else Place.POST_WRITE + 1
        of_mlp = parallel and at in (Place.MLP_READ, Place.MLP_OUT_READ)
        total = 0.0

        def direct(*places: Place) -> float:
            found = (self.vectors.get((layer, place)) for place in places if place < at)
            return sum((float(g @ vector[pos]) for vector in found if vector is not None), 0.0)

        total += direct(Place.POST_WRITE)
        if at > Place.POST_WRITE and sources.blocks(layer, Place.POST_WRITE):
            return total, None
        total += direct(Place.POST_EDIT, Place.MLP_WRITE)
        side = torch.zeros_like(g)
        if at == Place.MLP_OUT_READ or (at > Place.MLP_WRITE and not sources.blocks(layer, Place.MLP_WRITE)):
            total += direct(Place.MLP)
            path = sources.paths[layer]
            side = side if path is None else path.adjoint(g[None], pos)[0]
        if at == Place.MLP_OUT_READ:
            g = torch.zeros_like(g)
        if not parallel:
            g, side = g + side, torch.zeros_like(g)
            if at > Place.MID_WRITE:
                total += direct(Place.MID_WRITE)
                if sources.blocks(layer, Place.MID_WRITE):
                    return total, None
        if not of_mlp:
            total += direct(Place.MID_EDIT) + self._attention(g, pos, layer, at, direct)
        if at in (Place.ATTENTION_READ, Place.HEADS_READ):
            return total, None
        g = g + side
        if at > Place.PRE_WRITE:
            total += direct(Place.PRE_WRITE)
            if sources.blocks(layer, Place.PRE_WRITE):
                return total, None
        return total + direct(Place.PRE_EDIT), g

    def _attention(self, g: Tensor, pos: int, layer: int, at: int, direct: Callable[..., float]) -> float:
        attention, sources = self.frozen.attention[layer], self.sources
        if at == Place.HEADS_READ:
            self.loadings[layer] += attention.per_head_of_heads(g, pos, self.streams[layer])
            return direct(Place.HEADS)
        if at < Place.ATTENTION_READ:
            return 0.0
        total = direct(Place.ATTENTION_WRITE)
        if at > Place.ATTENTION_WRITE and sources.blocks(layer, Place.ATTENTION_WRITE):
            return total
        if not sources.blocks(layer, Place.HEADS_WRITE):
            self.loadings[layer] += attention.per_head(g, pos, self.streams[layer])
        return total + direct(Place.ATTENTION, Place.HEADS_WRITE)


def _push(local: LocalReplacementModel, vectors: Vectors) -> list[Float[Tensor, "n_pos d_model"]]:
    """Push a source forward through the frozen model; return its residual stream before each block."""
    frozen, sources = local.frozen, local.sources
    zero = torch.zeros_like(frozen.tokens)

    def past(x: Tensor, layer: int, place: Place) -> Tensor:
        """Pass a place at which an autoencoder may stand."""
        x = zero if sources.blocks(layer, place) else x
        return x + vectors.get((layer, place), 0.0)

    x, streams = zero, []
    for layer in range(frozen.n_layers):
        x = past(x + vectors.get((layer, Place.PRE_EDIT), 0.0), layer, Place.PRE_WRITE)
        streams.append(x)
        heads = sources.blocks(layer, Place.HEADS_WRITE)
        moved = zero if heads else frozen.attention[layer].linear(x)
        moved = moved + vectors.get((layer, Place.HEADS_WRITE), 0.0) + vectors.get((layer, Place.ATTENTION), 0.0)
        moved = past(moved, layer, Place.ATTENTION_WRITE)
        mid = past(x + moved + vectors.get((layer, Place.MID_EDIT), 0.0), layer, Place.MID_WRITE)
        path = sources.paths[layer]
        through = zero if path is None else path.linear(x if frozen.parallel else mid)
        out = past(through + vectors.get((layer, Place.MLP), 0.0), layer, Place.MLP_WRITE)
        x = past(mid + out + vectors.get((layer, Place.POST_EDIT), 0.0), layer, Place.POST_WRITE)
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
            vector[features.pos[i]] = features.written[o].at(slice(i, i + 1))[0]
            vectors[layer, write_kind(features.dictionary.hooks_out[o]).place] = vector
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
        vector = vectors.setdefault((point.layer, point.place), torch.zeros_like(point.vectors))
        vector[pos] += point.vectors[pos]
    return source, vectors

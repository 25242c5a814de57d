"""The fast path: rows of a graph by one causal adjoint sweep per target position.

A row is the gradient of its target with respect to the residual stream of the frozen model, contracted with what each
source adds to the stream. The gradient of a target at position p never leaves positions <= p, and before its first
attention layer it sits at p alone; targets of all layers at one position join the sweep as it descends, so that each
attention layer is one matrix product for all of them. No forward pass is repeated and autograd is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.linear_maps import FrozenAttention
from circuit_lens.attribution.sources import Sources
from circuit_lens.attribution.targets import Targets, pull_back, pull_back_spread
from circuit_lens.dictionaries.points import Place

_BATCH_BYTES = 2 * 2**20  # gradients of one batch of targets; about what a core's own cache holds, where it is fastest
_MOVED_LIMIT = 2**26  # entries of the table that replaces the last attention layer


def _batches(targets: Targets, batch: int, *, parallel: bool) -> Iterator[tuple[int, list[int]]]:
    """Yield batches of targets at one position, those read last first; targets at several positions one by one."""
    by_pos: dict[int, list[int]] = {}
    ranks = [-_rank(*at, parallel) for at in zip(targets.layer.tolist(), targets.places, strict=True)]
    order = sorted(range(len(targets)), key=ranks.__getitem__)  # stable
    pos = targets.pos.tolist()
    for i in order:
        if i in targets.spread:
            yield pos[i], [i]
        else:
            by_pos.setdefault(pos[i], []).append(i)
    for p in sorted(by_pos):
        for start in range(0, len(by_pos[p]), batch):
            yield p, by_pos[p][start : start + batch]


class Sweep:
    """Computes rows of one prompt's graph; what depends on the prompt alone is kept between calls.

    Args:
        frozen: The frozen pass.
        sources: Its sources.
    """

    def __init__(self, frozen: FrozenModel, sources: Sources) -> None:
        self.frozen, self.sources = frozen, sources
        layers = range(frozen.n_layers)
        around, behind = (Place.ATTENTION, Place.MID_EDIT), (Place.MLP_WRITE, Place.POST_EDIT)
        self.pre = [_points(sources, layer, Place.PRE_EDIT) for layer in layers]
        self.mlp = [_points(sources, layer, *behind) for layer in layers]
        self.attention = [_points(sources, layer, *around) for layer in layers]
        self.both = [_points(sources, layer, *behind, *around) for layer in layers]
        self.at = {(layer, place): _points(sources, layer, place) for layer in layers for place in Place}
        self.embedded = self.pre[0]
        self.moved = self._moved()

    def row_blocks(
        self, targets: Targets, *, batch_size: int | None = None
    ) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
        """Yield the rows of the given targets over all columns of the sources, block by block.

        Args:
            targets: What to compute rows for; the result does not depend on how they are ordered or batched.
            batch_size: Targets swept at once; None fits them to a core's cache, 16 at least.

        Yields:
            Which targets, highest layer first, and their rows. Every target comes once.
        """
        width = self.frozen.n_pos * self.frozen.tokens.shape[1] * self.frozen.tokens.element_size()
        for pos, chosen in _batches(
            targets, batch_size or max(16, _BATCH_BYTES // width), parallel=self.frozen.parallel
        ):
            with torch.no_grad():
                block = self._run(targets, chosen, pos)
            yield chosen, block

    def _moved(self) -> list[Tensor] | None:
        """What the first attention layer moves of each embedding, so that it need not be applied to gradients."""
        attention, n_pos = self.frozen.attention[0], self.frozen.n_pos
        width = self.frozen.tokens.shape[1]
        large = n_pos > 2 * attention.n_heads * attention.d_head or n_pos**2 * width > _MOVED_LIMIT
        post_linear = attention.norm_out is not None and attention.norm_out.linear
        stands = any(layer == 0 for layer, _ in self.sources.blocked)
        if self.frozen.parallel or large or post_linear or stands:
            return None
        return [attention.moved(p.vectors) for _, p in self.sources.points_at(0, Place.PRE_EDIT)]

    def _run(self, targets: Targets, chosen: list[int], pos: int) -> Float[Tensor, "n n_columns"]:
        """Sweep the chosen targets, all at one position and sorted by descending layer, and return their rows."""
        waiting: dict[tuple[int, Place], list[int]] = {}
        places = targets.places
        for i, layer in zip(chosen, targets.layer[chosen].tolist(), strict=True):
            waiting.setdefault((layer, places[i]), []).append(i)
        state = _Batch(pos, self.frozen.tokens.new_zeros(len(chosen), self.sources.n_columns))
        self._inject(state, targets, waiting.pop((self.frozen.n_layers, Place.PRE_EDIT), []))
        first = max((layer for layer, _ in waiting), default=0) if state.empty else self.frozen.n_layers - 1
        for layer in range(first, -1, -1):
            here = {place: waiting.pop((at, place)) for at, place in list(waiting) if at == layer}
            if any(at == layer for at, _ in self.sources.blocked):
                self._block_with_sites(state, layer, targets, here)
            else:
                joining = [i for place in sorted(here, reverse=True) for i in here[place]]
                self._block(state, layer, targets, joining)
        return state.out

    def _inject(self, state: _Batch, targets: Targets, joining: list[int]) -> None:
        if not joining:
            return
        if joining[0] in targets.spread:
            spread = pull_back_spread(self.frozen, targets, joining[0])
            state.join_spread(spread[: state.pos + 1, None].clone())
        else:
            state.join_local(pull_back(self.frozen, targets, joining, state.pos))

    def _block(self, state: _Batch, layer: int, targets: Targets, joining: list[int]) -> None:
        sources, frozen = self.sources, self.frozen
        path = sources.paths[layer]
        # Between MLP and attention only a linear path through the MLP changes gradients that are already spread.
        together = path is None or frozen.parallel
        state.score_features(sources, layer, Place.MLP_WRITE)
        state.score_points(self.both[layer] if together else self.mlp[layer], local=frozen.parallel or not together)
        if not frozen.parallel and together:
            state.score_points(self.mlp[layer], spread=False)
        side = None if path is None else state.map(path.adjoint)
        if not frozen.parallel:
            state.add(side)
            self._inject(state, targets, joining)
            state.score_points(self.attention[layer], spread=not together)
        if layer == 0 and self.moved is not None:
            assert self.embedded is not None
            state.score_moved(self.embedded, self.moved)
            return
        state.attend(frozen.attention[layer])
        if frozen.parallel:
            state.add(side)
            self._inject(state, targets, joining)
        state.score_points(self.pre[layer])

    def _block_with_sites(self, state: _Batch, layer: int, targets: Targets, here: dict[Place, list[int]]) -> None:
        """The same for a block in which autoencoders stand: place by place, from its end to its beginning."""
        sources, parallel = self.sources, self.frozen.parallel
        self._stream(state, layer, targets, here, (Place.POST_WRITE, Place.POST_READ, Place.POST_EDIT))
        self._score(state, layer, Place.MLP_WRITE)
        path = sources.paths[layer]
        side: Gradients | None = None
        if not sources.blocks(layer, Place.MLP_WRITE):
            self._score(state, layer, Place.MLP)
            side = None if path is None else state.map(path.adjoint)
        if not parallel:
            state.add(side)
            self._read_mlp_out(state, layer, targets, here.get(Place.MLP_OUT_READ, []))
            self._inject(state, targets, here.get(Place.MLP_READ, []))
            self._stream(state, layer, targets, here, (Place.MID_WRITE, Place.MID_READ, Place.MID_EDIT))
        self._attention(state, layer, targets, here)
        if parallel:
            state.add(side)
            self._read_mlp_out(state, layer, targets, here.get(Place.MLP_OUT_READ, []))
            self._inject(state, targets, here.get(Place.MLP_READ, []))
        self._stream(state, layer, targets, here, (Place.PRE_WRITE, Place.PRE_READ, Place.PRE_EDIT))

    def _score(self, state: _Batch, layer: int, place: Place) -> None:
        state.score_features(self.sources, layer, place)
        state.score_points(self.at[layer, place])

    def _stream(
        self, state: _Batch, layer: int, targets: Targets, here: dict[Place, list[int]], at: tuple[Place, Place, Place]
    ) -> None:
        """Pass a place of the residual stream: what is written there ends every path, then reads, then edits."""
        write, read, edit = at
        self._score(state, layer, write)
        if self.sources.blocks(layer, write):
            state.end()
        self._inject(state, targets, here.get(read, []))
        self._score(state, layer, edit)

    def _read_mlp_out(self, state: _Batch, layer: int, targets: Targets, joining: list[int]) -> None:
        """Let targets join that read the MLP's output."""
        if not joining:
            return
        part, path = state.part(targets.vectors[joining, : self.frozen.tokens.shape[1]]), self.sources.paths[layer]
        self._score(part, layer, Place.MLP)
        assert part.local is not None
        new = torch.zeros_like(part.local) if path is None else path.adjoint(part.local, state.pos)
        state.join_local(new)

    def _attention(self, state: _Batch, layer: int, targets: Targets, here: dict[Place, list[int]]) -> None:
        """Pass attention: what is written at its output or its heads ends the paths through it, not those around it."""
        sources, attention, pos = self.sources, self.frozen.attention[layer], state.pos
        heads = sources.blocks(layer, Place.HEADS_WRITE)
        self._score(state, layer, Place.ATTENTION_WRITE)
        if not sources.blocks(layer, Place.ATTENTION_WRITE):
            self._score(state, layer, Place.ATTENTION)
            self._score(state, layer, Place.HEADS_WRITE)
            if not heads:
                state.attend(attention)
        readers = here.get(Place.ATTENTION_READ, []), here.get(Place.HEADS_READ, [])
        if any(readers):
            state.spread_out()
        if readers[0]:
            part = state.part(targets.vectors[readers[0], : self.frozen.tokens.shape[1]])
            self._score(part, layer, Place.ATTENTION)
            self._score(part, layer, Place.HEADS_WRITE)
            assert part.local is not None
            new = attention.adjoint_from(part.local, pos)
            state.join_spread(torch.zeros_like(new) if heads else new)
        if readers[1]:
            part = state.part(targets.vectors[readers[1], : attention.n_heads * attention.d_head])
            part.score_points(self.at[layer, Place.HEADS])
            assert part.local is not None
            state.join_spread(attention.adjoint_from_heads(part.local, pos))


Gradients = tuple[Tensor | None, Tensor | None]


def _rank(layer: int, place: Place, parallel: bool) -> int:
    """Return where a target joins the sweep: the higher, the earlier."""
    if parallel and place in (Place.MLP_READ, Place.MLP_OUT_READ):
        # The MLP reads what attention reads, and its readers join behind attention's.
        return Place.PRE_WRITE.at(layer) * 4 + (2 if place is Place.MLP_OUT_READ else 1)
    return place.at(layer) * 4


@dataclass(frozen=True, eq=False)
class _Points:
    """Sources that exist once per position and enter at one place, side by side.

    Attributes:
        vectors: ``[n_pos, d_model, n]``.
        columns: First column of each.
    """

    vectors: Float[Tensor, "n_pos d_model n"]
    columns: list[int]


def _points(sources: Sources, layer: int, *places: Place) -> _Points | None:
    listed = [entry for place in places for entry in sources.points_at(layer, place)]
    if not listed:
        return None
    return _Points(torch.stack([p.vectors for _, p in listed], -1), [column for column, _ in listed])


class _Batch:
    """Gradients of one batch as it descends: spread over positions, and those still at the target's own position.

    The rows of ``out`` are the targets whose paths have ended, the spread ones, then the local ones, in the order in
    which they joined.
    """

    def __init__(self, pos: int, out: Float[Tensor, "n n_columns"]) -> None:
        self.pos, self.out = pos, out
        self.spread: Float[Tensor, "n_query n_spread d_model"] | None = None
        self.local: Float[Tensor, "n_local d_model"] | None = None
        self.n_ended = 0

    @property
    def empty(self) -> bool:
        """Whether no target has joined yet."""
        return self.n_joined == 0

    @property
    def n_joined(self) -> int:
        return self.n_ended + self.n_spread + (0 if self.local is None else len(self.local))

    def part(self, gradients: Float[Tensor, "n width"]) -> _Batch:
        """Return a batch of the targets that join next, local, whose rows are those of this one."""
        start = self.n_joined
        part = _Batch(self.pos, self.out[start : start + len(gradients)])
        part.local = gradients
        return part

    def end(self) -> None:
        """End the paths of all targets that have joined."""
        self.n_ended, self.spread, self.local = self.n_joined, None, None

    def spread_out(self) -> None:
        """Make local gradients spread ones, so that spread ones may join after them."""
        if self.local is not None:
            new = self.local.new_zeros(self.pos + 1, *self.local.shape)
            new[self.pos] = self.local
            self.local = None
            self.join_spread(new)

    @property
    def n_spread(self) -> int:
        return 0 if self.spread is None else self.spread.shape[1]

    def join_local(self, new: Float[Tensor, "n d_model"]) -> None:
        """Let targets join at their own position."""
        self.local = new if self.local is None else torch.cat([self.local, new])

    def join_spread(self, new: Float[Tensor, "n_query n d_model"]) -> None:
        """Let targets join that reach several positions."""
        self.spread = new if self.spread is None else torch.cat([self.spread, new], 1)

    def map(self, adjoint: Callable[..., Tensor]) -> Gradients:
        """Apply a position-wise adjoint to all gradients."""
        spread = None if self.spread is None else adjoint(self.spread, slice(0, self.pos + 1))
        return spread, None if self.local is None else adjoint(self.local, self.pos)

    def add(self, side: Gradients | None) -> None:
        """Add what a side path brought; local gradients that were spread meanwhile get it at their own position."""
        if side is None:
            return
        spread, local = side
        n_spread = 0 if spread is None else spread.shape[1]
        if spread is not None:
            assert self.spread is not None
            self.spread[:, :n_spread] += spread
        if local is None:
            return
        if self.local is not None:
            self.local = self.local + local
        else:
            assert self.spread is not None
            self.spread[self.pos, n_spread : n_spread + len(local)] += local

    def attend(self, attention: FrozenAttention) -> None:
        """Pull all gradients through attention, the bypass included; afterwards none is local."""
        if self.spread is not None:
            attention.adjoint(self.spread, add=True)
        if self.local is not None:
            new = attention.adjoint_from(self.local, self.pos)
            new[self.pos] += self.local
            self.join_spread(new)
            self.local = None

    def score_features(self, sources: Sources, layer: int, place: Place) -> None:
        """Contract with what the features write at a layer's place."""
        if self.spread is None and self.local is None:
            return
        start, n = self.n_ended, self.n_ended + self.n_spread
        for features, written in sources.writing(layer, place):
            for q in range(self.pos + 1):
                at = features.at(q)
                if at.stop == at.start:
                    continue
                columns = slice(features.start + at.start, features.start + at.stop)
                if self.spread is not None:
                    written.score(self.out[start:n, columns], self.spread[q], at, q)
                if self.local is not None and q == self.pos:
                    written.score(self.out[n : n + len(self.local), columns], self.local, at, q)

    def score_points(self, points: _Points | None, *, spread: bool = True, local: bool = True) -> None:
        """Contract with sources that exist once per position."""
        if points is None:
            return
        start, n, n_query = self.n_ended, self.n_ended + self.n_spread, self.pos + 1
        if spread and self.spread is not None:
            values = torch.bmm(self.spread, points.vectors[:n_query])
            for i, column in enumerate(points.columns):
                self.out[start:n, column : column + n_query] += values[:, :, i].T
        if local and self.local is not None:
            values = self.local @ points.vectors[self.pos]
            for i, column in enumerate(points.columns):
                self.out[n : n + len(values), column + self.pos] += values[:, i]

    def score_moved(self, points: _Points, moved: list[Tensor]) -> None:
        """Contract with the embeddings through the first attention layer and around it."""
        start, n, n_query = self.n_ended, self.n_ended + self.n_spread, self.pos + 1
        self.score_points(points)
        for column, table in zip(points.columns, moved, strict=True):
            columns = slice(column, column + n_query)
            if self.spread is not None:
                self.out[start:n, columns] += torch.bmm(self.spread, table[:n_query, :n_query].transpose(1, 2)).sum(0)
            if self.local is not None:
                self.out[n : n + len(self.local), columns] += self.local @ table[self.pos, :n_query].T

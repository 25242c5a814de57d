"""The fast path: rows of a graph by one causal adjoint sweep per target position.

A row is the gradient of its target with respect to the residual stream of the frozen model, contracted with what each
source adds to the stream. The gradient of a target at position p never leaves positions <= p, and before its first
attention layer it sits at p alone; targets of all layers at one position join the sweep as it descends, so that each
attention layer is one matrix product for all of them. No forward pass is repeated and autograd is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.sources import PointSource, Sources, Stage
from circuit_lens.attribution.targets import Targets, pull_back

_MEMORY = 192 * 2**20  # bytes for the gradients of one batch of targets
_MOVED_LIMIT = 2**26  # entries of the table that replaces the last attention layer


def row_blocks(
    frozen: FrozenModel, sources: Sources, targets: Targets, *, batch_size: int | None = None
) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
    """Yield the rows of the given targets over all columns of the sources, block by block.

    Args:
        frozen: The frozen pass.
        sources: Its sources.
        targets: What to compute rows for; the result does not depend on how they are ordered or batched.
        batch_size: Targets swept at once; None fits them to about 200 MB.

    Yields:
        Which targets, and their rows. Every target comes once.
    """
    width = 4 * frozen.n_pos * frozen.tokens.shape[1] * frozen.tokens.element_size()
    batch = batch_size or max(16, _MEMORY // width)
    with torch.no_grad():
        sweep = _Sweep(frozen, sources, targets)
    for pos, chosen in _batches(targets, batch):
        with torch.no_grad():
            block = sweep.run(chosen, pos)
        yield chosen, block


def _batches(targets: Targets, batch: int) -> Iterator[tuple[int, list[int]]]:
    """Yield batches of targets at one position, the highest layers first; targets at several positions one by one."""
    by_pos: dict[int, list[int]] = {}
    order = torch.argsort(targets.layer, descending=True, stable=True).tolist()
    pos = targets.pos.tolist()
    for i in order:
        if i in targets.spread:
            yield pos[i], [i]
        else:
            by_pos.setdefault(pos[i], []).append(i)
    for p in sorted(by_pos):
        for start in range(0, len(by_pos[p]), batch):
            yield p, by_pos[p][start : start + batch]


class _Sweep:
    """Sweeps batches of targets; what depends on the prompt alone is kept between batches."""

    def __init__(self, frozen: FrozenModel, sources: Sources, targets: Targets) -> None:
        self.frozen, self.sources, self.layers = frozen, sources, targets.layer.tolist()
        self.gradients, self.spread = pull_back(frozen, targets)
        self.written = [_mlp_table(sources, layer) for layer in range(frozen.n_layers)]
        self.embedded = sources.points_at(0, Stage.PRE)
        self.moved = self._moved()

    def _moved(self) -> list[Tensor] | None:
        """What the first attention layer moves of each embedding, so that it need not be applied to gradients."""
        attention, n_pos = self.frozen.attention[0], self.frozen.n_pos
        width = self.frozen.tokens.shape[1]
        large = n_pos > 2 * attention.n_heads * attention.d_head or n_pos**2 * width > _MOVED_LIMIT
        post_linear = attention.norm_out is not None and attention.norm_out.linear
        if self.frozen.parallel or large or post_linear:
            return None
        return [attention.moved(p.vectors) for _, p in self.embedded]

    def run(self, chosen: Sequence[int], pos: int) -> Float[Tensor, "n n_columns"]:
        """Sweep the chosen targets, all at one position and sorted by descending layer, and return their rows."""
        waiting: dict[int, list[int]] = {}
        for i in chosen:
            waiting.setdefault(self.layers[i], []).append(i)
        state = _Batch(pos, self.gradients.new_zeros(len(chosen), self.sources.n_columns))
        self._inject(state, waiting.get(self.frozen.n_layers, []))
        for layer in range(min(max(waiting), self.frozen.n_layers - 1), -1, -1):
            self._block(state, layer, waiting.get(layer, []))
        return state.out

    def _inject(self, state: _Batch, joining: list[int]) -> None:
        if not joining:
            return
        if joining[0] in self.spread:
            state.join_spread(self.spread[joining[0]][: state.pos + 1, None].clone())
        else:
            state.join_local(self.gradients[joining])

    def _block(self, state: _Batch, layer: int, joining: list[int]) -> None:
        sources, frozen = self.sources, self.frozen
        state.score_table(self.written[layer])
        path = sources.paths[layer]
        side = None if path is None else state.map(path.adjoint)
        if not frozen.parallel:
            state.add(side)
            self._inject(state, joining)
        state.score_points(sources.points_at(layer, Stage.ATTENTION))
        if layer == 0 and self.moved is not None:
            state.score_moved(self.embedded, self.moved)
            return
        state.attend(frozen.attention[layer].adjoint, frozen.attention[layer].adjoint_from)
        if frozen.parallel:
            state.add(side)
            self._inject(state, joining)
        state.score_points(sources.points_at(layer, Stage.PRE))


Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class _AtPosition:
    """What enters the residual stream at one place and position, stacked, and the columns it belongs to.

    ``segments``: (first row of ``vectors``, number of rows, first column).
    """

    vectors: Float[Tensor, "n d_model"]
    segments: list[tuple[int, int, int]]


def _mlp_table(sources: Sources, layer: int) -> list[_AtPosition]:
    """Stack, per position, everything that enters with a layer's MLP output, so that it is one matrix product."""
    features, points = sources.features_writing(layer), sources.points_at(layer, Stage.MLP)
    table = []
    for q in range(sources.n_pos):
        parts: list[Tensor] = []
        segments: list[tuple[int, int, int]] = []
        n = 0
        for active, vectors in features:
            at = active.at(q)
            if at.stop > at.start:
                parts.append(vectors[at])
                segments.append((n, at.stop - at.start, active.start + at.start))
                n += at.stop - at.start
        for column, point in points:
            parts.append(point.vectors[q : q + 1])
            segments.append((n, 1, column + q))
            n += 1
        empty = sources.points[0].vectors[:0]
        table.append(_AtPosition(torch.cat(parts) if parts else empty, segments))
    return table


class _Batch:
    """Gradients of one batch as it descends: spread over positions, and those still at the target's own position.

    The rows of ``out`` are the spread targets, then the local ones, in the order in which they joined.
    """

    def __init__(self, pos: int, out: Float[Tensor, "n n_columns"]) -> None:
        self.pos, self.out = pos, out
        self.spread: Float[Tensor, "n_query n_spread d_model"] | None = None
        self.local: Float[Tensor, "n_local d_model"] | None = None

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
            self.spread[self.pos, n_spread:] += local

    def attend(self, adjoint: Callable[[Tensor], Tensor], adjoint_from: Callable[[Tensor, int], Tensor]) -> None:
        """Pull all gradients through attention, the bypass included; afterwards none is local."""
        some = self.local if self.spread is None else self.spread
        if some is None:
            return
        n_local = 0 if self.local is None else len(self.local)
        new = some.new_empty(self.pos + 1, self.n_spread + n_local, some.shape[-1])
        if self.spread is not None:
            torch.add(self.spread, adjoint(self.spread), out=new[:, : self.n_spread])
        if self.local is not None:
            new[:, self.n_spread :] = adjoint_from(self.local, self.pos)
            new[self.pos, self.n_spread :] += self.local
        self.spread, self.local = new, None

    def score_table(self, table: list[_AtPosition]) -> None:
        """Contract with everything that enters with a layer's MLP output."""
        if self.spread is not None:
            for q, here in enumerate(table[: self.pos + 1]):
                values = self.spread[q] @ here.vectors.T
                for start, n, column in here.segments:
                    self._put_spread(values[:, start : start + n], column)
        if self.local is not None:
            here = table[self.pos]
            values = self.local @ here.vectors.T
            for start, n, column in here.segments:
                self._put_local(values[:, start : start + n], column)

    def score_points(self, points: list[tuple[int, PointSource]]) -> None:
        """Contract with sources that exist once per position."""
        for column, point in points:
            if self.spread is not None:
                values = torch.bmm(self.spread, point.vectors[: self.pos + 1, :, None])[..., 0]
                self._put_spread(values.T, column)
            if self.local is not None:
                self._put_local((self.local @ point.vectors[self.pos])[:, None], column + self.pos)

    def score_moved(self, points: list[tuple[int, PointSource]], moved: list[Tensor]) -> None:
        """Contract with the embeddings through the first attention layer and around it."""
        n = self.pos + 1
        self.score_points(points)
        for (column, _), table in zip(points, moved, strict=True):
            if self.spread is not None:
                self._put_spread(torch.bmm(self.spread, table[:n, :n].transpose(1, 2)).sum(0), column)
            if self.local is not None:
                self._put_local(self.local @ table[self.pos, :n].T, column)

    def _put_spread(self, values: Float[Tensor, "n_spread m"], column: int) -> None:
        self.out[: self.n_spread, column : column + values.shape[1]] += values

    def _put_local(self, values: Float[Tensor, "n_local m"], column: int) -> None:
        start = self.n_spread
        self.out[start : start + values.shape[0], column : column + values.shape[1]] += values

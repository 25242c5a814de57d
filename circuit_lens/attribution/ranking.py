"""Rows of the features chosen so far, kept by column, and the influence along them that chooses the next ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.assemble import lazy_zeros
from circuit_lens.attribution.sources import Sources
from circuit_lens.dictionaries.binding import read_rank
from circuit_lens.graph.nodes import NodeKind

_BLOCK = 2**20  # entries taken at once, so that what is made of them stays in a core's cache
_WIDTH = 2**15  # columns of a block, at most


class ChosenRows:
    """Rows over all columns, until it is known which columns become nodes.

    A row only reaches features of dictionaries before its own: the columns behind are zero and never written, which
    keeps them from being resident. How blocks are cut depends on counts of rows and columns alone.

    Args:
        sources: All sources.
        n_rows: How many rows there will be.
        logit_rows: Rows of the targets.
        weights: The targets' weights.
    """

    def __init__(
        self, sources: Sources, n_rows: int, logit_rows: Float[Tensor, "n_logits n_columns"], weights: Sequence[float]
    ) -> None:
        self.sources, self.logit_rows = sources, logit_rows
        self.weights = torch.tensor(weights, dtype=torch.float64)
        if logit_rows.device.type == "cpu":
            self.rows = lazy_zeros((sources.n_columns, n_rows), logit_rows.dtype).T
        else:
            self.rows = logit_rows.new_zeros(n_rows, sources.n_columns)
        self.columns = torch.zeros(0, dtype=torch.long)
        self.totals = torch.zeros(0, dtype=torch.float64)
        self._of: list[int] = []  # the record each row's target is of
        self._runs: list[tuple[int, int, int]] = []  # record, first and last row: neighbours of one record
        self._counted = torch.zeros(len(sources.points) * sources.n_pos, dtype=logit_rows.dtype)
        for i, point in enumerate(sources.points):
            counts = point.kind in (NodeKind.ERROR, NodeKind.TOKEN)  # convention "paper", as all features
            self._counted[i * sources.n_pos : (i + 1) * sources.n_pos] = float(counts)
        self._counted = self._counted.to(logit_rows.device)
        self._logit_totals = self._totals(logit_rows, sources.n_features)

    def __len__(self) -> int:
        return len(self.columns)

    def begin(self, columns: Int[Tensor, "n"]) -> int:
        """Make room for the rows of more features, by ascending column; return the place of the first."""
        first = len(self.columns)
        self.columns = torch.cat([self.columns, columns])
        starts = torch.tensor([f.start + len(f) for f in self.sources.features])
        self._of += torch.searchsorted(starts, columns, right=True).tolist()
        return first

    def put(self, places: Sequence[int], rows: Float[Tensor, "n n_columns"]) -> None:
        """Keep rows at places that :meth:`begin` made."""
        n_features = self.sources.n_features
        for place, row in zip(places, rows, strict=True):
            reach = self._reach(self._of[place])
            self.rows[place, :reach] = row[:reach]
            self.rows[place, n_features:] = row[n_features:]

    def end(self, first: int) -> None:
        """Say that the rows from ``first`` on are there."""
        last = first
        while last < len(self._of):
            start, record = last, self._of[last]
            while last < len(self._of) and self._of[last] == record:
                last += 1
            self._runs.append((record, start, last))
            self.totals = torch.cat([self.totals, self._totals(self.rows[start:last], self._reach(record))])

    def influence(self) -> Float[Tensor, "n_active"]:
        """Return the influence of every active feature along the rows so far, by the convention "paper"."""
        sources = self.sources
        result = torch.zeros(sources.n_features, dtype=torch.float64)
        _spread(result, self.logit_rows[:, : len(result)], self.weights, self._logit_totals)
        # From the last dictionary to the first, the influence of its features is final.
        for record, start, last in sorted(self._runs, key=lambda run: (-run[0], run[1])):
            weight = result[self.columns[start:last]]
            _spread(result, self.rows[start:last, : self._reach(record)], weight, self.totals[start:last])
        return result

    def sorted_blocks(self) -> Iterator[tuple[list[int], Float[Tensor, "n n_columns"], list[int]]]:
        """Yield all rows by ascending column, in parts: their places in that order, the rows, and where each reads."""
        order = self.columns.argsort()
        ranks = [read_rank(f.dictionary) for f in self.sources.features]
        size = max(1, 4 * _BLOCK // self.sources.n_columns)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            reads = [ranks[self._of[i]] for i in part.tolist()]
            yield list(range(start, start + len(part))), self.rows[part.to(self.rows.device)], reads

    def _reach(self, record: int) -> int:
        return self.sources.features[record].start

    def _totals(self, rows: Float[Tensor, "n n_columns"], reach: int) -> Float[Tensor, "n"]:
        """Return each row's absolute sum over the counted sources."""
        totals = torch.zeros(len(rows), dtype=torch.float64)
        for here, columns in _blocks(len(rows), reach):
            totals[here] += rows[here, columns].abs().sum(1).double().cpu()
        return totals + (rows[:, self.sources.n_features :].abs() @ self._counted).double().cpu()


def _spread(
    result: Float[Tensor, "n_active"],
    rows: Float[Tensor, "n reach"],
    weight: Float[Tensor, "n"],
    totals: Float[Tensor, "n"],
) -> None:
    """Hand each row's weight on to its sources, by their share of the row."""
    scaled = torch.where(totals > 0, weight / totals.clamp_min(1e-300), 0.0).to(rows)
    for here, columns in _blocks(*rows.shape):
        result[columns] += (scaled[here] @ rows[here, columns].abs()).double().cpu()


def _blocks(n_rows: int, n_columns: int) -> Iterator[tuple[slice, slice]]:
    width = max(1, min(n_columns, _WIDTH))
    height = max(1, _BLOCK // width)
    for row in range(0, n_rows, height):
        for column in range(0, n_columns, width):
            yield slice(row, min(row + height, n_rows)), slice(column, min(column + width, n_columns))

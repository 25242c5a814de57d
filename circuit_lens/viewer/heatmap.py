"""A heat map of labelled rows and columns, as a figure and as HTML; what each cell is about is told beside it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from circuit_lens.errors import GraphError
from circuit_lens.graph.files import atomic_path
from circuit_lens.viewer.heatmap_parts import number, shade


@dataclass(frozen=True)
class Spot:
    """What is told about a cell.

    Attributes:
        title: Which cell it is.
        text: What was said there.
        tokens: Tokens with their probabilities.
        lines: What else there is, a line each.
        short: Drawn in the cell where there is room.
    """

    title: str = ""
    text: str = ""
    tokens: tuple[tuple[str, float], ...] = ()
    lines: tuple[str, ...] = ()
    short: str = ""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Values by row and column; ``figure()`` draws them, ``to_html()`` is a page that needs nothing else.

    Attributes:
        values: NaN where there is none.
        rows, columns: Labels.
        row_axis, column_axis: What rows and columns are.
        title, note: Above, and below that.
        value, unit: What the values are.
        low, high: Ends of the scale of colours; None: of the values.
        bright: Which end of the scale is bright: the better one.
        spots: What is told about each cell; () for nothing.
        apart_rows, apart_columns: So many of the last rows and columns are set apart.
        wide: Rows whose first value stands for all columns that are not set apart.
    """

    values: Float[ndarray, "n_rows n_columns"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str = ""
    column_axis: str = ""
    title: str = ""
    note: str = ""
    value: str = "value"
    unit: str = ""
    low: float | None = None
    high: float | None = None
    bright: Literal["high", "low"] = "high"
    spots: tuple[tuple[Spot, ...], ...] = ()
    apart_rows: int = 0
    apart_columns: int = 0
    wide: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = len(self.rows), len(self.columns)
        if tuple(self.values.shape) != shape or not self.values.size:
            raise GraphError(f"{shape[0]} rows and {shape[1]} columns need as many values, and at least one; given "
                             f"values of shape {tuple(self.values.shape)}")  # fmt: skip
        if self.spots and [len(row) for row in self.spots] != [shape[1]] * shape[0]:
            raise GraphError("spots must be one for each value")
        if bool(np.isinf(self.values).any()):
            raise GraphError("values must be finite, or NaN where there is none; given infinity")

    @property
    def range(self) -> tuple[float, float]:
        """The ends of the scale of colours; never equal."""
        known = self.values[~np.isnan(self.values)]
        low = self.low if self.low is not None else float(known.min()) if known.size else 0.0
        high = self.high if self.high is not None else float(known.max()) if known.size else 1.0
        return (float(low), float(high)) if high > low else (float(low), low + 1.0)

    def colour(self, value: float) -> tuple[str, str]:
        """Return the colour of a value, and one that is read on it."""
        low, high = self.range
        return shade(min(max((value - low) / (high - low), 0.0), 1.0), self.bright)

    def spot(self, row: int, column: int) -> Spot:
        """Return what is told about a cell."""
        return self.spots[row][column] if self.spots else Spot()

    def shown(self, value: float) -> str:
        """Return a value as text: three digits that count, a dash for none.

        >>> HeatMap(np.zeros((1, 1)), ("a",), ("b",), unit="nats").shown(0.12345)
        '0.123 nats'
        """
        return "–" if math.isnan(value) else f"{number(value)} {self.unit}".strip()

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Return the cells of a row: the first column of each, and how many it spans."""
        main = len(self.columns) - self.apart_columns
        if row in self.wide and main > 1:
            return [(0, main), *((i, 1) for i in range(main, len(self.columns)))]
        return [(i, 1) for i in range(len(self.columns))]

    def figure(self) -> Figure:
        """Draw it; save it with ``figure().savefig("map.png")``.

        Returns:
            A figure of its own: no state of pyplot is read or changed.
        """
        from circuit_lens.viewer.heatmap_figure import figure

        return figure(self)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return a page that loads nothing; also write it, all or nothing, where a path is given.

        Pointing at a cell, or going there with the arrow keys, tells what it is about.
        """
        from circuit_lens.viewer.heatmap_html import fragment, page

        text = page(self.title or self.value, fragment([self]))
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        from circuit_lens.viewer.heatmap_html import fragment

        return fragment([self])

    def __repr__(self) -> str:
        low, high = self.range
        return (
            f"HeatMap of {self.value}: {len(self.rows)} × {len(self.columns)}, {self.shown(low)} to {self.shown(high)}"
        )

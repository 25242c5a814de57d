"""A heat map as a matplotlib figure, laid out in inches from the sizes of its texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from circuit_lens.viewer.drawing import GREY, INK, SMALL, TEXT, GraphFigure, families, measure_text, printable
from circuit_lens.viewer.heatmap_parts import cut, number
from circuit_lens.viewer.layout import Measure, clean_token, wrap

if TYPE_CHECKING:
    from circuit_lens.viewer.heatmap import HeatMap

_DPI = 150
_PAD, _GAP, _APART, _BAR = 0.15, 0.08, 0.1, 0.16
_LABEL = 2.4  # inches, at most, of a row's label
_EMPTY = "#e3e6eb"
_TITLE = 11.0


@dataclass(frozen=True)
class _Sizes:
    """Where things are, in inches from the left and from the top."""

    cell: tuple[float, float]
    apart: float  # width of a column that is set apart
    grid: tuple[float, float]
    size: tuple[float, float]
    texts: bool
    ends: float  # width of the numbers beside the scale


def figure(heat: HeatMap) -> Figure:
    """Draw a heat map: rows from top to bottom, the scale of colours at the right."""
    measures = {size: measure_text(size) for size in (TEXT, SMALL, _TITLE)}
    sizes, head = _sizes(heat, measures)
    width, height = sizes.size
    drawn = GraphFigure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(drawn)
    axes = drawn.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = _PAD
    for text, bold in head:
        size = _TITLE if bold else TEXT
        _text(axes, _PAD, y + size / 144, text, size, INK if bold else GREY, weight="bold" if bold else "normal")
        y += size / 72 * 1.4
    _draw_labels(axes, heat, sizes, measures)
    _draw_cells(axes, heat, sizes, measures[SMALL])
    _draw_scale(axes, heat, sizes)
    return drawn


def _sizes(heat: HeatMap, measures: dict[float, Measure]) -> tuple[_Sizes, list[tuple[str, bool]]]:
    n_columns, n_rows = len(heat.columns), len(heat.rows)
    texts = n_columns <= 14 and any(spot.short for row in heat.spots for spot in row)
    cell_width = min(max(7.6 / n_columns, 0.6), 1.3) if texts else min(max(6.5 / n_columns, 0.2), 0.5)
    cell_height = 0.34 if texts else min(max(6.0 / n_rows, 0.19), 0.34)
    labels = min(_LABEL, max(measures[TEXT](clean_token(label)) for label in heat.rows))
    left = _PAD + (0.22 if heat.row_axis else 0.0) + labels + 2 * _GAP
    n_apart = heat.apart_columns
    apart = max([cell_width, *(measures[TEXT](label) + _GAP for label in heat.columns[n_columns - n_apart :])])
    right = left + (n_columns - n_apart) * cell_width + (_APART + n_apart * apart if n_apart else 0.0)
    ends = _GAP + max(measures[SMALL](heat.shown(value).removesuffix(heat.unit)) for value in heat.range)
    width = right + 0.25 + _BAR + ends + 0.3 + _PAD
    width = max(width, 4.2)
    letters = width - 2 * _PAD
    head = [(line, True) for line in _lines(heat.title, letters, measures[_TITLE])]
    head += [(line, False) for line in _lines(heat.note, letters, measures[TEXT])]
    top = _PAD + sum((_TITLE if bold else TEXT) / 72 * 1.4 for _, bold in head) + 0.12
    top += (0.2 if heat.column_axis else 0.0) + 0.22
    height = top + n_rows * cell_height + (_APART if heat.apart_rows else 0.0) + _PAD
    height = max(height, top + 1.0 + _PAD)  # room for the scale
    return _Sizes((cell_width, cell_height), apart, (left, top), (width, height), texts, ends), head


def _lines(text: str, width: float, measure: Measure) -> list[str]:
    if not text:
        return []
    letters = max(10, int(0.84 * width / max(measure(text) / len(text), 0.01)))  # bold letters are wider
    return wrap(text.replace("\n", "⏎"), letters, lines=3)


def _left(heat: HeatMap, sizes: _Sizes, column: int) -> float:
    main = len(heat.columns) - heat.apart_columns
    apart = _APART + (column - main) * sizes.apart if column >= main else 0.0
    return sizes.grid[0] + min(column, main) * sizes.cell[0] + apart


def _width(heat: HeatMap, sizes: _Sizes, column: int, span: int = 1) -> float:
    return sizes.apart if column >= len(heat.columns) - heat.apart_columns else span * sizes.cell[0]


def _top(heat: HeatMap, sizes: _Sizes, row: int) -> float:
    apart = _APART if row >= len(heat.rows) - heat.apart_rows else 0.0
    return sizes.grid[1] + row * sizes.cell[1] + apart


def _draw_labels(axes: Axes, heat: HeatMap, sizes: _Sizes, measures: dict[float, Measure]) -> None:
    (cell_width, cell_height), (left, top) = sizes.cell, sizes.grid
    for i, label in enumerate(heat.rows):
        text = cut(clean_token(label), _LABEL, measures[TEXT])
        _text(axes, left - _GAP, _top(heat, sizes, i) + cell_height / 2, text, TEXT, INK, ha="right")
    main = len(heat.columns) - heat.apart_columns
    labels = [clean_token(label) for label in heat.columns]
    # Where labels are wider than their columns, some are left out.
    step = max(1, math.ceil(max(map(measures[TEXT], labels[:main]), default=0.0) * 1.15 / cell_width))
    step = step if step <= 4 else 1
    for j, label in enumerate(labels):
        if j < main and j % step:
            continue
        width = _width(heat, sizes, j)
        text = cut(label, (width * step if j < main else width) * 0.98, measures[TEXT])
        _text(axes, _left(heat, sizes, j) + width / 2, top - 0.11, text, TEXT, INK, ha="center")
    middle = left + main * cell_width / 2
    if heat.column_axis:
        _text(axes, middle, top - 0.31, heat.column_axis, TEXT, GREY, ha="center")
    if heat.row_axis:
        rows = len(heat.rows) - heat.apart_rows
        room = max(rows * cell_height, 0.9)
        name = cut(heat.row_axis, room, measures[TEXT])
        _text(axes, _PAD + 0.08, top + rows * cell_height / 2, name, TEXT, GREY, ha="center", rotation=90.0)


def _draw_cells(axes: Axes, heat: HeatMap, sizes: _Sizes, measure: Measure) -> None:
    cell_height = sizes.cell[1]
    for i in range(len(heat.rows)):
        y = _top(heat, sizes, i)
        for j, span in heat.spans(i):
            x, value = _left(heat, sizes, j), float(heat.values[i, j])
            blank = math.isnan(value)
            fill, ink = (_EMPTY, GREY) if blank else heat.colour(value)
            box = (_width(heat, sizes, j, span) - 0.015, cell_height - 0.015)
            axes.add_patch(Rectangle((x, y), *box, fc=fill, ec="none", gid=f"cell {i} {j}"))
            short = "–" if blank else clean_token(heat.spot(i, j).short)
            if sizes.texts and short:
                text = cut(printable(short), (box[0] - 0.08) * 0.94, measure)
                _text(axes, x + box[0] / 2, y + box[1] / 2, text, SMALL, ink, ha="center")


def _draw_scale(axes: Axes, heat: HeatMap, sizes: _Sizes) -> None:
    """Draw the bar of colours with its ends, the higher end on top."""
    low, high = heat.range
    last = _left(heat, sizes, len(heat.columns) - 1) + _width(heat, sizes, len(heat.columns) - 1)
    x, top = last + 0.25, sizes.grid[1]
    bottom = _top(heat, sizes, len(heat.rows) - 1) + sizes.cell[1] - 0.015
    length, n = min(max(bottom - top, 0.9), 2.6), 128
    for k in range(n):
        fill, _ = heat.colour(low + (high - low) * (k + 0.5) / n)
        axes.add_patch(Rectangle((x, top + length * (1 - (k + 1) / n)), _BAR, length / n * 1.05, fc=fill, ec="none"))
    for share in (0.0, 0.5, 1.0) if length > 0.95 else (0.0, 1.0):
        value = number(low + (high - low) * share)
        y = top + length * (1 - share) + (0.05 if share == 1.0 else -0.05 if share == 0.0 else 0.0)
        _text(axes, x + _BAR + _GAP, y, value, SMALL, INK)
    name = heat.value + (f" ({heat.unit})" if heat.unit else "")
    _text(axes, x + _BAR + sizes.ends + 0.22, top + length / 2, name, TEXT, GREY, ha="center", rotation=90.0)


def _text(axes: Axes, x: float, y: float, text: str, size: float, colour: str, *, ha: str = "left",
          weight: str = "normal", rotation: float = 0.0) -> None:  # fmt: skip
    axes.text(x, y, printable(text), size=size, color=colour, ha=ha, va="center", weight=weight, rotation=rotation,
              rotation_mode="default", family=families(), parse_math=False)  # fmt: skip

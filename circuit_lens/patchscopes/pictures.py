"""Heat maps of a result: a measure by source and target layer, the controls set apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from circuit_lens.errors import PatchscopeError, nearest
from circuit_lens.patchscopes.axes import Measure, layer_name, scale_name, target_line, target_names
from circuit_lens.patchscopes.metrics import Answer
from circuit_lens.patchscopes.readout import Readout
from circuit_lens.viewer.heatmap import HeatMap, Spot
from circuit_lens.viewer.heatmap_parts import number

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult

MAX_ITEMS = 24
"""Items that get a row of their own where items are rows."""
_EXAMPLES = 6
_NAMES: dict[str, tuple[str, str, str, Literal["high", "low"]]] = {
    "precision": ("precision@1", "says the source's next token", "", "high"),
    "accuracy": ("accuracy", "says the answer", "", "high"),
    "surprisal": ("surprisal", "surprisal of the source at what is said", "nats", "low"),
    "nll": ("-log p", "-log p of the token", "nats", "low"),
    "entropy": ("entropy", "entropy of the next token", "nats", "low"),
}  # name, in words, unit, which end is bright
_LEAST = 1.0  # nats that a scale spans at least, so that differences of hundredths do not look large


@dataclass(frozen=True, eq=False)
class _Part:
    """Runs over (item, column) or (item, row, column): a figure, a text and the top tokens of each."""

    values: ndarray
    texts: ndarray
    tops: ndarray
    shares: ndarray

    def at(self, *index: Any) -> _Part:
        return _Part(self.values[index], self.texts[index], self.tops[index], self.shares[index])

    def tokens(self, at: tuple[int, ...]) -> tuple[tuple[str, float], ...]:
        return tuple(zip(self.tops[at].tolist(), self.shares[at].tolist(), strict=True))

    def short(self, at: tuple[int, ...]) -> str:
        return " ".join(str(self.texts[at] or self.tops[at][0]).split()) or repr(self.tops[at][0])


@dataclass(frozen=True)
class _Row:
    """A row of the picture: label, figures, what is told, whether it is one wide cell."""

    label: str
    values: list[float]
    spots: list[Spot]
    wide: bool = False


def heatmap(
    result: PatchscopeResult,
    measure: Measure = "entropy",
    *,
    item: int | str | None = None,
    answers: Sequence[Answer] | None = None,
    scale: float | None = None,
) -> HeatMap:
    """Return a heat map of a result; see `PatchscopeResult.heatmap`.

    Rows are source layers and columns target layers. With "same" target layers, and for vectors of no layer, rows are
    items (at most `MAX_ITEMS`, and the mean over all) and columns layers; of one such vector at several scales, rows
    are scales. Set apart stand the re-embedded token and the prompt without a patch.

    Raises:
        PatchscopeError: No such measure, item or scale, no scale where there are several, or what the measure needs is
            missing.
    """
    if measure not in get_args(Measure):
        raise PatchscopeError(
            f"measure={measure!r} is not valid{nearest(str(measure), get_args(Measure))}; give one of "
            f"{', '.join(map(repr, get_args(Measure)))}"
        )
    item = 0 if item is None and len(result.items) == 1 else item
    i = None if item is None else result.item_number(item)
    no_layer = result.source_layers == (None,)
    by_scale = no_layer and i is not None and scale is None and len(result.scales) > 1
    same, every = result.target_layers == "same", slice(None)
    a = every if by_scale else result.scale_number(scale)
    source, target = (0, every) if no_layer else (every, 0) if same else (every, every)
    patched = _part(result, result.patched.at(every, source, target, a), measure, answers)
    again = None if result.reembedded is None else result.reembedded.at(every, every, a)
    again = None if again is None else _part(result, again, measure, answers)
    parts = patched, again, _part(result, result.unpatched, measure, answers)
    if by_scale and i is not None:
        return _scales(result, parts, i, measure)
    make = _items if same or no_layer else _grid
    return make(result, parts, i, measure)


def _part(result: PatchscopeResult, readout: Readout, measure: Measure, answers: Sequence[Answer] | None) -> _Part:
    values = result.figures(measure, readout, answers).astype(float)
    return _Part(
        np.where(np.isfinite(values), values, np.nan), result.wording.texts(readout), result.wording.tops(readout),
        readout.top_logprobs.exp().numpy(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the three kinds


def _grid(
    result: PatchscopeResult, parts: tuple[_Part, _Part | None, _Part], item: int | None, measure: Measure
) -> HeatMap:
    """Source layers by target layers, of one item or the mean over all."""
    patched, again, bare = parts
    columns = target_names(result)
    rows = []
    for s, layer in enumerate(result.source_layers):
        names = [f"source layer {layer_name(layer)} → target layer {column}" for column in columns]
        rows.append(_row(result, layer_name(layer), patched.at(slice(None), s), item, names))
    apart = _controls(result, again, bare, item, columns)
    return _made(result, rows, columns, apart, item, measure, "source layer", "target layer")


def _items(
    result: PatchscopeResult, parts: tuple[_Part, _Part | None, _Part], item: int | None, measure: Measure
) -> HeatMap:
    """Items by layers; of one item, its row and the controls."""
    patched, again, bare = parts
    same = result.target_layers == "same"
    columns = target_names(result)
    names = [f"layer {column} → layer {column}" if same else f"into layer {column}" for column in columns]
    axis = "layer" if same else "target layer"
    if item is not None:
        rows = [_row(result, result.items[item], patched, item, names)]
        return _made(result, rows, columns, _controls(result, again, bare, item, columns), item, measure, "", axis)
    rows = [_row(result, name, patched, i, names) for i, name in enumerate(result.items[:MAX_ITEMS])]
    means = [_row(result, f"mean of {len(result.items)}", patched, None, names)]
    means += [] if again is None else [_row(result, "re-embedded", again, None, names)]
    for i, row in enumerate(rows):
        row.values.append(float(bare.values[i]))
        row.spots.append(_spot(bare, (i,), f"{result.items[i]}, unpatched prompt"))
    means[0].values.append(_mean(bare.values))
    means[0].spots.append(_examples(result, bare, "unpatched prompt"))
    for row in means[1:]:
        row.values.append(float("nan"))
        row.spots.append(Spot(title="no such run"))
    return _made(result, rows, [*columns, "unpatched"], means, item, measure, "item", axis, apart_columns=1)


def _scales(result: PatchscopeResult, parts: tuple[_Part, _Part | None, _Part], item: int, measure: Measure) -> HeatMap:
    """Scales by target layers, of one vector."""
    patched, _, bare = parts
    columns = target_names(result)
    rows = []
    for a, scale in enumerate(result.scales):
        names = [f"{scale_name(scale)} → layer {column}" for column in columns]
        part = patched.at(slice(None), slice(None), a)
        rows.append(_row(result, scale_name(scale), part, item, names))
    apart = _controls(result, None, bare, item, columns)
    return _made(result, rows, columns, apart, item, measure, "scale", "target layer")


# ------------------------------------------------------------------------------------------------------------- the rows


def _row(result: PatchscopeResult, label: str, part: _Part, item: int | None, names: Sequence[str]) -> _Row:
    """Return the row of one item, or of the mean over all, from runs over (item, column)."""
    if item is None:
        spots = [_examples(result, part.at(slice(None), j), name) for j, name in enumerate(names)]
        return _Row(label, [_mean(part.values[:, j]) for j in range(len(names))], spots)
    titles = [f"{result.items[item]}, {name}" for name in names]
    spots = [_spot(part, (item, j), title) for j, title in enumerate(titles)]
    return _Row(label, part.values[item].tolist(), spots)


def _controls(
    result: PatchscopeResult, again: _Part | None, bare: _Part, item: int | None, columns: Sequence[str]
) -> list[_Row]:
    """Return the rows of the re-embedded token and of the prompt without a patch."""
    rows = []
    if again is not None:
        names = [f"its embedding → layer {column}" for column in columns]
        rows.append(_row(result, "re-embedded", again, item, names))
    if item is None:
        value, spot = _mean(bare.values), _examples(result, bare, "unpatched prompt")
    else:
        value, spot = float(bare.values[item]), _spot(bare, (item,), "unpatched prompt")
    n = len(columns)
    rows.append(_Row("unpatched", [value] * n, [spot] * n, wide=True))
    return rows


def _spot(part: _Part, at: tuple[int, ...], title: str) -> Spot:
    return Spot(title, str(part.texts[at]), part.tokens(at), short=part.short(at))


def _examples(result: PatchscopeResult, part: _Part, title: str) -> Spot:
    """Return what is told about a mean over the items of runs over (item)."""
    n = len(result.items)
    told = [f"{result.items[i]}: {part.short((i,))}" for i in range(min(n, _EXAMPLES))]
    more = [f"… and {n - _EXAMPLES} more"] if n > _EXAMPLES else []
    value = _mean(part.values)
    return Spot(f"{title}, mean of {n}", lines=(*told, *more), short="–" if np.isnan(value) else number(value))


def _mean(values: Float[ndarray, "n"]) -> float:
    """Return the mean; NaN where a value is missing."""
    return float(values.mean())


def _made(
    result: PatchscopeResult,
    rows: list[_Row],
    columns: Sequence[str],
    apart: list[_Row],
    item: int | None,
    measure: Measure,
    row_axis: str,
    column_axis: str,
    *,
    apart_columns: int = 0,
) -> HeatMap:
    apart = [row for row in apart if not np.isnan(row.values).all()]  # figures that the controls cannot have
    listed = [*rows, *apart]
    name, words, unit, bright = _NAMES[measure]
    values = np.array([row.values for row in listed], dtype=float)
    high = 1.0 if not unit else max(_LEAST, float(np.nanmax(values)))
    n = len(result.items)
    about = result.items[item] if item is not None else f"{n} items"
    notes = [target_line(result)]
    if row_axis == "item" and n > MAX_ITEMS:
        notes.append(f"the first {MAX_ITEMS} of {n} items, and the mean of all")
    return HeatMap(
        values=values,
        rows=tuple(row.label for row in listed),
        columns=tuple(columns),
        row_axis=row_axis,
        column_axis=column_axis,
        title=f"{about}: {words}",
        note=" · ".join(notes),
        value=name,
        unit=unit,
        low=0.0,
        high=high,
        bright=bright,
        spots=tuple(tuple(row.spots) for row in listed),
        apart_rows=len(apart),
        apart_columns=apart_columns,
        wide=tuple(i for i, row in enumerate(listed) if row.wide),
    )

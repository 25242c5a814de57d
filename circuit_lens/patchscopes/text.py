"""A result as lines of text and as a table: what every item says, as far as a page has room."""

from __future__ import annotations

import textwrap
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuit_lens.graph import card_html
from circuit_lens.graph.card_tables import Cell, Table
from circuit_lens.patchscopes.axes import layer_name, scale_name, target_line
from circuit_lens.patchscopes.readout import Readout

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult

WIDTH = 80
_GAP, _LEAST, _NAME = 2, 9, 12  # blanks between columns; least width of a column of texts, and of names
_ITEMS = 12


@dataclass(frozen=True)
class Said:
    """A table of what is said.

    Attributes:
        head: Names of the columns.
        rows: Texts; the first is the row's name.
        controls: So many of the last rows are controls.
        notes: What is left out, and what stands for what.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    controls: int = 0
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ the table


def table(result: PatchscopeResult, *, width: int = WIDTH, items: int = _ITEMS) -> Said:
    """Return what a result says as a table that fits into a width.

    One item: rows are source layers (or scales), columns what is said, or target layers. Several items: rows are items,
    columns layers, or how many of the cells say the most frequent text.

    Args:
        result: The result.
        width: Of the page, in letters.
        items: At most so many items.
    """
    free = [axis for axis in range(1, 4) if result.shape[axis] > 1]
    if len(result.items) == 1:
        return _list(result, free) if len(free) < 2 else _grid(result, free, width)
    return _items(result, free, width, items) if len(free) < 2 else _votes(result, items)


def _labels(result: PatchscopeResult, axis: int) -> list[str]:
    if axis == 1:
        return [layer_name(layer) for layer in result.source_layers]
    if axis == 2:
        return ["same"] if result.target_layers == "same" else [layer_name(layer) for layer in result.target_layers]
    return [scale_name(scale) for scale in result.scales]


def _axis_name(result: PatchscopeResult, axis: int) -> str:
    return "scale" if axis == 3 else "layer" if result.target_layers == "same" else ("source", "target")[axis - 1]


def _list(result: PatchscopeResult, free: list[int]) -> Said:
    """One item along one axis: what is said, the next token, and beside it the re-embedded token."""
    axis = free[0] if free else 1
    labels, rows = _labels(result, axis), []
    generated = bool(result.patched.new_tokens.shape[-1])
    head = ["says", "next token"] if generated else ["next token"]
    for n, label in enumerate(labels):
        at = tuple(0 if k != axis else n for k in range(4))
        rows.append([label, *_both(result, result.patched, at, generated)])
    controls = []
    again = result.reembedded
    if again is not None and (axis == 2 or (axis == 1 and result.target_layers == "same")):
        head.append("re-embedded")
        for n, row in enumerate(rows):
            row.append(_said(result, again, (0, n, 0)))
    elif again is not None and axis == 3:
        head.append("re-embedded")
        for n, row in enumerate(rows):
            row.append(_said(result, again, (0, 0, n)))
    elif again is not None:
        controls.append(["re-emb.", *_both(result, again, (0, 0, 0), generated)])
    controls.append(["no patch", *_both(result, result.unpatched, (0,), generated)])
    listed = [(*row, *[""] * (len(head) + 1 - len(row))) for row in [*rows, *controls]]
    return Said((_axis_name(result, axis), *head), tuple(listed), len(controls))


def _grid(result: PatchscopeResult, free: list[int], width: int) -> Said:
    """One item along two axes (of three, the scale stays at its first): what each cell says."""
    down, across = free[0], free[1]
    labels, names = _labels(result, across), _labels(result, down)
    shown = _chosen(len(labels), (width - 10) // (_LEAST + _GAP + 2))
    rows = []
    for n, name in enumerate(names):
        cells = [tuple({down: n, across: m}.get(k, 0) for k in range(4)) for m in shown]
        rows.append((name, *[_said(result, result.patched, at) for at in cells]))
    controls = 0
    if result.reembedded is not None and across == 2:
        rows.append(("re-emb.", *[_said(result, result.reembedded, (0, m, 0)) for m in shown]))
        controls = 1
    notes = [f"no patch: {_said(result, result.unpatched, (0,))}"]
    notes += [f"{len(shown)} of {len(labels)} columns shown"] if len(shown) < len(labels) else []
    notes += [f"scale {scale_name(result.scales[0])} of {len(result.scales)} scales shown"] if len(free) == 3 else []
    arrow = "→ " if across == 2 else ""
    return Said((_axis_name(result, down), *[arrow + labels[m] for m in shown]), tuple(rows), controls, tuple(notes))


def _items(result: PatchscopeResult, free: list[int], width: int, items: int) -> Said:
    """Items along one axis: what each cell says, and what the prompt says without a patch."""
    axis = free[0] if free else 1
    labels = _labels(result, axis)
    shown = _chosen(len(labels), (width - _NAME - _GAP) // (_LEAST + _GAP) - 1)
    kept = min(items, len(result.items))
    rows = []
    for i in range(kept):
        cells = [(i, *(m if k == axis else 0 for k in range(1, 4))) for m in shown]
        texts = [_said(result, result.patched, at) for at in cells]
        rows.append((result.items[i], *texts, _said(result, result.unpatched, (i,))))
    notes = _left_out(result, kept)
    notes += [f"{len(shown)} of {len(labels)} {_axis_name(result, axis)}s shown"] if len(shown) < len(labels) else []
    prefix = "" if axis == 3 else "layer "
    return Said(("item", *[prefix + labels[m] for m in shown], "no patch"), tuple(rows), notes=tuple(notes))


def _votes(result: PatchscopeResult, items: int) -> Said:
    """Items along several axes: the most frequent text of each, and in how many of its cells it is said."""
    kept, rows = min(items, len(result.items)), []
    total = int(np.prod(result.shape[1:]))
    for i in range(kept):
        cells = list(np.ndindex(*result.shape[1:]))
        said = [_said(result, result.patched, (i, *at)) for at in cells]
        text, count = Counter(said).most_common(1)[0]
        rows.append((result.items[i], text, f"{count} of {total}", str(len(set(said))),
                     _said(result, result.unpatched, (i,))))  # fmt: skip
    head = ("item", "said most often", "cells", "different", "no patch")
    return Said(head, tuple(rows), notes=tuple(_left_out(result, kept)))


def _left_out(result: PatchscopeResult, kept: int) -> list[str]:
    n = len(result.items)
    return [f"{n - kept} more items"] if kept < n else []


def _chosen(n: int, room: int) -> list[int]:
    """Return up to ``room`` numbers below n, evenly apart, the first and the last among them."""
    room = max(2, room)
    return list(range(n)) if n <= room else sorted({round(k * (n - 1) / (room - 1)) for k in range(room)})


def _said(result: PatchscopeResult, readout: Readout, at: tuple[int, ...]) -> str:
    """Return what a run generated, or else its most probable next token, in one line."""
    length = int(readout.lengths[at]) if readout.new_tokens.shape[-1] else 0
    ids = readout.new_tokens[at][:length].tolist() or readout.top_tokens[at][:1].tolist()
    return one_line(result.wording.text(ids))


def _both(result: PatchscopeResult, readout: Readout, at: tuple[int, ...], generated: bool) -> list[str]:
    top = one_line(result.wording.text(readout.top_tokens[at][:1].tolist()))
    next_ = f"{top} {float(readout.top_logprobs[at][0].exp()):.3f}"
    return [_said(result, readout, at), next_] if generated else [next_]


def one_line(text: str) -> str:
    """Return a text without blanks around it, line breaks visible; quoted where nothing is left.

    >>> one_line(" Texas\\n"), one_line(" ")
    ('Texas⏎', "' '")
    """
    return text.replace("\n", "⏎").strip(" ") or repr(text)


# ------------------------------------------------------------------------------------------------------------- as lines


def title(result: PatchscopeResult) -> str:
    """Return what was moved where, in a line."""
    n_items, n_source, n_target, n_scales = result.shape
    parts = [_count(n_items, "item")]
    if result.source_layers != (None,):
        parts.append(_count(n_source, "source layer"))
    same = result.target_layers == "same"
    parts.append(("each into itself" if n_source > 1 else "into itself") if same else _count(n_target, "target layer"))
    parts += [_count(n_scales, "scale")] if n_scales > 1 else []
    return ", ".join(parts)


def _count(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


def as_text(result: PatchscopeResult, *, width: int = WIDTH) -> str:
    """Return a result as lines of at most ``width`` letters."""
    found = table(result, width=width)
    name = f" of {result.items[0]!r}" if len(result.items) == 1 else ""
    lines = _wrapped(f"Patchscope{name}: {title(result)}", width) + _wrapped(target_line(result), width)
    lines += ["", *columns(found, width)]
    lines += [cut(f"  {note}", width) for note in found.notes]
    for note in result.notes:
        lines += _wrapped(f"note: {note}", width)
    return "\n".join(lines)


def columns(found: Said, width: int) -> list[str]:
    """Return the lines of a table; the widest columns give way."""
    across = zip(found.head, *found.rows, strict=True)
    wide = shares([max(map(letters, column)) for column in across], width - _GAP)
    lines = []
    for n, row in enumerate([found.head, *found.rows]):
        if found.controls and n == len(found.rows) + 1 - found.controls:
            lines.append("")
        folded = [fold(text, room) for text, room in zip(row, wide, strict=True)]
        for line in range(max(map(len, folded))):
            cells = [cell[line] if line < len(cell) else "" for cell in folded]
            padded = [text + " " * (room - letters(text)) for text, room in zip(cells, wide, strict=True)]
            lines.append(("  " + (" " * _GAP).join(padded)).rstrip())
    return lines


def shares(wanted: list[int], width: int) -> list[int]:
    """Return widths of columns that fit into a width: the widest are cut first.

    >>> shares([4, 30, 8], 30), shares([4, 5], 30)
    ([4, 14, 8], [4, 5])
    """
    limit = max(wanted)
    while limit > 4 and sum(min(one, limit) for one in wanted) + _GAP * (len(wanted) - 1) > width:
        limit -= 1
    return [min(one, limit) for one in wanted]


def letters(text: str) -> int:
    """Return how many columns of a terminal a text takes; wide letters take two, combining marks none.

    >>> letters("Texas"), letters("日本"), letters("e\\u0301")
    (5, 4, 1)
    """
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )  # fmt: skip


def cut(text: str, width: int) -> str:
    """Return a text of at most so many columns of a terminal; an ellipsis stands for what is left out.

    >>> cut("city in Texas", 8), cut("日本語", 5)
    ('city in…', '日本…')
    """
    if letters(text) <= width:
        return text
    while text and letters(text.rstrip()) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def fold(text: str, width: int) -> list[str]:
    """Return a text as one or two lines of at most so many columns of a terminal, broken at a blank.

    >>> fold("city in North Carolina ; Robert", 9), fold("Texas", 9)
    (['city in', 'North Ca…'], ['Texas'])
    """
    if letters(text) <= width:
        return [text]
    words = text.split(" ")
    kept = max((n for n in range(len(words)) if letters(" ".join(words[:n])) <= width), default=0)
    first = " ".join(words[:kept])
    return [first, cut(" ".join(words[kept:]), width)] if first.strip() else [cut(text, width)]


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return [cut(line, width) for line in lines]


# -------------------------------------------------------------------------------------------------------------- as HTML


def as_html(result: PatchscopeResult) -> str:
    """Return the heat map of one item, or a table of several."""
    if len(result.items) == 1 and sum(n > 1 for n in result.shape) > 0 and _has_map(result):
        return result.heatmap()._repr_html_()
    found = table(result, width=140, items=30)
    rows = tuple(tuple(Cell(text) for text in row) for row in found.rows)
    groups = tuple("control" if n >= len(rows) - found.controls else "" for n in range(len(rows)))
    note = "; ".join([*found.notes, *result.notes])
    shown = Table("What is said", found.head, rows, groups, note)
    return card_html.part("Patchscope", title(result), [target_line(result)], [shown])


def _has_map(result: PatchscopeResult) -> bool:
    """Whether the scale need not be chosen first."""
    return len(result.scales) == 1 or result.source_layers == (None,)

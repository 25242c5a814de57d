"""Results of studies as tables: rates with Wilson intervals, means with bootstrap intervals, and what failed."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuit_lens.graph.files import atomic_path
from circuit_lens.graph.rates import Mean, Rate, finite

Cell = Rate | Mean | str | int | float


@dataclass(frozen=True, slots=True)
class Failure:
    """One item that did not do what a row counts: what it was, what was wanted, what came."""

    item: str
    wanted: str
    got: str

    def __str__(self) -> str:
        return f"{self.item}: wanted {self.wanted!r}, got {self.got!r}"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a name, a figure for each column, and the failures behind the first rate."""

    name: str
    cells: Mapping[str, Cell]
    failures: tuple[Failure, ...] = ()

    @property
    def rate(self) -> Rate:
        """The first rate of the row.

        Raises:
            ValueError: It has none.
        """
        for cell in self.cells.values():
            if isinstance(cell, Rate):
                return cell
        raise ValueError(f"the row {self.name!r} holds no rate")


@dataclass(frozen=True)
class StudyTable:
    """A table of a study.

    Attributes:
        title: What was measured, and on which model.
        rows: The lines; all have the same columns, or fewer.
        notes: How the figures are meant: rules, choices, limits.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which rows bring them."""
        return list(dict.fromkeys(name for row in self.rows for name in row.cells))

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; rows are {[row.name for row in self.rows]}")

    @property
    def failures(self) -> list[Failure]:
        """The failures of all rows."""
        return [failure for row in self.rows for failure in row.failures]

    def _texts(self) -> list[list[str]]:
        head = ["", *self.columns]
        return [head, *([row.name, *(_text(row.cells.get(name)) for name in self.columns)] for row in self.rows)]

    def __str__(self) -> str:
        texts = self._texts()
        widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
        lines = [self.title]
        for line in texts:
            lines.append("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    __repr__ = __str__

    def markdown(self, *, level: int = 3, max_failures: int = 8) -> str:
        """Return the table as Markdown, with the first failures of each row."""
        head, *lines = [[text.replace("|", "\\|") for text in line] for line in self._texts()]
        out = [f"{'#' * level} {self.title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        out += ["| " + " | ".join(line) + " |" for line in lines]
        out += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        for row in self.rows:
            if row.failures:
                shown = "; ".join(map(str, row.failures[:max_failures]))
                more = len(row.failures) - max_failures
                out += ["", f"Not met, {row.name}: {shown}" + (f"; and {more} more" if more > 0 else "") + "."]
        return "\n".join(out) + "\n"

    def _repr_html_(self) -> str:
        head, *lines = self._texts()
        cells = "".join(f"<th style='text-align:left'>{html.escape(text)}</th>" for text in head)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in line) + "</tr>"
            for line in lines
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<h4>{html.escape(self.title)}</h4><table><tr>{cells}</tr>{body}</table>{notes}"

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return everything as JSON-able data, and write it to ``path`` if given, all or nothing."""
        document = {
            "title": self.title,
            "notes": list(self.notes),
            "rows": [
                {
                    "name": row.name,
                    "cells": {name: _json(cell) for name, cell in row.cells.items()},
                    "failures": [{"item": f.item, "wanted": f.wanted, "got": f.got} for f in row.failures],
                }
                for row in self.rows
            ],
        }
        if path is not None:
            write_json(path, document)
        return document


def write_json(path: str | Path, document: Any) -> None:
    """Write JSON, all or nothing."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=False, allow_nan=False, indent=1)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _json(cell: Cell) -> Any:
    if isinstance(cell, Rate | Mean):
        return cell.to_json()
    return finite(cell) if isinstance(cell, float) else cell

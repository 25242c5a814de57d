"""The rows of a grid: which vector each run of the target prompt gets, where, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.maps import Map
from circuit_lens.patchscopes.sources import EMBEDDING, Vectors

Write = Literal["replace", "add", "add_matched"]
Through = Literal["layer", "below"]
WRITES: tuple[Write, ...] = ("replace", "add", "add_matched")
THROUGH: tuple[Through, ...] = ("layer", "below")
Writes = dict[int, tuple[Tensor, Tensor]]
"""For each target layer that is written at: rows ``[n]`` and their values ``[n, n_slots, d_model]``."""


@dataclass(frozen=True)
class Cell:
    """One source layer (None: vectors of no layer) into one target layer, at one scale."""

    source_layer: int | None
    target_layer: int
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Runs of one target prompt: row r moves item ``item[r]`` by ``cells[cell[r]]``.

    Attributes:
        vectors: What is moved.
        cells: Source layer, target layer and scale.
        item: Of each row, a number of ``vectors``' items; -1: nothing is moved into this row.
        cell: Of each row, a number of ``cells``.
        mapping: f.
        write: ``"replace"``: f(v) stands in place of the placeholder's state h. ``"add"``: h + f(v). ``"add_matched"``:
            h + |h| f(v) / |f(v)|. The scale multiplies f(v), in the last case the whole second term.
        through: ``"layer"``: at the target layer alone. ``"below"``: at every layer k up to it, below it with the
            item's own state of layer min(k, source layer), so that the keys and values that later tokens read are the
            item's too. Vectors of no layer are the same everywhere.
        d_model: Width of the target's residual stream.
    """

    vectors: Vectors
    cells: tuple[Cell, ...]
    item: Int[Tensor, "n_rows"]
    cell: Int[Tensor, "n_rows"]
    mapping: Map
    write: Write
    through: Through
    d_model: int

    def __len__(self) -> int:
        return len(self.item)

    def part(self, rows: slice | Sequence[int]) -> Rows:
        """Return some of the rows."""
        at = rows if isinstance(rows, slice) else list(rows)
        return replace(self, item=self.item[at], cell=self.cell[at])

    def layers(self, cell: Cell) -> range:
        """Return the target layers at which a cell writes."""
        first = EMBEDDING if self.through == "below" else cell.target_layer
        return range(first, cell.target_layer + 1)

    def value(self, cell: Cell, layer: int, item: Int[Tensor, "n"]) -> Float[Tensor, "n n_slots d_model"]:
        """Return what some items write at a layer.

        Raises:
            PatchscopeError: A layer that the vectors lack, a map that makes no vectors of the target's width, or what
                is NaN or infinite after the map and the scale.
        """
        source = cell.source_layer
        if source is not None and layer != cell.target_layer:
            source = min(layer, source)
        h = self.vectors.layer(source)[item.to(self.vectors.values.device)]
        mapped = self.mapping(h, source, layer)
        if not isinstance(mapped, Tensor) or not mapped.is_floating_point():
            raise PatchscopeError(
                f"the map {self.mapping.name!r} makes {type(mapped).__name__}, not vectors; it must return one tensor "
                f"[..., {self.d_model}] of a floating dtype"
            )
        mapped = mapped.detach()
        if mapped.shape != (*h.shape[:-1], self.d_model):
            raise PatchscopeError(
                f"the source's vectors have width {h.shape[-1]}, of which the map {self.mapping.name!r} makes width "
                f"{mapped.shape[-1]}, and the target reads width {self.d_model}; give a mapping between them, such as "
                "cl.patchscopes.fit_map(model, texts, target_model=...)"
            )
        if not bool(torch.isfinite(mapped).all()):
            raise PatchscopeError(f"the map {self.mapping.name!r} from layer {source} to {layer} makes NaN or infinity")
        if self.write == "add_matched":
            mapped = mapped.float() if mapped.dtype in (torch.float16, torch.bfloat16) else mapped
            mapped = mapped / mapped.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mapped.dtype).tiny)
        scaled = mapped * cell.scale
        if not bool(torch.isfinite(scaled).all()):
            raise PatchscopeError(f"scale {cell.scale:g} makes vectors infinite in {scaled.dtype}; give a smaller one")
        return scaled

    def writes(self) -> Writes:
        """Return what is written at each layer."""
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number in self.cell.unique().tolist():
            rows = ((self.cell == number) & (self.item >= 0)).nonzero().flatten()
            if not len(rows):
                continue
            cell = self.cells[number]
            for layer in self.layers(cell):
                parts.setdefault(layer, []).append((rows, self.value(cell, layer, self.item[rows])))
        return {
            layer: (torch.cat([rows for rows, _ in found]), torch.cat([value for _, value in found]))
            for layer, found in sorted(parts.items())
        }


def written(
    write: Write, old: Float[Tensor, "n n_slots d_model"], value: Float[Tensor, "n n_given d_model"]
) -> Float[Tensor, "n n_slots d_model"]:
    """Return the placeholders' new states; one vector given is written at all of several placeholders.

    Raises:
        PatchscopeError: Vectors that are infinite in the target's dtype.
    """
    narrow = value.to(old)
    if value.dtype != old.dtype and not bool(torch.isfinite(narrow).all()):
        raise PatchscopeError(
            f"vectors of up to {float(value.abs().max()):.3g} are infinite in the target's dtype {old.dtype}; give a "
            "smaller scale, or a target model of a wider dtype"
        )
    value = narrow.expand_as(old)
    if write == "replace":
        return value
    return old + value if write == "add" else old + value * old.norm(dim=-1, keepdim=True)

"""A grid laid out as rows: cells of source layer, target layer and scale, controls, and parts that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.given import numbers, several
from circuit_lens.patchscopes.rows import Cell
from circuit_lens.patchscopes.sources import Vectors
from circuit_lens.patchscopes.streams import EMBEDDING, activations
from circuit_lens.patchscopes.targets import Placed
from circuit_lens.protocols import HookedModel

Layers = str | int | Sequence[int]
"""Numbers of layers (-1 is the embedding), "all", "same" or "last"."""


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, and those of the control that moves the embedding of the source's token.

    Attributes:
        source_layers: (None,) for vectors of no layer.
        target_layers: "same": each source layer into itself.
        scales: What is multiplied.
        cells: By source layer, then target layer, then scale.
        controls: One for each target layer and scale; none where the source has no embedding, or none is wanted.
    """

    source_layers: tuple[int | None, ...]
    target_layers: tuple[int, ...] | Literal["same"]
    scales: tuple[float, ...]
    cells: tuple[Cell, ...]
    controls: tuple[Cell, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of source layers, target layers and scales."""
        n_target = 1 if self.target_layers == "same" else len(self.target_layers)
        return len(self.source_layers), n_target, len(self.scales)

    @classmethod
    def of(
        cls,
        vectors: Vectors,
        model: HookedModel,
        source_layers: Layers,
        target_layers: Layers,
        scales: float | Sequence[float],
        controls: bool,
    ) -> Grid:
        """Return the grid that is asked for.

        Raises:
            PatchscopeError: Layers that are not there, an empty axis, or a scale that is no number.
        """
        known = range(EMBEDDING, model.cfg.n_layers)
        sources = _source_layers(vectors, source_layers)
        same = isinstance(target_layers, str) and target_layers == "same"
        if same and vectors.layers is None:
            raise PatchscopeError(
                "the vectors belong to no layer, so they cannot go into the same one; give target_layers as numbers or "
                "'all'"
            )
        targets = [layer for layer in sources if layer is not None] if same else _layers(target_layers, known)
        for layer in targets:
            if layer not in known:
                raise PatchscopeError(
                    f"target layer {layer} does not exist; the model has layers {known[0]} (the embedding) to "
                    f"{known[-1]}"
                )
        values = numbers(scales, "scales")
        if not values or not all(abs(value) < float("inf") for value in values):
            raise PatchscopeError(f"scales={scales!r:.80} is not valid; give at least one finite number")
        pairs = [(s, s) for s in sources] if same else [(s, t) for s in sources for t in targets]
        cells = tuple(Cell(s, t, a) for s, t in pairs for a in values if t is not None)
        controlled = controls and vectors.layers is not None and EMBEDDING in vectors.layers
        return cls(
            tuple(sources),
            "same" if same else tuple(targets),
            tuple(values),
            cells,
            tuple(Cell(EMBEDDING, layer, a) for layer in targets for a in values) if controlled else (),
        )


def _source_layers(vectors: Vectors, wanted: Any) -> list[int | None]:
    if vectors.layers is None:
        if not (isinstance(wanted, str) and wanted == "all"):
            raise PatchscopeError(f"the vectors belong to no layer, so source_layers={wanted!r} cannot be chosen")
        return [None]
    found: list[int | None] = list(_layers(wanted, vectors.layers))
    for layer in found:
        if layer is not None:
            vectors.layer(layer)  # raises where there is none
    return found


def _layers(wanted: Any, known: Sequence[int]) -> list[int]:
    match wanted:
        case "all":
            return list(known)
        case "last":
            return [max(known)]
        case str():
            raise PatchscopeError(f"layers {wanted!r} is not valid; give numbers, 'all', 'last', or (as target) 'same'")
        case _:
            found = several(wanted, "layers")
            if not found or len(set(found)) != len(found):
                raise PatchscopeError(f"layers {found}: give at least one, and each once")
            return found


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that run at once: their items (-1: the unpatched prompt), cells, and places among all rows."""

    item: Int[Tensor, "n"]
    cell: Int[Tensor, "n"]
    at: Int[Tensor, "n"]


class Layout:
    """All rows of a grid: cell after cell, then the controls, then the unpatched prompts.

    Args:
        grid: The cells.
        n_items: Items that each cell moves.
        target_of: The number of each item's target prompt.
    """

    def __init__(self, grid: Grid, n_items: int, target_of: Sequence[int]) -> None:
        self.grid, self.n_items = grid, n_items
        self.target_of = torch.tensor(list(target_of))
        self.cells = (*grid.cells, *grid.controls)
        self.n_main = len(grid.cells) * n_items
        self.n_patched = len(self.cells) * n_items
        self.n_targets = int(self.target_of.max()) + 1
        self.n_rows = self.n_patched + self.n_targets

    def parts(self, target: int, size: int) -> Iterator[Part]:
        """Yield the rows of one target prompt, at most ``size`` at once."""
        items = (self.target_of == target).nonzero().flatten()
        item = items.repeat(len(self.cells))
        cell = torch.arange(len(self.cells)).repeat_interleave(len(items))
        at = torch.cat([cell * self.n_items + item, torch.tensor([self.n_patched + target])])
        item, cell = torch.cat([item, torch.tensor([-1])]), torch.cat([cell, torch.tensor([0])])
        for start in range(0, len(at), size):
            chosen = slice(start, start + size)
            yield Part(item[chosen], cell[chosen], at[chosen])


def row_bytes(model: HookedModel, target: Placed, max_new_tokens: int, n_writes: int, *, use_cache: bool = True) -> int:
    """Return about how much memory one row takes while it runs: keys and values, activations, logits, what is written.

    Args:
        model: The target model.
        target: The prompt; what stands before its placeholder is run once.
        max_new_tokens: Tokens to generate.
        n_writes: Layers at which a row is written, at most.
        use_cache: Keep keys and values; without, all positions are run at once, and logits are made of all.
    """
    cfg: Any = model.cfg
    size = model.W_U.element_size()
    n_pos = len(target.tokens)
    n_own = n_pos - target.start
    if not use_cache:
        n_pos = n_own = n_pos + max_new_tokens
    n_kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    kept = 2 * cfg.n_layers * n_kv * cfg.d_head * (n_pos + max_new_tokens) if use_cache else 0
    kept += kept // 3  # a cache that grows is copied, and what is freed in between is not all used again
    every = 2 * n_own * cfg.d_vocab if not use_cache else 0
    return (
        size * (kept + activations(cfg, n_own, n_pos) + every + n_writes * cfg.d_model) + 6 * max(size, 4) * cfg.d_vocab
    )

"""Grids of patchscopes read against answers, and the columns that all their tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.grid import Layers
from circuit_lens.patchscopes.maps import Map
from circuit_lens.patchscopes.metrics import Accuracy, Chosen, How, best_fixed
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.rows import Through
from circuit_lens.patchscopes.sources import EMBEDDING, At, Vectors
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.studies.patch_items import Item
from circuit_lens.studies.tables import Cell, Failure, Row, StudyTable

CHOICE = (
    "Best fixed cell: the source and target layer that are right most often on one half of the items, scored on the "
    "other half, both ways; ties go to the lower layers. The embedding is no source layer there: it is a control. "
    "Intervals do not know that a cell was chosen."
)
CONTROLS = (
    "Embedding patch: the token at the end of the name, as an embedding, at its own best fixed target layer, chosen on "
    "the same halves; into the embedding that is the token written in the prompt. Gain over it: paired difference. "
    "Unpatched: the prompt with its x."
)
AGAIN = (
    "Best source layer: the one that is right most often for this target layer on one half of the items, scored on the "
    "other half, both ways; the embedding is none. Re-embedded: the token at the end of the name, as an embedding, "
    "into the same target layer; gain: paired difference to it. Intervals do not know that a layer was chosen."
)
RECOMPUTES = (
    "The target run computes its own blocks above the target layer, so a state moved to an early layer is worked on "
    "again: what a cell says is what the state leads to in this prompt, not what is decoded from it alone."
)


def titled(title: str, name: str) -> str:
    """Return a title with the name of a model, if there is one.

    >>> titled("Two steps", "capitals"), titled("Two steps", "")
    ('Two steps (capitals)', 'Two steps')
    """
    return f"{title} ({name})" if name else title


def layer_title(layer: int | str | None) -> str:
    """Name a layer in words, for rows and columns; in grids of numbers see `circuit_lens.patchscopes.axes.layer_name`.

    >>> layer_title(-1), layer_title(2)
    ('embedding', 'layer 2')
    """
    return "embedding" if layer == EMBEDDING else f"layer {layer}"


def sources(model: HookedModel, items: Sequence[Item], layers: Sequence[int] | None = None) -> Vectors:
    """Return the residual streams at the last tokens of the items' prompts, at these layers or all."""
    return Vectors.from_prompts(model, [At(one.prompt, name=one.name) for one in items], layers=layers)


def narrowed(
    result: PatchscopeResult,
    *,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
) -> PatchscopeResult:
    """Return a part of a grid: some items (by number), source layers and target layers, with its controls."""
    assert result.target_layers != "same", "the layers of a diagonal are one axis"
    rows = list(range(len(result.items))) if items is None else list(items)
    froms = list(result.source_layers) if source_layers is None else list(source_layers)
    tos = list(result.target_layers) if target_layers is None else list(target_layers)
    s = [result.source_layers.index(layer) for layer in froms]
    t = [result.target_layers.index(layer) for layer in tos]
    every = slice(None)
    again = result.reembedded
    return replace(
        result,
        items=tuple(result.items[i] for i in rows),
        source_layers=tuple(froms),
        target_layers=tuple(tos),
        patched=result.patched.at(rows).at(every, s).at(every, every, t),
        reembedded=None if again is None else again.at(rows).at(every, t),
        unpatched=result.unpatched.at(rows),
        source_top=None if result.source_top is None else result.source_top[rows],
        targets=tuple(result.targets[i] for i in rows),
    )


@dataclass(frozen=True)
class Into:
    """The best source layer of one target layer, beside the re-embedded token there.

    Attributes:
        layer: The target layer.
        sources: The source layers of both halves, in words.
        right: Whether each item is right, by the layer that was chosen without it.
        again: Whether it is with its token embedded into this target layer; None: unknown.
    """

    layer: int | str
    sources: str
    right: Bool[ndarray, "n_items"]
    again: Bool[ndarray, "n_items"] | None

    def cells(self) -> dict[str, Cell]:
        """The columns of a table by target layer."""
        found: dict[str, Cell] = {"best source layer": self.sources, "right": Rate.of(self.right.tolist())}
        if self.again is not None:
            found |= {"re-embedded": Rate.of(self.again.tolist()), "gain": difference(self.right, self.again)}
        return found


@dataclass(frozen=True)
class Reading:
    """A grid with the answers that are right.

    Attributes:
        items: What was read.
        result: All source and target layers.
        how: Where an answer must stand, see `PatchscopeResult.right`.
    """

    items: tuple[Item, ...]
    result: PatchscopeResult
    how: How = "starts"

    @property
    def answers(self) -> list[Any]:
        """The answers, item by item."""
        return [one.answer for one in self.items]

    @cached_property
    def right(self) -> Bool[ndarray, "n_items n_source_layers n_target_layers"]:
        """Which cells are right."""
        return self.result.right(self.answers, self.how)[..., 0]

    @cached_property
    def accuracy(self) -> Accuracy:
        """See `PatchscopeResult.accuracy`."""
        return self.result.accuracy(self.answers, self.how)

    @cached_property
    def first(self) -> Float[ndarray, "n_items"]:
        """The first source layer from which any target layer is right, by item; NaN where none is."""
        right = self.right.any(2)
        layers = np.array(self.result.source_layers, dtype=float)
        return np.where(np.any(right, axis=1), layers[right.argmax(1)], np.nan)

    def from_layer(self, source: int) -> dict[str, Cell]:
        """The columns of a table by source layer, which is given by its number: how many items are right from it."""
        layer, targets = self.result.source_layers[source], list(self.result.target_layers)
        found: dict[str, Cell] = {}
        if EMBEDDING in targets:
            found["into embedding"] = Rate.of(self.right[:, source, targets.index(EMBEDDING)].tolist())
        if layer in targets and layer != EMBEDDING:
            found["into the same layer"] = Rate.of(self.right[:, source, targets.index(layer)].tolist())
        found["any target layer"] = Rate.of(np.any(self.right[:, source], axis=1).tolist())
        found["first right here"] = Rate.of((self.first == layer).tolist())
        return found

    @property
    def inner(self) -> list[int]:
        """Numbers of the source layers that are not the embedding."""
        return [n for n, layer in enumerate(self.result.source_layers) if layer != EMBEDDING]

    @cached_property
    def again(self) -> Bool[ndarray, "n_items n_target_layers"] | None:
        """Which items are right with their token embedded, by target layer (where layers go into themselves, by those).

        None: there is no such control.
        """
        control = self.result.reembedded
        if control is None:
            return None
        return replace(self, result=replace(self.result, patched=control.at(slice(None), None))).right[:, 0]

    @cached_property
    def chosen(self) -> Chosen:
        """The best fixed cell; source layers are numbers of `inner`."""
        return best_fixed(self.right[:, self.inner][..., None])

    def part(self, *, items: Sequence[int] | None = None, target_layers: Sequence[int] | None = None) -> Reading:
        """Return some items (by number) or target layers."""
        kept = range(len(self.items)) if items is None else items
        cut = narrowed(self.result, items=items, target_layers=target_layers)
        return Reading(tuple(self.items[i] for i in kept), cut, self.how)

    def of(self, **wanted: object) -> Reading:
        """Return the items whose attributes are these."""
        found = [i for i, one in enumerate(self.items) if all(getattr(one, k) == v for k, v in wanted.items())]
        return self.part(items=found)

    @cached_property
    def embedded(self) -> Bool[ndarray, "n_items"] | None:
        """Whether each item is right by its embedding, at its best fixed target layer; None where there is none."""
        return None if self.again is None or len(self.right) < 2 else best_fixed(self.again).right

    def into(self) -> list[Into]:
        """Return the best source layer and the control of each target layer; at least two items are needed."""
        found = []
        for t, layer in enumerate(self.result.target_layers):
            chosen = best_fixed(self.right[:, self.inner, t])
            named = [layer_title(self.result.source_layers[self.inner[s]]) for (s,) in chosen.cells]
            again = None if self.again is None else self.again[:, t]
            found.append(Into(layer, "; ".join(dict.fromkeys(named)), chosen.right, again))
        return found

    def cells(self) -> dict[str, Cell]:
        """The columns of a summary."""
        accuracy = self.accuracy
        over = [rate.share for rate in accuracy.any_target_layer]
        found: dict[str, Cell | None] = {"best fixed cell": accuracy.best_fixed, "which": cell_names(accuracy)}
        if self.embedded is not None:
            found["embedding patch"] = Rate.of(self.embedded.tolist())
            found["gain over it"] = difference(self.chosen.right, self.embedded)
        found |= {
            "unpatched": accuracy.unpatched,
            "any target layer, mean over layers": float(np.mean(over)),
            "any cell": accuracy.any_layer,
        }
        return {name: value for name, value in found.items() if value is not None}

    def failures(self) -> tuple[Failure, ...]:
        """What the best fixed cell gets wrong, and what it says."""
        if len(self.items) < 2:
            return ()
        chosen, found = self.chosen, []
        for i, one in enumerate(self.items):
            if not chosen.right[i]:
                s, t, a = chosen.cells[int(chosen.fold[i])]
                wanted = one.answer if isinstance(one.answer, str) else " / ".join(one.answer)
                found.append(Failure(one.name, wanted, self.said(i, self.inner[s], t, a)))
        return tuple(found)

    def said(self, item: int, source: int, target: int, scale: int = 0) -> str:
        """Return what a cell says, by its numbers."""
        text = str(self.result.texts[item, source, target, scale])
        return text or str(self.result.top_tokens[item, source, target, scale, 0])


def read(
    model: HookedModel,
    items: Sequence[Item],
    target: Target,
    *,
    max_new_tokens: int | None = None,
    how: How = "starts",
    vectors: Vectors | None = None,
    layers: Sequence[int] | None = None,
    source_layers: Layers = "all",
    target_layers: Layers | None = None,
    mapping: Map | None = None,
    patch_through: Through = "layer",
    target_model: HookedModel | None = None,
) -> Reading:
    """Move the states of items into a target prompt, by all cells of a grid.

    Args:
        model: The source model.
        items: What is read, at the last token of its prompt.
        target: The target prompt.
        max_new_tokens: Tokens to generate; None: as the target says.
        how: Where an answer must stand.
        vectors: The items' states, if they are there already (`sources`).
        layers: Source layers, and target layers where none are given; None: all.
        source_layers: Those of the vectors that are moved.
        target_layers: See `circuit_lens.patchscope`, as the rest.
        mapping: Likewise.
        patch_through: Likewise.
        target_model: Likewise.
    """
    result = patchscope(
        model,
        sources(model, items, layers) if vectors is None else vectors,
        target,
        source_layers=source_layers,
        target_layers=("all" if layers is None else layers) if target_layers is None else target_layers,
        mapping=mapping,
        patch_through=patch_through,
        target_model=target_model,
        max_new_tokens=max_new_tokens,
        keep_logits=False,
    )
    return Reading(tuple(items), result, how)


def cell_names(accuracy: Accuracy) -> str:
    """Name the fixed cells of both halves."""
    named = [f"{layer_title(source)} → {layer_title(target)}" for source, target, _ in accuracy.cells]
    return "; ".join(dict.fromkeys(named))


def into_table(title: str, readings: Mapping[str, Reading], notes: Sequence[str] = ()) -> StudyTable:
    """How much of what is said needs the layers, by target layer.

    Args:
        title: Of the table.
        readings: Grids by name; those of fewer than two items are left out.
        notes: After that on the choice.
    """
    rows = [
        Row(f"{label}: into {layer_title(one.layer)}", one.cells())
        for label, reading in readings.items()
        if len(reading.items) > 1
        for one in reading.into()
    ]
    return StudyTable(title, tuple(rows), (AGAIN, *notes))


def difference(first: Sequence[bool] | ndarray, second: Sequence[bool] | ndarray) -> Mean:
    """Return the paired difference of two lists of hits, with its interval."""
    return Mean.of((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).tolist())

"""The changes of a batch of runs as tensors, one entry per changed activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.dictionaries.binding import read_rank
from circuit_lens.dictionaries.points import Place, parse_hook
from circuit_lens.graph.nodes import Feature
from circuit_lens.interventions.recording import Recording
from circuit_lens.interventions.resolve import Wanted

# Where directions are changed: before an autoencoder at the same hook, but behind what else is written there.
_ORDER = {
    "hook_resid_pre": Place.PRE_EDIT,
    "hook_attn_out": Place.ATTENTION,
    "hook_resid_mid": Place.MID_EDIT,
    "hook_mlp_out": Place.MLP_OUT_READ,
    "hook_resid_post": Place.POST_EDIT,
}


@dataclass(frozen=True, eq=False)
class FeatureEdits:
    """Changes of one dictionary's features in a batch of runs: ``new = base + factor * old``.

    Attributes:
        row, pos, index: Which run, position and feature.
        base, factor: ``factor`` is 0 in the prompt, where every new value is fixed before the run.
        clean: Whether nothing before it in its run is changed, so that the old activation is the clean one.
    """

    row: Int[Tensor, "n"]
    pos: Int[Tensor, "n"]
    index: Int[Tensor, "n"]
    base: Float[Tensor, "n"]
    factor: Float[Tensor, "n"]
    clean: Bool[Tensor, "n"]


@dataclass(frozen=True, eq=False)
class VectorEdits:
    """Changes of errors or directions at one hook in a batch of runs.

    Attributes:
        row, pos: Which run and position.
        vectors: The new errors, or the directions.
        base, factor: The new coordinate along a direction is ``base + factor * old``; zeros for errors.
        clean: As in :class:`FeatureEdits`.
    """

    row: Int[Tensor, "n"]
    pos: Int[Tensor, "n"]
    vectors: Float[Tensor, "n d_model"]
    base: Float[Tensor, "n"]
    factor: Float[Tensor, "n"]
    clean: Bool[Tensor, "n"]


@dataclass(frozen=True, eq=False)
class Edits:
    """All changes of a batch of runs: features by site, errors by the hook written at, directions by hook."""

    n_rows: int
    features: dict[str, FeatureEdits]
    errors: dict[str, VectorEdits]
    directions: dict[str, VectorEdits]

    def where(self, wanted: Callable[[Any], Bool[Tensor, "n"]]) -> Edits:
        """Return the changes for which a mask holds."""

        def cut(tables: dict[str, Any]) -> dict[str, Any]:
            found = {}
            for name, e in tables.items():
                mask = wanted(e)
                if bool(mask.any()):
                    found[name] = type(e)(*(getattr(e, f.name)[mask] for f in fields(e)))
            return found

        return Edits(self.n_rows, cut(self.features), cut(self.errors), cut(self.directions))


@dataclass
class _Entry:
    """One change: where, and what."""

    row: int
    pos: int
    index: int
    base: float
    factor: float
    order: int
    vector: Tensor | None = None


class _Table:
    """Collects the changes of all runs, then makes tensors of them."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.order = {d.site: read_rank(d) for d in recording.binding.dictionaries}
        self.features: dict[str, list[_Entry]] = {}
        self.errors: dict[str, list[_Entry]] = {}
        self.directions: dict[str, list[_Entry]] = {}

    def add_feature(self, row: int, site: str, pos: int, index: int, base: float, factor: float = 0.0) -> None:
        entry = _Entry(row, pos, index, base, factor, self.order[site])
        self.features.setdefault(site, []).append(entry)

    def add_error(self, row: int, hook: str, pos: int, vector: Tensor) -> None:
        # The error is known once everything it is the error of has been read.
        writers = [d for d in self.recording.binding.dictionaries if hook in d.hooks_out]
        order = max((read_rank(d) for d in writers), default=Place.MLP_READ.at(parse_hook(hook).layer))
        self.errors.setdefault(hook, []).append(_Entry(row, pos, -1, 0.0, 0.0, order, vector))

    def add_direction(self, row: int, hook: str, pos: int, vector: Tensor, base: float, factor: float = 0.0) -> None:
        point = parse_hook(hook)
        entry = _Entry(row, pos, -1, base, factor, _ORDER[point.suffix].at(point.layer), vector)
        self.directions.setdefault(hook, []).append(entry)

    def finish(self, n_rows: int) -> Edits:
        every = [e for kind in (self.features, self.errors, self.directions) for es in kind.values() for e in es]
        first: dict[int, int] = {}
        for entry in every:
            first[entry.row] = min(first.get(entry.row, entry.order), entry.order)
        device = self.recording.tokens.device
        like = next(iter(self.recording.inputs.values()), self.recording.logits)
        dtype = torch.promote_types(like.dtype, torch.float32)

        def longs(entries: Sequence[_Entry], name: str) -> Tensor:
            return torch.tensor([getattr(e, name) for e in entries], dtype=torch.long, device=device)

        def floats(entries: Sequence[_Entry], name: str) -> Tensor:
            return torch.tensor([getattr(e, name) for e in entries], dtype=dtype, device=device)

        def clean(entries: Sequence[_Entry]) -> Tensor:
            return torch.tensor([e.order == first[e.row] for e in entries], dtype=torch.bool, device=device)

        def features(es: Sequence[_Entry]) -> FeatureEdits:
            parts = longs(es, "row"), longs(es, "pos"), longs(es, "index"), floats(es, "base"), floats(es, "factor")
            return FeatureEdits(*parts, clean(es))

        def vectors(es: Sequence[_Entry]) -> VectorEdits:
            stacked = torch.stack([e.vector.to(device, dtype) for e in es if e.vector is not None])
            parts = longs(es, "row"), longs(es, "pos"), stacked, floats(es, "base"), floats(es, "factor")
            return VectorEdits(*parts, clean(es))

        return Edits(
            n_rows,
            {site: features(es) for site, es in self.features.items()},
            {hook: vectors(es) for hook, es in self.errors.items()},
            {hook: vectors(es) for hook, es in self.directions.items()},
        )


def pack(recording: Recording, runs: Sequence[Wanted]) -> Edits:
    """Return the changes of several runs of one prompt, a row each."""
    table = _Table(recording)
    for row, wanted in enumerate(runs):
        _prompt(table, row, wanted)
    return table.finish(len(runs))


def _prompt(table: _Table, row: int, wanted: Wanted) -> None:
    for site, changes in wanted.features.items():
        for (pos, index), value in changes.items():
            table.add_feature(row, site, pos, index, value)
    for hook, vectors in wanted.errors.items():
        for pos, vector in vectors.items():
            table.add_error(row, hook, pos, vector)
    for hook, found in wanted.directions.items():
        for (pos, _), (direction, value) in found.items():
            table.add_direction(row, hook, pos, direction.vector, value)


def pack_generation(recording: Recording, wanted: Wanted, positions: Iterable[int]) -> Edits:
    """Return the changes of one run whose text goes on beyond the recorded prompt.

    Args:
        recording: The clean run of the prompt.
        wanted: The changes.
        positions: Generated positions that the forward pass covers.
    """
    table = _Table(recording)
    _prompt(table, 0, wanted)
    for pos in positions:
        for change in wanted.open_changes.values():
            target = change.target
            if pos < change.start:
                continue
            if isinstance(target, Feature):
                site = recording.binding.dictionary(target.layer, target.site).site
                table.add_feature(0, site, pos, target.index, change.base, change.factor)
            else:
                hook = f"blocks.{target.layer}.{target.hook}"
                table.add_direction(0, hook, pos, target.vector, change.base, change.factor)
    return table.finish(1)


def single_features(recording: Recording, features: Sequence[Feature], values: Sequence[float]) -> Edits:
    """Return one run per feature, in which it alone gets its value; fast for thousands of them.

    The features must name their position by number and their site.
    """
    table = _Table(recording)
    for row, (feature, value) in enumerate(zip(features, values, strict=True)):
        site = recording.binding.dictionary(feature.layer, feature.site).site
        table.add_feature(row, site, int(feature.pos), feature.index, value)
    return table.finish(len(features))


def rows_of(edits: Edits, start: int, stop: int) -> Edits:
    """Return the changes of the runs ``start`` to ``stop - 1``, renumbered from 0."""
    kept = edits.where(lambda e: (e.row >= start) & (e.row < stop))

    def down(tables: dict[str, Any]) -> dict[str, Any]:
        return {name: replace(e, row=e.row - start) for name, e in tables.items()}

    return Edits(stop - start, down(kept.features), down(kept.errors), down(kept.directions))

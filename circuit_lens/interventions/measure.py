"""What ablating each of some features does on the live model, and what a graph's linear model says it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.dictionaries.binding import read_rank, write_rank
from circuit_lens.graph.nodes import Feature
from circuit_lens.interventions.edits import Edits, rows_of, single_features
from circuit_lens.interventions.engine import Changed, Hold
from circuit_lens.interventions.intervene import rows_at_once
from circuit_lens.interventions.readout import Readout
from circuit_lens.interventions.recording import Recording
from circuit_lens.protocols import Dictionary
from circuit_lens.running import plain_tensors

LIVE = Hold()


def linear_hold(n_layers: int, *, linear: frozenset[int] = frozenset()) -> Hold:
    """Hold all that a graph holds: its features react linearly, and so do the MLPs of the layers in ``linear``."""
    mlp = frozenset(range(n_layers))
    return Hold(attention=True, norms=True, mlp=mlp, skip=True, react=True, sites=True, linear=linear)


def parts(n_runs: int, recording: Recording) -> list[tuple[int, int]]:
    """Return the runs of each forward pass, as first and one past the last."""
    size = rows_at_once(recording)
    return [(start, min(start + size, n_runs)) for start in range(0, n_runs, size)]


@dataclass(frozen=True, eq=False)
class Active:
    """The features that are active on the clean run, in the order of :meth:`Recording.active`.

    Attributes:
        features: Where they are.
        layer, pos: Layer (of reading) and position.
        read, write: Where the feature reads, and where it writes first, in the order of computing.
        act, pre_act: On the clean run.
    """

    features: tuple[Feature, ...]
    layer: Int[np.ndarray, "n_active"]
    pos: Int[np.ndarray, "n_active"]
    read: Int[np.ndarray, "n_active"]
    write: Int[np.ndarray, "n_active"]
    act: Float[np.ndarray, "n_active"]
    pre_act: Float[np.ndarray, "n_active"]

    @classmethod
    def of(cls, recording: Recording) -> Active:
        """List the active features of a run."""
        features = tuple(recording.active())
        parts = [(recording.acts(d), recording.pre_acts(d)) for d in recording.binding.dictionaries]
        act = torch.cat([a[a != 0] for a, _ in parts]) if parts else recording.logits.new_zeros(0)
        pre = torch.cat([p[a != 0] for a, p in parts]) if parts else recording.logits.new_zeros(0)
        layer, pos = np.array([f.layer for f in features], int), np.array([int(f.pos) for f in features], int)
        ranks = {d.site: (read_rank(d), write_rank(d)) for d in recording.binding.dictionaries}
        read, write = (np.array([ranks[str(f.site)][i] for f in features], int) for i in (0, 1))
        return cls(features, layer, pos, read, write, act.double().cpu().numpy(), pre.double().cpu().numpy())

    @cached_property
    def column(self) -> dict[Feature, int]:
        """The place of each feature."""
        return {feature: i for i, feature in enumerate(self.features)}

    def downstream(self, sources: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n n_active"]:
        """Return which features can feel which sources: those that read later, at their position or behind it."""
        later = self.read[None, :] > self.write[sources][:, None]
        return later & (self.pos[None, :] >= self.pos[sources][:, None])


class Ablations:
    """Runs in which one feature each gets a new value.

    Args:
        recording: The clean run.
        active: Its active features.
        sources: Which of them are changed, one run each.
        new: Their new values.
        read: What is read off the logits.
    """

    def __init__(
        self,
        recording: Recording,
        active: Active,
        sources: Int[np.ndarray, "n"],
        new: Float[np.ndarray, "n"],
        read: Readout,
    ) -> None:
        self.recording, self.active, self.sources, self.new, self.read = recording, active, sources, new, read
        features = [active.features[i] for i in sources]
        self.edits: Edits = single_features(recording, features, new.tolist())
        with plain_tensors():
            self.clean = float(read.of(recording.logits.double()))

    @property
    def delta(self) -> Float[np.ndarray, "n"]:
        """Change of each source's activation."""
        return self.new - self.active.act[self.sources]

    def effects(self, hold: Hold) -> Float[np.ndarray, "n"]:
        """Return the change of what is read, per run."""
        found = [self._read(start, stop, hold, None) for start, stop in parts(len(self.sources), self.recording)]
        return np.concatenate(found) if found else np.zeros(0)

    def spread(self, hold: Hold) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n n_active"]]:
        """Return the change of what is read, and of the pre-activation of every active feature, per run."""
        masks = {d.site: self.recording.acts(d) != 0 for d in self.recording.binding.dictionaries}
        moved, logits = [], []
        for start, stop in parts(len(self.sources), self.recording):
            seen: dict[str, Tensor] = {}

            def reader(d: Dictionary, pre: Tensor, acts: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen[d.site] = pre[:, masks[d.site]]

            logits.append(self._read(start, stop, hold, reader))
            pre = torch.cat([seen[d.site] for d in self.recording.binding.dictionaries], 1)
            moved.append(pre.double().cpu().numpy() - self.active.pre_act)
        if not moved:
            return np.zeros(0), np.zeros((0, len(self.active.features)))
        return np.concatenate(logits), np.concatenate(moved)

    def _read(
        self, start: int, stop: int, hold: Hold, reader: Callable[[Dictionary, Tensor, Tensor], None] | None
    ) -> Float[np.ndarray, "n_part"]:
        changed = Changed(self.recording, rows_of(self.edits, start, stop), hold, reader=reader)
        logits = changed.run()
        with plain_tensors():
            return self.read.rows(logits).cpu().numpy() - self.clean

    def both(self, start: int, stop: int, holds: Sequence[Hold]) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Return pre-activations and activations of every feature, by site, of some runs under each hold."""
        found = []
        for hold in holds:
            seen: dict[str, tuple[Tensor, Tensor]] = {}

            def reader(d: Dictionary, pre: Tensor, acts: Tensor, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> None:
                seen[d.site] = (pre, acts)

            self._read(start, stop, hold, reader)
            found.append(seen)
        return found

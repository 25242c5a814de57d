"""How features react in a held model: linearly, by the slopes that a graph's paths have."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.interventions.edits import FeatureEdits
from circuit_lens.interventions.recording import Recording
from circuit_lens.protocols import Dictionary


class Reactor:
    """The linear reaction of one dictionary's features that are active on the clean run.

    A change of the pre-activation is one of the activation, times activation / pre-activation on the clean run: 1 for
    ReLU-like features, a frozen gate's value, and for neurons the slope of the chord from zero (what the graph's paths
    assume). Pre-activations are affine, so that their change is the encoder applied to the change of the input; a
    tangent dictionary's encoder is that of each position.
    """

    def __init__(self, recording: Recording, d: Dictionary) -> None:
        self.clean = recording.inputs[d.site]
        active = recording.acts(d) != 0
        self.index = active.any(0).nonzero()[:, 0]
        self.mask = active[:, self.index]
        act, pre = recording.acts(d)[:, self.index], recording.pre_acts(d)[:, self.index]
        self.slope = torch.where(self.mask & (pre != 0), act / torch.where(pre == 0, 1.0, pre), 0.0)
        self.dictionary = d
        dtype = self.clean.dtype
        self.encoder = None if d.tangent else d.encoder_rows(self.index, dtype)
        self.decoder = d.decoder_rows(self.index, dtype)
        self.place = torch.full((d.d_sae,), -1, dtype=torch.long, device=self.clean.device)
        self.place[self.index] = torch.arange(len(self.index), device=self.clean.device)

    def pre_acts(self, x: Float[Tensor, "n_rows n_pos d_in"]) -> Float[Tensor, "n_rows n_pos n_active"]:
        """Return the changes of pre-activations."""
        moved = x - self.clean.to(x)
        if self.encoder is not None:
            return moved @ self.encoder.to(x).T
        rows = [self._rows(pos, self.index).to(x) for pos in range(len(self.clean))]
        return torch.stack([moved[:, pos] @ rows[pos].T for pos in range(len(rows))], 1)

    def _rows(self, pos: int, index: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """Return a tangent dictionary's encoder rows at one position."""
        return self.dictionary.encoder_rows(index, self.clean.dtype, self.clean[pos].expand(len(index), -1))

    def acts(self, x: Float[Tensor, "n_rows n_pos d_in"]) -> Float[Tensor, "n_rows n_pos n_active"]:
        """Return the changes of activations."""
        return self.pre_acts(x) * self.slope.to(x)

    def output(self, x: Float[Tensor, "n_rows n_pos d_in"], output: int) -> Float[Tensor, "n_rows n_pos d_out"]:
        """Return the change of what the features write to one output."""
        return self.acts(x) @ self.decoder[:, output].to(x)

    def changes(self, x: Float[Tensor, "n_rows n_pos d_in"], e: FeatureEdits) -> Float[Tensor, "n"]:
        """Return the change of the edited features' activations."""
        place = self.place[e.index]
        if not len(self.index):
            return x.new_zeros(len(e.row))
        here = place.clamp_min(0)
        if self.encoder is None:
            found = self.acts(x)[e.row, e.pos, here]
        else:
            moved = x[e.row, e.pos] - self.clean[e.pos].to(x)
            found = (moved * self.encoder[here].to(x)).sum(-1) * self.slope[e.pos, here].to(x)
        return torch.where(place >= 0, found, 0.0)

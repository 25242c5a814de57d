"""Dictionaries that nobody trained, as large and as sparse as a given one: what chance alone would give.

A twin has the shapes of its dictionary. Its encoder rows w_j are random unit vectors, and its feature j is

    ``h_j(x) = w_j · (x - mean x)`` where that exceeds ``c · std(w_j · x)``, else 0,

with means and standard deviations over the evaluated tokens, and one number c for all features, chosen so that as many
features are active on these tokens as of the dictionary: the same mean L0. Its output at a hook is
``s · Σ_j h_j u_j + b``, with s and b the least-squares fit to what the dictionary should reconstruct there, one scalar
and one constant vector (for dictionaries that reconstruct a hook jointly: one of each for their sum). A skip path is
the dictionary's own, so that the difference is what the features are worth. The two kinds differ in u_j:

- ``"random"``: a random unit vector of its own. What that many arbitrary directions reach; also the start of this
  package's transcoder trainer, whose decoders are random.
- ``"untrained"``: w_j itself, the tied start of SAE trainers (Bricken et al. 2023; SAELens), at every hook that is
  written; a random unit vector where the dictionary reads and writes different widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from circuit_lens.evaluation.sums import total, wide
from circuit_lens.protocols import Dictionary

Kind = Literal["random", "untrained"]
KINDS: tuple[Kind, ...] = ("random", "untrained")
# Standardised pre-activations are counted in bins: so wide, from here to there.
_BIN, _LOW, _HIGH = 2.0**-13, -16.0, 48.0
_N_BINS = int((_HIGH - _LOW) / _BIN)
_AT_ONCE = 2**23


class Encoder:
    """The encoder that the twins of one dictionary share.

    Attributes:
        W: Its rows, as columns.
        mean, std: Of each feature's product with what is read.
        cut: c; see the module.
    """

    def __init__(self, d_in: int, d_sae: int, rng: torch.Generator, like: Tensor) -> None:
        self.W = _unit_rows(d_sae, d_in, rng).T.to(like)
        self.mean = self.std = torch.zeros(d_sae, dtype=like.dtype, device=like.device)
        self.cut = 0.0
        self._n, self._sum, self._square = 0, torch.zeros(d_sae), torch.zeros(d_sae)
        self._counts = torch.zeros(_N_BINS, dtype=torch.long)

    def observe(self, x: Float[Tensor, "n d_in"]) -> None:
        """Take note of what is read, for means and standard deviations."""
        pre = x @ self.W.to(x)
        self._n += len(x)
        self._sum = self._sum + total(pre)
        self._square = self._square + total(pre.square())

    def standardise(self) -> None:
        """Take means and standard deviations of what was observed."""
        mean = self._sum / self._n
        variance = (self._square / self._n - mean.square()).clamp_min(0.0)
        self.mean, self.std = mean.to(self.W), variance.sqrt().to(self.W)

    def count(self, x: Float[Tensor, "n d_in"]) -> None:
        """Count standardised pre-activations by their size."""
        z = (x @ self.W.to(x) - self.mean.to(x)) / self.std.to(x).clamp_min(torch.finfo(x.dtype).tiny)
        for part in z.flatten().split(_AT_ONCE):
            bins = ((part - _LOW) / _BIN).clamp(0, _N_BINS - 1).long()
            self._counts += torch.bincount(bins, minlength=_N_BINS).cpu()

    def choose(self, n_active: int) -> None:
        """Set the cut so that as close to ``n_active`` activations as the bins allow exceed it."""
        above = self._counts.flip(0).cumsum(0)  # so many in the upper 1, 2, ... bins
        gaps = torch.cat([torch.zeros(1, dtype=torch.long), above]) - n_active
        self.cut = _HIGH - _BIN * int(gaps.abs().argmin())
        if n_active == 0:
            self.cut = float("inf")

    def acts(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return activations of pre-activations (which are centred)."""
        return pre_acts * (pre_acts >= self.cut * self.std.to(pre_acts).clamp_min(torch.finfo(pre_acts.dtype).tiny))


class Twin:
    """A dictionary that nobody trained; see the module.

    Args:
        dictionary: What it is the twin of.
        name: Its kind.
        encoder: Shared by the twins of a dictionary.
        rows: Its decoder's unit rows, per output.
    """

    def __init__(
        self, dictionary: Dictionary, name: Kind, encoder: Encoder, rows: Float[Tensor, "n_out d_sae d_out"]
    ) -> None:
        d = self.original = dictionary
        self.site, self.joint, self.layer, self.tangent = d.site, d.joint, d.layer, False
        self.hook_in, self.hooks_out, self.out_layers = d.hook_in, d.hooks_out, d.out_layers
        self.d_in, self.d_out, self.d_sae, self.kind = d.d_in, d.d_out, d.d_sae, name
        self.encoder, self.rows = encoder, rows
        self.scale = torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
        self.b_dec = torch.zeros(len(rows), d.d_out, dtype=rows.dtype, device=rows.device)

    def __repr__(self) -> str:
        return f"{self.kind} twin of {self.original}"

    @property
    def has_skip(self) -> bool:
        """Whether its dictionary has a skip path."""
        return self.original.has_skip

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return centred products with the encoder's rows."""
        return x @ self.encoder.W.to(x) - self.encoder.mean.to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return what exceeds the thresholds."""
        return self.encoder.acts(pre_acts)

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return encoder rows."""
        return self.encoder.W[:, index].T.to(dtype)

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return what centres."""
        return -self.encoder.mean[index].to(dtype)

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return decoder rows, scaled."""
        return (self.rows[:, index] * self.scale[:, None, None]).transpose(0, 1).to(dtype)

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return the constants."""
        return self.b_dec.to(dtype)

    def unscaled(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return Σ_j h_j u_j for every output."""
        return torch.stack([acts @ rows.to(acts) for rows in self.rows], -2)

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return the reconstruction, skip path excluded."""
        return self.unscaled(acts) * self.scale.to(acts)[:, None] + self.b_dec.to(acts)

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the dictionary's own skip path."""
        return self.original.skip(x)

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None:
        """Return the dictionary's own skip path."""
        return self.original.skip_matrix(dtype)

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return the pre-activation above which each feature is active."""
        return self.encoder.cut * self.encoder.std

    def fingerprint(self) -> str:
        """Return whose twin it is."""
        return f"{self.kind} {self.original.fingerprint()}"


def make_twins(
    dictionaries: Sequence[Dictionary], like: Tensor, *, seed: int
) -> tuple[list[Encoder], dict[str, list[Twin]]]:
    """Return the twins of dictionaries, by kind, and the encoders they share; thresholds and scales are still to fit.

    Args:
        dictionaries: What to make twins of.
        like: A tensor of the device and dtype of their weights.
        seed: Of everything random; the global random state is not touched.
    """
    encoders: list[Encoder] = []
    twins: dict[str, list[Twin]] = {"random": [], "untrained": []}
    for i, d in enumerate(dictionaries):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i)
        encoder, n_out = Encoder(d.d_in, d.d_sae, rng, like), len(d.hooks_out)
        random = torch.stack([_unit_rows(d.d_sae, d.d_out, rng).to(like) for _ in range(n_out)])
        tied = encoder.W.T.expand(n_out, -1, -1) if d.d_in == d.d_out else random
        encoders.append(encoder)
        twins["random"].append(Twin(d, "random", encoder, random))
        twins["untrained"].append(Twin(d, "untrained", encoder, tied))
    return encoders, twins


def _unit_rows(n: int, width: int, rng: torch.Generator) -> Float[Tensor, "n width"]:
    return normalize(torch.randn(n, width, generator=rng, dtype=torch.float32), dim=-1)


class ScaleSums:
    """The least-squares fit of one scalar and one constant: target ≈ s · r + b."""

    def __init__(self) -> None:
        self.n, self.square, self.product = 0, 0.0, 0.0
        self.r: Tensor | float = 0.0
        self.target: Tensor | float = 0.0

    def add(self, r: Float[Tensor, "n width"], target: Float[Tensor, "n width"]) -> None:
        """Take what is to be scaled, and what it should be."""
        self.n += len(r)
        self.r, self.target = self.r + total(r), self.target + total(target)
        self.square += float(wide(r).square().sum())
        self.product += float((wide(r) * wide(target)).sum())

    def solve(self) -> tuple[float, Float[Tensor, "width"]]:
        """Return s and b; s is 0 where r does not vary."""
        r, target = torch.as_tensor(self.r), torch.as_tensor(self.target)
        spread = self.square - float(r @ r) / self.n
        scale = (self.product - float(r @ target) / self.n) / spread if spread > 1e-12 * self.square else 0.0
        return scale, (target - scale * r) / self.n

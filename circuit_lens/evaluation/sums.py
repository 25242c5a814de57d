"""Sums over tokens and rows, in float64, whose size does not depend on how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.graph.statistics import FEWEST

NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean over rows and its standard error, NaN where there are too few rows to tell."""

    value: float
    error: float = NAN

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, spec: str) -> str:
        """Format value and error alike, with three decimals if nothing is said."""
        spec = spec or ".3f"
        error = f" ± {format(self.error, spec.lstrip('+'))}" if math.isfinite(self.error) else ""
        return format(self.value, spec) + error


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float64, or in float32 on a device that has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def total(x: Float[Tensor, "n width"]) -> Float[Tensor, "width"]:
    """Return the sum of rows, in float64 on the CPU."""
    return wide(x).sum(0).to("cpu", torch.float64)


class Moments:
    """Number, sum and sum of squared lengths of vectors.

    Attributes:
        n: How many.
        sum: Their sum.
        square: Sum of their squared lengths.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sum: Tensor | float = 0.0
        self.square = 0.0

    def add(self, y: Float[Tensor, "n width"]) -> None:
        """Take vectors."""
        self.n += len(y)
        self.sum = self.sum + total(y)
        self.square += float(wide(y).square().sum())

    @property
    def mean(self) -> Float[Tensor, "width"]:
        """Their mean."""
        return torch.as_tensor(self.sum) / self.n

    @property
    def spread(self) -> float:
        """Sum of squared distances from the mean."""
        return self.square - float(torch.as_tensor(self.sum).square().sum()) / self.n


class FitSums:
    """How far reconstructions are from what they should be."""

    def __init__(self) -> None:
        self.n, self.error, self.cosine = 0, 0.0, 0.0

    def add(self, y: Float[Tensor, "n width"], y_hat: Float[Tensor, "n width"]) -> None:
        """Take outputs and their reconstructions."""
        y, y_hat = wide(y), wide(y_hat)
        self.n += len(y)
        self.error += float((y - y_hat).square().sum())
        lengths = (y.norm(dim=1) * y_hat.norm(dim=1)).clamp_min(1e-300 if y.dtype == torch.float64 else 1e-30)
        self.cosine += float(((y * y_hat).sum(1) / lengths).sum())


class FiringSums:
    """How often each feature is active."""

    def __init__(self) -> None:
        self.n = 0
        self.counts: Tensor | int = 0

    def add(self, acts: Float[Tensor, "n d_sae"]) -> None:
        """Take activations."""
        self.n += len(acts)
        self.counts = self.counts + (acts != 0).sum(0).cpu()

    @property
    def fired(self) -> Int[Tensor, "d_sae"]:
        """On how many tokens each feature was active."""
        return torch.as_tensor(self.counts)


class RowSums:
    """Losses of several runs, summed by row, with what the standard errors of their ratios need.

    Every figure is a ratio of linear forms of row totals, a·T / b·T. Its standard error is that of the linearised ratio
    with rows as independent draws: with g = (a - (a·T/b·T) b) / b·T and v_r the sums of row r, the square root of
    R/(R-1) Σ_r (g·v_r)² (the delta method; Cochran, Sampling Techniques, section 6.4). Only T and Σ v_r v_rᵀ are kept.

    Args:
        names: Of the sums.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.index = {name: i for i, name in enumerate(names)}
        self.n_rows = 0
        self.totals = torch.zeros(len(names), dtype=torch.float64)
        self.products = torch.zeros(len(names), len(names), dtype=torch.float64)

    def add(self, sums: Float[Tensor, "row n_names"]) -> None:
        """Take rows; those without predictions (first sum) say nothing."""
        sums = sums[sums[:, 0] > 0]
        self.n_rows += len(sums)
        self.totals += sums.sum(0)
        self.products += sums.T @ sums

    def _form(self, form: dict[str, float]) -> Float[Tensor, "n_names"]:
        vector = torch.zeros_like(self.totals)
        for name, factor in form.items():
            vector[self.index[name]] += factor
        return vector

    def ratio(self, above: dict[str, float], below: dict[str, float]) -> Estimate:
        """Return the ratio of two linear forms; NaN where the lower one is nothing beside its own spread."""
        a, b = self._form(above), self._form(below)
        top, bottom = float(a @ self.totals), float(b @ self.totals)
        if abs(bottom) <= 1e-12 * float((b.abs() * self.products.diagonal().sqrt()).sum()) or bottom == 0.0:
            return Estimate(NAN)
        gradient = (a - top / bottom * b) / bottom
        if self.n_rows < FEWEST:
            return Estimate(top / bottom)
        variance = self.n_rows / (self.n_rows - 1) * float(gradient @ self.products @ gradient)
        return Estimate(top / bottom, math.sqrt(max(variance, 0.0)))


def log_probabilities(
    logits: Float[Tensor, "batch pos d_vocab"], predicting: Bool[Tensor, "batch before"]
) -> list[Float[Tensor, "_n d_vocab"]]:
    """Return, row by row, the log probabilities at the positions whose prediction counts; float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return [row[:-1][at].log_softmax(-1) for row, at in zip(logits, predicting, strict=True)]


def cross_entropies(
    log_probs: Sequence[Float[Tensor, "_n d_vocab"]],
    tokens: Int[Tensor, "batch pos"],
    predicting: Bool[Tensor, "batch before"],
) -> Float[Tensor, "batch"]:
    """Return each row's sum of cross-entropies, in nats."""
    found = [
        -wide(row.gather(1, targets[1:][at][:, None])).sum()
        for row, targets, at in zip(log_probs, tokens, predicting, strict=True)
    ]
    return torch.stack(found).to("cpu", torch.float64)


def divergences(
    clean: Sequence[Float[Tensor, "_n d_vocab"]], changed: Sequence[Float[Tensor, "_n d_vocab"]]
) -> Float[Tensor, "batch"]:
    """Return each row's sum of KL(clean ‖ changed), in nats."""
    found = [wide((p.exp() * (p - q)).sum(-1)).sum() for p, q in zip(clean, changed, strict=True)]
    return torch.stack(found).to("cpu", torch.float64)

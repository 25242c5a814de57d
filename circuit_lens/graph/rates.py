"""Shares and means with their intervals, as studies and patchscopes print them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 1000
_Z = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True, slots=True)
class Rate:
    """``right`` of ``asked``, with the 95 % interval of Wilson (1927).

    >>> str(Rate(58, 60))
    '0.97 [0.89, 0.99] 58/60'
    """

    right: int
    asked: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        """Count hits."""
        listed = [bool(hit) for hit in hits]
        return cls(sum(listed), len(listed))

    @property
    def share(self) -> float:
        """Between 0 and 1; NaN when nothing was asked."""
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The lower and upper end."""
        if not self.asked:
            return math.nan, math.nan
        n, p, z2 = self.asked, self.share, _Z * _Z
        middle, half = p + z2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))

    def __str__(self) -> str:
        if not self.asked:
            return "none asked"
        low, high = self.interval
        return f"{self.share:.2f} [{low:.2f}, {high:.2f}] {self.right}/{self.asked}"

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-able data."""
        low, high = self.interval
        return {"share": finite(self.share), "low": finite(low), "high": finite(high),
                "right": self.right, "n": self.asked}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of ``n`` values with its 95 % percentile bootstrap interval.

    >>> str(Mean(0.5, 0.4, 0.6, 10))
    '0.50 [0.40, 0.60] n=10'
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, seed: int = 0) -> Mean:
        """Return the mean of the finite values; the interval is from 1000 seeded resamples."""
        kept = np.array([value for value in values if math.isfinite(value)], dtype=float)
        if len(kept) < 2:
            return cls(float(kept[0]) if len(kept) else math.nan, math.nan, math.nan, len(kept))
        drawn = np.random.default_rng(seed).integers(0, len(kept), (SAMPLES, len(kept)))
        low, high = np.quantile(kept[drawn].mean(1), [0.025, 0.975])
        return cls(float(kept.mean()), float(low), float(high), len(kept))

    def __str__(self) -> str:
        if not self.n:
            return "undefined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] n={self.n}"

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-able data."""
        return {"mean": finite(self.value), "low": finite(self.low), "high": finite(self.high), "n": self.n}


def finite(value: float) -> float | None:
    """Return a number as JSON can say it: None for NaN and infinity."""
    return value if math.isfinite(value) else None

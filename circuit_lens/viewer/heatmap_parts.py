"""What the pictures of a heat map share: colours, numbers, texts that are cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import matplotlib as mpl
from matplotlib.colors import to_hex

Measured = Callable[[str], float]
_COLOURS = "viridis"
_LIGHT, _DARK = "#ffffff", "#000000"


def shade(share: float, bright: Literal["high", "low"] = "high") -> tuple[str, str]:
    """Return the colour at a share of the scale, and one that is read on it (by relative luminance, WCAG 2)."""
    red, green, blue, _ = mpl.colormaps[_COLOURS](share if bright == "high" else 1.0 - share)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex((red, green, blue)), _LIGHT if luminance < 0.18 else _DARK


def number(value: float) -> str:
    """Return a number with three digits that count, and at most three behind the point.

    >>> [number(x) for x in (0.0, 0.12345, 12.345, 1234.5, 1.0, -0.0001)]
    ['0', '0.123', '12.3', '1234', '1', '0']
    """
    digits = max(0, min(3, 2 - math.floor(math.log10(abs(value))))) if value else 0
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def cut(text: str, limit: float, width: Measured = len) -> str:
    """Return a text that is not wider than a limit; an ellipsis stands for what is left out.

    >>> cut("city in Texas", 8.0), cut("Texas", 8.0), cut("Texas", 0.5)
    ('city in…', 'Texas', '')
    """
    if width(text) <= limit:
        return text
    kept = text
    while kept and width(kept.rstrip() + "…") > limit:
        kept = kept[:-1]
    return kept.rstrip() + "…" if kept or width("…") <= limit else ""

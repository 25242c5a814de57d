"""Arguments as users give them: whole numbers of any library's kind, one or several, and models."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsIndex

from circuit_lens.errors import PatchscopeError
from circuit_lens.protocols import HookedModel

Indices = SupportsIndex | Sequence[SupportsIndex]
"""A whole number or several, of Python, NumPy or torch."""
Places = SupportsIndex | str | Sequence[SupportsIndex | str]
"""A position or several, as whole numbers or as the texts of tokens."""


def whole(value: Any, what: str) -> int:
    """Return a whole number, given as whatever Python can index with (an int, a NumPy or torch integer).

    >>> whole(3, "layer")
    3

    Raises:
        PatchscopeError: Something else, such as a float or a text.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise PatchscopeError(f"{what}={value!r:.80} is not valid; give a whole number") from error


def several(given: Any, what: str) -> list[int]:
    """Return one whole number or several as a list.

    >>> several(3, "layers"), several(range(2), "layers")
    ([3], [0, 1])

    Raises:
        PatchscopeError: Something else.
    """
    return [whole(one, what) for one in _listed(given, what, "a whole number, or a list of them")]


def numbers(given: Any, what: str) -> list[float]:
    """Return one number or several as a list.

    >>> numbers(2, "scales"), numbers((1, 0.5), "scales")
    ([2.0], [1.0, 0.5])

    Raises:
        PatchscopeError: Something else.
    """
    values: Any = [given] if isinstance(given, Real) or getattr(given, "ndim", 1) == 0 else given
    if not isinstance(given, str):
        try:
            return [float(value) for value in values]
        except (TypeError, ValueError):
            pass
    raise PatchscopeError(f"{what}={given!r:.80} is not valid; give a number, or a list of numbers")


def places(given: Any, what: str) -> list[int | str]:
    """Return one position or several as a list: whole numbers, or the texts of tokens.

    >>> places("x", "at"), places(("x", 3), "at")
    (['x'], ['x', 3])

    Raises:
        PatchscopeError: Something else.
    """
    listed = _listed(given, what, "a position, the text of a token, or a list of them")
    return [one if isinstance(one, str) else whole(one, what) for one in listed]


def _listed(given: Any, what: str, valid: str) -> list[Any]:
    if isinstance(given, str):
        return [given]
    try:
        return [operator.index(given)]
    except TypeError:
        pass
    try:
        return list(given)
    except TypeError as error:
        raise PatchscopeError(f"{what}={given!r:.80} is not valid; give {valid}") from error


def require_model(model: Any, name: str = "model") -> HookedModel:
    """Return a model that can be run with hooks.

    Raises:
        PatchscopeError: Something else.
    """
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise PatchscopeError(
            f"{name}={model!r:.80} is no hooked model; give a HookedTransformer or a TransformerBridge (of a "
            "ReplacementModel: rm.model)"
        )
    return model


def require_memory(memory: Any) -> None:
    """Fail unless this is a number of gigabytes.

    Raises:
        PatchscopeError: No number, or one that is not above 0.
    """
    if not isinstance(memory, Real) or not float(memory) > 0:
        raise PatchscopeError(f"memory={memory!r:.80} is not valid; give gigabytes above 0")

"""Weights that are no numbers are refused before anything is computed with them."""

from __future__ import annotations

import torch
from torch import Tensor

from circuit_lens.errors import DictionaryError


def refuse_bad_numbers(name: str, tensor: Tensor) -> None:
    """Raise DictionaryError if weights are no floats, or hold NaN or infinity.

    Raises:
        DictionaryError: as said.
    """
    if not tensor.dtype.is_floating_point:
        raise DictionaryError(f"{name} has dtype {tensor.dtype}; weights must be floats")
    if tensor.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
        raise DictionaryError(f"{name} holds NaN or infinity: the file is damaged or the training diverged")

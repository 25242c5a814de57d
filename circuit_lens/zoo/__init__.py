"""Bundled models, their dictionaries and what is known about their features: small, trained, offline.

The names below are found on first use: importing this package loads none of torch, transformer_lens and sae_lens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.loading import (
        dictionary_sets,
        load_dictionaries,
        load_features,
        load_model,
        model_names,
        names,
    )

__all__ = [
    "Corpus",
    "dictionary_sets",
    "load",
    "load_dictionaries",
    "load_features",
    "load_model",
    "model_names",
    "names",
]

_HOMES = {
    "Corpus": "circuit_lens.zoo.corpus",
    "dictionary_sets": "circuit_lens.zoo.loading",
    "load_dictionaries": "circuit_lens.zoo.loading",
    "load_features": "circuit_lens.zoo.loading",
    "load_model": "circuit_lens.zoo.loading",
    "model_names": "circuit_lens.zoo.loading",
    "names": "circuit_lens.zoo.loading",
}


def load(
    name: str = "capitals",
    dictionaries: str | Sequence[str] = "plt",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ReplacementModel:
    """Return a bundled model with one of its dictionary sets, and labels of their features; offline.

    Args:
        name: One of ``names()``.
        dictionaries: ``"plt"`` (per-layer transcoders), ``"clt"`` (a cross-layer transcoder), ``"skip"`` (skip
            transcoders), ``"sae"`` (SAEs of the residual stream), ``"neurons"`` (the model's own); further ones in
            ``circuit_lens.zoo.loading.load_dictionaries``. Several, where they do not stand for the same activations.
        device: Where to.
        dtype: None: float32.

    Raises:
        ValueError: An unknown name or set, with the valid ones.
    """
    import torch

    from circuit_lens.zoo.loading import load_pair

    return load_pair(name, dictionaries, device=device, dtype=dtype or torch.float32)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

"""Bundled models, their dictionaries and what is known about their features: small, trained, offline.

The names below are found on first use: importing this package loads none of torch, transformer_lens and sae_lens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.loading import load_dictionaries, load_features, load_model, names

__all__ = ["Corpus", "load", "load_dictionaries", "load_features", "load_model", "names"]

_HOMES = {
    "Corpus": "circuit_lens.zoo.corpus",
    "load_dictionaries": "circuit_lens.zoo.loading",
    "load_features": "circuit_lens.zoo.loading",
    "load_model": "circuit_lens.zoo.loading",
    "names": "circuit_lens.zoo.loading",
}


def load(name: str = "capitals") -> ReplacementModel:
    """Return a bundled model with its dictionaries and the labels of their features; offline, float32, on the CPU.

    Raises ``ValueError`` for an unknown name, with the valid ones.
    """
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.loading import load_dictionaries, load_features, load_model

    return ReplacementModel(load_model(name), load_dictionaries(name), label=load_features(name).label)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

"""Training of dictionaries with SAELens' own trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens.training.activations import MlpActivations, mlp_activations
    from circuit_lens.training.transcoder import TranscoderSettings, train_transcoder

__all__ = ["MlpActivations", "TranscoderSettings", "mlp_activations", "train_transcoder"]

_HOMES = {
    "MlpActivations": "circuit_lens.training.activations",
    "mlp_activations": "circuit_lens.training.activations",
    "TranscoderSettings": "circuit_lens.training.transcoder",
    "train_transcoder": "circuit_lens.training.transcoder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

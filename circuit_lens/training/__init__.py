"""Training of dictionaries on activations of any hooked model, with SAELens' own trainer.

The names below are found on first use: importing this package loads none of torch and sae_lens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens.training.activations import MlpActivations, mlp_activations
    from circuit_lens.training.checkpoint import TrainingError
    from circuit_lens.training.cross_layer import train_cross_layer
    from circuit_lens.training.cross_layer_data import ActivationSource
    from circuit_lens.training.cross_layer_network import CrossLayerSettings
    from circuit_lens.training.data import ActivationStore
    from circuit_lens.training.data_collect import collect_activations
    from circuit_lens.training.data_figures import DictionaryFit, measure_cross_layer, measure_fit
    from circuit_lens.training.data_text import TokenRows, token_rows
    from circuit_lens.training.sae import SaeSettings, train_sae
    from circuit_lens.training.transcoder import TranscoderSettings, train_transcoder

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "CrossLayerSettings",
    "DictionaryFit",
    "MlpActivations",
    "SaeSettings",
    "TokenRows",
    "TrainingError",
    "TranscoderSettings",
    "collect_activations",
    "measure_cross_layer",
    "measure_fit",
    "mlp_activations",
    "token_rows",
    "train_cross_layer",
    "train_sae",
    "train_transcoder",
]

_HOMES = {
    "ActivationSource": "circuit_lens.training.cross_layer_data",
    "ActivationStore": "circuit_lens.training.data",
    "CrossLayerSettings": "circuit_lens.training.cross_layer_network",
    "DictionaryFit": "circuit_lens.training.data_figures",
    "MlpActivations": "circuit_lens.training.activations",
    "SaeSettings": "circuit_lens.training.sae",
    "TokenRows": "circuit_lens.training.data_text",
    "TrainingError": "circuit_lens.training.checkpoint",
    "TranscoderSettings": "circuit_lens.training.transcoder",
    "collect_activations": "circuit_lens.training.data_collect",
    "measure_cross_layer": "circuit_lens.training.data_figures",
    "measure_fit": "circuit_lens.training.data_figures",
    "mlp_activations": "circuit_lens.training.activations",
    "token_rows": "circuit_lens.training.data_text",
    "train_cross_layer": "circuit_lens.training.cross_layer",
    "train_sae": "circuit_lens.training.sae",
    "train_transcoder": "circuit_lens.training.transcoder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

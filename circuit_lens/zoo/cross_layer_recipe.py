"""How the cross-layer transcoder of a bundled model is made and measured, from seeds.

work/training/<name>-<seed>-<n>-clt/         checkpoint and log while it is trained
work/dictionaries/<name>-<seed>-<n>-clt/     the transcoder as it ships, in float16
work/figures/<name>-<seed>-<n>-clt.json      its figures on text, measured on what ships

What is there already is kept.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.loading import load_dictionaries_from, load_model_from
from circuit_lens.zoo.recipe import DICTIONARY_TEXT, DICTIONARY_TOKENS, FIGURES_TEXT, FIGURES_TOKENS, Workshop

if TYPE_CHECKING:
    from circuit_lens.training.cross_layer_network import CrossLayerSettings

CLT, CLT_SEED = "clt", 0
"""Name of the set, and dictionary seed of the one in the package."""


def cross_layer_settings() -> CrossLayerSettings:
    """The settings of every bundled cross-layer transcoder."""
    from circuit_lens.training.cross_layer_network import CrossLayerSettings

    return CrossLayerSettings(d_sae=640, k=7.7, per_layer=True, steps=2000)


def _key(name: str, seed: int, dictionary_seed: int) -> str:
    return f"{name}-{seed}-{dictionary_seed}-{CLT}"


def make_cross_layer(workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int = CLT_SEED) -> Path:
    """Train and keep one cross-layer transcoder; a training that was interrupted goes on where it was."""
    from circuit_lens.training.activations import mlp_activations
    from circuit_lens.training.cross_layer import train_cross_layer

    key = _key(name, seed, dictionary_seed)
    folder = workshop.work / "dictionaries" / key
    if folder.exists():
        return folder
    model = load_model_from(workshop.model_folder(name, seed))
    text = workshop.text(corpus, DICTIONARY_TOKENS, DICTIONARY_TEXT + dictionary_seed)
    data = mlp_activations(model, text.rows.tokens, text.rows.real)
    training, started = workshop.work / "training" / key, time.perf_counter()
    transcoder = train_cross_layer(
        data,
        settings=cross_layer_settings(),
        seed=dictionary_seed,
        folder=training,
        log=training / "log.jsonl",
        progress=False,
        metadata={"model_name": name, "model_seed": seed, "dictionary_seed": dictionary_seed},
    )
    transcoder.to(torch.float16).save(folder)
    workshop.say(f"{name} seed {seed}: cross-layer transcoder {dictionary_seed}, {time.perf_counter() - started:.0f} s")
    return folder


def measure_cross_layer(
    workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int = CLT_SEED
) -> dict[str, Any]:
    """Its figures, as JSON data, on the text that the transcoders' figures are measured on."""
    from circuit_lens.dictionaries.binding import bind
    from circuit_lens.zoo.set_figures import ReplacementFigures, replacement_figures

    def measure() -> ReplacementFigures:
        model = load_model_from(workshop.model_folder(name, seed))
        dictionaries = load_dictionaries_from(make_cross_layer(workshop, corpus, name, seed, dictionary_seed))
        text = workshop.text(corpus, FIGURES_TOKENS, FIGURES_TEXT)
        return replacement_figures(bind(model, dictionaries), text.rows.tokens, text.rows.real)

    return workshop.figures(_key(name, seed, dictionary_seed), measure)

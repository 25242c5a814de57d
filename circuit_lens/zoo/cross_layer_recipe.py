"""How the cross-layer transcoders of the bundled models are made and measured, from seeds, beside `recipe.py`.

work/training/<name>-<seed>-<n>-clt/         checkpoint and log while it is trained
work/dictionaries/<name>-<seed>-<n>-clt/     the transcoder as it ships, in float16
work/figures/<name>-<seed>-<n>-clt.json      its figures, measured on what ships

What is there already is kept. ``python -m circuit_lens.zoo.cross_layer_recipe --work DIR`` makes those of the shipped
model; the model itself is taken from the work folder, or from the package where the work folder has none.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.evaluate import DALLAS_PROMPT
from circuit_lens.zoo.loading import load_model, load_model_from
from circuit_lens.zoo.recipe import CAPITALS, DICTIONARY_TEXT, DICTIONARY_TOKENS, FIGURES_TEXT, FIGURES_TOKENS, Workshop

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
    from circuit_lens.graph.graph import AttributionGraph
    from circuit_lens.training.cross_layer_figures import ReplacementFigures
    from circuit_lens.training.cross_layer_network import CrossLayerSettings

SHIPPED = (CAPITALS, 1, 0)
"""Model, model seed, dictionary seed of the cross-layer transcoder in the package."""


def cross_layer_settings() -> CrossLayerSettings:
    """The settings of every bundled cross-layer transcoder."""
    from circuit_lens.training.cross_layer_network import CrossLayerSettings

    return CrossLayerSettings(d_sae=640, k=7.7, per_layer=True, steps=2000)


@dataclass(frozen=True, slots=True)
class PathLengths:
    """How many features a path from a token to an answer passes on average, in one graph.

    ``influence`` weighs a path by the product of its normalised |edges|, as influence does (Ameisen et al. 2025,
    Circuit Tracing, appendix on graph pruning); ``effect`` by the size of the linear effect that runs along it.
    """

    prompt: str
    influence: float
    effect: float


@dataclass(frozen=True, slots=True)
class CrossLayerFigures:
    """What is measured of a cross-layer transcoder: on held-out text, and its paths on the Dallas prompt."""

    replacement: ReplacementFigures
    paths: PathLengths


def path_lengths(graph: AttributionGraph, prompt: str) -> PathLengths:
    """Both mean path lengths of a graph."""
    return PathLengths(prompt, graph.path_length(), graph.path_length(by="effect"))


def model_of(workshop: Workshop, name: str, seed: int) -> HookedTransformer:
    """The trained model of the work folder, or the bundled one if that is the one asked for.

    Raises:
        FileNotFoundError: The work folder has no such model, and the package has another seed.
    """
    folder = workshop.model_folder(name, seed)
    if folder.exists():
        return load_model_from(folder)
    if (name, seed) != SHIPPED[:2]:
        raise FileNotFoundError(f"{folder} does not exist; python -m circuit_lens.zoo --work {workshop.work} makes it")
    return load_model(name)


def make_cross_layer(workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> Path:
    """Train and keep one cross-layer transcoder; a training that was interrupted goes on where it was."""
    from circuit_lens.training.activations import mlp_activations
    from circuit_lens.training.cross_layer import train_cross_layer

    key = f"{name}-{seed}-{dictionary_seed}-clt"
    folder = workshop.work / "dictionaries" / key
    if folder.exists():
        return folder
    model = model_of(workshop, name, seed)
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


def load_cross_layer(folder: Path) -> CrossLayerTranscoder:
    """A cross-layer transcoder of `make_cross_layer`, in float32."""
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    return CrossLayerTranscoder.load(folder, dtype=torch.float32)


def measure_cross_layer(
    workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int
) -> CrossLayerFigures:
    """The figures of one cross-layer transcoder on the text that the transcoders' figures are measured on."""
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.training.cross_layer_figures import replacement_figures

    model = model_of(workshop, name, seed)
    transcoder = load_cross_layer(workshop.work / "dictionaries" / f"{name}-{seed}-{dictionary_seed}-clt")
    text = workshop.text(corpus, FIGURES_TOKENS, FIGURES_TEXT)
    graph = ReplacementModel(model, [transcoder]).attribute(DALLAS_PROMPT)
    return CrossLayerFigures(
        replacement_figures(model, transcoder.dictionaries, text.rows.tokens, text.rows.real),
        path_lengths(graph, DALLAS_PROMPT),
    )


def make_and_measure(workshop: Workshop, name: str, seed: int, dictionary_seed: int) -> dict:
    """Train, measure, and return the figures as JSON data."""
    corpus = Corpus()
    make_cross_layer(workshop, corpus, name, seed, dictionary_seed)
    return workshop.figures(
        f"{name}-{seed}-{dictionary_seed}-clt",
        lambda: measure_cross_layer(workshop, corpus, name, seed, dictionary_seed),
    )


def main() -> None:
    """Make the cross-layer transcoder of the shipped model and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m circuit_lens.zoo.cross_layer_recipe", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="folder for what is being made")
    parser.add_argument("--model-seed", type=int, default=SHIPPED[1])
    parser.add_argument("--seed", type=int, default=SHIPPED[2], help="seed of the transcoder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = make_and_measure(Workshop(arguments.work), CAPITALS, arguments.model_seed, arguments.seed)
    layers, paths = found["replacement"]["layers"], found["paths"]
    for figure in ("explained_variance", "l0", "dead"):
        print(figure, *(f"{layer[figure]:.3f}" for layer in layers))
    for figure in ("loss", "loss_replaced", "loss_zeroed"):
        print(figure, f"{found['replacement'][figure]:.4f}")
    print(f"features on a path: {paths['influence']:.3f} by influence, {paths['effect']:.3f} by effect")


if __name__ == "__main__":
    main()

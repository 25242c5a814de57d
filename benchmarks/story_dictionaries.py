"""Dictionaries of a real small model: per-layer transcoders and a cross-layer transcoder of stories260K.

    CIRCUIT_LENS_DATA=DATA python -m benchmarks.story_dictionaries --work DIR [--steps 2000] [--k 16] [--features 512]

Trains both on 900 of the 1,000 TinyStories texts in ``DATA`` and measures them on the other 100 (the last in the file):
explained variance, active features and dead share per layer, and the loss with every MLP replaced against the model's
own and against MLPs that write zeros. Dictionaries, the checkpoint and the log lie below ``DIR``; what is there is not
trained again, and a cross-layer training that was interrupted goes on. Writes ``DIR/story_dictionaries.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE
from torch import Tensor

from circuit_lens.dictionaries.binding import bind
from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.training import MlpActivations, TranscoderSettings, mlp_activations, train_transcoder
from circuit_lens.training.cross_layer import DICTIONARY_FOLDER, CrossLayerSettings, train_cross_layer
from circuit_lens.zoo.set_figures import ReplacementFigures, replacement_figures
from tests.stories import BOS, stories

HELD_OUT = 100


def story_rows(data: Path, n_ctx: int) -> tuple[Int[Tensor, "story pos"], Bool[Tensor, "story pos"]]:
    """(the texts as tokens, BOS first, padded and cut to ``n_ctx``; where they are neither BOS nor padding)."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(data / "real_models/stories260K/tok512.model"))
    texts = json.loads((data / "real_models/tinystories/tinystories_1000.json").read_text(encoding="utf-8"))
    texts = [text if isinstance(text, str) else text["text"] for text in texts]
    rows = [[BOS, *tokenizer.encode(text.strip())][:n_ctx] for text in texts]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    keep = torch.zeros(tokens.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        keep[number, 1 : len(row)] = True
    return tokens, keep


def per_layer(activations: list[MlpActivations], settings: TranscoderSettings, work: Path) -> list[SAE[Any]]:
    """One transcoder for every layer."""
    found = []
    for number, layer in enumerate(activations):
        folder = work / "transcoders" / layer.hook_out
        if (folder / "cfg.json").exists():
            found.append(SAE.load_from_disk(str(folder), device="cpu"))
            continue
        found.append(
            train_transcoder(
                layer.inputs, layer.outputs, hook_in=layer.hook_in, hook_out=layer.hook_out, settings=settings,
                seed=number, folder=folder, progress=False,
            )
        )  # fmt: skip
    return found


def cross_layer(activations: list[MlpActivations], settings: CrossLayerSettings, work: Path) -> CrossLayerTranscoder:
    """One cross-layer transcoder of all layers."""
    folder = work / "cross_layer"
    if (folder / DICTIONARY_FOLDER).exists():
        return CrossLayerTranscoder.load(folder / DICTIONARY_FOLDER)
    return train_cross_layer(
        activations, settings=settings, seed=0, folder=folder, log=folder / "log.jsonl", progress=False
    )


def report(name: str, found: ReplacementFigures, seconds: float) -> None:
    """Print the figures of one kind of dictionaries."""
    print(f"{name} ({seconds:.0f} s, {found.n_tokens:,} held-out tokens)")
    for figure in ("explained_variance", "l0", "dead"):
        print(f"  {figure:<19}", *(f"{getattr(layer, figure):7.3f}" for layer in found.layers))
    added, zeroed = found.added_loss, found.loss_zeroed - found.loss
    print(
        f"  loss {found.loss:.4f}, every MLP replaced +{added:.4f}, zeroed +{zeroed:.4f}: "
        f"{1 - added / zeroed:.3f} of what the MLPs do is kept",
        flush=True,
    )


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.story_dictionaries", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--k", type=float, default=16.0)
    parser.add_argument("--features", type=int, default=512)
    given = parser.parse_args()
    data = os.environ.get("CIRCUIT_LENS_DATA")
    if not data:
        parser.error("set CIRCUIT_LENS_DATA to the folder that holds real_models/")
    torch.set_num_threads(1)
    model = stories(Path(data), torch.float32)
    tokens, keep = story_rows(Path(data), model.cfg.n_ctx)
    activations = mlp_activations(model, tokens[:-HELD_OUT], keep[:-HELD_OUT], batch=16)
    print(f"{len(activations[0].inputs):,} tokens to train on", flush=True)
    single = TranscoderSettings(d_sae=given.features, k=given.k, steps=given.steps)
    crossed = replace(CrossLayerSettings(), d_sae=given.features, k=given.k, per_layer=True, steps=given.steps)
    kinds = {
        "per-layer transcoders": lambda: per_layer(activations, single, given.work),
        "cross-layer transcoder": lambda: [cross_layer(activations, crossed, given.work)],
    }
    found = {}
    for name, make in kinds.items():
        started = time.perf_counter()
        dictionaries = make()
        seconds = time.perf_counter() - started
        figures = replacement_figures(bind(model, dictionaries), tokens[-HELD_OUT:], keep[-HELD_OUT:])
        report(name, figures, seconds)
        found[name] = asdict(figures) | {"seconds": round(seconds)}
    found["settings"] = {"transcoders": asdict(single), "cross_layer": asdict(crossed)}
    given.work.mkdir(parents=True, exist_ok=True)
    (given.work / "story_dictionaries.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Validation cards over many prompts: the bundled recipe's three model seeds, the shortcut, and a real small model.

    python -m benchmarks.validation_cards --work DIR [--prompts 100] [--stories 24] [--only NAME ...]
        [--story-dictionaries DIR]

``DIR`` is where ``python -m circuit_lens.zoo --work DIR`` trained the models of all seeds; without it only the two
bundled models are measured. The real model (stories260K) is read from the folder that ``CIRCUIT_LENS_DATA`` names, and
left out where that is unset. Writes ``DIR/cards.json`` (or ``cards.json`` here) and prints a table.

What is drawn, and nothing is chosen on it: questions about held-out cities in all templates and relations, and
held-out opposites, by a fixed seed; of the real model, the first tokens of texts that no transcoder was trained on.
Every figure is a mean over prompts with its bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import circuit_lens as cl
from circuit_lens.graph.card import ValidationCard
from circuit_lens.training import TranscoderSettings, mlp_activations, train_transcoder
from circuit_lens.zoo import Corpus
from circuit_lens.zoo.evaluate import held_out_prompts
from circuit_lens.zoo.loading import load_dictionaries_from, load_model_from
from circuit_lens.zoo.recipe import CAPITALS, SHORTCUT, Workshop

STORY_TOKENS = 24
STORY_SETTINGS = TranscoderSettings(d_sae=512, k=16.0, steps=1500)
# The figures that are printed; cards.json has all of them.
SHOWN = (
    "scores/replacement",
    "scores/completeness",
    "nodes/influence/abs_spearman",
    "nodes/total/abs_spearman",
    "nodes/total_norms/abs_spearman",
    "nodes/total_norms_attention/abs_spearman",
    "nodes/gradient/abs_spearman",
    "nodes/gradient_attention_frozen/abs_spearman",
    "nodes/direct/abs_spearman",
    "nodes/activation/abs_spearman",
    "nodes/matched/abs_spearman",
    "nodes/gradient_minus_graph/abs_spearman",
    "nodes/total/spearman",
    "nodes/total_norms/spearman",
    "nodes/total_norms_attention/spearman",
    "nodes/gradient/spearman",
    "nodes/total/sign_accuracy",
    "nodes/total_norms/sign_accuracy",
    "nodes/gradient/sign_accuracy",
    "nodes/total/r_squared",
    "nodes/total_norms/r_squared",
    "nodes/gradient/r_squared",
    "knock_on/total/spearman",
    "knock_on/total/abs_spearman",
    "knock_on/total/sign_accuracy",
    "knock_on/total/r_squared",
    "knock_on/direct/spearman",
    "knock_on/matched/spearman",
    "knock_on/gradient/spearman",
    "faithfulness/1/cosine",
    "faithfulness/1/error",
    "faithfulness/2/cosine",
    "faithfulness/2/error",
    "faithfulness/3/cosine",
    "faithfulness/3/error",
    "gaps/attention",
    "gaps/norms",
    "gaps/errors",
    "circuit/sufficiency",
    "circuit/random_sufficiency",
    "circuit/necessity",
    "circuit/random_necessity",
    "flips/on/precision",
    "flips/on/recall",
    "flips/on/prevalence",
    "flips/on/auprc",
    "flips/on/nearest_auprc",
    "flips/off/precision",
    "flips/off/recall",
    "flips/off/auprc",
    "flips/off/nearest_auprc",
)


def bundled(work: Path | None) -> Iterator[tuple[str, cl.ReplacementModel]]:
    """The bundled pairs, and those of the other seeds where the work folder has them."""
    yield "capitals", cl.zoo.load("capitals")
    yield "capitals-shortcut", cl.zoo.load("capitals-shortcut")
    for kind in ("clt", "skip", "sae"):
        yield f"capitals, {kind}", cl.zoo.load("capitals", kind)
    if work is None:
        return
    workshop = Workshop(work)
    for name, seed, dictionary_seed in ((CAPITALS, 0, 0), (CAPITALS, 2, 0), (SHORTCUT, 0, 0)):
        folder = workshop.model_folder(name, seed), workshop.dictionaries_folder(name, seed, dictionary_seed)
        if name != SHORTCUT and all(path.exists() for path in folder):
            pair = load_model_from(folder[0]), load_dictionaries_from(folder[1])
            yield f"{name}, seed {seed}/{dictionary_seed}", cl.ReplacementModel(*pair)


def real_model(data: Path, work: Path | None, n: int) -> tuple[cl.ReplacementModel, list[torch.Tensor]]:
    """The stories260K model with transcoders trained on its texts, and beginnings of texts they have not seen."""
    from sae_lens import SAE

    from tests.stories import stories, story_tokens

    model = stories(data, torch.float32)
    rows = story_tokens(data, 128)
    seen, unseen = rows[: len(rows) - 4 * n], rows[len(rows) - 4 * n :]
    dictionaries = []
    for layer in range(model.cfg.n_layers):
        folder = None if work is None else work / "stories" / f"blocks.{layer}.hook_mlp_out"
        if folder is None or not folder.exists():
            keep = torch.ones_like(seen, dtype=torch.bool)
            keep[:, 0] = False
            (found,) = mlp_activations(model, seen, keep, layers=[layer])
            hooks: dict[str, Any] = {"hook_in": found.hook_in, "hook_out": found.hook_out}
            trained = train_transcoder(
                found.inputs, found.outputs, **hooks, settings=STORY_SETTINGS, seed=layer,
                metadata={"model_name": "stories260K"}, folder=folder, progress=False,
            )  # fmt: skip
            dictionaries.append(trained)
        else:
            dictionaries.append(SAE.load_from_disk(str(folder), dtype="float32", device="cpu"))
    return cl.ReplacementModel(model, dictionaries), list(unseen[:n, :STORY_TOKENS])


def real_cross_layer(model: Any, work: Path) -> cl.ReplacementModel | None:
    """The same model with the cross-layer transcoder that `benchmarks.story_dictionaries` trained, if there is one."""
    folder = work / "cross_layer" / "dictionary"
    return cl.ReplacementModel(model, cl.CrossLayerTranscoder.load(folder)) if folder.exists() else None


def table(cards: dict[str, ValidationCard]) -> str:
    """One row per figure, one column per model."""
    head = ["figure", *cards]
    rows = [[name, *(str(card.get(name)) for card in cards.values())] for name in SHOWN]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--stories", type=int, default=24)
    parser.add_argument("--story-dictionaries", type=Path, help="work folder of benchmarks.story_dictionaries")
    parser.add_argument("--only", nargs="*", help="names of models, such as capitals or stories260K")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prompts, cards = held_out_prompts(Corpus(), given.prompts), {}

    def measure(name: str, rm: cl.ReplacementModel, prompts: list[Any]) -> None:
        started = time.process_time()
        settings = cl.CardSettings(max_nodes=4096, samples=1000)  # every feature that can reach the target
        cards[name] = cl.validate_many(rm, prompts, settings=settings, progress=False)
        print(f"{name}: {len(prompts)} prompts, {time.process_time() - started:.0f} CPU s", flush=True)

    for name, rm in bundled(given.work):
        if not given.only or name in given.only:
            measure(name, rm, prompts)
    data = os.environ.get("CIRCUIT_LENS_DATA")
    if data is None:
        print("stories260K is left out: set CIRCUIT_LENS_DATA to the folder that holds real_models/")
    elif not given.only or "stories260K" in given.only:
        rm, texts = real_model(Path(data), given.work, given.stories)
        measure("stories260K", rm, texts)
        crossed = None if given.story_dictionaries is None else real_cross_layer(rm.model, given.story_dictionaries)
        if crossed is not None:
            measure("stories260K, clt", crossed, texts)
    place = (given.work or Path(".")) / "cards.json"
    old = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    text = json.dumps(old | {name: card.to_json() for name, card in cards.items()}, ensure_ascii=False, indent=1)
    place.write_text(text, encoding="utf-8")
    print(table(cards))


if __name__ == "__main__":
    main()

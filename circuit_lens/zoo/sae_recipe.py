"""How the bundled SAEs and skip transcoders are made: each set from seeds, skipped if the work folder has it already.

work/saes/<name>-<seed>-<n>/<set>/<hook>/   a set as it ships, one SAELens folder per hook
work/figures/<name>-<seed>-<n>-saes.json    the figures, measured on what ships

The sets: ``sae`` (the residual stream after every layer), ``sae-256`` and ``sae-1600`` (the one of layer 1, smaller and
larger, for the study of how features split), ``sae-mlp-in`` and ``sae-mlp-out`` (before and after the MLP of layer 1,
as large as the bundled transcoder), and ``skip`` (skip transcoders of all MLPs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.loading import load_dictionaries_from, load_model_from
from circuit_lens.zoo.recipe import (
    DICTIONARY_TEXT,
    DICTIONARY_TOKENS,
    FIGURES_TEXT,
    FIGURES_TOKENS,
    Workshop,
    halve_weights,
    new_folder,
    transcoder_settings,
)
from circuit_lens.zoo.tokenizer import PAD_ID

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformer_lens import HookedTransformer

    from circuit_lens.training.data import ActivationStore
    from circuit_lens.training.sae import SaeSettings
    from circuit_lens.zoo.batches import HeldOutText

N_LAYERS, MIDDLE, SIZE = 4, 1, 640
SMALL, LARGE = 256, 1600
RESIDUAL, MLP_IN, MLP_OUT = "blocks.{}.hook_resid_post", "blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"
SAE_SET, SKIP = "sae", "skip"
BATCH = 64


@dataclass(frozen=True, slots=True)
class SaePlan:
    """One SAE: the set it belongs to, the hook it reads and writes, its features."""

    set: str
    hook: str
    d_sae: int


SAES: tuple[SaePlan, ...] = (
    *(SaePlan(SAE_SET, RESIDUAL.format(layer), SIZE) for layer in range(N_LAYERS)),
    SaePlan(f"sae-{SMALL}", RESIDUAL.format(MIDDLE), SMALL),
    SaePlan(f"sae-{LARGE}", RESIDUAL.format(MIDDLE), LARGE),
    SaePlan("sae-mlp-in", MLP_IN.format(MIDDLE), SIZE),
    SaePlan("sae-mlp-out", MLP_OUT.format(MIDDLE), SIZE),
)
SETS = (*dict.fromkeys(plan.set for plan in SAES), SKIP)


def sae_settings(d_sae: int) -> SaeSettings:
    """The settings of every bundled SAE of this size."""
    from circuit_lens.training.sae import SaeSettings

    # More features die while many compete for the same tokens: the largest is revived more strongly, and for longer.
    steps, auxiliary = (1400, 0.5) if d_sae > SIZE else (700, 0.25)
    return SaeSettings(d_sae=d_sae, k=11.0, steps=steps, auxiliary=auxiliary, dead_window=20)


@dataclass(frozen=True, slots=True)
class SetFigures:
    """One dictionary on held-out text; losses are mean cross-entropies in nats over the same tokens.

    Attributes:
        set, hook: Which one.
        d_sae: Features.
        explained_variance, l0, dead: Of the hook it writes; a dead feature is active on none of the tokens.
        loss_replaced: With its reconstruction in place of the activation (for a skip transcoder: of this MLP alone).
    """

    set: str
    hook: str
    d_sae: int
    explained_variance: float
    l0: float
    dead: float
    loss_replaced: float


@dataclass(frozen=True, slots=True)
class SaeFigures:
    """All figures of the bundled SAEs and skip transcoders.

    Attributes:
        n_tokens: Text that every figure is computed on.
        dictionaries: Each one's.
        loss: Of the model as it is.
        loss_skip: With every MLP replaced by its skip transcoder.
        loss_zeroed: With every MLP's output zero.
    """

    n_tokens: int
    dictionaries: tuple[SetFigures, ...]
    loss: float
    loss_skip: float
    loss_zeroed: float


def saes_folder(workshop: Workshop, name: str, seed: int, dictionary_seed: int) -> Path:
    """Where the sets lie or will lie."""
    return workshop.work / "saes" / f"{name}-{seed}-{dictionary_seed}"


def make_saes(workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> Path:
    """Train and keep every set that is missing, on the model as it ships."""
    from circuit_lens.training.data_collect import collect_activations
    from circuit_lens.training.data_text import TokenRows

    folder = saes_folder(workshop, name, seed, dictionary_seed)
    missing = [one for one in SETS if not (folder / one).exists()]
    if not missing:
        return folder
    model = load_model_from(workshop.model_folder(name, seed))
    text = workshop.text(corpus, DICTIONARY_TOKENS, DICTIONARY_TEXT + dictionary_seed)
    names = {"model_name": name, "model_seed": seed, "dictionary_seed": dictionary_seed}

    def activations(hooks: Sequence[str]) -> ActivationStore:
        rows = TokenRows(text.rows.tokens, text.rows.real)
        return collect_activations(model, rows, hooks, memory=2**31, rows_at_once=BATCH)

    for one in missing:
        with new_folder(folder / one) as place:
            if one == SKIP:
                _train_skip(workshop, activations, names, place, dictionary_seed)
            else:
                _train_saes(workshop, activations, names, place, one, dictionary_seed)
    return folder


def _train_saes(
    workshop: Workshop,
    activations: Callable[[Sequence[str]], ActivationStore],
    names: dict[str, Any],
    place: Path,
    one: str,
    dictionary_seed: int,
) -> None:
    from circuit_lens.training.sae import train_sae

    plans = [(number, plan) for number, plan in enumerate(SAES) if plan.set == one]
    store = activations([plan.hook for _, plan in plans])
    for number, plan in plans:
        started = time.perf_counter()
        train_sae(
            store, hook=plan.hook, settings=sae_settings(plan.d_sae), seed=100 * dictionary_seed + number,
            metadata=names, folder=place / plan.hook, progress=False,
        )  # fmt: skip
        halve_weights(place / plan.hook)
        workshop.say(f"set {one}: SAE {plan.hook}, {plan.d_sae} features, {time.perf_counter() - started:.0f} s")


def _train_skip(
    workshop: Workshop,
    activations: Callable[[Sequence[str]], ActivationStore],
    names: dict[str, Any],
    place: Path,
    dictionary_seed: int,
) -> None:
    from circuit_lens.training.transcoder import train_transcoder

    for layer in range(N_LAYERS):
        started = time.perf_counter()
        hook_in, hook_out = MLP_IN.format(layer), MLP_OUT.format(layer)
        train_transcoder(
            activations([hook_in, hook_out]), hook_in=hook_in, hook_out=hook_out, skip=True,
            settings=transcoder_settings(), seed=100 * dictionary_seed + layer, metadata=names,
            folder=place / hook_out, progress=False,
        )  # fmt: skip
        halve_weights(place / hook_out)
        workshop.say(f"set {SKIP}: skip transcoder {hook_out}, {time.perf_counter() - started:.0f} s")


# ------------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def replaced_loss(
    model: HookedTransformer,
    tokens: Int[Tensor, "row pos"],
    dictionaries: Sequence[SAE[Any]] = (),
    *,
    zeroed: Sequence[str] = (),
) -> float:
    """Mean cross-entropy in nats with what dictionaries write replaced by what they make of what they read.

    Each reads the stream that the replacements before it made; a skip path is part of what it makes. At BOS everything
    is left as it is. ``zeroed``: hooks whose activations become zero.
    """
    read: dict[str, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for dictionary in dictionaries:
        name_in, name_out = _hooks_of(dictionary)

        def remember(value: Tensor, hook: object, name: str = name_in) -> None:
            read[name] = value

        def replace(value: Tensor, hook: object, name: str = name_in, dictionary: SAE[Any] = dictionary) -> Tensor:
            return torch.cat([value[:, :1], dictionary(read[name])[:, 1:]], 1)

        hooks += [(name_in, remember), (name_out, replace)]
    for name in zeroed:
        hooks.append((name, lambda value, hook: torch.cat([value[:, :1], torch.zeros_like(value[:, 1:])], 1)))
    total, count = 0.0, 0
    for start in range(0, len(tokens), BATCH):
        rows = tokens[start : start + BATCH]
        logits = model.run_with_hooks(rows, fwd_hooks=list(hooks))[:, :-1]
        targets = rows[:, 1:]
        real = targets != PAD_ID
        total += float(F.cross_entropy(logits[real], targets[real], reduction="sum"))
        count += int(real.sum())
    return total / count


def _hooks_of(dictionary: SAE[Any]) -> tuple[str, str]:
    """What a dictionary reads and writes."""
    read = str(dictionary.cfg.metadata.hook_name)
    return read, str(dictionary.cfg.metadata.hook_name_out or read)


def figures_of_saes(model: HookedTransformer, folder: Path, text: HeldOutText) -> SaeFigures:
    """All figures of the sets in a folder."""
    from circuit_lens.training.data_collect import collect_activations
    from circuit_lens.training.data_figures import measure_fit
    from circuit_lens.training.data_text import TokenRows

    tokens = text.rows.tokens
    found = [(one, dictionary) for one in SETS for dictionary in load_dictionaries_from(folder / one)]
    hooks = [_hooks_of(dictionary) for _, dictionary in found]
    names = list(dict.fromkeys(name for pair in hooks for name in pair))
    rows = TokenRows(tokens, text.rows.real)
    store = collect_activations(model, rows, names, memory=2**31, rows_at_once=BATCH)
    figures = []
    for (one, dictionary), (read, written) in zip(found, hooks, strict=True):
        fit = measure_fit(
            dictionary, ((batch[read], batch[written]) for batch in store.in_order(hooks=[read, written]))
        )
        loss = replaced_loss(model, tokens, [dictionary])
        d_sae = int(dictionary.cfg.d_sae)
        figures.append(SetFigures(one, written, d_sae, fit.explained_variance, fit.l0, fit.dead, loss))
    return SaeFigures(
        n_tokens=int(text.rows.real.sum()),
        dictionaries=tuple(figures),
        loss=replaced_loss(model, tokens),
        loss_skip=replaced_loss(model, tokens, [dictionary for one, dictionary in found if one == SKIP]),
        loss_zeroed=replaced_loss(model, tokens, zeroed=[MLP_OUT.format(layer) for layer in range(N_LAYERS)]),
    )


def measure_saes(workshop: Workshop, corpus: Corpus, name: str, seed: int, dictionary_seed: int) -> dict[str, Any]:
    """The figures of every set, as JSON data, on the text that the transcoders' figures are measured on."""

    def measure() -> SaeFigures:
        model = load_model_from(workshop.model_folder(name, seed))
        folder = make_saes(workshop, corpus, name, seed, dictionary_seed)
        return figures_of_saes(model, folder, workshop.text(corpus, FIGURES_TOKENS, FIGURES_TEXT))

    return workshop.figures(f"{name}-{seed}-{dictionary_seed}-saes", measure)

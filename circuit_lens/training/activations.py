"""What a transcoder is trained on: the inputs and outputs of a hooked model's MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


@dataclass(frozen=True, slots=True)
class MlpActivations:
    """One layer's MLP inputs and outputs at the tokens that were kept, and the hook points they come from."""

    hook_in: str
    hook_out: str
    inputs: Float[Tensor, "token d_in"]
    outputs: Float[Tensor, "token d_out"]


@torch.no_grad()
def mlp_activations(
    model: HookedTransformer,
    tokens: Int[Tensor, "row pos"],
    keep: Bool[Tensor, "row pos"],
    *,
    layers: Sequence[int] | None = None,
    hook_in: str = "blocks.{layer}.ln2.hook_normalized",
    hook_out: str = "blocks.{layer}.hook_mlp_out",
    batch: int = 64,
) -> list[MlpActivations]:
    """The inputs and outputs of the MLPs of ``layers`` (default: all) at the positions where ``keep`` is True.

    Leave out padding, and the beginning-of-sequence token: its activations are one constant point far from the others,
    and no dictionary is needed to explain it.
    """
    chosen = range(model.cfg.n_layers) if layers is None else layers
    pairs = [(hook_in.format(layer=layer), hook_out.format(layer=layer)) for layer in chosen]
    wanted = [name for pair in pairs for name in pair]
    missing = [name for name in wanted if name not in model.hook_dict]
    if missing:
        raise ValueError(f"The model has no hook points {missing}; hook_in and hook_out name one with {{layer}}")
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for start in range(0, len(tokens), batch):
        rows, mask = tokens[start : start + batch], keep[start : start + batch]
        _, cache = model.run_with_cache(rows, names_filter=wanted, return_type=None)
        for name in wanted:
            found[name].append(cache[name][mask])
    return [MlpActivations(a, b, torch.cat(found[a]), torch.cat(found[b])) for a, b in pairs]

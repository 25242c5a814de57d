"""Residual streams of prompts: how they are run, what they are called, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.decoding import uncached
from circuit_lens.hooks import Hook, preserved_rng, quiet_norm_edits, scoped_hooks
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors, require_finite

EMBEDDING = -1
"""The layer of the residual stream before the first block; layer l is the output of block l."""
MEMORY = 1.0
"""Gigabytes that runs may take at once, beside the models."""


def residual_hook(layer: int) -> str:
    """Return the hook point of the residual stream after a layer.

    >>> residual_hook(-1), residual_hook(3)
    ('blocks.0.hook_resid_pre', 'blocks.3.hook_resid_post')
    """
    return "blocks.0.hook_resid_pre" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"


def run_prompts(
    model: HookedModel, tokens: Int[Tensor, "batch n_pos"], hooks: Sequence[Hook]
) -> Float[Tensor, "batch n_pos d_vocab"]:
    """Run prompts of one length under hooks, and return the logits.

    Every token is attended, whatever the tokenizer calls it (`circuit_lens.decoding.uncached`): what is read is read
    as targets are run.
    """
    with preserved_rng(), quiet_norm_edits(), scoped_hooks(model, hooks):
        return uncached(model, tokens)


def residual_streams(
    model: HookedModel, tokens: Int[Tensor, "n_pos"], layers: Iterable[int]
) -> dict[int, Float[Tensor, "n_pos d_model"]]:
    """Run a prompt, without gradients, and return its residual stream after some layers.

    Raises:
        ConsistencyError: One that is NaN or infinite.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Hook:
        def edit(value: Tensor) -> None:
            kept[layer] = value[0].detach().clone()

        return Hook(residual_hook(layer), edit)

    with plain_tensors():
        run_prompts(model, tokens[None], [keep(layer) for layer in sorted(layers)])
    for layer, value in kept.items():
        require_finite(f"the residual stream of layer {layer}", value)
    return kept


def room(model: HookedModel, memory: float, kept: int = 0) -> float:
    """Return the bytes that rows may take: a forward copies the unembedding, and what is kept stays.

    Args:
        model: The model that is run.
        memory: Gigabytes in all.
        kept: Bytes that stay.
    """
    return max(memory * 1e9 - model.W_U.numel() * model.W_U.element_size() - kept, memory * 1e9 / 4)


def activations(cfg: Any, n_run: int, n_pos: int) -> int:
    """Return about how many numbers a block holds at once, where so many positions run and so many are attended."""
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    return n_run * (10 * cfg.d_model + 4 * d_mlp) + 4 * cfg.n_heads * n_run * n_pos


def prompt_bytes(model: HookedModel, n_pos: int) -> int:
    """Return about how much memory a prompt takes while it runs: activations, and logits of all its positions."""
    inside = activations(model.cfg, n_pos, n_pos)
    return model.W_U.element_size() * (inside + 3 * n_pos * model.W_U.shape[-1])  # a bias and a soft-cap copy logits

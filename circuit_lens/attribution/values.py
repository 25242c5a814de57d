"""What a graph needs of one run: collected by one forward pass, or taken from the user's activation cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import CacheError, ConsistencyError, nearest
from circuit_lens.hooks import has_hook
from circuit_lens.protocols import Cache, HookedModel
from circuit_lens.running import model_device, plain_tensors, require_finite, run_and_capture, token_string


@dataclass(frozen=True, eq=False)
class RunValues:
    """Activations of one prompt, without batch axis, on the model's device, in the dtype attribution computes in.

    Attributes:
        tokens: Token ids.
        values: Hook name to activation, ``[n_pos, ...]`` (patterns ``[n_heads, n_pos, n_pos]``).
        logits: The model's own logits, soft-cap included; None where a cache holds none.
        native: The coarsest dtype the activations had when they were computed; it sets how exactly they can agree.
        from_cache: Whether the values are the user's.
        fwd_hooks: Temporary hooks of the user that the run had.
    """

    tokens: Int[Tensor, "n_pos"]
    values: Mapping[str, Tensor]
    logits: Float[Tensor, "n_pos d_vocab"] | None
    native: torch.dtype
    from_cache: bool
    fwd_hooks: Sequence[tuple[Any, Any]] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def at(self, layer: int, suffix: str) -> Tensor:
        """Return an activation of a block."""
        return self.values[f"blocks.{layer}.{suffix}"]


def compute_dtype(model: HookedModel) -> torch.dtype:
    """Return the dtype attribution computes in: float64 for float64 models, float32 for all others."""
    return torch.float64 if model.W_U.dtype == torch.float64 else torch.float32


def has_learned_positions(model: HookedModel) -> bool:
    """Whether the model adds learned position embeddings to the token embeddings."""
    return getattr(model.cfg, "positional_embedding_type", None) == "standard" and has_hook(model, "hook_pos_embed")


def needed_names(model: HookedModel) -> list[str]:
    """Return the hook names a cache must hold for this model to be attributed, in the order of the forward pass."""
    names = ["hook_embed"] + (["hook_pos_embed"] if has_learned_positions(model) else [])
    per_block = (
        "hook_resid_pre",
        "ln1.hook_scale",
        "attn.hook_pattern",
        "ln1_post.hook_scale",
        "hook_resid_mid",
        "ln2.hook_scale",
        "ln2_post.hook_scale",
        "hook_mlp_out",
    )
    hooks = model.hook_dict
    for layer in range(model.cfg.n_layers):
        names += [name for suffix in per_block if (name := f"blocks.{layer}.{suffix}") in hooks]
    return [
        *names,
        f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
    ]


def from_prompt(
    model: HookedModel,
    tokens: Int[Tensor, "n_pos"],
    *,
    extra: Sequence[str] = (),
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
) -> RunValues:
    """Run the model once and collect what a graph needs.

    Args:
        model: The model; its permanent hooks are honoured.
        tokens: One prompt.
        extra: More hook names to collect.
        fwd_hooks: Temporary hooks for this run.

    Raises:
        HookError: A hook that is missing or silent.
        ConsistencyError: An activation holds NaN or infinity.
    """
    names = list(dict.fromkeys([*needed_names(model), *extra]))
    logits, captured = run_and_capture(model, tokens, names, fwd_hooks=fwd_hooks)
    dtype = compute_dtype(model)
    values = {}
    for name, value in captured.items():
        require_finite(name, value)
        values[name] = value[0].to(dtype)
    return RunValues(tokens, values, logits.to(dtype), _coarsest(captured.values()), False, tuple(fwd_hooks))


def from_cache(
    model: HookedModel,
    tokens: Int[Tensor, "n_pos"],
    cache: Cache,
    *,
    extra: Sequence[str] = (),
    batch_index: int | None = None,
) -> RunValues:
    """Take what a graph needs from an activation cache; the model is not run.

    Args:
        model: The model the cache was made with.
        tokens: The prompt the cache was made on.
        cache: An ``ActivationCache`` or a dict, on any device, in any float dtype, with or without the batch axis.
        extra: More hook names to take where the cache has them.
        batch_index: Which row of a batched cache; needed when it has several.

    Raises:
        CacheError: An entry is missing or has another shape, or a batched cache without ``batch_index``.
        ConsistencyError: An entry holds NaN or infinity, or the cache belongs to other tokens.
    """
    names = needed_names(model)
    row = _batch_row(model, cache, names, batch_index)
    dtype, device = compute_dtype(model), model_device(model)
    values: dict[str, Tensor] = {}
    entries: list[Tensor] = []
    wanted = dict.fromkeys([*names, *extra, "unembed.hook_out"])
    with plain_tensors():
        for name, entry in _entries(model, cache, wanted).items():
            if entry is None:
                if name in names:
                    raise CacheError(_missing(cache, name))
                continue
            entries.append(entry)
            entry = entry if row is None else entry[row]
            require_finite(name, entry)
            values[name] = entry.detach().clone().to(device, dtype)
        _check_shapes(values, len(tokens), names)
        _check_tokens(model, tokens, values["hook_embed"])
    return RunValues(tokens, values, None, _coarsest(entries), True)


def _coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    return max((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)


def _entries(model: HookedModel, cache: Cache, names: Iterable[str]) -> dict[str, Tensor | None]:
    """Look hooks up under their names, and under the names their hook points have themselves (a bridge's aliases)."""
    hooks, keys = model.hook_dict, set(cache.keys())
    found = {}
    for name in names:
        own = str(getattr(hooks[name], "name", name)) if name in hooks else name
        found[name] = next((cache[candidate] for candidate in (name, own) if candidate in keys), None)
    return found


def _missing(cache: Cache, name: str) -> str:
    have = list(cache.keys())
    return (
        f"the cache has no {name!r} ({len(have)} entries{nearest(name, have)}); make it with "
        "model.run_with_cache(tokens, names_filter=rm.names_filter()) or with no names_filter at all"
    )


def _batch_row(model: HookedModel, cache: Cache, names: Sequence[str], batch_index: int | None) -> int | None:
    first = _entries(model, cache, names[:1])[names[0]]
    if first is None:
        raise CacheError(_missing(cache, names[0]))
    if first.ndim == 2:
        if batch_index is not None:
            raise CacheError("batch_index was given, but the cache has no batch axis; leave it out")
        return None
    n_batch = first.shape[0]
    if batch_index is None:
        if n_batch != 1:
            raise CacheError(
                f"the cache holds a batch of {n_batch} prompts; say which one with batch_index=0..{n_batch - 1}"
            )
        return 0
    if not -n_batch <= batch_index < n_batch:
        raise CacheError(f"batch_index={batch_index} is outside the cache's batch of {n_batch}")
    return batch_index


def _check_shapes(values: Mapping[str, Tensor], n_pos: int, names: Sequence[str]) -> None:
    for name in names:
        shape = values[name].shape
        fits = len(shape) >= 2 and shape[-2] == n_pos
        if not fits or (name.endswith("hook_pattern") and shape[-1] != n_pos):
            raise CacheError(
                f"{name} in the cache has shape {tuple(shape)}, the prompt has {n_pos} positions; give the tokens the "
                "cache was made on, and no pos_slice"
            )


def _check_tokens(model: HookedModel, tokens: Int[Tensor, "n_pos"], embed: Float[Tensor, "n_pos d_model"]) -> None:
    table = getattr(model, "W_E", None)
    if table is None or table.shape[-1] != embed.shape[-1]:
        return
    table = table.detach()
    alike = torch.cosine_similarity(table[tokens].to(embed), embed, dim=-1) > 0.9
    if not bool(alike.any()):
        raise ConsistencyError(
            "the cache belongs to other tokens: none of its embeddings is that of the given prompt at its position"
        )
    for pos in (~alike).nonzero()[:, 0].tolist():
        closeness, token = torch.cosine_similarity(table, embed[pos].to(table), dim=-1).max(0)
        if closeness > 0.99:
            mine, its = token_string(model, int(tokens[pos])), token_string(model, int(token))
            raise ConsistencyError(
                f"the cache belongs to other tokens: at position {pos} it holds the embedding of {its!r} (id "
                f"{int(token)}), the given prompt has {mine!r} there; give the tokens that the cache was made on. A "
                "hook that edits the first residual stream in place changes the cached embedding too: edit a clone"
            )

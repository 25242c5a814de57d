"""The fast path: all rows of a grid as one batch over a shared prefix, no hooks after the prompt."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from circuit_lens.decoding import Decoded, decode, uncached
from circuit_lens.hooks import Hook, preserved_rng, quiet_norm_edits, scoped_hooks
from circuit_lens.patchscopes.definition import Said
from circuit_lens.patchscopes.rows import Rows, Writes, written
from circuit_lens.patchscopes.sources import residual_hook
from circuit_lens.patchscopes.targets import Placed
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors, require_finite

CHECKED = 2
"""Rows of every call that are compared with a run without cache."""
# Largest difference of cached and uncached logits, as a share of the largest |logit|.
_LIMITS = {torch.float64: 1e-5, torch.float32: 1e-3}
_LIMIT_HALF = 5e-2


def say(
    model: HookedModel,
    target: Placed,
    rows: Rows,
    max_new_tokens: int,
    *,
    check: bool,
    use_cache: bool,
    read_layer: int | None = None,
) -> Said:
    """Run the rows of a grid at once; the result is that of `definition.say_one_by_one`.

    Before the (first) placeholder all rows are the same, so these positions are run once and their keys and values are
    shared; the rest is run as a batch, in which every row has its own state written at the placeholder; what is
    generated needs no hooks, since the keys and values hold what was written.

    Args:
        model: The target model.
        target: The target prompt.
        rows: What is moved, few enough for the memory there is.
        max_new_tokens: Tokens to generate greedily.
        check: Compare some rows with runs without cache; where they differ, all rows are run without, and ``note`` says
            so.
        use_cache: Keep keys and values.
        read_layer: Keep the residual stream of the prompt's last position after this layer.
    """
    writes = rows.writes()
    scope = _Scope(model, target, rows, writes, read_layer)
    tokens = target.tokens[None].expand(len(rows), -1)
    found = decode(
        model,
        tokens,
        max_new_tokens=max(1, max_new_tokens),
        use_cache=use_cache,
        scope=scope,
        shared_prefix=target.positions[0],
        check=False,
        keep_logits="first",
    )
    note = found.note
    if check and found.cached:
        note = _mismatch(model, target, rows, found)
        if note:
            again = say(
                model, target, rows, max_new_tokens, check=False, use_cache=False, read_layer=read_layer
            )  # fmt: skip
            return replace(again, note=note)
    new = found.new_tokens[:, :max_new_tokens]
    if new.shape[1] < max_new_tokens:  # every row is at its end
        new = torch.cat([new, new[:, -1:].expand(-1, max_new_tokens - new.shape[1])], dim=1)
    return Said(found.logits[:, 0], new, found.lengths.clamp(max=max_new_tokens), note, scope.state)


class _Scope:
    """Enters the hooks that write at the placeholders among some positions."""

    def __init__(
        self, model: HookedModel, target: Placed, rows: Rows, writes: Writes, read_layer: int | None = None
    ) -> None:
        self.model, self.target, self.rows, self.writes, self.read_layer = model, target, rows, writes, read_layer
        self.state: Tensor | None = None

    def __call__(self, start: int, stop: int) -> AbstractContextManager[Any]:
        slots = [i for i, position in enumerate(self.target.positions) if start <= position < stop]
        hooks = [self._hook(layer, slots, start) for layer in self.writes] if slots else []
        if self.read_layer is not None and stop == len(self.target.tokens) and self.state is None:
            hooks.append(Hook(residual_hook(self.read_layer), self._keep))
        return scoped_hooks(self.model, hooks) if hooks else contextlib.nullcontext()

    def _keep(self, residual: Tensor) -> None:
        self.state = residual[:, -1].clone()

    def _hook(self, layer: int, slots: list[int], start: int) -> Hook:
        rows, value = self.writes[layer]
        given = value if value.shape[1] == 1 else value[:, slots]
        columns = torch.tensor([self.target.positions[i] - start for i in slots])

        def edit(residual: Tensor) -> Tensor:
            at = rows.to(residual.device)[:, None], columns.to(residual.device)
            residual = residual.clone()
            residual[at] = written(self.rows.write, residual[at], given.to(residual.device))
            return residual

        return Hook(residual_hook(layer), edit)


def _mismatch(model: HookedModel, target: Placed, rows: Rows, found: Decoded) -> str:
    """Return how some rows differ from one run without cache over the prompt and all that was written, or ""."""
    chosen = _spread(len(rows), CHECKED)
    some, tokens = rows.part(chosen), found.tokens[chosen, :-1]
    scope = _Scope(model, target, some, some.writes())
    with plain_tensors(), preserved_rng(), quiet_norm_edits(), scope(0, tokens.shape[1]):
        wanted = uncached(model, tokens)[:, found.n_prompt - 1 :]
    require_finite("logits", wanted)
    scale = wanted.abs().amax().clamp_min(1e-30)
    limit = _LIMITS.get(wanted.dtype, _LIMIT_HALF)
    gap = float((found.logits[chosen, 0] - wanted[:, 0]).abs().max() / scale)
    best, taken = wanted.amax(-1), wanted.gather(-1, found.new_tokens[chosen][..., None])[..., 0]
    open_ = torch.arange(wanted.shape[1], device=wanted.device) < found.lengths[chosen][:, None].to(wanted.device)
    gap = max(gap, float(((best - taken) / scale * open_).max()))
    if gap <= limit:
        return ""
    return (
        f"run without cache: cached logits differ from the model's own by up to {gap:.2g} of the largest (limit "
        f"{limit:g}), so the cache does not fit this model"
    )


def _spread(n: int, wanted: int) -> list[int]:
    """Return some numbers below n, far from each other, the last among them.

    >>> _spread(10, 2), _spread(1, 2)
    ([4, 9], [0])
    """
    return sorted({(i + 1) * n // min(wanted, n) - 1 for i in range(min(wanted, n))})

"""The fast path: all rows of a grid as one batch over a shared prefix, no hooks after the prompt."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuit_lens.decoding import Decoded, cache_failure, cache_limit, decode, uncached, why_uncached
from circuit_lens.hooks import Hook, carries_hooks, preserved_rng, quiet_norm_edits, scoped_hooks
from circuit_lens.patchscopes.climb import Climb, can_climb, climbing_order
from circuit_lens.patchscopes.definition import Said
from circuit_lens.patchscopes.rows import Rows, Writes, written
from circuit_lens.patchscopes.sources import residual_hook
from circuit_lens.patchscopes.targets import Placed
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors, require_finite

CHECKED = 3
"""Rows of every call that are compared with a run without cache."""


def say(
    model: HookedModel,
    target: Placed,
    rows: Rows,
    max_new_tokens: int,
    *,
    check: bool,
    use_cache: bool,
    read_layer: int | None = None,
    uncached_rows: int | None = None,
) -> Said:
    """Run the rows of a grid at once; the result is that of `definition.say_one_by_one`.

    Before the (first) placeholder all rows are the same, so these positions are run once and their keys and values are
    shared; the rest is run as a batch, in which every row has its own state written at the placeholder, and from its
    target layer up where the model can (`circuit_lens.patchscopes.climb`); what is generated needs no hooks, since the
    keys and values hold what was written.

    Args:
        model: The target model.
        target: The target prompt.
        rows: What is moved, few enough for the memory there is.
        max_new_tokens: Tokens to generate greedily.
        check: Compare some rows with runs without cache; where they differ by more than `cache_limit`, all rows are run
            without, and ``note`` says so.
        use_cache: Keep keys and values.
        read_layer: Keep the residual stream of the prompt's last position after this layer.
        uncached_rows: How many rows run at once without cache, where logits of all positions are made; None: all.
    """
    note = why_uncached(model) if use_cache else ""
    if note or not use_cache:
        return replace(_without_cache(model, target, rows, max_new_tokens, read_layer, uncached_rows), note=note)
    try:
        said, note = _at_once(model, target, rows, max_new_tokens, read_layer, use_cache=True, check=check)
    except Exception as error:
        said, note = None, cache_failure(error)
        if not note:
            raise
    if said is None or note:
        return replace(_without_cache(model, target, rows, max_new_tokens, read_layer, uncached_rows), note=note)
    return said


def _without_cache(
    model: HookedModel, target: Placed, rows: Rows, n_new: int, read_layer: int | None, size: int | None
) -> Said:
    size = len(rows) if size is None else max(1, size)
    parts = [
        _at_once(model, target, rows.part(slice(i, i + size)), n_new, read_layer, use_cache=False, check=False)[0]
        for i in range(0, len(rows), size)
    ]
    states = [part.state for part in parts if part.state is not None]
    return Said(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.new_tokens for part in parts]),
        torch.cat([part.lengths for part in parts]),
        state=torch.cat(states) if states else None,
    )


def _at_once(
    model: HookedModel, target: Placed, rows: Rows, n_new: int, read_layer: int | None, *, use_cache: bool, check: bool
) -> tuple[Said, str]:
    """Return what the rows say, run as one batch, and how the cache does not fit, or ""."""
    order = climbing_order(rows) if use_cache and can_climb(model, rows) else None
    if order is not None:
        rows = rows.part(order.tolist())
    writes = rows.writes()
    scope = _Scope(model, target, rows, writes, read_layer)
    climb = None if order is None else Climb(model, target, rows, writes, read_layer, generates=n_new > 1)
    tokens = target.tokens[None].expand(len(rows), -1)
    found = decode(
        model,
        tokens,
        max_new_tokens=max(1, n_new),
        use_cache=use_cache,
        scope=scope,
        shared_prefix=target.start,
        prompted=climb,
        check=False,
        keep_logits="first",
    )
    note = _mismatch(model, target, rows, writes, found) if check and found.cached else ""
    new = found.new_tokens[:, :n_new]
    if new.shape[1] < n_new:  # every row is at its end
        new = torch.cat([new, new[:, -1:].expand(-1, n_new - new.shape[1])], dim=1)
    state = scope.state if climb is None else climb.state
    said = Said(found.logits[:, 0], new, found.lengths.clamp(max=n_new), state=state)
    return (said if order is None else _reordered(said, torch.argsort(order))), note


def _reordered(said: Said, at: Int[Tensor, "n_rows"]) -> Said:
    def rows(values: Tensor) -> Tensor:
        return values[at.to(values.device)]

    state = None if said.state is None else rows(said.state)
    return replace(
        said, logits=rows(said.logits), new_tokens=rows(said.new_tokens), lengths=rows(said.lengths), state=state
    )


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


def _mismatch(model: HookedModel, target: Placed, rows: Rows, writes: Writes, found: Decoded) -> str:
    """Return how some rows differ from one run without cache over the prompt and all that was written, or ""."""
    patched = (rows.item >= 0).nonzero().flatten().tolist() or list(range(len(rows)))
    chosen = [patched[i] for i in _spread(len(patched), CHECKED)]
    some, tokens = rows.part(chosen), found.tokens[chosen, :-1]
    last = None if carries_hooks(model) else tokens.shape[1] - found.n_prompt + 1  # hooks see what they always see
    scope = _Scope(model, target, some, _of_rows(writes, chosen))
    with plain_tensors(), preserved_rng(), quiet_norm_edits(), scope(0, tokens.shape[1]):
        wanted = uncached(model, tokens, last=last)[:, found.n_prompt - 1 if last is None else 0 :]
    require_finite("logits", wanted)
    scale = wanted.abs().amax().clamp_min(1e-30)
    limit = cache_limit(wanted.dtype)
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


def _of_rows(writes: Writes, chosen: list[int]) -> Writes:
    """Return what is written in some rows, numbered anew: the map is not asked again."""
    found: Writes = {}
    for layer, (rows, value) in writes.items():
        at = {row: i for i, row in enumerate(rows.tolist())}
        kept = [(new, at[row]) for new, row in enumerate(chosen) if row in at]
        if kept:
            found[layer] = torch.tensor([new for new, _ in kept]), value[[old for _, old in kept]]
    return found


def _spread(n: int, wanted: int) -> list[int]:
    """Return some numbers below n, far from each other, the first and the last among them.

    >>> _spread(10, 3), _spread(2, 3), _spread(1, 3)
    ([0, 4, 9], [0, 1], [0])
    """
    return sorted({i * (n - 1) // max(1, wanted - 1) for i in range(wanted)})

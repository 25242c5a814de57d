"""Dictionaries on a model's hook points: pre-activations, features and errors as ordinary hook points.

Inside :func:`attached`, the activation at a dictionary's write hook becomes

    ``decode(features) + skip(x) + error``,   ``error = real output - (decode(own features) + skip(x))``

where ``x`` is what the dictionary's read hook let pass on this run, ``own features`` are those of ``x`` before anybody
edits them, and ``features`` and ``error`` have passed through hook points of their own. Without edits the sum is the
real output up to rounding, for any dictionary; an edit of ``pre_acts``, ``features`` or ``error`` adds just that edit.

Everything stays in one autograd graph, the error included: without edits every gradient is the model's own, and the
gradient at a feature is the effect of changing it while all that follows, later features and errors, reacts. To hold an
error constant, edit it: ``lambda error, hook: error.detach()``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.dictionaries.binding import Binding
from circuit_lens.dictionaries.points import Read, parse_hook, read_kind
from circuit_lens.dictionaries.taps import read_place, reading, write_place, writing
from circuit_lens.errors import CacheError, HookError, nearest
from circuit_lens.hooks import (
    NewPoint,
    Pinned,
    added_hook_points,
    around_forward,
    clamped,
    mlp_in_enabled,
    pinned_hook,
    quiet_norm_edits,
    suspended,
)
from circuit_lens.protocols import Cache, Dictionary, HookedModel
from circuit_lens.running import model_device, plain_tensors

_attached: weakref.WeakSet[Any] = weakref.WeakSet()


def refuse_attached(model: HookedModel) -> None:
    """Raise HookError if dictionaries are attached to the model now."""
    if model in _attached:
        raise HookError(
            "dictionaries are attached to this model already; leave that with-block first, or give one "
            "ReplacementModel all dictionaries"
        )


@dataclass(eq=False)
class _Reader:
    """A dictionary at its read hook, and what it computed on the current forward pass.

    Attributes:
        dictionary: The dictionary.
        pre_acts, features: Hook points, called once per pass.
        x: What the dictionary read, in the dtype of its arithmetic; None until its hook fired.
        own, edited: Outputs of all write hooks, skip path included: without, and with, edits of the hook points.
    """

    dictionary: Dictionary
    pre_acts: Any
    features: Any
    x: Float[Tensor, "*batch d_in"] | None = None
    own: Float[Tensor, "*batch n_out d_out"] | None = None
    edited: Float[Tensor, "*batch n_out d_out"] | None = None

    def clear(self) -> None:
        self.x = self.own = self.edited = None

    def read(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Take the dictionary's input: a copy, in float32 at least, so that later edits in place cannot reach it."""
        self.clear()
        self.x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)

    def outputs(self, write_hook: str) -> tuple[Float[Tensor, "*batch d_out"], Float[Tensor, "*batch d_out"]]:
        """Return the own and the edited output for one write hook.

        Raises:
            HookError: The dictionary's input never came by.
        """
        d = self.dictionary
        if self.own is None or self.edited is None:
            if self.x is None:
                raise HookError(
                    f"{d} reads {d.hook_in!r}, which did not fire before {write_hook!r} in this forward pass, so its "
                    "features are unknown. A switch of the model turned that hook off inside the block, or the "
                    "architecture bypasses it; nothing was put in its place."
                )
            self.own, self.edited = self._encode(self.x)
        index = d.hooks_out.index(write_hook)
        own, edited = self.own[..., index, :], self.edited[..., index, :]
        if index == len(d.hooks_out) - 1:
            self.clear()
        return own, edited

    def _encode(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch n_out d_out"], Float[Tensor, "*batch n_out d_out"]]:
        d = self.dictionary
        pre = d.pre_acts(x)
        own = d.decode(d.activate(pre, x))
        # Copies: a hook may edit in place, also what autograd keeps for the backward pass.
        seen = self.pre_acts(pre.clone()).to(x)
        edited = d.decode(self.features(d.activate(seen, x).clone()).to(x))
        if d.has_skip:
            first = torch.zeros_like(own[..., :1, :])
            skip = torch.cat([d.skip(x)[..., None, :], first.expand_as(own[..., 1:, :])], -2)
            own, edited = own + skip, edited + skip
        return own, edited


@dataclass(eq=False)
class _Writer:
    """A write hook, with the dictionaries that write there.

    Attributes:
        name: The hook.
        point: Hook point of the error.
        keeps_error: Whether the error is added, or zero in its place.
        readers: The dictionaries.
        fired: Whether the hook fired since its block began.
    """

    name: str
    point: Any
    keeps_error: bool
    readers: list[_Reader]
    fired: bool = False

    def splice(self, real: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """Return what takes the place of the real output, in its dtype."""
        self.fired = True
        parts = [reader.outputs(self.name) for reader in self.readers]
        own = torch.stack([part[0] for part in parts]).sum(0) if len(parts) > 1 else parts[0][0]
        edited = torch.stack([part[1] for part in parts]).sum(0) if len(parts) > 1 else parts[0][1]
        if own.shape != real.shape:
            raise HookError(
                f"{self.name} carries {tuple(real.shape)}, its dictionary's input gives {tuple(own.shape)}: the two do "
                "not belong to the same forward pass"
            )
        error = real.to(own) - own if self.keeps_error else _zeros_after(real).to(own)
        return (edited + self.point(error)).to(real)


def _zeros_after(real: Tensor) -> Tensor:
    """Return zeros that hang on ``real`` with zero gradient, so that backward hooks on its hook point still fire."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=real.device), real, torch.zeros_like(real))


@contextlib.contextmanager
def attached(binding: Binding, *, error: bool = True) -> Iterator[HookedModel]:
    """Put every dictionary of a binding on its model's hook points for the length of a ``with`` block.

    For a dictionary at site ``s`` (``blocks.1.hook_mlp_out``, say) the model gets the hook points ``s.pre_acts`` and
    ``s.features`` (``[batch, pos, d_sae]``) and ``s.error`` (``[batch, pos, d_out]``), a cross-layer transcoder one
    error per write hook. They are in ``model.hook_dict`` and in caches, and every function of TransformerLens edits
    them. A dictionary's arithmetic, and so these activations, are float32 at least; the output has the model's dtype.

    The dictionary reads after all other hooks on its read hook, and writes before all other hooks on its write hook,
    also those added later: it sees the user's edits of its input; the user's hooks on the output see and edit the sum.

    Args:
        binding: A checked pair.
        error: Add what the dictionaries miss, so that the model's output stays. False: the reconstruction replaces the
            output, and the error points are there and hold zeros.

    Yields:
        The model. At the end, also after an exception, it is as before; hooks on the added points vanish with them,
        hooks that the block added to the model's own points stay.

    Raises:
        HookError: Dictionaries are attached to the model already (before anything is touched). In a forward pass: a
            read hook that did not fire before its write hook, or a write hook that its block did not reach.
    """
    model, dictionaries = binding.model, binding.dictionaries
    refuse_attached(model)
    hooks = model.hook_dict
    written = {hook: write_place(model, hooks, hook, dictionaries) for d in dictionaries for hook in d.hooks_out}
    inputs = [read_place(model, hooks, d) for d in dictionaries]
    wanted = [NewPoint(written[d.site].module, d.site, kind) for d in dictionaries for kind in ("pre_acts", "features")]
    wanted += [NewPoint(place.module, hook, "error") for hook, place in written.items()]
    with contextlib.ExitStack() as stack:
        stack.callback(_attached.discard, model)
        _attached.add(model)
        stack.enter_context(mlp_in_enabled(model, [d.hook_in for d in dictionaries]))
        points = stack.enter_context(added_hook_points(model, wanted))
        readers = [_Reader(d, points[f"{d.site}.pre_acts"], points[f"{d.site}.features"]) for d in dictionaries]
        writers = [
            _Writer(hook, points[f"{hook}.error"], error, [r for r in readers if hook in r.dictionary.hooks_out])
            for hook in written
        ]
        reads = [(r, stack.enter_context(reading(at, r.read))) for r, at in zip(readers, inputs, strict=True)]
        writes = [(w, stack.enter_context(writing(written[w.name], w.splice))) for w in writers]
        for layer, block in enumerate(model.blocks):
            here = [(r, pin) for r, pin in reads if r.dictionary.layer == layer]
            there = [(w, pin) for w, pin in writes if parse_hook(w.name).layer == layer]
            if here or there:
                stack.enter_context(_block_scope(block, here, there))
        yield model


@contextlib.contextmanager
def _block_scope(
    block: Any, reads: Iterable[tuple[_Reader, Pinned | None]], writes: Iterable[tuple[_Writer, Pinned]]
) -> Iterator[None]:
    """Forget the last pass when a block begins, and check at its end that its write hooks fired."""

    def begin(args: tuple[Any, ...]) -> None:
        for reader, pinned in reads:
            reader.clear()
            if pinned is not None:
                pinned.place()  # before the block: a bridge's norm asks for hooks before it calls its hook points
        for writer, _ in writes:
            writer.fired = False

    def end() -> None:
        silent = [writer.name for writer, pinned in writes if not (writer.fired or pinned.silenced)]
        if silent:
            raise HookError(
                f"{', '.join(silent)} did not fire although its block ran, so the dictionary there had no effect: the "
                "architecture bypasses that hook"
            )

    with around_forward(block, before=begin, after=end):
        yield


# ---------------------------------------------------------------------------------------------------- from a cache


def feature_acts(binding: Binding, cache: Cache) -> dict[str, Float[Tensor, "*batch d_sae"]]:
    """Return every dictionary's feature activations on the run that a cache holds, by site.

    Where the cache was made inside :func:`attached`, its ``<site>.features`` are returned as they are (edits included).
    Otherwise the dictionary encodes its input: the cached read hook, or the same value under another name (a bridge's
    alias; the residual stream before the MLP for ``hook_mlp_in``), or else the norm applied to what the cache has, with
    the cached denominator where there is one. A cache with ``rm.names_filter()`` is enough.

    Args:
        binding: A checked pair.
        cache: An ``ActivationCache`` or a dict, on any device, in any float dtype, with or without batch axis.

    Returns:
        Site to activations, ``[batch, pos, d_sae]`` (``[pos, d_sae]`` without batch axis), float32 at least, zero where
        a feature is inactive; without gradients.

    Raises:
        CacheError: Neither the features nor an input of a dictionary is in the cache; names them.
    """
    run = _CachedRun(binding.model, cache)
    found = {}
    with plain_tensors():
        for d in binding.dictionaries:
            features = run.entry(f"{d.site}.features", owner=d.site)
            if features is None:
                x = run.input_of(d).to(model_device(binding.model))
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                features = d.activate(d.pre_acts(x), x)
            found[d.site] = features.detach()
    return found


class _CachedRun:
    """What a cache knows of a run, under any of a hook point's names."""

    def __init__(self, model: HookedModel, cache: Cache) -> None:
        self.model, self.cache, self.keys = model, cache, set(cache.keys())
        self.hooks = model.hook_dict  # one look: a bridge builds it anew every time
        self.aliases: dict[int, list[str]] = {}
        for name, point in self.hooks.items():
            self.aliases.setdefault(id(point), []).append(name)

    def entry(self, name: str, *, owner: str | None = None) -> Tensor | None:
        """Return an entry by its name, or by any name of its hook point (of the hook point ``owner`` it belongs to)."""
        owner = owner or name
        names = self.aliases[id(self.hooks[owner])] if owner in self.hooks else []
        keys = (alias + name.removeprefix(owner) for alias in (owner, *names))
        return next((self.cache[key] for key in keys if key in self.keys), None)

    def input_of(self, d: Dictionary) -> Float[Tensor, "*batch d_in"]:
        """Return what a dictionary reads.

        Raises:
            CacheError: It is not in the cache, nor does it follow from what is.
        """
        kind, norm = read_kind(d.hook_in), self.model.blocks[d.layer].ln2
        x = self.entry(d.hook_in)
        if x is not None:
            return x.flatten(-2) if kind is Read.HEADS else x

        def first(*suffixes: str) -> Tensor | None:
            found = (self.entry(f"blocks.{d.layer}.{suffix}") for suffix in suffixes)
            return next((value for value in found if value is not None), None)

        x = first("mlp.hook_in", "ln2.hook_out") if kind is Read.NORM_OUTPUT else None
        if x is not None:
            return x
        resid = first("hook_mlp_in", "hook_resid_mid", "ln2.hook_in")
        if resid is None and f"blocks.{d.layer}.hook_resid_mid" not in self.hooks:
            resid = first("hook_resid_pre")  # attention and MLP in parallel
        normalized, scale = first("ln2.hook_normalized"), first("ln2.hook_scale")
        if kind in (Read.RESIDUAL, Read.MID) and resid is not None:
            return resid
        if kind is Read.NORM_OUTPUT and normalized is not None:
            return _run_norm(norm, normalized, {"hook_normalized": normalized}).output
        if kind in (Read.NORMALIZED, Read.NORM_OUTPUT) and resid is not None:
            run = _run_norm(norm, resid, {} if scale is None else {"hook_scale": scale})
            return run.normalized if kind is Read.NORMALIZED else run.output
        raise CacheError(
            f"the cache has neither '{d.site}.features' nor {d.hook_in!r} ({len(self.keys)} entries"
            f"{nearest(d.hook_in, self.keys)}), so the features of that dictionary are unknown; make it with "
            "model.run_with_cache(tokens, names_filter=rm.names_filter()), or with no names_filter at all"
        )


@dataclass(frozen=True)
class _NormRun:
    """What a norm gave: before, and after, its gain and bias."""

    normalized: Float[Tensor, "*batch d_in"]
    output: Float[Tensor, "*batch d_in"]


def _run_norm(norm: Any, x: Float[Tensor, "*batch d_in"], held: Mapping[str, Tensor]) -> _NormRun:
    """Run a norm on ``x`` with the named hook points held at cached values, unseen by the user's hooks."""
    parameter = next(iter(norm.parameters()), None)
    # The norm's device and dtype, but nothing coarser than what is given.
    like = x if parameter is None else x.to(parameter.device, torch.promote_types(x.dtype, parameter.dtype))
    seen: list[Tensor] = []
    points = [p for p in norm.modules() if hasattr(p, "add_hook") and hasattr(p, "fwd_hooks")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_norm_edits())
        stack.enter_context(suspended(points))
        stack.enter_context(clamped({getattr(norm, name): value for name, value in held.items()}))
        stack.enter_context(pinned_hook(norm.hook_normalized, seen.append, last=True))
        output = norm(like)
    return _NormRun(seen[-1], output)

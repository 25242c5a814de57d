"""Scoped hooks: the only place of circuit_lens that registers one.

A scope validates every name before it touches the model, checks at its end that every hook fired, and leaves nothing
behind, also when the forward pass raises. Hooks are added to the hook points themselves, as permanent ones, so that
``reset_hooks`` inside the scope (which TransformerLens calls at the end of ``run_with_cache``) cannot drop them, and
removed by handle, so that the user's own hooks stay, in their order.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuit_lens.errors import HookError, nearest
from circuit_lens.protocols import HookedModel

EditFunction = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Hook:
    """One hook: a name, and what to do with the activation there (return None to leave it).

    Attributes:
        name: Name of a hook point of the model.
        edit: Function of the activation; a returned tensor replaces it.
        first: Run before the hooks that are already there (default: after them).
        must_fire: Raise at the end of the scope when the hook point never fired.
    """

    name: str
    edit: EditFunction
    first: bool = False
    must_fire: bool = True


def hook_point(model: HookedModel, name: str) -> Any:
    """Return the hook point of that name.

    Raises:
        HookError: The model has no such hook point; names the nearest ones.
    """
    return hook_points(model, [name])[0]


def hook_points(model: HookedModel, names: Sequence[str]) -> list[Any]:
    """Return the hook points of the given names.

    One look at ``hook_dict`` for all of them: a TransformerBridge builds it anew at every look, in milliseconds a layer.

    Raises:
        HookError: The model has no such hook point; names the nearest ones.
    """
    hooks = model.hook_dict
    for name in names:
        if name not in hooks:
            raise HookError(
                f"unknown hook point {name!r}; the model has {len(hooks)}, such as "
                f"{', '.join(list(hooks)[:3])}{nearest(name, hooks)}. List them with sorted(model.hook_dict)."
            )
    return [hooks[name] for name in names]


def has_hook(model: HookedModel, name: str) -> bool:
    """Whether the model has a hook point of that name."""
    return name in model.hook_dict


@contextlib.contextmanager
def scoped_hooks(model: HookedModel, hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach hooks for the length of a ``with`` block.

    Raises:
        HookError: Unknown name (before anything is attached), or a hook that never fired (when the block ends well).
    """
    points = hook_points(model, [hook.name for hook in hooks])
    fired = [False] * len(hooks)
    handles: list[tuple[Any, Any]] = []
    try:
        for i, (hook, point) in enumerate(zip(hooks, points, strict=True)):
            handles.append((point, _add(point, hook, fired, i)))
        with mlp_in_enabled(model, [hook.name for hook in hooks]):
            yield
    finally:
        for point, handle in reversed(handles):
            _remove(point, handle)
    silent = [h.name for h, f in zip(hooks, fired, strict=True) if h.must_fire and not f]
    if silent:
        raise HookError(
            f"hook point(s) that never fired: {', '.join(silent)}. The model defines them but this forward pass did not "
            "reach them (a gated hook such as hook_result, or an architecture that bypasses them); use another hook."
        )


def _add(point: Any, hook: Hook, fired: list[bool], i: int) -> Any:
    def run(value: Any, hook: Any = None) -> Any:
        fired[i] = True
        return edit(value)

    edit = hook.edit
    point.add_hook(run, is_permanent=True, prepend=hook.first)
    return point.fwd_hooks[0 if hook.first else -1]


def _remove(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


@contextlib.contextmanager
def mlp_in_enabled(model: HookedModel, names: Iterable[str]) -> Iterator[None]:
    """Switch ``use_hook_mlp_in`` on while a hook on ``hook_mlp_in`` is in use, and restore the flag.

    Without the flag, ``hook_mlp_in`` never fires on either model class, without any error.
    """
    needed = any(name.endswith("hook_mlp_in") for name in names)
    before = bool(getattr(model.cfg, "use_hook_mlp_in", False))
    if not needed or before:
        yield
        return
    setter = getattr(model, "set_use_hook_mlp_in", None)
    if setter is None:
        raise HookError("the model has no hook_mlp_in switch (set_use_hook_mlp_in); use hook_resid_mid instead")
    try:
        setter(True)
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def user_hooks(model: HookedModel, fwd_hooks: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Attach TransformerLens-style ``(name or filter, fn(activation, hook=...))`` pairs for a ``with`` block.

    Raises:
        HookError: A name that the model lacks, or a filter that matches nothing.
    """
    pairs: list[tuple[Any, Any]] = []
    named = [selector for selector, _ in fwd_hooks if isinstance(selector, str)]
    points = dict(zip(named, hook_points(model, named), strict=True)) if named else {}
    for selector, function in fwd_hooks:
        if isinstance(selector, str):
            pairs.append((points[selector], function))
            continue
        matched = {id(p): p for n, p in model.hook_dict.items() if selector(n)}
        if not matched:
            raise HookError("a filter in fwd_hooks matches no hook point; it is called with names such as hook_embed")
        pairs.extend((p, function) for p in matched.values())
    handles: list[tuple[Any, Any]] = []
    try:
        for point, function in pairs:
            point.add_hook(function, is_permanent=True)
            handles.append((point, point.fwd_hooks[-1]))
        with mlp_in_enabled(model, named):
            yield
    finally:
        for point, handle in reversed(handles):
            _remove(point, handle)


@contextlib.contextmanager
def suspended(points: Iterable[Any]) -> Iterator[None]:
    """Silence every hook on the given hook points for a ``with`` block; they return in the same order.

    Used for passes that are ours alone: a probe of a single module, and the frozen model, in which the user's edits are
    constants that must not be made twice.
    """
    saved: list[tuple[Any, list[tuple[Any, Any]]]] = []
    try:
        for point in points:
            registered: OrderedDict[Any, Any]
            kinds = (point._forward_pre_hooks, point._forward_hooks, point._backward_pre_hooks, point._backward_hooks)
            for registered in kinds:
                saved.append((registered, list(registered.items())))
                registered.clear()
        yield
    finally:
        for registered, items in saved:
            registered.clear()
            registered.update(items)


def present_hooks(model: HookedModel) -> list[str]:
    """Return the names of the hook points that carry hooks now (the user's), for manifests."""
    seen: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if getattr(point, "fwd_hooks", None):
            seen.setdefault(id(point), name)
    return sorted(seen.values())


@contextlib.contextmanager
def quiet_norm_edits() -> Iterator[None]:
    """Hide TransformerBridge's notice that an edited norm is recomputed: freezing norms is what we are doing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
        yield


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global random state (torch, its GPUs where used, and Python's) when the block ends."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def hook_registry(model: HookedModel) -> dict[str, Any]:
    """Return the dict in which the model itself looks hook names up, so that new names can be added to it.

    A HookedTransformer's ``hook_dict`` is that dict. A TransformerBridge hands out a copy of its registry, and has no
    public way to add a name for a while; its registry attribute is used.
    """
    registry: Mapping[str, Any] = model.hook_dict
    if model.hook_dict is not registry or not isinstance(registry, dict):
        registry = getattr(model, "_hook_registry", None) or {}
    if not isinstance(registry, dict):
        raise HookError(f"{type(model).__name__} keeps no hook registry that names can be added to")
    return registry

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

    One look at ``hook_dict`` for all of them: a TransformerBridge builds it anew at every look, milliseconds a layer.

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


def refuse_split_inputs(model: HookedModel) -> None:
    """Raise HookError if attention reads one residual stream per head, which norms of one stream cannot describe."""
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(model.cfg, flag, False):
            raise HookError(
                f"the model has {flag} on, so each attention head has an input and a norm of its own; switch it off "
                f"with model.set_{flag}(False), make the cache (if one is given) again, and attribute then"
            )


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
    _require_fired([h.name for h, f in zip(hooks, fired, strict=True) if h.must_fire and not f])


def _require_fired(silent: Sequence[str]) -> None:
    if silent:
        raise HookError(
            f"hook point(s) that never fired: {', '.join(silent)}. The model defines them but this forward pass did "
            "not reach them (a gated hook such as hook_result, or an architecture that bypasses them); use another."
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
        HookError: A name that the model lacks or that never fired, or a filter that matches nothing.
    """
    fired: set[str] = set()

    def noting(name: str, function: Any) -> Any:
        def run(value: Any, hook: Any) -> Any:
            fired.add(name)
            return function(value, hook=hook)

        return run

    pairs: list[tuple[Any, Any]] = []
    named = [selector for selector, _ in fwd_hooks if isinstance(selector, str)]
    points = dict(zip(named, hook_points(model, named), strict=True)) if named else {}
    for selector, function in fwd_hooks:
        if isinstance(selector, str):
            pairs.append((points[selector], noting(selector, function)))
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
    _require_fired([name for name in named if name not in fired])


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
    """Return the names of the hook points that carry hooks of the user now, for manifests."""
    seen: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if any(not isinstance(handle.user_hook, Pinned) for handle in getattr(point, "fwd_hooks", ())):
            seen.setdefault(id(point), name)
    return sorted(seen.values())


def carries_hooks(model: Any) -> bool:
    """Whether any module of the model carries a forward hook now: the user's, of torch or of hook points, or ours."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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


class Pinned:
    """A hook that is the last on a module, or the first, whatever else was added: it is placed anew before each call.

    torch looks its list of forward hooks up after the module's own forward, so what a forward pre-hook places counts.
    On a hook point it is an ordinary permanent hook, since a bridge's norms build no graph where they see no hook.
    """

    def __init__(self, module: Any, edit: EditFunction, *, last: bool) -> None:
        self.module, self.edit, self.last = module, edit, last
        self.handle: Any = None
        self.before = module.register_forward_pre_hook(lambda module, args: self.place())

    def __call__(self, value: Any, hook: Any = None) -> Any:
        """Run as a hook of TransformerLens."""
        return self.edit(value)

    @property
    def silenced(self) -> bool:
        """Whether the module's hooks are :func:`suspended` now."""
        return self.before.id not in self.module._forward_pre_hooks

    def place(self) -> None:
        """Put the hook in its place; what is silenced stays so."""
        if self.silenced:
            return
        self._take_away()
        if hasattr(self.module, "add_hook"):
            self.module.add_hook(self, is_permanent=True, prepend=not self.last)
            self.handle = self.module.fwd_hooks[-1 if self.last else 0]
        else:
            self.handle = self.module.register_forward_hook(self._on_output, prepend=not self.last)

    def remove(self) -> None:
        """Take the hook off the module for good."""
        self.before.remove()
        self._take_away()

    def _on_output(self, module: Any, args: Any, output: Any) -> Any:
        return self.edit(output)

    def _take_away(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None and hasattr(self.module, "add_hook"):
            _remove(self.module, handle)
        elif handle is not None:
            handle.remove()


@contextlib.contextmanager
def pinned_hook(module: Any, edit: EditFunction, *, last: bool) -> Iterator[Pinned]:
    """Attach a hook to a hook point (or any module's output) that runs after, or before, every other hook on it.

    That holds for hooks added later too, and after ``reset_hooks(including_permanent=True)``. ``edit`` is a function of
    the activation; a returned tensor replaces it.
    """
    pinned = Pinned(module, edit, last=last)
    try:
        pinned.place()
        yield pinned
    finally:
        pinned.remove()


@contextlib.contextmanager
def around_forward(
    module: Any,
    *,
    before: Callable[[tuple[Any, ...]], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Call ``before(positional arguments)`` and ``after()`` around every forward of a module, which they cannot change.

    ``after`` is not called when the forward raises.
    """
    handles = []
    try:
        if before is not None:
            handles.append(module.register_forward_pre_hook(lambda module, args: before(args)))
        if after is not None:
            handles.append(module.register_forward_hook(lambda module, args, output: after()))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class NewPoint:
    """A hook point to add: ``<name>.<kind>``, a submodule of ``owner``, the hook point or module called ``name``."""

    owner: Any
    name: str
    kind: str

    @property
    def full_name(self) -> str:
        """Name of the new hook point."""
        return f"{self.name}.{self.kind}"


@contextlib.contextmanager
def added_hook_points(model: HookedModel, wanted: Iterable[NewPoint]) -> Iterator[dict[str, Any]]:
    """Give a model more hook points for a ``with`` block; the caller calls them.

    They are in the model's own tables of names, so that caches, ``hook_dict``, ``add_hook``, ``hooks`` and
    ``run_with_hooks`` treat them like any other. Where the owner has several names, its new point has one per name. At
    the end they vanish with every hook on them.

    Yields:
        The new hook points by name.

    Raises:
        HookError: The model has such a hook point already (before anything is added).
    """
    from transformer_lens.hook_points import HookPoint

    wanted, present = list(wanted), dict(model.hook_dict)
    aliases: dict[int, list[str]] = {}
    for alias, point in present.items():
        aliases.setdefault(id(point), []).append(alias)
    taken = [new.full_name for new in wanted if new.full_name in present or new.kind in new.owner._modules]
    if taken:
        raise HookError(f"the model has hook point(s) already that are to be added: {', '.join(taken)}")
    points, names = {}, {}
    for new in wanted:
        points[new.full_name] = point = HookPoint()
        point.name = new.full_name
        names |= {f"{name}.{new.kind}": point for name in (new.name, *aliases.get(id(new.owner), ()))}
    try:
        for new in wanted:
            new.owner.add_module(new.kind, points[new.full_name])
        for table in _name_tables(model):
            table.update(names)
        yield points
    finally:
        for table in _name_tables(model):
            for name in [name for name in names if table.get(name) is names[name]]:
                del table[name]
        for new in wanted:
            if new.owner._modules.get(new.kind) is points[new.full_name]:
                delattr(new.owner, new.kind)


def _name_tables(model: HookedModel) -> Iterator[dict[str, Any]]:
    yield hook_registry(model)
    modules = vars(model).get("mod_dict")  # add_hook of a HookedTransformer looks names up here
    if isinstance(modules, dict):
        yield modules


@contextlib.contextmanager
def clamped(values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Hold hook points at given values for a ``with`` block, for probing a module whose hooks are ``suspended``."""

    def hold(value: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, output: value.to(output)

    handles = []
    try:
        for point, value in values.items():
            handles.append(point.register_forward_hook(hold(value)))
        yield
    finally:
        for handle in handles:
            handle.remove()

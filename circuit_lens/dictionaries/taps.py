"""Where a dictionary reads and writes on a model: hook points where there are such, the modules themselves otherwise.

A dictionary reads after all other hooks on its read hook and writes before all other hooks on its write hook, so that
it sees the user's edits of its input, and the user's hooks on the output see what it wrote. An autoencoder, whose two
hooks are one, reads and then writes after all others: the user's edits there are its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from circuit_lens.dictionaries.points import Read, Write, parse_hook, read_kind, write_kind
from circuit_lens.errors import HookError, nearest
from circuit_lens.hooks import EditFunction, Pinned, around_forward, pinned_hook
from circuit_lens.protocols import Dictionary, HookedModel


@dataclass(frozen=True)
class ReadPlace:
    """Where a dictionary's input is taken: the output of a module (a hook point, or a norm), or an MLP's input."""

    module: Any
    of: str = "output"
    heads: bool = False


@dataclass(frozen=True)
class WritePlace:
    """The hook point or module whose output a dictionary writes.

    ``heads``: it carries one vector per head, which dictionaries see side by side. ``last``: it is written after every
    other hook, by an autoencoder, which reads there too.
    """

    module: Any
    heads: bool = False
    last: bool = False


def read_place(model: HookedModel, hooks: Mapping[str, Any], dictionary: Dictionary) -> ReadPlace:
    """Return where a dictionary's input is taken.

    Raises:
        HookError: The model has no such place.
    """
    name = dictionary.hook_in
    if name in hooks:
        return ReadPlace(hooks[name], heads=read_kind(name) is Read.HEADS)
    if read_kind(name) is not Read.NORM_OUTPUT:
        raise HookError(f"{dictionary} reads {name!r}, which the model has not{nearest(name, hooks)}")
    # HookedTransformer has no hook point for what its MLP reads, nor for a norm's output.
    block, suffix = model.blocks[dictionary.layer], parse_hook(name).suffix
    return ReadPlace(block.mlp, of="input") if suffix == "mlp.hook_in" else ReadPlace(block.ln2)


def write_place(
    model: HookedModel, hooks: Mapping[str, Any], name: str, dictionaries: Iterable[Dictionary]
) -> WritePlace:
    """Return where a write hook's value is changed, by the given dictionaries of the model.

    Raises:
        HookError: The model has no such place.
    """
    kind = write_kind(name)
    if name in hooks:
        return WritePlace(hooks[name], kind is Write.HEADS, any(d.hook_in == name for d in dictionaries))
    if kind is not Write.MLP_RAW:
        raise HookError(f"a dictionary writes {name!r}, which the model has not{nearest(name, hooks)}")
    # HookedTransformer has no hook point between an MLP and the norm after it.
    return WritePlace(model.blocks[parse_hook(name).layer].mlp)


@contextlib.contextmanager
def reading(place: ReadPlace, see: Callable[[Tensor], None]) -> Iterator[Pinned | None]:
    """Call ``see`` with what comes by; yields its hook, where that is one among others."""
    if place.of == "input":
        with around_forward(place.module, before=lambda args: see(args[0])):
            yield None
    else:
        seen = (lambda value: see(value.flatten(-2))) if place.heads else see
        with pinned_hook(place.module, seen, last=True) as pinned:
            yield pinned


@contextlib.contextmanager
def writing(place: WritePlace, edit: EditFunction) -> Iterator[Pinned]:
    """Let ``edit`` change what comes by, before every other hook, or after them all."""

    def per_head(value: Tensor) -> Tensor | None:
        new = edit(value.flatten(-2))
        return None if new is None else new.view(value.shape)

    with pinned_hook(place.module, per_head if place.heads else edit, last=place.last) as pinned:
        yield pinned

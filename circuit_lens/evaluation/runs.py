"""Runs of a model that evaluation needs: as it is, with dictionaries in place of outputs, with outputs ablated.

A dictionary's output stands at the hook that it *writes*. At one hook point reads come before writes: an SAE, which
writes where it reads, reads what the model computed, the user's edits included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.dictionaries.binding import Binding
from circuit_lens.dictionaries.taps import read_place, reading, write_place, writing
from circuit_lens.errors import HookError
from circuit_lens.hooks import mlp_in_enabled
from circuit_lens.protocols import Dictionary
from circuit_lens.running import forward_batch

Edit = Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos width"]]


@dataclass(frozen=True, eq=False)
class CleanRun:
    """The model as it is.

    Attributes:
        logits: Its logits.
        inputs: What each dictionary reads, by site, in the dtype of its arithmetic; heads side by side.
        outputs: What each write hook carries, by hook; heads side by side.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    inputs: Mapping[str, Float[Tensor, "batch pos _d_in"]]
    outputs: Mapping[str, Float[Tensor, "batch pos _d_out"]]


def written_hooks(dictionaries: Sequence[Dictionary]) -> dict[str, int]:
    """Return every hook that a dictionary writes, with its layer, in the order of layers."""
    found = {h: layer for d in dictionaries for h, layer in zip(d.hooks_out, d.out_layers, strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def encode(
    d: Dictionary, x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch n_out d_out"]]:
    """Return a dictionary's activations and its outputs, skip path included."""
    acts = d.activate(d.pre_acts(x), x)
    outputs = d.decode(acts)
    if d.has_skip:
        first = outputs[..., :1, :] + d.skip(x)[..., None, :]
        outputs = torch.cat([first, outputs[..., 1:, :]], -2)
    return acts, outputs


class Stage:
    """A binding with the places where its dictionaries read and write, looked up once."""

    def __init__(self, binding: Binding) -> None:
        self.model, hooks = binding.model, binding.model.hook_dict
        self.dictionaries = binding.dictionaries
        self.layers = written_hooks(binding.dictionaries)
        self.hooks = tuple(self.layers)
        self._reads = {d.site: read_place(self.model, hooks, d) for d in binding.dictionaries}
        self._writes = {hook: write_place(self.model, hooks, hook, binding.dictionaries) for hook in self.hooks}

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Switch on what the dictionaries' read hooks need, for all runs of a ``with`` block."""
        with mlp_in_enabled(self.model, [d.hook_in for d in self.dictionaries]):
            yield

    def clean(self, tokens: Int[Tensor, "batch pos"]) -> CleanRun:
        """Run the model as it is, and keep what dictionaries read and should reconstruct."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(site: str) -> Callable[[Tensor], None]:
            return lambda x: inputs.__setitem__(site, _as_read(x))

        def see(hook: str) -> Edit:
            def edit(value: Tensor) -> Tensor:
                outputs[hook] = value.clone()
                return value

            return edit

        reads = [(d, keep(d.site)) for d in self.dictionaries]
        logits = self._run(tokens, reads, {hook: see(hook) for hook in self.hooks})
        return CleanRun(logits, inputs, outputs)

    def replaced(
        self,
        tokens: Int[Tensor, "batch pos"],
        dictionaries: Sequence[Dictionary],
        hooks: Collection[str],
        kept: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model with the dictionaries' joint output at some of their write hooks; the others stay the model's.

        Each dictionary reads the stream that the replacements before it made.
        """
        readers = {d.site: _Reader(d) for d in dictionaries if any(hook in hooks for hook in d.hooks_out)}

        def put(hook: str) -> Edit:
            here = [reader for reader in readers.values() if hook in reader.dictionary.hooks_out]
            return lambda value: _keeping(value, _total([reader.output(hook) for reader in here]), kept)

        reads = [(reader.dictionary, reader.read) for reader in readers.values()]
        return self._run(tokens, reads, {hook: put(hook) for hook in hooks})

    def ablated(
        self,
        tokens: Int[Tensor, "batch pos"],
        values: Mapping[str, Float[Tensor, "_d_out"]],
        kept: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model with constants at some write hooks."""

        def put(hook: str) -> Edit:
            return lambda value: _keeping(value, values[hook].to(value).expand_as(value), kept)

        return self._run(tokens, [], {hook: put(hook) for hook in values})

    def _run(
        self,
        tokens: Int[Tensor, "batch pos"],
        reads: Sequence[tuple[Dictionary, Callable[[Tensor], None]]],
        writes: Mapping[str, Edit],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        fired: set[str] = set()

        def noting(name: str, function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
            def run(value: Tensor) -> Any:
                fired.add(name)
                return function(value)

            return run

        with contextlib.ExitStack() as stack:
            for d, see in reads:
                stack.enter_context(reading(self._reads[d.site], noting(d.hook_in, see)))
            for hook, edit in writes.items():
                stack.enter_context(writing(self._writes[hook], noting(hook, edit)))
            logits = forward_batch(self.model, tokens)
        silent = sorted({*(d.hook_in for d, _ in reads), *writes} - fired)
        if silent:
            raise HookError(f"hook point(s) that never fired: {', '.join(silent)}: the architecture bypasses them")
        return logits


class _Reader:
    """A dictionary in a run: what it read, and its outputs, computed once."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.x: Tensor | None = None
        self.outputs: Tensor | None = None

    def read(self, x: Float[Tensor, "batch pos d_in"]) -> None:
        self.x, self.outputs = _as_read(x), None

    def output(self, hook: str) -> Float[Tensor, "batch pos d_out"]:
        d = self.dictionary
        if self.x is None:
            raise HookError(f"{d} reads {d.hook_in!r}, which did not fire before {hook!r}: its features are unknown")
        if self.outputs is None:
            self.outputs = encode(d, self.x)[1]
        return self.outputs[..., d.hooks_out.index(hook), :]


def _as_read(x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _total(parts: Sequence[Float[Tensor, "batch pos d_out"]]) -> Float[Tensor, "batch pos d_out"]:
    return torch.stack([*parts]).sum(0) if len(parts) > 1 else parts[0]


def _keeping(
    value: Float[Tensor, "batch pos width"], new: Tensor, kept: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos width"]:
    if new.shape != value.shape:
        raise HookError(
            f"a dictionary gives {tuple(new.shape)} for a hook that carries {tuple(value.shape)}: it belongs elsewhere"
        )
    return torch.where(kept.to(value.device)[..., None], value, new.to(value))

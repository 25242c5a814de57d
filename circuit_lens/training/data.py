"""Activations as batches that are the same wherever the activations lie, in memory or in files.

The batches of a pass over the data are slices of one random order of all tokens, drawn from the seed. What a step gets
depends on the seed, the batch's size and the step's number alone: not on whether the activations lie in memory or in
files, nor on how much memory there is, nor on where an iteration starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import ConsistencyError, DictionaryError, HookError, nearest
from circuit_lens.training.data_shards import FilePart

# Tokens that are summed at once: fixed, so that sums do not depend on where the activations lie.
_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Activations in memory."""

    values: Mapping[str, Float[Tensor, "token _"]]
    n_tokens: int

    def gather(self, index: Int[Tensor, "chosen"], hooks: Sequence[str]) -> dict[str, Float[Tensor, "chosen _"]]:
        """Return the activations of some tokens, in float32."""
        return {name: self.values[name][index].float() for name in hooks}


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean of each coordinate, and the root mean square of all coordinates around it (1 where nothing varies)."""

    mean: Float[Tensor, "width"]
    scale: float


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """Activations of several hook points at the same tokens.

    Attributes:
        hooks: Names of the hook points.
        widths: Size of each one's activations.
        n_tokens: Tokens.
        parts: Where they lie, in the order of the text.
        memory: Bytes that batches may take up while they are read.
        digest: Tells these data from others.
    """

    hooks: tuple[str, ...]
    widths: Mapping[str, int]
    n_tokens: int
    parts: Sequence[MemoryPart | FilePart]
    memory: int
    digest: str

    def __repr__(self) -> str:
        hooks = ", ".join(f"{name} ({width})" for name, width in self.widths.items())
        return f"ActivationStore({self.n_tokens:,} tokens at {hooks})"

    @staticmethod
    def from_tensors(values: Mapping[str, Float[Tensor, "token _"]], *, memory: int = 2**30) -> ActivationStore:
        """Return a store of tensors ``[token, width]`` by the names of their hooks.

        Raises:
            DictionaryError: No tensors, of different tokens, or not ``[token, width]``.
            ConsistencyError: NaN or infinity.
        """
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if not shapes or any(len(s) != 2 for s in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
            raise DictionaryError(f"activations must be [token, width] of the same tokens; got {shapes}")
        digest = hashlib.sha256()
        for name, value in values.items():
            require_finite(name, value)
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().float().contiguous().cpu().numpy().tobytes())
        n = next(iter(shapes.values()))[0]
        held = MemoryPart({name: value.detach() for name, value in values.items()}, n)
        widths = {name: shape[1] for name, shape in shapes.items()}
        return ActivationStore(tuple(values), widths, n, [held], memory, digest.hexdigest()[:32])

    @staticmethod
    def of_pair(inputs: Float[Tensor, "token d_in"], outputs: Float[Tensor, "token d_out"]) -> ActivationStore:
        """Return a store of two tensors, ``"inputs"`` and ``"outputs"``."""
        return ActivationStore.from_tensors({"inputs": inputs, "outputs": outputs})

    def fingerprint(self) -> str:
        """Return a text that tells these data from others."""
        return self.digest

    def steps_per_pass(self, batch_size: int) -> int:
        """Return the whole batches in one pass over the data.

        Raises:
            DictionaryError: Not even one.
        """
        if batch_size < 1 or self.n_tokens < batch_size:
            raise DictionaryError(
                f"{self.n_tokens} tokens are fewer than one batch of {batch_size}; give more text or a smaller batch"
            )
        return self.n_tokens // batch_size

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0, *, hooks: Sequence[str] | None = None
    ) -> Iterator[dict[str, Float[Tensor, "batch _"]]]:
        """Yield shuffled batches without end, in float32, from step ``start_step`` on.

        A pass leaves out what is less than a batch. ``hooks``: those that are wanted (default: all).

        Raises:
            DictionaryError: Fewer tokens than one batch, or memory for less than a batch.
            HookError: A hook that is not in the store.
        """
        names = self._names(hooks)
        per_pass, at_once = self.steps_per_pass(batch_size), self._batches_at_once(batch_size, names)
        if start_step < 0:
            raise DictionaryError(f"start_step is {start_step}; steps are counted from 0")
        return self._batches(batch_size, seed, start_step, names, per_pass, at_once)

    def _batches(
        self, size: int, seed: int, start: int, names: Sequence[str], per_pass: int, at_once: int
    ) -> Iterator[dict[str, Float[Tensor, "batch _"]]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(start // per_pass):
            torch.randperm(self.n_tokens, generator=generator)
        first = start % per_pass
        while True:
            order = torch.randperm(self.n_tokens, generator=generator)
            for step in range(first, per_pass, at_once):
                last = min(step + at_once, per_pass)
                block = self.gather(order[step * size : last * size], names)
                for i in range(last - step):
                    yield {name: value[i * size : (i + 1) * size] for name, value in block.items()}
            first = 0

    def in_order(
        self, block: int = _BLOCK, *, hooks: Sequence[str] | None = None
    ) -> Iterator[dict[str, Float[Tensor, "block _"]]]:
        """Yield every token once, in the order of the text, ``block`` of them at a time."""
        names = self._names(hooks)
        for start in range(0, self.n_tokens, block):
            yield self.gather(torch.arange(start, min(start + block, self.n_tokens)), names)

    def gather(self, index: Int[Tensor, "chosen"], hooks: Sequence[str]) -> dict[str, Float[Tensor, "chosen _"]]:
        """Return the activations of the tokens with these numbers, in float32.

        Files are read in their own order, whatever the order asked for.
        """
        if len(self.parts) == 1:
            return self.parts[0].gather(index, hooks)
        found = {name: torch.empty(len(index), self.widths[name]) for name in hooks}
        sorted_index, places = index.sort()
        start = 0
        for part in self.parts:
            a, b = torch.searchsorted(sorted_index, torch.tensor([start, start + part.n_tokens])).tolist()
            if a < b:
                for name, value in part.gather(sorted_index[a:b] - start, hooks).items():
                    found[name][places[a:b]] = value
            start += part.n_tokens
        return found

    def moments(self, hook: str) -> Moments:
        """Return the mean and the scale of one hook's activations, summed in float64."""
        total = torch.zeros(self.widths[self._names([hook])[0]], dtype=torch.float64)
        for block in self.in_order(hooks=[hook]):
            total += block[hook].double().sum(0)
        mean, square = total / self.n_tokens, 0.0
        for block in self.in_order(hooks=[hook]):
            square += float((block[hook].double() - mean).square().sum())
        variance = square / (self.n_tokens * len(mean))
        return Moments(mean.float(), variance**0.5 if variance > 0 else 1.0)

    def single(self, hook: str) -> SingleSource:
        """Return the activations of one hook, for an SAE."""
        return SingleSource(self, self._names([hook])[0])

    def pair(self, hook_in: str, hook_out: str) -> PairSource:
        """Return the activations of two hooks, for a transcoder."""
        return PairSource(self, *self._names([hook_in, hook_out]))

    def layers(self, hook_in: str, hook_out: str, layers: Sequence[int]) -> LayersSource:
        """Return the activations of all layers' inputs and outputs, for a cross-layer transcoder.

        ``hook_in`` and ``hook_out`` hold ``{layer}``.

        Raises:
            HookError: One of them is not in the store.
            DictionaryError: Layers of different widths.
        """
        names_in, names_out = (self._names([name.format(layer=n) for n in layers]) for name in (hook_in, hook_out))
        for names in (names_in, names_out):
            if len({self.widths[name] for name in names}) != 1:
                raise DictionaryError(f"layers of different widths have no common dictionary: {names}")
        return LayersSource(self, tuple(names_in), tuple(names_out))

    def _names(self, hooks: Sequence[str] | None) -> list[str]:
        names = list(self.hooks if hooks is None else hooks)
        for name in names:
            if name not in self.hooks:
                raise HookError(f"the activations of {name!r} were not collected; there are {', '.join(self.hooks)}"
                                f"{nearest(name, self.hooks)}")  # fmt: skip
        return names

    def _batches_at_once(self, batch_size: int, names: Sequence[str]) -> int:
        """Batches that are read together: as many as the memory holds twice, the second time sorted."""
        if all(isinstance(part, MemoryPart) for part in self.parts):
            return 1
        one = batch_size * sum(self.widths[name] for name in names) * 4
        if 2 * one > self.memory:
            raise DictionaryError(
                f"a batch of {batch_size} tokens takes {one} bytes, and twice that is read into {self.memory}; give "
                "more memory or a smaller batch"
            )
        return self.memory // (2 * one)


@dataclass(frozen=True, eq=False)
class SingleSource:
    """One hook of a store: batches are tensors."""

    store: ActivationStore
    hook: str

    def batches(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Float[Tensor, "batch width"]]:
        """Yield activations; see :meth:`ActivationStore.batches`."""
        found = self.store.batches(batch_size, seed, start_step, hooks=[self.hook])
        return (batch[self.hook] for batch in found)


@dataclass(frozen=True, eq=False)
class PairSource:
    """Two hooks of a store: batches are ``(inputs, outputs)``."""

    store: ActivationStore
    hook_in: str
    hook_out: str

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]]:
        """Yield inputs and outputs; see :meth:`ActivationStore.batches`."""
        found = self.store.batches(batch_size, seed, start_step, hooks=[self.hook_in, self.hook_out])
        return ((batch[self.hook_in], batch[self.hook_out]) for batch in found)


@dataclass(frozen=True, eq=False)
class LayersSource:
    """The inputs and outputs of all layers: batches are ``(inputs, outputs)``, each ``[token, n_layers, width]``.

    ``device``: where batches are, and a cross-layer transcoder is trained.
    """

    store: ActivationStore
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    device: torch.device | str = "cpu"

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "token n_layers d_in"], Float[Tensor, "token n_layers d_out"]]]:
        """Yield inputs and outputs; see :meth:`ActivationStore.batches`."""
        found = self.store.batches(batch_size, seed, start_step, hooks=[*self.hooks_in, *self.hooks_out])
        return (self._stacked(batch) for batch in found)

    def in_order(
        self, block: int = _BLOCK
    ) -> Iterator[tuple[Float[Tensor, "token n_layers d_in"], Float[Tensor, "token n_layers d_out"]]]:
        """Yield every token once, in the order of the text."""
        found = self.store.in_order(block, hooks=[*self.hooks_in, *self.hooks_out])
        return (self._stacked(batch) for batch in found)

    def _stacked(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack([batch[name] for name in names], 1) for names in (self.hooks_in, self.hooks_out))
        return x.to(self.device), y.to(self.device)

    def fingerprint(self) -> str:
        """Return a text that tells these data from others."""
        return f"{self.store.fingerprint()} {' '.join(self.hooks_in + self.hooks_out)}"


def require_finite(name: str, value: Tensor) -> None:
    """Raise ConsistencyError for activations that are NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise ConsistencyError(
            f"{name}: activations must be finite; there are NaN or infinite ones. Run the model in a wider dtype, or "
            "keep bfloat16 rather than float16"
        )

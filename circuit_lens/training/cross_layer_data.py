"""What a cross-layer transcoder is trained on: batches of all layers' MLP inputs and outputs, in a repeatable order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.training.activations import MlpActivations

# Batches whose statistics normalise the data.
STATISTICS_BATCHES = 16


@runtime_checkable
class ActivationSource(Protocol):
    """Anything that yields batches of MLP inputs and outputs of all layers, for ever, the same for the same seed.

    A source may also have a method ``fingerprint() -> str`` that tells its data from others'; without one, data are
    told apart by their first batch.
    """

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "token n_layers d_in"], Float[Tensor, "token n_layers d_out"]]]:
        """Yield ``(inputs, outputs)`` of the steps ``start_step``, ``start_step + 1``, ... without end.

        What step n yields depends on ``batch_size``, ``seed`` and n alone, never on ``start_step``: that is what makes
        an interrupted training exact to resume.
        """
        ...


class InMemoryActivations:
    """Activations that fit into memory, reshuffled in every pass over them; a pass drops what is less than a batch.

    Args:
        inputs, outputs: One tensor per layer, ``[token, d_in]`` and ``[token, d_out]``, of the same tokens.

    Raises:
        ValueError: No layers, tensors that do not fit together, NaN or infinity.
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError(
                f"inputs and outputs must be one tensor per layer; given {len(self.inputs)} and {len(self.outputs)}"
            )
        shapes = [tuple(x.shape) for x in self.inputs], [tuple(y.shape) for y in self.outputs]
        alike = all(len(set(group)) == 1 and len(group[0]) == 2 for group in shapes)
        if not alike or shapes[0][0][0] != shapes[1][0][0]:
            raise ValueError(
                "inputs and outputs must be [token, width] with the same tokens and widths in all layers; given "
                f"{shapes[0]} and {shapes[1]}"
            )
        for layer, (x, y) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if not (x.isfinite().all() and y.isfinite().all()):
                raise ValueError(f"activations must be finite; there are NaN or infinite ones in layer {layer}")

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "token n_layers d_in"], Float[Tensor, "token n_layers d_out"]]]:
        """Yield batches as :class:`ActivationSource` says.

        Raises:
            ValueError: Fewer tokens than one batch.
        """
        per_pass = len(self) // batch_size
        if per_pass < 1:
            raise ValueError(f"{len(self)} tokens are fewer than one batch of {batch_size}; give more text")
        step = start_step
        while True:
            order = _shuffled(len(self), seed, step // per_pass)
            for at in range(step % per_pass, per_pass):
                rows = order[at * batch_size : (at + 1) * batch_size]
                yield (
                    torch.stack([x[rows].float() for x in self.inputs], 1),
                    torch.stack([y[rows].float() for y in self.outputs], 1),
                )
                step += 1

    def fingerprint(self) -> str:
        """Return a hash of every activation."""
        digest = hashlib.sha256()
        for tensor in (*self.inputs, *self.outputs):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _shuffled(n: int, seed: int, number: int) -> Tensor:
    """Return the order of the tokens in one pass over the data; passes and seeds are independent of each other."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator)


def as_source(data: Any) -> ActivationSource:
    """Return a source of batches for what the user gave.

    Args:
        data: A source, or what :func:`circuit_lens.training.mlp_activations` returns, all layers in order.

    Raises:
        TypeError: Neither.
    """
    if isinstance(data, ActivationSource):
        return data
    if isinstance(data, Sequence) and data and all(isinstance(layer, MlpActivations) for layer in data):
        return InMemoryActivations([layer.inputs for layer in data], [layer.outputs for layer in data])
    raise TypeError(
        f"{type(data).__name__} gives no activations; give what mlp_activations returns, InMemoryActivations(inputs, "
        "outputs) with one tensor per layer, or an object with batches(batch_size, seed, start_step)"
    )


def data_fingerprint(source: ActivationSource, batch_size: int, seed: int) -> str:
    """Return what tells the data of a source from others': its own ``fingerprint()``, or a hash of its first batch."""
    own: Any = getattr(source, "fingerprint", None)
    if callable(own):
        return str(own())
    digest = hashlib.sha256()
    for tensor in next(iter(source.batches(batch_size, seed, 0))):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return f"first batch {digest.hexdigest()[:16]}"


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """Mean of each coordinate and root mean square around it, per layer: the network is trained on (x - mean) / scale.

    Attributes:
        input_mean, output_mean: Per layer and coordinate.
        input_scale, output_scale: One number per layer, 1 where a layer is constant.
    """

    input_mean: Float[Tensor, "n_layers d_in"]
    input_scale: Float[Tensor, "n_layers"]
    output_mean: Float[Tensor, "n_layers d_out"]
    output_scale: Float[Tensor, "n_layers"]

    def inputs(self, x: Float[Tensor, "token n_layers d_in"]) -> Float[Tensor, "token n_layers d_in"]:
        """Normalise a batch of inputs."""
        return (x - self.input_mean) / self.input_scale[:, None]

    def outputs(self, y: Float[Tensor, "token n_layers d_out"]) -> Float[Tensor, "token n_layers d_out"]:
        """Normalise a batch of outputs."""
        return (y - self.output_mean) / self.output_scale[:, None]


def measure_normalisation(
    source: ActivationSource, batch_size: int, seed: int, n_batches: int = STATISTICS_BATCHES
) -> Normalisation:
    """Return the statistics of a source's first batches, summed in float64.

    Raises:
        ValueError: Batches that are not ``[token, n_layers, width]`` of the same tokens, or not finite.
    """
    sums: list[Tensor] = []
    count = 0
    for pair in islice(source.batches(batch_size, seed, 0), n_batches):
        check_batch(*pair)
        parts = [part for t in pair for part in (t.double().sum(0), t.double().pow(2).sum(0))]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
        count += len(pair[0])
    if not sums:
        raise ValueError("the source of activations yielded no batch")
    x, xx, y, yy = (part / count for part in sums)

    def scale(mean: Tensor, square: Tensor) -> Tensor:
        variance = (square - mean.pow(2)).mean(-1).clamp_min(0)
        # What is left of a constant after cancellation is rounding, not scale.
        constant = variance <= 1e-10 * square.mean(-1)
        return torch.where(constant, 1.0, variance.sqrt()).float()

    return Normalisation(x.float(), scale(x, xx), y.float(), scale(y, yy))


def check_batch(inputs: Tensor, outputs: Tensor) -> None:
    """Raise ValueError for a batch that cannot train."""
    if inputs.dim() != 3 or outputs.dim() != 3 or inputs.shape[:2] != outputs.shape[:2]:
        raise ValueError(
            "a batch must be inputs [token, n_layers, d_in] and outputs [token, n_layers, d_out] of the same tokens; "
            f"given {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    if not (inputs.isfinite().all() and outputs.isfinite().all()):
        raise ValueError("activations must be finite; there are NaN or infinite ones in a batch")

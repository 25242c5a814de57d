"""Weights of one layer of a cross-layer transcoder, and its two linear maps, chunk by chunk.

The maps are the same code whether the weights lie in memory or on disk: no step holds more than a chunk of a matrix in
the dtype of the computation, and a decoder is touched only where a feature is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import DictionaryError

CHUNK_NUMBERS = 2**23
"""Numbers of a matrix that are handled at once: 32 MiB in float32."""


@runtime_checkable
class Matrices(Protocol):
    """The two large matrices of a layer, wherever they are."""

    d_in: int
    d_sae: int
    n_out: int
    d_out: int
    dtype: torch.dtype

    def encoder_columns(self, start: int, stop: int) -> Float[Tensor, "d_in n"]:
        """Return the encoder of a range of features."""
        ...

    def encoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of features in ascending order, none twice."""
        ...

    def decoder_slab(self, start: int, stop: int) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder of a range of features."""
        ...

    def decoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of features in ascending order, none twice."""
        ...

    def moved(self, dtype: torch.dtype | None, device: torch.device | str | None) -> Matrices:
        """Return the same matrices in another dtype or on another device."""
        ...


class InMemory:
    """Matrices that are tensors.

    Args:
        W_enc: ``[d_in, d_sae]``, any strides.
        W_dec: ``[d_sae, n_out, d_out]``.

    Raises:
        DictionaryError: Shapes that do not fit together.
    """

    def __init__(self, W_enc: Tensor, W_dec: Tensor) -> None:
        if W_enc.ndim != 2 or W_dec.ndim != 3 or W_enc.shape[1] != W_dec.shape[0]:
            raise DictionaryError(
                f"W_enc {list(W_enc.shape)} and W_dec {list(W_dec.shape)} do not fit together; they must be "
                "[d_in, d_sae] and [d_sae, layers from its own to the last, d_out]"
            )
        self.W_enc, self.W_dec = W_enc.detach(), W_dec.detach()
        (self.d_in, self.d_sae), (_, self.n_out, self.d_out) = W_enc.shape, W_dec.shape
        self.dtype = W_dec.dtype

    def encoder_columns(self, start: int, stop: int) -> Float[Tensor, "d_in n"]:
        """Return the encoder of a range of features, a view."""
        return self.W_enc[:, start:stop]

    def encoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of the given features."""
        return self.W_enc[:, index.to(self.W_enc.device)].T

    def decoder_slab(self, start: int, stop: int) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder of a range of features, a view."""
        return self.W_dec[start:stop]

    def decoder_rows(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the given features."""
        return self.W_dec[index.to(self.W_dec.device)]

    def moved(self, dtype: torch.dtype | None, device: torch.device | str | None) -> InMemory:
        """Return the same matrices in another dtype or on another device."""
        return InMemory(self.W_enc.to(device=device, dtype=dtype), self.W_dec.to(device=device, dtype=dtype))


# ------------------------------------------------------------------------------------------------------- activation


def activate(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "d_sae"] | None, k: int | None
) -> Float[Tensor, "*batch d_sae"]:
    """Return ReLU activations: where a threshold is exceeded, if there is one; the ``k`` largest, if there is a k."""
    acts = pre_acts.relu()
    if threshold is not None:
        acts = acts * (pre_acts > threshold.to(pre_acts))
    return acts if k is None else keep_largest(acts, k)


def keep_largest(acts: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Return ``acts`` with all but the ``k`` largest of every row set to zero; among equal ones the first are kept."""
    least = acts.topk(k, -1).values[..., -1:]
    kept = acts >= least
    if bool((kept.sum(-1) > k).any()):
        above, tied = acts > least, acts == least
        room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
        kept = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
    return acts * kept


# ----------------------------------------------------------------------------------------------------- linear maps


class _Linear(torch.autograd.Function):
    """A linear map of the last axes, given as two functions: itself and its transpose.

    Autograd would keep every chunk of the weights until the backward pass; this keeps none and streams them again.
    """

    @staticmethod
    def forward(x: Tensor, apply: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        apply, transposed = ctx.maps
        return _Linear.apply(grads[0], transposed, apply), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        apply, transposed = ctx.maps
        return _Linear.apply(tangents[0], apply, transposed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _Linear.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0


def encode(weights: Matrices, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """Return ``x @ W_enc`` in the dtype of ``x``."""

    def apply(x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], weights.d_sae)
        for start, stop in _chunks(weights.d_sae, weights.d_in):
            out[..., start:stop] = x @ weights.encoder_columns(start, stop).to(x)
        return out

    def transposed(grad: Tensor) -> Tensor:
        out = grad.new_zeros(*grad.shape[:-1], weights.d_in)
        for start, stop in _chunks(weights.d_sae, weights.d_in):
            out = out + grad.narrow(-1, start, stop - start) @ weights.encoder_columns(start, stop).to(grad).T
        return out

    return _Linear.apply(x, apply, transposed)


def decode(weights: Matrices, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
    """Return ``acts @ W_dec`` for every output, in the dtype of ``acts``, from the rows of active features alone.

    The derivative exists for every feature, active or not: a backward pass streams the whole decoder.
    """
    width = weights.n_out * weights.d_out

    def apply(acts: Tensor) -> Tensor:
        flat = acts.reshape(-1, weights.d_sae)
        out = flat.new_zeros(len(flat), width)
        active = (flat != 0).any(0).nonzero()[:, 0]
        for part in active.split(max(1, CHUNK_NUMBERS // width)):
            out += flat[:, part] @ weights.decoder_rows(part).to(flat).flatten(1)
        return out.reshape(*acts.shape[:-1], weights.n_out, weights.d_out)

    def transposed(grad: Tensor) -> Tensor:
        flat = grad.reshape(-1, width)
        out = flat.new_empty(len(flat), weights.d_sae)
        for start, stop in _chunks(weights.d_sae, width):
            out[:, start:stop] = flat @ weights.decoder_slab(start, stop).to(flat).flatten(1).T
        return out.reshape(*grad.shape[:-2], weights.d_sae)

    return _Linear.apply(acts, apply, transposed)


def _chunks(d_sae: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_NUMBERS // width)
    for start in range(0, d_sae, step):
        yield start, min(start + step, d_sae)

"""One layer of a cross-layer transcoder (see `circuit_lens.dictionaries.cross_layer`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.cross_layer_weights import (
    Matrices,
    activate,
    decode,
    encode,
)
from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.dictionaries.points import parse_hook, read_kind, write_kind
from circuit_lens.errors import DictionaryError

Activation = Literal["relu", "jumprelu", "topk"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "jumprelu", "topk")


@dataclass(frozen=True, eq=False)
class LayerParts:
    """What one layer is made of; checked by `CrossLayer`.

    Attributes:
        matrices: Encoder and decoder.
        b_enc: ``[d_sae]``.
        b_dec: ``[d_out]``, the bias of the layer's own MLP output.
        threshold: ``[d_sae]``, for JumpReLU.
        W_skip: ``[d_in, d_out]``, from what the layer reads to its own MLP output.
        hook_in: What it reads.
        hooks_out: What it writes, its own layer first.
        activation: One of `ACTIVATIONS`.
        k: Features kept per position, for TopK.
        joint: Name of the set.
    """

    matrices: Matrices
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    W_skip: Tensor | None
    hook_in: str
    hooks_out: tuple[str, ...]
    activation: Activation
    k: int | None
    joint: str


class CrossLayer:
    """One layer of a cross-layer transcoder, a `circuit_lens.protocols.Dictionary`.

    ``pre = x @ W_enc + b_enc``; ``acts`` is ``relu(pre)``, for JumpReLU only where ``pre`` exceeds ``threshold``, for
    TopK only the ``k`` largest of a position; output ``o`` gets ``acts @ W_dec[:, o]``. The first output, the layer's
    own, also gets ``b_dec`` and ``x @ W_skip``: so the biases of a set's layers sum to one ``b_dec`` per MLP output.

    Raises:
        DictionaryError: Weights that do not fit together or hold no finite floats, hooks that cannot be attributed, an
            activation without what it needs.
    """

    tangent = False

    def __init__(self, parts: LayerParts) -> None:
        self.parts, self.joint = parts, parts.joint
        self.hook_in, self.hooks_out = parts.hook_in, parts.hooks_out
        self.site = self.hooks_out[0]
        self.layer = parse_hook(self.hook_in).layer
        self.out_layers = tuple(parse_hook(hook).layer for hook in self.hooks_out)
        self.kind = f"cross_layer_{'skip_' * self.has_skip}{parts.activation}"
        m = parts.matrices
        self.d_in, self.d_sae, self.d_out = m.d_in, m.d_sae, m.d_out
        _check_layer(parts)
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        more = f" to layer {self.out_layers[-1]}" if len(self.out_layers) > 1 else ""
        return f"{self.kind}({self.hook_in} -> {self.site}{more}, {self.d_sae} features)"

    @property
    def has_skip(self) -> bool:
        """Whether the layer has a linear skip path."""
        return self.parts.W_skip is not None

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return pre-activations in the dtype of ``x``."""
        return encode(self.parts.matrices, x) + self.parts.b_enc.to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of the pre-activations."""
        return activate(pre_acts, self.parts.threshold, self.parts.k)

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of the given features."""
        unique, inverse = self._distinct(index)
        return self.parts.matrices.encoder_rows(unique).to(dtype)[inverse]

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return the encoder biases of the given features."""
        return self.parts.b_enc[index.to(self.parts.b_enc.device)].to(dtype)

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the given features; equal features are read once."""
        unique, inverse = self._distinct(index)
        return self.parts.matrices.decoder_rows(unique).to(dtype)[inverse]

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return ``b_dec`` for the layer's own output and zeros for the later ones."""
        bias = self.parts.b_dec.new_zeros(len(self.hooks_out), self.d_out, dtype=dtype)
        bias[0] = self.parts.b_dec
        return bias

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return what the layer adds to every output, decoder bias included, skip path excluded."""
        return decode(self.parts.matrices, acts) + self.decoder_bias(acts.dtype).to(acts)

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the skip path's output, zeros where there is none."""
        W_skip = self.parts.W_skip
        return x.new_zeros(*x.shape[:-1], self.d_out) if W_skip is None else x @ W_skip.to(x)

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None:
        """Return the skip path as a matrix, None where there is none."""
        return None if self.parts.W_skip is None else self.parts.W_skip.to(dtype)

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return the pre-activation above which each feature is active; None for TopK, where its rivals decide."""
        parts = self.parts
        if parts.k is not None:
            return None
        return torch.zeros_like(parts.b_enc) if parts.threshold is None else parts.threshold.clamp_min(0)

    def fingerprint(self) -> str:
        """Return a short hash of the weights: the small ones, and the rows of features in evenly spaced windows.

        The same in memory and on disk, in either layout; it reads a few megabytes at most.
        """
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.parts)
        return self._fingerprint

    def _distinct(self, index: Int[Tensor, "n"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "n"]]:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.d_sae:
            bad = int(index.min()) if int(index.min()) < 0 else int(index.max())
            raise DictionaryError(f"{self} has no feature {bad}; valid are 0 to {self.d_sae - 1}")
        return torch.unique(index.to(self.parts.b_enc.device), return_inverse=True)


def _check_layer(parts: LayerParts) -> None:
    m, name = parts.matrices, f"the cross-layer transcoder at {parts.hook_in}"
    read_kind(parts.hook_in)
    for hook in parts.hooks_out:
        write_kind(hook)
    if m.n_out != len(parts.hooks_out):
        raise DictionaryError(
            f"{name} has decoders for {m.n_out} outputs, from its own layer to the last there are "
            f"{len(parts.hooks_out)}: W_dec must be {[m.d_sae, len(parts.hooks_out), m.d_out]}"
        )
    shapes = {"b_enc": (m.d_sae,), "b_dec": (m.d_out,), "threshold": (m.d_sae,), "W_skip": (m.d_in, m.d_out)}
    for field, shape in shapes.items():
        tensor = getattr(parts, field)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise DictionaryError(f"{field} of {name} has shape {tuple(tensor.shape)}, it must be {shape}")
        if tensor is not None:
            refuse_bad_numbers(f"{field} of {name}", tensor)
    if parts.activation not in ACTIVATIONS:
        raise DictionaryError(f"activation {parts.activation!r} is unknown; valid are {', '.join(ACTIVATIONS)}")
    needs = {"threshold": parts.activation == "jumprelu", "k": parts.activation == "topk"}
    for field, needed in needs.items():
        if (getattr(parts, field) is not None) != needed:
            raise DictionaryError(
                f"activation {parts.activation!r} {'needs' if needed else 'has no'} {field}=; threshold is for "
                "'jumprelu', k for 'topk'"
            )
    if parts.k is not None and not 1 <= parts.k <= m.d_sae:
        raise DictionaryError(f"k={parts.k} for {m.d_sae} features per layer; valid are 1 to {m.d_sae}")


def _fingerprint(parts: LayerParts) -> str:
    m, digest = parts.matrices, hashlib.sha256()
    small = {name: getattr(parts, name) for name in ("b_enc", "b_dec", "threshold", "W_skip")}
    digest.update(f"{parts.activation} {parts.k} {parts.hook_in} {parts.hooks_out}".encode())
    digest.update(f"{m.d_in} {m.d_sae} {m.n_out} {m.d_out}".encode())
    width, windows = 8, 16
    starts = sorted({round(i * max(0, m.d_sae - width) / (windows - 1)) for i in range(windows)})
    sampled: list[tuple[str, Tensor]] = [(n, t) for n, t in small.items() if t is not None]
    for start in starts:
        stop = min(start + width, m.d_sae)
        sampled += [("W_enc", m.encoder_columns(start, stop).T), ("W_dec", m.decoder_slab(start, stop))]
    for name, tensor in sampled:
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

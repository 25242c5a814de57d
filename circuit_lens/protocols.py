"""What circuit_lens needs of the libraries under it, as Protocols; nothing upstream is subclassed.

Axis names used everywhere: ``n_pos`` positions, ``d_model`` residual width, ``d_in``/``d_out`` widths a dictionary
reads and writes, ``d_sae`` features of a dictionary, ``n_out`` layers it writes to, ``n_heads``, ``d_head``,
``d_vocab``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

HookFunction = Callable[..., Any]


@runtime_checkable
class HookedModel(Protocol):
    """A HookedTransformer or TransformerBridge: named hook points, blocks, norms and an unembedding."""

    cfg: Any
    blocks: Any
    ln_final: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    @property
    def W_U(self) -> Tensor: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Cache(Protocol):
    """An ``ActivationCache``, which is no Mapping, or a dict."""

    def keys(self) -> Any:
        """Return the names."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...


@runtime_checkable
class Dictionary(Protocol):
    """A sparse dictionary on hook points: reads one, writes one or more.

    ``pre = x @ W_enc + b_enc``, ``acts = activation(pre)``, and the contribution to output ``o`` is
    ``acts @ W_dec[:, o] + b_dec[o]``, for the first output plus ``skip(x)``. A transcoder has one output, the MLP
    output of its layer; a layer of a cross-layer transcoder has one for every layer from its own; an SAE writes where
    it reads.

    Attributes:
        site: Name of the dictionary, unique on its model; the (first) hook it writes to.
        joint: Name of the set of dictionaries it reconstructs its outputs with: those of one set may write at the same
            hook, and it is their sum that stands for the output. Its own site where it stands alone.
        tangent: Whether its encoder rows depend on the point at which they are taken (``at``).
        layer: Layer it reads at.
        hook_in: Hook point it reads.
        hooks_out: Hook points it writes, ``n_out`` of them, in the order of ``out_layers``.
        out_layers: Layers it writes to.
        d_in, d_out, d_sae: Widths.
        kind: Short name of its architecture for messages and manifests.
    """

    site: str
    joint: str
    tangent: bool
    layer: int
    hook_in: str
    hooks_out: tuple[str, ...]
    out_layers: tuple[int, ...]
    d_in: int
    d_out: int
    d_sae: int
    kind: str

    @property
    def has_skip(self) -> bool: ...

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]: ...

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return activations of pre-activations; ``x`` is what was read, on which gates depend."""
        ...

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the rows whose product with what is read, plus ``encoder_bias``, is the pre-activation.

        ``at``: what is read where each feature is a target; a ``tangent`` dictionary needs it, others ignore it.
        """
        ...

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]: ...

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]: ...

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]: ...

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Reconstruct every output, decoder bias included, skip path excluded."""
        ...

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the linear skip path, which writes to the first output; zeros where there is none."""
        ...

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None: ...

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return the pre-activation above which each feature is active, 0 for ReLU; None where none decides it (TopK,
        neurons)."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the weights, for manifests."""
        ...

"""Per-layer transcoders that keep the k largest features of a position, for which SAELens has no class."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.points import parse_hook, read_kind, write_kind
from circuit_lens.dictionaries.saelens import fingerprint
from circuit_lens.errors import DictionaryError


class TopKTranscoder:
    """A TopK transcoder, a `circuit_lens.protocols.Dictionary`.

    ``pre = x @ W_enc + b_enc``; ``acts`` are the ``k`` largest of ``relu(pre)`` at a position, all others 0 (Gao et al.
    2024, section 2.3; a negative one is never active); the output is ``acts @ W_dec + b_dec``, plus ``x @ W_skip.T``
    where there is a skip path.

    Args:
        W_enc: ``[d_in, d_sae]``, any strides.
        W_dec: ``[d_sae, d_out]``.
        b_enc: ``[d_sae]``.
        b_dec: ``[d_out]``.
        k: Features kept.
        hook_name: What it reads, ``blocks.<layer>.<hook>``.
        hook_name_out: What it writes.
        W_skip: ``[d_out, d_in]``.
        source: Where the weights come from.

    Raises:
        DictionaryError: Shapes that do not fit together, a ``k`` outside 1..d_sae, hooks that cannot be attributed.
    """

    kind = "topk_transcoder"
    tangent = False

    def __init__(
        self,
        *,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        k: int,
        hook_name: str,
        hook_name_out: str,
        W_skip: Tensor | None = None,
        source: str = "",
    ) -> None:
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = W_enc, W_dec, b_enc, b_dec
        self.W_skip, self.k, self.source = W_skip, k, source
        read_kind(hook_name)
        write_kind(hook_name_out)
        self.hook_in, self.hooks_out = hook_name, (hook_name_out,)
        self.site = self.joint = hook_name_out
        self.layer, self.out_layers = parse_hook(hook_name).layer, (parse_hook(hook_name_out).layer,)
        if self.out_layers[0] != self.layer:
            raise DictionaryError(f"a transcoder reads and writes one layer, not {hook_name!r} and {hook_name_out!r}")
        self.d_in, self.d_sae = W_enc.shape
        self.d_out = W_dec.shape[1]
        for name, tensor, shape in (
            ("W_dec", W_dec, (self.d_sae, self.d_out)),
            ("b_enc", b_enc, (self.d_sae,)),
            ("b_dec", b_dec, (self.d_out,)),
            ("W_skip", W_skip, (self.d_out, self.d_in)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise DictionaryError(f"{name} of {self.site!r} has shape {tuple(tensor.shape)}, it must be {shape}")
        if not 1 <= k <= self.d_sae:
            raise DictionaryError(f"k = {k} for {self.site!r}; valid are 1 to its {self.d_sae} features")
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"{self.kind}({self.hook_in} -> {self.site}, {self.d_sae} features, k = {self.k})"

    @property
    def has_skip(self) -> bool:
        """Whether the dictionary has a linear skip path."""
        return self.W_skip is not None

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return pre-activations in the dtype of ``x``."""
        return x @ self.W_enc.to(x) + self.b_enc.to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return the ``k`` largest activations of every position, zeros elsewhere."""
        best = pre_acts.relu().topk(self.k, -1)
        return torch.zeros_like(pre_acts).scatter(-1, best.indices, best.values)

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of the given features."""
        return self.W_enc[:, index].T.to(dtype)

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return the encoder biases of the given features."""
        return self.b_enc[index].to(dtype)

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the given features (one output)."""
        return self.W_dec[index].to(dtype)[:, None]

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return the decoder bias (one output)."""
        return self.b_dec.to(dtype)[None]

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return the reconstruction, decoder bias included, skip path excluded."""
        return (acts @ self.W_dec.to(acts) + self.b_dec.to(acts))[..., None, :]

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the skip path's output, zeros where there is none."""
        return x.new_zeros(*x.shape[:-1], self.d_out) if self.W_skip is None else x @ self.W_skip.to(x).T

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None:
        """Return the skip path as a matrix, None where there is none."""
        return None if self.W_skip is None else self.W_skip.T.to(dtype)

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return None: whether a feature is active depends on the others at its position."""
        return None

    def fingerprint(self) -> str:
        """Return a short hash of the weights and of k."""
        if self._fingerprint is None:
            weights = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
            weights |= {"k": torch.tensor(float(self.k))} | ({} if self.W_skip is None else {"W_skip": self.W_skip})
            self._fingerprint = fingerprint(weights)
        return self._fingerprint

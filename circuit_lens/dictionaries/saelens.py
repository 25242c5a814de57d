"""SAELens transcoders as they come from ``SAE.from_pretrained`` or ``SAE.load_from_disk``, as Dictionaries.

The weights are read, never copied or changed. The arithmetic is ours rather than the module's ``encode`` and
``decode``: those cast inputs to the module's configured dtype (a module after ``.double()`` still casts to float32)
and leave out the skip path. That both agree is part of the tests.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.dictionaries.points import check_transcoder_hooks, parse_hook
from circuit_lens.errors import DictionaryError

ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
# Published sets whose declared hook_mlp_in means the norm's output, as their Hugging Face hook says.
_NORM_OUTPUT_MODULES = ("pre_feedforward_layernorm.output", "post_attention_layernorm.output")


class SaelensTranscoder:
    """A SAELens transcoder: reads the MLP's input, writes the MLP's output (Dunefsky et al. 2024, section 3).

    ``pre = x @ W_enc + b_enc``; ``acts = relu(pre)``, or ``pre`` where it exceeds ``threshold`` (JumpReLU); the
    output is ``acts @ W_dec + b_dec``, plus ``x @ W_skip.T`` for a skip transcoder (Paulo et al. 2025).

    Args:
        module: The SAELens module.

    Raises:
        DictionaryError: An architecture, normalisation, reshaping or hook that cannot be attributed, with the reason.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kind = architecture_of(module)
        if self.kind not in ARCHITECTURES:
            raise DictionaryError(f"a SAELens {self.kind!r} module is no transcoder; valid: {', '.join(ARCHITECTURES)}")
        _refuse_stateful(module)
        metadata = module.cfg.metadata
        name_in, name_out = metadata.hook_name, metadata.hook_name_out
        if not name_in or not name_out:
            raise DictionaryError(
                f"the {self.kind} names no input or output hook (hook_name={name_in!r}, hook_name_out={name_out!r}); "
                "set cfg.metadata.hook_name and cfg.metadata.hook_name_out"
            )
        self.hook_in = _declared_input(name_in, metadata.hf_hook_name)
        self.hooks_out = (name_out,)
        self.site = self.joint = name_out
        self.tangent = False
        check_transcoder_hooks(self.hook_in, (name_out,))
        self.layer = parse_hook(self.hook_in).layer
        self.out_layers = (parse_hook(name_out).layer,)
        if self.out_layers[0] != self.layer:
            raise DictionaryError(
                f"a transcoder reads and writes one layer; this one reads {self.hook_in!r} and writes {name_out!r}"
            )
        self.d_in, self.d_sae = (int(n) for n in module.W_enc.shape)
        self.d_out = int(module.W_dec.shape[1])
        if module.W_dec.shape[0] != self.d_sae or module.b_enc.shape != (self.d_sae,):
            raise DictionaryError(
                f"weights of {name_out!r} do not fit together: W_enc {tuple(module.W_enc.shape)}, W_dec "
                f"{tuple(module.W_dec.shape)}, b_enc {tuple(module.b_enc.shape)}"
            )
        for name, shape in (
            ("b_dec", (self.d_out,)),
            ("threshold", (self.d_sae,)),
            ("W_skip", (self.d_out, self.d_in)),
        ):
            weight = getattr(module, name, None)
            if weight is not None and tuple(weight.shape) != shape:
                raise DictionaryError(f"{name} of {name_out!r} has shape {tuple(weight.shape)}, it must be {shape}")
        for name in _WEIGHTS:
            if (weight := getattr(module, name, None)) is not None:
                refuse_bad_numbers(f"{name} of {name_out!r}", weight.detach())
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"{self.kind}({self.hook_in} -> {self.site}, {self.d_sae} features)"

    @property
    def has_skip(self) -> bool:
        """Whether the dictionary has a linear skip path."""
        return getattr(self.module, "W_skip", None) is not None

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return pre-activations in the dtype of ``x``."""
        return x @ self.module.W_enc.to(x) + self.module.b_enc.to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of the pre-activations."""
        acts = pre_acts.relu()
        threshold = getattr(self.module, "threshold", None)
        return acts if threshold is None else acts * (pre_acts > threshold.to(pre_acts))

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of the given features."""
        return self.module.W_enc.detach()[:, index].T.to(dtype)

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return the encoder biases of the given features."""
        return self.module.b_enc.detach()[index].to(dtype)

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the given features (one output)."""
        return self.module.W_dec.detach()[index].to(dtype)[:, None]

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return the decoder bias (one output)."""
        return self.module.b_dec.detach().to(dtype)[None]

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return the reconstruction, decoder bias included, skip path excluded."""
        return (acts @ self.module.W_dec.to(acts) + self.module.b_dec.to(acts))[..., None, :]

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the skip path's output, zeros where there is none."""
        if not self.has_skip:
            return x.new_zeros(*x.shape[:-1], self.d_out)
        return x @ self.module.W_skip.to(x).T

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None:
        """Return the skip path as a matrix, None where there is none."""
        return self.module.W_skip.detach().T.to(dtype) if self.has_skip else None

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return the pre-activation above which each feature is active."""
        threshold = getattr(self.module, "threshold", None)
        return self.module.b_enc.new_zeros(self.d_sae) if threshold is None else threshold.detach().clamp_min(0)

    def fingerprint(self) -> str:
        """Return a short hash of the weights."""
        if self._fingerprint is None:
            weights = {n: getattr(self.module, n, None) for n in _WEIGHTS}
            self._fingerprint = fingerprint({n: w for n, w in weights.items() if w is not None})
        return self._fingerprint


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return a short hash of named tensors: shapes, evenly spaced values, and the sum of those that are not huge.

    Sampling keeps it fast for gigabytes of weights; a change of scale, order, processing or training shows.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        huge = flat.numel() > 2**24
        sample = flat[:: max(1, flat.numel() // (65_536 if huge else 4_096))]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
        if not huge:
            total = flat.sum(dtype=torch.float64 if flat.device.type == "cpu" else torch.float32)
            digest.update(f"{float(total):.6e}".encode())
    return digest.hexdigest()[:16]


def architecture_of(module: Any) -> str:
    """Return the name under which SAELens knows a module's class."""
    architecture = module.cfg.architecture
    return str(architecture() if callable(architecture) else architecture)


def _refuse_stateful(module: Any) -> None:
    normalize = getattr(module.cfg, "normalize_activations", "none")
    if normalize not in (None, "none"):
        raise DictionaryError(
            f"normalize_activations={normalize!r} makes the encoder depend on the whole input, so it is not one linear "
            "row per feature; fold the normalisation into the weights and set it to 'none'"
        )
    for flag in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if getattr(module.cfg, flag, False):
            raise DictionaryError(
                f"{flag}=True is not defined for transcoders: the encoder would not be W_enc and b_enc"
            )
    reshape = getattr(module.cfg, "reshape_activations", "none")
    if reshape not in (None, "none"):
        raise DictionaryError(f"reshape_activations={reshape!r} is not supported for transcoders; it must be 'none'")


def _declared_input(hook_name: str, hf_hook_name: str | None) -> str:
    point = parse_hook(hook_name)
    if point.suffix == "hook_mlp_in" and hf_hook_name and hf_hook_name.endswith(_NORM_OUTPUT_MODULES):
        return f"blocks.{point.layer}.mlp.hook_in"
    return hook_name

"""SAELens' sparse autoencoders as Dictionaries: they read a hook point and write the same one.

As with transcoders the weights are read, never copied or changed, and the arithmetic is ours: SAELens' ``encode`` keeps
state between calls where heads are flattened, and casts inputs to the module's configured dtype. That both agree is
part of the tests. Standard (Bricken et al. 2023), gated (Rajamanoharan et al. 2024a), JumpReLU (2024b), TopK (Gao et
al. 2024) and AbsTopK autoencoders.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.dictionaries.points import SAE_HOOKS, Write, parse_hook, write_kind
from circuit_lens.dictionaries.saelens import architecture_of, fingerprint
from circuit_lens.errors import DictionaryError

ARCHITECTURES = ("standard", "jumprelu", "topk", "abstopk", "gated")
_REFUSED = {
    "temporal": "its encoder attends over positions, so no feature is one linear row",
    "matching_pursuit": "its encoder is a search, not one linear row per feature",
}
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "r_mag", "b_mag")


class SaelensSae:
    """A SAELens autoencoder at a hook point of the residual stream, of attention, or at the MLP's output.

    ``pre = (x - b_dec) @ W_enc + b_enc`` (``b_dec`` where the configuration applies it to the input), and the
    reconstruction is ``acts @ W_dec + b_dec``. TopK keeps the ``k`` largest pre-activations that are positive, AbsTopK
    the ``k`` largest by absolute value, signs kept; both scale by decoder norms where the configuration does, as
    ``fold_W_dec_norm`` would. A gated autoencoder's gate is a mask: its pre-activation is the magnitude's,
    ``exp(r_mag) * (x' @ W_enc) + b_mag``. At ``attn.hook_z`` heads are laid side by side.

    Args:
        module: The SAELens module.

    Raises:
        DictionaryError: An architecture, normalisation or hook that cannot be attributed, with the reason.
    """

    tangent = False
    has_skip = False

    def __init__(self, module: Any) -> None:
        self.module = module
        self.kind = architecture_of(module)
        if self.kind not in ARCHITECTURES:
            reason = _REFUSED.get(self.kind, "it is not known")
            raise DictionaryError(
                f"a SAELens {self.kind!r} autoencoder cannot be attributed here: {reason}; valid are "
                f"{', '.join(ARCHITECTURES)}"
            )
        name = module.cfg.metadata.hook_name
        if not name:
            raise DictionaryError(f"the {self.kind} SAE names no hook; set cfg.metadata.hook_name")
        out = module.cfg.metadata.hook_name_out
        if out and out != name:
            raise DictionaryError(
                f"the {self.kind} SAE reads {name!r} and writes {out!r}; an SAE writes where it reads. A module that "
                "maps one to the other is a transcoder: build it as one"
            )
        point = parse_hook(name)
        if point.suffix not in SAE_HOOKS:
            raise DictionaryError(
                f"an SAE at {name!r} cannot be attributed; it may stand at {', '.join(SAE_HOOKS)} of a block"
            )
        _refuse_settings(module, write_kind(name))
        self.hook_in = self.site = self.joint = name
        self.hooks_out, self.layer, self.out_layers = (name,), point.layer, (point.layer,)
        self.d_in, self.d_sae = (int(n) for n in module.W_enc.shape)
        self.d_out = self.d_in
        self._check_shapes()
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"{self.kind}({self.site}, {self.d_sae} features)"

    def _check_shapes(self) -> None:
        shapes = {"W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}
        per_feature = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}
        shapes |= dict.fromkeys(per_feature.get(self.kind, ("b_enc",)), (self.d_sae,))
        for name, shape in shapes.items():
            weight = getattr(self.module, name, None)
            if weight is None or tuple(weight.shape) != shape:
                given = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
                raise DictionaryError(f"{name} of the {self.kind} SAE at {self.site!r} is {given}, it must be {shape}")
        k = getattr(self.module.cfg, "k", None)
        if self.kind in ("topk", "abstopk") and not 0 < int(k or 0) <= self.d_sae:
            raise DictionaryError(f"k of the {self.kind} SAE at {self.site!r} is {k}; it has {self.d_sae} features")
        for name in _WEIGHTS:
            if (weight := getattr(self.module, name, None)) is not None:
                refuse_bad_numbers(f"{name} of the {self.kind} SAE at {self.site!r}", weight.detach())

    @property
    def _scale(self) -> Float[Tensor, "d_sae"] | None:
        """What pre-activations are multiplied by, and decoder rows divided by; None for 1."""
        if self.kind == "gated":
            return self.module.r_mag.detach().exp()
        if getattr(self.module.cfg, "rescale_acts_by_decoder_norm", False):
            return self.module.W_dec.detach().norm(dim=-1)
        return None

    @property
    def _folds(self) -> bool:
        """Whether decoder rows are divided by the scale."""
        return self.kind != "gated" and self._scale is not None

    def _bias(self, dtype: torch.dtype) -> Float[Tensor, "d_sae"]:
        """Return what the pre-activations of a zero input are."""
        m = self.module
        bias = (m.b_mag if self.kind == "gated" else m.b_enc).detach().to(dtype)
        scale = self._scale
        if scale is not None and self.kind != "gated":
            bias = bias * scale.to(dtype)
        return bias - self._shift(dtype) * (1.0 if scale is None else scale.to(dtype))

    def _shift(self, dtype: torch.dtype) -> Float[Tensor, "d_sae"] | float:
        """Return what the decoder bias, taken off the input, takes off before any scale."""
        m = self.module
        return m.b_dec.detach().to(dtype) @ m.W_enc.detach().to(dtype) if m.cfg.apply_b_dec_to_input else 0.0

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return pre-activations in the dtype of ``x``."""
        scale = self._scale
        pre = x @ self.module.W_enc.to(x)
        return (pre if scale is None else pre * scale.to(x)) + self._bias(x.dtype).to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations of the pre-activations."""
        m = self.module
        match self.kind:
            case "jumprelu":
                return pre_acts.relu() * (pre_acts > m.threshold.to(pre_acts))
            case "topk":
                return _keep(pre_acts, pre_acts, int(m.cfg.k)).relu()
            case "abstopk":
                return _keep(pre_acts, pre_acts.abs(), int(m.cfg.k))
            case "gated":
                linear = (pre_acts.detach() - m.b_mag.detach().to(pre_acts)) / m.r_mag.detach().exp().to(pre_acts)
                return pre_acts.relu() * (linear + m.b_gate.to(pre_acts) > 0)
        return pre_acts.relu()

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of the given features."""
        rows, scale = self.module.W_enc.detach()[:, index].T.to(dtype), self._scale
        return rows if scale is None else rows * scale[index, None].to(dtype)

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return the encoder biases of the given features, the decoder bias' share included."""
        return self._bias(dtype)[index]

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the given features (one output)."""
        rows, scale = self.module.W_dec.detach()[index].to(dtype), self._scale
        if self._folds and scale is not None:
            rows = rows / scale[index, None].to(dtype)
        return rows[:, None]

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return the decoder bias (one output)."""
        return self.module.b_dec.detach().to(dtype)[None]

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return the reconstruction, decoder bias included."""
        scale = self._scale
        if self._folds and scale is not None:
            acts = acts / scale.to(acts)
        return (acts @ self.module.W_dec.to(acts) + self.module.b_dec.to(acts))[..., None, :]

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return zeros: an SAE has no skip path."""
        return torch.zeros_like(x)

    def skip_matrix(self, dtype: torch.dtype) -> None:
        """Return None: an SAE has no skip path."""
        return

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return the pre-activation above which each feature is active; None where it is no single number."""
        match self.kind:
            case "topk" | "abstopk":
                return None
            case "jumprelu":
                return self.module.threshold.detach().clamp_min(0)
            case "gated":
                m = self.module
                return (m.b_mag.detach() - m.b_gate.detach() * m.r_mag.detach().exp()).clamp_min(0)
        return self.module.b_enc.new_zeros(self.d_sae)

    def fingerprint(self) -> str:
        """Return a short hash of the weights."""
        if self._fingerprint is None:
            weights = {name: getattr(self.module, name, None) for name in _WEIGHTS}
            self._fingerprint = fingerprint({name: w for name, w in weights.items() if w is not None})
        return self._fingerprint


def _keep(values: Tensor, by: Tensor, k: int) -> Tensor:
    """Return the values at the ``k`` largest entries of ``by`` along the last axis, zeros elsewhere."""
    kept = by.topk(min(k, by.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, kept, values.gather(-1, kept))


def _refuse_settings(module: Any, kind: Write) -> None:
    normalize = getattr(module.cfg, "normalize_activations", "none")
    if normalize not in (None, "none"):
        raise DictionaryError(
            f"normalize_activations={normalize!r} makes the encoder depend on the whole input, so it is not one linear "
            "row per feature; fold the normalisation into the weights and set it to 'none'"
        )
    reshape = getattr(module.cfg, "reshape_activations", "none")
    if reshape not in (None, "none", "hook_z") or (reshape == "hook_z" and kind is not Write.HEADS):
        raise DictionaryError(
            f"reshape_activations={reshape!r} does not fit an SAE at {module.cfg.metadata.hook_name!r}: 'hook_z' is "
            "for attn.hook_z, 'none' for all others"
        )

"""A layer of a cross-layer transcoder as a SAELens module: importing this registers ``"circuit_lens_clt"``.

After the import, ``SAE.load_from_disk(folder / "layer_0")`` gives a module, and its ``save_model`` writes one that the
next load reads. SAELens has no class for features that write several layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn

from circuit_lens.dictionaries.cross_layer_files import ARCHITECTURE, saelens_config
from circuit_lens.dictionaries.cross_layer_parts import ACTIVATIONS, Activation, CrossLayer, LayerParts
from circuit_lens.dictionaries.cross_layer_weights import InMemory, activate
from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.errors import DictionaryError


@dataclass
class CrossLayerConfig(SAEConfig):
    """SAELens configuration of one layer.

    Attributes:
        d_out: Width of every output.
        n_out: Number of MLP outputs it writes, its own layer's first.
        activation: ``"relu"``, ``"jumprelu"`` or ``"topk"``.
        k: Features kept per position, for TopK.
        skip: Whether there is a linear skip path to the first output.
    """

    d_out: int = 0
    n_out: int = 1
    activation: str = "relu"
    k: int | None = None
    skip: bool = False
    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)  # SAELens' loader puts a dict here for a moment

    @classmethod
    def architecture(cls) -> str:
        """Return the registered name."""
        return ARCHITECTURE


class CrossLayerModule(SAE[CrossLayerConfig]):
    """One layer of a cross-layer transcoder as a SAELens module.

    ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, n_out, d_out]``, ``b_dec [d_out]`` for the first output;
    ``threshold [d_sae]`` for JumpReLU; ``W_skip [d_out, d_in]`` where there is a skip, as in SAELens' transcoders.
    """

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Make the parameters: small random matrices, everything else zero."""
        c = self.cfg

        def parameter(*shape: int) -> nn.Parameter:
            made = torch.zeros(shape, dtype=self.dtype, device=self.device)
            return nn.Parameter(nn.init.kaiming_uniform_(made) if len(shape) > 1 else made)

        self.W_enc, self.b_enc = parameter(c.d_in, c.d_sae), parameter(c.d_sae)
        self.W_dec, self.b_dec = parameter(c.d_sae, c.n_out, c.d_out), parameter(c.d_out)
        self.threshold = parameter(c.d_sae) if c.activation == "jumprelu" else None
        self.W_skip = parameter(c.d_out, c.d_in) if c.skip else None

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return feature activations."""
        pre_acts = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(activate(pre_acts, self.threshold, self.cfg.k))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return what the features add to every output; the first has the bias, the skip path is left out."""
        out = torch.einsum("...f,fod->...od", feature_acts, self.W_dec)
        first = out[..., :1, :] + self.b_dec
        return self.hook_sae_recons(torch.cat([first, out[..., 1:, :]], -2))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return every output, skip path included."""
        out = self.decode(self.encode(x))
        if self.W_skip is None:
            return out
        first = out[..., :1, :] + (x.to(self.dtype) @ self.W_skip.T)[..., None, :]
        return torch.cat([first, out[..., 1:, :]], -2)

    def process_sae_in(self, sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the input in the module's dtype; the decoder bias has another width and is no part of it."""
        return self.hook_sae_input(sae_in.to(self.dtype))

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Raise NotImplementedError: one feature has a norm per output, so there is no norm to fold."""
        raise NotImplementedError("a cross-layer feature has one decoder norm per output; there is none to fold")


with contextlib.suppress(ValueError):  # a notebook that reloads the module registers twice
    register_sae_class(ARCHITECTURE, CrossLayerModule, CrossLayerConfig)


def module_of(layer: CrossLayer, metadata: Mapping[str, Any] | None = None) -> CrossLayerModule:
    """Return a layer as a SAELens module with weights of its own (read whole, if they are on disk)."""
    fields = saelens_config(layer, metadata or {})
    config = CrossLayerConfig(**fields | {"device": "meta", "metadata": SAEMetadata(**fields["metadata"])})
    parts, m = layer.parts, layer.parts.matrices
    module = CrossLayerModule(config)
    config.device = str(parts.b_enc.device)
    tensors = {"W_enc": m.encoder_columns(0, m.d_sae), "b_enc": parts.b_enc, "W_dec": m.decoder_slab(0, m.d_sae)}
    skip = None if parts.W_skip is None else parts.W_skip.T
    more = {"b_dec": parts.b_dec, "threshold": parts.threshold, "W_skip": skip}
    tensors |= {name: tensor for name, tensor in more.items() if tensor is not None}
    state = {name: t.to(m.dtype, copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.to(dtype=m.dtype, device=config.device).eval()


def layer_of(module: Any) -> CrossLayer:
    """Return the Dictionary that a SAELens module of this architecture is; its weights are read, not copied.

    Raises:
        DictionaryError: Another architecture, no hook names, weights that do not fit together.
    """
    config, facts = module.cfg, module.cfg.metadata
    if config.architecture() != ARCHITECTURE:
        raise DictionaryError(f"the module is of architecture {config.architecture()!r}, expected {ARCHITECTURE!r}")
    hook_in, hooks_out = facts.hook_name, facts.hook_names_out
    if not hook_in or not hooks_out:
        raise DictionaryError(
            f"the module names no hooks (hook_name={hook_in!r}, hook_names_out={hooks_out!r}); set cfg.metadata"
        )
    activation: Activation | None = next((a for a in ACTIVATIONS if a == config.activation), None)
    if activation is None:
        raise DictionaryError(f"activation {config.activation!r} is unknown; valid are {', '.join(ACTIVATIONS)}")
    for name in ("W_enc", "W_dec"):
        refuse_bad_numbers(f"{name} of {hooks_out[0]}", getattr(module, name))
    threshold, W_skip = module.threshold, module.W_skip
    return CrossLayer(
        LayerParts(
            InMemory(module.W_enc, module.W_dec),
            module.b_enc.detach(),
            module.b_dec.detach(),
            None if threshold is None else threshold.detach(),
            None if W_skip is None else W_skip.detach().T,
            hook_in,
            tuple(hooks_out),
            activation,
            config.k,
            facts.joint or f"clt {hooks_out[0]}",
        )
    )

"""Random SAELens autoencoders at any hook point of a model, and a frozen model made by hand in which they stand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor

SaeKind: TypeAlias = Literal["standard", "jumprelu", "topk", "abstopk", "gated"]
SAE_KINDS: tuple[SaeKind, ...] = ("standard", "jumprelu", "topk", "abstopk", "gated")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
}


def autoencoder(
    kind: SaeKind,
    hook: str,
    width: int,
    *,
    d_sae: int = 40,
    dtype: torch.dtype = torch.float64,
    apply_b_dec: bool = True,
    rescale: bool = True,
    seed: int = 0,
) -> Any:
    """Return a random SAELens autoencoder at a hook; its decoder is near its encoder, so that it explains something."""
    rng = torch.Generator().manual_seed(seed)
    sae_class, config_class = _CLASSES[kind]
    options: dict[str, Any] = {}
    if kind in ("topk", "abstopk"):
        options = {"k": 5, "rescale_acts_by_decoder_norm": rescale}
    sae = sae_class(
        config_class(
            d_in=width, d_sae=d_sae, dtype=str(dtype).removeprefix("torch."), device="cpu",
            apply_b_dec_to_input=apply_b_dec,
            reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
            metadata=SAEMetadata(hook_name=hook, sae_lens_version="6.54.12"), **options,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(dtype)
            parameter.copy_(noise * {"W_enc": 0.3, "W_dec": 0.2, "r_mag": 0.3}.get(name, 0.2))
            if name == "threshold":
                parameter.abs_()
        sae.W_dec += 0.5 * sae.W_enc.T
    return sae.requires_grad_(False)


def pre_acts(sae: Any, x: Tensor) -> Tensor:
    """Return an autoencoder's or a transcoder's pre-activations, from SAELens' parameters."""
    x = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    if hasattr(sae, "r_mag"):
        return x @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
    pre = x @ sae.W_enc + sae.b_enc
    return pre * sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else pre


def encode(sae: Any, x: Tensor) -> Tensor:
    """Return SAELens' own activations of flat inputs."""
    return sae.encode(x.unflatten(-1, (1, -1))) if sae.cfg.reshape_activations == "hook_z" else sae.encode(x)


def decoder(sae: Any) -> Tensor:
    """Return decoder rows per unit of activation."""
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    return sae.W_dec


class FrozenWithSites:
    """One prompt's frozen model in which autoencoders stand and MLPs without dictionary are their Jacobian.

    Made of hooks alone: queries, keys and norm denominators of one run are held; an MLP is its clean output plus its
    Jacobian on what its input moved by, or the clean output where a transcoder stands for it; an autoencoder's hook
    carries its clean value. Vectors can be added before and behind every hook.

    Args:
        model: The model.
        modules: SAELens autoencoders and transcoders.
        tokens: The prompt, ``[n_pos]``.
    """

    def __init__(self, model: Any, modules: Sequence[Any], tokens: Tensor) -> None:
        self.model, self.tokens, self.points = model, tokens, dict(model.hook_dict)
        self.saes = {m.cfg.metadata.hook_name: m for m in modules if not m.cfg.metadata.hook_name_out}
        self.transcoders = {m.cfg.metadata.hook_name_out: m for m in modules if m.cfg.metadata.hook_name_out}
        held = ("attn.hook_q", "attn.hook_k")
        points = {
            id(p): n
            for n, p in self.points.items()
            if n.endswith(held) or (n.endswith("hook_scale") and ".attn." not in n)
        }
        self.held = list(points.values())
        self.clean: dict[str, Tensor] = {}
        self.clean_mlp: dict[int, tuple[Tensor, Tensor]] = {}
        self.clean = self._run({}, {}, hold=False)
        self.jacobians = [self._jacobian(layer) for layer in range(model.cfg.n_layers)]

    def _jacobian(self, layer: int) -> Tensor:
        mlp = self.model.blocks[layer].mlp
        with torch.enable_grad():
            return torch.as_tensor(
                torch.autograd.functional.jacobian(lambda x: _first(mlp(x[None]))[0], self.clean_mlp[layer][0][0])
            )

    def run(self, before: dict[str, Tensor], behind: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the pre-activations by site, and the demeaned logits, with vectors ``[n_pos, ...]`` added at hooks."""
        values = self._run(before, behind, hold=True)
        pre = {site: pre_acts(sae, self.flat(site, values)) for site, sae in self.saes.items()}
        for site, module in self.transcoders.items():
            pre[site] = pre_acts(module, values[module.cfg.metadata.hook_name])
        logits = values["unembed.hook_out"]
        return pre, logits - logits.mean(-1, keepdim=True)

    def flat(self, site: str, values: dict[str, Tensor]) -> Tensor:
        """Return a hook's value, heads side by side."""
        return values[site].flatten(1)

    def _run(self, before: dict[str, Tensor], behind: dict[str, Tensor], *, hold: bool) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        reads = [*self.saes, *(m.cfg.metadata.hook_name for m in self.transcoders.values())]
        kept = [*self.held, *reads, *self.transcoders, "hook_embed", "unembed.hook_out"]
        names = dict.fromkeys([*kept, *before, *behind])
        with torch.no_grad(), warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
            for layer in range(self.model.cfg.n_layers):
                stack.enter_context(self._mlp(layer, hold))
            try:
                for name in names:
                    self.points[name].add_hook(self._edit(name, seen, before, behind, hold))
                self.model(self.tokens[None])
            finally:
                for name in names:
                    self.points[name].remove_hooks()
        return seen

    def _edit(self, name: str, seen: dict, before: dict, behind: dict, hold: bool) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value + before[name] if name in before else value
            seen[name] = value[0].clone()
            if name.endswith("hook_scale"):
                value = value.clone()  # a bridge's norm computes natively, in float32, where nothing is given back
            if hold and (name in self.held or name in self.saes or name in self.transcoders):
                value = self.clean[name].expand_as(value)
                if getattr(self.transcoders.get(name), "W_skip", None) is not None:
                    module = self.transcoders[name]
                    read = module.cfg.metadata.hook_name
                    value = value + (seen[read] - self.clean[read]) @ module.W_skip.T
            return value + behind[name] if name in behind else value

        return hook

    @contextlib.contextmanager
    def _mlp(self, layer: int, hold: bool) -> Any:
        """Linearise a block's MLP where its output comes out first, or note its clean input and output."""
        mlp, inputs = self.model.blocks[layer].mlp, []
        point = self.points.get(f"blocks.{layer}.mlp.hook_out")
        inside = point is not None and any(point is module for module in mlp.modules())

        def edit(module: Any, args: Any, out: Any) -> Any:
            value = _first(out)
            if not hold:
                self.clean_mlp[layer] = inputs[0].clone(), value.clone()
                return None
            clean_in, clean_out = self.clean_mlp[layer]
            new = clean_out + torch.einsum("pqrs,rs->pq", self.jacobians[layer], (inputs[0] - clean_in)[0])[None]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handles = [mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))]
        handles.append((point if inside else mlp).register_forward_hook(edit, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out

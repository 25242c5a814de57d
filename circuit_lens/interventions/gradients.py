"""Gradients at features, by one backward pass through the model with its dictionaries attached.

With everything live this is attribution patching on features (Nanda 2023; Syed et al. 2023; on dictionary features
Marks et al. 2024, Sparse Feature Circuits): the first-order effect of changing a feature while all that follows reacts,
errors included. With errors held the model is the replacement model; with queries, keys and norm denominators held as
well it is the linear model of the attribution graph, and the gradient times the activation is the graph's total effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.attach import attached
from circuit_lens.dictionaries.binding import Binding
from circuit_lens.errors import TargetError
from circuit_lens.hooks import Hook
from circuit_lens.interventions.recording import ATTENTION, held_names, open_mlps
from circuit_lens.running import forward_batch

Scalar = Callable[[Float[Tensor, "batch n_pos d_vocab"]], Tensor]


@dataclass(frozen=True)
class Live:
    """What reacts when the gradient is taken; whatever does not is a constant of the run.

    ``mlps``: MLPs without dictionary react even where errors do not (``mlp="jacobian"`` of a graph).
    """

    attention: bool = True
    norms: bool = True
    errors: bool = True
    mlps: bool = False


class Tape:
    """One forward pass with the dictionaries attached, from which gradients at features are taken.

    Args:
        binding: The model and its dictionaries.
        tokens: The prompts, equally long.
        live: What reacts.
        fwd_hooks: Temporary hooks of the user.

    Attributes:
        logits: The model's logits.
        pre_acts, acts: Pre-activations and activations by site, ``[batch, n_pos, d_sae]``.
    """

    def __init__(
        self,
        binding: Binding,
        tokens: Int[Tensor, "batch n_pos"],
        live: Live,
        *,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
    ) -> None:
        self.binding, self.live = binding, live
        self.leaves: dict[str, Tensor] = {}
        self.pre_acts: dict[str, Tensor] = {}
        self.acts: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.enable_grad(), attached(binding):
            self.logits = forward_batch(binding.model, tokens, hooks=self._hooks(), fwd_hooks=fwd_hooks)

    def _hooks(self) -> list[Hook]:
        hooks = []
        for d in self.binding.dictionaries:
            hooks.append(Hook(f"{d.site}.pre_acts", lambda x, s=d.site: self.pre_acts.__setitem__(s, x)))
            hooks.append(Hook(f"{d.site}.features", lambda x, s=d.site: self._leaf(x, s)))
            if not self.live.errors:
                hooks += [Hook(f"{name}.error", lambda x: x.detach()) for name in d.hooks_out]
        for name in held_names(self.binding.model):
            if not (self.live.attention if name.endswith(ATTENTION) else self.live.norms):
                hooks.append(Hook(name, lambda x: x.detach()))
        if not self.live.errors and not self.live.mlps:  # an MLP without dictionary is all error
            hooks += [Hook(f"blocks.{i}.hook_mlp_out", lambda x: x.detach()) for i in open_mlps(self.binding)]
        return hooks

    def _leaf(self, features: Tensor, site: str) -> Tensor:
        """Add zeros, at which the gradient is taken: the features themselves stay connected to what made them."""
        self.acts[site] = features.detach()
        self.leaves[site] = torch.zeros_like(features).requires_grad_()
        return features + self.leaves[site]

    def of_logits(self, metric: Scalar) -> dict[str, Float[Tensor, "batch n_pos d_sae"]]:
        """Return the gradient of a metric of the logits at every feature, by site.

        Raises:
            TargetError: The metric is no differentiable number.
        """
        with torch.inference_mode(False), torch.enable_grad():
            value = metric(self.logits.clone())
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise TargetError("the metric must return one differentiable number computed from the logits")
            return self._gradients(value.reshape(()))

    def of_feature(self, site: str, pos: int, index: int) -> dict[str, Float[Tensor, "batch n_pos d_sae"]]:
        """Return the gradient of one feature's pre-activation (summed over the prompts) at every feature, by site."""
        with torch.inference_mode(False), torch.enable_grad():
            value = self.pre_acts[site][:, pos, index].sum()
            if not value.requires_grad:
                return {s: torch.zeros_like(leaf) for s, leaf in self.leaves.items()}
            return self._gradients(value)

    def _gradients(self, value: Tensor) -> dict[str, Float[Tensor, "batch n_pos d_sae"]]:
        found = torch.autograd.grad(value, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        pairs = zip(self.leaves.items(), found, strict=True)
        return {site: torch.zeros_like(leaf) if g is None else g.detach() for (site, leaf), g in pairs}

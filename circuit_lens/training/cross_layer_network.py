"""The network of a cross-layer transcoder while it is trained: normalised data in, losses out, weights folded.

Features of layer l read the MLP input of l and write to the MLP outputs of l and all later layers; the output of layer
m is rebuilt from all features of the layers up to m (Ameisen et al. 2025, Circuit Tracing, section 2 and its appendix
on training; Lindsey et al. 2024, Sparse Crosscoders). The norm of a feature's decoder is that of its vectors to all
layers together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import einops
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuit_lens.errors import nearest
from circuit_lens.training.cross_layer_data import Normalisation

CrossLayerActivation = Literal["batchtopk", "jumprelu"]
# Share by which one step moves the running threshold of BatchTopK towards the batch's, in a long and a short training.
THRESHOLD_RATE, THRESHOLD_STEPS_SHARE = 0.01, 0.1
INITIAL_DECODER_NORM = 0.1


@dataclass(frozen=True, slots=True)
class CrossLayerSettings:
    """What determines a cross-layer transcoder, besides data and seed.

    Attributes:
        d_sae: Features per layer.
        activation: "batchtopk" (Bussmann et al. 2024): of a batch's activations times decoder norms, the ``k * batch *
            n_layers`` largest stay. "jumprelu" (Rajamanoharan et al. 2024): learned thresholds, and the penalty
            ``sparsity * sum tanh(tanh_c * norm * activation)`` of Ameisen et al. 2025.
        k: BatchTopK: mean number of active features per token and layer.
        per_layer: BatchTopK: every layer keeps its own ``k * batch`` largest, rather than all layers sharing.
        sparsity: JumpReLU: weight of the penalty at the end; it rises linearly from 0 over the whole training. It is
            about the squared error, of a layer's d_out in all, that a large activation must remove to be worth it.
        tanh_c: JumpReLU: steepness of the penalty.
        bandwidth: JumpReLU: width of the window in which a threshold gets a gradient, in units of pre-activations.
        initial_threshold: JumpReLU: where thresholds start.
        steps: Steps of ``batch`` tokens.
        batch: Tokens per step.
        lr: Adam's rate at its height.
        warm_up: Steps over which the rate rises from 0.
        decay_share: Share of the steps, at the end, over which the rate falls linearly to 5 % of its height.
        clip: Largest norm of a gradient.
        auxiliary: Weight of the loss that revives dead features: they predict what the others miss (Gao et al. 2024).
        dead_window: Steps without activation after which a feature counts as dead.
        bfloat16: Train under autocast.
    """

    d_sae: int = 640
    activation: CrossLayerActivation = "batchtopk"
    k: float = 8.0
    per_layer: bool = False
    sparsity: float = 0.5
    tanh_c: float = 4.0
    bandwidth: float = 1.0
    initial_threshold: float = 0.03
    steps: int = 2000
    batch: int = 1024
    lr: float = 3e-3
    warm_up: int = 100
    decay_share: float = 0.5
    clip: float = 1.0
    auxiliary: float = 1 / 32
    dead_window: int = 100
    bfloat16: bool = True

    def __post_init__(self) -> None:
        valid = get_args(CrossLayerActivation)
        if self.activation not in valid:
            raise ValueError(
                f"activation must be one of {', '.join(valid)}; given {self.activation!r}"
                f"{nearest(str(self.activation), valid)}"
            )
        for name in ("d_sae", "steps", "batch", "dead_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; given {getattr(self, name)}")
        for name in ("k", "tanh_c", "bandwidth", "initial_threshold", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0; given {getattr(self, name)}")
        for name in ("sparsity", "warm_up", "decay_share", "auxiliary"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; given {getattr(self, name)}")
        if self.activation == "batchtopk" and self.k > self.d_sae:
            raise ValueError(f"k must not exceed d_sae; given k={self.k:g} and d_sae={self.d_sae}")
        if self.decay_share > 1:
            raise ValueError(f"decay_share is a share, at most 1; given {self.decay_share}")

    def lr_at(self, step: int) -> float:
        """Return Adam's rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, min(self.warm_up, self.steps)))
        decay = self.steps * self.decay_share
        left = (self.steps - step) / decay if decay else 1.0
        return self.lr * rise * (1.0 if left >= 1 else 0.05 + 0.95 * left)

    def sparsity_at(self, step: int) -> float:
        """Return the weight of the JumpReLU penalty at a step, counted from 0."""
        return self.sparsity * (step + 1) / self.steps


class _JumpReLU(torch.autograd.Function):
    """See :func:`jump_relu`."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        (grad,) = grads
        window = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(grad)
        own = -(threshold / ctx.bandwidth) * (window * grad).sum(1, keepdim=True)
        return grad * (pre_acts > threshold), own, None


def jump_relu(
    pre_acts: Float[Tensor, "n_layers token d_sae"], threshold: Float[Tensor, "n_layers 1 d_sae"], bandwidth: float
) -> Float[Tensor, "n_layers token d_sae"]:
    """Return pre-activations that exceed their threshold, 0 elsewhere, with a straight-through threshold gradient.

    The gradient of the threshold θ is the sum over tokens of ``-(θ / bandwidth) * 1[|h - θ| < bandwidth / 2] * grad``
    (Rajamanoharan et al. 2024, Jumping Ahead, equation 11, with a rectangle as kernel).
    """
    result = _JumpReLU.apply(pre_acts, threshold, bandwidth)
    assert isinstance(result, Tensor)
    return result


def kept_by_batch(strength: Float[Tensor, "*any"], kept: int, guess: float = 0.0) -> Float[Tensor, ""]:
    """Return the bound that the ``kept`` largest entries exceed (fewer where entries are equal).

    ``guess``: a number that is probably below the bound; it saves time and does not change the result.
    """
    flat = strength.flatten()
    if kept >= len(flat):
        return flat.new_zeros(())
    high = flat[flat > guess]
    if len(high) <= kept:
        high = flat
    return high.kthvalue(len(high) - kept).values.clamp_min(0)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """One batch: what the network rebuilt, the losses per token, and what the log tells.

    Attributes:
        loss: What is minimised.
        error: Squared error per token, summed over coordinates, per layer.
        penalty, auxiliary: The other parts of the loss, weighted.
        active: Which features are active.
        bound: What activations times norms had to exceed, per layer; zeros for JumpReLU.
        unexplained, total: Squared error and squared distance from the batch's mean, summed, per layer.
    """

    loss: Float[Tensor, ""]
    error: Float[Tensor, "n_layers"]
    penalty: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    active: Bool[Tensor, "n_layers token d_sae"]
    bound: Float[Tensor, "n_layers"]
    unexplained: Float[Tensor, "n_layers"]
    total: Float[Tensor, "n_layers"]


class CrossLayerNetwork(nn.Module):
    """Parameters and losses of a cross-layer transcoder on normalised data.

    ``W_dec[l]`` is ``[d_sae, n_layers - l, d_out]``: the vectors to the layers l, l + 1, ... Buffers, which checkpoints
    hold too: ``running``, the mean over the last steps of what activations times norms had to exceed (BatchTopK; the
    same for all layers where these share), and ``silent``, the steps since each feature was last active.
    """

    def __init__(
        self, settings: CrossLayerSettings, n_layers: int, d_in: int, d_out: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.settings, self.n_layers = settings, n_layers

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        d_sae = settings.d_sae
        self.W_enc = nn.Parameter(nn.functional.normalize(random(n_layers, d_in, d_sae), dim=1))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, d_sae))
        self.W_dec = nn.ParameterList()
        for layer in range(n_layers):
            rows = random(d_sae, n_layers - layer, d_out)
            self.W_dec.append(nn.Parameter(INITIAL_DECODER_NORM * rows / rows.norm(dim=(1, 2), keepdim=True)))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_out))
        if settings.activation == "jumprelu":
            start = torch.full((n_layers, d_sae), settings.initial_threshold)
            self.log_threshold = nn.Parameter(start.log())
        self.register_buffer("running", torch.zeros(n_layers))
        self.register_buffer("silent", torch.zeros(n_layers, d_sae, dtype=torch.long))
        self.running: Tensor
        self.silent: Tensor

    def decoder_norms(self) -> Float[Tensor, "n_layers d_sae"]:
        """Return the norm of each feature's vectors to all layers together."""
        return torch.stack([rows.norm(dim=(1, 2)) for rows in self.W_dec])

    def forward(
        self,
        x: Float[Tensor, "token n_layers d_in"],
        y: Float[Tensor, "token n_layers d_out"],
        *,
        step: int = 0,
    ) -> ForwardPass:
        """Return the losses of one normalised batch."""
        settings = self.settings
        enabled = settings.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            product = einops.einsum(x, self.W_enc, "token layer d_in, layer d_in d_sae -> layer token d_sae")
        pre = product.float() + self.b_enc[:, None]
        norms = self.decoder_norms()
        acts, penalty, bound = self._activate(pre, norms, step)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            rebuilt = self._decode(list(acts))
        miss = y - (rebuilt.float() + self.b_dec)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            auxiliary = settings.auxiliary * self._auxiliary(pre, miss.detach())
        error = einops.reduce(miss.pow(2), "token layer d_out -> layer", "sum") / len(x)
        spread = (y - y.mean(0)).pow(2)
        return ForwardPass(
            loss=error.sum() + penalty + auxiliary,
            error=error,
            penalty=penalty,
            auxiliary=auxiliary,
            active=acts.detach() > 0,
            bound=bound,
            unexplained=error.detach() * len(x),
            total=einops.reduce(spread, "token layer d_out -> layer", "sum"),
        )

    def _activate(
        self, pre: Float[Tensor, "n_layers token d_sae"], norms: Float[Tensor, "n_layers d_sae"], step: int
    ) -> tuple[Float[Tensor, "n_layers token d_sae"], Float[Tensor, ""], Float[Tensor, "n_layers"]]:
        """Return activations, the weighted sparsity penalty, and what activations times norms had to exceed."""
        settings = self.settings
        if settings.activation == "jumprelu":
            acts = jump_relu(pre, self.log_threshold.exp()[:, None], settings.bandwidth)
            cost = torch.tanh(settings.tanh_c * norms[:, None] * acts).sum() / pre.shape[1]
            return acts, settings.sparsity_at(step) * cost, pre.new_zeros(self.n_layers)
        acts = pre.relu()
        strength = (acts * norms[:, None]).detach()
        bound = self._bounds(strength)
        return acts * (strength > bound[:, None, None]), pre.new_zeros(()), bound

    def _bounds(self, strength: Float[Tensor, "n_layers token d_sae"]) -> Float[Tensor, "n_layers"]:
        """Return what activations times norms must exceed in this batch, for each layer."""
        kept = int(self.settings.k * strength.shape[1])
        guesses = (0.5 * self.running).tolist()
        if not self.settings.per_layer:
            return kept_by_batch(strength, kept * self.n_layers, guesses[0]).expand(self.n_layers)
        return torch.stack([kept_by_batch(s, kept, guess) for s, guess in zip(strength, guesses, strict=True)])

    def _decode(
        self, acts: list[Float[Tensor, "token _"]], rows: list[Tensor] | None = None
    ) -> Float[Tensor, "token n_layers d_out"]:
        """Return what features write to all layers, without biases; ``rows`` are their decoder rows."""
        parts: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        for layer, (own, weights) in enumerate(zip(acts, rows or list(self.W_dec), strict=True)):
            written = einops.einsum(own, weights, "token d_sae, d_sae out d_out -> token out d_out")
            for offset, part in enumerate(written.unbind(1)):
                parts[layer + offset].append(part)
        return torch.stack([torch.stack(part).sum(0) for part in parts], 1)

    def _auxiliary(
        self, pre: Float[Tensor, "n_layers token d_sae"], miss: Float[Tensor, "token n_layers d_out"]
    ) -> Float[Tensor, ""]:
        """Return the squared error of dead features' prediction of what the others miss, per token.

        Of each layer the half as many dead features as the output is wide that are largest on a token; the loss is
        scaled down where there are fewer.
        """
        dead = self.silent >= self.settings.dead_window
        if not dead.any():
            return pre.new_zeros(())
        most = max(1, miss.shape[-1] // 2)
        chosen, rows, n_used = [], [], 0
        for layer, layer_pre in enumerate(pre.unbind()):
            index = dead[layer].nonzero().flatten()
            own = layer_pre[:, index].relu()
            if len(index) > most:
                largest = own.topk(most, sorted=False)
                own = torch.zeros_like(own).scatter(1, largest.indices, largest.values)
            n_used += min(len(index), most)
            chosen.append(own)
            rows.append(self.W_dec[layer][index])
        error = (self._decode(chosen, rows).float() - miss).pow(2)
        return n_used / (most * self.n_layers) * error.sum() / miss.shape[0]

    @torch.no_grad()
    def after_step(self, done: ForwardPass) -> None:
        """Bring the counters of silence and the running thresholds up to date."""
        self.silent.add_(1).masked_fill_(done.active.any(1), 0)
        rate = min(1.0, max(THRESHOLD_RATE, 1 / (THRESHOLD_STEPS_SHARE * self.settings.steps)))
        moved = self.running + rate * (done.bound - self.running)
        self.running.copy_(torch.where(self.running == 0, done.bound, moved))

    @property
    def dead_share(self) -> float:
        """The share of features that were silent for ``dead_window`` steps."""
        return float((self.silent >= self.settings.dead_window).float().mean())

    @torch.no_grad()
    def folded(self, normalisation: Normalisation) -> FoldedWeights:
        """Return weights that read and write the model's own activations: normalisation and decoder norms folded in.

        In units of a layer's normalised outputs every feature's decoder then has norm 1 (all its vectors together), so
        activations compare between features. Which features are active, and what they write, does not change.
        """
        scale_in, scale_out = normalisation.input_scale, normalisation.output_scale
        norms = self.decoder_norms()
        norms = torch.where(norms > 1e-8, norms, 1.0)
        batchtopk = self.settings.activation == "batchtopk"
        threshold = self.running[:, None].expand_as(norms) if batchtopk else self.log_threshold.exp() * norms
        W_enc, b_enc = self.W_enc / scale_in[:, None, None], self.b_enc
        shift = einops.einsum(normalisation.input_mean, W_enc, "layer d_in, layer d_in d_sae -> layer d_sae")
        decoders = [
            rows / norms[layer][:, None, None] * scale_out[layer:, None] for layer, rows in enumerate(self.W_dec)
        ]
        return FoldedWeights(
            W_enc=[w.clone() for w in W_enc * norms[:, None]],
            b_enc=[b.clone() for b in (b_enc - shift) * norms],
            W_dec=[w.detach().clone() for w in decoders],
            b_dec=[b.clone() for b in self.b_dec * scale_out[:, None] + normalisation.output_mean],
            threshold=[t.clone() for t in threshold],
        )


@dataclass(frozen=True, slots=True, eq=False)
class FoldedWeights:
    """The weights of a finished cross-layer transcoder with JumpReLU thresholds, one entry per layer."""

    W_enc: list[Float[Tensor, "d_in d_sae"]]
    b_enc: list[Float[Tensor, "d_sae"]]
    W_dec: list[Float[Tensor, "d_sae _ d_out"]]
    b_dec: list[Float[Tensor, "d_out"]]
    threshold: list[Float[Tensor, "d_sae"]]

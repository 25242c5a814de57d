"""A model's own MLP neurons as dictionaries: transcoders without error, which nobody has to train.

A neuron reads the MLP's input along its column of ``W_in`` and writes its row of ``W_out``, so that an MLP is a
transcoder whose features are its neurons and whose error is zero. They are few and dense where trained features are
many and sparse: nearly every neuron is active at every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuit_lens.dictionaries.attach import refuse_attached
from circuit_lens.dictionaries.neurons_mlp import (
    Activation,
    MlpWeights,
    activation_of,
    is_elementwise,
    own_output,
    probe,
    read_mlp,
    refuse_mixing,
    reproduction_error,
    reproduction_limit,
)
from circuit_lens.dictionaries.saelens import fingerprint
from circuit_lens.errors import DictionaryError
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors

Gate = Literal["frozen", "tangent"]


class NeuronDictionary:
    """The neurons of one layer's MLP.

    A plain MLP: ``pre = x @ W_in + b_in``, ``acts = act(pre)``. A gated one (SwiGLU, GeGLU; Shazeer 2020, "GLU Variants
    Improve Transformer"), with ``g = act(x @ W_gate + b_gate)``:

    - ``gate="frozen"``: ``pre = x @ W_in + b_in`` and ``acts = g * pre``. An edge into a neuron is one into its linear
      factor; what moves the gate is not told.
    - ``gate="tangent"``: ``pre = acts = g * (x @ W_in + b_in)``, linearised at what is read: an edge follows the
      neuron's gradient, gate included, and the constant of the linearisation belongs to the neuron itself.

    Weights are views of the model's, read anew at every use: an edit of the model is one of its neurons.

    Args:
        model: The model.
        layer: Layer of the MLP.
        gate: What the gate of a gated MLP is.

    Attributes:
        mlp: The module.
        gated: Whether it has a gate.

    Raises:
        DictionaryError: No MLP in that layer, a mixture of experts, or an MLP that is not what its weights say.
    """

    kind = "neurons"

    def __init__(self, model: HookedModel, layer: int, gate: Gate = "frozen") -> None:
        self.layer, self.gate = layer, gate
        self.mlp = _mlp(model, layer)
        self.hook_in = f"blocks.{layer}.mlp.hook_in"
        self.hooks_out = (_written(model, layer),)
        self.site = self.joint = self.hooks_out[0]
        self.out_layers = (layer,)
        weights = read_mlp(self.mlp)
        refuse_mixing(self.mlp, layer)
        self.gated = weights.W_gate is not None
        self.tangent = gate == "tangent"
        if self.tangent and not self.gated:
            raise DictionaryError(
                f"the MLP of layer {layer} has no gate, so gate='tangent' means nothing; leave it out"
            )
        self.d_in, self.d_sae = (int(n) for n in weights.W_in.shape)
        self.d_out = int(weights.W_out.shape[1])
        self._activation = self._find_activation(model, weights)

    def __repr__(self) -> str:
        gate = f", gate {self.gate}" if self.gated else ""
        return f"neurons({self.hook_in} -> {self.site}, {self.d_sae} neurons{gate})"

    @property
    def weights(self) -> MlpWeights:
        """The MLP's weights as they are now."""
        return read_mlp(self.mlp)

    @property
    def has_skip(self) -> bool:
        """False: nothing bypasses the neurons."""
        return False

    def gate_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the gates' values, ``act(x @ W_gate + b_gate)``; ones for a plain MLP."""
        w = self.weights
        if w.W_gate is None:
            return x.new_ones(*x.shape[:-1], self.d_sae)
        return self._activation(_affine(x, w.W_gate, w.b_gate))

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return pre-activations in the dtype of ``x``: of a gated MLP the linear factor, or (tangent) the value."""
        w = self.weights
        linear = _affine(x, w.W_in, w.b_in)
        if not self.tangent:
            return linear
        value = self.gate_acts(x) * linear
        return value if w.b_post is None else value + w.b_post.to(x)

    def activate(
        self, pre_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Return the neurons' values at pre-activations; a frozen gate is that of ``x``."""
        if self.tangent:
            return pre_acts.clone()
        return self.gate_acts(x) * pre_acts if self.gated else self._activation(pre_acts)

    def encoder_rows(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the given neurons' columns of ``W_in``; with ``gate="tangent"`` their gradients at ``at``.

        Raises:
            DictionaryError: A tangent without ``at``.
        """
        if self.tangent:
            return self._tangent(index, dtype, at)[0]
        return self.weights.W_in.detach()[:, index].T.to(dtype)

    def encoder_bias(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n"]:
        """Return the given neurons' biases; with ``gate="tangent"`` their value at ``at`` less row times ``at``.

        Raises:
            DictionaryError: A tangent without ``at``.
        """
        if self.tangent:
            rows, values, x = self._tangent(index, dtype, at)
            return values - (rows * x).sum(-1)
        return _picked(self.weights.b_in, index, dtype)

    def decoder_rows(self, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the given neurons' rows of ``W_out`` (one output)."""
        return self.weights.W_out.detach()[index].to(dtype)[:, None]

    def decoder_bias(self, dtype: torch.dtype) -> Float[Tensor, "n_out d_out"]:
        """Return ``b_out``, and what a bias added to gate times linear factor writes (one output)."""
        return self._output_bias(self.weights, torch.empty(0, dtype=dtype)).detach()[None]

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n_out d_out"]:
        """Return the MLP's output."""
        w = self.weights
        return (acts @ w.W_out.to(acts) + self._output_bias(w, acts))[..., None, :]

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return zeros."""
        return x.new_zeros(*x.shape[:-1], self.d_out)

    def skip_matrix(self, dtype: torch.dtype) -> Float[Tensor, "d_in d_out"] | None:
        """Return None."""
        return None

    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        """Return None: no pre-activation decides whether a neuron is active."""
        return None

    def fingerprint(self) -> str:
        """Return a short hash of the weights as they are now, and of how the gate is treated."""
        treated = f"gate {self.gate}: " if self.gated else ""
        return fingerprint({f"{treated}{name}": weight for name, weight in self.weights.named().items()})

    def secant_rows(
        self,
        index: Int[Tensor, "n"],
        dtype: torch.dtype,
        at: Float[Tensor, "n d_in"],
        other: Float[Tensor, "n d_in"],
    ) -> Float[Tensor, "n d_in"]:
        """Return rows whose product with ``at - other`` is what each gated neuron's value changes by, exactly.

        With ``u`` the linear factor, ``g = act(z)`` the gate and ``m`` for the mean of both inputs, the product rule of
        finite differences: ``g_m W_in + u_m (Δg / Δz) W_gate``. Where both inputs are the same it is the tangent's row.

        Raises:
            DictionaryError: The MLP has no gate.
        """
        w = self.weights
        if w.W_gate is None:
            raise DictionaryError(f"{self} has no gate, so a change of its neurons is one of their pre-activations")
        W_in, W_gate = (matrix.detach()[:, index].T.to(dtype) for matrix in (w.W_in, w.W_gate))
        ends = (at.detach().to(dtype), other.detach().to(dtype))
        linear = [(W_in * x).sum(-1) + _picked(w.b_in, index, dtype) for x in ends]
        z = [(W_gate * x).sum(-1) + _picked(w.b_gate, index, dtype) for x in ends]
        middle = (linear[0] + linear[1]) / 2
        slope = _secant(self._activation, *z)
        gate = (self._activation(z[0]) + self._activation(z[1])).detach() / 2
        return gate[:, None] * W_in + (middle * slope)[:, None] * W_gate

    def _tangent(
        self, index: Int[Tensor, "n"], dtype: torch.dtype, at: Float[Tensor, "n d_in"] | None
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n"], Float[Tensor, "n d_in"]]:
        """Return the gradients of neurons, each at its own input, their values there, and the inputs.

        The value is ``act(z) u`` with ``z`` and ``u`` linear, its gradient ``act(z) W_in + u act'(z) W_gate``.
        """
        if at is None:
            raise DictionaryError(f"{self} is linearised where a neuron is a target: give what is read there with at=")
        w = self.weights
        assert w.W_gate is not None
        x = at.detach().to(dtype)
        W_in, W_gate = (matrix.detach()[:, index].T.to(dtype) for matrix in (w.W_in, w.W_gate))
        linear = (W_in * x).sum(-1) + _picked(w.b_in, index, dtype)
        z = (W_gate * x).sum(-1) + _picked(w.b_gate, index, dtype)
        gate, slope = self._activation(z).detach(), _slope(self._activation, z)
        rows = gate[:, None] * W_in + (linear * slope)[:, None] * W_gate
        return rows, gate * linear + _picked(w.b_post, index, dtype), x

    def _output_bias(self, w: MlpWeights, like: Tensor) -> Float[Tensor, "d_out"]:
        W_out = w.W_out
        bias = W_out.new_zeros(self.d_out, dtype=like.dtype) if w.b_out is None else w.b_out.to(like.dtype)
        # A tangent's value has this bias in it.
        if w.b_post is None or self.tangent:
            return bias
        return bias + w.b_post.to(like.dtype) @ W_out.to(like.dtype)

    def _find_activation(self, model: HookedModel, weights: MlpWeights) -> Activation:
        """Return the activation function with which the neurons give the module's own output.

        Raises:
            DictionaryError: None does; says what was found.
        """
        names, candidates = activation_of(self.mlp, getattr(model.cfg, "act_fn", None))
        x = probe(weights)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        own, limit, gaps = own_output(self.mlp, x), reproduction_limit(x.dtype), []
        with plain_tensors():
            for candidate in candidates:
                self._activation = candidate
                gaps.append(reproduction_error(own, self.decode(self.activate(self.pre_acts(exact), exact))[:, 0]))
                if gaps[-1] <= limit:
                    break
            else:
                found = ", ".join(f"{name} {tuple(w.shape)}" for name, w in weights.named().items())
                raise DictionaryError(
                    f"the neurons of layer {self.layer} are not all that its {type(self.mlp).__name__} does: they miss "
                    f"its output by {min(gaps):.1e} of its largest entry (limit {limit:.0e}). Found: {found}; "
                    f"activation function: {names}"
                )
            gate = weights.W_in if weights.W_gate is None else weights.W_gate
            if not is_elementwise(self._activation, exact @ gate.to(exact)):
                raise DictionaryError(
                    f"a neuron's value in layer {self.layer} depends on the other neurons ({names}), so its neurons "
                    "cannot be attributed one by one"
                )
        return self._activation


def neurons(
    model: HookedModel, *, layers: Sequence[int] | None = None, gate: Gate = "frozen"
) -> list[NeuronDictionary]:
    """Return a model's MLP neurons as dictionaries, one per layer, for ``ReplacementModel(model, neurons(model))``.

    With all of them there is no error: every error node is zero and the replacement score is one. Each is compared with
    its MLP on random inputs when it is made.

    Args:
        model: A HookedTransformer or TransformerBridge.
        layers: Which layers; None means all.
        gate: What the gate of a gated MLP (SwiGLU, GeGLU) is: ``"frozen"``, a constant of the prompt, or ``"tangent"``,
            linearised together with the factor that it gates. See :class:`NeuronDictionary`.

    Raises:
        DictionaryError: No hooked model, layers that it has not, ``gate="tangent"`` without gates, or an MLP whose
            neurons cannot be told apart (a mixture of experts, an inner norm) or are not all it does.
        HookError: Dictionaries are attached to the model.
    """
    if not isinstance(model, HookedModel) or not hasattr(model.cfg, "n_layers"):
        raise DictionaryError(
            f"{type(model).__name__} is no hooked model; give a HookedTransformer or a TransformerBridge"
        )
    if gate not in ("frozen", "tangent"):
        raise DictionaryError(f"gate={gate!r} is not valid; give 'frozen' or 'tangent'")
    n_layers = int(model.cfg.n_layers)
    wanted = range(n_layers) if layers is None else list(layers)
    if bad := [layer for layer in wanted if type(layer) is not int or not 0 <= layer < n_layers]:
        raise DictionaryError(f"layers={list(wanted)}: the model has layers 0..{n_layers - 1}, not {bad[0]!r}")
    if len(set(wanted)) != len(wanted):
        raise DictionaryError(f"layers={list(wanted)} names a layer twice")
    refuse_attached(model)
    return [NeuronDictionary(model, layer, gate) for layer in wanted]


def _mlp(model: HookedModel, layer: int) -> Any:
    mlp = dict(model.blocks[layer].named_children()).get("mlp")
    if not isinstance(mlp, nn.Module):
        only = " (attn_only)" if getattr(model.cfg, "attn_only", False) else ""
        raise DictionaryError(f"layer {layer} has no MLP{only}, so it has no neurons; leave it out with layers=")
    return mlp


def _written(model: HookedModel, layer: int) -> str:
    """Return the hook whose value is the MLP's own output."""
    raw, out = f"blocks.{layer}.mlp.hook_out", f"blocks.{layer}.hook_mlp_out"
    if "ln2_post" in dict(model.blocks[layer].named_children()):
        return raw
    hooks = model.hook_dict
    if raw in hooks and out in hooks and hooks[raw] is not hooks[out]:
        raise DictionaryError(
            f"what layer {layer} adds to the residual stream ({out}) is another hook point than its MLP's output "
            f"({raw}): the block changes it in between, or has no module of its own for its MLP; leave it out with "
            "layers="
        )
    return out


def _affine(x: Float[Tensor, "*batch d_in"], W: Tensor, b: Tensor | None) -> Float[Tensor, "*batch d_sae"]:
    out = x @ W.to(x)
    return out if b is None else out + b.to(x)


def _slope(activation: Activation, z: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the derivative of an elementwise function."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        return torch.autograd.grad(activation(leaf).sum(), leaf)[0]


def _secant(activation: Activation, a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return ``(act(a) - act(b)) / (a - b)``; the derivative in the middle where the difference would be rounding."""
    gap = a - b
    near = gap.abs() <= torch.finfo(a.dtype).eps ** (1 / 3) * torch.maximum(a.abs(), b.abs()).clamp_min(1e-3)
    quotient = (activation(a) - activation(b)).detach() / torch.where(near, 1.0, gap)
    return torch.where(near, _slope(activation, (a + b) / 2), quotient)


def _picked(bias: Tensor | None, index: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n"]:
    if bias is None:
        return torch.zeros(len(index), dtype=dtype, device=index.device)
    return bias.detach()[index].to(dtype)

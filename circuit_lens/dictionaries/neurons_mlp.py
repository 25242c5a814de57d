"""An MLP's weights and activation function, read from either model class, and the check that they are all it does.

``plain``: ``out = act(x @ W_in + b_in) @ W_out + b_out``. Gated (SwiGLU, GeGLU; Shazeer 2020):
``out = (act(x @ W_gate + b_gate) * (x @ W_in + b_in) + b_post) @ W_out + b_out``, of which no model has every bias:
a HookedTransformer adds its ``b_in`` to the product (here ``b_post``), a TransformerBridge's linear modules add theirs
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuit_lens.errors import DictionaryError
from circuit_lens.hooks import preserved_rng, suspended
from circuit_lens.running import plain_tensors

# Where modules keep their activation function.
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "activation_function")
# Largest difference from the MLP's own output, in units of a position's largest entry, per dtype of its weights.
REPRODUCTION_LIMIT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_REDUCED_PRECISION_LIMIT = 2e-2  # float32 matrix products in TensorFloat32
_SCALES = (0.1, 0.5, 1.0, 1.0, 3.0, 10.0)  # sizes of the probe's positions: an activation is linear where it is small

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MlpWeights:
    """The weights of one MLP as they are now: views of the model's own; None where it has none."""

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, "d_mlp"] | None
    b_out: Float[Tensor, "d_model"] | None
    W_gate: Float[Tensor, "d_model d_mlp"] | None = None
    b_gate: Float[Tensor, "d_mlp"] | None = None
    b_post: Float[Tensor, "d_mlp"] | None = None

    def named(self) -> dict[str, Tensor]:
        """Return the weights that there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight for name, weight in found.items() if weight is not None}


def read_mlp(mlp: Any) -> MlpWeights:
    """Return an MLP's weights in TransformerLens' orientation, as views.

    Raises:
        DictionaryError: A mixture of experts, or a module without ``W_in`` and ``W_out``.
    """
    if experts := _experts(mlp):
        raise DictionaryError(
            f"mixture of experts: {type(mlp).__name__} has {experts}, of which a token uses a few, so its neurons are "
            "not one matrix; leave this layer out with layers="
        )
    try:
        W_in, W_out, W_gate = (_stored(mlp, name) for name in ("W_in", "W_out", "W_gate"))
        b_in, b_out, b_gate = (_stored(mlp, name) for name in ("b_in", "b_out", "b_gate"))
    except NotImplementedError as error:
        raise DictionaryError(f"the weights of {type(mlp).__name__} cannot be read: {error}") from error
    if W_in is None or W_out is None:
        raise DictionaryError(
            f"{type(mlp).__name__} has no matrices W_in and W_out, so it has no neurons to read; leave this layer out "
            "with layers="
        )
    shape = tuple(W_in.shape)
    if (
        W_in.ndim != 2
        or W_out.ndim != 2
        or W_out.shape[0] != shape[1]
        or (W_gate is not None and W_gate.shape != shape)
    ):
        gate = "" if W_gate is None else f", W_gate {tuple(W_gate.shape)}"
        raise DictionaryError(
            f"weights of {type(mlp).__name__} do not fit together: W_in {shape}, W_out {tuple(W_out.shape)}{gate}"
        )
    if W_gate is None:
        return MlpWeights(W_in, W_out, b_in, b_out)
    # Where the linear maps are modules of their own, their biases are added before the product.
    if "in" in dict(mlp.named_children()):
        return MlpWeights(W_in, W_out, b_in, b_out, W_gate, b_gate)
    return MlpWeights(W_in, W_out, None, b_out, W_gate, b_gate, b_in)


def activation_of(mlp: Any, act_fn: str | None) -> tuple[str, list[Activation]]:
    """Return the candidates for an MLP's activation function, its module's own first, and their names for messages.

    Args:
        mlp: The MLP.
        act_fn: The configuration's name for it, by which TransformerLens' own table is asked.

    Raises:
        DictionaryError: There is none.
    """
    from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

    found: list[tuple[str, Activation]] = []
    for owner in (mlp, getattr(mlp, "original_component", None)):
        for name in _ACTIVATIONS:
            function = getattr(owner, name, None)
            if callable(function) and function not in [f for _, f in found]:
                label = str(getattr(function, "__name__", type(function).__name__))
                found.append((label, cast(Activation, function)))
    if act_fn in SUPPORTED_ACTIVATIONS:
        found.append((f"cfg.act_fn={act_fn!r}", SUPPORTED_ACTIVATIONS[act_fn]))
    if not found:
        raise DictionaryError(
            f"{type(mlp).__name__} has no activation function under the names {', '.join(_ACTIVATIONS)}, and "
            f"TransformerLens knows none called {act_fn!r}"
        )
    return ", ".join(name for name, _ in found), [function for _, function in found]


def refuse_mixing(mlp: Any, layer: int) -> None:
    """Raise DictionaryError for what is no function of each neuron's own inputs: an inner norm, dropout at work."""
    if isinstance(getattr(mlp, "ln", None), nn.Module):
        raise DictionaryError(
            f"the MLP of layer {layer} normalises its neurons (cfg.act_fn ends in '_ln'), so that a neuron's value "
            "depends on all others; its neurons cannot be attributed one by one"
        )
    dropping = [m for m in nn.Module.modules(mlp) if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    if dropping:
        raise DictionaryError(
            f"the MLP of layer {layer} drops values out (p={dropping[0].p}, train mode), so it is another function at "
            "every call; call model.eval() first"
        )


def is_elementwise(activation: Activation, like: Float[Tensor, "n d_mlp"]) -> bool:
    """Whether each value of the function depends on one input alone."""
    whole, alone = activation(like), activation(like[:, :1])
    return bool(torch.allclose(whole[:, :1], alone, rtol=1e-3, atol=1e-6))


def probe(weights: MlpWeights) -> Float[Tensor, "n d_model"]:
    """Return random inputs, small and large, in the dtype and on the device of the weights; no random state is used."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(_SCALES), weights.W_in.shape[0], generator=generator, dtype=torch.float64)
    return (x * torch.tensor(_SCALES, dtype=torch.float64)[:, None]).to(weights.W_in)


def own_output(mlp: Any, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Return what the module itself gives, unseen by hooks.

    Raises:
        DictionaryError: It is not to be called with its input alone.
    """
    with plain_tensors(), preserved_rng(), suspended(_hook_points(mlp)):
        try:
            out = mlp(x[None])
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
            raise DictionaryError(
                f"{type(mlp).__name__} cannot be called with its input alone, so it cannot be checked that its "
                f"neurons are all it does ({type(error).__name__}: {error})"
            ) from error
    out = out[0] if isinstance(out, tuple) else out
    return out[0].detach()


def reproduction_limit(dtype: torch.dtype) -> float:
    """Return how exactly the neurons must give the module's output."""
    reduced = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return _REDUCED_PRECISION_LIMIT if reduced else REPRODUCTION_LIMIT.get(dtype, 8e-2)


def reproduction_error(own: Float[Tensor, "n d_model"], made: Float[Tensor, "n d_model"]) -> float:
    """Return the largest difference in units of a position's largest entry; infinite for NaN."""
    own = own.to(made)
    gap = (own - made).abs().amax(-1) / own.abs().amax(-1).clamp_min(torch.finfo(made.dtype).tiny)
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def _stored(mlp: Any, name: str) -> Tensor | None:
    value = getattr(mlp, name, None)
    return value if isinstance(value, Tensor) else None


def _experts(mlp: Any) -> str:
    """Say how many experts a module has; empty where it has none."""
    for owner in (mlp, getattr(mlp, "original_component", None)):
        experts = getattr(owner, "experts", None)
        if isinstance(experts, nn.Module):
            n = getattr(owner, "num_experts", None) or (len(experts) if isinstance(experts, nn.ModuleList) else "its")
            return f"{n} experts" if n != "its" else "experts"
    return ""


def _hook_points(mlp: Any) -> Iterator[Any]:
    return (m for m in nn.Module.modules(mlp) if hasattr(m, "add_hook") and hasattr(m, "fwd_hooks"))

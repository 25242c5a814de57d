"""The linear path through an MLP that stays open: a transcoder's skip, or the MLP's own Jacobian."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.linear_maps import FrozenNorm, Where
from circuit_lens.dictionaries.points import Read, Write, read_kind, write_kind
from circuit_lens.hooks import preserved_rng, suspended
from circuit_lens.protocols import Dictionary


@runtime_checkable
class MlpPath(Protocol):
    """A linear map from the residual stream that enters the MLP branch to what the branch adds to it."""

    def linear(self, base: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the path."""
        ...

    def norm_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return what the constants of the norms around it add to the residual stream."""
        ...

    def adjoint(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at the MLP branch's output back to the residual stream that enters it."""
        ...


def read_value(kind: Read, norm: FrozenNorm, base: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
    """Return the linear part of a read hook's value."""
    match kind:
        case Read.NORMALIZED:
            return norm.apply_normalized(base)
        case Read.NORM_OUTPUT:
            return norm.apply_output(base)
        case Read.RESIDUAL | Read.MID:
            return base
        case _:
            raise ValueError(f"{kind.value} is not read in the MLP branch")


def read_constant(kind: Read, norm: FrozenNorm) -> Float[Tensor, "n_pos d_model"]:
    """Return the constant part of a read hook's value."""
    match kind:
        case Read.NORMALIZED:
            return norm.constant_normalized()
        case Read.NORM_OUTPUT:
            return norm.constant_output()
        case Read.RESIDUAL | Read.MID:
            return torch.zeros_like(norm.normalized)
        case _:
            raise ValueError(f"{kind.value} is not read in the MLP branch")


def read_adjoint(
    kind: Read, norm: FrozenNorm, g: Float[Tensor, "*target d_model"], where: Where
) -> Float[Tensor, "*target d_model"]:
    """Pull a gradient at a read hook back to the residual stream that enters the MLP branch."""
    match kind:
        case Read.NORMALIZED:
            return norm.adjoint_normalized(g, where)
        case Read.NORM_OUTPUT:
            return norm.adjoint_output(g, where)
        case Read.RESIDUAL | Read.MID:
            return g
        case _:
            raise ValueError(f"{kind.value} is not read in the MLP branch")


class SkipPath:
    """A skip transcoder's linear path: ``W_skip`` between a read hook and a write hook."""

    def __init__(self, dictionary: Dictionary, ln2: FrozenNorm, ln2_post: FrozenNorm | None) -> None:
        matrix = dictionary.skip_matrix(ln2.normalized.dtype)
        assert matrix is not None
        self.matrix: Float[Tensor, "d_in d_out"] = matrix
        self.kind, self.ln2 = read_kind(dictionary.hook_in), ln2
        self.post = ln2_post if write_kind(dictionary.hooks_out[0]) is Write.MLP_RAW else None

    def linear(self, base: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the path."""
        out = read_value(self.kind, self.ln2, base) @ self.matrix
        return out if self.post is None else self.post.apply_output(out)

    def norm_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return the read norm's constant, passed through the skip."""
        out = read_constant(self.kind, self.ln2) @ self.matrix
        return out if self.post is None else self.post.apply_output(out)

    def adjoint(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at the MLP branch's output back to the residual stream that enters it."""
        g = g if self.post is None else self.post.adjoint_output(g, where)
        return read_adjoint(self.kind, self.ln2, g @ self.matrix.T, where)


class LinearMlp:
    """An MLP's Jacobian at some inputs, applied by products: one forward pass, and nothing is stored densely.

    Args:
        module: The MLP, called as ``module(x)`` on ``[1, pos, d_model]``.
        x: The inputs at which the Jacobian is taken.

    Attributes:
        out: The MLP's output there, in its own dtype.
    """

    def __init__(self, module: Any, x: Float[Tensor, "n_pos d_model"]) -> None:
        native = next(iter(module.parameters())).dtype
        points = (m for m in module.modules() if hasattr(m, "fwd_hooks"))
        with torch.inference_mode(False), torch.enable_grad(), preserved_rng(), suspended(points):
            self._x = x[None].to(native).clone().requires_grad_()
            out = module(self._x)
            self._out = out[0] if isinstance(out, tuple) else out
        self.out: Float[Tensor, "n_pos d_model"] = self._out.detach()[0]
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, g: Float[Tensor, "n n_pos d_model"]) -> Float[Tensor, "n n_pos d_model"]:
        """Return vector-Jacobian products, position by position."""
        with torch.inference_mode(False):
            (found,) = torch.autograd.grad(
                self._out, self._x, g[:, None].to(self._out), is_grads_batched=True, retain_graph=True
            )
        return found[:, 0].to(g.dtype)

    def push(self, tangent: Float[Tensor, "n n_pos d_model"]) -> Float[Tensor, "n n_pos d_model"]:
        """Return Jacobian-vector products: derivatives of the vector-Jacobian product with respect to its vector."""
        with torch.inference_mode(False), torch.enable_grad():
            if self._pulled is None:
                dual = torch.zeros_like(self._out, requires_grad=True)
                (pulled,) = torch.autograd.grad(self._out, self._x, dual, create_graph=True)
                self._pulled = pulled, dual
            pulled, dual = self._pulled
            (found,) = torch.autograd.grad(
                pulled, dual, tangent[:, None].to(pulled), is_grads_batched=True, retain_graph=True,
                create_graph=tangent.requires_grad,
            )  # fmt: skip
        return found[:, 0].to(tangent.dtype)


class JacobianPath:
    """The MLP's own Jacobian at the prompt, between the norms around it.

    Args:
        module: The block's MLP, called as ``module(x)`` on ``[batch, pos, d_model]``.
        ln2: The norm before it.
        ln2_post: The norm after it, where the block has one.
        base: The residual stream that enters the branch, where the Jacobian is taken.
    """

    def __init__(
        self, module: Any, ln2: FrozenNorm, ln2_post: FrozenNorm | None, base: Float[Tensor, "n_pos d_model"]
    ) -> None:
        self.module, self.ln2, self.post = module, ln2, ln2_post
        self.input = ln2.apply_output(base) + ln2.constant_output()

    def linear(self, base: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the path."""
        return self._push(self.ln2.apply_output(base))

    def _push(self, tangent: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        pushed = LinearMlp(self.module, self.input).push(tangent[None])[0]
        return pushed if self.post is None else self.post.apply_output(pushed)

    def norm_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return the norms' constants: the first passed through the Jacobian, the second added after it."""
        out = self._push(self.ln2.constant_output())
        return out if self.post is None else out + self.post.constant_output()

    def adjoint(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at the MLP branch's output back to the residual stream that enters it."""
        g = g if self.post is None else self.post.adjoint_output(g, where)
        local = LinearMlp(self.module, self.input[where] if isinstance(where, slice) else self.input[where : where + 1])
        batched = g.transpose(0, 1) if isinstance(where, slice) else g[:, None]
        pulled = local.pull(batched)
        pulled = pulled.transpose(0, 1) if isinstance(where, slice) else pulled[:, 0]
        return self.ln2.adjoint_output(pulled, where)

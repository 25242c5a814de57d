"""The frozen linear maps of a block: norms with constant or linearised denominators, constant attention patterns.

With its denominator and the attention pattern held at one prompt's values, a block's norm and attention are affine maps
of the residual stream (Ameisen et al. 2025, Circuit Tracing, "local replacement model"; Elhage et al. 2021). This
module reads them off the model's own weights and gives them forwards and as adjoints. Norm gains and biases are
measured through the norm module rather than read, since what a module stores differs between classes (w, or w with a
gain of 1 + w).

Adjoints act on tensors ``[pos, target, d_model]`` for the positions ``0..n_query - 1``, or on ``[target, d_model]``
at one position; forward maps act on ``[pos, d_model]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import DictionaryError
from circuit_lens.hooks import quiet_norm_edits, suspended
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors

Where = slice | int


class MapsUnavailableError(Exception):
    """The model's blocks are not of the form these maps describe; the reference path still works."""


@dataclass(frozen=True)
class NormWeights:
    """A norm's parameters: ``y = gain * normalized + bias``, with the mean removed first where ``centered``."""

    centered: bool
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]


@dataclass(frozen=True)
class AttentionWeights:
    """An attention layer's value and output maps; ``n_kv`` divides ``n_heads`` (grouped queries)."""

    W_V: Float[Tensor, "n_kv d_model d_head"]
    b_V: Float[Tensor, "n_kv d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, "d_model"]


@dataclass(frozen=True)
class BlockWeights:
    """The linear parts of one block. ``ln1_post`` and ``ln2_post`` follow attention and MLP in some architectures."""

    ln1: NormWeights
    ln1_post: NormWeights | None
    ln2: NormWeights
    ln2_post: NormWeights | None
    attention: AttentionWeights | None


@dataclass(frozen=True)
class ModelWeights:
    """The linear parts of a model, in the dtype attribution computes in.

    ``parallel``: attention and MLP of a block read the same residual stream (GPT-NeoX). ``unavailable``: why
    attention is not known as linear maps (the reference path is then needed); None where it is.
    """

    blocks: tuple[BlockWeights, ...]
    ln_final: NormWeights
    parallel: bool
    unavailable: str | None

    def without_attention(self, reason: str) -> ModelWeights:
        """Return the same norms with attention unknown."""
        blocks = tuple(replace(block, attention=None) for block in self.blocks)
        return replace(self, blocks=blocks, unavailable=reason)


@dataclass(frozen=True)
class FrozenNorm:
    """A norm at one prompt.

    ``linear=False``: the denominator is a constant, ``x -> center(x) / scale``. ``linear=True``: the norm's own
    Jacobian, ``x -> (center(x) - n * mean(n * center(x))) / scale`` with ``n`` the normalised value, and a constant
    part.
    """

    weights: NormWeights
    scale: Float[Tensor, "n_pos 1"]
    normalized: Float[Tensor, "n_pos d_model"]
    linear: bool

    def apply_normalized(self, x: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the linear part, up to ``hook_normalized`` (before gain and bias)."""
        x = x - x.mean(-1, keepdim=True) if self.weights.centered else x
        if self.linear:
            x = x - self.normalized * (self.normalized * x).mean(-1, keepdim=True)
        return x / self.scale

    def apply_output(self, x: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the linear part, up to the norm's output."""
        return self.apply_normalized(x) * self.weights.gain

    def apply_output_at(self, x: Float[Tensor, "n d_model"], pos: Int[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
        """Apply the linear part, up to the norm's output, to vectors that are at the given positions."""
        here = replace(self, scale=self.scale[pos], normalized=self.normalized[pos])
        return here.apply_output(x)

    def constant_normalized(self) -> Float[Tensor, "n_pos d_model"]:
        """Return the constant part at ``hook_normalized``: zero when frozen, ``n - J x`` when linearised."""
        if not self.linear:
            return torch.zeros_like(self.normalized)
        return self.normalized - self.apply_normalized(self.normalized * self.scale)

    def constant_output(self) -> Float[Tensor, "n_pos d_model"]:
        """Return the constant part at the norm's output: bias, and the constant of the linearisation."""
        return self.constant_normalized() * self.weights.gain + self.weights.bias

    def adjoint_normalized(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at ``hook_normalized`` back to the norm's input."""
        if self.linear:
            n = _at(self.normalized, where)
            g = g - n * (n * g).mean(-1, keepdim=True)
        g = g / _at(self.scale, where)
        return g - g.mean(-1, keepdim=True) if self.weights.centered else g

    def adjoint_output(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at the norm's output back to the norm's input."""
        return self.adjoint_normalized(g * self.weights.gain, where)


class FrozenAttention:
    """An attention layer at one prompt, with its norms: norm, values, pattern, output, and a post-norm if there is one.

    Args:
        weights: Value and output maps.
        pattern: Attention pattern, rows are queries; need not sum to one (sinks, a user's edit).
        norm_in: The norm before it.
        norm_out: The norm after it, where the block has one.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        pattern: Float[Tensor, "n_heads n_pos n_pos"],
        norm_in: FrozenNorm,
        norm_out: FrozenNorm | None,
    ) -> None:
        self.weights, self.pattern, self.norm_in, self.norm_out = weights, pattern, norm_in, norm_out
        self.n_heads, self.d_head = weights.W_O.shape[:2]
        self.group = self.n_heads // weights.W_V.shape[0]
        self._fold()

    def _fold(self) -> None:
        """Fold gains and centring into the weights and denominators into the pattern, for norms that are frozen."""
        to_head = einops.rearrange(self.weights.W_O, "head d_head d_model -> head d_model d_head")
        to_resid = einops.rearrange(self.weights.W_V, "kv d_model d_head -> kv d_head d_model")
        pattern = self.pattern
        if not self.norm_in.linear:
            to_resid = to_resid * self.norm_in.weights.gain
            if self.norm_in.weights.centered:
                to_resid = to_resid - to_resid.mean(-1, keepdim=True)
            pattern = pattern / self.norm_in.scale[:, 0]
        if self.norm_out is not None and not self.norm_out.linear:
            # The mean goes before the gain here, behind it above: this norm comes after its map.
            if self.norm_out.weights.centered:
                to_head = to_head - to_head.mean(1, keepdim=True)
            to_head = self.norm_out.weights.gain[:, None] * to_head
            pattern = pattern / self.norm_out.scale
        self._to_head, self._to_resid, self._pattern = to_head, to_resid.contiguous(), pattern

    def linear(self, x: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the linear part to a residual stream; the result is added to the stream after attention."""
        return self._mix(self.norm_in.apply_output(x))

    def _mix(self, x: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Values, pattern, output map and post-norm's linear part of a norm output."""
        v = einops.einsum(x, self.weights.W_V, "k d_model, kv d_model d_head -> kv k d_head")
        out = self._from_values(v.repeat_interleave(self.group, 0))
        return out if self.norm_out is None else self.norm_out.apply_output(out)

    def _from_values(self, v: Float[Tensor, "n_heads n_pos d_head"]) -> Float[Tensor, "n_pos d_model"]:
        z = einops.einsum(self.pattern, v, "head q k, head k d_head -> q head d_head")
        return einops.einsum(z, self.weights.W_O, "q head d_head, head d_head d_model -> q d_model")

    def heads(self, x: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos width"]:
        """Return what the heads mix of a norm output's values, biases left out, heads side by side."""
        v = einops.einsum(x, self.weights.W_V, "k d_model, kv d_model d_head -> kv k d_head")
        return self._mixed(v.repeat_interleave(self.group, 0))

    def _mixed(self, v: Float[Tensor, "n_heads n_pos d_head"]) -> Float[Tensor, "n_pos width"]:
        return einops.rearrange(self.pattern @ v, "head q d_head -> q (head d_head)")

    def heads_bias(self) -> Float[Tensor, "n_pos width"]:
        """Return what the values' biases add to the heads, side by side."""
        b_V = self.weights.b_V.repeat_interleave(self.group, 0)
        return self._mixed(einops.repeat(b_V, "head d_head -> head k d_head", k=self.pattern.shape[-1]))

    def write_heads(self, z: Float[Tensor, "n width"], pos: Int[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
        """Return what vectors at the heads, at the given positions, add to the residual stream."""
        out = z @ self.weights.W_O.flatten(0, 1)
        return out if self.norm_out is None else self.norm_out.apply_output_at(out, pos)

    def output_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return what the output bias adds to the residual stream."""
        out = self.weights.b_O.expand(self.pattern.shape[-1], -1)
        return out if self.norm_out is None else self.norm_out.apply_output(out)

    def adjoint_from_heads(self, g: Float[Tensor, "n width"], pos: int) -> Float[Tensor, "n_query n d_model"]:
        """Pull gradients at the heads of one position back to the residual stream: ``n_query = pos + 1``."""
        z = einops.rearrange(g, "t (head d_head) -> head t d_head", head=self.n_heads)
        W_V = self.weights.W_V.repeat_interleave(self.group, 0)
        per_head = einops.einsum(z, W_V, "head t d_head, head d_model d_head -> head t d_model")
        out = einops.einsum(self.pattern[:, pos, : pos + 1], per_head, "head k, head t d_model -> k t d_model")
        return self.norm_in.adjoint_output(out, slice(0, pos + 1))

    def attention_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return what the value and output biases add to the residual stream."""
        b_V = self.weights.b_V.repeat_interleave(self.group, 0)
        v = einops.repeat(b_V, "head d_head -> head k d_head", k=self.pattern.shape[-1])
        out = self._from_values(v) + self.weights.b_O
        return out if self.norm_out is None else self.norm_out.apply_output(out)

    def norm_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return what the norms' constants add to the residual stream."""
        out = self._mix(self.norm_in.constant_output())
        return out if self.norm_out is None else out + self.norm_out.constant_output()

    def adjoint(
        self, g: Float[Tensor, "n_query n_target d_model"], *, add: bool = False
    ) -> Float[Tensor, "n_query n_target d_model"]:
        """Pull gradients at the attention output back to the residual stream, with folded maps.

        Causal: a gradient at query positions ``< n_query`` reaches only those positions. With ``add`` the result is
        added to ``g`` itself (the bypass around attention), in place.
        """
        n_query, n_target, width = g.shape
        after = g if self.norm_out is None or not self.norm_out.linear else self._after(g)
        flat = after.reshape(1, n_query * n_target, width).expand(self.n_heads, -1, -1)
        z = torch.bmm(flat, self._to_head).view(self.n_heads, n_query, n_target * self.d_head)
        v = torch.bmm(self._pattern[:, :n_query, :n_query].transpose(1, 2), z)
        if self.group > 1:
            v = v.view(-1, self.group, *v.shape[1:]).sum(1)
        in_place = add and not self.norm_in.linear
        out = (g if in_place else torch.zeros_like(g)).view(n_query * n_target, width)
        for head, values in enumerate(v.view(len(v), n_query * n_target, self.d_head)):
            out.addmm_(values, self._to_resid[head])
        if not self.norm_in.linear:
            return out.view(g.shape)
        out = self.norm_in.adjoint_output(out.view(g.shape), slice(0, n_query))
        return g.add_(out) if add else out

    def _after(self, g: Float[Tensor, "n_query n_target d_model"]) -> Float[Tensor, "n_query n_target d_model"]:
        assert self.norm_out is not None
        return self.norm_out.adjoint_output(g, slice(0, g.shape[0]))

    def adjoint_from(self, g: Float[Tensor, "n_target d_model"], pos: int) -> Float[Tensor, "n_query n_target d_model"]:
        """The same for gradients that sit at the single query position ``pos``: ``n_query = pos + 1``.

        The value map is applied once per target and head instead of once per key position.
        """
        if self.norm_out is not None and self.norm_out.linear:
            g = self.norm_out.adjoint_output(g, pos)
        z = torch.matmul(g, self._to_head)
        to_resid = self._to_resid if self.group == 1 else self._to_resid.repeat_interleave(self.group, 0)
        per_head = torch.bmm(z, to_resid)
        pattern = self._pattern[:, pos, : pos + 1]
        out = (pattern.T @ per_head.flatten(1)).view(pos + 1, *per_head.shape[1:])
        return self.norm_in.adjoint_output(out, slice(0, pos + 1)) if self.norm_in.linear else out

    def adjoint_definition(
        self, g: Float[Tensor, "n_query n_target d_model"]
    ) -> Float[Tensor, "n_query n_target d_model"]:
        """The definition of ``adjoint``: each map's adjoint in turn, nothing folded."""
        n_query = g.shape[0]
        where = slice(0, n_query)
        g = g if self.norm_out is None else self.norm_out.adjoint_output(g, where)
        z = einops.einsum(g, self.weights.W_O, "q t d_model, head d_head d_model -> q t head d_head")
        pattern = self.pattern[:, :n_query, :n_query]
        v = einops.einsum(pattern, z, "head q k, q t head d_head -> k t head d_head")
        W_V = self.weights.W_V.repeat_interleave(self.group, 0)
        x = einops.einsum(v, W_V, "k t head d_head, head d_model d_head -> k t d_model")
        return self.norm_in.adjoint_output(x, where)

    def per_head(
        self, g: Float[Tensor, "d_model"], pos: int, source: Float[Tensor, "n_pos d_model"]
    ) -> Float[Tensor, "n_heads n_pos"]:
        """Return ``<g at query pos, what each head moves there from each key position of source>``."""
        g = g if self.norm_out is None else self.norm_out.adjoint_output(g[None], pos)[0]
        z = einops.einsum(g, self.weights.W_O, "d_model, head d_head d_model -> head d_head")
        return self.per_head_of_heads(z.flatten(), pos, source)

    def per_head_of_heads(
        self, g: Float[Tensor, "width"], pos: int, source: Float[Tensor, "n_pos d_model"]
    ) -> Float[Tensor, "n_heads n_pos"]:
        """The same for a gradient at the heads, side by side."""
        z = g.view(self.n_heads, self.d_head)
        W_V = self.weights.W_V.repeat_interleave(self.group, 0)
        v = einops.einsum(self.norm_in.apply_output(source), W_V, "k d_model, head d_model d_head -> head k d_head")
        return self.pattern[:, pos] * einops.einsum(z, v, "head d_head, head k d_head -> head k")

    def moved(self, source: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_query n_key d_model"]:
        """Return what attention moves to each query position from the source at each key position alone."""
        if self.norm_out is not None and self.norm_out.linear:
            raise MapsUnavailableError("a linearised post-norm mixes no positions, but is not folded")
        x = self.norm_in.apply_normalized(source)
        W_V = self.weights.W_V.repeat_interleave(self.group, 0)
        v = einops.einsum(x * self.norm_in.weights.gain, W_V, "k d_model, head d_model d_head -> k head d_head")
        out = einops.einsum(v, self._to_head, "k head d_head, head d_model d_head -> k head d_model")
        pattern = self.pattern if self.norm_out is None else self.pattern / self.norm_out.scale
        return einops.einsum(pattern, out, "head q k, k head d_model -> q k d_model")


def read_weights(model: HookedModel, dtype: torch.dtype) -> ModelWeights:
    """Read the linear parts of a model, in the given dtype.

    Raises:
        DictionaryError: A block has no norm before its attention or MLP, so that no transcoder's input is defined.
    """
    parallel = "blocks.0.hook_resid_mid" not in model.hook_dict
    width = int(model.cfg.d_model)
    with plain_tensors(), quiet_norm_edits():
        try:
            blocks = tuple(_read_block(block, width, dtype) for block in model.blocks)
            weights = ModelWeights(blocks, _probe_norm(model.ln_final, "ln_final", width, dtype), parallel, None)
        except MapsUnavailableError as error:
            raise DictionaryError(f"this architecture cannot be attributed: {error}") from error
        try:
            attention = [_read_attention(block.attn, dtype) for block in model.blocks]
        except (MapsUnavailableError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            return weights.without_attention(f"attention maps cannot be read: {error}")
    filled = (replace(b, attention=a) for b, a in zip(weights.blocks, attention, strict=True))
    return replace(weights, blocks=tuple(filled))


def _read_block(block: Any, width: int, dtype: torch.dtype) -> BlockWeights:
    """Read the norms of a block; attention is filled in later."""
    children = dict(block.named_children())

    def norm(name: str) -> NormWeights:
        if name not in children:
            raise MapsUnavailableError(f"a block has no {name}")
        return _probe_norm(children[name], name, width, dtype)

    post = {name: norm(name) if name in children else None for name in ("ln1_post", "ln2_post")}
    return BlockWeights(norm("ln1"), post["ln1_post"], norm("ln2"), post["ln2_post"], None)


def _read_attention(attn: Any, dtype: torch.dtype) -> AttentionWeights:
    def stored(name: str) -> Tensor | None:
        value = getattr(attn, name, None)
        return None if value is None else value.detach().to(dtype)

    W_V, W_O, b_V, b_O = stored("W_V"), stored("W_O"), stored("b_V"), stored("b_O")
    if W_V is None or W_O is None or W_V.ndim != 3 or W_O.ndim != 3 or W_O.shape[0] % W_V.shape[0]:
        raise MapsUnavailableError("W_V or W_O is not one matrix per head")
    # HookedTransformer repeats grouped value heads; keep one of each, the pattern's heads are summed per group.
    n_kv = getattr(getattr(attn, "cfg", None), "n_key_value_heads", None) or W_V.shape[0]
    step = W_V.shape[0] // n_kv
    W_V = W_V[::step]
    b_V = W_V.new_zeros(W_V.shape[0], W_V.shape[2]) if b_V is None else b_V[::step]
    return AttentionWeights(W_V, b_V, W_O, W_O.new_zeros(W_O.shape[-1]) if b_O is None else b_O)


def _probe_norm(module: Any, name: str, width: int, dtype: torch.dtype) -> NormWeights:
    """Measure a norm: feed it, replace its normalised value by ones and zeros, and read gain and bias at its output."""
    point = getattr(module, "hook_normalized", None)
    if point is None:
        raise MapsUnavailableError(f"{name} has no hook_normalized")
    like = next(iter(module.parameters()), torch.empty(0, dtype=dtype))
    probe = torch.linspace(1, 3, width, dtype=like.dtype, device=like.device)[None, None]
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    with suspended(_hook_points(module)):
        for value in (1.0, 0.0):
            handle = point.register_forward_hook(_replace(value, seen))
            try:
                outputs.append(module(probe).detach()[0, 0].to(dtype))
            except AttributeError as error:
                raise MapsUnavailableError(f"{name} cannot be measured: {error}") from error
            finally:
                handle.remove()
    if not seen:
        raise MapsUnavailableError(f"{name}.hook_normalized never fired")
    normalized = seen[0].to(torch.float64)
    centered = bool(normalized.mean().abs() < 1e-3 * normalized.abs().max())
    return NormWeights(centered, outputs[0] - outputs[1], outputs[1])


def _hook_points(module: Any) -> Iterator[Any]:
    return (child for child in module.modules() if hasattr(child, "add_hook") and hasattr(child, "fwd_hooks"))


def _replace(value: float, seen: list[Tensor]) -> Any:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach())
        return torch.full_like(output, value)

    return hook


def _at(per_position: Float[Tensor, "n_pos width"], where: Where) -> Tensor:
    """Select positions and add the axis that makes them broadcast against adjoint tensors."""
    value = per_position[where]
    return value[:, None] if isinstance(where, slice) else value

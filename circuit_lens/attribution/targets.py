"""What a graph explains: logits, differences, directions, features, or any scalar of the logits.

Every target becomes a linear read-out of the frozen model: a vector at a hook, a constant that belongs to the target
alone, and a value. A logit is read before any soft-cap and minus the mean over the vocabulary (Ameisen et al. 2025).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.mlp_paths import read_adjoint
from circuit_lens.dictionaries.points import Place, parse_hook, read_kind
from circuit_lens.errors import TargetError
from circuit_lens.graph.nodes import Feature
from circuit_lens.protocols import HookedModel
from circuit_lens.running import single_token, token_string

FINAL_HOOK = "unembed.hook_in"  # the last norm's output
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Targets:
    """Linear read-outs of the frozen model.

    Attributes:
        hooks: The hook each target reads: a dictionary's read hook, or ``unembed.hook_in``.
        layer: Layer of that hook, ``n_layers`` for ``unembed.hook_in``.
        pos: Position (the last one, for a target at several).
        vectors: What the hook's value at that position is contracted with, followed by zeros where others are wider.
        spread: For a target at several positions of ``unembed.hook_in``, its vectors ``[n_pos, d_model]``.
    """

    hooks: tuple[str, ...]
    layer: Int[Tensor, "n"]
    pos: Int[Tensor, "n"]
    vectors: Float[Tensor, "n width"]
    spread: dict[int, Float[Tensor, "n_pos d_model"]]

    def __len__(self) -> int:
        return len(self.hooks)

    @cached_property
    def ranks(self) -> list[int]:
        """The places as one number each, in the order of computing over all layers."""
        return [place.at(layer) for place, layer in zip(self.places, self.layer.tolist(), strict=True)]

    @cached_property
    def places(self) -> list[Place]:
        """Where in its block each target reads; the last norm stands before a first place behind the blocks."""
        of = {hook: Place.PRE_EDIT if hook == FINAL_HOOK else read_kind(hook).place for hook in set(self.hooks)}
        return [of[hook] for hook in self.hooks]


def pull_back(frozen: FrozenModel, targets: Targets, chosen: Sequence[int], pos: int) -> Float[Tensor, "n d_model"]:
    """Return targets that are all at position ``pos`` as gradients at the residual stream their hook reads."""
    hooks = [targets.hooks[i] for i in chosen]
    parts = []
    for hook in dict.fromkeys(hooks):
        members = [i for i, other in zip(chosen, hooks, strict=True) if other == hook]
        vectors = targets.vectors[members, : frozen.tokens.shape[1]]
        if hook == FINAL_HOOK:
            parts.append(frozen.ln_final.adjoint_output(vectors, pos))
        elif not read_kind(hook).in_mlp_branch:
            parts.append(vectors)
        else:
            parts.append(read_adjoint(read_kind(hook), frozen.ln2[parse_hook(hook).layer], vectors, pos))
    if len(parts) == 1:
        return parts[0]
    gradients = targets.vectors.new_zeros(len(chosen), frozen.tokens.shape[1])
    for hook, part in zip(dict.fromkeys(hooks), parts, strict=True):
        gradients[[row for row, other in enumerate(hooks) if other == hook]] = part
    return gradients


def pull_back_spread(frozen: FrozenModel, targets: Targets, i: int) -> Float[Tensor, "n_pos d_model"]:
    """Return a target at several positions as gradients at the final residual stream."""
    return frozen.ln_final.adjoint_output(targets.spread[i][:, None], slice(0, frozen.n_pos))[:, 0]


@dataclass(frozen=True)
class SalientLogits:
    """The most probable next tokens: at most ``max_n``, until they hold ``mass`` of the probability."""

    max_n: int = 10
    mass: float = 0.95
    pos: int | str = -1


@dataclass(frozen=True)
class TokenLogits:
    """The logits of given tokens (ids, or strings that are one token each)."""

    tokens: tuple[int | str, ...]
    pos: int | str = -1


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another."""

    token: int | str
    other: int | str
    pos: int | str = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """The inner product of a vector with the last norm's output."""

    vector: Float[Tensor, "d_model"]
    pos: int | str = -1
    name: str = "direction"


TargetSpec = SalientLogits | TokenLogits | LogitDifference | Direction | Feature | Metric


def salient_logits(*, max_n: int = 10, mass: float = 0.95, pos: int | str = -1) -> SalientLogits:
    """Explain the most probable next tokens at a position: at most ``max_n``, until they hold ``mass`` of it.

    >>> salient_logits(max_n=3)
    SalientLogits(max_n=3, mass=0.95, pos=-1)

    Raises:
        TargetError: ``max_n`` below one or ``mass`` outside (0, 1].
    """
    if max_n < 1 or not 0 < mass <= 1:
        raise TargetError(f"max_n={max_n}, mass={mass}: max_n must be at least 1 and mass in (0, 1]")
    return SalientLogits(max_n, mass, pos)


def token_logits(*tokens: int | str, pos: int | str = -1) -> TokenLogits:
    """Explain the logits of given tokens (ids, or strings that are one token each) at a position.

    >>> token_logits("Austin", "Houston", pos=-2)
    TokenLogits(tokens=('Austin', 'Houston'), pos=-2)

    Raises:
        TargetError: No token given.
    """
    if not tokens:
        raise TargetError("token_logits needs at least one token")
    return TokenLogits(tokens, pos)


def logit_difference(token: int | str, other: int | str, *, pos: int | str = -1) -> LogitDifference:
    """Explain the logit of ``token`` minus the logit of ``other`` at a position.

    >>> logit_difference(" Austin", " Dallas")
    LogitDifference(token=' Austin', other=' Dallas', pos=-1)
    """
    return LogitDifference(token, other, pos)


def direction(vector: Float[Tensor, "d_model"], *, pos: int | str = -1, name: str = "direction") -> Direction:
    """Explain the inner product of ``vector`` with the last norm's output (a column of W_U gives a logit)."""
    return Direction(vector, pos, name)


@dataclass(frozen=True, eq=False)
class Resolved:
    """One target on one prompt: the row's read-out, and what its node says.

    Attributes:
        name: Text of the node.
        index: Token id, or ``d_vocab + i`` for what is no token.
        hook, layer, pos, vector, spread: See :class:`Targets`.
        value: Its value in the run (demeaned logit, metric, pre-activation).
        bias: The part of the value that belongs to the target alone.
        weight: Start weight of the influence: the token's probability, 1 for what is no token.
        remainder: The part of ``bias`` that the linear read-out of a contrast's metric leaves of its change.
    """

    name: str
    index: int
    hook: str
    layer: int
    pos: int
    vector: Float[Tensor, "d_model"]
    spread: Float[Tensor, "n_pos d_model"] | None
    value: float
    bias: float
    weight: float
    remainder: float = 0.0


def side_by_side(vectors: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "n width"]:
    """Return vectors of several widths as one matrix, the shorter ones followed by zeros."""
    width = max(v.shape[1] for v in vectors)
    return torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in vectors])


def stack(resolved: Sequence[Resolved]) -> Targets:
    """Return resolved targets as one record of tensors."""
    vectors = side_by_side([r.vector[None] for r in resolved])
    return Targets(
        tuple(r.hook for r in resolved),
        torch.tensor([r.layer for r in resolved]),
        torch.tensor([r.pos for r in resolved]),
        vectors,
        {i: r.spread for i, r in enumerate(resolved) if r.spread is not None},
    )


def metric_name(metric: Metric) -> str:
    """Return what a metric is called in a graph."""
    return getattr(metric, "__name__", None) or type(metric).__name__


def linearise(
    metric: Metric, logits: Float[Tensor, "n_pos d_vocab"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n_pos d_vocab"]]:
    """Return the value and the gradient of a metric at some logits.

    Raises:
        TargetError: The metric is no differentiable scalar of the logits, or is NaN or infinite there.
    """
    name = metric_name(metric)
    with torch.inference_mode(False), torch.enable_grad():
        logits = logits.detach().clone()[None].requires_grad_()
        value = metric(logits.clone())  # a clone: metrics may edit in place, which autograd forbids for a leaf
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TargetError(
                f"the metric {name} must return one differentiable number computed from the logits "
                f"[1, n_pos, d_vocab], not {given}; return a scalar tensor, without .item(), .detach() or argmax"
            )
        gradient = torch.autograd.grad(value.sum(), logits)[0][0]
    value = value.detach().reshape(())
    if not bool(torch.isfinite(gradient).all() and torch.isfinite(value).all()):
        raise TargetError(
            f"the metric {name} or its gradient is NaN or infinite at this run, so it cannot be linearised"
        )
    return value, gradient


class Resolver:
    """Turns what a user asked for into read-outs of one prompt's frozen model.

    Args:
        model: The model, for its unembedding and tokenizer.
        frozen: The frozen pass.
        position: Turns a position as a user writes it into an index.
        feature: Resolves a feature target (the local model knows the dictionaries).
    """

    def __init__(
        self,
        model: HookedModel,
        frozen: FrozenModel,
        position: Callable[[int | str], int],
        feature: Callable[[Feature, int], Resolved],
    ) -> None:
        self.model, self.frozen, self.position, self.feature = model, frozen, position, feature
        self.d_vocab = int(model.W_U.shape[-1])
        W_U, b_U = model.W_U.detach(), getattr(model, "b_U", None)
        self.W_U: Float[Tensor, "d_model d_vocab"] = W_U
        self.b_U: Float[Tensor, "d_vocab"] = W_U.new_zeros(self.d_vocab) if b_U is None else b_U.detach()

    def resolve(self, targets: Any) -> list[Resolved]:
        """Resolve what was given as ``targets=``.

        Raises:
            TargetError: Nothing to explain, a string that is not one token, an unknown feature, a metric that is no
                differentiable scalar.
        """
        specs = self._specs(targets)
        resolved: list[Resolved] = []
        for spec in specs:
            resolved += self._one(spec, sum(r.index >= self.d_vocab for r in resolved))
        if not resolved:
            raise TargetError("there is no target; give tokens, cl.salient_logits(), features or a metric")
        return resolved

    def _specs(self, targets: Any) -> list[TargetSpec]:
        if targets is None:
            return [SalientLogits()]
        if isinstance(targets, Tensor):
            if targets.is_floating_point():
                raise TargetError("a float tensor is no target; for a direction use cl.direction(vector)")
            targets = targets.reshape(-1).tolist()
        if isinstance(targets, bool):
            raise TargetError(f"{targets} is no target; give a token id or string")
        if isinstance(targets, numbers.Integral) and not isinstance(targets, bool):
            targets = int(targets)
        if isinstance(targets, (int, str)):
            return [TokenLogits((targets,))]
        if isinstance(targets, (SalientLogits, TokenLogits, LogitDifference, Direction, Feature)):
            return [targets]
        if isinstance(targets, Sequence):
            return [spec for item in targets for spec in self._specs(item)]
        if callable(targets):
            return [cast(Metric, targets)]
        raise TargetError(
            f"{type(targets).__name__} is no target; give token strings or ids, cl.salient_logits(), "
            "cl.logit_difference(a, b), cl.direction(vector), cl.Feature(...), or a function logits -> scalar"
        )

    def _one(self, spec: TargetSpec, n_virtual: int) -> list[Resolved]:
        match spec:
            case SalientLogits():
                return self._salient(spec)
            case TokenLogits():
                pos = self.position(spec.pos)
                return [self._token(self.token_id(token), pos) for token in spec.tokens]
            case LogitDifference():
                return [self._difference(spec, n_virtual)]
            case Direction():
                return [self._direction(spec, n_virtual)]
            case Feature():
                return [self.feature(spec, self.d_vocab + n_virtual)]
            case _:
                return [self._metric(spec, n_virtual)]

    def token_id(self, token: int | str) -> int:
        """Return a token's id.

        Raises:
            TargetError: Text that is not exactly one token, or an id outside the vocabulary.
        """
        return single_token(self.model, token)

    def _salient(self, spec: SalientLogits) -> list[Resolved]:
        pos = self.position(spec.pos)
        probs, ids = self.frozen.capped_logits()[pos].softmax(-1).topk(min(spec.max_n, self.d_vocab))
        n = min(int((probs.cumsum(0) < spec.mass).sum()) + 1, len(ids))
        return [self._token(int(i), pos) for i in ids[:n]]

    def _token(self, token: int, pos: int) -> Resolved:
        weight = float(self.frozen.capped_logits()[pos].softmax(-1)[token])
        vector = self.W_U[:, token].to(self.frozen.final) - self._mean_vector()
        bias = float(self.b_U[token] - self.b_U.mean())
        return self._linear(token_string(self.model, token), token, pos, vector, bias, weight)

    def _mean_vector(self) -> Float[Tensor, "d_model"]:
        return self.W_U.mean(-1, dtype=self.frozen.final.dtype)

    def _difference(self, spec: LogitDifference, n_virtual: int) -> Resolved:
        a, b = self.token_id(spec.token), self.token_id(spec.other)
        if a == b:
            raise TargetError(f"a logit difference needs two tokens, not {spec.token!r} twice")
        vector = self.W_U[:, a].to(self.frozen.final) - self.W_U[:, b].to(self.frozen.final)
        name = f"{token_string(self.model, a)} - {token_string(self.model, b)}"
        bias = float(self.b_U[a] - self.b_U[b])
        return self._linear(name, self.d_vocab + n_virtual, self.position(spec.pos), vector, bias, 1.0)

    def _direction(self, spec: Direction, n_virtual: int) -> Resolved:
        width = self.frozen.final.shape[-1]
        if spec.vector.shape != (width,):
            raise TargetError(f"a direction must have shape ({width},), not {tuple(spec.vector.shape)}")
        vector = spec.vector.detach().to(self.frozen.final)
        if not bool(torch.isfinite(vector).all() and vector.any()):
            raise TargetError("a direction must not be zero, NaN or infinite")
        return self._linear(spec.name, self.d_vocab + n_virtual, self.position(spec.pos), vector, 0.0, 1.0)

    def _linear(self, name: str, index: int, pos: int, vector: Tensor, bias: float, weight: float) -> Resolved:
        norm = self.frozen.ln_final
        bias += float(norm.constant_output()[pos] @ vector)
        value = float(norm.apply_output(self.frozen.final)[pos] @ vector) + bias
        return Resolved(name, index, FINAL_HOOK, self.frozen.n_layers, pos, vector, None, value, bias, weight)

    def _metric(self, metric: Metric, n_virtual: int) -> Resolved:
        """Linearise a scalar of the logits (as the model gives them, soft-cap included) at the run."""
        frozen, dtype = self.frozen, self.frozen.final.dtype
        name = metric_name(metric)
        value, gradient = linearise(metric, frozen.capped_logits())
        if frozen.soft_cap is not None:
            gradient = gradient * (1 - (frozen.capped_logits() / frozen.soft_cap) ** 2)
        vectors = gradient @ self.W_U.to(dtype).T
        used = gradient.abs().sum(-1).nonzero()[:, 0].tolist()
        if not used:
            raise TargetError(f"the metric {name} does not depend on the logits at this run: its gradient is zero")
        linear = float((frozen.ln_final.apply_output(frozen.final) * vectors).sum())
        pos = used[-1]
        spread = vectors if len(used) > 1 else None
        # The constant of the linearisation, the unembedding's bias and the last norm's constant are the target's own.
        bias = float(value) - linear
        return Resolved(
            name,
            self.d_vocab + n_virtual,
            FINAL_HOOK,
            frozen.n_layers,
            pos,
            vectors[pos],
            spread,
            float(value),
            bias,
            1.0,
        )

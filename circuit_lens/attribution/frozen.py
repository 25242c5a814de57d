"""The frozen pass: one prompt's local replacement model, computed once, with everything that must be constant held.

The residual stream is rebuilt from its parts: embeddings, attention with constant pattern and denominators, and the MLP
outputs as the run had them. Pre-activations, activations and errors are those of this pass, so rows conserve
exactly. Where the run's own residual stream departs from the rebuilt one, somebody edited it: the difference is a
patch, a source of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.linear_maps import (
    AttentionWeights,
    BlockWeights,
    FrozenAttention,
    FrozenNorm,
    MapsUnavailableError,
    ModelWeights,
    NormWeights,
)
from circuit_lens.attribution.values import RunValues, has_learned_positions
from circuit_lens.errors import ConsistencyError
from circuit_lens.hooks import present_hooks
from circuit_lens.protocols import HookedModel

# Relative difference of a residual vector, per dtype of the run, above which it was edited rather than rounded. A
# bridge computes some norms in float32 even in a float64 model, hence the first.
PATCH_LIMIT = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# Relative difference of the logits from the model's own, above which the frozen model is not the model.
GAP_LIMIT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Patch:
    """An edit of the residual stream: where it enters (``resid_pre``, ``_mid``, ``_post``) and what it adds."""

    layer: int
    site: str
    vectors: Float[Tensor, "n_pos d_model"]

    @property
    def positions(self) -> list[int]:
        """Positions at which the stream was edited."""
        return self.vectors.abs().sum(-1).nonzero()[:, 0].tolist()


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """One prompt's frozen model.

    Attributes:
        values: The run it was made from.
        parallel: Attention and MLP of a block read the same residual stream.
        attention: Frozen attention per layer; empty where it is not known as linear maps.
        ln2, ln2_post: Frozen norms around each MLP.
        ln_final: The last norm.
        tokens: What each token adds to the first residual stream.
        positions: What each learned position embedding adds, None where there is none.
        pre: Residual stream before each block.
        moved: What each attention layer adds to it; empty where it is not known as linear maps.
        base: Residual stream that enters each MLP branch.
        post: Residual stream behind each block.
        mlp_out: What each MLP added to the residual stream in the run.
        patches: Edits of the residual stream.
        final: Residual stream that enters the last norm.
        logits: Logits before any soft-cap, from the rebuilt stream.
        soft_cap: Cap of the logits, None where there is none.
        gap: Largest difference of the logits from the model's own, relative to the largest logit; None without them.
    """

    values: RunValues
    parallel: bool
    attention: list[FrozenAttention]
    ln2: list[FrozenNorm]
    ln2_post: list[FrozenNorm | None]
    ln_final: FrozenNorm
    tokens: Float[Tensor, "n_pos d_model"]
    positions: Float[Tensor, "n_pos d_model"] | None
    pre: list[Float[Tensor, "n_pos d_model"]]
    moved: list[Float[Tensor, "n_pos d_model"]]
    base: list[Float[Tensor, "n_pos d_model"]]
    post: list[Float[Tensor, "n_pos d_model"]]
    mlp_out: list[Float[Tensor, "n_pos d_model"]]
    patches: list[Patch]
    final: Float[Tensor, "n_pos d_model"]
    logits: Float[Tensor, "n_pos d_vocab"]
    soft_cap: float | None
    gap: float | None

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.mlp_out)

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return len(self.tokens)

    def capped_logits(self) -> Float[Tensor, "n_pos d_vocab"]:
        """Return the logits as the model gives them, soft-cap included."""
        return self.logits if self.soft_cap is None else self.soft_cap * torch.tanh(self.logits / self.soft_cap)


def freeze(model: HookedModel, weights: ModelWeights, values: RunValues, *, linear_norms: bool) -> FrozenModel:
    """Rebuild one run as a frozen linear model.

    Args:
        model: The model, for its unembedding.
        weights: Its linear parts.
        values: The run.
        linear_norms: Norms by their Jacobian instead of a constant denominator.

    Raises:
        MapsUnavailableError: Attention as these maps describe it is not what the model does.
        ConsistencyError: The cache or the hooks leave logits that do not follow from the residual stream.
    """
    stream = _Stream(values, known=weights.unavailable is None)
    tokens, positions = _embeddings(model, values)
    x = stream.checked(tokens if positions is None else tokens + positions, 0, "resid_pre")
    attention, ln2, ln2_post, pre, added, base, behind, mlp_out = [], [], [], [], [], [], [], []
    for layer, block in enumerate(weights.blocks):
        if layer:
            x = stream.checked(x, layer, "resid_pre")
        pre.append(x)
        ln1 = _norm(block.ln1, values.at(layer, "ln1.hook_scale"), x, linear_norms)
        moved = torch.zeros_like(x)
        if block.attention is not None:
            frozen, moved = _attention(block, block.attention, values, layer, ln1, linear_norms)
            attention.append(frozen)
            added.append(moved)
        mid = stream.checked(x + moved, layer, "resid_mid")
        base.append(x if weights.parallel else mid)
        ln2.append(_norm(block.ln2, values.at(layer, "ln2.hook_scale"), base[-1], linear_norms))
        mlp_out.append(values.at(layer, "hook_mlp_out"))
        post = block.ln2_post
        ln2_post.append(None if post is None else _post_norm(post, values, layer, mlp_out[-1], linear_norms))
        x = stream.checked(mid + mlp_out[-1], layer, "resid_post")
        behind.append(x)
    ln_final = _norm(weights.ln_final, values["ln_final.hook_scale"], x, linear_norms)
    _check_final(values, ln_final)
    stream.judge(bool(values.from_cache or values.fwd_hooks or present_hooks(model)))
    logits = (ln_final.apply_output(x) + ln_final.constant_output()) @ model.W_U.detach().to(x)
    b_U = getattr(model, "b_U", None)
    logits = logits if b_U is None else logits + b_U.detach().to(x)
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    cap = float(cap) if cap is not None and cap > 0 else None
    gap = _gap(values, logits, cap)
    return FrozenModel(
        values, weights.parallel, attention, ln2, ln2_post, ln_final, tokens, positions, pre, added, base, behind,
        mlp_out, stream.patches, x, logits, cap, gap,
    )  # fmt: skip


def _norm(weights: NormWeights, scale: Tensor, x: Tensor, linear: bool) -> FrozenNorm:
    centered = x - x.mean(-1, keepdim=True) if weights.centered else x
    return FrozenNorm(weights, scale, centered / scale, linear)


def _attention(
    block: BlockWeights, weights: AttentionWeights, values: RunValues, layer: int, ln1: FrozenNorm, linear: bool
) -> tuple[FrozenAttention, Tensor]:
    """Freeze a layer's attention; also return what it adds to the residual stream."""
    pattern = values.at(layer, "attn.hook_pattern")
    frozen = FrozenAttention(weights, pattern, ln1, None)
    raw = frozen.linear(ln1.normalized * ln1.scale) + frozen.attention_bias() + frozen.norm_bias()
    if block.ln1_post is None:
        return frozen, raw
    post = _norm(block.ln1_post, values.at(layer, "ln1_post.hook_scale"), raw, linear)
    return FrozenAttention(weights, pattern, ln1, post), post.apply_output(raw) + post.constant_output()


def _post_norm(weights: NormWeights, values: RunValues, layer: int, mlp_out: Tensor, linear: bool) -> FrozenNorm:
    """Freeze the norm after an MLP; its normalised value follows from its output, which is what the run recorded."""
    scale = values.at(layer, "ln2_post.hook_scale")
    gain = torch.where(weights.gain == 0, torch.ones_like(weights.gain), weights.gain)
    return FrozenNorm(weights, scale, (mlp_out - weights.bias) / gain, linear)


def _embeddings(model: HookedModel, values: RunValues) -> tuple[Tensor, Tensor | None]:
    """Return what tokens and learned positions add to the first residual stream.

    Some models scale embeddings after ``hook_embed``: one factor for all positions, the median one, so that an edit at
    some positions does not change it.
    """
    embed = values["hook_embed"]
    positions = values["hook_pos_embed"] if has_learned_positions(model) else None
    first = values.at(0, "hook_resid_pre")
    rest = first if positions is None else first - positions
    factors = (rest * embed).sum(-1) / embed.square().sum(-1).clamp_min(torch.finfo(embed.dtype).tiny)
    factor = factors.median()
    return (embed if (factor - 1).abs() < 1e-3 else embed * factor), positions


class _Stream:
    """Compares the rebuilt residual stream with the run's and collects the differences that are no rounding."""

    def __init__(self, values: RunValues, *, known: bool) -> None:
        self.values, self.known = values, known
        self.patches: list[Patch] = []
        self.limit = PATCH_LIMIT.get(values.native, 1e-2)
        self.checked_vectors = self.different = 0

    def checked(self, x: Float[Tensor, "n_pos d_model"], layer: int, site: str) -> Float[Tensor, "n_pos d_model"]:
        name = f"blocks.{layer}.hook_{site}"
        if name not in self.values.values:
            return x
        if not self.known and not (layer == 0 and site == "resid_pre"):
            return self.values[name]
        jump = self.values[name] - x
        large = jump.norm(dim=-1) > self.limit * self.values[name].norm(dim=-1).clamp_min(x.norm(dim=-1))
        self.checked_vectors += len(large)
        self.different += int(large.sum())
        if not bool(large.any()):
            return x
        jump = jump * large[:, None]
        self.patches.append(Patch(layer, site, jump))
        return x + jump

    def judge(self, edits_possible: bool) -> None:
        """Raise if the differences cannot be a user's edits.

        A stream that departs after every layer's attention (or before every layer), at every position, is an
        architecture that these maps do not describe (a multiplier, a norm in another place), not an edit.
        """
        few = 2 * self.different <= self.checked_vectors
        if not self.patches or (edits_possible and few and not self._everywhere()):
            return
        where = f"blocks.{self.patches[0].layer}.hook_{self.patches[0].site}"
        if self.values.from_cache:
            raise ConsistencyError(
                f"the cache does not fit this model: its residual stream departs from the model's weights at "
                f"{self.different} of {self.checked_vectors} places, first at {where}. Was it made with other weights "
                "or another processing (from_pretrained against from_pretrained_no_processing), or on other tokens?"
            )
        raise MapsUnavailableError(
            f"the model's residual stream is not norm, attention with constant pattern, and MLP: it departs at {where}"
        )

    def _everywhere(self) -> bool:
        """Whether the stream departs at one place of a block in every layer and at every position."""
        n_layers = sum(name.endswith("hook_mlp_out") for name in self.values.values)
        # The first position attends to itself alone, where a norm after attention is the same as one before it.
        whole = [patch.site for patch in self.patches if bool(patch.vectors.any(-1)[1:].all())]
        # The first layer's ``resid_pre`` is the embedding, which blocks do not make.
        made = {"resid_pre": n_layers - 1, "resid_mid": n_layers}
        # The stream behind the last block is always looked at, those behind others where a dictionary reads them.
        made["resid_post"] = sum(name.endswith("hook_resid_post") for name in self.values.values)
        return any(n > 1 and whole.count(site) >= n for site, n in made.items())


def _check_final(values: RunValues, ln_final: FrozenNorm) -> None:
    """Raise if the last norm's value is not what the residual stream gives: no source explains such an edit."""
    own = values.values.get("ln_final.hook_normalized")
    if own is None:
        return
    gap = float((own - ln_final.normalized).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
    if gap > PATCH_LIMIT.get(values.native, 1e-2):
        raise ConsistencyError(
            f"the last norm's value, ln_final.hook_normalized, differs by {gap:.1e} in the run from what the residual "
            "stream gives: something edits it there. Edit the residual stream instead"
        )


def _gap(values: RunValues, logits: Float[Tensor, "n_pos d_vocab"], cap: float | None) -> float | None:
    own = values.logits
    mine = logits if cap is None else cap * torch.tanh(logits / cap)
    if own is None:
        own = values.values.get("unembed.hook_out")
        mine = logits
    if own is None:
        return None
    gap = float((mine - own).abs().max() / own.abs().max().clamp_min(torch.finfo(own.dtype).tiny))
    limit = GAP_LIMIT.get(values.native, 1e-2)
    if gap > limit:
        raise ConsistencyError(
            f"the model's logits differ from those of its residual stream by {gap:.1e} of the largest (limit "
            f"{limit:.0e}): a hook edits the last norm or the unembedding, or the model adds something after the blocks"
        )
    return gap

"""Two runs of equal length as one affine model that is exact at both: the secant model.

A frozen run is a chain of linear maps, one per attention layer, skip and norm, with other maps for every run. Of two
runs c (the prompt) and b (the baseline), what a map adds to the stream differs by

    L_c x_c - L_b x_b = L_m (x_c - x_b) + (L_c - L_b) x_m,     L_m = (L_c + L_b) / 2,  x_m = (x_c + x_b) / 2,

the product rule of finite differences: exact, not to first order. The first term hands on what changed upstream; the
second is a source of its own, which says that the map changed. So the differences of two streams obey the linear maps
L_m, with changes of maps as sources beside those of a frozen run, and the machinery of one run applies.

Attention is the product of a pattern P and of norm denominators (u = 1 / (σ_in σ_out), both constant in a run), so the
effective pattern of L_m is the mean of P u, and its change splits by the same rule, Δ(P u) = ΔP u_m + P_m Δu, into
"attention change" (what it attends to) and "norm change" (how it is scaled). A norm's L_m has the mean of 1 / σ. The
path through an MLP (a skip, a Jacobian) is the mean of the two runs' paths, and what it leaves is "norm change" for a
skip, "mlp change" for a Jacobian. Features contribute their change of activation, errors the change of the error,
tokens the change of the embedding; learned positions and the constants of both runs cancel.

Features are linear between the runs as well: a feature whose pre-activation changes by Δh changes its activation by
Δa = (Δa / Δh) Δh, whether it is active on both runs or switches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.collect import explained_share, patch_points, post_gain
from circuit_lens.attribution.frozen import FrozenModel, Patch
from circuit_lens.attribution.linear_maps import FrozenAttention, FrozenNorm, Where
from circuit_lens.attribution.mlp_paths import MlpPath, read_value
from circuit_lens.attribution.sources import ActiveFeatures, PointSource, Sources
from circuit_lens.attribution.targets import FINAL_HOOK, Targets
from circuit_lens.attribution.writes import written_by
from circuit_lens.dictionaries.points import Place, Write, parse_hook, read_kind, write_kind
from circuit_lens.graph.nodes import NodeKind

# Units of rounding by which a feature's activations must differ to be a change.
_ROUNDING = 32
_PART = 4096  # features whose encoder rows are held at once


@dataclass(frozen=True, eq=False)
class Run:
    """One of the two runs: its frozen pass and its sources."""

    frozen: FrozenModel
    sources: Sources


@dataclass(frozen=True, eq=False)
class MeanPath:
    """The mean of two linear paths through an MLP; see :class:`MlpPath`."""

    first: MlpPath
    second: MlpPath

    def linear(self, base: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
        """Apply the path."""
        return (self.first.linear(base) + self.second.linear(base)) / 2

    def norm_bias(self) -> Float[Tensor, "n_pos d_model"]:
        """Return the mean of the constants."""
        return (self.first.norm_bias() + self.second.norm_bias()) / 2

    def adjoint(self, g: Float[Tensor, "*target d_model"], where: Where) -> Float[Tensor, "*target d_model"]:
        """Pull a gradient at the MLP branch's output back to the residual stream that enters it."""
        return (self.first.adjoint(g, where) + self.second.adjoint(g, where)) / 2


def secant_norm(c: FrozenNorm, b: FrozenNorm) -> FrozenNorm:
    """Return the mean of two frozen norms: the mean of 1 / denominator."""
    scale = 2 / (1 / c.scale + 1 / b.scale)
    return FrozenNorm(c.weights, scale, (c.normalized + b.normalized) / 2, False)


def secant_attention(c: FrozenAttention, b: FrozenAttention) -> FrozenAttention:
    """Return the mean of two frozen attention layers: denominators are in its pattern."""
    return _with_pattern(c, (c.pattern * _per_edge(c) + b.pattern * _per_edge(b)) / 2)


def attention_change(
    c: FrozenAttention, b: FrozenAttention, middle: Float[Tensor, "n_pos d_model"]
) -> Float[Tensor, "n_pos d_model"]:
    """Return what attention adds because its pattern changed: ΔP u_m on the mean stream, biases included."""
    change = c.pattern - b.pattern
    moved = _with_pattern(c, change * (_per_edge(c) + _per_edge(b)) / 2).linear(middle)
    # Constants (the first norm's bias, the values' bias) have lost their denominator: only the post-norm's is left.
    constant = _with_pattern(c, change * (_per_query(c) + _per_query(b)) / 2)
    empty = _with_pattern(c, torch.zeros_like(change))
    return moved + _constants(constant) - _constants(empty)


def _constants(attention: FrozenAttention) -> Float[Tensor, "n_pos d_model"]:
    return attention.attention_bias() + attention.norm_bias()


def _per_query(attention: FrozenAttention) -> Float[Tensor, "n_query 1"]:
    """1 / denominator of the post-norm, 1 without one."""
    post = attention.norm_out
    return torch.ones_like(attention.norm_in.scale) if post is None else 1 / post.scale


def _per_edge(attention: FrozenAttention) -> Float[Tensor, "n_query n_key"]:
    """1 / denominators, of the norm before at the key, and of the norm after at the query."""
    return _per_query(attention) / attention.norm_in.scale[:, 0]


def _with_pattern(like: FrozenAttention, pattern: Float[Tensor, "n_heads n_pos n_pos"]) -> FrozenAttention:
    """Return attention with this effective pattern, all denominators 1."""

    def plain(norm: FrozenNorm) -> FrozenNorm:
        return replace(norm, scale=torch.ones_like(norm.scale))

    post = like.norm_out
    return FrozenAttention(like.weights, pattern, plain(like.norm_in), None if post is None else plain(post))


def secant_model(c: FrozenModel, b: FrozenModel) -> FrozenModel:
    """Return the secant model's maps and streams: every vector in it is a difference of the two runs.

    The stream is summed up from what changed, so that its rounding is that of changes rather than of whole streams.
    """
    patches = _patches(c, b)
    jumps = {(patch.layer, patch.site): patch.vectors for patch in patches}
    x, positions = c.tokens - b.tokens, None
    if c.positions is not None and b.positions is not None:
        positions = c.positions - b.positions
        positions = positions if bool(positions.any()) else None
        x = x if positions is None else x + positions
    pre, base, post = [], [], []
    moved = [one - other for one, other in zip(c.moved, b.moved, strict=True)]
    mlp_out = [one - other for one, other in zip(c.mlp_out, b.mlp_out, strict=True)]
    for layer in range(c.n_layers):
        x = x + jumps.get((layer, "resid_pre"), 0)
        pre.append(x)
        mid = x + moved[layer] + jumps.get((layer, "resid_mid"), 0)
        base.append(x if c.parallel else mid)
        x = mid + mlp_out[layer] + jumps.get((layer, "resid_post"), 0)
        post.append(x)
    return FrozenModel(
        values=c.values,
        parallel=c.parallel,
        attention=[secant_attention(*pair) for pair in zip(c.attention, b.attention, strict=True)],
        ln2=[secant_norm(*pair) for pair in zip(c.ln2, b.ln2, strict=True)],
        ln2_post=[
            None if one is None or other is None else secant_norm(one, other)
            for one, other in zip(c.ln2_post, b.ln2_post, strict=True)
        ],
        ln_final=secant_norm(c.ln_final, b.ln_final),
        tokens=c.tokens - b.tokens,
        positions=positions,
        pre=pre,
        moved=moved,
        base=base,
        post=post,
        mlp_out=mlp_out,
        patches=patches,
        final=x,
        logits=c.logits - b.logits,
        soft_cap=None,
        gap=None if c.gap is None or b.gap is None else max(c.gap, b.gap),
    )


def _patches(c: FrozenModel, b: FrozenModel) -> list[Patch]:
    """Differences of what the user's edits added, by place; an edit that both runs have alike cancels."""
    found = {(p.layer, p.site): p.vectors for p in c.patches}
    for p in b.patches:
        found[p.layer, p.site] = found.get((p.layer, p.site), torch.zeros_like(p.vectors)) - p.vectors
    return [Patch(layer, site, vectors) for (layer, site), vectors in sorted(found.items()) if bool(vectors.any())]


def secant_sources(secant: FrozenModel, c: Run, b: Run) -> Sources:
    """Return what changed between two runs, as sources of the secant model."""
    features: list[ActiveFeatures] = []
    for one, other in zip(c.sources.features, b.sources.features, strict=True):
        features.append(_changed(secant, c.frozen, one, b.frozen, other, sum(map(len, features))))
    points = [PointSource(NodeKind.TOKEN, 0, Place.PRE_EDIT, "", secant.tokens, -1), *patch_points(secant)]
    if secant.positions is not None:
        points.append(PointSource(NodeKind.POSITION, 0, Place.PRE_EDIT, "", secant.positions, -1))
    paths: list[MlpPath | None] = []
    found = Sources(features, points, paths, [], secant.n_pos)
    for layer in range(secant.n_layers):
        points += _attention_points(secant, c.frozen, b.frozen, layer)
        one, other = c.sources.paths[layer], b.sources.paths[layer]
        paths.append(None if one is None or other is None else MeanPath(one, other))
        points += _mlp_points(secant, found, c.sources, b.sources, layer)
    explained = []
    for f in features:
        layer = f.dictionary.out_layers[0]
        error = next(p.vectors for p in points if p.kind is NodeKind.ERROR and p.layer == layer)
        explained.append(explained_share(error, secant.mlp_out[layer]))
    kept = [p for p in points if p.kind in (NodeKind.ERROR, NodeKind.TOKEN) or bool(p.vectors.any())]
    return Sources(features, kept, paths, explained, secant.n_pos)


def _attention_points(secant: FrozenModel, c: FrozenModel, b: FrozenModel, layer: int) -> Iterator[PointSource]:
    left = secant.moved[layer] - secant.attention[layer].linear(secant.pre[layer])
    by_pattern = attention_change(c.attention[layer], b.attention[layer], (c.pre[layer] + b.pre[layer]) / 2)
    for site, vectors in (("attention change", by_pattern), ("norm change", left - by_pattern)):
        yield PointSource(NodeKind.BIAS, layer, Place.ATTENTION, site, vectors, layer)


def _mlp_points(secant: FrozenModel, found: Sources, c: Sources, b: Sources, layer: int) -> Iterator[PointSource]:
    """The change of the error at a layer's MLP output, and that of the paths and norms around it."""
    writing = found.writing(layer)
    left = secant.mlp_out[layer].clone()
    for f, written in writing:
        left = written.added_to(left, -torch.ones_like(f.act))
    path = found.paths[layer]
    if path is not None:
        left -= path.linear(secant.base[layer])
    errors = [
        next((p.vectors for p in s.points if p.kind is NodeKind.ERROR and p.layer == layer), None) for s in (c, b)
    ]
    if errors[0] is None or errors[1] is None:
        yield PointSource(NodeKind.BIAS, layer, Place.MLP_WRITE, "mlp change", left, layer)
        return
    raw = any(_written_raw(f, layer, secant) for f, _ in writing)
    error = errors[0] - errors[1] if path is not None or raw else left
    yield PointSource(NodeKind.ERROR, layer, Place.MLP_WRITE, f"blocks.{layer}.hook_mlp_out", error, layer)
    if error is not left:
        yield PointSource(NodeKind.BIAS, layer, Place.MLP_WRITE, "norm change", left - error, layer)


def _written_raw(f: ActiveFeatures, layer: int, frozen: FrozenModel) -> bool:
    """Whether a dictionary writes a layer's MLP output before a post-norm."""
    hook = f.dictionary.hooks_out[f.dictionary.out_layers.index(layer)]
    return write_kind(hook) is Write.MLP_RAW and frozen.ln2_post[layer] is not None


def _changed(
    secant: FrozenModel, c: FrozenModel, one: ActiveFeatures, b: FrozenModel, other: ActiveFeatures, start: int
) -> ActiveFeatures:
    """Return the features of a dictionary whose activation changed, active on one run or on both."""
    d, dtype = one.dictionary, secant.tokens.dtype
    kind, norm = read_kind(d.hook_in), secant.ln2[d.layer]
    reads = [read_value(kind, run.ln2[d.layer], run.base[d.layer]) for run in (c, b)]
    silent = secant.tokens.new_zeros(secant.n_pos, d.d_sae)
    acts = [silent.index_put((active.pos, active.index), active.act) for active in (one, other)]
    act = acts[0] - acts[1]
    noise = _ROUNDING * torch.finfo(dtype).eps * torch.maximum(acts[0], acts[1]).abs()
    pos, index = (act.abs() > noise).nonzero(as_tuple=True)
    onward = [post_gain(secant, layer) if _written_raw(one, layer, secant) else None for layer in d.out_layers]
    written = written_by(d, pos, index, act[pos, index], secant.n_pos, onward)
    counts = torch.bincount(pos, minlength=secant.n_pos).cumsum(0).tolist()
    read = reads[0] - reads[1]
    # The encoder on the change, not the change of the encoder's: rounding is that of changes, as in the row.
    parts = zip(index.split(_PART), pos.split(_PART), strict=True)
    pre_act = torch.cat([(d.encoder_rows(which, dtype) * read[at]).sum(-1) for which, at in parts])
    own = read - read_value(kind, norm, secant.base[d.layer])
    return ActiveFeatures(d, start, pos, index, act[pos, index], pre_act, [0, *counts], written, read, own)


def rows_by_definition(
    secant: FrozenModel, sources: Sources, c: FrozenModel, b: FrozenModel, targets: Targets
) -> Float[Tensor, "n n_columns"]:
    """Return the rows of targets by the definition: the secant model run forwards, differentiated by autograd.

    Every source has a coefficient of 1; an edge is the target's derivative with respect to it. Maps are applied run by
    run and averaged: nothing of the secant's folded patterns or denominators is used. Equals the sweep's rows.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weights = torch.ones(sources.n_columns, dtype=secant.tokens.dtype, device=secant.tokens.device)
        weights.requires_grad_()
        base, final = _forward(sources, c, b, weights)
        rows = []
        for i, hook in enumerate(targets.hooks):
            pos = int(targets.pos[i])
            if hook == FINAL_HOOK:
                read = _mean(lambda r: r.ln_final.apply_output(final), c, b)
            else:
                layer, kind = parse_hook(hook).layer, read_kind(hook)
                read = _mean(lambda r, k=kind, at=layer: read_value(k, r.ln2[at], base[at]), c, b)
            # A clone: vectors made under the user's inference mode cannot be saved for the derivative.
            vectors = targets.spread[i].clone() if i in targets.spread else targets.vectors[i].clone()
            value = (read * vectors).sum() if i in targets.spread else read[pos] @ vectors
            rows.append(torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)[0])
    return torch.stack([torch.zeros_like(weights) if row is None else row for row in rows]).detach()


def _mean(of: Callable[[FrozenModel], Tensor], c: FrozenModel, b: FrozenModel) -> Tensor:
    return (of(c) + of(b)) / 2


def _forward(
    sources: Sources, c: FrozenModel, b: FrozenModel, weights: Float[Tensor, "n_columns"]
) -> tuple[Sequence[Tensor], Float[Tensor, "n_pos d_model"]]:
    """Run the secant model; return the streams that enter the MLP branches, and the last one."""

    def entering(layer: int, *places: Place) -> Tensor:
        total = torch.zeros_like(c.tokens)
        for column, point in (found for place in places for found in sources.points_at(layer, place)):
            total = total + weights[column : column + c.n_pos, None] * point.vectors
        return total

    x, bases = torch.zeros_like(c.tokens), []
    for layer in range(c.n_layers):
        x = x + entering(layer, Place.PRE_EDIT)
        moved = _mean(lambda r, at=layer, x=x: r.attention[at].linear(x), c, b)
        mid = x + moved + entering(layer, Place.ATTENTION, Place.MID_EDIT)
        bases.append(x if c.parallel else mid)
        path = sources.paths[layer]
        out = entering(layer, Place.MLP_WRITE, Place.POST_EDIT)
        for f, written in sources.writing(layer):
            out = written.added_to(out, weights[f.start : f.start + len(f)])
        x = mid + out + (0 if path is None else path.linear(bases[-1]))
    return bases, x

"""From a frozen pass and its dictionaries to the sources of a graph: what is active, what is left, what is constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.mlp_paths import JacobianPath, MlpPath, SkipPath, read_constant, read_value
from circuit_lens.attribution.sources import ActiveFeatures, PointSource, Sources
from circuit_lens.attribution.writes import Onward, written_by
from circuit_lens.dictionaries.binding import layers_of_mlps, reads_where_it_writes
from circuit_lens.dictionaries.points import Place, Read, Write, read_kind, write_kind
from circuit_lens.errors import ConsistencyError, DictionaryError
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.protocols import Dictionary, HookedModel
from circuit_lens.running import require_finite


def collect(
    model: HookedModel,
    frozen: FrozenModel,
    dictionaries: Sequence[Dictionary],
    *,
    mlp: str,
    zero_positions: Sequence[int],
    attention_constants: Sequence[Float[Tensor, "n_pos d_model"]] | None = None,
) -> Sources:
    """Encode the prompt with every dictionary and list all sources.

    Args:
        model: The model, for the Jacobians of MLPs without dictionary.
        frozen: The frozen pass.
        dictionaries: In the order the model computes them.
        mlp: What an MLP without dictionary is: ``"error"``, its output an error node; ``"jacobian"``, its local
            Jacobian.
        attention_constants: What each attention layer adds that depends on no source, where the reference path found
            it; None takes it from the linear maps, biases and norms apart.
        zero_positions: Positions at which no feature is active by decree (peers do this at position 0).
    """
    features: list[ActiveFeatures] = []
    left = _Left(frozen)
    start = 0
    for dictionary in dictionaries:
        active, outputs, biases = _encode(dictionary, frozen, start, zero_positions)
        start += len(active)
        features.append(active)
        for layer, hook, out, b in zip(dictionary.out_layers, dictionary.hooks_out, outputs, biases, strict=True):
            left.take(layer, write_kind(hook), out, b)
    stands = {(d.layer, write_kind(d.hook_in)) for d in dictionaries if reads_where_it_writes(d)}
    covered = layers_of_mlps(dictionaries)
    points, paths = _embedding_points(frozen), []
    for layer in range(frozen.n_layers):
        path = _path(model, frozen, dictionaries, layer, mlp if layer not in covered else "error")
        paths.append(path)
        here = {kind for at, kind in stands if at == layer}
        points += _attention_points(frozen, layer, attention_constants, here)
        points += _mlp_points(frozen, left, layer, path, autoencoder=Write.MLP_OUT in here)
        points += [point for kind in Write if kind in here for point in left.points(layer, kind)]
    explained = [left.explained(d) for d in dictionaries]
    kept = [p for p in points if p.kind in (NodeKind.ERROR, NodeKind.TOKEN, NodeKind.POSITION) or bool(p.vectors.any())]
    blocked = frozenset((layer, kind.place) for layer, kind in stands)
    return Sources(features, kept, paths, explained, frozen.n_pos, blocked)


class _Left:
    """What dictionaries leave of the activations that they stand for, in the residual stream.

    Args:
        frozen: The frozen pass.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen = frozen
        self.error: dict[tuple[int, Place], Tensor] = {}
        self.bias: dict[tuple[int, Place], Tensor] = {}

    def value(self, layer: int, kind: Write) -> Float[Tensor, "n_pos d_model"]:
        """Return what the activation at a write hook adds to the stream, or is of it."""
        frozen = self.frozen
        match kind:
            case Write.HEADS:
                z = site_value(frozen, layer, Read.HEADS)
                return frozen.attention[layer].write_heads(z, torch.arange(frozen.n_pos, device=z.device))
            case Write.MLP_OUT | Write.MLP_RAW:
                return frozen.mlp_out[layer]
        return site_value(frozen, layer, Read(kind.value))

    def take(self, layer: int, kind: Write, out: Tensor, bias: Tensor) -> None:
        """Take a dictionary's output and bias off what is left."""
        key = layer, kind.place
        if key not in self.error:
            value = self.value(layer, kind)
            self.error[key], self.bias[key] = value, torch.zeros_like(value)
        self.error[key] = self.error[key] - out - bias
        self.bias[key] = self.bias[key] + bias

    def points(self, layer: int, kind: Write) -> list[PointSource]:
        """Return error and bias of an autoencoder."""
        key, suffix = (layer, kind.place), kind.value
        return [
            PointSource(NodeKind.ERROR, layer, kind.place, f"blocks.{layer}.{suffix}", self.error[key], layer),
            PointSource(NodeKind.BIAS, layer, kind.place, f"dictionary {suffix}", self.bias[key], layer),
        ]

    def explained(self, dictionary: Dictionary) -> float:
        """Return 1 - |error|² / |output|² at the first hook a dictionary writes, first position left out."""
        layer, kind = dictionary.out_layers[0], write_kind(dictionary.hooks_out[0])
        return explained_share(self.error[layer, kind.place], self.value(layer, kind))


def site_value(frozen: FrozenModel, layer: int, kind: Read) -> Float[Tensor, "n_pos width"]:
    """Return the frozen pass' value of an activation that an autoencoder may stand at.

    Raises:
        ConsistencyError: Attention is not known as linear maps, and the run has no value of its own.
    """
    match kind:
        case Read.PRE:
            return frozen.pre[layer]
        case Read.MID:
            return frozen.base[layer]
        case Read.POST:
            return frozen.post[layer]
        case Read.MLP_OUT:
            return frozen.mlp_out[layer]
        case Read.ATTENTION if frozen.moved:
            return frozen.moved[layer]
        case Read.HEADS if frozen.attention:
            attention = frozen.attention[layer]
            norm = attention.norm_in
            return attention.heads(norm.normalized * norm.weights.gain + norm.weights.bias) + attention.heads_bias()
    own = frozen.values.values.get(f"blocks.{layer}.{kind.value}")
    if own is None or kind is Read.HEADS:
        raise ConsistencyError(
            f"an SAE at blocks.{layer}.{kind.value} needs attention as linear maps, which this model's is not known "
            "as; use an SAE of the residual stream"
        )
    return own


def _embedding_points(frozen: FrozenModel) -> list[PointSource]:
    points = [PointSource(NodeKind.TOKEN, 0, Place.PRE_EDIT, "", frozen.tokens, -1)]
    if frozen.positions is not None:
        points.append(PointSource(NodeKind.POSITION, 0, Place.PRE_EDIT, "", frozen.positions, -1))
    return points + patch_points(frozen)


def patch_points(frozen: FrozenModel) -> list[PointSource]:
    """Return the user's edits of the residual stream as sources."""
    places = {"resid_pre": Place.PRE_EDIT, "resid_mid": Place.MID_EDIT, "resid_post": Place.POST_EDIT}
    return [PointSource(NodeKind.PATCH, p.layer, places[p.site], p.site, p.vectors, p.layer) for p in frozen.patches]


def _attention_points(
    frozen: FrozenModel, layer: int, constants: Sequence[Tensor] | None, stands: set[Write]
) -> list[PointSource]:
    """What an attention layer adds that depends on no source: its biases, and the constants of its norms."""

    def point(site: str, place: Place, vectors: Tensor) -> PointSource:
        return PointSource(NodeKind.BIAS, layer, place, site, vectors, layer)

    if constants is not None:
        if Write.HEADS in stands:
            raise ConsistencyError(
                f"an SAE at blocks.{layer}.attn.hook_z needs attention='frozen' and attention as linear maps"
            )
        return [point("attention", Place.ATTENTION, constants[layer])]
    attention = frozen.attention[layer]
    if Write.HEADS not in stands:
        return [
            point("attention", Place.ATTENTION, attention.attention_bias()),
            point("norm", Place.ATTENTION, attention.norm_bias()),
        ]
    post = attention.norm_out
    after = [] if post is None else [point("norm", Place.ATTENTION, post.constant_output())]
    return [
        point("attention", Place.HEADS, attention.heads_bias()),
        point("norm", Place.HEADS, attention.heads(attention.norm_in.constant_output())),
        point("attention", Place.ATTENTION, attention.output_bias()),
        *after,
    ]


def _mlp_points(
    frozen: FrozenModel, left: _Left, layer: int, path: MlpPath | None, *, autoencoder: bool
) -> list[PointSource]:
    """Error and biases of an MLP: what its dictionaries, or its Jacobian, leave of its output."""
    # With an autoencoder behind it the MLP's own output is what that reads, and what it misses is no error of the MLP.
    place = Place.MLP if autoencoder else Place.MLP_WRITE
    key, out = (layer, Place.MLP_WRITE), frozen.mlp_out[layer]
    linear = torch.zeros_like(out) if path is None else path.linear(frozen.base[layer])
    through = torch.zeros_like(out) if path is None else path.norm_bias()
    if autoencoder or key not in left.error:
        rest, bias = out - linear - through, torch.zeros_like(out)
    else:
        rest, bias = left.error[key] - linear - through, left.bias[key]
        left.error[key] = rest
    hook = f"blocks.{layer}.mlp" if autoencoder else f"blocks.{layer}.hook_mlp_out"
    kind, site = (NodeKind.BIAS, "mlp") if isinstance(path, JacobianPath) else (NodeKind.ERROR, hook)
    named = [(NodeKind.BIAS, "norm", through), (NodeKind.BIAS, "dictionary", bias), (kind, site, rest)]
    return [PointSource(kind, layer, place, site, vectors, layer) for kind, site, vectors in named]


def _path(
    model: HookedModel, frozen: FrozenModel, dictionaries: Sequence[Dictionary], layer: int, mlp: str
) -> MlpPath | None:
    skips = [d for d in dictionaries if d.has_skip and d.layer == layer]
    if skips:
        return SkipPath(skips[0], frozen.ln2[layer], frozen.ln2_post[layer])
    if mlp == "jacobian":
        block = model.blocks[layer]
        return JacobianPath(block.mlp, frozen.ln2[layer], frozen.ln2_post[layer], frozen.base[layer])
    return None


def _encode(
    dictionary: Dictionary, frozen: FrozenModel, start: int, zero_positions: Sequence[int]
) -> tuple[ActiveFeatures, list[Tensor], list[Tensor]]:
    """Encode the frozen read values; also return, per output layer, the reconstruction without bias, and the bias."""
    dtype = frozen.tokens.dtype
    read, constant = _read(dictionary, frozen)
    pre_acts = dictionary.pre_acts(read).detach()
    acts = dictionary.activate(pre_acts, read).detach()
    require_finite(f"the activations of {dictionary.site}", acts)
    if zero_positions:
        acts = acts.clone()
        acts[list(zero_positions)] = 0
    pos, index = acts.nonzero(as_tuple=True)
    act, pre_act = acts[pos, index], pre_acts[pos, index]
    del acts, pre_acts
    onward: list[Onward] = []
    biases = []
    bias = dictionary.decoder_bias(dtype)
    for o, out_layer in enumerate(dictionary.out_layers):
        b, kind = bias[o].expand(frozen.n_pos, -1), write_kind(dictionary.hooks_out[o])
        if kind is Write.MLP_RAW and frozen.ln2_post[out_layer] is not None:
            onward.append(post_gain(frozen, out_layer))
            b = _biased(frozen, out_layer, b)
        elif kind is Write.HEADS:
            attention, everywhere = frozen.attention[out_layer], torch.arange(frozen.n_pos, device=pos.device)
            onward.append(attention.write_heads)
            b = attention.write_heads(b, everywhere)
        else:
            onward.append(None)
        biases.append(b)
    written = written_by(dictionary, pos, index, act, frozen.n_pos, onward)
    outputs = [w.added_to(b.new_zeros(b.shape)) for w, b in zip(written, biases, strict=True)]
    for output in outputs:  # not finite if any term of its sums is not
        require_finite(f"what the features of {dictionary.site} write", output)
    counts = torch.bincount(pos, minlength=frozen.n_pos).cumsum(0).tolist()
    active = ActiveFeatures(dictionary, start, pos, index, act, pre_act, [0, *counts], written, read, constant)
    return active, outputs, biases


def _read(
    dictionary: Dictionary, frozen: FrozenModel
) -> tuple[Float[Tensor, "n_pos d_in"], Float[Tensor, "n_pos d_in"]]:
    """Return what a dictionary reads, and the constant part of it that no source makes up."""
    layer, kind = dictionary.layer, read_kind(dictionary.hook_in)
    if not kind.in_mlp_branch or reads_where_it_writes(dictionary):
        value = site_value(frozen, layer, kind)
        return value, torch.zeros_like(value)
    norm = frozen.ln2[layer]
    constant = read_constant(kind, norm)
    return read_value(kind, norm, frozen.base[layer]) + constant, constant


def _biased(frozen: FrozenModel, layer: int, bias: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
    """Pass a dictionary's bias through the block's frozen post-norm, whose own bias it takes along."""
    post = frozen.ln2_post[layer]
    assert post is not None
    return bias * post_gain(frozen, layer) + post.constant_output()


def post_gain(frozen: FrozenModel, layer: int) -> Float[Tensor, "n_pos d_model"]:
    """Return what a block's frozen post-norm multiplies what features write to the raw MLP output by.

    Raises:
        DictionaryError: The norm removes a mean or is linearised: then a feature's share of its output is not defined.
    """
    post = frozen.ln2_post[layer]
    assert post is not None
    if post.linear or post.weights.centered:
        raise DictionaryError(
            "a dictionary that writes before a post-norm needs norms='frozen' and a norm without centring; use one "
            f"that writes blocks.{layer}.hook_mlp_out"
        )
    return post.weights.gain / post.scale


def explained_share(error: Float[Tensor, "n_pos d_model"], output: Float[Tensor, "n_pos d_model"]) -> float:
    """Return 1 - |error|² / |output|², first position left out."""
    kept = slice(1, None) if len(error) > 1 else slice(None)
    total = output[kept].square().sum().clamp_min(torch.finfo(error.dtype).tiny)
    return float(1 - error[kept].square().sum() / total)

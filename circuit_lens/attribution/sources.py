"""Sources of a prompt's graph, as vectors in the residual stream and columns of a row.

Columns, while rows are computed: every active feature, ordered by (dictionary, position, index) with dictionaries in
the order the model computes them, then blocks of ``n_pos`` columns, one for each kind of source that exists once per
position.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.mlp_paths import JacobianPath, MlpPath, SkipPath, read_constant, read_value
from circuit_lens.dictionaries.points import Write, read_kind, write_kind
from circuit_lens.errors import DictionaryError
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.protocols import Dictionary, HookedModel
from circuit_lens.running import require_finite


class Stage(enum.Enum):
    """Where in a block a source enters the residual stream."""

    PRE = "pre"  # before the block
    ATTENTION = "attention"  # with the attention output
    MLP = "mlp"  # with the MLP output


@dataclass(frozen=True, eq=False)
class PointSource:
    """One source per position: its vectors, where they enter, and the node they become."""

    kind: NodeKind
    layer: int
    stage: Stage
    site: str
    vectors: Float[Tensor, "n_pos d_model"]
    node_layer: int


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one dictionary on the prompt, sorted by position, then index.

    Attributes:
        dictionary: The dictionary.
        start: Its first column.
        pos, index, act, pre_act: One entry per active feature.
        offsets: ``offsets[p]:offsets[p + 1]`` are the features at position p.
        vectors: What each adds to the residual stream, per output layer.
        read_constant: Constant part of what the encoder reads, per position.
    """

    dictionary: Dictionary
    start: int
    pos: Int[Tensor, "n_active"]
    index: Int[Tensor, "n_active"]
    act: Float[Tensor, "n_active"]
    pre_act: Float[Tensor, "n_active"]
    offsets: list[int]
    vectors: Float[Tensor, "n_out n_active d_model"]
    read_constant: Float[Tensor, "n_pos d_in"]

    def __len__(self) -> int:
        return len(self.pos)

    def at(self, pos: int) -> slice:
        """Return the features at one position, as a slice into this record's tensors."""
        return slice(self.offsets[pos], self.offsets[pos + 1])


@dataclass(frozen=True, eq=False)
class Sources:
    """All sources of a prompt.

    Attributes:
        features: Active features, one record per dictionary.
        points: Sources that exist once per position; their columns follow the features' in this order.
        paths: The linear path through each layer's MLP, None where there is none.
        explained: Per dictionary, 1 - |error|² / |MLP output|² over all positions but the first.
    """

    features: list[ActiveFeatures]
    points: list[PointSource]
    paths: list[MlpPath | None]
    explained: list[float]
    n_pos: int

    @cached_property
    def n_features(self) -> int:
        """Number of active features."""
        return sum(len(f) for f in self.features)

    @cached_property
    def n_columns(self) -> int:
        """Number of columns of a row."""
        return self.n_features + len(self.points) * self.n_pos

    def column(self, point: int) -> int:
        """Return the first column of a point source."""
        return self.n_features + point * self.n_pos

    def features_writing(self, layer: int) -> list[tuple[ActiveFeatures, Float[Tensor, "n_active d_model"]]]:
        """Return the records whose dictionaries write to a layer's MLP output, with the vectors they write there."""
        return [
            (f, f.vectors[o])
            for f in self.features
            for o, out in enumerate(f.dictionary.out_layers)
            if out == layer and len(f)
        ]

    def points_at(self, layer: int, stage: Stage) -> list[tuple[int, PointSource]]:
        """Return the point sources entering at a layer and stage, each with its first column."""
        found = ((self.column(i), p) for i, p in enumerate(self.points))
        return [(column, p) for column, p in found if p.layer == layer and p.stage is stage]


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
    points = _embedding_points(frozen)
    paths: list[MlpPath | None] = []
    recon: list[Tensor] = [torch.zeros_like(m) for m in frozen.mlp_out]
    bias: list[Tensor] = [torch.zeros_like(m) for m in frozen.mlp_out]
    start = 0
    for dictionary in dictionaries:
        active, outputs, biases = _encode(dictionary, frozen, start, zero_positions)
        start += len(active)
        features.append(active)
        for layer, out, b in zip(dictionary.out_layers, outputs, biases, strict=True):
            recon[layer], bias[layer] = recon[layer] + out, bias[layer] + b
    covered = {layer for d in dictionaries for layer in d.out_layers}
    for layer in range(frozen.n_layers):
        path = _path(model, frozen, dictionaries, layer, mlp if layer not in covered else "error")
        paths.append(path)
        linear = torch.zeros_like(recon[layer]) if path is None else path.linear(frozen.base[layer])
        through = torch.zeros_like(linear) if path is None else path.norm_bias()
        left = frozen.mlp_out[layer] - recon[layer] - bias[layer] - linear - through
        points += _attention_points(frozen, layer, attention_constants)
        points += _mlp_points(layer, left, bias[layer], through, isinstance(path, JacobianPath))
    explained = [explained_share(d, points, frozen) for d in dictionaries]
    kept = [p for p in points if p.kind in (NodeKind.ERROR, NodeKind.TOKEN, NodeKind.POSITION) or bool(p.vectors.any())]
    return Sources(features, kept, paths, explained, frozen.n_pos)


def _embedding_points(frozen: FrozenModel) -> list[PointSource]:
    points = [PointSource(NodeKind.TOKEN, 0, Stage.PRE, "", frozen.tokens, -1)]
    if frozen.positions is not None:
        points.append(PointSource(NodeKind.POSITION, 0, Stage.PRE, "", frozen.positions, -1))
    return points + patch_points(frozen)


def patch_points(frozen: FrozenModel) -> list[PointSource]:
    """Return the user's edits of the residual stream as sources."""
    stages = {"resid_pre": Stage.PRE, "resid_mid": Stage.ATTENTION, "resid_post": Stage.MLP}
    return [PointSource(NodeKind.PATCH, p.layer, stages[p.site], p.site, p.vectors, p.layer) for p in frozen.patches]


def _attention_points(frozen: FrozenModel, layer: int, constants: Sequence[Tensor] | None) -> list[PointSource]:
    """What an attention layer adds that depends on no source: its biases, and the constants of its norms."""
    if constants is not None:
        return [PointSource(NodeKind.BIAS, layer, Stage.ATTENTION, "attention", constants[layer], layer)]
    attention = frozen.attention[layer]
    parts = (("attention", attention.attention_bias()), ("norm", attention.norm_bias()))
    return [PointSource(NodeKind.BIAS, layer, Stage.ATTENTION, site, vectors, layer) for site, vectors in parts]


def _mlp_points(layer: int, left: Tensor, bias: Tensor, through: Tensor, jacobian: bool) -> list[PointSource]:
    """Error and biases of an MLP. ``left`` is what the dictionaries (or the Jacobian) leave of its output."""

    def point(kind: NodeKind, site: str, vectors: Tensor) -> PointSource:
        return PointSource(kind, layer, Stage.MLP, site, vectors, layer)

    rest = (NodeKind.BIAS, "mlp") if jacobian else (NodeKind.ERROR, f"blocks.{layer}.hook_mlp_out")
    return [point(NodeKind.BIAS, "norm", through), point(NodeKind.BIAS, "dictionary", bias), point(*rest, left)]


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
    layer, dtype = dictionary.layer, frozen.tokens.dtype
    kind, norm = read_kind(dictionary.hook_in), frozen.ln2[layer]
    constant = read_constant(kind, norm)
    read = read_value(kind, norm, frozen.base[layer]) + constant
    pre_acts = dictionary.pre_acts(read).detach()
    acts = dictionary.activate(pre_acts, read).detach().clone()
    require_finite(f"the activations of {dictionary.site}", acts)
    for pos in zero_positions:
        acts[pos] = 0
    pos, index = acts.nonzero(as_tuple=True)
    act, pre_act = acts[pos, index], pre_acts[pos, index]
    rows = act[:, None, None] * dictionary.decoder_rows(index, dtype)
    require_finite(f"what the features of {dictionary.site} write", rows)
    bias = dictionary.decoder_bias(dtype)
    vectors, outputs, biases = [], [], []
    for o, out_layer in enumerate(dictionary.out_layers):
        vector, b = rows[:, o], bias[o].expand(frozen.n_pos, -1).clone()
        if write_kind(dictionary.hooks_out[o]) is Write.MLP_RAW and frozen.ln2_post[out_layer] is not None:
            vector, b = through_post_norm(frozen, out_layer, vector, pos), _biased(frozen, out_layer, b)
        vectors.append(vector)
        outputs.append(torch.zeros_like(b).index_add_(0, pos, vector))
        biases.append(b)
    counts = torch.bincount(pos, minlength=frozen.n_pos).cumsum(0).tolist()
    active = ActiveFeatures(dictionary, start, pos, index, act, pre_act, [0, *counts], torch.stack(vectors), constant)
    return active, outputs, biases


def through_post_norm(
    frozen: FrozenModel, layer: int, vectors: Float[Tensor, "n_active d_model"], pos: Int[Tensor, "n_active"]
) -> Float[Tensor, "n_active d_model"]:
    """Pass what features write to the raw MLP output through the block's frozen post-norm.

    Raises:
        DictionaryError: The norm removes a mean or is linearised: then a feature's share of its output is not defined.
    """
    return vectors * _post_gain(frozen, layer)[pos]


def _biased(frozen: FrozenModel, layer: int, bias: Float[Tensor, "n_pos d_model"]) -> Float[Tensor, "n_pos d_model"]:
    """Pass a dictionary's bias through the block's frozen post-norm, whose own bias it takes along."""
    post = frozen.ln2_post[layer]
    assert post is not None
    return bias * _post_gain(frozen, layer) + post.constant_output()


def _post_gain(frozen: FrozenModel, layer: int) -> Float[Tensor, "n_pos d_model"]:
    post = frozen.ln2_post[layer]
    assert post is not None
    if post.linear or post.weights.centered:
        raise DictionaryError(
            "a dictionary that writes before a post-norm needs norms='frozen' and a norm without centring; use one "
            f"that writes blocks.{layer}.hook_mlp_out"
        )
    return post.weights.gain / post.scale


def explained_share(dictionary: Dictionary, points: list[PointSource], frozen: FrozenModel) -> float:
    """Return 1 - |error|² / |MLP output|² of the first layer a dictionary writes, first position left out."""
    layer = dictionary.out_layers[0]
    error = next(p for p in points if p.kind is NodeKind.ERROR and p.layer == layer).vectors
    kept = slice(1, None) if frozen.n_pos > 1 else slice(None)
    total = frozen.mlp_out[layer][kept].square().sum().clamp_min(torch.finfo(error.dtype).tiny)
    return float(1 - error[kept].square().sum() / total)

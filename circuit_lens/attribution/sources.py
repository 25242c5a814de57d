"""Sources of a prompt's graph, as vectors in the residual stream and columns of a row.

Columns, while rows are computed: every active feature, ordered by (dictionary, position, index) with dictionaries in
the order the model computes them, then blocks of ``n_pos`` columns, one for each kind of source that exists once per
position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.mlp_paths import MlpPath
from circuit_lens.attribution.writes import Written
from circuit_lens.dictionaries.points import Place, write_kind
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.protocols import Dictionary


@dataclass(frozen=True, eq=False)
class PointSource:
    """One source per position: its vectors, where they enter, and the node they become.

    Vectors are what is added to the residual stream; at ``Place.HEADS`` what is added to the heads, side by side.
    """

    kind: NodeKind
    layer: int
    place: Place
    site: str
    vectors: Float[Tensor, "n_pos width"]
    node_layer: int


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one dictionary on the prompt, sorted by position, then index.

    Attributes:
        dictionary: The dictionary.
        start: Its first column.
        pos, index, act, pre_act: One entry per active feature.
        offsets: ``offsets[p]:offsets[p + 1]`` are the features at position p.
        written: What each adds to the residual stream, per output layer.
        read: What the encoder reads, per position.
        read_constant: Its constant part, which no source makes up.
    """

    dictionary: Dictionary
    start: int
    pos: Int[Tensor, "n_active"]
    index: Int[Tensor, "n_active"]
    act: Float[Tensor, "n_active"]
    pre_act: Float[Tensor, "n_active"]
    offsets: list[int]
    written: list[Written]
    read: Float[Tensor, "n_pos d_in"]
    read_constant: Float[Tensor, "n_pos d_in"]

    def __len__(self) -> int:
        return len(self.pos)

    def encoder_rows(self, which: Int[Tensor, "n"] | None = None) -> Float[Tensor, "n d_in"]:
        """Return the encoder rows of all features, or of some, taken where each is read."""
        return self._encoder(self.dictionary.encoder_rows, which)

    def encoder_bias(self, which: Int[Tensor, "n"] | None = None) -> Float[Tensor, "n"]:
        """Return the encoder biases of all features, or of some."""
        return self._encoder(self.dictionary.encoder_bias, which)

    def _encoder(self, function: Callable[..., Tensor], which: Tensor | None) -> Tensor:
        index, pos = (self.index, self.pos) if which is None else (self.index[which], self.pos[which])
        return function(index, self.read.dtype, self.read[pos] if self.dictionary.tangent else None)

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
        explained: Per dictionary, 1 - |error|² / |output|² at the first hook it writes, first position left out.
        blocked: Layers and places at which an autoencoder stands: what comes by there is all sources of that place.
    """

    features: list[ActiveFeatures]
    points: list[PointSource]
    paths: list[MlpPath | None]
    explained: list[float]
    n_pos: int
    blocked: frozenset[tuple[int, Place]] = frozenset()

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

    def writing(self, layer: int, place: Place = Place.MLP_WRITE) -> list[tuple[ActiveFeatures, Written]]:
        """Return the records whose dictionaries write at a layer's place, with what they write there."""
        return [
            (f, f.written[o])
            for f in self.features
            for o, hook in enumerate(f.dictionary.hooks_out)
            if f.dictionary.out_layers[o] == layer and write_kind(hook).place is place and len(f)
        ]

    def points_at(self, layer: int, place: Place) -> list[tuple[int, PointSource]]:
        """Return the point sources entering at a layer's place, each with its first column."""
        found = ((self.column(i), p) for i, p in enumerate(self.points))
        return [(column, p) for column, p in found if p.layer == layer and p.place is place]

    def blocks(self, layer: int, place: Place) -> bool:
        """Whether an autoencoder stands at a layer's place."""
        return (layer, place) in self.blocked

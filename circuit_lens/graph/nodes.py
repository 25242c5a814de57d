"""Nodes of an attribution graph: their kinds and their one order.

The order of nodes is a convention of this module alone: features, errors, tokens, positions, biases, rest, patches,
logits. Sources (all but the logits) are columns of a graph's adjacency; features and logits are its rows.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, Int8, Int16, Int32, Int64
from torch import Tensor

from circuit_lens.errors import GraphError, nearest
from circuit_lens.graph.edits import Editable


class NodeKind(enum.IntEnum):
    """What a node stands for; the values are the order of the sections in a :class:`NodeTable`."""

    FEATURE = 0
    ERROR = 1
    TOKEN = 2
    POSITION = 3
    BIAS = 4
    REST = 5
    PATCH = 6
    LOGIT = 7

    @classmethod
    def parse(cls, kind: NodeKind | str | int) -> NodeKind:
        """Return the kind that a name (``"feature"``), a number or a kind stands for; raise GraphError otherwise."""
        if isinstance(kind, str):
            if kind.upper() in cls.__members__:
                return cls[kind.upper()]
            names = [name.lower() for name in cls.__members__]
            raise GraphError(f"No node kind {kind!r}; the kinds are {', '.join(names)}{nearest(kind, names)}.")
        return cls(kind)


@dataclass(frozen=True)
class Feature(Editable):
    """A feature of a dictionary at one position of a prompt, as a user writes it.

    Attributes:
        layer: layer whose activations the dictionary reads.
        pos: position, or the string of one token (a span means its last token).
        index: row of the dictionary.
        site: the dictionary's write hook name; None means the only dictionary of that layer.
    """

    layer: int
    pos: int | str
    index: int
    site: str | None = None

    def __str__(self) -> str:
        site = "" if self.site is None else f" ({self.site})"
        where = f"P{self.pos}" if isinstance(self.pos, int) else repr(self.pos)
        return f"L{self.layer} {where} #{self.index}{site}"


def _layer_of_site(site: str) -> int:
    """Return the layer of a hook name; -1 for other sites."""
    match = re.match(r"blocks\.(\d+)\.", site)
    return int(match.group(1)) if match else -1


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        id: row of the node table (and column of the adjacency, for a source).
        kind: what the node stands for.
        layer: layer; -1 for tokens and positions, ``n_layers`` for logits.
        pos: position in the prompt.
        index: row of the dictionary, token id, or number of features in a rest node.
        site: hook name of a dictionary, kind of a bias, place of a patch; "" where there is none.
        token: the string of the token at ``pos``.
        activation: activation of a feature, None for every other kind.
        label: what the node means, "" where nobody said; the token's string or the target's name for a logit.
        name: the node's unique name in its graph, e.g. ``"L1 P9 #158"``; ``graph.node(name)`` returns the node.
    """

    id: int
    kind: NodeKind
    layer: int
    pos: int
    index: int
    site: str
    token: str
    activation: float | None
    label: str
    name: str = ""

    @property
    def feature(self) -> Feature:
        """The node as a :class:`Feature` (raises GraphError for a node of another kind)."""
        if self.kind is not NodeKind.FEATURE:
            raise GraphError(f"{self.name} is a {self.kind.name.lower()} node, not a feature.")
        return Feature(self.layer, self.pos, self.index, self.site or None)

    @property
    def short(self) -> str:
        """The node in a few words: label or token first, then where it is."""
        if self.kind is NodeKind.LOGIT:
            return f"logit {self.label!r}"
        if self.kind is NodeKind.TOKEN:
            return f"token {self.token!r}"
        return f"{self.name} [{self.label}]" if self.label else self.name

    def __str__(self) -> str:
        act = "" if self.activation is None else f", activation {self.activation:.4g}"
        at = "" if self.kind in (NodeKind.TOKEN, NodeKind.LOGIT) else f" at {self.token!r}"
        return f"{self.short}{at}{act}"


@dataclass(frozen=True)
class Section:
    """The nodes of one kind, column by column; input of :meth:`NodeTable.build`.

    Attributes:
        kind: the kind of all these nodes.
        layer, pos, index: see :class:`Node`; a number stands for a constant column.
        site: index into the table's ``sites``.
        activation: activations of features; None otherwise.
        labels: one text per node, or empty for none.
        pre_activation: see :class:`NodeTable`; None where it is the activation.
    """

    kind: NodeKind
    pos: Int[Tensor, "m"]
    layer: Int[Tensor, "m"] | int = -1
    index: Int[Tensor, "m"] | int = 0
    site: Int[Tensor, "m"] | int = 0
    activation: Float[Tensor, "m"] | None = None
    labels: Sequence[str] = ()
    pre_activation: Float[Tensor, "m"] | None = None


@dataclass(frozen=True, eq=False)
class NodeTable:
    """All nodes of a graph, column by column, in the one order: features, errors, ..., logits.

    Features are sorted by (layer, site, pos, index), every other section but the logits by (layer, pos, site, index);
    logits stand in the order of the targets. ``sites`` must name a layer's sites in the order the model computes
    them: then every edge between features goes from an earlier (layer, site) group to a later one.

    Attributes:
        kind: values of :class:`NodeKind`.
        layer, pos, index: see :class:`Node`.
        site: index into ``sites``.
        sites: hook names and kinds of bias or patch; ``""`` for nodes without a site.
        activation: activation of each feature (in a contrast graph its change), NaN where a node has none.
        labels: one text per node, "" where there is none.
        pre_activation: what the edges into each feature add up to, own bias included, where that is not the
            activation: in a contrast graph its change differs from the activation's for a feature that switches on or
            off. NaN where a node has none; None where every feature's is its activation.

    Raises:
        GraphError: columns of different lengths, nodes out of order, or a site out of range.
    """

    kind: Int8[Tensor, "n"]
    layer: Int32[Tensor, "n"]
    pos: Int32[Tensor, "n"]
    index: Int64[Tensor, "n"]
    site: Int16[Tensor, "n"]
    sites: tuple[str, ...]
    activation: Float[Tensor, "n"]
    labels: tuple[str, ...]
    pre_activation: Float[Tensor, "n"] | None = None

    def __post_init__(self) -> None:
        columns = {name: len(getattr(self, name)) for name in ("kind", "layer", "pos", "index", "site", "activation")}
        columns["labels"] = len(self.labels)
        if self.pre_activation is not None:
            columns["pre_activation"] = len(self.pre_activation)
        if len(set(columns.values())) != 1:
            raise GraphError(f"The columns of a node table must be equally long; given {columns}.")
        if len(set(self.sites)) != len(self.sites):
            raise GraphError(f"The sites of a node table must be distinct; given {self.sites}.")
        if len(self) and not (int(self.site.min()) >= 0 and int(self.site.max()) < len(self.sites)):
            raise GraphError(f"site must index the {len(self.sites)} sites; given {self.site.unique().tolist()}.")
        if len(self) and not (int(self.kind.min()) >= 0 and int(self.kind.max()) <= max(NodeKind)):
            raise GraphError(f"Unknown node kinds: {self.kind.unique().tolist()}; valid are 0 to {int(max(NodeKind))}.")
        if bool((self.kind[1:] < self.kind[:-1]).any()):
            raise GraphError(
                "Nodes must stand in the order features, errors, tokens, positions, biases, rest, "
                "patches, logits; use NodeTable.build."
            )
        for kind in NodeKind:
            self._check_order(kind)

    def _check_order(self, kind: NodeKind) -> None:
        """Raise GraphError unless the section of ``kind`` is strictly sorted as documented."""
        if kind is NodeKind.LOGIT:
            return
        part = self.slice_of(kind)
        middle = (self.site, self.pos) if kind is NodeKind.FEATURE else (self.pos, self.site)
        names = "(layer, site, pos, index)" if kind is NodeKind.FEATURE else "(layer, pos, site, index)"
        keys = [column[part].long() for column in (self.layer, *middle, self.index)]
        undecided = torch.ones(max(len(keys[0]) - 1, 0), dtype=torch.bool)
        for key in keys:
            if bool((undecided & (key[1:] < key[:-1])).any()):
                raise GraphError(f"{kind.name.lower()} nodes must be sorted by {names}.")
            undecided = undecided & (key[1:] == key[:-1])
        if bool(undecided.any()):
            twice = part.start + int(undecided.nonzero()[0])
            raise GraphError(f"{kind.name.lower()} nodes must be distinct; nodes {twice} and {twice + 1} are the same.")

    @classmethod
    def build(cls, sections: Iterable[Section], *, sites: Sequence[str] = ("",)) -> NodeTable:
        """Concatenate sections (each sorted, in any order, a kind at most once) in the one order of nodes.

        Activations keep their floating dtype (float32 where no section has any).

        Raises:
            GraphError: two sections of one kind, or columns that do not fit.
        """
        parts = sorted(sections, key=lambda section: section.kind)
        if len({part.kind for part in parts}) != len(parts):
            raise GraphError(
                f"Each kind of node may have one section only; given {[part.kind.name.lower() for part in parts]}."
            )
        dtype = next((part.activation.dtype for part in parts if part.activation is not None), torch.float32)

        def column(name: str, dtype: torch.dtype) -> Tensor:
            columns = []
            for part in parts:
                value = getattr(part, name)
                if value is None:
                    value = float("nan")
                if not isinstance(value, Tensor):
                    value = torch.full((len(part.pos),), value, dtype=dtype)
                columns.append(value.detach().cpu().to(dtype))
            return torch.cat(columns) if columns else torch.empty(0, dtype=dtype)

        kinds = [torch.full((len(part.pos),), int(part.kind), dtype=torch.int8) for part in parts]
        labels = [text for part in parts for text in (part.labels or ("",) * len(part.pos))]
        return cls(
            kind=torch.cat(kinds) if kinds else torch.empty(0, dtype=torch.int8),
            layer=column("layer", torch.int32), pos=column("pos", torch.int32), index=column("index", torch.int64),
            site=column("site", torch.int16), sites=tuple(sites), activation=column("activation", dtype),
            labels=tuple(labels),
            pre_activation=(
                None if all(part.pre_activation is None for part in parts) else column("pre_activation", dtype)
            ),
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.kind.shape[0])

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """Start of each section, and the end of the last one."""
        counts = torch.bincount(self.kind.long(), minlength=len(NodeKind)).tolist()
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return tuple(bounds)

    def slice_of(self, kind: NodeKind | str) -> slice:
        """Return the ids of the nodes of one kind, as a slice (empty, at its place, where there are none)."""
        kind = NodeKind.parse(kind)
        return slice(self._bounds[kind], self._bounds[kind + 1])

    def count(self, kind: NodeKind | str) -> int:
        """Return the number of nodes of one kind."""
        part = self.slice_of(kind)
        return part.stop - part.start

    @property
    def n_features(self) -> int:
        """Number of feature nodes; their ids and their rows of the adjacency are 0 to n_features - 1."""
        return self._bounds[NodeKind.ERROR]

    @property
    def n_sources(self) -> int:
        """Number of nodes that are no logits: the columns of the adjacency."""
        return self._bounds[NodeKind.LOGIT]

    @property
    def n_logits(self) -> int:
        """Number of logit (target) nodes; their ids are n_sources to n - 1."""
        return len(self) - self.n_sources

    @property
    def n_rows(self) -> int:
        """Number of rows of the adjacency: features, then logits."""
        return self.n_features + self.n_logits

    @property
    def n_paper(self) -> int:
        """Number of leading sources that convention "paper" counts: features, errors and tokens."""
        return self._bounds[NodeKind.POSITION]

    def row_of(self, node: int) -> int | None:
        """Return the adjacency row of node ``node``, or None for a node that is no target."""
        if node < self.n_features:
            return node
        return node - self.n_sources + self.n_features if node >= self.n_sources else None

    def node_of_row(self, row: int) -> int:
        """Return the id of the node whose adjacency row is ``row``."""
        return row if row < self.n_features else row - self.n_features + self.n_sources

    @cached_property
    def rows(self) -> Int64[Tensor, "n_rows"]:
        """The node id of each adjacency row."""
        return torch.cat([torch.arange(self.n_features), torch.arange(self.n_sources, len(self))])

    @cached_property
    def groups(self) -> tuple[slice, ...]:
        """The (layer, site) groups of the features, in the order the model computes them; none feeds itself."""
        f = self.n_features
        if f == 0:
            return ()
        change = (self.layer[1:f] != self.layer[: f - 1]) | (self.site[1:f] != self.site[: f - 1])
        cuts = [0, *(change.nonzero().flatten() + 1).tolist(), f]
        return tuple(slice(a, b) for a, b in itertools.pairwise(cuts))

    @cached_property
    def _many_sites(self) -> frozenset[tuple[int, int]]:
        """The (kind, layer) pairs whose nodes have more than one site: there a name must say which.

        The sites of all dictionaries count, also of those without a node here: a name is the same in every graph of a
        prompt, whichever features it has.
        """
        keys = torch.stack([self.kind.long(), self.layer.long(), self.site.long()], 1)
        seen: dict[tuple[int, int], int] = {}
        for kind, layer, _ in torch.unique(keys, dim=0).tolist() if len(self) else ():
            seen[kind, layer] = seen.get((kind, layer), 0) + 1
        several = [layer for layer, n in Counter(map(_layer_of_site, self.sites)).items() if layer >= 0 and n > 1]
        named = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.REST)
        stands = {(int(kind), layer) for kind in named for layer in several}
        return frozenset(key for key, n in seen.items() if n > 1) | stands

    def name(self, node: int) -> str:
        """Return the unique name of a node: ``L1 P9 #158``, ``L1 P9 error``, ``P9 token``, ``logit Austin``, ..."""
        kind, layer, pos = NodeKind(int(self.kind[node])), int(self.layer[node]), int(self.pos[node])
        site = self.sites[int(self.site[node])]
        if kind is NodeKind.LOGIT:
            text = self.labels[node] or f"#{int(self.index[node])}"
            unique = self._label_counts[self.labels[node]] == 1
            return f"logit {text}" if unique else f"logit {text} ({node - self.n_sources})"
        if kind in (NodeKind.TOKEN, NodeKind.POSITION):
            return f"P{pos} {kind.name.lower()}"
        if kind in (NodeKind.BIAS, NodeKind.PATCH):
            return f"L{layer} P{pos} {site} {kind.name.lower()}"
        what = f"#{int(self.index[node])}" if kind is NodeKind.FEATURE else kind.name.lower()
        where = f" ({site})" if (int(kind), layer) in self._many_sites else ""
        return f"L{layer} P{pos} {what}{where}"

    @cached_property
    def _label_counts(self) -> dict[str, int]:
        """How often each label occurs among the logits."""
        counts: dict[str, int] = {}
        for label in self.labels[self.n_sources :]:
            counts[label] = counts.get(label, 0) + 1
        return counts

    def node(self, node: int, token_strings: Sequence[str]) -> Node:
        """Return node number ``node`` as a record; ``token_strings`` are the strings of the prompt's tokens."""
        pos, act = int(self.pos[node]), float(self.activation[node])
        return Node(
            id=node, kind=NodeKind(int(self.kind[node])), layer=int(self.layer[node]), pos=pos,
            index=int(self.index[node]), site=self.sites[int(self.site[node])], token=token_strings[pos],
            activation=None if act != act else act, label=self.labels[node], name=self.name(node),
        )  # fmt: skip

    def select(self, keep: Int64[Tensor, "m"]) -> NodeTable:
        """Return the table of the nodes ``keep`` (ascending ids): a copy in which every column is cut."""
        pre = None if self.pre_activation is None else self.pre_activation[keep]
        return NodeTable(self.kind[keep], self.layer[keep], self.pos[keep], self.index[keep], self.site[keep],
                         self.sites, self.activation[keep], tuple(self.labels[i] for i in keep.tolist()),
                         pre)  # fmt: skip

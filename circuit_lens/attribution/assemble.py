"""From rows over columns to an attribution graph: which columns become nodes, in the graph's one order."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.sources import Sources
from circuit_lens.dictionaries.binding import write_rank
from circuit_lens.graph.nodes import NodeKind, NodeTable, Section

Label = Callable[[str, int, int], str]


@dataclass(frozen=True, eq=False)
class Columns:
    """The nodes of a graph that are sources, and how to gather their columns from a row.

    Attributes:
        sections: One section per kind of node, features first.
        sites: Names the sections' ``site`` columns index.
        member: For every column of a row, the source node it is summed into.
        n_nodes: Number of source nodes.
        n_features: Number of feature nodes, the first ones.
        ranks: Where each node enters, at the earliest, in the order of computing: it reaches what is read later.
    """

    sections: list[Section]
    sites: tuple[str, ...]
    member: Int[Tensor, "n_columns"]
    n_nodes: int
    n_features: int
    ranks: Int[Tensor, "n_nodes"]

    def gather(self, rows: Float[Tensor, "n n_columns"]) -> Float[Tensor, "n n_nodes"]:
        """Sum the columns of each node."""
        return rows.new_zeros(len(rows), self.n_nodes).index_add_(1, self.member.to(rows.device), rows)

    @cached_property
    def _plain(self) -> bool:
        """Whether the first columns are the feature nodes, one each."""
        return torch.equal(self.member[: self.n_features], torch.arange(self.n_features)) and bool(
            (self.member[self.n_features :] >= self.n_features).all()
        )

    @cached_property
    def _ends(self) -> list[tuple[int, int]]:
        """First and last node of each run of nodes with ascending ranks: one per section."""
        falls = (self.ranks[1:] < self.ranks[:-1]).nonzero()[:, 0].tolist()
        cuts = [0, *(i + 1 for i in falls), self.n_nodes]
        return list(itertools.pairwise(cuts))

    def place(self, rows: Float[Tensor, "n n_columns"], out: Tensor, at: Sequence[int], ranks: Sequence[int]) -> None:
        """Write rows, gathered to nodes, into ``out[at]``; ``ranks`` say where their targets are read.

        Nodes that enter behind a row's target are zero and not touched, which keeps half of a
        zero matrix that the system hands out lazily from ever being resident.
        """
        if self._plain:
            member = (self.member[self.n_features :] - self.n_features).to(rows.device)
            points = rows.new_zeros(len(rows), self.n_nodes - self.n_features)
            points.index_add_(1, member, rows[:, self.n_features :])
            features = rows
        else:
            features = self.gather(rows)
            points = features[:, self.n_features :]
        first = 0
        for rank, run in itertools.groupby(ranks):
            last = first + len(list(run))
            rows_here = _as_slice(at[first:last])
            for start, end in self._ends:
                stop = start + int(torch.searchsorted(self.ranks[start:end], rank))
                middle = min(max(start, self.n_features), stop)
                if start < middle:
                    out[rows_here, start:middle] = features[first:last, start:middle].to(out.device)
                if middle < stop:
                    shift = slice(middle - self.n_features, stop - self.n_features)
                    out[rows_here, middle:stop] = points[first:last, shift].to(out.device)
            first = last


def _as_slice(indices: Sequence[int]) -> slice | Tensor:
    """Return ascending neighbours as a slice, which is written in place of being scattered; others as they are."""
    start = indices[0]
    if list(indices) == list(range(start, start + len(indices))):
        return slice(start, start + len(indices))
    return torch.tensor(indices)


def lazy_zeros(shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "n m"]:
    """Return a zero matrix in main memory, column by column, whose pages become resident when they are written.

    A source only reaches targets of later layers, which are the later rows: the zero head of each column is
    never written, so that a graph takes about half of its full matrix.
    """
    shape = shape[1], shape[0]
    size = shape[0] * shape[1] * torch.empty(0, dtype=dtype).element_size()
    if size == 0 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype).T
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape).T


@dataclass(frozen=True)
class _Entry:
    """One source node that is no feature, and the columns summed into it."""

    kind: NodeKind
    layer: int
    pos: int
    site: int
    index: int
    columns: tuple[int, ...]


def lay_out(
    sources: Sources, selected: Int[Tensor, "n_selected"], tokens: Int[Tensor, "n_pos"], label: Label
) -> Columns:
    """Decide the source nodes of a graph.

    Args:
        sources: All sources.
        selected: Columns of the features that become nodes, ascending; the others are summed into rest nodes.
        tokens: Token ids, for the token nodes.
        label: Label of a feature by site, layer and index.
    """
    sites = _sites(sources)
    entries = sorted(
        [*_points(sources, sites, tokens), *_rest(sources, selected, sites)],
        key=lambda e: (e.kind, e.layer, e.pos, e.site),
    )
    member = torch.full((sources.n_columns,), -1, dtype=torch.long)
    member[selected] = torch.arange(len(selected))
    for i, entry in enumerate(entries, start=len(selected)):
        member[list(entry.columns)] = i
    n_nodes = len(selected) + len(entries)
    sections = [_features(sources, selected, sites, label), *_sections(entries)]
    ranks = torch.cat([_feature_ranks(sources, selected), torch.tensor(_entry_ranks(sources, entries)).long()])
    return Columns(sections, sites, _without_orphans(member, n_nodes), n_nodes, len(selected), ranks)


def _feature_ranks(sources: Sources, selected: Int[Tensor, "n_selected"]) -> Int[Tensor, "n_selected"]:
    """Return where each chosen feature enters at the earliest."""
    ranks = [torch.full((len(f),), write_rank(f.dictionary)) for f in sources.features]
    return torch.cat([*ranks, torch.zeros(0, dtype=torch.long)])[selected]


def _entry_ranks(sources: Sources, entries: Sequence[_Entry]) -> list[int]:
    """Return, for each entry, where the earliest of its kind and layer enters: then they ascend with the layer."""
    earliest: dict[tuple[NodeKind, int], int] = {}
    for p in sources.points:
        key = p.kind, p.node_layer
        earliest[key] = min(earliest.get(key, p.place.at(p.layer)), p.place.at(p.layer))
    for f in sources.features:
        key = NodeKind.REST, f.dictionary.layer
        earliest[key] = min(earliest.get(key, write_rank(f.dictionary)), write_rank(f.dictionary))
    return [earliest[entry.kind, entry.layer] for entry in entries]


def _without_orphans(member: Int[Tensor, "n_columns"], n_nodes: int) -> Int[Tensor, "n_columns"]:
    """Point columns of no node (zero by construction) at the last node, where adding them changes nothing."""
    return torch.where(member < 0, n_nodes - 1, member)


def _sites(sources: Sources) -> tuple[str, ...]:
    names = [f.dictionary.site for f in sources.features] + [p.site for p in sources.points]
    return tuple(dict.fromkeys([*names, ""]))


def _features(sources: Sources, selected: Int[Tensor, "n_selected"], sites: tuple[str, ...], label: Label) -> Section:
    layer, pos, index, act, pre_act, site, labels = [], [], [], [], [], [], []
    for f in sources.features:
        here = selected[(selected >= f.start) & (selected < f.start + len(f))].to(f.pos.device) - f.start
        pos.append(f.pos[here].cpu())
        index.append(f.index[here].cpu())
        act.append(f.act[here].cpu())
        pre_act.append(f.pre_act[here].cpu())
        layer.append(torch.full((len(here),), f.dictionary.layer))
        site.append(torch.full((len(here),), sites.index(f.dictionary.site)))
        labels += [label(f.dictionary.site, f.dictionary.layer, i) for i in index[-1].tolist()]
    empty = torch.zeros(0, dtype=torch.long)
    if not sources.features:
        return Section(NodeKind.FEATURE, empty, empty, empty, empty, torch.zeros(0), ())
    acts, pre_acts = torch.cat(act), torch.cat(pre_act)
    return Section(
        NodeKind.FEATURE, torch.cat(pos), torch.cat(layer), torch.cat(index), torch.cat(site), acts, labels,
        None if torch.equal(acts, pre_acts) else pre_acts,
    )  # fmt: skip


def _points(sources: Sources, sites: tuple[str, ...], tokens: Int[Tensor, "n_pos"]) -> list[_Entry]:
    grouped: dict[tuple[NodeKind, int, int], list[int]] = {}
    for i, point in enumerate(sources.points):
        grouped.setdefault((point.kind, point.node_layer, sites.index(point.site)), []).append(i)
    ids, entries = tokens.tolist(), []
    for (kind, layer, site), members in grouped.items():
        for pos in range(sources.n_pos):
            if kind is NodeKind.PATCH and not bool(sources.points[members[0]].vectors[pos].any()):
                continue
            index = ids[pos] if kind is NodeKind.TOKEN else 0
            entries.append(_Entry(kind, layer, pos, site, index, tuple(sources.column(i) + pos for i in members)))
    return entries


def _rest(sources: Sources, selected: Int[Tensor, "n_selected"], sites: tuple[str, ...]) -> list[_Entry]:
    if len(selected) == sources.n_features:
        return []
    chosen = set(selected.tolist())
    entries = []
    for f in sources.features:
        for pos in range(sources.n_pos):
            at = f.at(pos)
            columns = [c for c in range(f.start + at.start, f.start + at.stop) if c not in chosen]
            if columns:
                site = sites.index(f.dictionary.site)
                entries.append(_Entry(NodeKind.REST, f.dictionary.layer, pos, site, len(columns), tuple(columns)))
    return entries


def _sections(entries: Sequence[_Entry]) -> list[Section]:
    sections = []
    for kind in sorted({e.kind for e in entries}):
        part = [e for e in entries if e.kind is kind]
        columns = {name: torch.tensor([getattr(e, name) for e in part]) for name in ("pos", "layer", "index", "site")}
        sections.append(Section(kind, columns["pos"], columns["layer"], columns["index"], columns["site"]))
    return sections


def table(columns: Columns, logits: Section) -> NodeTable:
    """Return the graph's node table: the source nodes, then the targets."""
    return NodeTable.build([*columns.sections, logits], sites=columns.sites)

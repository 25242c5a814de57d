"""Questions that a graph answers: its nodes, its edges, its paths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph import effects
from circuit_lens.graph.nodes import Node, NodeKind, NodeTable
from circuit_lens.graph.path_lengths import mean_path_length
from circuit_lens.graph.paths import strongest_paths
from circuit_lens.graph.positions import Which, find_position
from circuit_lens.graph.records import Edge, Mediation, Path, RankedNode, Records
from circuit_lens.graph.select import NodeRef, Role, find_node, find_nodes


class GraphQueries(ABC):
    """The questions to an :class:`circuit_lens.graph.AttributionGraph`, which says what the attributes are."""

    nodes: NodeTable
    adjacency: Float[Tensor, "n_rows n_sources"]
    logit_weight: Float[Tensor, "n_logits"]
    token_strings: tuple[str, ...]

    @abstractmethod
    def row_totals(self, *, convention: str = "paper") -> Float[Tensor, "n_rows"]:
        """Return the sum of |edge| of each row of the full graph."""

    @abstractmethod
    def influence(self, *, convention: str = "paper") -> Float[Tensor, "n"]:
        """Return the influence of each node."""

    # Nodes

    def node(self, ref: NodeRef, *, which: Which | None = None) -> Node:
        """Return one node: by id, name, Feature, a Node of a related graph, or a token's or target's string.

        Raises:
            NodeNotFoundError: none, or several.
            TokenNotFoundError: a token that occurs at several positions, and no ``which``.
        """
        return self._record(find_node(self.nodes, self.token_strings, ref, which=which))

    def find(
        self, ref: NodeRef | Iterable[NodeRef], *, role: Role = "any", which: Which | None = None
    ) -> Records[Node]:
        """Return all nodes that a selector names; see :func:`circuit_lens.graph.select.find_nodes`."""
        return Records(map(self._record, find_nodes(self.nodes, self.token_strings, ref, role=role, which=which)))

    def _record(self, node: int) -> Node:
        return self.nodes.node(node, self.token_strings)

    @property
    def best_logit(self) -> Node:
        """The logit node with the largest weight (the first of equals)."""
        return self._record(self.nodes.n_sources + int(self.logit_weight.argmax()))

    def top(
        self,
        n: int = 10,
        *,
        pos: int | str | None = None,
        which: Which | None = None,
        kind: NodeKind | str | None = NodeKind.FEATURE,
        by: str = "influence",
        target: NodeRef | None = None,
        convention: str = "paper",
    ) -> Records[RankedNode]:
        """Return the n strongest nodes, the strongest first; ties go to the lower id, zeros are left out.

        Args:
            n: how many at most.
            pos: only at this position (a number, or a string that names one token; ``which`` where it occurs twice).
            which: which occurrence of ``pos``.
            kind: only this kind; None for all sources.
            by: "influence" on the logits, "activation", or "effect": the linear total effect on ``target``, by size.
            target: target of "effect"; by default the logit with the largest weight.
            convention: convention of "influence".

        Raises:
            GraphError: unknown ``by``, kind or convention.
        """
        n_sources = self.nodes.n_sources
        if by == "influence":
            values = self.influence(convention=convention)[:n_sources]
        elif by == "activation":
            values = self.nodes.activation[:n_sources].double().nan_to_num(0.0)
        elif by == "effect":
            values = self.total_effect(self.best_logit if target is None else target)
        else:
            raise GraphError(f'Nodes are ranked by="influence", by="activation" or by="effect"; given {by!r}.')
        mask = values != 0
        if pos is not None:
            mask &= self.nodes.pos[:n_sources] == find_position(self.token_strings, pos, which=which)
        if kind is not None:
            mask &= self.nodes.kind[:n_sources] == int(NodeKind.parse(kind))
        ids = mask.nonzero().flatten()
        ids = ids[torch.sort(values[ids].abs(), descending=True, stable=True).indices][:n]
        return Records(RankedNode(self._record(i), float(values[i]), by) for i in ids.tolist())

    # Edges and paths

    def inputs(self, node: NodeRef, n: int | None = 10) -> Records[Edge]:
        """Return the n strongest edges into a feature or logit, by |weight| (None: all that are not zero).

        Raises:
            GraphError: a node of a kind that has no inputs.
        """
        return self.edges(target=node, n=n)

    def outputs(self, node: NodeRef, n: int | None = 10) -> Records[Edge]:
        """Return the n strongest edges out of a source, by |weight| (None: all that are not zero).

        Raises:
            GraphError: a logit, which feeds nothing.
        """
        return self.edges(source=node, n=n)

    def edges(
        self,
        *,
        source: NodeRef | Iterable[NodeRef] | None = None,
        target: NodeRef | Iterable[NodeRef] | None = None,
        min_weight: float = 0.0,
        n: int | None = 100,
    ) -> Records[Edge]:
        """Return edges that are not zero, the largest |weight| first (ties: lower target, then source).

        Args:
            source, target: only edges from or into these nodes; None for all.
            min_weight: only edges of at least this |weight|.
            n: at most so many; None for all.

        Raises:
            GraphError: a target of a kind that has no inputs, or a logit as source.
        """
        rows = torch.arange(self.nodes.n_rows) if target is None else self._rows(target)
        columns = torch.arange(self.nodes.n_sources)
        if source is not None:
            columns = torch.tensor(self._sources(source), dtype=torch.long)
        block = self.adjacency if target is None else self.adjacency[rows]
        block = block if source is None else block[:, columns]
        size = block.abs().flatten()
        if n is not None and 0 < n < len(size):
            min_weight = max(min_weight, float(size.topk(n).values[-1]))
        kept = ((size > 0) & (size >= min_weight)).nonzero().flatten()
        kept = kept[torch.sort(size[kept], descending=True, stable=True).indices][:n]
        totals = self.row_totals(convention="conserving").tolist()
        found = []
        for at in kept.tolist():
            row, column = int(rows[at // len(columns)]), int(columns[at % len(columns)])
            weight = float(self.adjacency[row, column])
            ends = self._record(column), self._record(self.nodes.node_of_row(row))
            found.append(Edge(*ends, weight, abs(weight) / totals[row]))
        return Records(found)

    def _ids(self, ref: NodeRef | Iterable[NodeRef], role: Role) -> list[int]:
        return find_nodes(self.nodes, self.token_strings, ref, role=role)

    def _rows(self, ref: NodeRef | Iterable[NodeRef]) -> Int64[Tensor, "m"]:
        """Return the adjacency rows of nodes that must be targets."""
        rows = {i: self.nodes.row_of(i) for i in self._ids(ref, "target")}
        for i, row in rows.items():
            if row is None:
                kind = NodeKind(int(self.nodes.kind[i])).name.lower()
                raise GraphError(
                    f"{self.nodes.name(i)} is of the kind {kind} and has no inputs; give a feature or logit."
                )
        return torch.tensor([row for row in rows.values() if row is not None], dtype=torch.long)

    def _sources(self, ref: NodeRef | Iterable[NodeRef]) -> list[int]:
        """Return the ids of nodes that must be sources; raise GraphError for a logit."""
        ids = self._ids(ref, "source")
        for i in ids:
            if i >= self.nodes.n_sources:
                raise GraphError(f"{self.nodes.name(i)} is a target and feeds nothing; every other node is a source.")
        return ids

    def _feature_mask(self, ref: NodeRef | Iterable[NodeRef], ends: Iterable[int]) -> Bool[Tensor, "n_features"]:
        """Return the mask of features to pass through; raise GraphError for other kinds and for the ends."""
        ids = self._ids(ref, "any")
        wrong = [self.nodes.name(i) for i in ids if i >= self.nodes.n_features or i in set(ends)]
        if wrong or not ids:
            raise GraphError(f"`through` must name features between the source and the target; given {wrong or ref!r}.")
        mask = torch.zeros(self.nodes.n_features, dtype=torch.bool)
        mask[ids] = True
        return mask

    def paths(
        self,
        source: NodeRef | Iterable[NodeRef],
        target: NodeRef | Iterable[NodeRef],
        *,
        k: int = 5,
        through: NodeRef | Iterable[NodeRef] | None = None,
        max_length: int | None = None,
        by: str = "effect",
    ) -> Records[Path]:
        """Return the k strongest paths from any source to any target, exactly; see :func:`paths.strongest_paths`.

        Args:
            source, target: nodes or selectors: ``graph.paths("Dallas", "Austin")`` goes from a token to a logit.
            k: how many.
            through: features of which a path must pass at least one.
            max_length: most edges of a path.
            by: "effect", the linear effect along the path (its edges, each edge into a feature divided by that
                feature's pre-activation; paths from one source to one target sum to ``total_effect``), or "influence",
                the product of |edge| / (sum of |edge| in its row).

        Raises:
            GraphError: a target without inputs, ``through`` naming something else than features between the ends.
        """
        sources = self._sources(source)
        rows = self._rows(target).tolist()
        ends = [*sources, *map(self.nodes.node_of_row, rows)]
        via = None if through is None else self._feature_mask(through, ends)
        totals = self.row_totals(convention="conserving")
        raw = [
            path
            for row in rows
            for path in strongest_paths(self.adjacency, nodes=self.nodes, sources=sources, row=row, k=k, by=by,
                                        via=via, max_length=max_length, totals=totals)
        ]  # fmt: skip
        found = []
        for path in sorted(raw, key=lambda path: -abs(path.weight))[:k]:
            hops = zip(path.ids[:-1], path.ids[1:], strict=True)
            edges = tuple(float(self.adjacency[self.nodes.row_of(t), s]) for s, t in hops)
            found.append(Path(tuple(map(self._record, path.ids)), edges, path.weight, by))
        return Records(found)

    def total_effect(self, target: NodeRef) -> Float[Tensor, "n_sources"]:
        """Return the linear effect of each source on one target, direct and through features.

        Adding a source's contribution once more changes the target by this much when features react linearly and
        attention, norms, errors and everything else stay frozen. Units of the target; see
        :func:`circuit_lens.graph.effects.total_effect`.

        Raises:
            GraphError: a target without inputs.
            NodeNotFoundError: none, or several.
        """
        node = find_node(self.nodes, self.token_strings, target, role="target")
        return effects.total_effect(self.adjacency, nodes=self.nodes, row=int(self._rows(node)[0]))

    def path_length(self, target: NodeRef | None = None, *, by: str = "influence") -> float:
        """Return the mean number of features on a path from a token to a target, weighted by the path.

        Args:
            target: the most probable token by default.
            by: "influence" (products of normalised edges) or "effect" (products of linear effects).

        Raises:
            ValueError: another ``by``.
            GraphError: a target without inputs, or no path from a token.
            NodeNotFoundError: none, or several.
        """
        if target is None:
            row = self.nodes.row_of(self.best_logit.id)
        else:
            node = find_node(self.nodes, self.token_strings, target, role="target")
            row = int(self._rows(node)[0])
        assert row is not None
        return mean_path_length(self.adjacency, nodes=self.nodes, row=row, totals=self.row_totals(), by=by)

    def mediation(
        self,
        source: NodeRef | Iterable[NodeRef],
        target: NodeRef | Iterable[NodeRef],
        *,
        through: NodeRef | Iterable[NodeRef],
    ) -> Mediation:
        """Return how much of the sources' linear total effect on the targets (both summed) passes some features.

        Raises:
            GraphError: ``through`` names a source, a target or something that is no feature.
        """
        rows, sources = self._rows(target).tolist(), self._sources(source)
        blocked = self._feature_mask(through, [*sources, *map(self.nodes.node_of_row, rows)])
        total = rest = 0.0
        for row in rows:
            every = effects.total_effect(self.adjacency, nodes=self.nodes, row=row)
            left = effects.total_effect(self.adjacency, nodes=self.nodes, row=row, blocked=blocked)
            total += float(every[sources].sum())
            rest += float(left[sources].sum())
        return Mediation(total=total, through=total - rest)

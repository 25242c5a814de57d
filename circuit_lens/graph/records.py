"""Records of a graph, and those that questions to it return. All print well."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Float, Int, Int64
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph.nodes import Node

T = TypeVar("T")


class Records(tuple[T, ...]):
    """A tuple of records that prints one record per line, in a terminal and in a notebook."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(str(record) for record in self) or "(none)"

    def _repr_html_(self) -> str:
        rows = "".join(f"<div>{html.escape(str(record))}</div>" for record in self)
        return f'<div style="font-family: monospace; white-space: pre-wrap">{rows or "(none)"}</div>'


@dataclass(frozen=True)
class Edge:
    """One edge.

    Attributes:
        source, target: the nodes.
        weight: change of the target's pre-activation or logit when the source's contribution is added once more.
        share: |weight| as a share of the sum of |weight| over all of the target's inputs in the graph, all kinds.
    """

    source: Node
    target: Node
    weight: float
    share: float

    def __str__(self) -> str:
        return f"{self.weight:+9.4f} {self.share:6.1%}  {self.source.short} -> {self.target.short}"


@dataclass(frozen=True)
class Path:
    """One path from a source to a target.

    Attributes:
        nodes: the nodes, source first.
        edges: the raw edge weights between them.
        weight: by "effect", the signed linear effect that runs along this path, in units of the target; by
            "influence", the product of the normalised edges (each |edge| over its row's sum of |edge|).
        by: "effect" or "influence".
    """

    nodes: tuple[Node, ...]
    edges: tuple[float, ...]
    weight: float
    by: str

    def __str__(self) -> str:
        return f"{self.weight:+9.4f}  " + " -> ".join(node.short for node in self.nodes)


@dataclass(frozen=True)
class RankedNode:
    """A node and the figure it was ranked by.

    Attributes:
        node: the node.
        score: its influence, activation or effect.
        by: which of these.
    """

    node: Node
    score: float
    by: str

    def __str__(self) -> str:
        return f"{self.score:+9.4f}  {self.node}"


@dataclass(frozen=True)
class Mediation:
    """How much of a source's effect on a target passes through some nodes.

    Attributes:
        total: linear total effect of the sources on the target, in units of the target.
        through: the part of it that runs along paths through at least one of the given nodes; it is lost when they
            are removed.
    """

    total: float
    through: float

    @property
    def share(self) -> float:
        """``through`` as a share of ``total``; NaN where there is no effect. Opposed paths can take it out of 0..1."""
        return self.through / self.total if self.total != 0.0 else float("nan")

    def __str__(self) -> str:
        return f"{self.share:.1%} of the effect ({self.through:+.4f} of {self.total:+.4f})"


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The model's own most probable next tokens, for display.

    Attributes:
        pos: the position they are read at.
        ids: token ids, most probable first.
        strings: their strings.
        logits: the model's logits (after a soft-cap, where it has one).
        probs: their probabilities.
    """

    pos: int
    ids: Int[Tensor, "k"]
    strings: tuple[str, ...]
    logits: Float[Tensor, "k"]
    probs: Float[Tensor, "k"]

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.strings), len(self.logits), len(self.probs)}
        if len(lengths) != 1:
            raise GraphError(f"ids, strings, logits and probs must be equally long; given {sorted(lengths)}.")

    def __str__(self) -> str:
        return "  ".join(f"{text!r} {p:.3f}" for text, p in zip(self.strings, self.probs.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Pruning:
    """What pruning took away from a graph, kept with the circuit that is left.

    Attributes:
        node_threshold, edge_threshold: the shares of influence that were to be kept.
        convention: "paper" or "conserving", see :func:`circuit_lens.graph.influence.influence`.
        node_ids: the id that each kept node had in the full graph.
        influence: influence of each kept node in the full graph (0 for logits).
        cumulative: share of all influence held by the nodes that are at least as influential as this one, in the
            full graph: small is important (1 for nodes without influence).
        row_totals: sum of |edge| over the full graph's sources, under "paper" and under "conserving", of each kept
            row; what is missing from it was pruned and counts as error in the circuit's scores.
        n_nodes, n_edges: size of the full graph (its edges that are not zero).
        replacement_score, completeness_score: scores of the full graph under ``convention``.
    """

    node_threshold: float
    edge_threshold: float
    convention: str
    node_ids: Int64[Tensor, "n"]
    influence: Float[Tensor, "n"]
    cumulative: Float[Tensor, "n"]
    row_totals: Float[Tensor, "n_rows 2"]
    n_nodes: int
    n_edges: int
    replacement_score: float
    completeness_score: float

"""How much of the output a graph explains: replacement score and completeness score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.graph.influence import (
    absolute_row_sums,
    counted,
    dense,
    influence,
    influence_definition,
    inverse,
    row_totals,
)
from circuit_lens.graph.nodes import NodeKind, NodeTable

_LEAVES = (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION, NodeKind.BIAS, NodeKind.REST, NodeKind.PATCH)


@dataclass(frozen=True)
class Scores:
    """The scores of one graph under one convention (NaN where nothing has influence).

    Attributes:
        convention: "paper" or "conserving".
        replacement: share of the influence that arrives at tokens, of all that arrives at leaves: 1 if every path
            from the input to the output runs through features alone.
        completeness: share of the nodes' inputs that is no error, weighted by the nodes' influence.
        shares: the share of the influence that arrives at each kind of leaf; "pruned" is what was pruned away, and
            counts as error in both scores. They sum to 1.
    """

    convention: str
    replacement: float
    completeness: float
    shares: dict[str, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in self.shares.items() if share > 0)
        return (
            f"{self.convention}: replacement score {self.replacement:.3f}, completeness score "
            f"{self.completeness:.3f} (influence ends at: {shares or 'nothing'})"
        )


def scores(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    convention: str = "paper",
    totals: Float[Tensor, "n_rows"] | None = None,
    node_influence: Float[Tensor, "n"] | None = None,
) -> Scores:
    """Return the scores of a graph (Ameisen et al. 2025, Circuit Tracing, "Evaluating attribution graphs").

    With I the influence, p the logit weights, e[t] the share of errors among t's inputs and I(kind) the influence
    summed over a kind of node::

        replacement  = I(token) / (I(token) + I(error))                  # conserving: / I of all leaves
        completeness = sum_t (1 - e[t]) (I[t] + p[t]) / sum_t (I[t] + p[t])    # over all nodes; leaves have e = 0

    Args:
        adjacency, logit_weight, nodes, convention, totals: see :func:`influence`. Where ``totals`` exceed the sum of
            the edges at hand, the difference was pruned and counts as error.
        node_influence: the influence, if it is known already.

    Raises:
        GraphError: unknown convention.
    """
    sums = row_totals(adjacency, nodes=nodes, convention=convention)
    totals = sums if totals is None else totals.double()
    if node_influence is None:
        node_influence = influence(adjacency, logit_weight, nodes=nodes, convention=convention, totals=totals)
    rows = node_influence[nodes.rows].clone()
    rows[nodes.n_features :] += logit_weight.double()
    flow = rows * inverse(totals)
    errors = adjacency[:, nodes.slice_of(NodeKind.ERROR)]
    error = absolute_row_sums(errors)
    pruned = (totals - sums).clamp(min=0.0)
    leaves = {kind.name.lower(): float(node_influence[nodes.slice_of(kind)].sum()) for kind in _LEAVES}
    leaves["pruned"] = float(flow @ pruned)
    return _finish(convention, leaves, float(flow @ (error + pruned)), float(node_influence.sum() + logit_weight.sum()))


def _finish(convention: str, leaves: dict[str, float], lost: float, everything: float) -> Scores:
    """Turn the influence of each kind of leaf, and the part of all influence that is error, into scores."""
    total = sum(leaves.values())
    return Scores(
        convention=convention,
        replacement=leaves["token"] / total if total > 0 else float("nan"),
        completeness=1.0 - lost / everything if total > 0 else float("nan"),
        shares={kind: value / total if total > 0 else 0.0 for kind, value in leaves.items()},
    )


def scores_definition(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    convention: str = "paper",
) -> Scores:
    """Return what :func:`scores` returns for a full graph, by the published formulas on the square matrix."""
    inflow = influence_definition(adjacency, logit_weight, nodes=nodes, convention=convention)
    square = dense(adjacency.double().abs(), nodes=nodes, columns=counted(nodes, convention))
    square = torch.where(square.sum(1, keepdim=True) > 0, square / square.sum(1, keepdim=True), 0.0)
    leaves = {kind.name.lower(): float(inflow[nodes.slice_of(kind)].sum()) for kind in _LEAVES} | {"pruned": 0.0}
    output = inflow.clone()
    output[nodes.n_sources :] += logit_weight.double()
    kept = 1.0 - square[:, nodes.slice_of(NodeKind.ERROR)].sum(1)
    total = sum(leaves.values())
    if total == 0:
        return Scores(convention, float("nan"), float("nan"), dict.fromkeys(leaves, 0.0))
    others = sum(leaves[kind] for kind in leaves if kind != "token")
    replacement = leaves["token"] / (leaves["token"] + others)
    completeness = float((kept * output).sum() / output.sum())
    return Scores(convention, replacement, completeness, {kind: value / total for kind, value in leaves.items()})

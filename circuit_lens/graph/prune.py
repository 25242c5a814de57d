"""Pruning: the few nodes and edges that carry most of the influence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph.influence import counted, dense, influence, influence_definition, inverse, row_totals
from circuit_lens.graph.nodes import NodeKind, NodeTable

_SLACK = 1e-12
"""Relative slack of "reaches the threshold", so that rounding in the order of summation decides nothing."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What pruning keeps.

    Attributes:
        node_ids: kept nodes, ascending ids of the full graph.
        edge_mask: kept edges between the kept nodes; rows and columns as in the pruned graph's adjacency.
        influence: influence of all nodes of the full graph.
        cumulative: share of the influence held by the nodes at least as influential as each (1 for none).
    """

    node_ids: Int64[Tensor, "kept"]
    edge_mask: Bool[Tensor, "kept_rows kept_sources"]
    influence: Float[Tensor, "n"]
    cumulative: Float[Tensor, "n"]


def check_threshold(name: str, value: float) -> None:
    """Raise GraphError unless a threshold is above 0 and at most 1."""
    if not 0.0 < value <= 1.0:
        raise GraphError(f"{name} must be above 0 and at most 1 (the share of influence to keep); given {value}.")


def top_share_definition(values: Float[Tensor, "m"], threshold: float) -> Bool[Tensor, "m"]:
    """Return the mask of the fewest values, largest first, whose sum is at least ``threshold`` of the whole.

    Ties go to the lower index; values of zero are never kept; a threshold of 1 keeps all others.
    """
    values = values.double()
    order = torch.sort(values, descending=True, stable=True).indices
    cumulative = values[order].cumsum(0)
    total = float(values.sum())
    mask = torch.zeros(len(values), dtype=torch.bool)
    if total > 0:
        short = int((cumulative < threshold * total * (1.0 - _SLACK)).sum()) if threshold < 1.0 else len(values)
        mask[order[: short + 1]] = True
    return mask & (values > 0)


def top_share(values: Float[Tensor, "m"], threshold: float, *, bins: int = 1024) -> Bool[Tensor, "m"]:
    """Return what :func:`top_share_definition` returns without sorting everything.

    The values that are not zero are counted into bins of their logarithm; the bins above the one in which the sum
    crosses the threshold are kept whole, and that one bin is binned again until it is small enough to sort.
    """
    mask = values > 0
    if threshold >= 1.0 or not bool(mask.any()):
        return mask
    index = mask.nonzero().flatten()
    work = values[index].double()
    missing = threshold * float(work.sum()) * (1.0 - _SLACK)
    keep = []
    while len(work) > bins:
        low, high = float(work.min()), float(work.max())
        if low == high:
            break
        place = torch.log(work / low).div_(float(torch.log(torch.tensor(high / low, dtype=torch.float64))))
        place = place.mul_(bins).long().clamp_(0, bins - 1)
        sums = torch.bincount(place, weights=work, minlength=bins).flip(0)
        above = sums.cumsum(0)
        crossing = min(int((above < missing).sum()), bins - 1)
        b = bins - 1 - crossing
        keep.append(index[place > b])
        missing -= float(above[crossing] - sums[crossing])
        inside = place == b
        if bool(inside.all()):
            break
        index, work = index[inside], work[inside]
    order = torch.sort(work, descending=True, stable=True).indices
    short = int((work[order].cumsum(0) < missing).sum())
    keep.append(index[order[: short + 1]])
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.cat(keep)] = True
    return mask


def cumulative_share(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return, for each value, the share of the sum held by it and all larger ones (ties: lower index first).

    Values of zero get 1.
    """
    order = torch.sort(values, descending=True, stable=True).indices
    result = torch.ones_like(values)
    if bool((values > 0).any()):
        result[order] = values[order].cumsum(0) / values.sum()
    return torch.where(values > 0, result.clamp(max=1.0), 1.0)


def prune(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    convention: str = "paper",
    totals: Float[Tensor, "n_rows"] | None = None,
) -> Kept:
    """Return the nodes and edges that carry most of the influence (Ameisen et al. 2025, Circuit Tracing, pruning).

    1. Keep the fewest nodes that hold ``node_threshold`` of the influence, and all tokens and logits.
    2. In the graph of these nodes, normalised again, an edge scores Â[t, s] (I[t] + p[t]); keep the fewest edges
       that hold ``edge_threshold`` of the sum.
    3. Drop nodes (no tokens or logits) that nothing kept reads, and features without an input, until none is left.

    Equals :func:`prune_definition`; all work after step 1 is done on the graph of the kept nodes.

    Raises:
        GraphError: a threshold outside (0, 1], an unknown convention.
    """
    check_threshold("node_threshold", node_threshold)
    check_threshold("edge_threshold", edge_threshold)
    inflow = influence(adjacency, logit_weight, nodes=nodes, convention=convention, totals=totals)
    keep = top_share(inflow, node_threshold)
    keep[nodes.slice_of(NodeKind.TOKEN)] = True
    keep[nodes.n_sources :] = True
    ids = keep.nonzero().flatten()
    small = nodes.select(ids)
    work = adjacency[keep[nodes.rows]][:, keep[: nodes.n_sources]].abs()
    flow = influence(work, logit_weight, nodes=small, convention=convention)[small.rows]
    flow[small.n_features :] += logit_weight.double()
    flow *= inverse(row_totals(work, nodes=small, convention=convention))
    edge_scores = work.double() * flow[:, None]
    edge_scores[:, counted(small, convention) :] = 0.0
    edges = top_share(edge_scores.flatten(), edge_threshold).view_as(work)
    alive = _drop_dangling(edges, small)
    rows, columns = alive[small.rows], alive[: small.n_sources]
    return Kept(ids[alive], edges[rows][:, columns], inflow, cumulative_share(inflow))


def _drop_dangling(edges: Bool[Tensor, "n_rows n_sources"], nodes: NodeTable) -> Bool[Tensor, "n"]:
    """Return which nodes stay when nodes without a reader and features without an input go, again and again."""
    f, n = nodes.n_features, nodes.n_sources
    alive = torch.ones(len(nodes), dtype=torch.bool)
    always = torch.zeros(n, dtype=torch.bool)
    always[nodes.slice_of(NodeKind.TOKEN)] = True
    out_edges, in_edges = edges.sum(0), edges.sum(1)
    while True:
        dead = alive[:n] & ~always & (out_edges <= 0)
        dead[:f] |= alive[:f] & (in_edges[:f] <= 0)
        if not bool(dead.any()):
            return alive
        alive[:n] &= ~dead
        # An edge between two nodes that die together is subtracted once on either side; sums of the dead may go below
        # zero, those of the living count living edges only.
        in_edges = in_edges - edges[:, dead].sum(1)
        out_edges = out_edges - edges[:f][dead[:f]].sum(0)


def prune_definition(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    convention: str = "paper",
) -> tuple[Bool[Tensor, "n"], Bool[Tensor, "n n"]]:
    """Return the masks of kept nodes and edges over the square matrix of the full graph, as published."""
    always = torch.zeros(len(nodes), dtype=torch.bool)
    always[nodes.slice_of(NodeKind.TOKEN)] = True
    always[nodes.n_sources :] = True
    inflow = influence_definition(adjacency, logit_weight, nodes=nodes, convention=convention)
    keep = top_share_definition(inflow, node_threshold) | always
    small = adjacency * keep[nodes.rows][:, None] * keep[: nodes.n_sources]
    square = dense(small.double().abs(), nodes=nodes, columns=counted(nodes, convention))
    square = torch.where(square.sum(1, keepdim=True) > 0, square / square.sum(1, keepdim=True), 0.0)
    flow = influence_definition(small, logit_weight, nodes=nodes, convention=convention)
    flow[nodes.n_sources :] += logit_weight.double()
    edges = top_share_definition((square * flow[:, None]).flatten(), edge_threshold).view_as(square)
    while True:
        before = keep.clone()
        keep &= always | edges.any(0)
        keep[: nodes.n_features] &= edges[: nodes.n_features].any(1)
        edges &= keep[:, None] & keep
        if bool((keep == before).all()):
            return keep, edges

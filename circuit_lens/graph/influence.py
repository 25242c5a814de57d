"""Influence of every node on the logits: the share of all indirect effects, regardless of sign, that starts there."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph.nodes import NodeTable

Convention = Literal["paper", "conserving"]
"""Which sources count. ``"paper"``: features, errors and tokens, as in the published method, so that figures compare;
``"conserving"``: learned positions, biases, rest and patches as well, each as a share of its own."""


def counted(nodes: NodeTable, convention: str) -> int:
    """Return how many leading source columns a convention counts; raise GraphError for an unknown convention."""
    if convention not in ("paper", "conserving"):
        raise GraphError(f'No convention {convention!r}; valid are "paper" and "conserving".')
    return nodes.n_paper if convention == "paper" else nodes.n_sources


def row_totals(
    adjacency: Float[Tensor, "n_rows n_sources"], *, nodes: NodeTable, convention: str = "paper"
) -> Float[Tensor, "n_rows"]:
    """Return the sum of |edge| over the counted sources of each row, in float64; units of the row's target."""
    return absolute_row_sums(adjacency[:, : counted(nodes, convention)])


def absolute_row_sums(matrix: Float[Tensor, "n m"]) -> Float[Tensor, "n"]:
    """Return the sum of |entry| of each row, float64, in the order in which the matrix lies in memory, part by part."""
    if matrix.stride(0) >= matrix.stride(1):
        parts = [part.abs().sum(1, dtype=torch.float64) for part in matrix.split(256)]
        return torch.cat(parts) if parts else matrix.new_zeros(0, dtype=torch.float64)
    total = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
    for part in matrix.split(256, dim=1):
        total += part.abs().sum(1)
    return total


def inverse(values: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Return 1 / value in float64, and 0 for a value of 0: an empty row passes nothing on."""
    values = values.to(torch.float64)
    return torch.where(values == 0, 0.0, 1.0 / torch.where(values == 0, 1.0, values))


def influence(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    convention: str = "paper",
    totals: Float[Tensor, "n_rows"] | None = None,
) -> Float[Tensor, "n"]:
    """Return I = p Â + p Â² + ..., with Â = |A| / (sum of |A| over the row's counted sources) and p the logit weights.

    I[s] is the sum, over all paths from s to a logit, of the product of normalised edges, times the logit's weight
    (Ameisen et al. 2025, Circuit Tracing, appendix on graph pruning). A graph has no cycles, so I[s] is final once
    all nodes that s feeds are: one sweep over the (layer, site) groups, from the last to the first, reads each edge
    once and equals :func:`influence_definition`.

    Args:
        adjacency: edges; rows are targets, columns are sources.
        logit_weight: start weight of each logit.
        nodes: the nodes of both.
        convention: which sources count.
        totals: what each row is divided by, where it is more than the edges at hand (a pruned graph).

    Returns:
        Influence of every node, float64; 0 for logits and for sources that do not count.

    Raises:
        GraphError: unknown convention.
    """
    columns, f = counted(nodes, convention), nodes.n_features
    per_total = inverse(row_totals(adjacency, nodes=nodes, convention=convention) if totals is None else totals)
    result = torch.zeros(len(nodes), dtype=torch.float64)
    work = adjacency.dtype if adjacency.dtype in (torch.float32, torch.float64) else torch.float32

    def spread(rows: slice, weight: Tensor, before: int) -> None:
        """Hand the weight of some rows on to the features before ``before`` and to all counted leaves."""
        weight = (weight * per_total[rows]).to(work)
        for start, stop in ((0, before), (f, columns)):
            result[start:stop] += (weight @ adjacency[rows, start:stop].to(work).abs()).double()

    spread(slice(f, nodes.n_rows), logit_weight.double(), f)
    for group in reversed(nodes.groups):
        spread(group, result[group].clone(), group.start)
    return result


def dense(
    adjacency: Float[Tensor, "n_rows n_sources"], *, nodes: NodeTable, columns: int | None = None
) -> Float[Tensor, "n n"]:
    """Return the square matrix over all nodes; rows are targets, columns sources, rows of leaves are zero.

    Only the first ``columns`` sources are filled in (all of them by default).
    """
    columns = nodes.n_sources if columns is None else columns
    square = adjacency.new_zeros(len(nodes), len(nodes))
    square[nodes.rows, :columns] = adjacency[:, :columns]
    return square


def influence_definition(
    adjacency: Float[Tensor, "n_rows n_sources"],
    logit_weight: Float[Tensor, "n_logits"],
    *,
    nodes: NodeTable,
    convention: str = "paper",
    totals: Float[Tensor, "n_rows"] | None = None,
) -> Float[Tensor, "n"]:
    """Return what :func:`influence` returns, by summing the powers of the square matrix Â until one is zero."""
    square = dense(adjacency.double().abs(), nodes=nodes, columns=counted(nodes, convention))
    divisor = square.sum(1)
    if totals is not None:
        divisor[nodes.rows] = totals.double()
    square = torch.where(divisor[:, None] > 0, square / divisor[:, None], 0.0)
    power = torch.zeros(len(nodes), dtype=torch.float64)
    power[nodes.n_sources :] = logit_weight.double()
    total = torch.zeros_like(power)
    for _ in range(len(nodes) + 1):
        power = power @ square
        if not power.any():
            return total
        total += power
    raise GraphError("The graph has a cycle: the powers of its matrix do not end.")

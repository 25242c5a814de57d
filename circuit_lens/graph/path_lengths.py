"""How many features paths pass: the mean over all paths of a graph, weighted by what runs along them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph.effects import chain_gain
from circuit_lens.graph.influence import inverse
from circuit_lens.graph.nodes import NodeKind, NodeTable

BY = ("influence", "effect")


def mean_path_length(
    adjacency: Float[Tensor, "n_rows n_sources"], *, nodes: NodeTable, row: int, totals: Tensor, by: str = "influence"
) -> float:
    """Return the mean number of features on a path from a token to one target, weighted by the path.

    Over all paths p from any token, through features: the sum of |p| * (features on p), divided by the sum of |p|. By
    "influence" |p| is the product of normalised |edges| (Ameisen et al. 2025, Circuit Tracing, graph pruning); by
    "effect" it is the size of the product of linear effects. A direct edge passes no feature and counts 0. A graph has
    no cycles, so both sums follow in one sweep from the last features to the first.

    Args:
        adjacency: edges.
        nodes: its nodes.
        row: adjacency row of the target.
        totals: sum of |edge| of each row of the full graph, convention "paper".
        by: "influence" or "effect".

    Raises:
        ValueError: another ``by``.
        GraphError: no path leads from a token to the target.
    """
    if by not in BY:
        raise ValueError(f"by={by!r} is not valid; give one of {', '.join(BY)}")
    if by == "influence":
        scale = inverse(totals).double()
    else:
        scale = torch.ones(len(adjacency), dtype=torch.float64)
        scale[: nodes.n_features] = chain_gain(nodes).abs()
    # Of each source: the sum of |p| over its paths to the target, and of |p| * (features on p, the source left out).
    weight = adjacency[row].double().abs() * scale[row]
    passed = torch.zeros_like(weight)
    for group in reversed(nodes.groups):
        step = adjacency[group].abs().double() * scale[group, None]
        for part in (slice(0, group.start), slice(nodes.n_features, nodes.n_sources)):
            onward = weight[group] @ step[:, part]
            passed[part] += passed[group] @ step[:, part] + onward
            weight[part] += onward
    tokens = nodes.kind[: nodes.n_sources] == int(NodeKind.TOKEN)
    total = float(weight[tokens].sum())
    if total == 0:
        raise GraphError("no path leads from a token to the target in this graph")
    return float(passed[tokens].sum()) / total


def mean_path_length_definition(
    adjacency: Float[Tensor, "n_rows n_sources"], *, nodes: NodeTable, row: int, totals: Tensor, by: str = "influence"
) -> float:
    """The definition of :func:`mean_path_length`: every path followed, one by one."""
    gain = chain_gain(nodes).abs()
    counted = {int(NodeKind.FEATURE), int(NodeKind.TOKEN)}
    sums = [0.0, 0.0]

    def follow(row: int, weight: float, passed: int) -> None:
        for source in adjacency[row].nonzero()[:, 0].tolist():
            kind = int(nodes.kind[source])
            if kind not in counted:
                continue
            scale = 1.0 / float(totals[row]) if by == "influence" else 1.0
            along = weight * abs(float(adjacency[row, source])) * scale
            if kind == int(NodeKind.TOKEN):
                sums[0], sums[1] = sums[0] + along * passed, sums[1] + along
            else:
                follow(source, along * (1.0 if by == "influence" else float(gain[source])), passed + 1)

    follow(row, 1.0, 0)
    return sums[0] / sums[1]

"""Linear effects through a graph: the effect of every source on one target, and the part that passes some nodes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuit_lens.graph.influence import inverse
from circuit_lens.graph.nodes import NodeTable


def chain_gain(nodes: NodeTable) -> Float[Tensor, "n_features"]:
    """Return 1 / activation of each feature (0 for an activation of 0), in float64.

    ``adjacency[u, t]`` is the change of u when all of t's contribution is added once more. A change of d in t's
    pre-activation changes its activation by d too (an active ReLU or JumpReLU has slope 1), so it adds the share
    d / activation of t's contribution: along s -> t -> u runs ``adjacency[t, s] / activation[t] * adjacency[u, t]``.
    """
    return inverse(nodes.activation[: nodes.n_features])


def total_effect(
    adjacency: Float[Tensor, "n_rows n_sources"],
    *,
    nodes: NodeTable,
    row: int,
    blocked: Bool[Tensor, "n_features"] | None = None,
) -> Float[Tensor, "n_sources"]:
    """Return the linear total effect of each source on one target, with everything frozen stays frozen.

    The sum over all paths through features: T[s] = A[u, s] + sum_t T[t] / activation[t] * A[t, s]. A graph has no
    cycles, so one sweep over the (layer, site) groups from the last to the first gives it; equals
    :func:`total_effect_definition`.

    Args:
        adjacency: edges.
        nodes: its nodes.
        row: adjacency row of the target.
        blocked: features that pass nothing on; their own effect is still returned.

    Returns:
        Change of the target when a source's contribution is added once more, float64, in units of the target.
    """
    f, gain = nodes.n_features, chain_gain(nodes)
    if blocked is not None:
        gain = torch.where(blocked, 0.0, gain)
    total = adjacency[row].to(torch.float64, copy=True)
    for group in reversed(nodes.groups):
        weight = total[group] * gain[group]
        for start, stop in ((0, group.start), (f, nodes.n_sources)):
            total[start:stop] += weight @ adjacency[group, start:stop].double()
    return total


def total_effect_definition(
    adjacency: Float[Tensor, "n_rows n_sources"],
    *,
    nodes: NodeTable,
    row: int,
    blocked: Bool[Tensor, "n_features"] | None = None,
) -> Float[Tensor, "n_sources"]:
    """Return what :func:`total_effect` returns, by the inverse of the matrix over features."""
    f, a = nodes.n_features, adjacency.double()
    gain = chain_gain(nodes)
    if blocked is not None:
        gain = torch.where(blocked, 0.0, gain)
    step = gain[:, None] * a[:f]
    on_features = torch.linalg.solve(torch.eye(f, dtype=torch.float64) - step[:, :f].T, a[row, :f])
    return a[row] + on_features @ step


def total_effect_by_paths(
    adjacency: Float[Tensor, "n_rows n_sources"], *, nodes: NodeTable, row: int, source: int
) -> float:
    """Return one entry of :func:`total_effect` by walking every path: exponential, for small graphs only."""
    total = float(adjacency[row, source])
    for feature in range(nodes.n_features):
        if adjacency[row, feature] != 0 and float(nodes.activation[feature]) != 0:
            onward = float(adjacency[row, feature]) / float(nodes.activation[feature])
            total += onward * total_effect_by_paths(adjacency, nodes=nodes, row=feature, source=source)
    return total

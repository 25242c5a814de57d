"""Random graphs and one graph small enough to compute by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from circuit_lens.graph import AttributionGraph, NodeKind, NodeTable, Section, TopLogits

SITES = ("", "attention", "norm", "resid_mid", "a.0", "m.0", "a.1", "m.1", "a.2", "m.2", "a.3", "m.3")


def random_graph(
    seed: int,
    *,
    n_layers: int = 3,
    n_pos: int = 4,
    per_group: int = 3,
    n_logits: int = 2,
    density: float = 0.6,
    ties: bool = False,
    leaves: bool = True,
) -> AttributionGraph:
    """A random causal graph in float64 with two dictionaries per layer and every kind of node.

    ``ties`` draws edges from {-1, 0, 1}; ``leaves=False`` leaves only features, errors, tokens and logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    features = {
        (layer, site, int(draw(n_pos, (1,))), int(draw(50, (1,))))
        for layer in range(n_layers)
        for site in (4 + 2 * layer, 5 + 2 * layer)
        for _ in range(int(draw(per_group + 1, (1,))))
    }
    columns = torch.tensor(sorted(features), dtype=torch.long).reshape(-1, 4).T
    activation = torch.rand(columns.shape[1], generator=generator, dtype=torch.float64) + 0.5
    grid = [(layer, pos) for layer in range(n_layers) for pos in range(n_pos)]
    layer, pos = torch.tensor(grid, dtype=torch.long).reshape(-1, 2).T
    every = torch.arange(n_pos)
    sections = [
        Section(NodeKind.FEATURE, pos=columns[2], layer=columns[0], index=columns[3], site=columns[1],
                activation=activation, labels=[f"f{i}" for i in range(columns.shape[1])]),
        Section(NodeKind.ERROR, pos=pos, layer=layer, site=5 + 2 * layer),
        Section(NodeKind.TOKEN, pos=every, index=every + 100),
        Section(NodeKind.LOGIT, pos=torch.full((n_logits,), n_pos - 1), layer=n_layers,
                index=torch.arange(n_logits), labels=[f"out{i}" for i in range(n_logits)]),
    ]  # fmt: skip
    if leaves:
        sections += [
            Section(NodeKind.POSITION, pos=every),
            Section(NodeKind.BIAS, pos=pos.repeat_interleave(2), layer=layer.repeat_interleave(2),
                    site=torch.tensor([1, 2]).repeat(len(pos))),
            Section(NodeKind.REST, pos=pos, layer=layer, site=5 + 2 * layer, index=draw(9, (len(pos),))),
            Section(NodeKind.PATCH, pos=torch.tensor([n_pos - 1]), layer=0, site=3),
        ]  # fmt: skip
    nodes = NodeTable.build(sections, sites=SITES)
    edges = torch.randn(nodes.n_rows, nodes.n_sources, generator=generator, dtype=torch.float64)
    if ties:
        edges = edges.sign()
    edges *= torch.rand(edges.shape, generator=generator) < density
    rank = torch.full((len(nodes),), -1)
    for number, group in enumerate(nodes.groups):
        rank[group] = number
    rank[nodes.n_sources :] = len(nodes.groups)
    edges *= rank[nodes.rows][:, None] > rank[None, : nodes.n_sources]
    edges *= nodes.pos[nodes.rows][:, None] >= nodes.pos[None, : nodes.n_sources]
    edges[: nodes.n_features] *= torch.rand(nodes.n_features, 1, generator=generator) < 0.9  # some empty rows
    return make_graph(nodes, edges, n_pos=n_pos, n_layers=n_layers)


def make_graph(nodes: NodeTable, edges: Tensor, *, n_pos: int, n_layers: int) -> AttributionGraph:
    """A graph with these edges, conserving, with logit weights 0.6, 0.3, 0.15, ..."""
    weight = 0.6 * 0.5 ** torch.arange(nodes.n_logits, dtype=edges.dtype)
    bias = torch.linspace(-0.5, 0.5, nodes.n_rows, dtype=edges.dtype)
    names = ("<bos>", " the", " capital", " Dallas", " is", " of", " to", " in")
    return AttributionGraph(
        nodes=nodes, adjacency=edges, target_bias=bias, target_value=edges.sum(1) + bias, logit_weight=weight,
        tokens=torch.arange(n_pos), token_strings=tuple(names[i % 8] for i in range(n_pos)), prompt=None,
        top_logits=TopLogits(n_pos - 1, torch.tensor([0, 1]), ("out0", "out1"), torch.tensor([2.0, 1.0]),
                             torch.tensor([0.7, 0.2])),
        manifest={"model": "random", "versions": {"circuit_lens": "0"}}, n_layers=n_layers,
    )  # fmt: skip


def hand_graph() -> AttributionGraph:
    """Tokens A, B; features f0 (layer 0, activation 2), f1 (layer 1, activation 4); an error; a bias; logits x, y.

    f0 <- A 2, bias 6. f1 <- f0 1, B -1, error 2. x <- f1 3, f0 1. y <- B 4.
    """
    nodes = NodeTable.build(
        [
            Section(NodeKind.FEATURE, pos=torch.tensor([0, 1]), layer=torch.tensor([0, 1]), index=torch.tensor([7, 9]),
                    site=torch.tensor([1, 2]), activation=torch.tensor([2.0, 4.0], dtype=torch.float64),
                    labels=("first", "second")),
            Section(NodeKind.ERROR, pos=torch.tensor([1]), layer=0, site=1),
            Section(NodeKind.TOKEN, pos=torch.tensor([0, 1]), index=torch.tensor([11, 12])),
            Section(NodeKind.BIAS, pos=torch.tensor([0]), layer=0, site=3),
            Section(NodeKind.LOGIT, pos=torch.tensor([1, 1]), layer=2, index=torch.tensor([3, 4]), labels=("x", "y")),
        ],
        sites=("", "m.0", "m.1", "attention"),
    )  # fmt: skip
    edges = torch.tensor(
        #  f0   f1  err    A    B  bias
        [
            [0.0, 0.0, 0.0, 2.0, 0.0, 6.0],
            [1.0, 0.0, 2.0, 0.0, -1.0, 0.0],
            [1.0, 3.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 4.0, 0.0],
        ],
        dtype=torch.float64,
    )
    return make_graph(nodes, edges, n_pos=2, n_layers=2)

"""The attribution graph of one prompt: immutable data that knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from circuit_lens.errors import GraphError
from circuit_lens.graph.nodes import NodeTable


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


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Which sources caused which targets, on one prompt.

    ``adjacency[t, s]`` is the change of target t's pre-activation (or demeaned logit, before any soft-cap) when source
    s's contribution is added once more in the frozen model (Ameisen et al. 2025, Circuit Tracing, "Attribution
    graphs"). With all kinds of sources a row and the target's own bias sum to the target's value.

    Attributes:
        nodes: the nodes; sources are columns, features and logits are rows.
        adjacency: rows are targets (features, then logits), columns are sources (all nodes but the logits).
        target_bias: what belongs to the target alone (encoder bias, the read norm's bias, demeaned unembedding bias).
        target_value: pre-activation of a feature, demeaned logit or metric value of a logit node.
        logit_weight: weight of each logit node at the start of influence: its probability (1 for other targets).
        tokens, token_strings, prompt: the prompt; ``prompt`` is None where only tokens were given.
        top_logits: the model's real output.
        manifest: versions, hashes, settings; JSON-able.
        n_layers: number of layers of the model; the layer of logit nodes.
        pruning: what pruning took away; None for a full graph.
        expander: not saved; computes the rows of a node that has none. Given by the engine.

    Raises:
        GraphError: shapes that do not fit, edges against the order of the model, NaN or infinity.
    """

    nodes: NodeTable
    adjacency: Float[Tensor, "n_rows n_sources"]
    target_bias: Float[Tensor, "n_rows"]
    target_value: Float[Tensor, "n_rows"]
    logit_weight: Float[Tensor, "n_logits"]
    tokens: Int[Tensor, "n_pos"]
    token_strings: tuple[str, ...]
    prompt: str | None
    top_logits: TopLogits
    manifest: dict[str, Any]
    n_layers: int
    pruning: Pruning | None = None
    expander: Callable[[AttributionGraph, int], AttributionGraph] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = self.nodes
        shapes = {
            "adjacency": (self.adjacency.shape, (n.n_rows, n.n_sources)),
            "target_bias": (self.target_bias.shape, (n.n_rows,)),
            "target_value": (self.target_value.shape, (n.n_rows,)),
            "logit_weight": (self.logit_weight.shape, (n.n_logits,)),
            "tokens": (self.tokens.shape, (len(self.token_strings),)),
        }
        for name, (given, wanted) in shapes.items():
            if tuple(given) != wanted:
                raise GraphError(f"{name} must have shape {wanted} for these nodes; given {tuple(given)}.")
        if n.n_logits == 0:
            raise GraphError("A graph needs at least one logit (target) node.")
        if len(n) and not (int(n.pos.min()) >= 0 and int(n.pos.max()) < len(self.token_strings)):
            raise GraphError(
                f"Node positions must be 0 to {len(self.token_strings) - 1}; given "
                f"{int(n.pos.min())} to {int(n.pos.max())}."
            )
        for name in ("adjacency", "target_bias", "target_value", "logit_weight"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise GraphError(f"{name} holds NaN or infinity: the activations or weights it was computed from do.")
        if not bool(torch.isfinite(n.activation[: n.n_features]).all()):
            raise GraphError("A feature's activation is NaN or infinite.")
        if bool((self.logit_weight < 0).any()):
            raise GraphError("logit_weight must not be negative.")
        for group in n.groups:
            if bool(self.adjacency[group, group.start : n.n_features].any()):
                raise GraphError(
                    "An edge goes against the order of the model: a feature has an input from a feature "
                    "of its own (layer, site) or of a later one. List `sites` in the order of computing."
                )

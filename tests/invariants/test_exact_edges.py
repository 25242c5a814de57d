"""Contract 1: an edge is what its target moves by when its source is added once more in the frozen model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Node, NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases
from tests.invariants.frozen_by_hand import FrozenByHand

# Input hooks and kinds of transcoder, each of them on every class.
ROUNDS = [
    ("transcoder", "ln2.hook_normalized"),
    ("jumprelu", "hook_mlp_in"),
    ("skip", "mlp.hook_in"),
    ("jumprelu_skip", "hook_resid_mid"),
    ("skip", "ln2.hook_normalized"),
]


def added(hand: FrozenByHand, node: Node, patch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the vectors by hook point that are the source's contribution, found without the engine."""
    layer, pos, out = node.layer, node.pos, {}
    blank = torch.zeros_like(hand.clean["blocks.0.hook_resid_pre"])

    def at(name: str, vectors: Tensor) -> None:
        out[name] = blank.clone()
        out[name][pos] = vectors[pos] if vectors.ndim == 2 else vectors

    mlp, sae = f"blocks.{layer}.hook_mlp_out", hand.saes.get(layer)
    match node.kind:
        case NodeKind.TOKEN:
            at("hook_embed", hand.clean["hook_embed"])
        case NodeKind.POSITION:
            at("hook_pos_embed", hand.clean["hook_pos_embed"].expand_as(blank))
        case NodeKind.FEATURE:
            at(mlp, node.activation * sae.W_dec[node.index])
        case NodeKind.ERROR:
            made = 0.0 if sae is None else sae(hand.read(layer, hand.clean, hand.clean_norms))
            at(mlp, hand.clean[mlp] - made)
        case NodeKind.PATCH:
            at(next(iter(patch)), next(iter(patch.values())))
        case NodeKind.BIAS if node.site == "dictionary":
            at(mlp, sae.b_dec)
        case NodeKind.BIAS:
            at(f"blocks.{layer}.hook_attn_out", hand.attention_constant(layer, f"blocks.{layer}.hook_resid_pre"))
            if getattr(sae, "W_skip", None) is not None and sae.cfg.metadata.hook_name.endswith("mlp.hook_in"):
                ln2 = hand.model.blocks[layer].ln2
                bias = getattr(ln2, "b", None)
                if bias is not None:
                    at(mlp, bias @ sae.W_skip.T)
    return out


def values(hand: FrozenByHand, graph: AttributionGraph, edits: dict[str, Tensor]) -> Tensor:
    """Return the value of every target of the graph."""
    pre, logits = hand.run(edits)
    table = torch.stack([torch.zeros(len(logits), builders.D_VOCAB, dtype=logits.dtype)] * (len(hand.model.blocks) + 1))
    for layer, value in pre.items():
        table[layer, :, : value.shape[1]] = value
    table[-1] = logits
    rows, n = graph.nodes.rows, graph.nodes
    return table[n.layer[rows].long(), n.pos[rows].long(), n.index[rows]]


def column(graph: AttributionGraph, node: Node) -> Tensor:
    """Return a source's column; what attention adds on its own is one contribution, of biases and norms."""
    if node.kind is not NodeKind.BIAS or node.site == "dictionary":
        return graph.adjacency[:, node.id]
    ids = [
        n.id
        for n in (graph.node(i) for i in cases.ids(graph, NodeKind.BIAS))
        if (n.layer, n.pos) == (node.layer, node.pos) and n.site != "dictionary"
    ]
    return graph.adjacency[:, ids].sum(1)


def sample(graph: AttributionGraph, seed: int) -> list[Node]:
    """Return some sources of every kind, and those that are strongest."""
    rng, chosen = random.Random(seed), []
    for kind in NodeKind:
        ids = list(cases.ids(graph, kind)) if kind is not NodeKind.LOGIT else []
        chosen += rng.sample(ids, min(3 if kind in (NodeKind.FEATURE, NodeKind.BIAS) else 1, len(ids)))
    strongest = graph.adjacency.abs().sum(0).topk(2).indices.tolist()
    return [graph.node(i) for i in dict.fromkeys([*chosen, *strongest])]


@torch.no_grad()
def worst(hand: FrozenByHand, graph: AttributionGraph, patch: dict[str, Tensor], seed: int) -> float:
    """Return the largest difference of a column from what is measured, relative to the largest entries of its rows."""
    scale, largest, before = graph.adjacency.abs().amax(1), 0.0, values(hand, graph, {})
    for node in sample(graph, seed):
        measured = values(hand, graph, added(hand, node, patch)) - before
        largest = max(largest, float(((measured - column(graph, node)).abs() / scale).max()))
    return largest


def setting(name: Any, kind: Any, round: int) -> tuple[ReplacementModel, list[Any], Tensor]:
    transcoder, hook_in = ROUNDS[round]
    if hook_in not in cases.hooks_in(name):
        hook_in = "hook_mlp_in"
    rm = cases.pair(name, kind, transcoder, hook_in)
    return rm, [d.module for d in rm.dictionaries], cases.tokens(7, seed=round)


@pytest.mark.parametrize(
    ("name", "kind", "round"),
    [(n, k, r) for n, k in cases.CLASSES for r in range(len(ROUNDS)) if k == "hooked" or r == 2],
)
def test_adding_a_source_once_more_moves_every_target_by_its_column(name, kind, round):
    rm, saes, tokens = setting(name, kind, round)
    graph = cases.attribute(rm, tokens, [5, 17, 40])
    hand = FrozenByHand(rm.model, saes, tokens)
    assert worst(hand, graph, {}, seed=round) < cases.rounding(name, kind)


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_one_live_norm_breaks_the_edges(name, kind):
    """Negative control: with one denominator that follows the stream, columns are not what is measured."""
    rm, saes, tokens = setting(name, kind, 0)
    graph = cases.attribute(rm, tokens, [5, 17, 40])
    for thaw in ("blocks.1.ln2.hook_scale", "ln_final.hook_scale"):
        hand = FrozenByHand(rm.model, saes, tokens, thaw=thaw)
        assert len(hand.names) == len(FrozenByHand(rm.model, saes, tokens).names) - 1
        assert worst(hand, graph, {}, seed=0) > 1e-3


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_attn_out", "hook_resid_post"])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "hooked")])
def test_a_patch_is_a_source_like_any_other(name, kind, site):
    rm, saes, tokens = setting(name, kind, 0)
    at = f"blocks.1.{site}"
    vectors = torch.zeros(len(tokens), builders.D_MODEL, dtype=torch.float64)
    vectors[3] = 3 * torch.randn(builders.D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph = cases.attribute(rm, tokens, [5, 17], fwd_hooks=[(at, lambda v, hook: v + vectors)])
    assert [graph.node(i).pos for i in cases.ids(graph, NodeKind.PATCH)] == [3]
    hand = FrozenByHand(rm.model, saes, tokens, permanent={at: vectors})
    assert worst(hand, graph, {at: vectors}, seed=0) < cases.rounding(name, kind)
    assert worst(hand, graph, {at: 1.01 * vectors}, seed=0) > 1e-4  # negative control

"""Cross-layer transcoders: exact edges, conserving rows, interventions and hook points, by independent means."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature, Node, NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests.invariants import cases
from tests.invariants import cross_layer_builder as made_of
from tests.invariants.frozen_by_hand import FrozenByHand
from tests.invariants.test_exact_edges import column, sample, values

ROUNDS = [
    ("gpt2", "hooked", "relu", "ln2.hook_normalized", False),
    ("gpt2", "bridge", "topk", "hook_resid_mid", True),
    ("llama", "hooked", "topk", "mlp.hook_in", True),
    ("llama", "bridge", "jumprelu", "ln2.hook_normalized", False),
    ("gemma2", "hooked", "jumprelu", "hook_mlp_in", True),
    ("gemma2", "bridge", "relu", "mlp.hook_in", True),
]
TOKENS = cases.tokens(7, seed=4)


@functools.cache
def pair(name: Any, kind: Any, activation: str, hook_in: str, skip: bool) -> tuple[ReplacementModel, dict[str, Any]]:
    """Return a shared model with a cross-layer transcoder on it, and the transcoder's weights."""
    model = cases.model(name, kind)
    made = made_of.fitted(model, activation=activation, hook_in=hook_in, skip=skip)
    return ReplacementModel(model, list(made_of.clt(made).dictionaries)), made


def contribution(
    hand: FrozenByHand, made: dict[str, Any], node: Node, *, own_layer_only: bool = False
) -> dict[str, Tensor]:
    """Return the vectors by hook point that are the source's contribution, found without the engine."""
    layer, pos, n_layers = node.layer, node.pos, len(made["W_enc"])
    blank = torch.zeros_like(hand.clean["blocks.0.hook_resid_pre"])
    out: dict[str, Tensor] = {}

    def at(name: str, vectors: Tensor) -> None:
        out[name] = blank.clone()
        out[name][pos] = vectors[pos] if vectors.ndim == 2 else vectors

    inputs = [hand.read(i, hand.clean, hand.clean_norms) for i in range(n_layers)]
    match node.kind:
        case NodeKind.TOKEN:
            at("hook_embed", hand.clean["hook_embed"])
        case NodeKind.POSITION:
            at("hook_pos_embed", hand.clean["hook_pos_embed"].expand_as(blank))
        case NodeKind.FEATURE:
            act = made_of.acts_by_hand(made, layer, inputs[layer])[pos, node.index]
            for o in range(1 if own_layer_only else n_layers - layer):
                at(f"blocks.{layer + o}.hook_mlp_out", act * made["W_dec"][layer][node.index, o])
        case NodeKind.ERROR:
            real = hand.clean[f"blocks.{layer}.hook_mlp_out"]
            at(f"blocks.{layer}.hook_mlp_out", real - made_of.outputs_by_hand(made, inputs)[layer])
        case NodeKind.BIAS if node.site == "dictionary":
            at(f"blocks.{layer}.hook_mlp_out", made["b_dec"][layer])
        case NodeKind.BIAS:
            at(f"blocks.{layer}.hook_attn_out", hand.attention_constant(layer, f"blocks.{layer}.hook_resid_pre"))
            bias = getattr(hand.model.blocks[layer].ln2, "b", None)
            if "W_skip" in made and made["hook_in"][layer].endswith("mlp.hook_in") and bias is not None:
                at(f"blocks.{layer}.hook_mlp_out", bias @ made["W_skip"][layer])
    return out


@torch.no_grad()
def worst(
    hand: FrozenByHand, made: dict[str, Any], graph: AttributionGraph, nodes: list[Node], **options: Any
) -> float:
    """Return the largest difference of a column from what is measured, relative to the largest entries of its rows."""
    scale, largest, before = graph.adjacency.abs().amax(1).clamp_min(1e-300), 0.0, values(hand, graph, {})
    for node in nodes:
        measured = values(hand, graph, contribution(hand, made, node, **options)) - before
        largest = max(largest, float(((measured - column(graph, node)).abs() / scale).max()))
    return largest


@pytest.mark.parametrize("case", ROUNDS, ids=lambda c: "-".join(map(str, c)))
def test_adding_a_source_once_more_moves_every_target_by_its_column(case):
    rm, made = pair(*case)
    graph = cases.attribute(rm, TOKENS, [5, 17, 40])
    hand = FrozenByHand(rm.model, made_of.as_modules(made), TOKENS)
    assert {graph.node(i).layer for i in cases.ids(graph, NodeKind.FEATURE)} == {0, 1, 2}
    assert worst(hand, made, graph, sample(graph, 0)) < cases.rounding(*case[:2])
    first = [graph.node(i) for i in cases.ids(graph, NodeKind.FEATURE) if graph.node(i).layer == 0][:5]
    assert worst(hand, made, graph, first) < cases.rounding(*case[:2])
    # Negative control: a feature that wrote its own layer only would move other targets.
    assert worst(hand, made, graph, first, own_layer_only=True) > 1e-3


@pytest.mark.parametrize(
    ("case", "setting"),
    [(c, {}) for c in ROUNDS]
    + [(c, {"norms": "linear"}) for c in ROUNDS[::2]]
    + [(ROUNDS[4], {"engine": "reference"})],
    ids=str,
)
def test_rows_and_own_bias_sum_to_the_pre_activation(case, setting):
    rm, made = pair(*case)
    graph = cases.attribute(rm, TOKENS, [5, 17], **setting)
    assert float(cases.gaps(graph).max()) < 1e-10
    hand = FrozenByHand(rm.model, made_of.as_modules(made), TOKENS)
    active = [
        (layer, pos, index)
        for layer in range(3)
        for pos, index in made_of.acts_by_hand(made, layer, hand.read(layer, hand.clean, hand.clean_norms))
        .nonzero()
        .tolist()
    ]
    found = [graph.node(i) for i in cases.ids(graph, NodeKind.FEATURE)]
    assert [(n.layer, n.pos, n.index) for n in found] == active
    if made["activation"] == "topk":
        assert max(sum(key[:2] == (1, pos) for key in active) for pos in range(len(TOKENS))) == made["k"]
    # Negative control: the biases and what features write are part of the sum.
    for part in (graph.nodes.slice_of(NodeKind.FEATURE), graph.nodes.slice_of(NodeKind.BIAS)):
        left = graph.adjacency.clone()
        left[:, part] = 0
        assert float((left.sum(1) + graph.target_bias - graph.target_value).abs().max()) > 1e-3


@pytest.mark.parametrize(("activation", "skip"), [("jumprelu", True), ("topk", False)])
def test_rows_conserve_where_features_write_before_the_post_norm(activation, skip):
    model = cases.model("gemma2")
    made = made_of.fitted(model, activation=activation, hook_in="mlp.hook_in", hook_out="mlp.hook_out", skip=skip)
    rm = ReplacementModel(model, list(made_of.clt(made).dictionaries))
    graph = cases.attribute(rm, TOKENS, [5])
    assert float(cases.gaps(graph).max()) < 1e-10
    after = cases.attribute(
        ReplacementModel(
            model,
            list(made_of.clt(made | {"hook_out": [f"blocks.{i}.hook_mlp_out" for i in range(3)]}).dictionaries),
        ),
        TOKENS,
        [5],
    )
    assert cases.difference(graph, after) > 1e-3  # control: the norm between the two places matters


def test_rows_conserve_when_no_feature_is_active():
    model = cases.model("gpt2")
    made = made_of.weights(skip=True)
    made["b_enc"] = [b - 1e6 for b in made["b_enc"]]
    graph = cases.attribute(ReplacementModel(model, list(made_of.clt(made).dictionaries)), TOKENS, [5])
    assert graph.nodes.n_features == 0
    assert float(cases.gaps(graph).max()) < 1e-10


# ------------------------------------------------------------------------------------------------------ interventions


@pytest.mark.parametrize("case", ROUNDS[::2], ids=lambda c: "-".join(map(str, c)))
def test_under_freeze_all_doubling_a_feature_moves_every_target_by_its_column(case):
    rm, _ = pair(*case)
    graph = cases.attribute(rm, TOKENS, [5, 17, 40])
    rows = graph.nodes.rows
    layers, positions, index = (t[rows].tolist() for t in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    sites = [d.site for d in rm.dictionaries]

    def targets(run: Any) -> Tensor:
        logits = run.logits - run.logits.mean(-1, keepdim=True)
        table = zip(layers, positions, index, strict=True)
        return torch.stack([logits[p, i] if at == 3 else run.pre_acts[sites[at]][p, i] for at, p, i in table])

    clean = rm.intervene(TOKENS, [], freeze="all")
    chosen = [n for n in sample(graph, 1) if n.kind is NodeKind.FEATURE]
    largest = 0.0
    assert len(chosen) >= 3
    for node in chosen:
        run = rm.intervene(TOKENS, [Feature(node.layer, node.pos, node.index).scale(2.0)], freeze="all")
        moved = targets(run) - targets(clean)
        want = column(graph, node)
        # Gemma's soft-cap is behind the logits that the graph means: there, features only.
        keep = torch.tensor([at != 3 or case[0] != "gemma2" for at in layers])
        scale = graph.adjacency.abs().amax(1).clamp_min(1e-300)
        assert float(((moved - want).abs() / scale)[keep].max()) < 1e-9
        largest = max(largest, float((moved.abs() / scale)[keep].max()))
    assert largest > 1e-3  # control: something moved


@pytest.mark.parametrize("case", ROUNDS, ids=lambda c: "-".join(map(str, c)))
def test_an_intervention_is_an_edit_of_attached_features(case):
    rm, _ = pair(*case)
    recording = rm.record(TOKENS)
    wanted: dict[tuple[int, int, int], float] = {}
    for layer, d in enumerate(rm.dictionaries):
        pos, index = recording.acts(d).nonzero()[2].tolist()
        wanted[layer, pos, index] = -0.5
        wanted[layer, 3, int((recording.acts(d)[3] == 0).nonzero()[0])] = 0.7

    def put(acts: Tensor, hook: Any, layer: int) -> Tensor:
        for (at, pos, index), value in wanted.items():
            if at == layer:
                acts[:, pos, index] = value
        return acts

    hooks = [(f"{d.site}.features", functools.partial(put, layer=i)) for i, d in enumerate(rm.dictionaries)]
    with torch.no_grad(), rm.attached() as model:
        plain = model(TOKENS[None])[0]
        edited = model.run_with_hooks(TOKENS[None], fwd_hooks=hooks)[0]
    with torch.no_grad():
        real = rm.model(TOKENS[None])[0]
    limit = cases.rounding(*case[:2])
    assert float((plain - real).abs().max() / real.abs().max()) < limit
    run = rm.intervene(TOKENS, [Feature(*key).set(value) for key, value in wanted.items()])
    assert float((run.logits - edited).abs().max() / edited.abs().max()) < limit
    assert float((real - edited).abs().max()) > 1e-3  # control


def test_without_the_error_the_reconstruction_stands_for_every_mlp():
    rm, made = pair(*ROUNDS[2])
    with torch.no_grad(), rm.attached(error=False) as model:
        _, cache = model.run_with_cache(TOKENS[None])
    inputs = [cache[f"blocks.{i}.ln2.hook_normalized"][0] * rm.model.blocks[i].ln2.w for i in range(3)]
    for layer, want in enumerate(made_of.outputs_by_hand(made, inputs)):
        out = cache[f"blocks.{layer}.hook_mlp_out"][0]
        assert torch.allclose(out, want, rtol=0, atol=1e-10 * float(want.abs().max()))
        assert not torch.allclose(out - made["b_dec"][layer], want, rtol=0, atol=1e-3)  # control: one bias per output


@pytest.mark.parametrize("active", [True, False])
def test_the_gradient_at_a_feature_is_the_effect_of_moving_it_active_or_not(active):
    rm, _ = pair(*ROUNDS[1])
    site, pos = "blocks.0.hook_mlp_out", 2
    grads: list[Tensor] = []
    see = (f"{site}.features", lambda grad, hook: grads.append(grad[0].clone()))
    with rm.attached() as model, model.hooks(bwd_hooks=[see]):
        model(TOKENS[None])[0, -1, 7].backward()
    features = rm.record(TOKENS).acts(rm.dictionaries[0])[pos]
    index = int(((features > 0) == active).nonzero()[0])

    def at(step: float) -> float:
        def move(acts: Tensor, hook: Any) -> Tensor:
            acts[:, pos, index] += step
            return acts

        with torch.no_grad(), rm.attached() as model:
            return float(model.run_with_hooks(TOKENS[None], fwd_hooks=[(f"{site}.features", move)])[0, -1, 7])

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    assert abs(float(grads[0][pos, index]) - slope) < 1e-4 * abs(slope)


def test_the_users_model_comes_back_untouched(untouched):
    rm, made = pair(*ROUNDS[0])
    cases.attribute(rm, TOKENS, [5])
    with untouched(rm.model):
        cases.attribute(ReplacementModel(rm.model, list(made_of.clt(made).dictionaries)), TOKENS, [5])
        rm.intervene(TOKENS, [Feature(0, 2, 1).set(1.0)])


@pytest.mark.parametrize(("case", "layout"), [(ROUNDS[0], "saelens"), (ROUNDS[4], "circuit-tracer")], ids=str)
def test_a_graph_from_the_disk_is_the_graph_from_memory_bit_for_bit(case, layout, tmp_path):
    rm, made = pair(*case)
    clt = made_of.clt(made)
    clt.save(tmp_path / "clt", layout)
    lazy = CrossLayerTranscoder.load(tmp_path / "clt", lazy=True)
    graphs = [cases.attribute(rm, TOKENS, [5, 17]) for rm in (rm, ReplacementModel(rm.model, list(lazy.dictionaries)))]
    assert cases.names(graphs[0]) == cases.names(graphs[1])
    assert torch.equal(graphs[0].adjacency, graphs[1].adjacency)
    assert torch.equal(graphs[0].target_bias, graphs[1].target_bias)
    assert graphs[0].manifest["weights"] == graphs[1].manifest["weights"]
    other = made_of.clt(made | {"b_dec": [b * 1.01 for b in made["b_dec"]]})
    graph = cases.attribute(ReplacementModel(rm.model, list(other.dictionaries)), TOKENS, [5, 17])
    assert not torch.equal(graphs[0].adjacency, graph.adjacency)  # control

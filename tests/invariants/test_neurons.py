"""A model's own neurons are transcoders without error: the exactness of the whole engine, on every class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.attribution.targets import logit_difference
from circuit_lens.dictionaries.neurons import NeuronDictionary, neurons
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import Feature, NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases
from tests.invariants.frozen_by_hand import FrozenByHand
from tests.invariants.test_attached import untouched

N = 5
TARGETS = [5, 17, logit_difference(9, 40, pos=2)]
GATED = [(name, kind) for name, kind in cases.CLASSES if name in ("llama", "qwen3", "gemma2")]
SOME = [("gpt2", "hooked"), ("pythia", "bridge"), ("llama", "bridge"), ("qwen3", "hooked"), ("gemma2", "hooked")]


@functools.cache
def pair(name: Any, kind: Any, gate: Any = "frozen") -> ReplacementModel:
    model = cases.model(name, kind)
    return ReplacementModel(model, neurons(model, gate=gate))


@functools.cache
def graph_of(name: Any, kind: Any) -> AttributionGraph:
    return cases.attribute(pair(name, kind), cases.tokens(N), TARGETS)


def size_of_errors(graph: AttributionGraph) -> float:
    """Return the largest entry of any error, relative to its row's largest."""
    errors = graph.adjacency[:, list(cases.ids(graph, NodeKind.ERROR))].abs().amax(1)
    return float((errors / graph.adjacency.abs().amax(1)).max())


def replaced(name: Any, kind: Any, change: Callable[[Any], None]) -> ReplacementModel:
    """Return the shared model with the neurons of another one, in which something was changed."""
    other = builders.build(name, kind)
    with torch.no_grad():
        change(other)
    return ReplacementModel(cases.model(name, kind), neurons(other))


# ------------------------------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_no_error_is_left_and_the_replacement_is_the_model(name, kind):
    rm, graph = pair(name, kind), graph_of(name, kind)
    limit = cases.rounding(name, kind)
    assert graph.nodes.n_features == 3 * N * builders.D_MLP  # a neuron's value is zero nowhere
    assert graph.nodes.count(NodeKind.ERROR) == 3 * N
    assert size_of_errors(graph) < limit
    assert graph.replacement_score == pytest.approx(1, abs=limit)
    assert graph.completeness_score == pytest.approx(1, abs=limit)
    assert all(abs(share - 1) < limit for share in cases.local(rm, cases.tokens(N)).explained.values())


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_neurons_of_other_weights_leave_errors(name, kind):
    """Negative control: one column of one layer's W_in, by a tenth."""

    def change(model: Any) -> None:
        model.blocks[1].mlp.W_in[:, 7] *= 1.1

    graph = cases.attribute(replaced(name, kind, change), cases.tokens(N), TARGETS)
    assert size_of_errors(graph) > 1e-4
    assert graph.replacement_score < 1 - 1e-5


@pytest.mark.parametrize(("name", "kind"), [case for case in SOME if case in GATED])
def test_a_gate_of_another_place_leaves_errors(name, kind):
    """Negative control: a gate of the neighbouring position is no gate of this one."""

    class Misplaced(NeuronDictionary):
        def gate_acts(self, x: Tensor) -> Tensor:
            return super().gate_acts(x.roll(1, -2))

    model = cases.model(name, kind)
    dictionary = NeuronDictionary(model, 1)
    dictionary.__class__ = Misplaced
    graph = cases.attribute(ReplacementModel(model, [*neurons(model, layers=[0, 2]), dictionary]), cases.tokens(N), 5)
    assert size_of_errors(graph) > 1e-2
    assert graph.replacement_score < 0.99


@pytest.mark.parametrize(
    ("name", "kind", "engine"),
    [*((*case, "fast") for case in cases.CLASSES), *((*case, "reference") for case in SOME[::2])],
)
def test_rows_and_own_bias_sum_to_pre_activations(name, kind, engine):
    if engine == "fast":
        graph = graph_of(name, kind)
    else:
        graph = cases.attribute(pair(name, kind), cases.tokens(N), TARGETS, engine=engine, max_features=10)
    assert float(cases.gaps(graph).max()) < 1e-10
    left = graph.adjacency.clone()
    left[:, 3] = 0  # negative control: one neuron left out
    assert float((left.sum(1) + graph.target_bias - graph.target_value).abs().max()) > 1e-4


class NeuronsByHand(FrozenByHand):
    """A frozen model whose neurons are read and changed at TransformerLens' hook points; no weight is looked at."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        gated = bool(model.cfg.gated_mlp)
        layers = range(model.cfg.n_layers)
        self.pre = [f"blocks.{i}.mlp.{'hook_pre_linear' if gated else 'hook_pre'}" for i in layers]
        self.post = [f"blocks.{i}.mlp.hook_post" for i in layers]
        self.out = [f"blocks.{i}.hook_mlp_out" for i in layers]
        super().__init__(model, [], tokens)

    def _kept(self) -> list[str]:
        return list(dict.fromkeys([*super()._kept(), *self.pre, *self.post, *self.out]))

    def values(self, edits: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return every layer's pre-activations, and the demeaned logits."""
        seen = self._run(dict(edits), hold=True)
        logits = seen["unembed.hook_out"]
        return [seen[name] for name in self.pre], logits - logits.mean(-1, keepdim=True)

    @functools.cached_property
    def before(self) -> tuple[list[Tensor], Tensor]:
        """The values with nothing added."""
        return self.values({})

    def contribution(self, layer: int, pos: int, index: int) -> Tensor:
        """Return what a neuron adds to the stream: what its layer's output loses when it is zeroed."""
        held, gone = self.names, torch.zeros_like(self.clean[self.post[layer]])
        gone[pos, index] = -self.clean[self.post[layer]][pos, index]
        try:
            self.names = [name for name in held if not name.endswith("hook_mlp_out")]
            outputs = [self._run(edit, hold=True)[self.out[layer]] for edit in ({}, {self.post[layer]: gone})]
        finally:
            self.names = held
        return outputs[0] - outputs[1]


def moved_by(hand: NeuronsByHand, graph: AttributionGraph, edits: dict[str, Tensor]) -> Tensor:
    """Return the change of every target of the graph."""
    (pre, logits), (pre_before, logits_before) = hand.values(edits), hand.before
    changes = torch.stack([a - b for a, b in zip(pre, pre_before, strict=True)])
    neuron, logit = places(graph), logits - logits_before
    others = (graph.node(i) for i in graph.nodes.rows.tolist()[graph.nodes.n_features :])
    wanted = [logit[2, 9] - logit[2, 40] if node.pos == 2 else logit[node.pos, node.index] for node in others]
    return torch.cat([changes[neuron], torch.stack(wanted)])


def places(graph: AttributionGraph) -> tuple[Tensor, Tensor, Tensor]:
    """Return layer, position and index of each neuron of the graph."""
    n = graph.nodes.n_features
    layer, pos, index = (column[:n].long() for column in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    return layer, pos, index


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_a_neuron_added_once_more_moves_every_target_by_its_column(name, kind):
    graph = graph_of(name, kind)
    hand = NeuronsByHand(cases.model(name, kind), cases.tokens(N))
    scale, limit = graph.adjacency.abs().amax(1), cases.rounding(name, kind)
    strongest = graph.adjacency[:, : graph.nodes.n_features].abs().sum(0).topk(2).indices.tolist()
    for i in [*strongest, 100, 3 * graph.nodes.n_features // 5]:
        node = graph.node(i)
        vector = hand.contribution(node.layer, node.pos, node.index)
        moved = moved_by(hand, graph, {hand.out[node.layer]: vector})
        assert float(((moved - graph.adjacency[:, i]).abs() / scale).max()) < limit
        assert float(((1.01 * moved - graph.adjacency[:, i]).abs() / scale).max()) > limit  # negative control
    token = next(graph.node(i) for i in cases.ids(graph, NodeKind.TOKEN) if graph.node(i).pos == 1)
    vector = torch.zeros_like(hand.clean["hook_embed"])
    vector[1] = hand.clean["hook_embed"][1]
    moved = moved_by(hand, graph, {"hook_embed": vector})
    assert float(((moved - graph.adjacency[:, token.id]).abs() / scale).max()) < limit


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_fewer_nodes_have_the_same_rows_and_their_rest_columns_conserve(name, kind):
    full = graph_of(name, kind)
    small = cases.attribute(pair(name, kind), cases.tokens(N), TARGETS, max_features=60, rerank_every=20)
    at = {full.nodes.name(i): i for i in range(len(full.nodes))}
    kept = [at[small.nodes.name(i)] for i in range(small.nodes.n_features)]
    rows = [full.nodes.row_of(at[small.nodes.name(i)]) for i in small.nodes.rows.tolist()]
    scale = full.adjacency[rows].abs().amax(1, keepdim=True)
    same = (small.adjacency[:, :60] - full.adjacency[rows][:, kept]).abs() / scale
    assert float(same.max()) < 1e-12
    assert float(cases.gaps(small).max()) < 1e-10
    layer, pos = full.nodes.layer, full.nodes.pos
    left_out = torch.ones(full.nodes.n_features, dtype=torch.bool)
    left_out[kept] = False
    for i in cases.ids(small, NodeKind.REST):
        node = small.node(i)
        here = left_out & (layer[: len(left_out)] == node.layer) & (pos[: len(left_out)] == node.pos)
        summed = full.adjacency[rows][:, : len(left_out)][:, here].sum(1)
        assert int(here.sum()) == node.index
        assert float(((small.adjacency[:, i] - summed).abs() / scale[:, 0]).max()) < 1e-12
    # Negative control: rest columns hold something.
    assert float(small.adjacency[:, list(cases.ids(small, NodeKind.REST))].abs().max()) > 1e-3


# ----------------------------------------------------------------------------------------------------- interventions


def gap(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_a_neuron_set_to_zero_is_that_neuron_ablated_by_a_hook(name, kind):
    rm, tokens = pair(name, kind), cases.tokens(N)
    model, limit = rm.model, cases.rounding(name, kind)
    with torch.no_grad():
        clean = model(tokens[None])[0]
    for layer, pos, index in ((0, 2, 5), (2, N - 1, 63)):

        def zero(value: Tensor, hook: Any, pos: int = pos, index: int = index) -> Tensor:
            value = value.clone()
            value[:, pos, index] = 0
            return value

        with torch.no_grad():
            ablated = model.run_with_hooks(tokens[None], fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", zero)])[0]
        run, other = (rm.intervene(tokens, Feature(layer, pos, i).set(0.0)) for i in (index, index - 1))
        assert gap(run.logits, ablated) < limit
        assert gap(other.logits, ablated) > 50 * limit  # negative controls
        assert gap(clean, ablated) > 50 * limit


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_attached_features_and_those_of_a_cache_are_the_models_own_neurons(name, kind):
    rm, tokens = pair(name, kind), cases.tokens(N)
    with torch.no_grad():
        logits, plain = rm.model.run_with_cache(tokens[None])
        with rm.attached(error=False) as model:
            without_errors, cache = model.run_with_cache(tokens[None])
        _, least = rm.model.run_with_cache(tokens[None], names_filter=rm.names_filter())
    found = rm.feature_acts(least)
    limit = cases.rounding(name, kind)
    for d in rm.dictionaries:
        own = plain[f"blocks.{d.layer}.mlp.hook_post"]
        assert gap(cache[f"{d.site}.features"], own) < limit
        assert gap(found[d.site], own) < limit
        assert gap(found[d.site].roll(1, -1), own) > 0.1  # negative control
    assert gap(without_errors, logits) < limit


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_with_everything_frozen_a_neuron_moves_every_neuron_by_its_column(name, kind):
    rm, graph = pair(name, kind), graph_of(name, kind)
    recording = rm.record(graph.tokens)
    n, limit = graph.nodes.n_features, cases.rounding(name, kind)
    scale = graph.adjacency[:n].abs().amax(1).clamp_min(1e-30)

    def moved(i: int, **options: Any) -> Tensor:
        run, still = (rm.intervene(recording, changes, **options) for changes in ([graph.node(i).feature.set(0.0)], []))
        return torch.stack([run.pre_acts[d.site] - still.pre_acts[d.site] for d in rm.dictionaries])[places(graph)]

    for i in (7, n // 2):
        assert float(((moved(i, freeze="all") + graph.adjacency[:n, i]).abs() / scale).max()) < limit
    assert float(((moved(7) + graph.adjacency[:n, 7]).abs() / scale).max()) > 1e-3  # control: nothing held


# ------------------------------------------------------------------------------------------------------- the tangent


def gradients(model: Any, layer: int, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return neurons' values at their own inputs and their gradients, by autograd through the model's own MLP."""
    seen: list[Tensor] = []
    handle = dict(model.hook_dict)[f"blocks.{layer}.mlp.hook_post"].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        try:
            model.blocks[layer].mlp(leaf[None])
        finally:
            handle.remove()
        values = seen[0][0][torch.arange(len(x)), index]
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@pytest.mark.parametrize(("name", "kind"), GATED)
def test_a_tangents_rows_are_the_mlps_own_gradients_and_its_bias_the_rest(name, kind):
    model = cases.model(name, kind)
    x = torch.randn(9, builders.D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    index = torch.tensor([0, 3, 3, 63, 17, 9, 1, 0, 40])
    for d in neurons(model, gate="tangent"):
        values, wanted = gradients(model, d.layer, x, index)
        rows = d.encoder_rows(index, torch.float64, at=x)
        assert gap(rows, wanted) < 1e-12
        assert gap((rows * x).sum(-1) + d.encoder_bias(index, torch.float64, at=x), values) < 1e-12
        assert gap(d.pre_acts(x)[torch.arange(9), index], values) < 1e-12
        frozen = neurons(model, layers=[d.layer])[0].encoder_rows(index, torch.float64)
        assert gap(frozen, wanted) > 0.1  # negative controls: rows of the linear factor, rows taken elsewhere
        assert gap(d.encoder_rows(index, torch.float64, at=x.roll(1, 0)), wanted) > 0.1


@pytest.mark.parametrize(("name", "kind"), GATED)
def test_tangents_reconstruct_exactly(name, kind):
    rm, tokens = pair(name, kind, "tangent"), cases.tokens(N)
    with torch.no_grad():
        _, cache = rm.model.run_with_cache(tokens[None])
    for d in rm.dictionaries:
        own = cache[f"blocks.{d.layer}.mlp.hook_post"]
        assert gap(rm.feature_acts(cache)[d.site], own) < cases.rounding(name, kind)


@pytest.mark.parametrize(("name", "kind"), GATED)
def test_a_secants_rows_give_the_whole_change_of_a_gated_neuron(name, kind):
    model = cases.model(name, kind)
    generator = torch.Generator().manual_seed(4)
    at, other = torch.randn(2, 9, builders.D_MODEL, generator=generator, dtype=torch.float64)
    index = torch.tensor([0, 3, 3, 63, 17, 9, 1, 0, 40])
    for d in neurons(model, gate="tangent"):
        change = (d.pre_acts(at) - d.pre_acts(other))[torch.arange(9), index]
        rows = d.secant_rows(index, torch.float64, at, other)
        assert gap((rows * (at - other)).sum(-1), change) < 1e-12
        mean = d.encoder_rows(index, torch.float64, at=at) / 2 + d.encoder_rows(index, torch.float64, at=other) / 2
        assert gap((mean * (at - other)).sum(-1), change) > 1e-2  # negative control: the mean of two tangents
        near = d.secant_rows(index, torch.float64, at, at + 1e-9 * other)
        assert gap(near, d.encoder_rows(index, torch.float64, at=at)) < 1e-7
        assert gap(d.secant_rows(index, torch.float64, at, at), d.encoder_rows(index, torch.float64, at=at)) < 1e-12


# --------------------------------------------------------------------------------------------- tangents in the engine


@pytest.mark.parametrize(("name", "kind"), [case for case in SOME if case in GATED])
def test_graphs_of_tangents_conserve_without_errors(name, kind):
    rm, tokens = pair(name, kind, "tangent"), cases.tokens(N)
    graph = cases.attribute(rm, tokens, TARGETS, max_features=30)
    assert float(cases.gaps(graph).max()) < 1e-10
    assert size_of_errors(graph) < cases.rounding(name, kind)
    assert graph.replacement_score == pytest.approx(1, abs=cases.rounding(name, kind))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_an_edge_into_a_tangent_is_the_derivative_of_the_neurons_value(name):
    """By central differences: a little of a token's contribution, added and taken away in the frozen model."""
    tokens, step = cases.tokens(N), 1e-4
    graph = cases.attribute(pair(name, "hooked", "tangent"), tokens, TARGETS, max_features=30)
    frozen = cases.attribute(pair(name, "hooked"), tokens, TARGETS, max_features=30)
    hand = NeuronsByHand(cases.model(name), tokens)
    token = next(graph.node(i) for i in cases.ids(graph, NodeKind.TOKEN) if graph.node(i).pos == 1)
    vector = torch.zeros_like(hand.clean["hook_embed"])
    vector[1] = step * hand.clean["hook_embed"][1]
    up, down = (hand._run({"hook_embed": v}, hold=True) for v in (vector, -vector))
    moved = torch.stack([(up[n] - down[n]) / (2 * step) for n in hand.post])[places(graph)]
    scale = graph.adjacency[:30].abs().amax(1)
    assert float(((moved - graph.adjacency[:30, token.id]).abs() / scale).max()) < 1e-5
    other = next(frozen.node(i) for i in cases.ids(frozen, NodeKind.TOKEN) if frozen.node(i).pos == 1)
    moved = torch.stack([(up[n] - down[n]) / (2 * step) for n in hand.post])[places(frozen)]
    control = (moved - frozen.adjacency[:30, other.id]).abs() / frozen.adjacency[:30].abs().amax(1)
    assert float(control.max()) > 1e-2  # negative control: an edge into the linear factor is another number


# ------------------------------------------------------------------------------------------------ the model is theirs


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "bridge")])
def test_an_edit_of_the_models_weights_is_one_of_its_neurons(name, kind):
    model = builders.build(name, kind)
    rm = ReplacementModel(model, neurons(model))
    before = [d.fingerprint() for d in rm.dictionaries]
    with torch.no_grad():
        model.blocks[1].mlp.W_in[:, 3] *= -2.0
        model.blocks[2].mlp.W_out[5] += 0.3
    graph = cases.attribute(rm, cases.tokens(N), TARGETS, max_features=20)
    assert size_of_errors(graph) < cases.rounding(name, kind)
    assert float(cases.gaps(graph).max()) < 1e-10
    changed = [a != b for a, b in zip(before, (d.fingerprint() for d in rm.dictionaries), strict=True)]
    assert changed == [False, True, True]


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "bridge"), ("gemma2", "hooked")])
def test_making_and_using_neurons_leaves_the_model_as_it_was(name, kind):
    model = builders.build(name, kind)
    model.run_with_cache(cases.tokens(N)[None])  # a bridge wires its hooks at its first run
    model.reset_hooks()
    with untouched(model):
        rm = ReplacementModel(model, neurons(model))
        cases.attribute(rm, cases.tokens(N), 5, max_features=5)
        rm.intervene(cases.tokens(N), Feature(1, 2, 3).set(0.0))

"""Interventions equal slow definitions by hooks of TransformerLens: attached dictionaries, held values, directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.graph.edits import Direction, ErrorNode
from circuit_lens.graph.nodes import Feature
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

N = 7
ROUNDS = [
    ("gpt2", "hooked", "jumprelu_skip", "hook_resid_mid"),
    ("gpt2", "bridge", "transcoder", "hook_mlp_in"),
    ("pythia", "hooked", "skip", "hook_mlp_in"),
    ("pythia", "bridge", "jumprelu", "ln2.hook_normalized"),
    ("llama", "hooked", "jumprelu", "mlp.hook_in"),
    ("qwen3", "bridge", "skip", "mlp.hook_in"),
    ("gemma2", "hooked", "transcoder", "ln2.hook_normalized"),
    ("gemma2", "bridge", "jumprelu_skip", "mlp.hook_in"),
]
Values = dict[tuple[int, int, int], float]
HookList = list[tuple[str, Callable[..., Any]]]


def changes_of(rm: ReplacementModel, tokens: Tensor) -> Values:
    """Return new values by layer, position and feature: of active and inactive features, in every layer."""
    recording, found = rm.record(tokens), {}
    for layer, d in enumerate(rm.dictionaries):
        acts = recording.acts(d)
        active = acts.nonzero().tolist()
        for factor, (pos, index) in zip((-1.0, 0.0, 2.0), active[:: max(1, len(active) // 3)], strict=False):
            found[layer, pos, index] = factor * float(acts[pos, index])
        found[layer, 3, int((acts[3] == 0).nonzero()[0])] = 0.7
    return found


def edits(rm: ReplacementModel, values: Values) -> HookList:
    """Return hooks on attached features that set values."""

    def put(acts: Tensor, hook: Any, layer: int) -> Tensor:
        for (at, pos, index), value in values.items():
            if at == layer:
                acts[:, pos, index] = value
        return acts

    layers = sorted({key[0] for key in values})
    return [(f"{rm.dictionaries[i].site}.features", lambda v, hook, i=i: put(v, hook, i)) for i in layers]


def attached(rm: ReplacementModel, tokens: Tensor, hooks: HookList) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and the features by site, of a run with dictionaries on the model's hook points."""
    with torch.no_grad(), rm.attached() as model, model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens[None])
    return logits[0], {d.site: cache[f"{d.site}.features"][0] for d in rm.dictionaries}


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def interventions(values: Values) -> list[Any]:
    return [Feature(layer, pos, index).set(value) for (layer, pos, index), value in values.items()]


@pytest.mark.parametrize(("name", "kind", "transcoder", "hook_in"), ROUNDS)
def test_an_intervention_is_an_edit_of_attached_features(name, kind, transcoder, hook_in):
    rm, tokens = cases.pair(name, kind, transcoder, hook_in), cases.tokens(N, seed=1)
    values = changes_of(rm, tokens)
    run = rm.intervene(tokens, interventions(values))
    logits, features = attached(rm, tokens, edits(rm, values))
    limit = cases.rounding(name, kind)
    assert gap(run.logits, logits) < limit
    assert gap(run.clean_logits, logits) > 1e-3  # control
    for d in rm.dictionaries:
        assert gap(run.acts[d.site], features[d.site]) < 10 * limit
    for (layer, pos, index), value in values.items():
        assert run.feature(Feature(layer, pos, index)).after == value


@pytest.mark.parametrize(("name", "kind", "transcoder", "hook_in"), ROUNDS)
def test_frozen_attention_is_clean_queries_keys_and_patterns_by_hand(name, kind, transcoder, hook_in):
    rm, tokens = cases.pair(name, kind, transcoder, hook_in), cases.tokens(N, seed=2)
    values = changes_of(rm, tokens)
    with torch.no_grad():
        _, cache = rm.model.run_with_cache(tokens[None])
    suffixes = ("attn.hook_q", "attn.hook_k", "attn.hook_pattern")
    hold = [(f"blocks.{i}.{s}", lambda v, hook, n=f"blocks.{i}.{s}": cache[n]) for i in range(3) for s in suffixes]
    run = rm.intervene(tokens, interventions(values), freeze="attention")
    assert gap(run.logits, attached(rm, tokens, [*hold, *edits(rm, values)])[0]) < cases.rounding(name, kind)
    assert gap(run.logits, attached(rm, tokens, edits(rm, values))[0]) > 1e-5  # control


@pytest.mark.parametrize("layers", [(1, 1), (0, 1), (2, 2)])
@pytest.mark.parametrize(("name", "kind", "transcoder", "hook_in"), ROUNDS[::2] + ROUNDS[7:])
def test_held_layers_are_clean_outputs_plus_what_is_changed_there(name, kind, transcoder, hook_in, layers):
    rm, tokens = cases.pair(name, kind, transcoder, hook_in), cases.tokens(N, seed=3)
    values = changes_of(rm, tokens)
    recording = rm.record(tokens)
    held = range(layers[0], layers[1] + 1)

    def hold(layer: int) -> Callable[..., Tensor]:
        d = rm.dictionaries[layer]
        out = recording.outputs[d.site].clone()
        for (at, pos, index), value in values.items():
            if at == layer:
                out[pos] += (value - recording.acts(d)[pos, index]) * d.module.W_dec[index]
        return lambda v, hook: out[None]

    hooks = [(rm.dictionaries[i].site, hold(i)) for i in held]
    outside = {key: value for key, value in values.items() if key[0] not in held}
    run = rm.intervene(tokens, interventions(values), layers=layers)
    assert gap(run.logits, attached(rm, tokens, [*hooks, *edits(rm, outside)])[0]) < cases.rounding(name, kind)
    free = rm.intervene(tokens, interventions(values)).logits
    assert gap(run.logits, free) > 1e-5 or layers == (0, 1)  # control


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge")])
def test_an_errors_factor_is_an_edit_of_the_attached_error(name, kind):
    rm, tokens = cases.pair(name, kind, "jumprelu_skip", "mlp.hook_in"), cases.tokens(N, seed=3)
    run = rm.intervene(tokens, [ErrorNode(0, 2).scale(-1.0), ErrorNode(1, 5).add(1.0), Feature(0, 1, 4).set(2.0)])
    clean = rm.record(tokens)

    def put(layer: int, pos: int, factor: float) -> Callable[..., Tensor]:
        def edit(error: Tensor, hook: Any) -> Tensor:
            error = error.clone()
            error[:, pos] = factor * clean.error(rm.dictionaries[layer].site)[pos]
            return error

        return edit

    sites = [d.site for d in rm.dictionaries]
    hooks = [(f"{sites[0]}.error", put(0, 2, -1.0)), (f"{sites[1]}.error", put(1, 5, 2.0))]
    limit = cases.rounding(name, kind)
    assert gap(run.logits, attached(rm, tokens, [*hooks, *edits(rm, {(0, 1, 4): 2.0})])[0]) < limit


# --------------------------------------------------------------------------------------------------------- directions


def moved_along(value: Tensor, pos: int, vector: Tensor, new: Callable[[Tensor], Tensor]) -> Tensor:
    old = value[:, pos] @ vector / (vector @ vector)
    value = value.clone()
    value[:, pos] += (new(old) - old)[:, None] * vector
    return value


@pytest.mark.parametrize("hook", Direction.HOOKS)
@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_a_direction_is_an_edit_of_its_hook_point_and_both_classes_agree(name, kind, hook):
    rm, tokens = cases.pair(name, kind), cases.tokens(N, seed=4)
    if f"blocks.1.{hook}" not in rm.model.hook_dict:
        assert (name, hook) == ("pythia", "hook_resid_mid")
        return
    vector = torch.randn(builders.D_MODEL, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = Direction(vector, 1, 3, hook)
    for change, new in (
        (direction.set(-2.0), lambda old: torch.full_like(old, -2.0)),
        (direction.scale(0.0), torch.zeros_like),
        (direction.add(1.5), lambda old: old + 1.5),
    ):
        run = rm.intervene(tokens, change)
        if not (kind == "bridge" and hook == "hook_resid_mid"):  # there it is no point of the stream
            with torch.no_grad():
                edit = lambda v, hook, new=new: moved_along(v, 3, vector, new)  # noqa: E731
                logits = rm.model.run_with_hooks(tokens[None], fwd_hooks=[(f"blocks.1.{hook}", edit)])[0]
            assert gap(run.logits, logits) < cases.rounding(name, kind)
        if kind == "bridge":
            other = cases.pair(name, "hooked").intervene(tokens, change)
            assert gap(run.logits, other.logits) < 1e-4
            assert gap(run.clean_logits, other.logits) > 1e-3  # control


def test_a_direction_given_twice_counts_once_and_two_add_up():
    rm, tokens = cases.pair("gpt2"), cases.tokens(N)
    vector = torch.eye(builders.D_MODEL, dtype=torch.float64)[3] * 2
    one, other = Direction(vector, 1, 3), Direction(vector.clone(), 1, 3)
    once = rm.intervene(tokens, one.scale(0.0)).logits
    assert torch.equal(once, rm.intervene(tokens, [one.scale(0.0), other.scale(0.0), one.scale(0.0)]).logits)
    across = Direction(torch.eye(builders.D_MODEL, dtype=torch.float64)[4], 1, 3)
    both = rm.intervene(tokens, [one.scale(0.0), across.add(1.0)]).logits
    add = lambda v, hook: v.index_put((torch.tensor(0), torch.tensor(3)), v[0, 3] * zero + across.vector)  # noqa: E731
    zero = torch.ones(builders.D_MODEL, dtype=torch.float64)
    zero[3] = 0
    with torch.no_grad():
        wanted = rm.model.run_with_hooks(tokens[None], fwd_hooks=[("blocks.1.hook_resid_post", add)])[0]
    assert gap(both, wanted) < 1e-11


# ---------------------------------------------------------------------------- dictionaries of other shapes and places


class TwoOutputs:
    """A dictionary that reads one layer and writes to two, made of two transcoders' decoders."""

    kind, has_skip, normalize = "two_outputs", False, None

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second
        self.site, self.layer, self.hook_in = first.cfg.metadata.hook_name_out, 0, first.cfg.metadata.hook_name
        self.joint, self.tangent = self.site, False
        self.hooks_out, self.out_layers = (self.site, second.cfg.metadata.hook_name_out), (0, 1)
        self.d_in, self.d_out, self.d_sae = first.cfg.d_in, first.cfg.d_out, first.cfg.d_sae

    def pre_acts(self, x: Tensor) -> Tensor:
        return x @ self.first.W_enc + self.first.b_enc

    def activate(self, pre_acts: Tensor, x: Tensor) -> Tensor:
        return pre_acts.relu()

    def encoder_rows(self, index: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
        return self.first.W_enc.T[index].to(dtype)

    def encoder_bias(self, index: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
        return self.first.b_enc[index].to(dtype)

    def decoder_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([self.first.W_dec[index], self.second.W_dec[index]], 1).to(dtype)

    def decoder_bias(self, dtype: torch.dtype) -> Tensor:
        return torch.stack([self.first.b_dec, self.second.b_dec]).to(dtype)

    def decode(self, acts: Tensor) -> Tensor:
        return torch.stack([acts @ s.W_dec + s.b_dec for s in (self.first, self.second)], -2)

    def skip(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.d_out, dtype=x.dtype)

    def skip_matrix(self, dtype: torch.dtype) -> None:
        return None

    def thresholds(self) -> Tensor:
        return torch.zeros(self.d_sae)

    def fingerprint(self) -> str:
        return "two"


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "bridge")])
def test_a_dictionary_with_two_outputs_writes_its_change_to_both(name, kind):
    model = cases.model(name, kind)
    first, second, third = builders.transcoders(model)
    rm, tokens = ReplacementModel(model, [TwoOutputs(first, second), third]), cases.tokens(N, seed=5)
    recording = rm.record(tokens)
    pos, index = recording.acts(rm.dictionaries[0]).nonzero().tolist()[-2]
    new = [Feature(0, pos, index).scale(-1.0), Feature(0, 3, 5).set(2.0), Feature(2, 6, 7).set(1.0)]
    values = {
        (0, pos, index): -float(recording.acts(rm.dictionaries[0])[pos, index]), (0, 3, 5): 2.0, (1, 6, 7): 1.0,
    }  # fmt: skip
    run = rm.intervene(tokens, new)
    logits, features = attached(rm, tokens, edits(rm, values))
    limit = cases.rounding(name, kind)
    assert gap(run.logits, logits) < limit
    assert gap(run.acts[rm.dictionaries[1].site], features[rm.dictionaries[1].site]) < 10 * limit
    alone = ReplacementModel(model, [first, third]).intervene(tokens, new)
    assert gap(alone.logits, logits) > 1e-4  # control: without the second output
    own = [f.scale(1.0) for f in recording.active()] + [ErrorNode(i, p).scale(1.0) for i in range(3) for p in range(N)]
    assert torch.equal(rm.intervene(recording, own).logits, recording.logits)
    held = rm.intervene(tokens, [Feature(0, 3, 5).set(2.0)], freeze="all")
    clean = recording.acts(rm.dictionaries[0])[3, 5]
    last = {}
    look = lambda v, hook: last.__setitem__(hook.name, v.clone())  # noqa: E731
    hooks = [(f"blocks.{i}.hook_mlp_out", look) for i in (0, 1)]
    rm.intervene(tokens, [Feature(0, 3, 5).set(2.0)], freeze="all", fwd_hooks=hooks)
    for (_, value), sae, site in zip(sorted(last.items()), (first, second), rm.dictionaries[0].hooks_out, strict=True):
        assert gap(value[0, 3] - recording.outputs[site][3], (2.0 - clean) * sae.W_dec[5].detach()) < max(limit, 1e-9)
    assert gap(held.logits, recording.logits) > 1e-6


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_a_dictionary_that_writes_before_the_post_norm_is_edited_there(kind):
    """Gemma 2: what is written to the MLP's own output passes the norm behind it."""
    model, tokens = cases.model("gemma2", kind), cases.tokens(N, seed=6)
    saes = builders.transcoders(model, "jumprelu")
    for layer, sae in enumerate(saes):
        sae.cfg.metadata.hook_name_out = f"blocks.{layer}.mlp.hook_out"
        with torch.no_grad():
            sae.W_dec.mul_(0.3)
    rm = ReplacementModel(model, saes)
    values = changes_of(rm, tokens)
    run = rm.intervene(tokens, interventions(values))
    limit = cases.rounding("gemma2", kind)
    assert gap(run.logits, attached(rm, tokens, edits(rm, values))[0]) < limit
    recording = rm.record(tokens)
    own = [f.scale(1.0) for f in recording.active()] + [ErrorNode(i, p).scale(1.0) for i in range(3) for p in range(N)]
    assert torch.equal(rm.intervene(recording, own).logits, recording.logits)
    graph = cases.attribute(rm, tokens, [5])
    node = max(
        (graph.node(i) for i in cases.ids(graph, "feature") if graph.node(i).layer == 0), key=lambda n: n.activation
    )
    kept = {}
    hooks = [("unembed.hook_out", lambda v, hook: kept.__setitem__(0, (v - v.mean(-1, keepdim=True))[0, -1, 5]))]
    clean = rm.record(tokens, fwd_hooks=hooks)
    before = kept[0]
    run = rm.intervene(clean, node.feature.scale(-1.0), freeze="all")
    row = graph.adjacency[-1]
    assert float((kept[0] - before + 2 * row[node.id]).abs() / row.abs().max()) < limit
    d = rm.dictionaries[2]
    moved = run.pre_acts[d.site] - clean.pre_acts(d)
    for i in cases.ids(graph, "feature"):
        target = graph.node(i)
        if target.layer == 2:
            edge = graph.adjacency[i]
            assert float((moved[target.pos, target.index] + 2 * edge[node.id]).abs() / edge.abs().max()) < 2 * limit

"""Autoencoders on a live model: attached as hook points, recorded, changed, differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuit_lens.graph.edits import ErrorNode
from circuit_lens.graph.nodes import Feature, NodeKind
from circuit_lens.interventions.gradients import Live, Tape
from tests import autoencoders
from tests.invariants import cases
from tests.invariants.test_autoencoders import MIXES, fits, pair, tier

CLASSES = (("gpt2", "hooked"), ("gemma2", "hooked"), ("llama", "bridge"), ("pythia", "hooked"))
LIVE = [tier(name, kind, mix) for name, kind in CLASSES for mix in MIXES if fits(mix, name, kind)]
HOOKED = [case for case in LIVE if case.values[1] == "hooked"]


@pytest.mark.parametrize(("name", "kind", "mix"), LIVE)
def test_attached_autoencoders_leave_the_output_and_show_their_features(name: Any, kind: Any, mix: str) -> None:
    rm, given, tokens = pair(name, kind, mix)
    with torch.no_grad():
        real, cache = rm.model.run_with_cache(tokens[None])
        with rm.attached():
            logits, inside = rm.model.run_with_cache(tokens[None])
        with rm.attached(error=False):
            replaced = rm.model(tokens[None])
    scale = real.abs().max()
    assert (logits - real).abs().max() < 1e-9 * scale
    assert (replaced - real).abs().max() > 1e-3 * scale  # control: what they miss matters
    found = rm.feature_acts(cache)
    for module in given:
        if module.cfg.metadata.hook_name_out:
            continue
        site = module.cfg.metadata.hook_name
        own = autoencoders.encode(module, cache[site].flatten(2) if site.endswith("hook_z") else cache[site])
        assert (inside[f"{site}.features"] - own).abs().max() < 1e-9
        assert (found[site] - own).abs().max() < 1e-9


@pytest.mark.parametrize(("name", "kind", "mix"), LIVE)
def test_own_values_change_no_bit_and_others_are_a_rank_one_change(name: Any, kind: Any, mix: str) -> None:
    rm, given, tokens = pair(name, kind, mix)
    recording = rm.record(tokens)
    own = [feature.scale(1.0) for feature in recording.active()]
    hooks = dict.fromkeys(d.hooks_out[0] for d in rm.dictionaries)
    own += [ErrorNode(int(h.split(".")[1]), p, h).scale(1.0) for h in hooks for p in range(len(tokens))]
    assert torch.equal(rm.intervene(tokens, own).logits, recording.logits)
    module = next(m for m in given if not m.cfg.metadata.hook_name_out)
    site, pos = module.cfg.metadata.hook_name, 3
    d = next(d for d in rm.dictionaries if d.site == site)
    index = int(recording.acts(d)[pos].abs().argmax())
    run = rm.intervene(tokens, Feature(d.layer, pos, index, site).set(-2.0))
    step = (-2.0 - float(recording.acts(d)[pos, index])) * autoencoders.decoder(module)[index]

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[0, pos] += step.view(value[0, pos].shape)
        return value

    with torch.no_grad():
        wanted = rm.model.run_with_hooks(tokens[None], fwd_hooks=[(site, add)])[0]
    assert (run.logits - wanted).abs().max() < 1e-9 * wanted.abs().max()
    assert (run.logits - recording.logits).abs().max() > 1e-6


@pytest.mark.parametrize(("name", "kind", "mix"), HOOKED)
def test_with_everything_held_a_change_is_its_column(name: Any, kind: Any, mix: str) -> None:
    rm, _, tokens = pair(name, kind, mix)
    graph = cases.attribute(rm, tokens, [5, 17], mlp="error")
    generator = torch.Generator().manual_seed(0)
    features = [graph.node(i) for i in cases.ids(graph, NodeKind.FEATURE)]
    for i in torch.randperm(len(features), generator=generator)[:6].tolist():
        node = features[i]
        run = rm.intervene(tokens, node.feature.scale(2.0), freeze="all")
        scale = graph.adjacency.abs().amax(1).clamp_min(1e-6)
        clean = rm.record(tokens)
        for row, target in enumerate(features):
            d = rm.binding.dictionary(target.layer, target.site)
            moved = run.pre_acts[d.site] - clean.pre_acts(d)
            gap = float(moved[target.pos, target.index]) - float(graph.adjacency[row, node.id])
            assert abs(gap) < 1e-9 * float(scale[row]), (node, target)


@pytest.mark.parametrize(("name", "kind", "mix"), HOOKED)
def test_the_graphs_total_effects_are_gradients_of_the_held_model(name: Any, kind: Any, mix: str) -> None:
    rm, _, tokens = pair(name, kind, mix)
    graph = cases.attribute(rm, tokens, [5])
    found = tape_of(rm, tokens, errors=False).of_logits(lambda logits: _demeaned(rm, logits)[0, -1, 5])
    total = graph.total_effect(graph.node(len(graph.nodes) - 1))
    scale = total.abs().max()
    for node in (graph.node(i) for i in cases.ids(graph, NodeKind.FEATURE)):
        gradient = float(found[node.site][0, node.pos, node.index]) * float(node.activation or 0.0)
        assert abs(gradient - float(total[node.id])) < 1e-8 * scale, node
    live = tape_of(rm, tokens, errors=True).of_logits(lambda logits: _demeaned(rm, logits)[0, -1, 5])
    assert max(float((live[s] - found[s]).abs().max()) for s in live) > 1e-4  # control: what is held matters


def tape_of(rm: Any, tokens: torch.Tensor, *, errors: bool) -> Tape:
    return Tape(rm.binding, tokens[None], Live(attention=errors, norms=errors, errors=errors, mlps=True))


def _demeaned(rm: Any, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(rm.model.cfg, "output_logits_soft_cap", 0.0) or 0.0
    logits = cap * torch.atanh(logits / cap) if cap > 0 else logits
    return logits - logits.mean(-1, keepdim=True)

"""A validation card's figures against slow definitions, planted cases, and everything a card must refuse or survive."""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuit_lens as cl
from circuit_lens.errors import ConsistencyError, InterventionError, TargetError
from circuit_lens.graph import load_graph
from circuit_lens.graph.card import ValidationCard
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.statistics import r_squared, sign_accuracy, spearman
from circuit_lens.interventions import card_effects
from circuit_lens.interventions.readout import readout
from circuit_lens.interventions.study import CardSettings, Study
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases
from tests.invariants.test_attached import untouched

N, TOKEN = 5, 5
CLASSES = [(name, kind) for name in ("gpt2", "llama", "gemma2", "pythia") for kind in ("hooked", "bridge")]
QUICK = CardSettings(samples=0, max_nodes=40, knock_on_targets=8, flip_sources=6, random_circuits=2)


def pair(name: Any = "gpt2", kind: Any = "hooked", **options: Any) -> Any:
    return cases.pair(name, kind, "jumprelu_skip", "mlp.hook_in", **options)


def tokens(n_pos: int = N, seed: int = 6) -> Tensor:
    return cases.tokens(n_pos, seed=seed)


@functools.cache
def graph_of(name: Any = "gpt2", kind: Any = "hooked", n_pos: int = N, **options: Any) -> Any:
    return cases.attribute(pair(name, kind), tokens(n_pos), [TOKEN], **options)


@functools.cache
def card_of(name: Any = "gpt2", kind: Any = "hooked") -> ValidationCard:
    return pair(name, kind).validate(graph_of(name, kind), settings=QUICK)


def demeaned(rm: Any, logits: Tensor) -> float:
    cap = getattr(rm.model.cfg, "output_logits_soft_cap", None) or 0.0
    x = logits[-1].double()
    x = cap * torch.atanh(x / cap) if cap > 0 else x
    return float(x[TOKEN] - x.mean())


# ---------------------------------------------------------------------------------------- the slow, independent card


def one_by_one(rm: Any, graph: Any, values: Any) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return, per feature of the graph that can reach the target, its effect by ``rm.intervene`` and what total effects
    and edges say of it."""
    recording = rm.record(graph.tokens)
    total, row = graph.total_effect(graph.best_logit), graph.nodes.row_of(graph.best_logit.id)
    clean, effects, said, chosen = demeaned(rm, recording.logits), [], [], []
    for i in range(graph.nodes.n_features):
        f = graph.node(i).feature
        if f.layer == rm.model.cfg.n_layers - 1 and f.pos != N - 1:
            continue
        new = values(f)
        effects.append(demeaned(rm, rm.intervene(recording, f.set(new)).logits) - clean)
        share = (new - recording.activation(f)) / recording.activation(f)
        said.append((float(total[i]) * share, float(graph.adjacency[row, i]) * share))
        chosen.append(i)
    return np.array(effects), np.array(said), chosen


def reference_value(rm: Any, prompts: list[Tensor], f: Feature) -> float:
    d = rm.binding.dictionary(f.layer, f.site)
    return float(torch.cat([rm.record(p).acts(d)[1:] for p in prompts]).double().mean(0)[f.index])


@pytest.mark.parametrize(
    ("name", "kind", "ablation"),
    [
        *((n, k, "zero") for n, k in CLASSES if (n, k) != ("llama", "bridge")),
        ("gpt2", "hooked", "mean"),
        ("gemma2", "hooked", "resample"),
    ],
)
def test_figures_of_nodes_are_those_of_one_intervention_after_the_other(name, kind, ablation):
    rm, graph = pair(name, kind), graph_of(name, kind)
    reference = [tokens(seed=20), tokens(seed=21)][: 1 if ablation == "resample" else 2]
    values = {
        "zero": lambda f: 0.0,
        "mean": lambda f: reference_value(rm, reference, f),
        "resample": lambda f: float(rm.record(reference[0]).acts(rm.binding.dictionary(f.layer))[f.pos, f.index]),
    }[ablation]
    effects, said, _ = one_by_one(rm, graph, values)
    settings = replace(QUICK, max_nodes=10_000)
    card = rm.validate(graph, ablation=ablation, reference=reference if ablation != "zero" else (), settings=settings)
    assert card["counts/nodes"].value == len(effects) < graph.nodes.n_features
    exact = 1e-9 if cases.rounding(name, kind) < 1e-6 else 0.02  # ranks of float32 norms may swap
    for key, predicted in (("total", said[:, 0]), ("direct", said[:, 1])):
        assert card[f"nodes/{key}/abs_spearman"].value == pytest.approx(
            spearman(np.abs(predicted), np.abs(effects)), abs=exact
        )
        assert card[f"nodes/{key}/spearman"].value == pytest.approx(spearman(predicted, effects), abs=exact)
        assert card[f"nodes/{key}/sign_accuracy"].value == pytest.approx(sign_accuracy(predicted, effects), abs=exact)
        assert card[f"nodes/{key}/r_squared"].value == pytest.approx(r_squared(predicted, effects), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge")])
def test_gaps_and_the_circuit_are_those_of_interventions_by_hand(name, kind):
    rm, graph = pair(name, kind), graph_of(name, kind)
    effects, _, chosen = one_by_one(rm, graph, lambda f: 0.0)
    card = rm.validate(graph, settings=replace(QUICK, max_nodes=10_000))
    recording = rm.record(graph.tokens)
    clean, missed = demeaned(rm, recording.logits), 0.0
    for effect, i in zip(effects, chosen, strict=True):
        run = rm.intervene(recording, graph.node(i).feature.set(0.0), freeze="attention")
        missed += abs(effect - (demeaned(rm, run.logits) - clean))
    assert card["gaps/attention"].value == pytest.approx(missed / np.abs(effects).sum(), rel=1e-6)
    circuit = graph.prune()
    inside = {str(circuit.node(i).feature) for i in range(circuit.nodes.n_features)}
    every = recording.active()

    def value(features: list[Feature]) -> float:
        changes = [f.set(0.0) for f in features]
        return demeaned(rm, rm.intervene(recording, changes).logits) if changes else clean

    nothing = value(every)
    kept = value([f for f in every if str(f) not in inside])
    without = value([f for f in every if str(f) in inside])
    assert card["circuit/features"].value == len(inside)
    assert card["circuit/clean"].value == pytest.approx(clean, rel=1e-9)
    assert card["circuit/without"].value == pytest.approx(nothing, rel=1e-6)
    if inside:
        assert card["circuit/sufficiency"].value == pytest.approx((kept - nothing) / (clean - nothing), rel=1e-5)
        assert card["circuit/necessity"].value == pytest.approx((clean - without) / (clean - nothing), rel=1e-5)


def test_features_that_switch_are_those_that_interventions_switch():
    rm, graph = pair(), graph_of()
    card = rm.validate(graph, settings=replace(QUICK, flip_sources=10_000, max_nodes=10_000))
    recording, on, off, able = rm.record(graph.tokens), 0, 0, 0
    _, _, chosen = one_by_one(rm, graph, lambda f: 0.0)
    for i in chosen:
        f = graph.node(i).feature
        run = rm.intervene(recording, f.set(0.0))
        for d in rm.dictionaries:
            if d.layer <= f.layer:
                continue
            was, now = recording.acts(d)[f.pos :] != 0, run.acts[d.site][f.pos :] != 0
            on, off, able = on + int((~was & now).sum()), off + int((was & ~now).sum()), able + int((~was).sum())
    assert on > 3
    assert card["flips/on/recall"].n == on
    assert card["flips/off/recall"].n == off
    assert card["flips/on/prevalence"].value == pytest.approx(on / able)


# --------------------------------------------------------------------------------------------------- planted cases


class Exact:
    """An exact dictionary of a ReLU MLP: its own neurons."""

    kind, has_skip, normalize = "exact", False, None

    def __init__(self, model: Any, layer: int) -> None:
        mlp = model.blocks[layer].mlp
        self.W_in, self.b_in, self.W_out, self.b_out = (
            getattr(mlp, n).detach() for n in ("W_in", "b_in", "W_out", "b_out")
        )
        self.site, self.layer, self.hook_in = f"blocks.{layer}.hook_mlp_out", layer, f"blocks.{layer}.mlp.hook_in"
        self.hooks_out, self.out_layers = (self.site,), (layer,)
        self.joint, self.tangent = self.site, False
        self.d_in = self.d_out = self.W_in.shape[0]
        self.d_sae = self.W_in.shape[1]

    def pre_acts(self, x: Tensor) -> Tensor:
        return x @ self.W_in + self.b_in

    def activate(self, pre_acts: Tensor, x: Tensor) -> Tensor:
        return pre_acts.relu()

    def encoder_rows(self, index: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
        return self.W_in.T[index].to(dtype)

    def encoder_bias(self, index: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
        return self.b_in[index].to(dtype)

    def decoder_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.W_out[index, None].to(dtype)

    def decoder_bias(self, dtype: torch.dtype) -> Tensor:
        return self.b_out[None].to(dtype)

    def decode(self, acts: Tensor) -> Tensor:
        return (acts @ self.W_out + self.b_out)[..., None, :]

    def skip(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.d_out, dtype=x.dtype)

    def skip_matrix(self, dtype: torch.dtype) -> None:
        return None

    def thresholds(self) -> Tensor:
        return torch.zeros(self.d_sae)

    def fingerprint(self) -> str:
        return f"exact {self.layer}"


@functools.cache
def planted() -> ReplacementModel:
    """Return a model of few and strong features whose ReLU MLPs are their own dictionaries and whose norms do nothing.

    A norm's epsilon is so large, and its gain so much larger, that it divides by one whatever it reads.
    """
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_mlp=24, d_vocab=32, act_fn="relu",
        normalization_type="RMS", eps=1e10, dtype=torch.float64, device="cpu", seed=0, model_name="planted",
    )  # fmt: skip
    state = torch.get_rng_state()
    model = HookedTransformer(cfg, tokenizer=None).eval().requires_grad_(False)
    torch.set_rng_state(state)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 6)
            if name.endswith("b_in"):
                parameter.add_(4.0)  # far from the threshold: nothing switches
            if "W_out" in name:
                parameter.mul_(0.3)
            if "ln" in name:
                parameter.fill_(1e5)
            if "W_Q" in name or "W_K" in name:
                parameter.mul_(0.0)  # patterns do not move, so that everything is linear
    return ReplacementModel(model, [Exact(model, layer) for layer in range(3)])


def test_where_the_graph_is_the_whole_truth_every_figure_says_so():
    rm = planted()
    prompt = torch.arange(3, 9)
    graph = cases.attribute(rm, prompt, [TOKEN])
    card = rm.validate(graph, settings=replace(QUICK, max_nodes=10_000, edge_share=0.8))
    assert card["counts/knock_on_pairs"].value > 20
    for part in ("nodes", "pairs", "knock_on"):
        for key in ("total", "gradient"):
            assert card[f"{part}/{key}/r_squared"].value == pytest.approx(1.0, abs=1e-6)
            for measure in ("spearman", "abs_spearman", "sign_accuracy"):  # effects of 1e-9 may swap ranks
                assert card[f"{part}/{key}/{measure}"].value == pytest.approx(1.0, abs=2e-3), (part, key, measure)
    assert card["nodes/direct/r_squared"].value < 0.99  # control: paths through features count
    assert card["knock_on/direct/r_squared"].value < 0.99
    for name in ("attention", "norms", "errors", "both"):
        assert card[f"gaps/{name}"].value == pytest.approx(0.0, abs=1e-6)
    for distance in (1, 2):
        assert card[f"faithfulness/{distance}/cosine"].value == pytest.approx(1.0, abs=1e-6)
        assert card[f"faithfulness/{distance}/error"].value == pytest.approx(0.0, abs=1e-6)
    assert abs(card["nodes/gradient_minus_graph/abs_spearman"].value) < 2e-3
    assert "no feature switched on" in card.sentences()[2]
    assert abs(card["nodes/matched/spearman"].value) < 0.5


def test_a_prediction_with_its_labels_shuffled_predicts_nothing():
    rm = planted()
    graph = cases.attribute(rm, torch.arange(3, 9), [TOKEN])
    recording = rm.record(graph.tokens)
    study = Study(recording, graph, readout(graph, recording), (), replace(QUICK, samples=200, max_nodes=10_000))
    order = np.random.default_rng(0).permutation(len(study.live))
    figures = study.score("shuffled", study.live[order], study.live, signed=True)
    for measure in ("spearman", "abs_spearman"):
        figure = figures[f"shuffled/{measure}"]
        assert abs(figure.value) < 0.2
        assert figure.low < 0 < figure.high
    assert figures["shuffled/r_squared"].value < -0.5
    assert study.score("true", study.live, study.live, signed=True)["true/r_squared"].value == 1.0


# ------------------------------------------------------------------------------------------ what is and is not served


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "hooked"), ("llama", "bridge")])
def test_a_card_leaves_the_model_as_it_was_also_under_inference_mode(name, kind):
    rm, graph = pair(name, kind), graph_of(name, kind)
    wanted = card_of(name, kind)
    for mode in (torch.inference_mode, torch.no_grad):
        with untouched(rm.model), mode():
            assert str(rm.validate(graph, settings=QUICK)) == str(wanted)
        if kind == "bridge":
            break


def test_a_card_is_the_same_for_a_seed_and_another_for_another():
    rm, graph = pair(), graph_of()
    again = rm.validate(graph, settings=QUICK)
    assert again.to_json() == card_of().to_json()
    assert rm.validate(graph, settings=replace(QUICK, seed=1)).to_json() != again.to_json()


def test_a_card_is_kept_in_its_graphs_file_and_dropped_by_circuits_and_expansions(tmp_path, monkeypatch):
    rm = pair()
    graph = graph_of(max_features=12)
    card = rm.validate(graph, settings=QUICK)
    kept = graph.with_card(card)
    kept.save(tmp_path / "g.safetensors")
    back = load_graph(tmp_path / "g.safetensors")
    assert str(back.card) == str(card)
    assert graph.card is None
    assert kept.prune().card is None
    rest = kept.nodes.slice_of("rest")
    assert kept.expand(rest.start).card is None
    monkeypatch.setattr(ValidationCard, "to_json", lambda self: {"version": 99})
    kept.save(tmp_path / "newer.safetensors")
    with pytest.raises(cl.errors.GraphFileError, match="version 99"):
        load_graph(tmp_path / "newer.safetensors")


def test_capped_loaded_pruned_and_linear_graphs_have_cards(tmp_path):
    rm = pair()
    graph_of().save(tmp_path / "g.safetensors")
    assert str(rm.validate(load_graph(tmp_path / "g.safetensors"), settings=QUICK)) == str(card_of())
    capped = rm.validate(graph_of(max_features=12), settings=QUICK)
    assert capped["counts/nodes"].value <= 12
    circuit = graph_of().prune(node_threshold=0.97)
    pruned = rm.validate(circuit, settings=QUICK)
    assert pruned["circuit/features"].value == circuit.nodes.n_features
    linear = rm.validate(graph_of(norms="linear", attention="linear"), settings=QUICK)
    for measure in ("spearman", "r_squared"):
        same = [linear[f"nodes/{key}/{measure}"].value for key in ("total", "total_norms_attention")]
        assert same[0] == pytest.approx(same[1], abs=1e-6)
    assert "norms: linear; attention: linear" in str(linear)


def test_short_prompts_and_dictionaries_at_one_layer_have_cards():
    rm = pair()
    short = rm.validate(cases.attribute(rm, tokens(2), [TOKEN]), settings=QUICK)
    assert short["counts/nodes"].value > 0
    for layers in ((0,), (2,)):
        one = pair(layers=layers)
        card = one.validate(cases.attribute(one, tokens(), [TOKEN]), settings=QUICK)
        assert card["counts/knock_on_pairs"].value == 0
        assert "none was tested" in str(card)
        assert math.isnan(card.score.value)


def test_differences_and_metrics_are_targets_and_must_be_those_of_the_graph():
    rm = pair()

    def gap(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -2, 9]

    for target in (cl.logit_difference(5, 9), gap):
        graph = cases.attribute(rm, tokens(), target)
        card = rm.validate(graph, target=target, settings=QUICK)
        assert card["counts/nodes"].value > 0
        with pytest.raises(TargetError, match="pass what it was made for"):
            rm.validate(graph, settings=QUICK)
        with pytest.raises(TargetError, match="was made for"):
            rm.validate(graph, target=cl.logit_difference(5, 11), settings=QUICK)
    with pytest.raises(TargetError, match="one differentiable number"):
        rm.validate(graph, target=lambda logits: logits[0, -1], settings=QUICK)
    with pytest.raises(TargetError, match="explains"):
        rm.validate(graph_of(), target=9, settings=QUICK)
    two = cases.attribute(rm, tokens(), cl.token_logits(5, 9, pos=-2))
    assert str(rm.validate(two, target=5, settings=QUICK)) == str(
        rm.validate(two, target=cl.token_logits(5, pos=-2), settings=QUICK)
    )
    with pytest.raises(TargetError, match="does not explain"):
        rm.validate(two, target=cl.token_logits(5, pos=-1), settings=QUICK)


def test_a_graph_under_permanent_hooks_has_a_card_while_they_are_there():
    rm = cases.pair("gpt2")
    plain = cases.attribute(rm, tokens(), [TOKEN])

    def shift(value, hook):
        return value + 0.3

    rm.model.add_hook("blocks.1.hook_resid_pre", shift, is_permanent=True)
    try:
        graph = cases.attribute(rm, tokens(), [TOKEN])
        card = rm.validate(graph, settings=QUICK)
        with pytest.raises(ConsistencyError, match="of another run"):
            rm.validate(plain, settings=QUICK)
    finally:
        rm.model.reset_hooks(including_permanent=True)
    assert card.figures != rm.validate(plain, settings=QUICK).figures
    with pytest.raises(ConsistencyError, match="of another run"):
        rm.validate(graph, settings=QUICK)


def test_graphs_that_no_ablation_can_test_are_refused():
    rm = pair()
    with pytest.raises(ConsistencyError, match="other weights"):
        pair("llama").validate(graph_of(), settings=QUICK)
    contrast = cases.attribute(rm, tokens(), [TOKEN], baseline=tokens(seed=7))
    with pytest.raises(ConsistencyError, match="contrast of two prompts"):
        rm.validate(contrast, settings=QUICK)
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: value * 1.01)
    with pytest.raises(ConsistencyError, match="of another run"):
        rm.validate(cases.attribute(rm, tokens(), [TOKEN], fwd_hooks=[hook]), settings=QUICK)
    bare = cases.pair("gpt2", layers=())
    with pytest.raises(InterventionError, match="no feature nodes"):
        bare.validate(cases.attribute(bare, tokens(), [TOKEN]), settings=QUICK)
    for ablation in ("mean", "resample"):
        with pytest.raises(InterventionError, match="needs reference="):
            rm.validate(graph_of(), ablation=ablation, settings=QUICK)
    other = replace(graph_of(), tokens=tokens(seed=9))
    with pytest.raises(ConsistencyError, match="of another run"):
        rm.validate(other, settings=QUICK)


def test_a_hook_that_was_not_there_when_the_graph_was_made_is_noticed():
    model = builders.build("gpt2")
    rm = ReplacementModel(model, builders.transcoders(model, "jumprelu_skip", hook_in="mlp.hook_in"))
    graph = cases.attribute(rm, tokens(), [TOKEN])
    model.add_perma_hook("blocks.1.hook_resid_pre", lambda value, hook: value * 1.5)
    with pytest.raises((ConsistencyError, TargetError)):
        rm.validate(graph, settings=QUICK)


BAD = [{"max_nodes": 0}, {"samples": -1}, {"ablation": "noise"}, {"choose": "best"}, {"edge_share": 1.0}]


@pytest.mark.parametrize("bad", BAD)
def test_settings_that_mean_nothing_are_refused(bad, unchecked_annotations):
    with pytest.raises(ValueError, match="not valid"):
        CardSettings(**bad)


@pytest.fixture
def unchecked_annotations():
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_cards_of_several_prompts_have_intervals_over_prompts():
    rm = pair()
    prompts = [tokens(seed=s) for s in range(5)]
    settings = replace(QUICK, samples=50, max_nodes=15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        card = cl.validate_many(rm, prompts, targets=[[TOKEN]] * 5, settings=settings, progress=False)
    assert (len(card.prompts), card.interval) == (5, "prompts")
    assert card["nodes/gradient/abs_spearman"].n == 5
    assert card["nodes/gradient/abs_spearman"].low < card["nodes/gradient/abs_spearman"].high
    assert card["counts/nodes"].value > 50
    with pytest.raises(ValueError, match="one for each"):
        cl.validate_many(rm, prompts, targets=[[TOKEN]], settings=settings)
    with pytest.raises(ValueError, match="at least one"):
        cl.validate_many(rm, [], settings=settings)
    json.dumps(card.to_json())


def test_every_predictor_that_is_listed_is_measured():
    card = card_of()
    for p in card_effects.PREDICTORS:
        assert math.isfinite(card[f"nodes/{p.key}/abs_spearman"].value), p.key
        assert (f"nodes/{p.key}/spearman" in card.figures) == p.signed


@pytest.mark.parametrize(("name", "kind"), [("llama", "hooked"), ("gemma2", "bridge"), ("gpt2", "hooked")])
def test_rounding_at_a_threshold_is_no_other_run(name, kind):
    model = builders.build(name, kind, dtype=torch.bfloat16)
    rm = ReplacementModel(model, builders.transcoders(model, "jumprelu_skip", hook_in="ln2.hook_normalized"))
    flipped = 0
    for seed in range(4):
        prompt = tokens(10, seed=seed)
        graph = rm.attribute(prompt, targets=[TOKEN], min_explained=None)
        active = set(rm.record(prompt).active())
        flipped += sum(graph.node(i).feature not in active for i in range(graph.nodes.n_features))
        assert rm.validate(graph, settings=QUICK)["counts/nodes"].value > 0
        off = graph.nodes.activation.clone()
        off[0] += 0.5 * float(off[: graph.nodes.n_features].max())
        wrong = replace(graph, nodes=replace(graph.nodes, activation=off))
        with pytest.raises(ConsistencyError, match="not active on its prompt as it says"):
            rm.validate(wrong, settings=QUICK)
    assert flipped  # or nothing was shown


def test_runs_of_large_vocabularies_are_fewer_at_once_and_the_same(monkeypatch):
    rm, graph = pair(), graph_of()
    wanted = rm.validate(graph, settings=QUICK)
    changes = [graph.node(i).feature.scale(0.0) for i in range(6)]
    logits = rm.intervene_batch(tokens(), changes).logits
    sizes = []
    whole = type(rm.model).forward

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(x))
        return whole(self, x, *args, **options)

    monkeypatch.setattr(type(rm.model), "forward", forward)
    monkeypatch.setattr("circuit_lens.interventions.intervene.LOGIT_NUMBERS", 3 * N * builders.D_VOCAB)
    assert torch.allclose(rm.intervene_batch(tokens(), changes).logits, logits, rtol=0, atol=1e-12)
    assert max(sizes) == 3
    again = rm.validate(graph, settings=QUICK)
    assert max(sizes) == 3
    assert again["nodes/total/spearman"].value == pytest.approx(wanted["nodes/total/spearman"].value)

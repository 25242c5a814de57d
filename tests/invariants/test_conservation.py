"""Contract 2: a row's sources and the target's own bias sum to the target's value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuit_lens import direction, logit_difference, salient_logits
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.builders import TRANSCODER_KINDS
from tests.invariants import cases


def spread_metric(logits: torch.Tensor) -> torch.Tensor:
    """A metric of several positions, nonlinear in the logits."""
    return logits[0, 1:5].log_softmax(-1)[:, 7].sum() - 0.1 * logits[0, -1, 3] ** 2


TARGETS = [salient_logits(max_n=2), logit_difference(5, 9, pos=2), 4, spread_metric]
SOME = [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "hooked")]


def tolerance(name: Any, kind: Any, setting: dict[str, Any]) -> float:
    """Return the limit in units of a row's size.

    Where attention or a norm is linearised by autograd through a bridge with RMS norms, the model itself computes in
    float32 (Hugging Face's norms do, in any dtype), so its derivative is exact to float32 only.
    """
    live = setting.get("attention") == "linear"
    return 1e-5 if live and kind == "bridge" and name in cases.RMS else 1e-11


@pytest.mark.parametrize(("name", "kind", "setting"), cases.SETTINGS_ON_CLASSES)
def test_rows_and_own_bias_sum_to_the_value(name, kind, setting):
    layers = (0, 2) if "mlp" in setting else None
    rm = cases.pair(name, kind, "skip", "mlp.hook_in", layers=layers)
    graph = cases.attribute(rm, cases.tokens(6), TARGETS, **setting)
    assert cases.relative_gap(graph) < tolerance(name, kind, setting)
    if tolerance(name, kind, setting) < 1e-10:
        assert float(cases.gaps(graph).max()) < 1e-10


@pytest.mark.parametrize("transcoder", TRANSCODER_KINDS)
@pytest.mark.parametrize(("name", "kind"), SOME)
def test_rows_conserve_for_every_kind_of_transcoder_and_input(name, kind, transcoder):
    for hook_in in cases.hooks_in(name):
        graph = cases.attribute(cases.pair(name, kind, transcoder, hook_in), cases.tokens(6, seed=1), TARGETS)
        assert float(cases.gaps(graph).max()) < 1e-10


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_rows_conserve_in_float32_to_its_rounding(name, kind):
    rm = cases.pair(name, kind, "skip", dtype=torch.float32)
    graph = cases.attribute(rm, cases.tokens(20), TARGETS)
    assert graph.adjacency.dtype == torch.float32
    assert cases.relative_gap(graph) < 1e-6
    # The Jacobian of a norm cancels nearly all of an early row, so that the row's size says little of its terms'.
    graph = cases.attribute(rm, cases.tokens(20), TARGETS, norms="linear")
    assert float((cases.gaps(graph) / graph.target_value.abs().clamp_min(1)).max()) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [*SOME, ("gemma2", "bridge")])
def test_rows_conserve_in_bfloat16(name, kind):
    """Attribution accumulates in float32, whatever the model computes in."""
    model = builders.build(name, kind, dtype=torch.bfloat16)
    rm = ReplacementModel(model, [d.module for d in cases.pair(name, kind).dictionaries])
    graph = cases.attribute(rm, cases.tokens(9), [5, spread_metric])
    assert graph.adjacency.dtype == torch.float32
    assert cases.relative_gap(graph) < 1e-6


@pytest.mark.parametrize("mlp", ["error", "jacobian"])
@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_rows_conserve_without_any_dictionary(name, kind, mlp):
    graph = cases.attribute(cases.pair(name, kind, layers=()), cases.tokens(6), TARGETS, mlp=mlp)
    assert graph.nodes.n_features == 0
    assert graph.nodes.count(NodeKind.ERROR) == (0 if mlp == "jacobian" else 6 * 3)
    assert float(cases.gaps(graph).max()) < 1e-10


@pytest.mark.parametrize("n_pos", [1, 2, builders.N_CTX])
@pytest.mark.parametrize(("name", "kind"), SOME)
def test_rows_conserve_for_the_shortest_and_the_longest_prompt(name, kind, n_pos):
    rm = cases.pair(name, kind, "jumprelu")
    targets = [salient_logits(max_n=2), direction(torch.linspace(-1, 1, builders.D_MODEL), pos=0)]
    for setting in ({}, {"norms": "linear"}):
        graph = cases.attribute(rm, cases.tokens(n_pos), targets, max_features=40, **setting)
        assert float(cases.gaps(graph).max()) < 1e-10


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("name", ["gpt2", "pythia", "gemma2"])
def test_rows_conserve_when_no_feature_is_active(name, engine):
    """Dead dictionaries leave biases and errors; features forbidden at every position leave the same."""
    model = cases.model(name)
    saes = builders.transcoders(model, "skip")
    dead = [d.module for d in cases.pair(name, "hooked", "skip").dictionaries]
    for sae in saes:
        sae.b_enc.data.fill_(-1e6)
    for rm, options in (
        (ReplacementModel(model, saes), {}),
        (ReplacementModel(model, dead), {"zero_positions": range(5)}),
    ):
        graph = cases.attribute(rm, cases.tokens(5), TARGETS[:2], engine=engine, **options)
        assert graph.nodes.n_features == 0
        assert float(cases.gaps(graph).max()) < 1e-10
        assert cases.attribute(rm, cases.tokens(5), TARGETS[:2], max_features=0, **options).nodes.n_features == 0


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_no_kind_of_source_can_be_left_out(name, kind):
    """Negative control: without the columns of any one kind, or without the own bias, rows miss their values."""
    graph = cases.attribute(cases.pair(name, kind, "skip", layers=(0, 2)), cases.tokens(6), 5)
    for kind_of_node in NodeKind:
        part = graph.nodes.slice_of(kind_of_node)
        if kind_of_node is NodeKind.LOGIT or part.start == part.stop:
            continue
        left = graph.adjacency.clone()
        left[:, part] = 0
        assert float((left.sum(1) + graph.target_bias - graph.target_value).abs().max()) > 1e-3, kind_of_node
    assert float((graph.adjacency.sum(1) - graph.target_value).abs().max()) > 1e-3

"""Contract 6: a model whose hooks do not freeze never gives a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuit_lens.attribution.autograd import FrozenHooks
from circuit_lens.attribution.linearity import check_linearity
from circuit_lens.errors import CircuitLensError, LinearizationError
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

DEAF = ["blocks.1.ln1.hook_scale", "blocks.1.hook_mlp_out", "ln_final.hook_scale", "blocks.0.hook_resid_pre"]


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_the_frozen_model_is_linear(name, kind):
    graph = cases.attribute(cases.pair(name, kind), cases.tokens(5), 5)
    assert 0 < graph.manifest["checks"]["linearity"] < 1e-13
    single = cases.attribute(cases.pair("gpt2", dtype=torch.float32), cases.tokens(5), 5)
    assert single.manifest["checks"]["linearity"] < 1e-5


@pytest.mark.parametrize("live", ["blocks.1.ln1", "blocks.1.ln1_post", "ln_final"])
@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_one_live_norm_is_found_and_named(name, kind, live):
    """The norms around MLPs do not count: the MLPs' outputs are held behind them."""
    rm, hook = cases.pair(name, kind), f"{live}.hook_scale"
    if hook not in rm.model.hook_dict:
        return
    local = cases.local(rm, cases.tokens(5))
    with pytest.raises(LinearizationError) as error:
        check_linearity(FrozenHooks(rm.model, local.frozen, local.sources, hold=lambda other: other != hook))
    assert f"first at {live.split('.ln1')[0]}" in str(error.value)
    assert check_linearity(FrozenHooks(rm.model, local.frozen, local.sources)) < 1e-9


def deafen(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a hook point fire without effect, as some bridges' hook points do."""
    point = model.hook_dict[name]
    cls = type(point)

    class DeafHookPoint(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            value = args[0]
            super().__call__(*args, **kwargs)
            return value

    monkeypatch.setattr(point, "__class__", DeafHookPoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("deaf", DEAF)
@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_hook_point_that_discards_edits_is_named(kind, deaf, dtype, monkeypatch):
    model = builders.build("gpt2", kind, dtype=dtype)
    rm = ReplacementModel(model, [d.module for d in cases.pair("gpt2", "hooked", "skip").dictionaries])
    cases.local(rm, cases.tokens(6))  # negative control: the same model with all hook points alive
    deafen(model, deaf, monkeypatch)
    with pytest.raises(LinearizationError) as error:
        cases.local(rm, cases.tokens(6))
    assert f"first at {deaf.split('.hook')[0].split('.ln1')[0]}" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_deaf_norm_before_an_mlp_gives_a_right_graph_or_none(dtype, monkeypatch):
    """Nothing but a skip path reads behind it; the fast path holds it by itself, the reference cannot."""
    model = builders.build("gpt2", dtype=dtype)
    rm = ReplacementModel(model, [d.module for d in cases.pair("gpt2", "hooked", "skip").dictionaries])
    right = cases.attribute(rm, cases.tokens(6), 5)
    deafen(model, "blocks.1.ln2.hook_scale", monkeypatch)
    try:
        graph = cases.attribute(rm, cases.tokens(6), 5)
    except CircuitLensError:
        return
    assert cases.difference(graph, right) < 1e-9

"""Contract 7: whatever happens inside a call, the user's model and process are as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuit_lens as cl
from circuit_lens.attribution import attribute, autograd, linearity, replacement
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

N = 5


def pair(name: Any, kind: Any) -> tuple[ReplacementModel, list[Any], list[float]]:
    """Return a model in training mode that requires gradients, with hooks of the user, and what the hooks saw."""
    model = builders.build(name, kind)
    saes = builders.transcoders(model, "skip", layers=(0, 2))
    model.train()
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(True)
    seen: list[float] = []

    def look(value: torch.Tensor, hook: Any) -> None:
        seen.append(float(value.detach().sum()))

    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(look, is_permanent=True)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: 0.9 * value)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(look, dir="bwd")
    return ReplacementModel(model, saes), saes, seen


CALLS: dict[str, Any] = {
    "attribute": lambda rm: rm.attribute(cases.tokens(N), targets=[5, lambda logits: logits[0, -1].std()]),
    "reference": lambda rm: rm.attribute(cases.tokens(N), targets=5, engine="reference", max_features=4),
    "linear": lambda rm: rm.attribute(cases.tokens(N), targets=5, attention="linear", norms="linear", mlp="jacobian"),
    "local": lambda rm: rm.local(cases.tokens(N)).row(5),
    "heads": lambda rm: rm.local(cases.tokens(N)).heads("P0 token", 5),
    "expand": lambda rm: expand_first_rest(rm),
    "fwd_hooks": lambda rm: rm.attribute(
        cases.tokens(N), targets=5, fwd_hooks=[("blocks.1.hook_mlp_in", lambda v, hook: v), (lambda n: "z" in n, keep)]
    ),
    "names_filter": lambda rm: rm.names_filter(),
}


def keep(value: torch.Tensor, hook: Any) -> None:
    """A hook that leaves the value alone."""


def expand_first_rest(rm: ReplacementModel) -> Any:
    graph = rm.attribute(cases.tokens(N), targets=5, max_features=3)
    return graph.expand(graph.node(cases.ids(graph, "rest")[0]))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge"), ("pythia", "bridge")])
def test_a_call_leaves_nothing_behind(name, kind, call, untouched):
    rm, saes, _ = pair(name, kind)
    with untouched(rm.model, *saes):
        assert CALLS[call](rm) is not None
    assert all(p.grad is None for p in torch.nn.Module.parameters(rm.model))
    with pytest.raises(AssertionError, match="was changed"), untouched(rm.model):
        rm.model.hook_dict["hook_embed"].add_hook(keep)  # negative control


def fail_in_user_hook(error: type[BaseException], patch: pytest.MonkeyPatch, rm: ReplacementModel) -> dict[str, Any]:
    def fail(value: torch.Tensor, hook: Any) -> None:
        raise error("inside")

    return {"fwd_hooks": [("blocks.1.hook_mlp_in", keep), ("blocks.1.hook_mlp_out", fail)]}


def fail_at(module: Any, name: str, after: int = 0) -> Any:
    """Return what makes a function of the package raise at a call."""

    def prepare(error: type[BaseException], patch: pytest.MonkeyPatch, rm: ReplacementModel) -> dict[str, Any]:
        right, calls = getattr(module, name), [0]

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise error("inside")
            return right(*args, **kwargs)

        patch.setattr(module, name, fail)
        return {}

    return prepare


PLACES: dict[str, Any] = {
    "a hook of the user": fail_in_user_hook,
    "encoding": fail_at(replacement, "collect"),
    "the linearity check": fail_at(linearity, "forward", after=2),
    "the recorded pass": fail_at(autograd, "_seeds"),
    "the sweep": fail_at(LocalReplacementModel, "row_blocks", after=1),
    "laying out": fail_at(attribute, "table"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge")])
def test_a_call_that_raises_leaves_nothing_behind(name, kind, place, error, untouched, monkeypatch):
    rm, saes, _ = pair(name, kind)
    with untouched(rm.model, *saes), monkeypatch.context() as patch:
        options = PLACES[place](error, patch, rm)
        with pytest.raises(error, match="inside"):
            rm.attribute(cases.tokens(N), targets=5, **options)
    assert rm.attribute(cases.tokens(N), targets=5).n_edges > 0


def test_hooks_of_the_user_see_one_run_and_no_gradient():
    rm, _, seen = pair("gpt2", "hooked")
    rm.attribute(cases.tokens(N), targets=5)
    assert len(seen) == 1
    rm.attribute(cases.tokens(N), targets=5, cache=rm.model.run_with_cache(cases.tokens(N)[None])[1])
    assert len(seen) == 2


def test_a_hook_that_does_not_exist_or_fire_is_named_and_none_is_attached(untouched):
    rm = cases.pair("gpt2")
    with untouched(rm.model):
        with pytest.raises(
            cl.HookError, match=r"unknown hook point 'blocks.0.hook_resid_prae'; .*nearest: blocks.0.hook_resi"
        ):
            rm.attribute(cases.tokens(N), fwd_hooks=[("hook_embed", keep), ("blocks.0.hook_resid_prae", keep)])
        with pytest.raises(cl.HookError, match="matches no hook point"):
            rm.attribute(cases.tokens(N), fwd_hooks=[(lambda name: False, keep)])
    fired: list[str] = []
    with pytest.raises(cl.HookError, match=r"never fired: blocks\.0\.attn\.hook_result"):
        rm.attribute(cases.tokens(N), fwd_hooks=[("blocks.0.attn.hook_result", lambda v, hook: fired.append("x"))])
    assert not fired

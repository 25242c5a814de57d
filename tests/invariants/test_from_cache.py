"""A graph from the user's cache is the graph from the prompt, without a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from circuit_lens.errors import CacheError, ConsistencyError
from tests import builders
from tests.invariants import cases

N = 6


def no_forward(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the model was run")


@contextlib.contextmanager
def still(model: Any) -> Iterator[None]:
    """Let no forward pass of the model happen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", no_forward)
        with pytest.raises(AssertionError, match="was run"):
            model(cases.tokens(N)[None])
        yield


def cached(rm: Any, tokens: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return rm.model.run_with_cache(tokens, **options)[1]


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_the_graph_from_a_cache_is_the_graph_from_the_prompt(name, kind):
    setting = {"norms": "linear", "max_features": 20} if name in ("pythia", "qwen3") else {}
    rm, tokens = cases.pair(name, kind, "skip"), cases.tokens(N)
    expected = cases.attribute(rm, tokens, **setting)
    cache = cached(rm, tokens[None])
    with still(rm.model):
        graph = cases.attribute(rm, tokens, cache=cache, **setting)
    assert graph.manifest["source"] == "cache"
    assert cases.difference(graph, expected) < 1e-12
    assert cases.difference(cases.attribute(rm, cases.tokens(N, seed=1), **setting), expected) > 1e-3


@pytest.mark.parametrize("kind", builders.KINDS)
def test_the_form_of_the_cache_does_not_matter(kind):
    rm, tokens = cases.pair("gemma2", kind, "skip"), cases.tokens(N)
    expected = cases.attribute(rm, tokens, 5)
    batch = torch.stack([cases.tokens(N, seed=1), tokens])
    with torch.inference_mode():
        inferred = rm.model.run_with_cache(tokens[None])[1]
    forms = {
        "plain dict": dict(cached(rm, tokens[None]).items()),
        "no batch axis": cached(rm, tokens[None], remove_batch_dim=True),
        "inference mode": inferred,
        "names_filter": cached(rm, tokens[None], names_filter=rm.names_filter()),
    }
    with still(rm.model):
        for form, cache in forms.items():
            assert cases.difference(cases.attribute(rm, tokens, 5, cache=cache), expected) < 1e-12, form
    graph = cases.attribute(rm, tokens, 5, cache=cached(rm, batch), batch_index=1)
    assert cases.difference(graph, expected) < 1e-9 + cases.rounding("gemma2", kind)
    with pytest.raises(CacheError, match=r"batch_index=0\.\.1"):
        cases.attribute(rm, tokens, 5, cache=cached(rm, batch))
    with pytest.raises(CacheError, match="outside the cache's batch of 2"):
        cases.attribute(rm, tokens, 5, cache=cached(rm, batch), batch_index=2)
    with pytest.raises(CacheError, match="no batch axis"):
        cases.attribute(rm, tokens, 5, cache=forms["no batch axis"], batch_index=0)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "hooked")])
def test_a_cache_of_less_precision_conserves_and_is_near(name, kind):
    rm, tokens = cases.pair(name, kind), cases.tokens(N)
    full = cases.attribute(rm, tokens, 5)
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        cache = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cached(rm, tokens[None]).items()}
        graph = cases.attribute(rm, tokens, 5, cache=cache)
        assert float(cases.gaps(graph).max()) < 1e-10
        assert graph.nodes.count("patch") == 0
        assert abs(float(graph.target_value[-1] - full.target_value[-1])) < near * float(full.target_value.abs().max())
        assert cases.difference(graph, full) > 1e-9  # negative control: it is another cache


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge"), ("pythia", "hooked")])
def test_each_missing_entry_is_named(name, kind):
    rm, tokens = cases.pair(name, kind), cases.tokens(3)
    cache = cached(rm, tokens[None], names_filter=rm.names_filter())
    assert cases.attribute(rm, tokens, cache=cache).n_edges > 0
    for missing in rm.names_filter():
        own = getattr(rm.model.hook_dict[missing], "name", missing)
        less = {k: v for k, v in cache.items() if k not in (missing, own)}
        with pytest.raises(CacheError) as error:
            cases.local(rm, tokens, cache=less)
        assert repr(missing) in str(error.value)
        assert "names_filter=rm.names_filter()" in str(error.value)


def test_a_cache_of_something_else_is_refused():
    rm, tokens = cases.pair("gpt2"), cases.tokens(N)
    cache = cached(rm, tokens[None])
    with pytest.raises(ConsistencyError, match="other tokens"):
        cases.local(rm, cases.tokens(N, seed=9), cache=cache)
    one_other = tokens.clone()
    one_other[3] = (one_other[3] + 7) % 60
    with pytest.raises(ConsistencyError, match="at position 3"):
        cases.local(rm, one_other, cache=cache)
    with pytest.raises(CacheError, match=f"the prompt has {N - 1} positions"):
        cases.local(rm, tokens[:-1], cache=cache)
    with pytest.raises(ConsistencyError), torch.no_grad():
        cases.local(rm, tokens, cache=builders.build("gpt2", seed=1).run_with_cache(tokens[None])[1])
    with torch.no_grad():  # negative control: folded weights compute the same activations
        folded = builders.build("gpt2", fold_ln=True).run_with_cache(tokens[None])[1]
    assert cases.difference(cases.attribute(rm, tokens, cache=folded), cases.attribute(rm, tokens)) < 1e-5
    broken = dict(cache.items()) | {"blocks.1.hook_mlp_out": cache["blocks.1.hook_mlp_out"] * float("nan")}
    with pytest.raises(ConsistencyError, match=r"blocks.1.hook_mlp_out holds NaN"):
        cases.local(rm, tokens, cache=broken)
    with pytest.raises(ValueError, match="with a cache there is none"):
        cases.local(rm, tokens, cache=cache, fwd_hooks=[("hook_embed", lambda v, hook: v)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("kind", builders.KINDS)
def test_gradient_modes_of_the_user_do_not_matter(kind, mode):
    rm, tokens = cases.pair("gemma2", kind, "skip", layers=(0, 2)), cases.tokens(N)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1].log_softmax(-1)[5]

    settings: list[dict[str, Any]] = [{}, {"norms": "linear", "mlp": "jacobian"}, {"attention": "linear"}]
    expected = [cases.attribute(rm, tokens, [metric, 5], **setting) for setting in settings]
    before = torch.is_grad_enabled()
    try:
        with mode():
            _, cache = rm.model.run_with_cache(tokens[None])
            for setting, right in zip(settings, expected, strict=True):
                for source in ({}, {"cache": cache}):
                    graph = cases.attribute(rm, tokens, [metric, 5], **setting, **source)
                    assert cases.difference(graph, right) < cases.rounding("gemma2", kind)
                    assert not graph.adjacency.is_inference()
    finally:
        torch.set_grad_enabled(before)

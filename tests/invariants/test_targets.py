"""What a graph explains: every form of target is the scalar it says, and what is none is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuit_lens as cl
from circuit_lens.attribution.targets import TokenLogits
from circuit_lens.errors import NodeNotFoundError, TargetError, TokenNotFoundError
from tests import builders
from tests.invariants import cases
from tests.invariants.frozen_by_hand import FrozenByHand

N = 6


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, hook: str = "unembed.hook_out") -> torch.Tensor:
    seen = {}
    model.run_with_hooks(tokens[None], fwd_hooks=[(hook, lambda v, hook: seen.update(value=v[0].clone()))])
    return seen["value"]


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_every_form_of_target_has_the_value_it_says(name, kind):
    rm, tokens = cases.pair(name, kind), cases.tokens(N)
    local = cases.local(rm, tokens)
    raw = logits(rm.model, tokens)
    demeaned = raw - raw.mean(-1, keepdim=True)
    vector = torch.linspace(-1, 2, builders.D_MODEL, dtype=torch.float64)
    near = 1e-5 * float(raw.abs().max())

    def value(target: Any) -> list[float]:
        return [r.value for r in local.resolve(target)]

    for pos in (-1, 0, 2):
        assert value(TokenLogits((7, "Texas"), pos)) == pytest.approx(demeaned[pos, [7, 6]].tolist(), abs=near)
        difference = float(raw[pos, 4] - raw[pos, 9])
        assert value(cl.logit_difference("Dallas", 9, pos=pos)) == pytest.approx([difference], abs=near)
        end = float(logits(rm.model, tokens, "unembed.hook_in")[pos] @ vector)
        assert value(cl.direction(vector, pos=pos)) == pytest.approx([end], abs=near * 10)
    assert value(["Texas", 7, torch.tensor([3, 2])]) == pytest.approx(demeaned[-1, [6, 7, 3, 2]].tolist(), abs=near)
    salient = local.resolve(cl.salient_logits(max_n=3, mass=1.0))
    with torch.no_grad():
        probs = rm.model(tokens[None])[0, -1].softmax(-1)
    assert [r.index for r in salient] == probs.topk(3).indices.tolist()
    assert [r.weight for r in salient] == pytest.approx(probs.topk(3).values.tolist(), abs=1e-5)
    assert len(local.resolve(None)) <= 10
    assert local.resolve(cl.salient_logits(max_n=60, mass=1e-9))[0].index == int(probs.argmax())


def log_prob(logits: torch.Tensor) -> torch.Tensor:
    """Nonlinear, at several positions, and of the logits as the model gives them."""
    return logits.log_softmax(-1)[0, [1, -1], [7, 9]].sum()


@pytest.mark.parametrize("name", builders.ARCHITECTURES)
def test_a_nonlinear_metric_is_linearised_at_the_run(name):
    """Its edges are the derivatives that finite differences of the metric find in the frozen model."""
    rm, tokens = cases.pair(name), cases.tokens(N)
    graph = cases.attribute(rm, tokens, log_prob)
    with torch.no_grad():
        assert float(graph.target_value[-1]) == pytest.approx(float(log_prob(rm.model(tokens[None]))), abs=1e-6)
    hand = FrozenByHand(rm.model, [d.module for d in rm.dictionaries], tokens)
    cap = getattr(rm.model.cfg, "output_logits_soft_cap", None)

    def metric(hook: str, vectors: torch.Tensor) -> float:
        out = hand._run({hook: vectors}, hold=True)["unembed.hook_out"]
        out = cap * torch.tanh(out / cap) if cap and cap > 0 else out
        return float(log_prob(out[None]))

    for name_of_node in ("P0 token", "P3 token", "P5 token"):
        node = graph.node(name_of_node)
        step = torch.zeros(N, builders.D_MODEL, dtype=torch.float64)
        step[node.pos] = 1e-5 * hand.clean["hook_embed"][node.pos]
        slope = (metric("hook_embed", step) - metric("hook_embed", -step)) / 2e-5
        assert float(graph.adjacency[-1, node.id]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    whole = {f"P{p} token": float(graph.adjacency[-1, graph.node(f"P{p} token").id]) for p in range(N)}
    assert max(map(abs, whole.values())) > 1e-3  # negative control: there is something to differ from


def test_a_transformer_lens_metric_works_as_it_is():
    rm, tokens = cases.pair("gpt2"), cases.tokens(N)
    answers = torch.tensor([[5, 6]])

    def logit_diff(
        logits: torch.Tensor, answer_tokens: torch.Tensor = answers, per_prompt: bool = False
    ) -> torch.Tensor:
        final = logits[:, -1, :].gather(dim=-1, index=answer_tokens)
        diff = final[:, 0] - final[:, 1]
        return diff if per_prompt else diff.mean()

    a, b = cases.attribute(rm, tokens, logit_diff), cases.attribute(rm, tokens, cl.logit_difference(5, 6))
    assert float((a.adjacency - b.adjacency).abs().max()) < 1e-12
    with torch.inference_mode():
        answers = torch.tensor([[5, 6]])
        under = cases.attribute(rm, tokens, lambda logits: logit_diff(logits, torch.tensor([[5, 6]])))
    assert float((under.adjacency - b.adjacency).abs().max()) < 1e-12


BAD: list[tuple[Any, type[Exception], str]] = [
    ("Texas Dallas", TargetError, "is 2 tokens"),
    ("Texsa", TargetError, "nearest: Texas"),
    ("", TargetError, "0 tokens"),
    (64, TargetError, "outside the vocabulary of 64"),
    (-1, TargetError, "outside the vocabulary"),
    ([], TargetError, "no target"),
    (torch.ones(3), TargetError, r"cl\.direction"),
    (True, TargetError, "True is no target"),
    (object(), TargetError, "object is no target"),
    (cl.logit_difference(5, 99), TargetError, "outside the vocabulary"),
    (cl.logit_difference(5, 6, pos=N), TokenNotFoundError, "Position 6 does not exist"),
    (cl.logit_difference(5, 6, pos="Austin"), TokenNotFoundError, "no token 'Austin'"),
    (cl.direction(torch.ones(7)), TargetError, r"shape \(32,\), not \(7,\)"),
    (cl.direction(torch.full((32,), float("nan"))), TargetError, "NaN"),
    (cl.direction(torch.zeros(32)), TargetError, "zero"),
    (cl.Feature(0, 0, 10**6), NodeNotFoundError, "has features 0"),
    (cl.Feature(7, 0, 0), cl.DictionaryError, "no dictionary at layer 7"),
    (cl.Feature(0, 99, 0), TokenNotFoundError, "Position 99"),
    (lambda logits: 1.0, TargetError, "not float"),
    (lambda logits: logits, TargetError, "not shape"),
    (lambda logits: logits.sum().detach(), TargetError, "differentiable"),
    (lambda logits: logits.argmax(-1)[0, -1], TargetError, "differentiable"),
    (lambda logits: logits.sum() * 0, TargetError, "gradient is zero"),
    (lambda logits: logits.sum() * float("nan"), TargetError, "NaN"),
    (lambda logits: (logits[0, -1, 0] - logits[0, -1, 0]).sqrt(), TargetError, "NaN"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_what_is_no_target_is_refused(case):
    target, error, says = BAD[case]
    local = cases.local(cases.pair("gpt2"), cases.tokens(N))
    with pytest.raises(error, match=says):
        local.attribute(target, progress=False)
    assert local.attribute(5, progress=False).n_edges > 0


def test_token_logits_needs_a_token():
    with pytest.raises(cl.TargetError, match="at least one token"):
        cl.token_logits()


def test_limits_of_salient_logits_are_checked():
    for bad in ({"max_n": 0}, {"mass": 0.0}, {"mass": 1.5}):
        with pytest.raises(TargetError, match="must be"):
            cl.salient_logits(**bad)

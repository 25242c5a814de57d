"""The folded adjoints of frozen attention equal their definition, for every form of block (contract 5)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from circuit_lens.attribution.linear_maps import AttentionWeights, FrozenAttention, FrozenNorm, NormWeights

D_MODEL = 6


@st.composite
def blocks(draw: st.DrawFn) -> tuple[FrozenAttention, int, torch.Generator]:
    """Draw a frozen attention layer: grouped heads, centred and post-norms, linearised or not; rows sum to anything."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n_kv, group, d_head, n_pos = (draw(st.integers(1, high)) for high in (3, 3, 4, 7))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def norm() -> FrozenNorm:
        centered, linear = draw(st.booleans()), draw(st.booleans())
        x = 3 * randn(n_pos, D_MODEL)
        x = x - x.mean(-1, keepdim=True) if centered else x
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return FrozenNorm(NormWeights(centered, randn(D_MODEL), randn(D_MODEL)), scale, x / scale, linear)

    n_heads = n_kv * group
    weights = AttentionWeights(
        randn(n_kv, D_MODEL, d_head), randn(n_kv, d_head), randn(n_heads, d_head, D_MODEL), randn(D_MODEL)
    )
    pattern = randn(n_heads, n_pos, n_pos).tril()
    return FrozenAttention(weights, pattern, norm(), norm() if draw(st.booleans()) else None), n_pos, rng


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-11 * (1 + float(b.abs().max()))


@hypothesis.settings(max_examples=60)
@hypothesis.given(blocks(), st.integers(1, 3), st.data())
def test_adjoints_equal_their_definition_and_the_forward_map(block, n_target, data):
    attention, n_pos, rng = block
    n_query = data.draw(st.integers(1, n_pos))
    g = torch.randn(n_query, n_target, D_MODEL, generator=rng, dtype=torch.float64)
    pulled = attention.adjoint_definition(g)
    assert near(attention.adjoint(g.clone()), pulled)
    # <g, A x> = <A* g, x>: the definition is the adjoint of the map that the frozen pass applies.
    x = torch.randn(n_pos, D_MODEL, generator=rng, dtype=torch.float64)
    forwards = torch.einsum("qtd,qd->t", g, attention.linear(x)[:n_query])
    assert near(forwards, torch.einsum("ktd,kd->t", pulled, x[:n_query]))
    # One query position alone.
    pos = data.draw(st.integers(0, n_pos - 1))
    local = torch.randn(n_target, D_MODEL, generator=rng, dtype=torch.float64)
    embedded = torch.zeros(pos + 1, n_target, D_MODEL, dtype=torch.float64)
    embedded[pos] = local
    assert near(attention.adjoint_from(local, pos), attention.adjoint_definition(embedded))


@hypothesis.settings(max_examples=40)
@hypothesis.given(blocks())
def test_what_is_moved_and_what_heads_carry_sum_to_the_forward_map(block):
    attention, n_pos, rng = block
    x = torch.randn(n_pos, D_MODEL, generator=rng, dtype=torch.float64)
    whole = attention.linear(x)
    if attention.norm_out is None or not attention.norm_out.linear:
        table = attention.moved(x)
        assert near(table.sum(1), whole)
        assert bool((table[torch.ones(n_pos, n_pos).triu(1).bool()] == 0).all())
    g = torch.randn(D_MODEL, generator=rng, dtype=torch.float64)
    for pos in range(n_pos):
        assert near(attention.per_head(g, pos, x).sum(), whole[pos] @ g)


@hypothesis.settings(max_examples=40)
@hypothesis.given(blocks())
def test_a_linearised_norm_is_the_norms_jacobian_and_constant(block):
    norm = block[0].norm_in
    x = norm.normalized * norm.scale
    exact = torch.autograd.functional.jvp(lambda v: real(norm, v), x, torch.ones_like(x).cumsum(-1))[1]
    mine = FrozenNorm(norm.weights, norm.scale, norm.normalized, linear=True)
    assert near(mine.apply_output(torch.ones_like(x).cumsum(-1)), exact)
    for linear in (True, False):
        frozen = FrozenNorm(norm.weights, norm.scale, norm.normalized, linear=linear)
        assert near(frozen.apply_output(x) + frozen.constant_output(), real(norm, x))


def real(norm: FrozenNorm, x: Tensor) -> Tensor:
    """The norm itself, as models compute it."""
    x = x - x.mean(-1, keepdim=True) if norm.weights.centered else x
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weights.gain + norm.weights.bias


@pytest.mark.parametrize("wrong", ["pattern", "gain"])
def test_a_wrong_fold_is_seen(wrong):
    """Negative control: a folded map of other weights does not pass for the definition."""
    attention, n_pos, rng = hypothesis.find(blocks(), lambda b: b[1] > 2 and b[0].norm_out is not None)
    g = torch.randn(n_pos, 2, D_MODEL, generator=rng, dtype=torch.float64)
    assert near(attention.adjoint(g.clone()), attention.adjoint_definition(g))
    if wrong == "pattern":
        attention.pattern = attention.pattern * 1.001
    else:
        attention._to_resid = attention._to_resid * 1.001
    assert not near(attention.adjoint(g.clone()), attention.adjoint_definition(g))

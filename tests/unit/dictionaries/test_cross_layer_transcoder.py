"""A cross-layer transcoder's arithmetic equals its definition, and what cannot be one is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_lens.dictionaries import cross_layer_weights
from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.dictionaries.cross_layer_weights import keep_largest
from circuit_lens.errors import DictionaryError
from circuit_lens.protocols import Dictionary
from tests.invariants.cross_layer_builder import acts_by_hand, outputs_by_hand, weights


def inputs(n: int = 4, *, d: int = 32, seed: int = 9) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("chunk", [1, 37, 2**23])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_the_layers_sum_to_the_definition(activation, skip, chunk, monkeypatch):
    """Whatever the size of the chunks that matrices are taken in."""
    monkeypatch.setattr(cross_layer_weights, "CHUNK_NUMBERS", chunk)
    made, xs = weights(activation=activation, skip=skip), inputs()
    clt = CrossLayerTranscoder(**made)
    outputs = [torch.zeros(4, 32, dtype=torch.float64) for _ in range(3)]
    for layer, (d, x) in enumerate(zip(clt.dictionaries, xs, strict=True)):
        assert isinstance(d, Dictionary)
        acts = d.activate(d.pre_acts(x), x)
        assert torch.allclose(acts, acts_by_hand(made, layer, x), rtol=0, atol=1e-13)
        assert 0 < float((acts > 0).double().mean()) < 1
        for o, out in enumerate(d.decode(acts).unbind(-2)):
            outputs[layer + o] += out
        outputs[layer] += d.skip(x)
    for ours, wanted in zip(outputs, outputs_by_hand(made, xs), strict=True):
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)
    assert torch.equal(sum(d.decoder_bias(torch.float64)[0] for d in clt.dictionaries), sum(made["b_dec"]))


def test_a_layer_says_what_it_is():
    made = weights(activation="topk", skip=True)
    clt = CrossLayerTranscoder(**made)
    first, last = clt.dictionaries[0], clt.dictionaries[-1]
    assert (clt.n_layers, clt.d_sae, clt.d_in, clt.d_out, clt.dtype) == (3, 40, 32, 32, torch.float64)
    assert [d.site for d in clt.dictionaries] == made["hook_out"]
    assert first.out_layers == (0, 1, 2)
    assert last.out_layers == (2,)
    assert first.hooks_out == tuple(made["hook_out"])
    assert {d.joint for d in clt.dictionaries} == {"clt blocks.0.hook_mlp_out"}
    assert (first.kind, first.tangent, first.has_skip) == ("cross_layer_skip_topk", False, True)
    assert first.thresholds() is None
    assert torch.equal(CrossLayerTranscoder(**weights()).dictionaries[0].thresholds(), torch.zeros(40).double())
    assert "3 x 40 features" in repr(clt)
    assert "blocks.2" in repr(last)
    assert len({d.fingerprint() for d in clt.dictionaries}) == 3


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"])
def test_every_weight_is_in_the_fingerprint(name):
    made = weights(activation="jumprelu", skip=True)
    before = [d.fingerprint() for d in CrossLayerTranscoder(**made).dictionaries]
    assert before == [d.fingerprint() for d in CrossLayerTranscoder(**made).dictionaries]
    changed = made | {name: [made[name][0], made[name][1] * (1 + 1e-6), made[name][2]]}
    after = [d.fingerprint() for d in CrossLayerTranscoder(**changed).dictionaries]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_rows_are_those_of_the_given_features_in_their_order():
    made = weights()
    d = CrossLayerTranscoder(**made).dictionaries[1]
    index = torch.tensor([7, 2, 7, 39, 0, 2])
    assert torch.equal(d.encoder_rows(index, torch.float64), made["W_enc"][1].T[index])
    assert torch.equal(d.decoder_rows(index, torch.float64), made["W_dec"][1][index])
    assert torch.equal(d.encoder_bias(index, torch.float32), made["b_enc"][1][index].float())
    none = index[:0]
    assert d.decoder_rows(none, torch.float32).shape == (0, 2, 32)
    assert d.encoder_rows(none, torch.float32).shape == (0, 32)
    for bad in (-1, 40):
        with pytest.raises(DictionaryError, match=f"no feature {bad}; valid are 0 to 39"):
            d.decoder_rows(torch.tensor([3, bad]), torch.float32)


def test_moving_makes_a_new_one():
    made = weights(activation="jumprelu", skip=True)
    clt = CrossLayerTranscoder(**made, metadata={"from": "here"})
    half = clt.to(torch.bfloat16)
    assert (clt.dtype, half.dtype, half.metadata) == (torch.float64, torch.bfloat16, {"from": "here"})
    parts = half.dictionaries[0].parts
    assert {t.dtype for t in (parts.b_enc, parts.b_dec, parts.threshold, parts.W_skip)} == {torch.bfloat16}
    x = inputs()[0]
    assert half.dictionaries[0].pre_acts(x).dtype == torch.float64
    assert half.dictionaries[0].decode(half.dictionaries[0].pre_acts(x.float())).dtype == torch.float32
    assert torch.equal(clt.to(torch.float32).dictionaries[2].parts.b_enc, made["b_enc"][2].float())


# -------------------------------------------------------------------------------------------------------------- TopK


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=9, max_size=9), st.integers(1, 3))
def test_topk_keeps_k_of_the_largest_and_the_first_of_equal_ones(k, values, rows):
    acts = torch.tensor([values[i:] + values[:i] for i in range(rows)], dtype=torch.float64)
    kept = keep_largest(acts, k)
    for row, all_of_it in zip(kept, acts, strict=True):
        wanted = torch.zeros_like(all_of_it)
        order = sorted(range(9), key=lambda i: (-float(all_of_it[i]), i))[:k]
        wanted[order] = all_of_it[order]
        assert torch.equal(row, wanted)


def test_topk_never_keeps_a_negative_pre_activation():
    made = weights(activation="topk", k=12)
    made["b_enc"] = [b - 2.0 for b in made["b_enc"]]  # at most positions fewer than k are positive
    clt, x = CrossLayerTranscoder(**made), inputs(50)[0]
    d = clt.dictionaries[0]
    pre = d.pre_acts(x)
    acts = d.activate(pre, x)
    assert bool((pre.topk(12).values < 0).any())  # control: picks among pre-activations would be negative
    assert float(acts.min()) == 0.0
    assert torch.equal(acts > 0, pre > 0)


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("chunk", [50, 2**23])
def test_derivatives_are_those_of_the_dense_maps(chunk, monkeypatch):
    """Backward, forward, batched and second derivatives; at inactive features too."""
    monkeypatch.setattr(cross_layer_weights, "CHUNK_NUMBERS", chunk)
    made = weights(d=5, d_sae=7)
    d = CrossLayerTranscoder(**made).dictionaries[0]
    acts = torch.rand(2, 7, dtype=torch.float64) * torch.tensor([1, 0, 1, 0, 0, 1, 1])
    acts.requires_grad_()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for function, at in ((d.decode, acts), (d.pre_acts, x)):
        assert torch.autograd.gradcheck(function, (at,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t).square(), (at,))
    dense = torch.einsum("...f,fod->...od", acts, made["W_dec"][0])
    want = torch.autograd.grad(dense.square().sum(), acts)[0]
    plain = d.decode(acts) - d.decoder_bias(torch.float64)
    assert torch.allclose(torch.autograd.grad(plain.square().sum(), acts)[0], want)
    assert float(want[:, 1].abs().min()) > 0  # an inactive feature has a derivative


# ------------------------------------------------------------------------------------------------------------- errors


def bad(**changes: Any) -> dict[str, Any]:
    base = weights(activation=changes.pop("base", "relu"))
    return base | {k: v(base) if callable(v) else v for k, v in changes.items()}


BAD = [
    (bad(W_enc=[]), "one of each per layer"),
    (bad(b_enc=lambda m: m["b_enc"][:2]), "'b_enc': 2"),
    (bad(W_dec=lambda m: m["W_dec"][::-1]), r"decoders for 1 outputs, .* there are 3"),
    (bad(W_dec=lambda m: [w[:-1] for w in m["W_dec"]]), r"W_enc \[32, 40\] and W_dec \[39, 3, 32\]"),
    (bad(b_enc=lambda m: [b[:-1] for b in m["b_enc"]]), r"b_enc of .* has shape \(39,\), it must be \(40,\)"),
    (bad(b_dec=lambda m: [b[:, None] for b in m["b_dec"]]), r"b_dec of .* has shape \(32, 1\)"),
    (bad(W_skip=lambda m: [torch.zeros(32, 31)] * 3), r"W_skip of .* has shape \(32, 31\)"),
    (bad(W_enc=lambda m: [w.long() for w in m["W_enc"]]), "dtype torch.int64; weights must be floats"),
    (bad(W_dec=lambda m: [w * math.nan for w in m["W_dec"]]), "W_dec of layer 0 holds NaN or infinity"),
    (bad(W_enc=lambda m: [*m["W_enc"][:2], m["W_enc"][2] / 0]), "W_enc of layer 2 holds NaN or infinity"),
    (bad(b_enc=lambda m: [b * math.inf for b in m["b_enc"]]), "b_enc of .* holds NaN or infinity"),
    (bad(activation="jumprelu"), "needs threshold="),
    (bad(base="jumprelu", activation="relu"), "'relu' has no threshold="),
    (bad(activation="topk"), "needs k="),
    (bad(k=3), "'relu' has no k="),
    (bad(base="topk", k=41), "k=41 for 40 features"),
    (bad(base="topk", k=0), "valid are 1 to 40"),
    (bad(hook_in=["blocks.0.hook_resid_mid"] * 3), "the two must be of one block"),
    (bad(hook_in=lambda m: [h.replace("ln2.hook_normalized", "attn.hook_q") for h in m["hook_in"]]), "may read"),
    (bad(hook_out=lambda m: [h.replace("hook_mlp_out", "mlp.hook_pre") for h in m["hook_out"]]), "may write"),
    (bad(hook_out=["mlp_out"] * 3), "not of the form"),
    (
        bad(hook_in=lambda m: m["hook_in"][::-1], hook_out=lambda m: m["hook_out"][::-1]),
        "in ascending order",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_no_cross_layer_transcoder_is_refused(arguments, message):
    with pytest.raises(DictionaryError, match=message):
        CrossLayerTranscoder(**arguments)


def test_layers_of_other_widths_are_refused():
    made, other = weights(), weights(d_sae=41)
    mixed = {k: [other[k][0], *made[k][1:]] for k in ("W_enc", "b_enc", "W_dec")}
    with pytest.raises(DictionaryError, match="other widths"):
        CrossLayerTranscoder(**made | mixed)


def test_importing_it_does_not_import_sae_lens_and_an_unknown_activation_is_named():
    """In a process without checks of annotations, which would refuse the name first."""
    code = """
import sys, torch
from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.errors import DictionaryError
assert "sae_lens" not in sys.modules and "yaml" not in sys.modules
one = torch.ones(1)
try:
    CrossLayerTranscoder(W_enc=[one[None]], b_enc=[one], W_dec=[one[None, None]], b_dec=[one], activation="gelu",
                         hook_in=["blocks.0.hook_resid_mid"], hook_out=["blocks.0.hook_mlp_out"])
except DictionaryError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "activation 'gelu' is unknown; valid are relu, jumprelu, topk"

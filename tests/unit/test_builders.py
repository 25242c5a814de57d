"""The models and checks that the other tests stand on do what they say."""

from __future__ import annotations

import pytest
import torch

from tests import builders
from tests.builders import ARCHITECTURES, HOOKS_IN, KINDS, TRANSCODER_KINDS

DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_classes_compute_what_hugging_face_computes(name, kind, fold_ln):
    tokens = builders.random_tokens(20, batch=2)
    for dtype in DTYPES:
        with torch.no_grad():
            expected = builders.build_hf(name, dtype=dtype)(tokens).logits
            got = builders.build(name, kind, dtype=dtype, fold_ln=fold_ln)(tokens)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)  # Hugging Face's norms are float32 in any dtype


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norm_gains_and_windows_matter(name):
    """Negative control: a model whose norms have no gains, or whose last layer is another, computes something else."""
    tokens = builders.random_tokens(20)
    model = builders.build(name)
    with torch.no_grad():
        logits = model(tokens)
        assert (builders.build(name, seed=1)(tokens) - logits).abs().max() > 0.1
        model.blocks[1].ln2.w.fill_(1.0)
        assert (model(tokens) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", TRANSCODER_KINDS)
@pytest.mark.parametrize("model_kind", KINDS)
def test_transcoders_are_sparse_and_reconstruct(kind, model_kind):
    model = builders.build("gemma2", model_kind)
    tokens = builders.random_tokens(32, batch=4, seed=7)
    for layer, sae in enumerate(builders.transcoders(model, kind, l0=8)):
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized"
        assert sae.dtype == torch.float64
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
            x, y = cache[sae.cfg.metadata.hook_name], cache[sae.cfg.metadata.hook_name_out]
            l0 = (sae.encode(x) > 0).sum(-1).double().mean().item()
            fvu = ((y - sae(x)).pow(2).sum() / (y - y.mean((0, 1))).pow(2).sum()).item()
        assert 4 < l0 < 14
        assert fvu < 0.9


def test_hook_in_makes_a_difference():
    model = builders.build("llama")
    per_hook = {hook: builders.transcoders(model, hook_in=hook)[1] for hook in HOOKS_IN}
    assert {sae.cfg.metadata.hook_name for sae in per_hook.values()} == {f"blocks.1.{hook}" for hook in HOOKS_IN}
    assert torch.equal(per_hook["hook_mlp_in"].W_dec, per_hook["hook_resid_mid"].W_dec)
    assert not torch.allclose(per_hook["mlp.hook_in"].W_enc, per_hook["ln2.hook_normalized"].W_enc)
    with pytest.raises(ValueError, match="hook_resid_mid"):
        builders.transcoders(builders.build("pythia"), hook_in="hook_resid_mid")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_running_and_building_touch_nothing(name, kind, assert_untouched):
    model = builders.build(name, kind)
    saes = builders.transcoders(model)
    model.blocks[1].hook_mlp_out.add_hook(lambda x, hook: x)
    tokens = builders.random_tokens()
    with assert_untouched(model, *saes):
        with torch.no_grad():
            model(tokens)
            model.run_with_cache(tokens)
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: 2 * x)])
        builders.transcoders(model, "jumprelu_skip", hook_in="mlp.hook_in")


def _tiny_step(model):
    model.blocks[0].ln1.w.data[0] += 1e-12


def _hook(model):
    model.blocks[0].hook_mlp_out.add_hook(lambda x, hook: x)


def _swap_hook(model):
    model.blocks[1].hook_mlp_out.remove_hooks()
    model.blocks[1].hook_mlp_out.add_hook(lambda x, hook: x)


def _plain_torch_hook(model):
    model.blocks[0].ln2.register_forward_hook(lambda *_: None)


def _backward(model):
    model.requires_grad_(True)
    model(builders.random_tokens()).sum().backward()
    model.requires_grad_(False)


def _sub_hook_point(model):
    model.blocks[0].hook_mlp_out.add_module("features", torch.nn.Identity())


TOUCHES = {
    "a weight": _tiny_step,
    "a hook": _hook,
    "a user's hook replaced": _swap_hook,
    "a torch hook": _plain_torch_hook,
    "gradients": _backward,
    "a module": _sub_hook_point,
    "requires_grad": lambda model: model.requires_grad_(True),
    "one parameter's requires_grad": lambda model: next(torch.nn.Module.parameters(model)).requires_grad_(True),
    "training mode": lambda model: model.blocks[0].train(),
    "a flag": lambda model: model.set_use_hook_mlp_in(True),
    "the flag of attention results": lambda model: setattr(model.cfg, "use_attn_result", True),
    "the dtype": lambda model: model.float(),
    "torch's RNG": lambda model: torch.rand(1),
    "numpy's RNG": lambda model: __import__("numpy").random.rand(),
    "python's RNG": lambda model: __import__("random").random(),
    "the gradient mode": lambda model: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("touch", TOUCHES)
def test_every_touch_is_seen(touch, kind, assert_untouched):
    model = builders.build("llama", kind).requires_grad_(False)
    model.blocks[1].hook_mlp_out.add_hook(lambda x, hook: x)
    try:
        with pytest.raises(AssertionError, match="changed"), assert_untouched(model):
            TOUCHES[touch](model)
    finally:
        torch.set_grad_enabled(True)


def test_an_exception_passes_through_and_a_touch_before_it_is_seen(assert_untouched):
    model = builders.build("gpt2")
    with pytest.raises(RuntimeError, match="mine"), assert_untouched(model):
        raise RuntimeError("mine")
    with pytest.raises(AssertionError, match="changed"), assert_untouched(model):
        raise RuntimeError(_tiny_step(model))


def test_the_tokenizer_knows_its_words():
    for kind in KINDS:
        model = builders.build("gpt2", kind)
        tokens = model.to_tokens("the capital of Texas is Austin")
        assert model.to_str_tokens(tokens[0])[-1].strip() == "Austin"
        assert (tokens != builders.WORDS.index("<unk>")).all()
    assert len(builders.WORDS) == builders.D_VOCAB == len(set(builders.WORDS))

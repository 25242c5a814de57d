"""Which MLPs have neurons that can be attributed, how their parts are found, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from circuit_lens.dictionaries.neurons import NeuronDictionary, neurons
from circuit_lens.errors import DictionaryError, HookError
from circuit_lens.protocols import Dictionary
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

WIDTHS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def hooked(dtype: torch.dtype = torch.float64, **options: Any) -> HookedTransformer:
    """Return a small random HookedTransformer."""
    fields: dict[str, Any] = {
        "n_layers": 1, "d_model": 16, "n_ctx": 8, "d_head": 8, "n_heads": 2, "d_mlp": 24, "d_vocab": 16,
        "act_fn": "gelu", "normalization_type": "LN", "dtype": dtype, "device": "cpu", "seed": 0,
    }  # fmt: skip
    state = torch.get_rng_state()
    model = HookedTransformer(HookedTransformerConfig(**fields | options), tokenizer=None).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    torch.set_rng_state(state)
    return model


def bridge(hf_class: Any, config: Any, dtype: torch.dtype = torch.float64) -> TransformerBridge:
    """Return a small random TransformerBridge of another architecture than the builders'."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    hf = hf_class(config).eval()
    torch.set_rng_state(state)
    hf.config.architectures = [hf_class.__name__]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(8.0)
    return TransformerBridge.boot_transformers(
        "local/other", hf_model=hf.to(dtype), tokenizer=builders.tokenizer(), device="cpu", dtype=dtype
    )


def made(d: NeuronDictionary, x: Tensor) -> Tensor:
    return d.decode(d.activate(d.pre_acts(x), x))[..., 0, :].detach()


def inputs(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def gap(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def test_neurons_follow_the_protocol_and_say_what_they_are():
    model = cases.model("gemma2")
    found = neurons(model, layers=[2, 0])
    assert [d.layer for d in found] == [2, 0]
    for d in found:
        assert isinstance(d, Dictionary)
        assert (d.hook_in, d.site) == (f"blocks.{d.layer}.mlp.hook_in", f"blocks.{d.layer}.mlp.hook_out")
        assert (d.joint, d.hooks_out, d.out_layers, d.kind) == (d.site, (d.site,), (d.layer,), "neurons")
        assert (d.d_in, d.d_out, d.d_sae) == (builders.D_MODEL, builders.D_MODEL, builders.D_MLP)
        assert (d.thresholds(), d.skip_matrix(torch.float64), d.has_skip, d.tangent) == (None, None, False, False)
        assert not bool(d.skip(inputs(d.d_in)).any())
        assert "64 neurons, gate frozen" in repr(d)
    assert neurons(cases.model("gpt2"))[1].site == "blocks.1.hook_mlp_out"
    tangent = neurons(model, layers=[0], gate="tangent")[0]
    assert tangent.tangent
    assert tangent.fingerprint() != found[1].fingerprint()
    assert tangent.fingerprint() == neurons(model, layers=[0], gate="tangent")[0].fingerprint()
    assert neurons(model, layers=[]) == []


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
@pytest.mark.parametrize("fold", [False, True])
def test_weights_are_the_models_own_and_rows_are_what_the_arithmetic_uses(name, kind, fold):
    model = builders.build(name, kind, fold_ln=fold, n_layers=1)
    d = neurons(model)[0]
    x = inputs(d.d_in)
    assert gap(made(d, x), model.blocks[0].mlp(x)) < 1e-12
    index = torch.tensor([7, 0, 63])
    pre = x @ d.encoder_rows(index, torch.float64).T + d.encoder_bias(index, torch.float64)
    assert gap(pre, d.pre_acts(x)[..., index]) < 1e-12
    acts = d.activate(d.pre_acts(x), x)
    out = acts[..., index] @ d.decoder_rows(index, torch.float64)[:, 0]
    others = acts.clone()
    others[..., index] = 0
    assert gap(out, (d.decode(acts) - d.decode(others))[..., 0, :]) < 1e-11
    assert gap(d.decoder_bias(torch.float64)[0] + 1, d.decode(torch.zeros_like(acts))[0, 0, 0] + 1) < 1e-12
    pointers = [w.data_ptr() for w in d.weights.named().values()]
    assert pointers == [w.data_ptr() for w in neurons(model)[0].weights.named().values()]  # views, no copies
    with torch.no_grad():
        d.weights.W_in[:, 3] *= 2  # an edit of the model
    assert gap(made(d, x), model.blocks[0].mlp(x)) < 1e-12
    assert gap(d.pre_acts(x)[..., index], pre) == 0
    assert gap(d.pre_acts(x)[..., 3], model.blocks[0].mlp(x)[..., 3]) > 0.1  # control


def test_a_bias_that_is_added_to_the_gated_product_belongs_to_the_output_or_to_the_tangent():
    """A HookedTransformer adds b_in after gating."""
    model = hooked(gated_mlp=True, act_fn="silu")
    mlp, x = model.blocks[0].mlp, inputs(16)
    seen: list[Tensor] = []
    mlp.hook_post.add_hook(lambda value, hook: seen.append(value))
    own = mlp(x)
    mlp.hook_post.remove_hooks()
    frozen, tangent = (neurons(model, gate=gate)[0] for gate in ("frozen", "tangent"))
    assert gap(made(frozen, x), own) < 1e-12
    assert gap(made(tangent, x), own) < 1e-12
    assert gap(tangent.pre_acts(x), seen[0]) < 1e-12
    assert gap(frozen.activate(frozen.pre_acts(x), x) + mlp.b_in, seen[0]) < 1e-12
    assert gap(tangent.decoder_bias(torch.float64)[0], mlp.b_out) == 0
    assert gap(frozen.decoder_bias(torch.float64)[0], mlp.b_in @ mlp.W_out + mlp.b_out) < 1e-12
    index = torch.arange(5)
    rows, at = tangent.encoder_rows(index, torch.float64, at=x[0]), x[0]
    assert (
        gap((rows * at).sum(-1) + tangent.encoder_bias(index, torch.float64, at=at), seen[0][0, index, index]) < 1e-12
    )


@pytest.mark.parametrize(
    ("hf_class", "config"),
    [
        (transformers.Phi3ForCausalLM, transformers.Phi3Config(**WIDTHS, pad_token_id=0)),  # one matrix of both factors
        (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**WIDTHS)),
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(**WIDTHS, mlp_bias=True)),
        (transformers.Starcoder2ForCausalLM, transformers.Starcoder2Config(**WIDTHS)),
    ],
)
def test_other_architectures_reproduce_their_mlps(hf_class, config):
    model = bridge(hf_class, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                parameter.add_(torch.linspace(-1, 1, len(parameter)).to(parameter))
    d = neurons(model)[0]
    x = inputs(32)
    assert gap(made(d, x), model.blocks[0].mlp(x)) < 1e-12
    if config.model_type == "llama":
        assert set(d.weights.named()) == {"W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge"), ("llama", "hooked")])
def test_coarser_models_have_neurons_in_float32(name, kind, dtype):
    model = builders.build(name, kind, dtype=dtype, n_layers=1)
    d = neurons(model)[0]
    x = inputs(d.d_in, dtype)
    limit = {torch.float32: 1e-5}.get(dtype, 8e-2)
    out = made(d, x.float())
    assert out.dtype == torch.float32
    assert gap(out, model.blocks[0].mlp(x).float()) < limit
    assert d.encoder_rows(torch.arange(3), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "gelu_new", "silu", "gelu_fast", "relu2", "gelu_pytorch_tanh"])
def test_every_elementwise_activation_of_transformer_lens_is_found(act_fn):
    model = hooked(act_fn=act_fn)
    x = inputs(16)
    assert gap(made(neurons(model)[0], x), model.blocks[0].mlp(x)) < 1e-12


def test_a_wrong_formula_is_refused_with_what_was_found():
    model = hooked()
    model.blocks[0].mlp.act_fn = nn.functional.gelu
    neurons(model)

    def scaled(self: Any, x: Tensor) -> Tensor:
        return 1.001 * type(self).forward(self, x)

    mlp = model.blocks[0].mlp
    mlp.forward = scaled.__get__(mlp)
    with pytest.raises(DictionaryError, match=r"not all that its MLP does.*1.0e-03.*W_in \(16, 24\).*gelu"):
        neurons(model)
    del mlp.forward
    neurons(model)


def test_another_function_under_the_name_of_the_activation_is_not_taken():
    """The configuration's own is, where the module's does not reproduce it; where none does, that is said."""
    model = hooked(act_fn="silu")
    mlp = model.blocks[0].mlp
    mlp.act = torch.sin  # asked second
    assert neurons(model)[0]._activation is mlp.act_fn
    other = hooked(act_fn="silu")
    right = other.blocks[0].mlp.act_fn
    other.blocks[0].mlp.forward = lambda x: right(x @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
    for name in ("W_in", "b_in", "W_out", "b_out"):
        setattr(other.blocks[0].mlp, name, getattr(mlp, name))
    other.blocks[0].mlp.act_fn = torch.sin
    d = neurons(other)[0]
    assert d._activation is not torch.sin
    assert gap(made(d, inputs(16)), mlp(inputs(16))) < 1e-12


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"}, "mixture of experts.*4 exp"),
        ({"attn_only": True}, r"layer 0 has no MLP \(attn_only\)"),
        ({"act_fn": "solu_ln"}, "normalises its neurons"),
        ({"act_fn": "solu"}, "depends on the other neurons"),
    ],
)
def test_mlps_without_neurons_of_their_own_are_refused(options, match):
    with pytest.raises(DictionaryError, match=match):
        neurons(hooked(**options))


@pytest.mark.parametrize(
    ("hf_class", "config", "match"),
    [
        (
            transformers.MixtralForCausalLM,
            transformers.MixtralConfig(**WIDTHS, num_local_experts=4, num_experts_per_tok=2),
            "mixture of experts",
        ),
        (
            transformers.OPTForCausalLM,
            transformers.OPTConfig(
                vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=32,
            ),
            "another hook point than its MLP's output",
        ),
    ],
)  # fmt: skip
def test_bridges_whose_mlps_cannot_be_compared_are_refused(hf_class, config, match):
    with pytest.raises(DictionaryError, match=match):
        neurons(bridge(hf_class, config))


def test_dropout_at_work_is_refused_and_dropout_at_rest_is_not():
    model = builders.build("gpt2", "bridge", n_layers=1)
    dropout = next(m for m in nn.Module.modules(model.blocks[0].mlp) if isinstance(m, nn.Dropout))
    dropout.p = 0.1
    neurons(model)
    model.train()
    with pytest.raises(DictionaryError, match=r"drops values out \(p=0.1, train mode\).*model.eval"):
        neurons(model)
    model.eval()
    neurons(model)


def test_arguments_that_mean_nothing_are_refused():
    model = hooked()
    with pytest.raises(DictionaryError, match=r"layers=\[0, 1\]: the model has layers 0..0, not 1"):
        neurons(model, layers=[0, 1])
    with pytest.raises(DictionaryError, match=r"layers 0\.\.0, not -1"):
        neurons(model, layers=[-1])
    with pytest.raises(DictionaryError, match="names a layer twice"):
        neurons(model, layers=[0, 0])
    with pytest.raises(DictionaryError, match="has no gate"):
        neurons(model, gate="tangent")
    tangent = neurons(hooked(gated_mlp=True, act_fn="silu"), gate="tangent")[0]
    for method in (tangent.encoder_rows, tangent.encoder_bias):
        with pytest.raises(DictionaryError, match="with at="):
            method(torch.tensor([0]), torch.float64)
    rm = ReplacementModel(model, neurons(model))
    with rm.attached(), pytest.raises(HookError, match="attached"):
        neurons(model)


def test_wrong_kinds_of_argument_are_refused_by_name(unchecked_annotations):
    with pytest.raises(DictionaryError, match="Linear is no hooked model"):
        neurons(nn.Linear(2, 2))
    with pytest.raises(DictionaryError, match="gate='open' is not valid"):
        neurons(hooked(), gate="open")
    with pytest.raises(DictionaryError, match="not '0'"):
        neurons(hooked(), layers=["0"])


@pytest.fixture
def unchecked_annotations():
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_neurons_are_made_and_used_under_inference_mode_and_hooks_do_not_see_the_check():
    model = hooked(gated_mlp=True, act_fn="silu")
    seen: list[Tensor] = []
    model.add_perma_hook("blocks.0.mlp.hook_post", lambda value, hook: seen.append(value))
    model.add_perma_hook("blocks.0.mlp.hook_pre", lambda value, hook: value * 0)
    index = torch.arange(5)
    with torch.inference_mode():
        d = neurons(model, gate="tangent")[0]
        at = inputs(16)[0]
        rows = d.encoder_rows(index, torch.float64, at=at)
    assert not seen
    assert gap(rows, d.encoder_rows(index, torch.float64, at=inputs(16)[0])) == 0

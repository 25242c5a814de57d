"""Random-weight models of real architectures, transcoders for them, and the check that a model is left untouched.

Everything is offline and deterministic: the same name and seed give the same weights as a `HookedTransformer` and as a
`TransformerBridge`, and neither building nor asking draws from the global random number generators. The models are
small and awkward on purpose: norms have random gains and biases, keys and values have fewer heads than queries, heads
do not divide the width, windows are shorter than prompts, and only part of a head rotates.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights
from transformer_lens.pretrained.weight_conversions.qwen3 import convert_qwen3_weights

Architecture: TypeAlias = Literal["gpt2", "pythia", "llama", "qwen3", "gemma2"]
Kind: TypeAlias = Literal["hooked", "bridge"]
HookIn: TypeAlias = Literal["ln2.hook_normalized", "mlp.hook_in", "hook_mlp_in", "hook_resid_mid"]
TranscoderKind: TypeAlias = Literal["transcoder", "skip", "jumprelu", "jumprelu_skip"]
Model: TypeAlias = HookedTransformer | TransformerBridge

ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "pythia", "llama", "qwen3", "gemma2")
KINDS: tuple[Kind, ...] = ("hooked", "bridge")
HOOKS_IN: tuple[HookIn, ...] = ("ln2.hook_normalized", "mlp.hook_in", "hook_mlp_in", "hook_resid_mid")
TRANSCODER_KINDS: tuple[TranscoderKind, ...] = ("transcoder", "skip", "jumprelu", "jumprelu_skip")

D_MODEL, D_MLP, N_HEADS, N_KV_HEADS, N_CTX, D_VOCAB, WINDOW = 32, 64, 4, 2, 64, 64, 5
WORDS = (
    "<bos> <eos> <pad> <unk> Dallas Austin Texas Oakland Sacramento California Paris France Lyon Berlin Germany Munich "
    "the a of in is was and to that it he she on at by for with as state city capital country fact containing opposite "
    "small large hot cold day night up down old new good bad red blue one two three four five . , : ?"
).split()
"""The vocabulary of `tokenizer`: token i is word i, words are parted by spaces."""

_CONVERTERS = {
    "gpt2": convert_gpt2_weights,
    "pythia": convert_neox_weights,
    "llama": convert_llama_weights,
    "qwen3": convert_qwen3_weights,
    "gemma2": convert_gemma_weights,
}


# ---------------------------------------------------------------------------------------------------------- models


def build(
    name: Architecture,
    kind: Kind = "hooked",
    *,
    dtype: torch.dtype = torch.float64,
    n_layers: int = 3,
    fold_ln: bool = False,
    seed: int = 0,
) -> Model:
    """Return a fresh random model of the architecture, in evaluation mode.

    With ``fold_ln`` the norms' gains are folded into the weights behind them (what transcoders trained on unfolded
    models cannot be used with); nothing is centred in either case.
    """
    with _rng_kept():
        builder = _build_hooked if kind == "hooked" else _build_bridge
        return builder(name, dtype, n_layers, fold_ln, seed)


def build_hf(
    name: Architecture, *, dtype: torch.dtype = torch.float64, n_layers: int = 3, seed: int = 0
) -> transformers.PreTrainedModel:
    """Return the Hugging Face model that both classes of `build` are made from."""
    with _rng_kept():
        return _build_hf(name, n_layers, seed).to(dtype)


def random_tokens(n_pos: int = 12, *, batch: int = 1, seed: int = 0) -> Int[Tensor, "batch n_pos"]:
    """Return random tokens that are no special ones."""
    return torch.randint(4, D_VOCAB, (batch, n_pos), generator=torch.Generator().manual_seed(seed))


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Return a word-level tokenizer over `WORDS` that TransformerLens accepts.

    TransformerLens loads a tokenizer again from where it lies, so it has to lie on disk.
    """
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special)
    folder = tempfile.mkdtemp(prefix="circuit-lens-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def _hf_config(name: Architecture, n_layers: int) -> transformers.PreTrainedConfig:
    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=D_VOCAB, n_positions=N_CTX, n_embd=D_MODEL, n_layer=n_layers, n_head=N_HEADS, n_inner=D_MLP,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, tie_word_embeddings=False,
        )  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": D_VOCAB, "max_position_embeddings": N_CTX, "hidden_size": D_MODEL, "intermediate_size": D_MLP,
        "num_hidden_layers": n_layers, "num_attention_heads": N_HEADS,
    }  # fmt: skip
    if name == "pythia":
        return transformers.GPTNeoXConfig(**common, rotary_pct=0.5, use_parallel_residual=True)
    common |= {"num_key_value_heads": N_KV_HEADS}
    if name == "llama":
        return transformers.LlamaConfig(**common)
    if name == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=12, tie_word_embeddings=False)
    return transformers.Gemma2Config(
        **common, head_dim=12, query_pre_attn_scalar=10, sliding_window=WINDOW, attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    )  # fmt: skip


_HF_CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "pythia": transformers.GPTNeoXForCausalLM,
    "llama": transformers.LlamaForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
}


@functools.cache
def _hf_template(name: Architecture, n_layers: int, seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    hf = _HF_CLASSES[name](_hf_config(name, n_layers)).eval()
    hf.config.architectures = [type(hf).__name__]
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(8.0)
        hf.get_input_embeddings().weight.mul_(4.0)  # the token matters in every layer, as in a trained model
    return hf.requires_grad_(False)


def _build_hf(name: Architecture, n_layers: int, seed: int) -> transformers.PreTrainedModel:
    return copy.deepcopy(_hf_template(name, n_layers, seed))


def _hooked_config(name: Architecture, hf_config: Any, n_layers: int, dtype: torch.dtype) -> HookedTransformerConfig:
    d_head = getattr(hf_config, "head_dim", None) or D_MODEL // N_HEADS
    fields: dict[str, Any] = {
        "d_vocab": D_VOCAB, "n_ctx": N_CTX, "d_model": D_MODEL, "n_layers": n_layers, "n_heads": N_HEADS,
        "d_head": d_head, "d_mlp": D_MLP, "dtype": dtype, "device": "cpu", "model_name": name,
        "original_architecture": _HF_CLASSES[name].__name__,
    }  # fmt: skip
    if name == "gpt2":
        fields |= {"act_fn": "gelu_new", "normalization_type": "LN", "eps": hf_config.layer_norm_epsilon}
        return HookedTransformerConfig(**fields)
    fields |= {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}
    if name == "pythia":
        fields |= {
            "act_fn": "gelu", "normalization_type": "LN", "eps": hf_config.layer_norm_eps, "rotary_dim": d_head // 2,
            "parallel_attn_mlp": True,
        }  # fmt: skip
        return HookedTransformerConfig(**fields)
    fields |= {
        "n_key_value_heads": N_KV_HEADS, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
        "final_rms": True, "eps": hf_config.rms_norm_eps, "rotary_dim": d_head,
    }  # fmt: skip
    if name == "qwen3":
        fields |= {"use_qk_norm": True}
    if name == "gemma2":
        fields |= {
            "act_fn": "gelu_pytorch_tanh", "use_attn_scale": True,
            "attn_scale": hf_config.query_pre_attn_scalar**0.5, "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": hf_config.attn_logit_softcapping,
            "output_logits_soft_cap": hf_config.final_logit_softcapping, "use_local_attn": True,
            "window_size": hf_config.sliding_window,
            "attn_types": [("local", "global")[layer % 2] for layer in range(n_layers)],
        }  # fmt: skip
    return HookedTransformerConfig(**fields)


def _build_hooked(name: Architecture, dtype: torch.dtype, n_layers: int, fold_ln: bool, seed: int) -> HookedTransformer:
    hf = _build_hf(name, n_layers, seed).to(dtype)
    cfg = _hooked_config(name, hf.config, n_layers, dtype)
    state = _CONVERTERS[name](hf, cfg)
    if fold_ln:
        cfg.normalization_type = {"LN": "LNPre", "RMS": "RMSPre"}[str(cfg.normalization_type)]
    model = HookedTransformer(cfg, tokenizer=tokenizer())
    model.load_and_process_state_dict(
        state, fold_ln=fold_ln, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def _build_bridge(name: Architecture, dtype: torch.dtype, n_layers: int, fold_ln: bool, seed: int) -> TransformerBridge:
    hf = _build_hf(name, n_layers, seed).to(dtype)
    bridge = TransformerBridge.boot_transformers(
        f"local/{name}", hf_model=hf, tokenizer=tokenizer(), device="cpu", dtype=dtype
    )
    if fold_ln:
        bridge.enable_compatibility_mode(
            disable_warnings=True, fold_ln=True, center_writing_weights=False, center_unembed=False,
            fold_value_biases=False,
        )  # fmt: skip
    return bridge.eval()


# ----------------------------------------------------------------------------------------------------- transcoders


def transcoders(
    model: Model,
    kind: TranscoderKind = "transcoder",
    *,
    hook_in: HookIn = "ln2.hook_normalized",
    d_sae: int = 64,
    l0: float = 8.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Transcoder]:
    """Return one SAELens transcoder per layer, from ``hook_in`` to ``hook_mlp_out``, in the model's dtype.

    An encoder direction is a random position's input, whitened, with biases (and thresholds, for the JumpReLU kinds)
    set so that ``l0`` features are active at a position on average. Decoders, their bias and the skip are the ridge
    regression of the MLP's output on what the encoder gives, so that a check of the reconstruction passes for the
    right input and fails for a wrong one.
    """
    layers = range(model.cfg.n_layers) if layers is None else layers
    with _rng_kept(), torch.no_grad():
        captured = _mlp_inputs_and_outputs(model, hook_in, layers)
        return [
            _transcoder(kind, layer, hook_in, *captured[layer], d_sae=d_sae, l0=l0, seed=seed + 1000 * layer)
            for layer in layers
        ]


_TRANSCODERS: dict[TranscoderKind, tuple[type[Transcoder], type[TranscoderConfig]]] = {
    "transcoder": (Transcoder, TranscoderConfig),
    "skip": (SkipTranscoder, SkipTranscoderConfig),
    "jumprelu": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "jumprelu_skip": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
}


def _transcoder(
    kind: TranscoderKind,
    layer: int,
    hook_in: HookIn,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"],
    *,
    d_sae: int,
    l0: float,
    seed: int,
) -> Transcoder:
    rng = torch.Generator().manual_seed(seed)
    sae_class, config_class = _TRANSCODERS[kind]
    sae = sae_class(
        config_class(
            d_in=x.shape[1], d_out=y.shape[1], d_sae=d_sae, dtype=str(x.dtype).removeprefix("torch."), device="cpu",
            apply_b_dec_to_input=False,  # SAELens' default is True, which its transcoders refuse
            metadata=SAEMetadata(
                hook_name=f"blocks.{layer}.{hook_in}", hook_name_out=f"blocks.{layer}.hook_mlp_out",
                sae_lens_version="6.54.12",
            ),
        )
    )  # fmt: skip

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x64, y64 = x.double(), y.double()
    mean, spread = x64.mean(0), torch.linalg.pinv(x64.T.cov(), rtol=1e-6, hermitian=True)
    W_enc = spread @ (x64[torch.randint(len(x), (d_sae,), generator=rng)] - mean).T
    W_enc /= (x64 @ W_enc).std(0)
    b_enc = 0.1 * randn(d_sae) - mean @ W_enc
    pre = x64 @ W_enc + b_enc
    cut = pre.flatten().quantile(1 - l0 / d_sae)
    if isinstance(sae, JumpReLUTranscoder):
        sae.threshold.copy_((cut * (1 + 0.2 * randn(d_sae))).clamp(min=0.05))
    else:
        b_enc -= cut
    sae.W_enc.copy_(W_enc)
    sae.b_enc.copy_(b_enc)

    parts = [sae.encode(x).double(), torch.ones(len(x), 1, dtype=torch.float64)]
    if isinstance(sae, SkipTranscoder):
        parts.append(x64)
    design = torch.cat(parts, dim=1)
    ridge = 1e-3 * len(x) * torch.eye(design.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(design.T @ design + ridge, design.T @ y64)
    sae.W_dec.copy_(solution[:d_sae])
    sae.b_dec.copy_(solution[d_sae])
    if isinstance(sae, SkipTranscoder):
        sae.W_skip.copy_(solution[d_sae + 1 :].T)
    return sae.eval()


def _mlp_inputs_and_outputs(
    model: Model, hook_in: HookIn, layers: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]]:
    """Return what each layer's ``hook_in`` and ``hook_mlp_out`` carry on random text, whether or not the hook exists.

    ``mlp.hook_in`` is the norm's output and ``hook_mlp_in`` the norm's input, on every class and version.
    """
    caught: dict[tuple[int, str], Tensor] = {}
    if hook_in == "hook_resid_mid" and getattr(model.cfg, "parallel_attn_mlp", False):
        raise ValueError("blocks with parallel attention and MLP have no hook_resid_mid")
    with contextlib.ExitStack() as stack:
        for layer in layers:

            def keep(norm: nn.Module, inputs: tuple[Any, ...], out: Tensor, layer: int = layer) -> None:
                caught[layer, "norm_in"], caught[layer, "norm_out"] = inputs[0].detach(), out.detach()

            norm = model.blocks[layer].ln2
            assert isinstance(norm, nn.Module)
            stack.callback(norm.register_forward_hook(keep).remove)
        _, cache = model.run_with_cache(random_tokens(32, batch=48, seed=12345))
    pairs = {}
    for layer in layers:
        if hook_in == "ln2.hook_normalized":
            x = cache[f"blocks.{layer}.ln2.hook_normalized"]
        else:
            x = caught[layer, "norm_out" if hook_in == "mlp.hook_in" else "norm_in"]
        pairs[layer] = x.flatten(0, 1), cache[f"blocks.{layer}.hook_mlp_out"].flatten(0, 1)
    return pairs


# ----------------------------------------------------------------------------------------------- nothing is touched


@contextlib.contextmanager
def assert_untouched(model: nn.Module, *others: nn.Module | SAE[Any]) -> Iterator[None]:
    """Fail, naming the first differences, if the body changes a model or the process' global state (contract 7).

    Compared bit for bit, also when the body raises: parameters and buffers, ``requires_grad``, ``.grad``, dtype,
    device, training mode, modules, plain attributes and configurations (flags such as ``use_hook_mlp_in``), the hooks
    on every module and hook point by identity and order, the names of hook points, the global random number
    generators, the default dtype and the gradient modes.
    """
    modules = (model, *others)
    keepalive: list[Any] = []  # objects whose identity is compared must not die and lend their id to another
    before = _snapshot(modules, keepalive)
    try:
        yield
    finally:
        after = _snapshot(modules, keepalive)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if changed:
            lines = [
                f"  {key}: {before.get(key, 'absent')!s:.200} -> {after.get(key, 'absent')!s:.200}" for key in changed
            ]
            more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise AssertionError("the model or global state was changed:\n" + "\n".join(lines[:12]) + more)


def _snapshot(modules: Sequence[nn.Module], keepalive: list[Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {
        "torch RNG": _digest(torch.get_rng_state()),
        "numpy RNG": hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest(),  # noqa: NPY002
        "python RNG": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }

    def identity(thing: Any) -> tuple[str, int]:
        keepalive.append(thing)
        return type(thing).__name__, id(thing)

    for i, root in enumerate(modules):
        # torch's own walk: a bridge's methods of these names show a part only
        for path, module in nn.Module.named_modules(root, remove_duplicate=False):
            name = f"{i}:{path}"
            seen[f"{name} (module)"] = identity(module)
            seen[f"{name} (forward)"] = identity(vars(module)["forward"]) if "forward" in vars(module) else None
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                seen[f"{name}.{kind}"] = [(key, identity(hook)) for key, hook in getattr(module, kind).items()]
            for kind in ("fwd_hooks", "bwd_hooks"):
                seen[f"{name}.{kind}"] = [identity(handle) for handle in getattr(module, kind, ())]
            for attribute, value in list(vars(module).items()):
                if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
                    seen[f"{name}.{attribute}"] = value
                elif attribute in ("cfg", "config"):
                    seen |= {f"{name}.{attribute}.{k}": repr(v) for k, v in vars(value).items()}
            tensors = {**module._parameters, **module._buffers}
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    grad = None if tensor.grad is None else (identity(tensor.grad), _digest(tensor.grad))
                    seen[f"{name}.{attribute} (tensor)"] = (
                        identity(tensor), _digest(tensor), tuple(tensor.shape), tensor.dtype, str(tensor.device),
                        tensor.requires_grad, grad,
                    )  # fmt: skip
        hook_points = getattr(root, "hook_dict", {})
        seen[f"{i}:hook_dict"] = [(name, identity(point)) for name, point in hook_points.items()]
    return seen


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()


@contextlib.contextmanager
def _rng_kept() -> Iterator[None]:
    """Put the global random number generators back: libraries draw from them and set them while they build."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)

"""The slow tier: a real language model, and models larger than those of the other tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuit_lens as cl
from tests import builders

pytestmark = pytest.mark.slow


def stories(folder: Path, dtype: torch.dtype) -> HookedTransformer:
    """The stories260K model as a HookedTransformer; layout of its file: seven int32, then float32 arrays."""
    raw = (folder / "real_models/stories260K/stories260K.bin").read_bytes()
    width, hidden, n_layers, n_heads, n_kv, d_vocab, n_ctx = np.frombuffer(raw[:28], np.int32).tolist()
    numbers, at, d_head = torch.from_numpy(np.frombuffer(raw[28:], np.float32).copy()), 0, width // n_heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].view(shape)

    table, norm1 = take(d_vocab, width), take(n_layers, width)
    W_Q, W_K, W_V = (take(n_layers, n * d_head, width) for n in (n_heads, n_kv, n_kv))
    W_O, norm2 = take(n_layers, width, n_heads * d_head), take(n_layers, width)
    gate, W_out, W_in = take(n_layers, hidden, width), take(n_layers, width, hidden), take(n_layers, hidden, width)
    state = {"embed.W_E": table, "unembed.W_U": table.T, "ln_final.w": take(width), "unembed.b_U": torch.zeros(d_vocab)}
    for i in range(n_layers):
        state |= {f"blocks.{i}.ln1.w": norm1[i], f"blocks.{i}.ln2.w": norm2[i]}
        for name, weight, n in (("W_Q", W_Q, n_heads), ("_W_K", W_K, n_kv), ("_W_V", W_V, n_kv)):
            state[f"blocks.{i}.attn.{name}"] = weight[i].view(n, d_head, width).transpose(1, 2)
        state[f"blocks.{i}.attn.W_O"] = W_O[i].T.reshape(n_heads, d_head, width)
        state |= {f"blocks.{i}.mlp.W_gate": gate[i].T, f"blocks.{i}.mlp.W_in": W_in[i].T}
        state[f"blocks.{i}.mlp.W_out"] = W_out[i].T
    config = HookedTransformerConfig(
        n_layers=n_layers, d_model=width, n_ctx=n_ctx, d_head=d_head, n_heads=n_heads, n_key_value_heads=n_kv,
        d_mlp=hidden, d_vocab=d_vocab, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
        eps=1e-5, positional_embedding_type="rotary", rotary_adjacent_pairs=True, rotary_dim=d_head, dtype=dtype,
        device="cpu", model_name="stories260K",
    )  # fmt: skip
    model = HookedTransformer(config)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model.to(dtype).eval()


def conserves(graph: cl.AttributionGraph, limit: float) -> None:
    size = graph.adjacency.abs().sum(1) + graph.target_bias.abs()
    gap = (graph.adjacency.sum(1) + graph.target_bias - graph.target_value).abs()
    assert (gap <= limit * size.clamp_min(1e-30)).all()


def test_rows_of_a_real_model_conserve_and_equal_the_reference(data_folder):
    model = stories(data_folder, torch.float64)
    tokens = [1]
    for _ in range(48):  # its own greedy text
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    rm = cl.ReplacementModel(model, builders.transcoders(model, d_sae=256))
    graph = rm.attribute(tokens, min_explained=None)
    assert graph.manifest["engine"] == "fast"
    conserves(graph, 1e-10)
    reference = rm.attribute(tokens, min_explained=None, engine="reference", max_features=200)
    capped = rm.attribute(tokens, min_explained=None, max_features=200)
    assert torch.equal(reference.nodes.index, capped.nodes.index)
    gap = (reference.adjacency - capped.adjacency).abs().amax(1) / reference.adjacency.abs().amax(1)
    assert gap.max() < 1e-10


@pytest.mark.parametrize("kind", builders.KINDS)
@pytest.mark.parametrize("name", builders.ARCHITECTURES)
def test_deep_models_conserve_on_prompts_as_long_as_their_context(name, kind):
    model = builders.build(name, kind, n_layers=8)
    tokens = builders.random_tokens(model.cfg.n_ctx)[0]
    rm = cl.ReplacementModel(model, builders.transcoders(model, "jumprelu_skip"))
    graph = rm.attribute(tokens, min_explained=None, max_features=1500)
    assert graph.manifest["engine"] == "fast"
    conserves(graph, 1e-10)

"""The network that is trained: a small GPT in plain torch, and its exact conversion to a HookedTransformer.

RMSNorm without weights before attention, MLP and unembedding; rotary positions; GELU; no biases in attention; untied
unembedding. With ``trained_embedding=False`` the token embedding is random and never trained: it carries the identity
of a token and nothing else, so every association has to be computed by the blocks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformer_lens import HookedTransformerConfig

NORM_EPS = 1e-5
ROTARY_BASE = 10_000


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the network; ``n_ctx`` is the longest prompt of the shipped model in tokens."""

    d_vocab: int
    n_layers: int = 4
    d_model: int = 96
    n_heads: int = 3
    d_head: int = 32
    d_mlp: int = 384
    n_ctx: int = 64

    def hooked_config(self, name: str) -> HookedTransformerConfig:
        """The configuration of the HookedTransformer that computes the same function."""
        from transformer_lens import HookedTransformerConfig

        return HookedTransformerConfig(
            **asdict(self),
            model_name=name,
            act_fn="gelu_new",
            normalization_type="RMSPre",
            final_rms=True,
            eps=NORM_EPS,
            positional_embedding_type="rotary",
            rotary_dim=self.d_head,
            rotary_base=ROTARY_BASE,
            default_prepend_bos=True,
            tokenizer_prepends_bos=True,
            init_weights=False,
            device="cpu",
        )


def rms_norm(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """x / sqrt(mean(x^2) + eps)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)


def rotary_tables(n_pos: int, d_head: int) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), halves of the head paired."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, d_head // 2).float() * 2 / d_head)
    angles = torch.outer(torch.arange(n_pos).float(), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def attention_mask(n_pos: int, visible_until: Int[Tensor, "row pos"] | None) -> Bool[Tensor, "#row 1 query key"]:
    """True where a query position may attend to a key position: not later, and not hidden."""
    position = torch.arange(n_pos)
    causal = position[:, None] >= position[None, :]
    if visible_until is None:
        return causal[None, None]
    return (causal & (position[:, None] <= visible_until[:, None, :]))[:, None]


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual and adding to it."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.n_heads * shape.d_head
        self.qkv = nn.Linear(shape.d_model, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, shape.d_model, bias=False)
        self.mlp_in = nn.Linear(shape.d_model, shape.d_mlp)
        self.mlp_out = nn.Linear(shape.d_mlp, shape.d_model)
        for layer in (self.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=0.04)
        for layer in (self.attn_out, self.mlp_out):
            nn.init.normal_(layer.weight, std=0.04 / math.sqrt(2 * shape.n_layers))
        nn.init.zeros_(self.mlp_in.bias)
        nn.init.zeros_(self.mlp_out.bias)

    def attention(
        self,
        x: Float[Tensor, "row pos d_model"],
        tables: tuple[Float[Tensor, "n_ctx d_head"], Float[Tensor, "n_ctx d_head"]],
        mask: Bool[Tensor, "#row 1 query key"],
    ) -> Float[Tensor, "row pos d_model"]:
        """Attention with rotary positions where ``mask`` is True.

        Written out: on a CPU and at this size it is several times faster than the fused kernel's backward pass.
        """
        n_rows, n_pos, _ = x.shape
        cos, sin = (table[:n_pos].to(x.dtype) for table in tables)
        qkv = self.qkv(rms_norm(x)).view(n_rows, n_pos, 3, self.shape.n_heads, self.shape.d_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)

        def rotate(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat([-second, first], -1) * sin

        scores = rotate(query) @ rotate(key).transpose(-1, -2) / math.sqrt(self.shape.d_head)
        pattern = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
        mixed = pattern @ value
        return self.attn_out(mixed.transpose(1, 2).reshape(n_rows, n_pos, -1))

    def forward(
        self,
        x: Float[Tensor, "row pos d_model"],
        tables: tuple[Float[Tensor, "n_ctx d_head"], Float[Tensor, "n_ctx d_head"]],
        mask: Bool[Tensor, "#row 1 query key"],
    ) -> Float[Tensor, "row pos d_model"]:
        """The residual stream after this block."""
        x = x + self.attention(x, tables, mask)
        return x + self.mlp_out(F.gelu(self.mlp_in(rms_norm(x)), approximate="tanh"))


class SmallGPT(nn.Module):
    """The network; initialised from torch's global generator.

    ``embedding_seed`` fixes the random embedding apart from everything else; its entries have the standard deviation
    ``embedding_scale / sqrt(d_model)``.
    """

    def __init__(
        self, shape: ModelShape, *, trained_embedding: bool, embedding_seed: int, embedding_scale: float = 3.0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.d_vocab, shape.d_model)
        generator = torch.Generator().manual_seed(embedding_seed)
        std = embedding_scale / math.sqrt(shape.d_model)
        self.embed.weight.data = torch.randn(self.embed.weight.shape, generator=generator) * std
        self.embed.weight.requires_grad_(trained_embedding)
        self.layers = [Block(shape) for _ in range(shape.n_layers)]
        self.blocks = nn.ModuleList(self.layers)
        self.unembed = nn.Linear(shape.d_model, shape.d_vocab, bias=False)
        nn.init.normal_(self.unembed.weight, std=0.02)
        cos, sin = rotary_tables(shape.n_ctx, shape.d_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def residual(
        self, tokens: Int[Tensor, "row pos"], visible_until: Int[Tensor, "row pos"] | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        """The normalised residual stream after the last block; ``visible_until`` as in `Rows`."""
        mask = attention_mask(tokens.shape[1], visible_until)
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x, (self.cos, self.sin), mask)
        return rms_norm(x)

    def forward(
        self, tokens: Int[Tensor, "row pos"], visible_until: Int[Tensor, "row pos"] | None = None
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits."""
        return self.unembed(self.residual(tokens, visible_until))


def hooked_state(model: SmallGPT) -> dict[str, Tensor]:
    """The weights under the names and axes of a HookedTransformer, float32; zero biases where it wants some."""
    shape = model.shape
    heads = (shape.n_heads, shape.d_head)
    state = {
        "embed.W_E": model.embed.weight,
        "unembed.W_U": model.unembed.weight.T,
        "unembed.b_U": torch.zeros(shape.d_vocab),
    }
    for number, block in enumerate(model.layers):
        prefix = f"blocks.{number}"
        query_key_value = block.qkv.weight.view(3, *heads, shape.d_model).transpose(2, 3)
        for letter, weight in zip("QKV", query_key_value, strict=True):
            state[f"{prefix}.attn.W_{letter}"] = weight
            state[f"{prefix}.attn.b_{letter}"] = torch.zeros(heads)
        state |= {
            f"{prefix}.attn.W_O": block.attn_out.weight.T.reshape(*heads, shape.d_model),
            f"{prefix}.attn.b_O": torch.zeros(shape.d_model),
            f"{prefix}.mlp.W_in": block.mlp_in.weight.T,
            f"{prefix}.mlp.b_in": block.mlp_in.bias,
            f"{prefix}.mlp.W_out": block.mlp_out.weight.T,
            f"{prefix}.mlp.b_out": block.mlp_out.bias,
        }
    return {name: tensor.detach().float().clone().contiguous() for name, tensor in state.items()}

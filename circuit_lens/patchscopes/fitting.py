"""Fitting maps between residual streams by least squares: tuned lenses, maps between layers and between models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.given import require_model, whole
from circuit_lens.patchscopes.maps import Fitted, Pair, layer_pairs
from circuit_lens.patchscopes.streams import EMBEDDING, residual_streams
from circuit_lens.protocols import HookedModel
from circuit_lens.running import Prompt, plain_tensors, to_tokens

Kind = Literal["affine", "linear", "orthogonal"]
HELD_OUT = 10
"""Every tenth token is held out of the fit and tells what it explains; it takes two to have a variance."""


def fit_map(
    model: HookedModel,
    texts: Iterable[Prompt],
    *,
    target_model: HookedModel | None = None,
    pairs: Literal["same", "all", "last"] | Sequence[Pair] = "same",
    kind: Kind = "affine",
    skip: int = 1,
    progress: bool | None = None,
) -> Fitted:
    """Fit y = x A + b for pairs of layers, x the source's residual stream and y the target's at the same token.

    ``pairs="last"`` on one model is the affine shortcut to the last layer (a tuned lens fitted by least squares;
    Ghandeharioun et al. 2024, §3; Din et al. 2023); a ``target_model`` gives the maps of cross-model patching (§4.4
    there). Solved in float64 from streamed second moments; where the tokens do not span a direction, the solution of
    least norm is taken. Every tenth token is held out, and what the map explains of them is in ``explained``. Every
    token is attended, also one that the tokenizer calls padding, as in sources and targets.

    Args:
        model: The source model.
        texts: Prompts, text or ids. Both models read the same ids.
        target_model: The target model; None: the same.
        pairs: (source layer, target layer): the same layer, all of them, every one to the last, or these.
        kind: "affine": least squares; "linear": without b; "orthogonal": the rotation, and the shift of means, nearest
            by Procrustes (Schönemann 1966), for equal widths.
        skip: Positions left out at the start of each text: the first token's state is an outlier in most models.
        progress: Show a bar; None: in a terminal.

    Raises:
        PatchscopeError: Fewer than twenty tokens, a layer that is not there, models of different vocabularies, widths
            that a rotation cannot map, or something that is no model or list of texts.
        TokensError: A text that is no prompt.
        ConsistencyError: States that are NaN or infinite.
    """
    target = model if target_model is None else target_model
    require_model(model)
    require_model(target, "target_model")
    _require(model, target, kind, skip)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise PatchscopeError(f"texts={texts!r:.80} is one text, or none; give a list of them")
    found = layer_pairs(pairs, range(EMBEDDING, model.cfg.n_layers), range(EMBEDDING, target.cfg.n_layers))
    fit, held, counted = _Moments(found), _Moments(found), 0
    bar = tqdm(texts, desc="fitting", unit="text", disable=None if progress is None else not progress, leave=False)
    with plain_tensors():
        for text in bar:
            tokens = to_tokens(model, text)
            if len(tokens) <= skip:
                continue
            to_tokens(target, tokens)  # raises where the target's context or vocabulary is smaller
            xs = _streams(model, tokens, {a for a, _ in found}, skip)
            ys = _streams(target, tokens, {b for _, b in found}, skip)
            out = (counted + torch.arange(len(tokens) - skip)) % HELD_OUT == HELD_OUT - 1
            counted += len(out)
            fit.add(xs, ys, ~out)
            held.add(xs, ys, out)
        if held.n < 2:
            raise PatchscopeError(
                f"{counted} tokens are too few to fit a map and test it; give at least {2 * HELD_OUT}, better some "
                f"hundred times the width of {model.cfg.d_model}"
            )
        solved = {pair: fit.solve(pair, kind) for pair in found}
        explained = {pair: held.explained(pair, *solved[pair]) for pair in found}
    dtype = torch.promote_types(model.W_U.dtype, torch.float32)
    matrices = {pair: matrix.to(dtype) for pair, (matrix, _) in solved.items()}
    return Fitted(matrices, {pair: bias.to(dtype) for pair, (_, bias) in solved.items()}, explained, kind)


def same_vocabulary(a: HookedModel, b: HookedModel) -> bool:
    """Return whether two models' tokens are the same: by their tokenizers, or else by their number.

    Models of one family share a tokenizer, and pad their tables of tokens to different widths (Pythia).
    """
    if a is b:
        return True
    one, other = getattr(a, "tokenizer", None), getattr(b, "tokenizer", None)
    if one is None or other is None:
        return a.cfg.d_vocab == b.cfg.d_vocab
    return one is other or one.get_vocab() == other.get_vocab()


def _require(model: HookedModel, target: HookedModel, kind: str, skip: int) -> None:
    if kind not in ("affine", "linear", "orthogonal"):
        raise PatchscopeError(f"kind={kind!r} is not valid; give 'affine', 'linear' or 'orthogonal'")
    if whole(skip, "skip") < 0:
        raise PatchscopeError(f"skip={skip} is not valid; give the number of positions to leave out, 0 or more")
    if not same_vocabulary(model, target):
        raise PatchscopeError(
            f"the models have different vocabularies, of {model.cfg.d_vocab} and {target.cfg.d_vocab} tokens; a map is "
            "fitted on the same tokens in both"
        )
    if kind == "orthogonal" and model.cfg.d_model != target.cfg.d_model:
        raise PatchscopeError(
            f"a rotation keeps the width, but they are {model.cfg.d_model} and {target.cfg.d_model}; fit kind='affine'"
        )


def _streams(
    model: HookedModel, tokens: Int[Tensor, "n_pos"], layers: set[int], skip: int
) -> dict[int, Float[Tensor, "n d_model"]]:
    """Return the residual streams of a text after its first positions, in float64 on the CPU."""
    found = residual_streams(model, tokens, layers)
    return {layer: value[skip:].double().cpu() for layer, value in found.items()}


class _Moments:
    """Sums of x, y, x xᵀ, x yᵀ and |y|² over tokens; a layer's own are shared by all its pairs."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs, self.n = tuple(pairs), 0
        self.x: dict[int, Tensor] = {}
        self.y: dict[int, Tensor] = {}
        self.xx: dict[int, Tensor] = {}
        self.yy: dict[int, float] = {}
        self.xy: dict[Pair, Tensor] = {}

    def add(self, xs: dict[int, Tensor], ys: dict[int, Tensor], chosen: Tensor) -> None:
        """Add the chosen tokens of a text."""
        self.n += int(chosen.sum())
        for layer, value in xs.items():
            x = value[chosen]
            self.x[layer] = self.x.get(layer, 0.0) + x.sum(0)
            self.xx[layer] = self.xx.get(layer, 0.0) + x.T @ x
        for layer, value in ys.items():
            y = value[chosen]
            self.y[layer] = self.y.get(layer, 0.0) + y.sum(0)
            self.yy[layer] = self.yy.get(layer, 0.0) + float(y.square().sum())
        for a, b in self.pairs:
            self.xy[a, b] = self.xy.get((a, b), 0.0) + xs[a][chosen].T @ ys[b][chosen]

    def solve(self, pair: Pair, kind: Kind) -> tuple[Tensor, Tensor]:
        """Return A and b."""
        a, b = pair
        shift = 0.0 if kind == "linear" else 1.0
        mean_x, mean_y = self.x[a] / self.n, self.y[b] / self.n
        xy = self.xy[pair] - shift * self.n * torch.outer(mean_x, mean_y)
        if kind == "orthogonal":
            u, _, vh = torch.linalg.svd(xy)
            matrix = u @ vh
        else:
            xx = self.xx[a] - shift * self.n * torch.outer(mean_x, mean_x)
            values, vectors = torch.linalg.eigh(xx)
            # Second moments round by a share of the uncentred ones: what is below is no direction of the data.
            largest = max(float(values[-1]), self.n * float(mean_x.square().sum()))
            spanned = values > largest * len(values) * torch.finfo(torch.float64).eps
            inverse = torch.where(spanned, 1 / values, 0.0)
            matrix = vectors @ (inverse[:, None] * (vectors.T @ xy))
        return matrix, shift * (mean_y - mean_x @ matrix)

    def explained(self, pair: Pair, matrix: Tensor, bias: Tensor) -> float:
        """Return 1 - Σ|y - xA - b|² / Σ|y - mean y|² of these tokens."""
        a, b = pair
        mean_y = self.y[b] / self.n
        total = self.yy[b] - self.n * float(mean_y.square().sum())
        fitted = float(((self.xx[a] @ matrix) * matrix).sum()) + 2 * float(self.x[a] @ matrix @ bias)
        fitted += self.n * float(bias.square().sum())
        cross = float((self.xy[pair] * matrix).sum()) + float(self.y[b] @ bias)
        return 1.0 - (self.yy[b] - 2 * cross + fitted) / total if total > 0 else float("nan")

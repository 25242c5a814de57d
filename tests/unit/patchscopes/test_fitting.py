"""Fitting maps: known maps are found, and what is explained is what a direct computation says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.errors import PatchscopeError, TokensError
from circuit_lens.patchscopes import fit_map
from circuit_lens.patchscopes.fitting import HELD_OUT, _Moments, same_vocabulary
from circuit_lens.patchscopes.sources import residual_hook
from tests import builders
from tests.invariants import cases

D = 8


def moments(x: Tensor, y: Tensor) -> _Moments:
    found = _Moments(((0, 0),))
    for a, b in zip(x.split(13), y.split(13), strict=True):
        found.add({0: a}, {0: b}, torch.ones(len(a), dtype=torch.bool))
    return found


def data(n: int, spread: Tensor, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=rng, dtype=torch.float64) @ spread + 5.0


def test_a_known_affine_map_linear_map_and_rotation_are_found_exactly() -> None:
    rng = torch.Generator().manual_seed(2)
    matrix, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((D, 5), (5,)))
    x = data(100, torch.eye(D, dtype=torch.float64))
    found, shift = moments(x, x @ matrix + bias).solve((0, 0), "affine")
    torch.testing.assert_close((found, shift), (matrix, bias), rtol=1e-10, atol=1e-10)
    found, shift = moments(x, x @ matrix).solve((0, 0), "linear")
    torch.testing.assert_close((found, shift), (matrix, torch.zeros_like(bias)), rtol=1e-9, atol=1e-9)
    biased, _ = moments(x, x @ matrix + bias).solve((0, 0), "linear")
    assert float((biased - matrix).abs().max()) > 1e-3  # without b it cannot be right
    rotation = torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64)).Q
    found, shift = moments(x, x @ rotation + 3.0).solve((0, 0), "orthogonal")
    torch.testing.assert_close((found, shift), (rotation, torch.full((D,), 3.0).double()), rtol=1e-10, atol=1e-10)
    noisy = x @ rotation + torch.randn(x.shape, generator=rng, dtype=torch.float64)
    found, _ = moments(x, noisy).solve((0, 0), "orthogonal")
    torch.testing.assert_close(found.T @ found, torch.eye(D).double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_directions_that_the_tokens_do_not_span_get_no_weight_also_far_from_the_origin(offset: float) -> None:
    rng = torch.Generator().manual_seed(4)
    spread = torch.zeros(D, D, dtype=torch.float64)
    spread[:3] = torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64)).Q[:3]
    x = data(200, spread) + offset
    matrix = torch.randn(D, 5, generator=rng, dtype=torch.float64)
    found, shift = moments(x, x @ matrix).solve((0, 0), "affine")
    inside = spread[:3].T @ spread[:3]
    scale = 1e-10 * max(1.0, offset)
    torch.testing.assert_close(x @ found + shift, x @ matrix, rtol=1e-8, atol=scale * 100)
    torch.testing.assert_close(found, inside @ matrix, rtol=1e-6, atol=scale * 100)  # the solution of least norm


def streams(model: Any, text: Tensor, layer: int, skip: int) -> Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(text[None])
    return cache[residual_hook(layer)][0, skip:]


@pytest.mark.parametrize("kind", ["affine", "linear", "orthogonal"])
def test_a_fit_on_a_model_is_least_squares_and_explains_what_a_direct_computation_says(kind: Any) -> None:
    model, texts = cases.model("gpt2"), [cases.tokens(n, seed=n) for n in (20, 3, 31, 1, 25)]
    found = fit_map(model, texts, pairs=[(0, 2), (-1, 1)], kind=kind, skip=2, progress=False)
    assert found.kind == kind
    for (a, b), matrix in found.matrices.items():
        x, y = (torch.cat([streams(model, text, layer, 2) for text in texts if len(text) > 2]) for layer in (a, b))
        held = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
        bias = found.biases[a, b]
        if kind == "affine":
            design = torch.cat([x[~held], torch.ones(int((~held).sum()), 1, dtype=x.dtype)], 1)
            wanted = torch.linalg.lstsq(design, y[~held], driver="gelsd").solution
            torch.testing.assert_close(x @ matrix + bias, x @ wanted[:-1] + wanted[-1], rtol=1e-6, atol=1e-6)
        if kind == "linear":
            assert not bool(bias.any())
        left = (y[held] - x[held] @ matrix - bias).square().sum()
        share = 1 - float(left / (y[held] - y[held].mean(0)).square().sum())
        assert found.explained[a, b] == pytest.approx(share, abs=1e-7)
        assert share < 1.0


def test_what_cannot_be_fitted_is_refused() -> None:
    model, text = cases.model("gpt2"), cases.tokens(20)
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "0 tokens are too few"),
        ([text[:5]], {}, "4 tokens are too few"),
        ([text], {}, "19 tokens are too few.*at least 20"),  # one held-out token has no variance
        ([text], {"skip": 20}, "0 tokens are too few"),
        ([text], {"skip": -1}, "skip=-1"),
        ([text], {"pairs": [(0, 7)]}, "no map from layer 0 to 7"),
    ]
    for texts, options, words in bad:
        with pytest.raises(PatchscopeError, match=words):
            fit_map(model, texts, progress=False, **options)
    with pytest.raises(PatchscopeError, match="is one text, or none"):
        fit_map(model, "the city of Paris", progress=False)
    with pytest.raises(TokensError, match="does not know"):
        fit_map(model, ["the Zanzibar"], progress=False)


def test_vocabularies_are_the_tokenizers_and_else_their_sizes() -> None:
    model, other = builders.build("gpt2"), builders.build("llama")
    assert same_vocabulary(model, model)
    assert same_vocabulary(model, other)
    other.cfg.d_vocab += 8  # one tokenizer, another padding of its table
    assert same_vocabulary(model, other)
    other.tokenizer = None
    assert not same_vocabulary(model, other)
    other = builders.build("llama")
    other.tokenizer = copy.deepcopy(builders.tokenizer())
    assert same_vocabulary(model, other)
    other.tokenizer.add_tokens(["Zanzibar"])
    assert not same_vocabulary(model, other)
    with pytest.raises(PatchscopeError, match="different vocabularies"):
        fit_map(model, [cases.tokens(20)], target_model=other, progress=False)

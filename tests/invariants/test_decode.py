"""Decoding with a cache is decoding without one, on every architecture and model class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens import zoo
from circuit_lens.decoding import Decoded, decode, uncached
from circuit_lens.errors import ConsistencyError, TokensError
from circuit_lens.hooks import Hook, scoped_hooks
from tests import builders
from tests.builders import D_VOCAB, N_CTX, WINDOW, Architecture, Kind
from tests.invariants import cases

EDITED = (3, 14, 17)  # of the prompt, and of what was generated


def limit(name: Architecture, kind: Kind) -> float:
    return 1e-6 if kind == "bridge" and name in cases.RMS else 1e-10


def relative(a: Decoded, b: Decoded) -> float:
    return float((a.logits - b.logits).abs().max() / b.logits.abs().max())


def naive(model: Any, tokens: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
    """The definition: run everything, take the best, append."""
    kept = []
    for _ in range(n_new):
        with torch.no_grad():
            kept.append(model(tokens)[:, -1])
        tokens = torch.cat([tokens, kept[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(kept, 1)


def edits(model: Any, positions: tuple[int, ...]) -> Any:
    """A scope that adds to the residual stream at absolute positions, if they are run."""
    width = model.cfg.d_model
    direction = torch.randn(width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    @contextlib.contextmanager
    def scope(start: int, stop: int) -> Iterator[None]:
        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            for pos in positions:
                if start <= pos < stop:
                    x[:, pos - start] += 3.0 * direction.to(x)
            return x

        with scoped_hooks(model, [Hook("blocks.1.hook_resid_pre", edit)]):
            yield

    return scope


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_cached_is_uncached_is_the_definition_also_beyond_a_sliding_window(name: Architecture, kind: Kind) -> None:
    model = cases.model(name, kind)
    prompts = builders.random_tokens(14, batch=16, seed=3)
    assert prompts.shape[1] > 2 * WINDOW
    model(prompts[:1])  # a bridge wires its hooks in its first run
    with builders.assert_untouched(model):
        cached = decode(model, prompts, max_new_tokens=8, stop_at_eos=False)
        plain = decode(model, prompts, max_new_tokens=8, stop_at_eos=False, use_cache=False)
    assert cached.cached
    assert not cached.note
    assert not plain.cached
    assert relative(cached, plain) <= limit(name, kind)
    assert bool((cached.tokens == plain.tokens).all())
    tokens, logits = naive(model, prompts, 8)
    assert bool((cached.tokens == tokens).all())
    assert float((plain.logits - logits).abs().max() / logits.abs().max()) <= limit(name, kind)


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_edits_at_absolute_positions_and_a_shared_prefix_give_the_same_with_and_without_cache(
    name: Architecture, kind: Kind
) -> None:
    model = cases.model(name, kind)
    own = builders.random_tokens(14, batch=4, seed=9)
    prompts = torch.cat([own[:1, :6].expand(4, -1), own[:, 6:]], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_at_eos": False}
    both = edits(model, EDITED), edits(model, (8, 15))
    for scope, prefix in zip(both, (0, 6), strict=True):
        cached = decode(model, prompts, scope=scope, shared_prefix=prefix, **options)
        plain = decode(model, prompts, scope=scope, use_cache=False, **options)
        assert cached.cached, cached.note
        assert relative(cached, plain) <= limit(name, kind)
        assert bool((cached.tokens == plain.tokens).all())
        unedited = decode(model, prompts, **options)
        assert relative(cached, unedited) > 1e-3  # the edits are felt
        later = edits(model, (EDITED[-1] if scope is both[0] else 15,))
        assert relative(decode(model, prompts, scope=later, **options), unedited) > 1e-3  # also the generated one


def test_the_bundled_model_decodes_the_same_with_and_without_cache() -> None:
    model = zoo.load_model()
    texts = [
        f"Fact : the capital of the state containing {city} is"
        for city in ("Dallas", "Oakland", "Miami", "Seattle", "Chicago", "Houston", "Phoenix", "Detroit")
    ]
    prompts = torch.cat([model.to_tokens(text) for text in texts] * 2)
    cached, plain = (decode(model, prompts, max_new_tokens=5, use_cache=use) for use in (True, False))
    assert cached.cached
    assert relative(cached, plain) <= 1e-5  # float32
    assert bool((cached.tokens == plain.tokens).all())
    assert model.to_string(cached.rows()[0]).startswith("Austin")


# ------------------------------------------------------------------------------------------- a cache that does not fit


@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_hook_that_counts_positions_from_the_forwards_own_start_falls_back_and_is_named(kind: Kind) -> None:
    model = builders.build("gpt2", kind)
    prompts = builders.random_tokens(9, batch=2)

    def edit(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([2 * x[:, :1], x[:, 1:]], dim=1)

    model.add_hook("blocks.1.hook_resid_pre", edit)
    found = decode(model, prompts, max_new_tokens=4, stop_at_eos=False)
    assert not found.cached
    assert "from new token 1 on" in found.note
    plain = decode(model, prompts, max_new_tokens=4, stop_at_eos=False, use_cache=False)
    assert relative(found, plain) == 0.0
    wrong = decode(model, prompts, max_new_tokens=4, stop_at_eos=False, check=False)
    assert relative(wrong, plain) > 1e-3  # what the check is for


def test_a_scope_that_changes_the_shared_prefix_falls_back() -> None:
    model = cases.model("llama")
    prompts = builders.random_tokens(9, batch=1).expand(3, -1)
    scope = edits(model, (2,))
    found = decode(model, prompts, max_new_tokens=3, scope=scope, shared_prefix=5)
    assert "from new token 0 on" in found.note
    assert relative(found, decode(model, prompts, max_new_tokens=3, scope=scope, use_cache=False)) == 0.0


def test_a_model_with_layers_that_keep_no_keys_is_run_without_cache() -> None:
    bridge = builders.build("llama", "bridge")
    bridge.original_model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    found = decode(bridge, builders.random_tokens(5), max_new_tokens=2, stop_at_eos=False)
    assert not found.cached
    assert "linear_attention" in found.note


def test_the_scope_sees_the_prompt_then_one_position_at_a_time_and_without_cache_everything() -> None:
    model, seen = cases.model("gpt2"), []

    def scope(start: int, stop: int) -> Any:
        seen.append((start, stop))
        return contextlib.nullcontext()

    prompts = builders.random_tokens(5)
    options: dict[str, Any] = {"max_new_tokens": 3, "scope": scope, "stop_at_eos": False}
    decode(model, prompts, check=False, **options)
    assert seen == [(0, 5), (5, 6), (6, 7)]
    seen.clear()
    decode(model, prompts, **options)
    assert seen == [(0, 5), (5, 6), (6, 7), (0, 7)]  # the check
    seen.clear()
    decode(model, prompts, use_cache=False, **options)
    assert seen == [(0, 5), (0, 6), (0, 7)]
    seen.clear()
    decode(model, prompts, check=False, shared_prefix=3, **options)
    assert seen == [(3, 5), (5, 6), (6, 7)]


# ---------------------------------------------------------------------------------------------------- choosing tokens


def test_of_equally_probable_tokens_the_lower_id_is_taken() -> None:
    model = builders.build("gpt2")
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.b_U.zero_()
        model.unembed.b_U[[7, 3, 40]] = 1.0
    assert decode(model, builders.random_tokens(4, batch=2), max_new_tokens=2).new_tokens.tolist() == [[3, 3]] * 2
    sampled = decode(model, builders.random_tokens(4), max_new_tokens=20, temperature=0.01, top_k=2)
    assert set(sampled.new_tokens.flatten().tolist()) == {3, 7}


def test_samples_depend_on_the_seed_and_the_row_alone_and_not_on_the_cache_or_global_state() -> None:
    model = cases.model("pythia")
    prompts = builders.random_tokens(6).expand(4, -1)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.5, "stop_at_eos": False}
    torch.manual_seed(1)
    one = decode(model, prompts, **options).tokens
    torch.manual_seed(2)
    assert bool((decode(model, prompts, use_cache=False, **options).tokens == one).all())
    assert bool((decode(model, prompts[:2], **options).tokens == one[:2]).all())
    assert len({tuple(row) for row in one.tolist()}) == 4
    assert not bool((decode(model, prompts, seed=1, **options).tokens == one).all())
    greedy = decode(model, prompts, max_new_tokens=6, stop_at_eos=False).tokens
    assert bool((decode(model, prompts, top_k=1, **options).tokens == greedy).all())


def test_samples_follow_the_models_probabilities() -> None:
    model = cases.model("gpt2")
    prompts = builders.random_tokens(4, seed=2).expand(2000, -1)
    found = decode(model, prompts, max_new_tokens=1, temperature=2.0, check=False)
    wanted = torch.softmax(found.logits[0, 0] / 2.0, -1)
    seen = torch.bincount(found.new_tokens[:, 0], minlength=D_VOCAB) / 2000
    assert float((seen - wanted).abs().sum()) < 0.2
    assert float((seen - torch.softmax(found.logits[0, 0] / 8.0, -1)).abs().sum()) > 0.3


def test_a_row_ends_at_the_end_of_its_sequence_and_the_others_go_on() -> None:
    model = builders.build("llama")
    prompts = builders.random_tokens(6, batch=3, seed=1)
    free = decode(model, prompts, max_new_tokens=8)
    eos = int(free.new_tokens[0, 2])
    model.tokenizer = SimpleNamespace(eos_token_id=eos, padding_side="right")
    for use_cache in (True, False):
        found = decode(model, prompts, max_new_tokens=8, use_cache=use_cache)
        for row, length, whole in zip(found.new_tokens, found.lengths.tolist(), free.new_tokens, strict=True):
            first = whole.tolist().index(eos) + 1 if eos in whole.tolist() else 8
            assert length == first
            assert row[:length].tolist() == whole[:length].tolist()
            assert set(row[length:].tolist()) <= {eos}
        assert [len(row) for row in found.rows()] == found.lengths.tolist()
    alone = decode(model, prompts[:1], max_new_tokens=8)
    assert alone.new_tokens.shape[1] == int(alone.lengths[0]) <= 3  # nothing is run after the last row's end
    assert decode(model, prompts[:1], max_new_tokens=8, stop_at_eos=False).new_tokens.shape[1] == 8


# --------------------------------------------------------------------------------------------------- without tokenizer


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "hooked"), ("gpt2", "bridge")])
def test_without_a_tokenizer_the_tokens_are_the_same(name: Architecture, kind: Kind) -> None:
    model = builders.build(name, kind)
    prompts = builders.random_tokens(6, batch=2)
    before = decode(model, prompts, max_new_tokens=5, stop_at_eos=False).tokens
    model.tokenizer = None
    found = decode(model, prompts, max_new_tokens=5)
    assert found.cached
    assert bool((found.tokens == before).all())


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_context_is_used_to_its_last_position_and_no_further(with_tokenizer: bool) -> None:
    model = builders.build("gpt2")
    if not with_tokenizer:
        model.tokenizer = None
    prompts = builders.random_tokens(N_CTX - 3)
    found = decode(model, prompts, max_new_tokens=4, stop_at_eos=False)
    assert found.tokens.shape == (1, N_CTX + 1)  # the last one is written, not read
    with pytest.raises(TokensError, match=f"need {N_CTX + 1} positions.*holds {N_CTX}; give max_new_tokens <= 4"):
        decode(model, prompts, max_new_tokens=5)


def test_what_cannot_be_decoded_is_refused() -> None:
    model, prompts = cases.model("gpt2"), builders.random_tokens(5, batch=2)
    for options, words in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 1, "temperature": 1.0, "top_k": 0}, "top_k"),
        ({"max_new_tokens": 1, "shared_prefix": 5}, "0 to 4"),
        ({"max_new_tokens": 1, "shared_prefix": 2}, "not the same in all rows"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(model, prompts, **options)
    with pytest.raises(TokensError, match="n_rows, n_pos"):
        decode(model, prompts[:0], max_new_tokens=1)
    with pytest.raises(TokensError, match="outside the vocabulary"):
        decode(model, prompts + D_VOCAB, max_new_tokens=1)
    broken = builders.build("gpt2")
    broken.add_hook("blocks.2.hook_resid_post", lambda x, hook: x * float("nan"))
    with pytest.raises(ConsistencyError, match="NaN"):
        decode(broken, prompts, max_new_tokens=1)


def test_it_works_under_inference_mode_and_its_tensors_can_be_used_by_autograd_later() -> None:
    model = cases.model("llama")
    with torch.inference_mode():
        found = decode(model, builders.random_tokens(5), max_new_tokens=2)
    assert not found.logits.is_inference()
    assert not found.tokens.is_inference()
    assert not found.logits.requires_grad


# ------------------------------------------------------------------------------------------- logits of the first alone


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "hooked"), ("llama", "bridge")])
def test_keeping_the_first_logits_alone_changes_neither_them_nor_what_is_written(
    name: Architecture, kind: Kind
) -> None:
    model = cases.model(name, kind)
    own = builders.random_tokens(14, batch=4, seed=9)
    for scope, prefix, n_new in ((edits(model, (8, 13, 15)), 6, 4), (edits(model, (13,)), 13, 1), (None, 0, 3)):
        prompts = torch.cat([own[:1, :prefix].expand(4, -1), own[:, prefix:]], dim=1)
        options: dict[str, Any] = {"max_new_tokens": n_new, "scope": scope, "stop_at_eos": False, "check": False}
        every = decode(model, prompts, shared_prefix=prefix, **options)
        for use_cache in (True, False):
            first = decode(
                model, prompts, shared_prefix=prefix, use_cache=use_cache, keep_logits="first", **options
            )  # fmt: skip
            assert first.cached is use_cache
            assert first.logits.shape == (4, 1, D_VOCAB)
            gap = (first.logits - every.logits[:, :1]).abs().max() / every.logits.abs().max()
            assert float(gap) <= limit(name, kind)
            assert bool((first.tokens == every.tokens).all())
            assert bool((first.lengths == every.lengths).all())
        if scope is not None:
            plain = decode(model, prompts, max_new_tokens=1, stop_at_eos=False).logits
            assert float((every.logits[:, :1] - plain).abs().max()) > 1e-3  # the edits are felt


def test_keeping_the_first_logits_alone_runs_the_last_position_of_the_prompt_by_itself_and_checks_nothing() -> None:
    model, seen = cases.model("gpt2"), []

    def scope(start: int, stop: int) -> Any:
        seen.append((start, stop))
        return contextlib.nullcontext()

    options: dict[str, Any] = {"max_new_tokens": 2, "scope": scope, "stop_at_eos": False, "keep_logits": "first"}
    decode(model, builders.random_tokens(5), check=False, **options)
    assert seen == [(0, 4), (4, 5), (5, 6)]
    seen.clear()
    decode(model, builders.random_tokens(5), check=False, shared_prefix=4, **options)
    assert seen == [(4, 5), (5, 6)]
    seen.clear()
    decode(model, builders.random_tokens(1), check=False, **options)
    assert seen == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match="keep_logits='all' or check=False"):
        decode(model, builders.random_tokens(5), **options)


@pytest.mark.parametrize("kind", builders.KINDS)
def test_filling_a_cache_makes_few_logits_or_none(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = cases.model("llama", kind), []
    forward = type(model.unembed).forward

    def count(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made.append(x.shape[-2])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model.unembed), "forward", count)
    prompts = builders.random_tokens(9, batch=2)
    decode(model, prompts, max_new_tokens=2, check=False, keep_logits="first", stop_at_eos=False)
    assert sum(made) <= 3  # a bridge makes those of one position
    made.clear()
    decode(model, prompts, max_new_tokens=2, check=False, stop_at_eos=False)
    assert sum(made) == 10


@pytest.mark.parametrize("name", builders.ARCHITECTURES)
@pytest.mark.parametrize("kind", builders.KINDS)
def test_logits_of_the_last_positions_alone_are_those_of_all(name: Architecture, kind: Kind) -> None:
    model, tokens = cases.model(name, kind), builders.random_tokens(9, batch=2)
    with torch.no_grad():
        whole = uncached(model, tokens)
        for last in (1, 4, 9):
            part = uncached(model, tokens, last=last)
            assert part.shape == (2, last, whole.shape[-1])
            assert float((part - whole[:, -last:]).abs().max() / whole.abs().max()) <= limit(name, kind)
    assert float((whole[:, -1] - whole[:, -2]).abs().max()) > 1e-3

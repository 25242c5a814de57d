"""Sources: positions of prompts, caches, and vectors of any kind."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import CacheError, ConsistencyError, PatchscopeError, TokenNotFoundError, TokensError
from circuit_lens.patchscopes import sources
from circuit_lens.patchscopes.given import places
from circuit_lens.patchscopes.patchscope import as_vectors
from tests import builders
from tests.invariants import cases

TEXT = "the capital of Texas is in the city of Paris"


def test_positions_are_numbers_or_the_text_of_one_token_and_name_the_item() -> None:
    model = cases.model("gpt2")
    for pos, which, at, name in ((-1, None, -1, "Paris"), ("Texas", None, "Texas", "Texas"), ("of", "last", -2, "of")):
        tokens, positions, found = cl.At(TEXT, pos=pos, which=which).resolve(model)
        strings = [builders.WORDS[i] for i in tokens.tolist()]
        assert positions[0] == (strings.index(at) if isinstance(at, str) else len(strings) + at)
        assert found == name
    assert cl.At(TEXT, name="mine").resolve(model)[2] == "mine"
    assert len(cl.At(TEXT, pos=("Texas", -1)).resolve(model)[1]) == 2


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        (cl.At(TEXT, pos="of"), TokenNotFoundError, "occurs 2 times"),
        (cl.At(TEXT, pos="Berlin"), TokenNotFoundError, "no token 'Berlin'"),
        (cl.At(TEXT, pos=99), TokenNotFoundError, "Position 99"),
        (cl.At(TEXT, pos=()), PatchscopeError, "names no position"),
        (cl.At("the Zanzibar"), TokensError, "does not know 'Zanzibar'"),
        (cl.At(""), TokensError, "empty"),
        (cl.At([1, 10_000]), TokensError, "outside the vocabulary"),
        (cl.At(torch.tensor(3)), TokensError, "shape"),
        (cl.At([5] * 100), TokensError, "context holds 64"),
    ],
)
def test_a_position_that_is_not_there_is_refused(at: cl.At, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cl.Vectors.from_prompts(cases.model("gpt2"), at)


def test_items_of_many_lengths_keep_their_order_and_are_those_of_single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model("llama")
    many = [cl.At(cases.tokens(n, seed=i), pos=i % n, name=str(i)) for i, n in enumerate((3, 1, 7, 3, 7, 2, 3))]
    together = cl.Vectors.from_prompts(model, (one for one in many))  # a generator
    assert together.names == tuple(map(str, range(7)))
    for size in (64, 2):
        monkeypatch.setattr(sources, "BATCH", size)
        for i, one in enumerate(many):
            alone = cl.Vectors.from_prompts(model, one)
            for a, b in ((together.values[i], alone.values[0]), (together.next_logits, alone.next_logits)):
                assert a is not None
                assert b is not None
                a = a if a.ndim == 3 else a[i]
                torch.testing.assert_close(a, b if b.ndim == 3 else b[0], rtol=1e-9, atol=1e-9)
            assert int(together.tokens[i]) == int(one.prompt[i % len(one.prompt)])


def test_prompts_with_large_logits_run_in_smaller_batches() -> None:
    found = [(torch.zeros(100), (0,), "")] * 5 + [(torch.zeros(2), (0,), "")]
    assert sources._batches(found, lambda n_pos: 1000 // n_pos) == [[0, 1, 2, 3, 4], [5]]
    assert sources._batches(found, lambda n_pos: 299 // n_pos) == [[0, 1], [2, 3], [4], [5]]
    assert sources._batches(found, lambda n_pos: 0) == [[0], [1], [2], [3], [4], [5]]


def test_layers_and_positions_must_be_there_and_states_finite() -> None:
    model = cases.model("gpt2")
    with pytest.raises(PatchscopeError, match="source layer 3 does not exist; the model has layers -1 to 2"):
        cl.Vectors.from_prompts(model, cl.At([5]), layers=[0, 3])
    with pytest.raises(PatchscopeError, match="no source positions"):
        cl.Vectors.from_prompts(model, [])
    with pytest.raises(PatchscopeError, match=r"\[1, 2\] positions each"):
        cl.Vectors.from_prompts(model, [cl.At([5, 6]), cl.At([5, 6], pos=(0, 1))])
    broken = builders.build("gpt2")
    broken.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * float("nan"))
    with pytest.raises(ConsistencyError, match="states holds NaN"):
        cl.Vectors.from_prompts(broken, cl.At([5]))


def test_a_cache_must_hold_one_prompts_residual_streams() -> None:
    stream = torch.randn(1, 4, 8)
    held = {"blocks.10.hook_resid_post": stream, "blocks.2.hook_resid_post": stream[0]}
    vectors = cl.Vectors.from_cache(held, (0, -1))
    assert vectors.layers == (2, 10)
    assert vectors.names == ("P0", "P3")
    assert vectors.values.shape == (2, 2, 1, 8)
    vectors.values.zero_()
    assert bool(stream.any())  # a copy
    cases_: list[tuple[dict[str, torch.Tensor], type[Exception], str]] = [
        ({}, CacheError, "no residual stream"),
        ({"blocks.0.hook_mlp_out": stream}, CacheError, "among its 1 entries"),
        ({"blocks.0.hook_resid_post": torch.zeros(2, 4, 8)}, CacheError, "one prompt at a time"),
        ({"blocks.0.hook_resid_post": stream, "blocks.1.hook_resid_post": stream[:, 1:]}, CacheError, "several shapes"),
        ({"blocks.0.hook_resid_post": stream * torch.nan}, PatchscopeError, "NaN"),
    ]
    for cache, error, words in cases_:
        with pytest.raises(error, match=words):
            cl.Vectors.from_cache(cache)
    good = {"blocks.0.hook_resid_post": stream}
    with pytest.raises(PatchscopeError, match="position 4"):
        cl.Vectors.from_cache(good, 4)
    with pytest.raises(PatchscopeError, match="no position"):
        cl.Vectors.from_cache(good, ())
    with pytest.raises(PatchscopeError, match="3 tokens"):
        cl.Vectors.from_cache(good, tokens=torch.arange(3))


def test_vectors_of_any_kind_belong_to_no_layer_and_must_be_vectors() -> None:
    given = torch.randn(3, 8)
    vectors = cl.Vectors.of(given)
    assert (vectors.layers, vectors.names, vectors.values.shape) == (None, ("v0", "v1", "v2"), (3, 1, 1, 8))
    given.zero_()
    assert bool(vectors.values.any())  # a copy
    assert cl.Vectors.of(torch.ones(8)).values.shape == (1, 1, 1, 8)
    bad = (torch.tensor(1.0), torch.zeros(2, 2, 2), torch.ones(3, dtype=torch.long), torch.zeros(0, 8))
    for one in bad:
        with pytest.raises(PatchscopeError, match=r"shape|no vectors"):
            cl.Vectors.of(one)
    with pytest.raises(PatchscopeError, match="3 names"):
        cl.Vectors.of(torch.ones(3, 8), names=["a"])
    for bad_number in (float("nan"), float("inf")):
        with pytest.raises(PatchscopeError, match="NaN or infinity"):
            cl.Vectors.of(torch.tensor([1.0, bad_number]))


def test_items_are_chosen_iterated_and_subtracted() -> None:
    model = cases.model("gpt2")
    vectors = cl.Vectors.from_prompts(model, [cl.At([5, i], name=str(i)) for i in (6, 7, 8)])
    assert vectors[1].names == vectors[-2].names == ("7",)
    assert vectors[1:].names == ("7", "8")
    assert vectors[[2, 0]].names == ("8", "6")
    assert [one.names for one in vectors] == [("6",), ("7",), ("8",)]
    for nothing in (3, -4, slice(3, None), []):
        with pytest.raises(PatchscopeError, match="names none of the 3 items"):
            vectors[nothing]
    less = vectors - vectors[0]
    assert less.names == ("6 - 6", "7 - 6", "8 - 6")
    assert not bool(less.values[0].any())
    assert less.next_logits is None
    for other in (vectors[:2], vectors.without_layers(0), cl.Vectors.of(torch.ones(5))):
        with pytest.raises(PatchscopeError, match="minus"):
            _ = vectors - other
    with pytest.raises(PatchscopeError, match="minus"):
        _ = cl.Vectors.of(torch.ones(2, 5)) - cl.Vectors.of(torch.ones(2, 6))
    with pytest.raises(PatchscopeError, match="no vectors of layer 7; it has layers -1 to 2"):
        vectors.layer(7)


def test_decoder_rows_are_directions_and_a_supernode_is_their_sum() -> None:
    rm = cl.zoo.load("capitals")
    dictionary = rm.dictionaries[1]
    rows = cl.Vectors.decoder(dictionary, [3, 5])
    torch.testing.assert_close(rows.values.norm(dim=-1), torch.ones(2, 1, 1))
    raw = cl.Vectors.decoder(dictionary, 3, unit=False).values[0, 0, 0]
    torch.testing.assert_close(raw / raw.norm(), rows.values[0, 0, 0])
    node = cl.Supernode("both", [cl.Feature(dictionary.layer, 2, 3), cl.Feature(dictionary.layer, 4, 3),
                                 cl.Feature(dictionary.layer, 4, 5)])  # fmt: skip
    both = cl.Vectors.supernode(rm.dictionaries, node, unit=False)
    torch.testing.assert_close(both.values[0, 0, 0], rows.values[:, 0, 0].sum(0))
    assert both.names == ("both",)
    for index in ([], [-1], dictionary.d_sae):
        with pytest.raises(PatchscopeError, match="valid are 0 to"):
            cl.Vectors.decoder(dictionary, index)
    with pytest.raises(PatchscopeError, match="does not write to layer 99"):
        cl.Vectors.decoder(dictionary, 3, layer=99)
    with pytest.raises(PatchscopeError, match="names 0 dictionaries"):
        cl.Vectors.supernode(rm.dictionaries, cl.Supernode("no", [cl.Feature(9, 0, 0)]))


def test_a_source_is_whatever_names_vectors_and_nothing_else() -> None:
    model = cases.model("gpt2")
    prompt = cases.tokens(4)
    wanted = cl.Vectors.from_prompts(model, cl.At(prompt)).values
    for source in (prompt, prompt[None], prompt.tolist(), cl.At(prompt), [cl.At(prompt)], iter([cl.At(prompt)])):
        assert bool((as_vectors(model, source).values == wanted).all())
    assert as_vectors(model, "Texas is").names == ("is",)
    for nothing in ([], ["Texas is", "Paris is"], [cl.At(prompt), "Texas is"], [1.5], [None]):
        with pytest.raises(PatchscopeError, match="is no source"):
            inspect.unwrap(as_vectors)(model, nothing)
    for error, one in ((PatchscopeError, torch.tensor(1.0)), (TokensError, torch.tensor(1))):
        with pytest.raises(error, match="shape"):
            as_vectors(model, one)


def test_positions_and_features_are_whole_numbers_of_any_library() -> None:
    model, ids = cases.model("gpt2"), cases.tokens(5)
    dictionary = cl.zoo.load("capitals").dictionaries[0]
    wanted, row = cl.Vectors.from_prompts(model, cl.At(ids, pos=1)), cl.Vectors.decoder(dictionary, 3)
    for kind in (np.int64, torch.tensor, np.array):
        one = kind(1)
        assert bool((cl.Vectors.from_prompts(model, cl.At(ids, pos=one)).values == wanted.values).all())
        assert cl.Target(ids, at=one).place(model).positions == (1,)
        assert bool((cl.Vectors.decoder(dictionary, kind(3)).values == row.values).all())
        assert wanted[kind(0)].names == wanted.names
    assert cl.Target(ids, at=(np.int64(3), -4)).place(model).positions == (3, 1)
    assert cl.Vectors.from_prompts(model, cl.At(ids), layers=[np.int64(2), -1]).layers == (2, -1)
    held = {"blocks.1.hook_resid_post": torch.ones(1, 4, 8), "blocks.x.hook_resid_post": torch.ones(1)}
    assert cl.Vectors.from_cache(held, np.int64(2)).names == ("P2",)
    for pos in (1.5, None, [0, 1.5]):
        with pytest.raises(PatchscopeError, match=r"pos=.* is not valid; give a (whole number|position)"):
            inspect.unwrap(places)(pos, "pos")


def test_what_is_no_source_model_or_layer_is_refused_with_what_is_valid() -> None:
    model, at = cases.model("gpt2"), cl.At([5, 9])
    from_prompts = inspect.unwrap(cl.Vectors.from_prompts.__func__)
    bad: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, at, {"layers": []}, "at least one, and each once"),
        (model, at, {"layers": [1, 1]}, "at least one, and each once"),
        (model, at, {"layers": [1.0]}, "layers=1.0 is not valid"),
        (model, at, {"memory": 0}, "memory=0 is not valid; give gigabytes above 0"),
        (model, at, {"memory": "1"}, "memory='1' is not valid"),
        (model, None, {}, "at=None is no position; give cl.At"),
        (model, [[5, 9]], {}, r"\[5, 9\] is no position; give cl.At"),
        (5, at, {}, "model=5 is no hooked model; give a HookedTransformer"),
    ]
    for given, positions, options, words in bad:
        with pytest.raises(PatchscopeError, match=words):
            from_prompts(cl.Vectors, given, positions, **options)
    with pytest.raises(PatchscopeError, match="None is no source; give"):
        inspect.unwrap(as_vectors)(model, None)
    with pytest.raises(CacheError, match="no residual stream"):
        cl.Vectors.from_cache({"blocks.x.hook_resid_post": torch.ones(1, 2, 3)})
    some = cl.Vectors.from_prompts(model, at, layers=[1])
    with pytest.raises(PatchscopeError, match=r"no vectors of layer -1.*'below' reads all.*blocks.0.hook_resid_pre"):
        cl.patchscope(model, some, cl.Target([5, 6], at=1), patch_through="below")

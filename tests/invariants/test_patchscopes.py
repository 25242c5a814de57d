"""A grid of patchscopes says what every cell run alone says; what is no patch changes nothing."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuit_lens as cl
from circuit_lens import decoding
from circuit_lens.errors import PatchscopeError
from circuit_lens.hooks import Hook, carries_hooks, scoped_hooks
from circuit_lens.patchscopes import Fitted, Identity, Map, PatchscopeResult, fit_map, readout
from circuit_lens.patchscopes.definition import Said, say_one_by_one
from circuit_lens.patchscopes.explain import units_of
from circuit_lens.patchscopes.patchscope import OTHER_BASIS
from circuit_lens.patchscopes.rows import THROUGH, WRITES, Cell, Rows, Through, Write
from circuit_lens.patchscopes.sources import residual_hook
from tests import builders
from tests.builders import WORDS, Architecture, Kind
from tests.invariants import cases

ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "pythia", "llama", "gemma2")
CLASSES = [(name, kind) for name in ARCHITECTURES for kind in builders.KINDS]
SOME = [("gpt2", "bridge"), *((name, "hooked") for name in ARCHITECTURES)]
N_POS = 12
SLOW_BRIDGE = pytest.param("gpt2", "bridge", marks=pytest.mark.slow)
PLACES: dict[str, tuple[int, tuple[int, ...]]] = {
    "first": (N_POS, (0,)),
    "middle": (N_POS, (5,)),
    "last": (N_POS, (N_POS - 1,)),
    "several": (N_POS, (3, 7, 8)),
    "alone": (1, (0,)),
}
OPTIONS: list[tuple[str, Write, Through]] = list(itertools.product(PLACES, WRITES, THROUGH))
SCALES = (1.0, -0.5)


def limit(name: Architecture, kind: Kind, dtype: torch.dtype = torch.float64) -> float:
    """How far two ways to compute one thing may be apart: a bridge's RMS norms compute in float32."""
    if dtype is torch.float32:
        return 1e-5
    return 1e-6 if kind == "bridge" and name in cases.RMS else 1e-10


def gap(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float((a - b).abs().max() / b.abs().max())


def sources() -> list[cl.At]:
    """Return items of prompts of several lengths, with and without a repeated prompt."""
    return [cl.At(cases.tokens(n, seed=i), pos=pos) for i, (n, pos) in enumerate(((9, -1), (5, 2), (9, 3)))]


def targets(place: str) -> list[cl.Target]:
    """Return a target for each of the items: two prompts of different lengths, one of them twice."""
    n_pos, at = PLACES[place]
    long, short = cases.tokens(n_pos, seed=77), cases.tokens(max(at) + 1, seed=78)
    return [cl.Target(long, at=at), cl.Target(short, at=at), cl.Target(long, at=at)]


def defined(
    model: Any, result: PatchscopeResult, vectors: cl.Vectors, given: Sequence[cl.Target], chosen: Sequence[Any],
    *, n_new: int, write: Write, through: Through, mapping: Map | None = None, read_layer: int | None = None,
) -> Iterator[tuple[Any, Said]]:  # fmt: skip
    """Yield what some cells of a grid say by the definition."""
    for at in chosen:
        item, source, target, scale = at
        cell = Cell(result.source_layers[source], result.target_of(source, target), result.scales[scale])
        rows = Rows(
            vectors, (cell,), torch.tensor([item]), torch.tensor([0]), mapping or Identity(), write, through,
            model.cfg.d_model,
        )  # fmt: skip
        placed = given[item if len(given) > 1 else 0].place(model)
        yield at, say_one_by_one(model, placed, rows, n_new, read_layer=read_layer)


def assert_defined(
    model: Any, result: PatchscopeResult, vectors: cl.Vectors, given: Sequence[cl.Target], bound: float, n: int,
    **options: Any,
) -> None:  # fmt: skip
    """Fail unless a sample of a grid's cells says what the definition says."""
    every = list(itertools.product(*map(range, result.shape)))
    for at, said in defined(
        model, result, vectors, given, random.Random(5).sample(every, min(n, len(every))), **options
    ):
        found = result.patched.at(*at)
        assert gap(found.logits, said.logits[0]) <= bound, at
        assert found.new_tokens.tolist() == said.new_tokens[0].tolist(), at
        assert int(found.lengths) == int(said.lengths[0]), at
        if said.state is not None:
            assert gap(found.state, said.state[0]) <= bound, at


def check_grid(
    name: Architecture, kind: Kind, place: str, write: Write, through: Through, n: int,
    dtype: torch.dtype = torch.float64, n_new: int = 4,
) -> PatchscopeResult:  # fmt: skip
    """Fail unless the grid and the definition agree, with all of several layers, scales, items and targets."""
    model = cases.model(name, kind, dtype)
    given, vectors = targets(place), cl.Vectors.from_prompts(model, sources())
    settings: dict[str, Any] = {"max_new_tokens": n_new, "write": write, "patch_through": through, "read_layer": 1}
    result = cl.patchscope(model, vectors, given, target_layers="all", scales=SCALES, keep_logits=True, **settings)
    assert result.shape == (3, 4, 4, 2)
    assert result.notes == ()
    options: dict[str, Any] = {"n_new": n_new, "write": write, "through": through, "read_layer": 1}
    assert_defined(model, result, vectors, given, limit(name, kind, dtype), n, **options)
    assert gap(result.patched.logits, result.unpatched.logits[:, None, None, None]) > 1e-3
    return result


SAMPLE = [(*model, *OPTIONS[(7 * i + 1) % len(OPTIONS)]) for i, model in enumerate(CLASSES)]
"""Every model, and between them every place, every write and both ways through."""


def test_the_sample_holds_every_place_write_and_way_through() -> None:
    for column, values in ((2, PLACES), (3, WRITES), (4, THROUGH)):
        assert {case[column] for case in SAMPLE} == set(values)


@pytest.mark.parametrize(("name", "kind", "place", "write", "through"), SAMPLE)
def test_a_grid_says_what_every_cell_run_alone_says(
    name: Architecture, kind: Kind, place: str, write: Write, through: Through
) -> None:
    check_grid(name, kind, place, write, through, n=3 if kind == "bridge" else 6, n_new=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CLASSES)
@pytest.mark.parametrize(("place", "write", "through"), OPTIONS)
def test_a_grid_says_what_every_cell_run_alone_says_in_all_combinations(
    name: Architecture, kind: Kind, place: str, write: Write, through: Through
) -> None:
    check_grid(name, kind, place, write, through, n=8)


@pytest.mark.parametrize(("name", "kind"), [("gemma2", "hooked"), SLOW_BRIDGE])
def test_a_grid_in_float32_is_the_definition_to_float32s_rounding(name: Architecture, kind: Kind) -> None:
    check_grid(name, kind, "middle", "replace", "below", n=4, n_new=3, dtype=torch.float32)


@pytest.mark.parametrize(("name", "kind"), [("llama", "hooked"), SLOW_BRIDGE])
def test_parts_of_one_row_and_runs_without_cache_say_the_same(name: Architecture, kind: Kind) -> None:
    model = cases.model(name, kind)
    given, vectors = targets("middle")[:2], cl.Vectors.from_prompts(model, sources()[:2])

    def run(**options: Any) -> PatchscopeResult:
        return cl.patchscope(
            model, vectors, given, source_layers=(0, 2), target_layers=1, max_new_tokens=2, keep_logits=True,
            read_layer=0, **options,
        )  # fmt: skip

    whole = run()
    for options in ({"memory": 1e-9}, {"use_cache": False}, {"use_cache": False, "memory": 1e-9}):
        other = run(**options)
        assert other.notes == ()
        for part in ("patched", "reembedded", "unpatched"):
            a, b = getattr(other, part), getattr(whole, part)
            bound = 1e-12 if "use_cache" not in options else limit(name, kind)
            assert gap(a.logits, b.logits) <= max(bound, limit(name, kind) if name in cases.RMS else 0)
            assert bool((a.new_tokens == b.new_tokens).all())
            assert gap(a.state, b.state) <= limit(name, kind)


@pytest.mark.parametrize("through", THROUGH)
def test_a_layer_is_run_by_the_rows_that_are_written_below_it_and_the_plain_prompt(
    through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, at = builders.build("gpt2", "hooked"), 5
    vectors = cl.Vectors.from_prompts(model, sources()[0])
    seen: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in range(model.cfg.n_layers)}

    def watched(layer: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            seen[layer].append(tuple(x.shape[:2]))
            return forward(x)

        return run

    for layer in seen:
        monkeypatch.setattr(model.blocks[layer].mlp, "forward", watched(layer, model.blocks[layer].mlp.forward))
    settings: dict[str, Any] = {"target_layers": "all", "patch_through": through, "controls": False, "check": False}

    def run() -> list[int]:
        found = cl.patchscope(model, vectors, cl.Target(cases.tokens(N_POS, seed=5), at=at), read_layer=1, **settings)
        assert found.patched.state is not None
        return [found.target_of(s, t) for s, t in itertools.product(*map(range, found.shape[1:3]))]

    layers = run()
    rows = len(layers) + 1  # and the unpatched prompt
    whole = sorted([(1, at), (rows, N_POS - at - 1), (rows, 1)])
    for layer, batches in seen.items():
        below = sum(target < layer for target in layers)
        climbed = sorted([(1, at), (1, N_POS - at), *[(below, N_POS - at)] * (below > 0)])
        assert sorted(batches) == (climbed if through == "layer" else whole)
        batches.clear()
    model.add_hook("blocks.1.hook_mlp_out", lambda x, hook: None, is_permanent=True)  # it may carry something on
    run()
    assert all(sorted(batches) == whole for batches in seen.values())


def test_what_a_hook_carries_from_layer_to_layer_is_carried() -> None:
    model, kept = builders.build("gpt2", "hooked"), {}

    def settings(model: Any) -> PatchscopeResult:
        vectors = cl.Vectors.from_prompts(model, sources()[0])
        return cl.patchscope(
            model, vectors, cl.Target(cases.tokens(N_POS, seed=5), at=5), source_layers=[1], target_layers=[-1, 1, 2],
            keep_logits=True, controls=False, max_new_tokens=3,
        )  # fmt: skip

    bare = settings(model)
    model.add_hook("blocks.0.hook_mlp_out", lambda v, hook: kept.__setitem__("x", v), is_permanent=True)
    model.add_hook("blocks.2.hook_mlp_out", lambda v, hook: v + kept["x"], is_permanent=True)
    vectors, target = cl.Vectors.from_prompts(model, sources()[0]), cl.Target(cases.tokens(N_POS, seed=5), at=5)
    found = settings(model)
    assert found.notes == ()
    assert_defined(model, found, vectors, [target], 1e-10, 3, n_new=3, write="replace", through="layer")
    assert gap(found.logits, bare.logits) > 1e-3


def test_a_grid_under_an_attached_cross_layer_transcoder_is_the_definition() -> None:
    rm = cl.zoo.load("capitals", "clt", dtype=torch.float64)
    target = cl.presets.entity_description("words")
    with rm.attached():
        vectors = cl.Vectors.from_prompts(rm.model, cl.At("Maria read about Dallas"))
        settings: dict[str, Any] = {"target_layers": [-1, 1, 2], "keep_logits": True, "max_new_tokens": 2}
        found = cl.patchscope(rm.model, vectors, target, **settings)
        assert found.notes == ()
        assert_defined(rm.model, found, vectors, [target], 1e-10, 4, n_new=2, write="replace", through="layer")
        assert carries_hooks(rm.model)
    assert not carries_hooks(rm.model)


@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_hook_that_fails_with_a_cache_is_run_without_and_says_so(kind: Kind) -> None:
    model = builders.build("gpt2", kind)

    def edit(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 7] = 0.0  # a place that one position at a time does not have
        return value

    model.hook_dict["blocks.0.hook_resid_post"].add_hook(edit, is_permanent=True)
    vectors, target = cl.Vectors.from_prompts(model, sources()[2]), cl.Target(cases.tokens(N_POS, seed=5), at=5)
    found = cl.patchscope(model, vectors, target, keep_logits=True, max_new_tokens=3)
    assert len(found.notes) == 1
    assert "IndexError" in found.notes[0]
    assert_defined(model, found, vectors, [target], 1e-10, 3, n_new=3, write="replace", through="layer")
    with pytest.raises(IndexError):
        cl.patchscope(model, vectors, cl.Target(cases.tokens(4), at=2))  # without a cache it fails too


def test_positions_and_placeholders_go_together_in_the_order_that_is_given() -> None:
    model, tokens = cases.model("llama"), cases.tokens(N_POS, seed=77)
    source = cases.tokens(9, seed=3)

    def say(pos: tuple[int, int], at: tuple[int, int]) -> Tensor:
        return cl.patchscope(model, cl.At(source, pos=pos), cl.Target(tokens, at=at), source_layers=1).logits

    straight = say((2, 6), (4, 8))
    assert gap(say((6, 2), (8, 4)), straight) <= 1e-12
    assert gap(say((2, 6), (8, 4)), straight) > 1e-3
    assert gap(say((6, 2), (4, 8)), say((2, 6), (8, 4))) <= 1e-12


def test_vectors_whose_norm_is_beyond_their_dtype_are_matched_and_those_beyond_the_targets_refused() -> None:
    model, target = cases.model("gpt2"), cl.Target(cases.tokens(N_POS, seed=5), at=5)
    signs = torch.randint(0, 2, (1, model.cfg.d_model), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    large = 30000.0 * signs

    def say(values: Tensor) -> PatchscopeResult:
        return cl.patchscope(model, cl.Vectors.of(values), target, target_layers=[1], write="add_matched")

    assert gap(say(large.half()).logits, say(large).logits) <= 1e-6
    assert gap(say(large).logits, say(large).unpatched.logits[:, None, None, None]) > 1e-3
    half = builders.build("gpt2", "hooked")
    half.to(torch.float16, print_details=False)
    with pytest.raises(PatchscopeError, match=r"infinite in the target's dtype torch.float16; give a smaller scale"):
        cl.patchscope(half, cl.Vectors.of(1e6 * signs.float()), target, target_layers=[1])


@pytest.mark.parametrize("write", WRITES)
def test_the_reembedded_token_is_moved_at_the_scales_of_the_grid(write: Write) -> None:
    model = cases.model("gpt2")
    result = cl.patchscope(
        model,
        sources(),
        targets("middle"),
        target_layers=[-1, 1],
        scales=(0.2, 1.0, 4.0),
        write=write,
        keep_logits=True,
    )
    assert result.reembedded is not None
    assert gap(result.reembedded.logits, result.logits[:, 0]) <= 1e-12  # source layer -1 is that very control
    assert gap(result.reembedded.logits[:, :, 0], result.reembedded.logits[:, :, 2]) > 1e-3
    answers = result.top_tokens[:, 0, 1, 2, 0].tolist()  # of one cell, so that some cells are right and others wrong
    against = cl.patchscope(
        model, sources(), targets("middle"), source_layers=[-1], target_layers=[-1, 1], scales=(0.2, 4.0), write=write
    ).accuracy(answers, embedding=True)
    assert against.gain is not None
    assert (against.gain.low, against.gain.high) == (0, 0)  # a vector against itself
    assert against.best_fixed == against.reembedded
    assert any(scale != 1.0 for _, _, scale in against.cells)


def with_end(model: Any, token: int) -> None:
    """Give a model a tokenizer whose end of the sequence is a token."""
    model.tokenizer = copy.deepcopy(builders.tokenizer())
    model.tokenizer.eos_token = WORDS[token]


@pytest.mark.parametrize(("name", "kind"), [("llama", "hooked"), SLOW_BRIDGE])
def test_rows_that_end_early_are_those_of_the_definition(name: Architecture, kind: Kind) -> None:
    model = builders.build(name, kind)
    vectors, given = cl.Vectors.from_prompts(model, sources()), targets("middle")
    settings: dict[str, Any] = {"target_layers": "all", "max_new_tokens": 6, "keep_logits": True}
    free = cl.patchscope(model, vectors, given, **settings)
    said = free.patched.new_tokens.reshape(-1, 6)
    shares = {token: float((said == token).any(1).float().mean()) for token in said[:, 1].unique().tolist()}
    token = min(shares, key=lambda token: abs(shares[token] - 0.5))
    assert 0 < shares[token] < 1
    with_end(model, token)
    some = cl.patchscope(model, vectors, given, **settings)
    lengths = set(some.patched.lengths.flatten().tolist())
    assert 6 in lengths
    assert min(lengths) < 6
    assert_defined(model, some, vectors, given, limit(name, kind), 7, n_new=6, write="replace", through="layer")
    at = tuple((some.patched.lengths <= 2).nonzero()[0].tolist())
    said = some.patched.at(*at)
    assert said.new_tokens.tolist()[int(said.lengths) - 1 :] == [token] * (7 - int(said.lengths))
    alone = cl.patchscope(
        model, vectors[at[0]], given[at[0]], source_layers=some.source_layers[at[1]],
        target_layers=some.target_of(at[1], at[2]), max_new_tokens=6, controls=False,
    )  # fmt: skip
    assert alone.patched.new_tokens.flatten().tolist() == said.new_tokens.tolist()
    assert int(alone.patched.lengths) == int(said.lengths)


# ------------------------------------------------------------------------------------------------- what is no patch


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_a_prompts_own_state_in_its_own_place_is_no_patch_at_any_layer(name: Architecture, kind: Kind) -> None:
    model, tokens = cases.model(name, kind), cases.tokens(N_POS, seed=4)
    for pos, through in ((4, "below"), (N_POS - 1, "layer")):
        settings: dict[str, Any] = {"patch_through": through, "max_new_tokens": 3, "keep_logits": True}
        found = cl.patchscope(model, cl.At(tokens, pos=pos), cl.Target(tokens, at=pos), **settings)
        assert found.shape == (1, 4, 1, 1)
        for layer in range(4):
            assert gap(found.patched.at(0, layer, 0, 0).logits, found.unpatched.at(0).logits) <= limit(name, kind)
        assert bool((found.patched.new_tokens == found.unpatched.new_tokens[:, None, None, None]).all())
        other = cl.patchscope(model, cl.At(tokens, pos=pos - 1), cl.Target(tokens, at=pos), **settings)
        assert gap(other.patched.at(0, 0, 0, 0).logits, other.unpatched.at(0).logits) > 1e-3


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_own_states_of_another_token_in_all_layers_below_are_that_token_keys_and_values_too(
    name: Architecture, kind: Kind
) -> None:
    model = cases.model(name, kind)
    target, pos = cases.tokens(N_POS, seed=6), 5
    other = target.clone()
    other[pos] = (target[pos] + 7) % builders.D_VOCAB
    run = decoding.decode(model, other[None], max_new_tokens=5)
    last = model.cfg.n_layers - 1

    def read(through: Through) -> PatchscopeResult:
        return cl.patchscope(
            model, cl.At(other[: pos + 1]), cl.Target(target, at=pos), source_layers=last, target_layers="last",
            patch_through=through, max_new_tokens=5, keep_logits=True,
        )  # fmt: skip

    below, layer = read("below"), read("layer")
    assert gap(below.logits[0, 0, 0, 0], run.logits[0, 0]) <= limit(name, kind)
    assert below.patched.new_tokens[0, 0, 0, 0].tolist() == run.new_tokens[0].tolist()
    assert gap(layer.logits[0, 0, 0, 0], run.logits[0, 0]) > 1e-3  # the last layer alone is read by nothing later
    assert gap(layer.logits[0, 0, 0, 0], layer.unpatched.at(0).logits) <= limit(name, kind)


# ------------------------------------------------------------------------------------------------------------ lenses


def read_by_hand(model: Any, h: Tensor) -> Tensor:
    logits = model.unembed(model.ln_final(h[None]))[0]
    cap = getattr(model.cfg, "output_logits_soft_cap", 0.0)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


@pytest.mark.parametrize(("name", "kind"), [*((name, "hooked") for name in ARCHITECTURES), ("gpt2", "bridge")])
def test_the_logit_lens_is_the_unembedding_of_the_normed_state_and_the_tuned_lens_that_of_the_mapped_one(
    name: Architecture, kind: Kind
) -> None:
    model, tokens = cases.model(name, kind), cases.tokens(8, seed=2)
    vectors = cl.Vectors.from_prompts(model, cl.At(tokens))
    lens = cl.patchscope(model, vectors, cl.presets.logit_lens(), keep_logits=True)
    assert lens.target_layers == (model.cfg.n_layers - 1,)
    states = vectors.values[0, :, 0]
    with torch.no_grad():
        assert gap(lens.logits[0, :, 0, 0], read_by_hand(model, states)) <= limit(name, kind)
        assert gap(lens.logits[0, -1, 0, 0], model(tokens[None])[0, -1]) <= limit(name, kind)
    assert float(lens.precision_at_1()[-1, 0, 0]) == 1.0
    lens_map = fit_map(model, [cases.tokens(20, seed=i) for i in range(4)], pairs="last", progress=False)
    tuned = cl.patchscope(model, vectors, cl.presets.tuned_lens(lens_map), keep_logits=True)
    mapped = [lens_map(states[i], layer, model.cfg.n_layers - 1) for i, layer in enumerate(lens.source_layers)]
    with torch.no_grad():
        assert gap(tuned.logits[0, :, 0, 0], read_by_hand(model, torch.stack(mapped))) <= limit(name, kind)
    assert gap(tuned.logits, lens.logits) > 1e-3


# -------------------------------------------------------------------------------------------------------- two models


def rotated(model: Any, rotation: Tensor) -> Any:
    """Return a model that computes the same in a rotated residual stream (RMS norms without gain do not notice)."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.W_E.copy_(model.embed.W_E @ rotation)
        twin.unembed.W_U.copy_(rotation.T @ model.unembed.W_U)
        for block in twin.blocks:
            for name, weight in [*block.attn.named_parameters(), *block.mlp.named_parameters()]:
                if name in ("W_O", "b_O", "W_out", "b_out"):
                    weight.copy_(weight @ rotation)
                elif name in ("W_Q", "_W_K", "_W_V", "W_K", "W_V", "W_in", "W_gate"):
                    weight.copy_(rotation.T @ weight)
    return twin


def test_a_model_in_a_rotated_basis_is_read_through_the_rotation_as_the_model_itself_is_and_the_fit_finds_it() -> None:
    model = builders.build("llama", fold_ln=True)
    width = model.cfg.d_model
    rng = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=rng, dtype=torch.float64)).Q
    twin = rotated(model, rotation)
    tokens, target = cases.tokens(8, seed=1), cl.Target(cases.tokens(9, seed=2), at=6)
    with torch.no_grad():
        assert gap(twin(tokens[None]), model(tokens[None])) <= 1e-10
    texts = [cases.tokens(30, seed=i) for i in range(12)]
    options: dict[str, Any] = {"max_new_tokens": 4, "keep_logits": True}
    own = cl.patchscope(model, cl.At(tokens), target, **options)
    for kind in ("orthogonal", "affine"):
        fitted = fit_map(model, texts, target_model=twin, kind=kind, progress=False)
        spanned = 2  # layer -1 holds one state per token of the vocabulary, enough to span the width
        assert gap(fitted.matrices[spanned, spanned], rotation) <= 1e-7
        assert min(fitted.explained.values()) > 1 - 1e-9
        across = cl.patchscope(model, cl.At(tokens), target, target_model=twin, mapping=fitted, **options)
        assert gap(across.logits, own.logits) <= 1e-7
        assert bool((across.patched.new_tokens == own.patched.new_tokens).all())
        assert across.reembedded is None  # no layer but itself is fitted from the embedding
        assert "no re-embedded control" in across.notes[0]
    plain = cl.patchscope(model, cl.At(tokens), target, target_model=twin, **options)
    assert gap(plain.logits, own.logits) > 1e-2
    assert OTHER_BASIS in plain.notes
    assert OTHER_BASIS not in own.notes + across.notes


def narrow() -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=2, d_model=20, n_heads=2, d_head=10, d_mlp=24, d_vocab=builders.D_VOCAB, n_ctx=32, act_fn="gelu",
        normalization_type="LN", seed=3, dtype=torch.float64, device="cpu", init_weights=True,
    )  # fmt: skip
    with builders._rng_kept():
        model = HookedTransformer(config, tokenizer=builders.tokenizer()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    return model


def test_models_of_different_widths_and_depths_are_read_through_a_fitted_map_by_the_definition() -> None:
    model, small = cases.model("gemma2"), narrow()
    texts = [cases.tokens(30, seed=i) for i in range(6)]
    fitted = fit_map(model, texts, target_model=small, pairs="all", progress=False)
    assert fitted.matrices[2, 1].shape == (32, 20)
    vectors, target = cl.Vectors.from_prompts(model, sources()), cl.Target(cases.tokens(9, seed=8), at=4)
    found = cl.patchscope(
        model, vectors, target, target_model=small, mapping=fitted, target_layers="all", max_new_tokens=4,
        keep_logits=True, patch_through="below",
    )  # fmt: skip
    assert found.shape == (3, 4, 3, 1)
    assert_defined(
        small, found, vectors, [target], 1e-10, 10, n_new=4, write="replace", through="below", mapping=fitted
    )
    with pytest.raises(cl.errors.PatchscopeError, match=r"width 32.*target reads width 20.*fit_map"):
        cl.patchscope(model, vectors, target, target_model=small, target_layers="all")


# ------------------------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_cache_is_the_prompt_it_is_of_and_nothing_is_run(kind: Kind) -> None:
    model, tokens = builders.build("gpt2", kind), cases.tokens(7, seed=3)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=lambda name: "resid" in name)
    ran: list[str] = []
    with scoped_hooks(model, [Hook("hook_embed", lambda x: ran.append("model"), must_fire=False)]):
        vectors = cl.Vectors.from_cache(cache, 3, tokens=tokens, model=model)
    assert not ran
    prompt = cl.Vectors.from_prompts(model, cl.At(tokens, pos=3))
    assert bool((vectors.values == prompt.values).all())
    assert (vectors.layers, vectors.names) == (prompt.layers, prompt.names)
    target = cl.Target(cases.tokens(6, seed=5), at=2)
    options: dict[str, Any] = {"max_new_tokens": 2, "keep_logits": True}
    a, b = cl.patchscope(model, vectors, target, **options), cl.patchscope(model, prompt, target, **options)
    assert gap(a.logits, b.logits) == 0.0
    last = cl.patchscope(model, cache, target, **options)
    assert gap(last.logits, cl.patchscope(model, cl.At(tokens), target, **options).logits) == 0.0
    assert gap(last.logits, a.logits) > 1e-3


# -------------------------------------------------------------------------------------------------- nothing is left


class Failing(Map):
    """The identity, which raises when it is asked the n-th time."""

    name = "failing"

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.left, self.error = n, error

    def __call__(self, h: Tensor, source_layer: int | None, target_layer: int) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error("stop")
        return h


@pytest.mark.parametrize("kind", builders.KINDS)
def test_the_model_is_untouched_also_when_a_map_or_the_model_is_interrupted(kind: Kind, untouched: Any) -> None:
    model = builders.build("gpt2", kind)
    calls = [0, 1_000_000]

    def interrupt(x: Tensor, hook: Any) -> None:
        calls[0] += 1
        if calls[0] >= calls[1]:
            raise KeyboardInterrupt

    model.add_hook("blocks.1.hook_resid_post", interrupt, is_permanent=True)
    target = cl.Target(cases.tokens(8, seed=5), at=4)

    def run(**options: Any) -> PatchscopeResult:
        return cl.patchscope(model, sources()[:2], target, max_new_tokens=2, patch_through="below", **options)

    run()  # a bridge wires its hooks in its first run
    calls[0] = 0
    with untouched(model):
        run()
    n_forwards = calls[0]
    assert n_forwards > 5
    for n, error in ((0, RuntimeError), (12, KeyboardInterrupt), (30, RuntimeError)):
        with untouched(model), pytest.raises(error):
            run(mapping=Failing(n, error))
    for stop in (2, n_forwards):
        calls[:] = [0, stop]
        with untouched(model), pytest.raises(KeyboardInterrupt):
            run()
    calls[:] = [0, 1_000_000]
    dropout = torch.nn.Dropout(0.5).train()
    with untouched(model):
        run(mapping=dropout)


def test_the_users_own_hooks_run_in_source_and_target() -> None:
    model = builders.build("gpt2")
    target = cl.Target(cases.tokens(8, seed=5), at=4)
    settings: dict[str, Any] = {"max_new_tokens": 3, "keep_logits": True}
    before = cl.patchscope(model, sources(), target, **settings)
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: 1.5 * x, is_permanent=True)
    vectors = cl.Vectors.from_prompts(model, sources())
    after = cl.patchscope(model, vectors, target, **settings)
    assert_defined(model, after, vectors, [target], 1e-10, 8, n_new=3, write="replace", through="layer")
    for one, other in ((after.patched, before.patched), (after.unpatched, before.unpatched)):
        assert gap(one.logits, other.logits) > 1e-3
    assert gap(after.patched.at(0, 0, 0, 0).logits, before.patched.at(0, 0, 0, 0).logits) > 1e-3  # source unchanged


# ------------------------------------------------------------------------------------------------- the run-time check


def forgetting(fill: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Any, tokens: Tensor) -> None:
        fill(self, torch.full_like(tokens, 5))

    return wrong


@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_cache_that_is_wrong_is_noticed_and_all_is_run_without(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model("gpt2", kind)
    vectors, target = cl.Vectors.from_prompts(model, sources()[0]), cl.Target(cases.tokens(N_POS, seed=5), at=6)
    settings: dict[str, Any] = {"max_new_tokens": 3, "keep_logits": True, "read_layer": 1}
    right = cl.patchscope(model, vectors, target, **settings)
    step = decoding.HookedStep if kind == "hooked" else decoding._BridgeStep
    monkeypatch.setattr(step, "fill", forgetting(step.fill))
    for memory in (1.0, 1e-9):
        found = cl.patchscope(model, vectors, target, memory=memory, **settings)
        (note,) = found.notes
        assert "run without cache: cached logits differ" in note
        assert gap(found.logits, right.logits) <= 1e-10
        assert gap(found.patched.state, right.patched.state) <= 1e-10
        assert bool((found.patched.new_tokens == right.patched.new_tokens).all())
    unchecked = cl.patchscope(model, vectors, target, check=False, **settings)
    assert unchecked.notes == ()
    assert gap(unchecked.logits, right.logits) > 1e-3  # what the check is for


def test_the_wrong_generation_of_a_right_prompt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model("llama")
    target = cl.Target(cases.tokens(6, seed=5), at=5)
    right = cl.patchscope(model, sources(), target, max_new_tokens=6)
    call, steps = decoding.HookedStep.__call__, []

    def wrong(self: Any, tokens: Tensor) -> Tensor:
        steps.append(tokens)
        logits = call(self, tokens)
        return logits if len(steps) < 4 else -logits

    monkeypatch.setattr(decoding.HookedStep, "__call__", wrong)
    found = cl.patchscope(model, sources(), target, max_new_tokens=6)
    assert len(found.notes) == 1
    assert bool((found.patched.new_tokens == right.patched.new_tokens).all())


def test_a_model_without_keys_and_values_is_run_without_cache_and_says_so() -> None:
    bridge = builders.build("llama", "bridge")
    vectors, target = cl.Vectors.from_prompts(bridge, sources()[0]), cl.Target(cases.tokens(6, seed=5), at=4)
    right = cl.patchscope(bridge, vectors, target, max_new_tokens=3, keep_logits=True)
    bridge.original_model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    found = cl.patchscope(bridge, vectors, target, max_new_tokens=3, keep_logits=True, memory=1e-4)
    assert len(found.notes) == 1
    assert "linear_attention" in found.notes[0]
    assert gap(found.logits, right.logits) <= 1e-6
    assert bool((found.patched.new_tokens == right.patched.new_tokens).all())


# ------------------------------------------------------------------------------------------------- awkward surroundings


def test_gradients_inference_mode_and_the_dtype_of_the_vectors_change_nothing() -> None:
    model, target = builders.build("gpt2", dtype=torch.float32).requires_grad_(True), cl.Target(cases.tokens(8), at=4)
    plain = cl.patchscope(model, sources(), target, max_new_tokens=3, keep_logits=True)
    assert not plain.logits.requires_grad
    with torch.inference_mode():
        inside = cl.patchscope(model, sources(), target, max_new_tokens=3, keep_logits=True)
    assert not inside.logits.is_inference()
    assert gap(inside.logits, plain.logits) == 0.0
    vectors = cl.Vectors.from_prompts(model, sources())
    wide = cl.Vectors(vectors.values.double(), vectors.layers, vectors.names)
    assert gap(cl.patchscope(model, wide, target, keep_logits=True).logits, plain.logits) <= 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_that_the_tokenizer_calls_padding_are_attended_like_all_others() -> None:
    model = builders.build("gpt2")
    model.tokenizer = copy.deepcopy(builders.tokenizer())
    model.tokenizer.padding_side = "left"
    pad = model.tokenizer.pad_token_id
    tokens = torch.tensor([pad, pad, 9, 20, pad, 31])
    vectors, target = cl.Vectors.from_prompts(model, cl.At([5, 9, 8])), cl.Target(tokens, at=3)
    found = cl.patchscope(model, vectors, target, max_new_tokens=3, keep_logits=True)
    assert found.notes == ()
    assert_defined(model, found, vectors, [target], 1e-10, 4, n_new=3, write="replace", through="layer")
    model.tokenizer = None
    assert gap(cl.patchscope(model, vectors, target, keep_logits=True).logits, found.logits) <= 1e-10


@pytest.mark.parametrize("kind", builders.KINDS)
def test_half_precision_and_one_layer_are_no_special_cases(kind: Kind) -> None:
    model = builders.build("gpt2", kind, dtype=torch.bfloat16, n_layers=1)
    vectors, target = cl.Vectors.from_prompts(model, sources()), cl.Target(cases.tokens(8), at=4)
    found = cl.patchscope(model, vectors, target, target_layers="all", max_new_tokens=3, keep_logits=True)
    assert found.shape == (3, 2, 2, 1)
    assert bool(found.patched.entropy.isfinite().all())
    (_, said), *_ = defined(model, found, vectors, [target], [(1, 1, 0, 0)], n_new=0, write="replace", through="layer")
    assert gap(found.logits[1, 1, 0, 0].float(), said.logits[0].float()) <= 5e-2


def test_residual_hooks_are_where_the_states_are_read() -> None:
    model, tokens = cases.model("pythia"), cases.tokens(6)
    vectors = cl.Vectors.from_prompts(model, cl.At(tokens, pos=(1, 4)))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None])
    for i, layer in enumerate((-1, 0, 1, 2)):
        assert gap(vectors.values[0, i], cache[residual_hook(layer)][0, [1, 4]]) == 0.0


def test_a_fitted_map_of_identities_is_the_identity() -> None:
    model, target = cases.model("gpt2"), cl.Target(cases.tokens(8), at=4)
    eye = torch.eye(32, dtype=torch.float64)
    same = Fitted(
        {(a, a): eye for a in range(-1, 3)}, {(a, a): torch.zeros(32, dtype=torch.float64) for a in range(-1, 3)}
    )
    a, b = (cl.patchscope(model, sources(), target, mapping=mapping, keep_logits=True) for mapping in (same, None))
    assert gap(a.logits, b.logits) <= 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_leading_padding_is_attended_in_the_source_too_so_that_its_own_state_is_no_patch(shared: bool) -> None:
    plain, model = builders.build("gpt2"), builders.build("gpt2")
    plain.tokenizer, model.tokenizer = None, copy.deepcopy(builders.tokenizer())
    model.tokenizer.padding_side, model.cfg.default_prepend_bos = "left", False
    if shared:  # as in GPT-2
        model.tokenizer.pad_token = model.tokenizer.bos_token
    tokens = torch.tensor([model.tokenizer.pad_token_id, 9, 20, 31, 40, 22])
    with torch.no_grad():
        assert gap(model(tokens[None]), plain(tokens[None])) > 1e-3  # the model itself leaves it out
    found = cl.patchscope(model, cl.At(tokens, pos=3), cl.Target(tokens, at=3), keep_logits=True)
    assert found.notes == ()
    assert gap(found.logits[0], found.unpatched.at(0).logits.expand_as(found.logits[0])) <= 1e-10
    other = cl.patchscope(model, cl.At(tokens, pos=2), cl.Target(tokens, at=3), keep_logits=True)
    assert gap(other.logits[0], other.unpatched.at(0).logits.expand_as(other.logits[0])) > 1e-3
    texts = [torch.cat([tokens[:1], cases.tokens(15, seed=i)]) for i in range(4)]
    for one, wanted in (
        (found.unpatched.logits[0], plain(tokens[None])[0, -1].detach()),
        (units(model, tokens), units(plain, tokens)),
        (fit_map(model, texts, progress=False).matrices[1, 1], fit_map(plain, texts, progress=False).matrices[1, 1]),
    ):
        assert gap(one, wanted) <= 1e-7


def units(model: Any, tokens: Tensor) -> Tensor:
    return torch.tensor(list(units_of(model, cl.Target(tokens, at=3).place(model)).values()))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensors that are made, in numbers; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.sizes.append(made.numel())
        return out


def test_what_sources_say_is_held_once_and_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_items, memory = cases.model("gpt2"), 40, 2e-4
    whole = n_items * builders.D_VOCAB
    monkeypatch.setattr(readout, "_AT_ONCE", 4 * builders.D_VOCAB)
    at = [cl.At([5, 4 + i % 60], name=str(i)) for i in range(n_items)]
    target = cl.Target(cases.tokens(4), at=2)
    options: dict[str, Any] = {"source_layers": 0, "target_layers": 0, "memory": memory, "controls": False}
    options |= {"keep_logits": False, "n_top": 2}
    assert whole > max(parameter.numel() for parameter in model.parameters())
    with Largest() as running:
        vectors = cl.Vectors.from_prompts(model, at, layers=[0], memory=memory)
    with Largest() as reading:
        few = cl.patchscope(model, vectors, target, **options)
    assert max(running.sizes) == whole
    assert sorted(running.sizes)[-2] < whole
    assert max(reading.sizes) < whole
    with Largest() as at_once:
        roomy = cl.Vectors.from_prompts(model, at, layers=[0])
    assert sum(size >= whole for size in at_once.sizes) > 1  # a batch's logits, where there is room for them
    assert vectors.next_logits is not None
    assert gap(roomy.next_logits, vectors.next_logits) <= 1e-12
    many = cl.patchscope(model, roomy, target, **(options | {"memory": 1.0}))
    for field in ("surprisal", "source_nll"):
        assert gap(getattr(few.patched, field), getattr(many.patched, field)) <= 1e-10
    without = cl.Vectors.from_prompts(model, at, layers=[0], next_logits=False)
    assert without.next_logits is None
    assert gap(without.values, roomy.values) == 0.0
    assert bool(cl.patchscope(model, without, target, **options).patched.surprisal.isnan().all())


def test_vectors_that_cannot_be_of_the_model_are_refused() -> None:
    model, small = cases.model("gpt2"), narrow()
    vectors = cl.Vectors.from_prompts(model, cl.At([5, 9]))
    said = vectors.next_logits
    assert said is not None
    target = cl.Target(cases.tokens(4), at=2)
    cl.patchscope(model, vectors, target)
    for given, asked, words in (
        (vectors, small, "width 32, not 20, and layer 2, where the model ends with 1"),
        (cl.Vectors(vectors.values, (0, 1, 2, 3), vectors.names), model, "layer 3, where the model ends with 2"),
        (replace(vectors, next_logits=said[:, :60]), model, "next tokens of a vocabulary of 60, not 64"),
        (replace(vectors, next_logits=said.repeat(1, 2)), model, "next tokens of a vocabulary of 128, not 64"),
    ):
        with pytest.raises(cl.errors.PatchscopeError, match=f"not of this model: they have {words}"):
            cl.patchscope(asked, given, target, target_layers=0)

"""Activations for training: the batches are the same wherever they lie and wherever an iteration starts."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_lens.errors import ConsistencyError, DictionaryError, GraphFileError, HookError, TokensError
from circuit_lens.running import to_tokens
from circuit_lens.training import ActivationStore, TokenRows, collect_activations, data_shards, token_rows
from circuit_lens.training.data_shards import MANIFEST, read_manifest
from tests.builders import N_CTX, build, random_tokens

HOOKS = ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
WORDS = "the old city of Paris is in France . the small old night , it was hot".split()


@pytest.fixture(scope="module")
def model() -> Any:
    return build("gpt2", n_layers=2)


@pytest.fixture(scope="module")
def rows(model: Any) -> TokenRows:
    return token_rows(model, documents(40))


def documents(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(n)]


def take(iterator: Iterator[Any], n: int) -> list[Any]:
    return [next(iterator) for _ in range(n)]


def same(a: list[dict], b: list[dict]) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def stores(model: Any, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    """The same activations in memory, in one file read into memory, and in many files with memory for two batches."""
    folder = tmp_path_factory.mktemp("activations")
    small = 2 * 2 * 16 * 3 * 32 * 4
    return {
        "memory": collect_activations(model, rows, HOOKS),
        "read": collect_activations(model, rows, HOOKS, folder=folder / "one"),
        "files": collect_activations(model, rows, HOOKS, folder=folder / "many", memory=small, rows_at_once=2),
    }


def test_the_activations_are_the_models_own_at_the_tokens_that_count(
    model: Any, rows: TokenRows, stores: dict[str, ActivationStore]
) -> None:
    whole = next(stores["memory"].in_order(10**6))
    start = 0
    for tokens, keep in zip(rows.tokens, rows.keep, strict=True):
        real = tokens[: int(keep.nonzero().max()) + 1]  # alone, without padding
        _, cache = model.run_with_cache(real[None])
        for name in HOOKS:
            expected = cache[name][0][keep[: len(real)]].float()
            torch.testing.assert_close(whole[name][start : start + len(expected)], expected, rtol=1e-5, atol=1e-5)
        start += int(keep.sum())
    assert start == stores["memory"].n_tokens == rows.n_tokens


@pytest.mark.parametrize("kind", ["read", "files"])
def test_files_give_the_batches_of_memory(stores: dict[str, ActivationStore], kind: str) -> None:
    """Over several passes."""
    assert len(stores["files"].parts) > 10
    per_pass = stores["memory"].steps_per_pass(16)
    a, b = (take(stores[one].batches(16, seed=3), 2 * per_pass + 3) for one in ("memory", kind))
    assert same(a, b)
    assert stores["memory"].moments(HOOKS[2]).scale == stores[kind].moments(HOOKS[2]).scale
    assert torch.equal(stores["memory"].moments(HOOKS[2]).mean, stores[kind].moments(HOOKS[2]).mean)
    other = take(stores[kind].batches(16, seed=4), 3)
    assert not same(a[:3], other)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 16),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 120),
    kind=st.sampled_from(["memory", "files"]),
)
def test_an_iteration_from_a_step_is_the_rest_of_the_whole_one(
    stores: dict[str, ActivationStore], size: int, seed: int, start: int, kind: str
) -> None:
    whole = take(stores["memory"].batches(size, seed), start + 3)
    assert same(whole[start:], take(stores[kind].batches(size, seed, start), 3))


def test_a_pass_has_every_token_at_most_once_in_an_order_of_its_own() -> None:
    store = ActivationStore.from_tensors({"x": torch.arange(50.0)[:, None]})
    first, second = (
        torch.cat([b["x"] for b in part])[:, 0] for part in [take(store.batches(8, 0), 12)[i : i + 6] for i in (0, 6)]
    )
    for one in (first, second):
        assert len(one.unique()) == 48
        assert not torch.equal(one, one.sort().values)
    assert not torch.equal(first, second)


def test_no_more_is_read_at_once_than_memory_allows(stores: dict[str, ActivationStore]) -> None:
    store = stores["files"]
    asked: list[int] = []

    class Counting(ActivationStore):
        def gather(self, index: Any, hooks: Any) -> Any:
            asked.append(len(index) * 4 * sum(self.widths[h] for h in hooks))
            return super().gather(index, hooks)

    counting = Counting(store.hooks, store.widths, store.n_tokens, store.parts, store.memory, "")
    take(counting.batches(8, 0), 20)
    assert max(asked) <= store.memory // 2
    assert len(asked) < 20
    with pytest.raises(DictionaryError, match="more memory or a smaller batch"):
        store.batches(64, 0)


def test_views_serve_autoencoders_transcoders_and_cross_layer_transcoders(stores: dict[str, ActivationStore]) -> None:
    store = stores["files"]
    batch = next(store.batches(8, 5, 2))
    torch.testing.assert_close(next(store.single(HOOKS[2]).batches(8, 5, 2)), batch[HOOKS[2]])
    x, y = next(store.pair(*HOOKS[:2]).batches(8, 5, 2))
    assert torch.equal(x, batch[HOOKS[0]])
    assert torch.equal(y, batch[HOOKS[1]])
    wide = ActivationStore.from_tensors(
        {f"{k}.{n}": torch.randn(20, d) for n in (0, 1) for k, d in (("in", 3), ("out", 5))}
    )
    source = wide.layers("in.{layer}", "out.{layer}", [0, 1])
    x, y = next(source.batches(4, 0))
    assert (x.shape, y.shape) == ((4, 2, 3), (4, 2, 5))
    assert torch.equal(x[:, 1], next(wide.batches(4, 0))["in.1"])
    assert (source.hooks_in, source.hooks_out) == (("in.0", "in.1"), ("out.0", "out.1"))
    with pytest.raises(HookError, match=r"nearest: blocks\.0\.hook_mlp_out"):
        store.single("blocks.0.hook_mlp_ou")


# --------------------------------------------------------------------------------------------------------------- files


def test_a_second_run_uses_the_files_and_runs_no_model(
    model: Any, rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect_activations(model, rows, HOOKS[:1], folder=tmp_path / "a")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model was run"))
    again = collect_activations(model, rows, HOOKS[:1], folder=tmp_path / "a")
    assert same(take(first.batches(8, 0), 3), take(again.batches(8, 0), 3))
    assert first.fingerprint() == again.fingerprint()


def test_an_interrupted_run_is_continued_with_the_same_result(model: Any, rows: TokenRows, tmp_path: Path) -> None:
    calls = []

    def stop(value: Any, hook: Any) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"folder": tmp_path / "a", "memory": 20_000, "rows_at_once": 3}
    whole = collect_activations(model, rows, HOOKS, **(options | {"folder": tmp_path / "whole"}))
    # Not on a hook point: hooks of the user are part of what a folder is of.
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: stop(output, None))
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_activations(model, rows, HOOKS, **options)
    finally:
        handle.remove()
    begun = read_manifest(tmp_path / "a")
    assert begun is not None
    assert not begun.complete
    assert 0 < len(begun.shards) < 8
    assert not list((tmp_path / "a").glob(".*"))
    runs = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: runs.append(1))
    rest = collect_activations(model, rows, HOOKS, **options)
    handle.remove()
    assert 0 < len(runs) < -(-len(rows) // 3)
    assert same(take(whole.batches(4, 1), 20), take(rest.batches(4, 1), 20))


@pytest.mark.parametrize("change", ["text", "hooks", "dtype", "model"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    model: Any, rows: TokenRows, tmp_path: Path, change: str
) -> None:
    collect_activations(model, rows, HOOKS[:1], folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other: dict[str, Any] = {"model": model, "text": rows, "hooks": HOOKS[:1], "dtype": torch.float32}
    other[change] = {
        "text": TokenRows(rows.tokens, rows.keep & (rows.tokens != rows.tokens[0, 1])), "hooks": HOOKS[1:2],
        "dtype": torch.bfloat16, "model": build("gpt2", n_layers=2, seed=1),
    }[change]  # fmt: skip
    assert other["text"].n_tokens
    with pytest.raises(ConsistencyError, match=f"another {change}"):
        collect_activations(**other, folder=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_full_disk_leaves_nothing_behind(
    model: Any, rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = data_shards.save_file, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(data_shards, "save_file", full)
    options: dict[str, Any] = {"memory": 20_000, "rows_at_once": 3}
    with pytest.raises(GraphFileError, match="No space left"):
        collect_activations(model, rows, HOOKS, folder=tmp_path / "a", **options)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(model: Any, rows: TokenRows, tmp_path: Path) -> None:
    collect_activations(model, rows, HOOKS[:1], folder=tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(GraphFileError, match="damaged"):
        collect_activations(model, rows, HOOKS[:1], folder=tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(GraphFileError, match="newer version"):
        collect_activations(model, rows, HOOKS[:1], folder=tmp_path)


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_is_cut_to_the_context_with_the_tokens_of_a_prompt(model: Any) -> None:
    long = " ".join(WORDS * 10)
    rows = token_rows(model, [long, "the old city"])
    assert rows.tokens.shape == (4, N_CTX)
    whole = model.to_tokens(long, truncate=False)[0]
    bos = int(whole[0])
    assert rows.tokens[:, 0].tolist() == [bos] * 4
    pieces = [row[1:][keep[1:]] for row, keep in zip(rows.tokens[:3], rows.keep, strict=False)]
    assert torch.equal(torch.cat(pieces), whole[1:])
    assert torch.equal(rows.tokens[3, :4], to_tokens(model, "the old city"))
    assert not rows.keep[:, 0].any()
    assert rows.n_tokens == len(whole) - 1 + 3


@pytest.mark.parametrize("kind", ["lines", "paragraphs", "list", "dataset", "tokens column", "streamed"])
def test_every_form_of_text_gives_the_same_rows(model: Any, tmp_path: Path, kind: str) -> None:
    texts = documents(5, seed=1)
    expected = token_rows(model, texts)
    file = tmp_path / "text"
    file.write_text("\ufeff" + ("\n" if kind == "lines" else "\n \n\n").join(texts) + "\n", encoding="utf-8")
    ids = [model.to_tokens(text)[0].tolist() for text in texts]
    forms = {
        "lines": file, "paragraphs": file, "list": texts,
        "dataset": datasets.Dataset.from_dict({"id": [0] * 5, "text": texts}),
        "tokens column": datasets.Dataset.from_dict({"tokens": ids}),
        "streamed": datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    }  # fmt: skip
    found = token_rows(model, forms[kind])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.keep, expected.keep)


def test_the_last_rows_are_held_out(rows: TokenRows) -> None:
    train, held = rows.split(0.1)
    assert torch.equal(torch.cat([train.tokens, held.tokens]), rows.tokens)
    assert held.n_tokens >= 0.1 * rows.n_tokens > held.n_tokens - int(held.keep[0].sum())
    with pytest.raises(TokensError, match="give more text"):
        TokenRows(rows.tokens[:1], rows.keep[:1]).split()


def test_fewer_tokens_can_be_asked_for(model: Any, rows: TokenRows) -> None:
    few = token_rows(model, documents(40), max_tokens=50)
    assert 50 <= few.n_tokens < 50 + N_CTX
    assert torch.equal(few.tokens, rows.tokens[: len(few), : few.tokens.shape[1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "no tokens"), (["", " \n"], "no tokens"), ("a text", "Path"), (7, "no text"), ([b"x"], "bytes"),
        (["the old Pariss"], r"'Pariss' \(nearest: Paris"), (torch.zeros(0, 3, dtype=torch.long), "shape"),
        (torch.zeros(4), "shape"), (torch.zeros(2, 3), "integers"), (torch.full((1, 3), 64), "vocabulary"),
        (torch.ones(1, 65, dtype=torch.long), "65 tokens"), (torch.zeros(1, 3, dtype=torch.long), "special"),
        (datasets.Dataset.from_dict({"txt": ["a"]}), "neither a text nor a tokens column; it has txt"),
        (datasets.Dataset.from_dict({"text": [None, "a"]}), "no tokens|neither text"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(model: Any, text: Any, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        token_rows(model, text)


def test_files_that_are_no_text_are_refused(model: Any, tmp_path: Path) -> None:
    for content, message in ((b"", "no text"), (b" \n\n", "no text"), (b"caf\xe9 the", "UTF-8")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(TokensError, match=message):
            token_rows(model, tmp_path / "x")
    with pytest.raises(TokensError, match="cannot be read"):
        token_rows(model, tmp_path / "nothing")


# --------------------------------------------------------------------------------------------------------------- hooks


def test_a_bridge_gives_the_activations_of_the_hooked_transformer(rows: TokenRows) -> None:
    few = TokenRows(rows.tokens[:4], rows.keep[:4])
    found = [
        next(collect_activations(build("gpt2", kind, n_layers=2), few, HOOKS).in_order())
        for kind in ("hooked", "bridge")
    ]
    for name in HOOKS:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-4)


def test_activations_of_heads_lie_side_by_side(model: Any) -> None:
    tokens = random_tokens(6, batch=2)
    _, cache = model.run_with_cache(tokens)
    store = collect_activations(model, tokens, "blocks.1.attn.hook_z")
    expected = cache["blocks.1.attn.hook_z"].flatten(2).flatten(0, 1).float()
    torch.testing.assert_close(next(store.in_order())["blocks.1.attn.hook_z"], expected)


def test_the_model_and_the_random_state_are_left_alone(model: Any, rows: TokenRows, untouched: Any) -> None:
    with untouched(model):
        store = collect_activations(model, rows, [*HOOKS, "blocks.1.hook_mlp_in"])
        take(store.batches(8, 0), 3)


@pytest.mark.parametrize(
    ("hooks", "error", "message"),
    [
        ("blocks.0.hook_mlp_oout", HookError, r"nearest: blocks\.0\.hook_mlp_out"),
        ([], HookError, "no hook points"),
        ("blocks.0.attn.hook_result", HookError, "never fired"),
        ("blocks.0.attn.hook_pattern", DictionaryError, "shape"),
    ],
)
def test_hooks_that_give_no_activations_are_refused(model: Any, hooks: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        collect_activations(model, random_tokens(6), hooks)


def test_nan_activations_are_refused_and_named(tmp_path: Path) -> None:
    broken = build("gpt2", n_layers=2)
    tokens = random_tokens(6, batch=40)
    with torch.no_grad():
        broken.embed.W_E[int(tokens[20, 3])] = torch.nan
    with pytest.raises(ConsistencyError, match=r"blocks\.0\.hook_mlp_out in rows .*finite"):
        collect_activations(broken, tokens, HOOKS[1], folder=tmp_path / "a", rows_at_once=4)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConsistencyError, match="finite"):
        ActivationStore.from_tensors({"x": torch.tensor([[torch.inf]])})


def test_more_than_memory_needs_a_folder(model: Any, rows: TokenRows) -> None:
    with pytest.raises(DictionaryError, match="folder="):
        collect_activations(model, rows, HOOKS, memory=1000)
    with pytest.raises(DictionaryError, match="float32, bfloat16 or float16"):
        collect_activations(model, rows, HOOKS, dtype=torch.float64)
    with pytest.raises(DictionaryError, match="fewer than one batch"):
        collect_activations(model, rows, HOOKS).batches(10**6, 0)


def test_half_precision_is_kept_in_files_and_read_as_float32(model: Any, rows: TokenRows, tmp_path: Path) -> None:
    full = next(collect_activations(model, rows, HOOKS[2]).in_order())[HOOKS[2]]
    half = next(collect_activations(model, rows, HOOKS[2], folder=tmp_path, dtype=torch.bfloat16).in_order())[HOOKS[2]]
    assert half.dtype is torch.float32
    assert torch.equal(half, full.bfloat16().float())
    assert not torch.equal(half, full)

"""A model and its dictionaries in one call, in Python and on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import circuit_lens as cl
from circuit_lens.cli.dictionary_names import find_dictionaries
from circuit_lens.cli.failing import CommandError
from circuit_lens.cli.loading import load_pair
from circuit_lens.loading import FetchError, LoadError, load, pairs, published
from circuit_lens.loading.published import Published, Table
from tests.builders import D_MODEL, build, build_hf, random_tokens, tokenizer
from tests.unit.loading import layout_files as files
from tests.unit.loading.layout_files import raw

N_LAYERS, D_SAE = 3, 40


@pytest.fixture
def plt_folder(tmp_path: Path) -> Path:
    """Per-layer transcoders in circuit-tracer's layout for the models of `tests.builders`."""
    layers = [raw(i, d_in=D_MODEL, d_sae=D_SAE, d_out=D_MODEL) for i in range(N_LAYERS)]
    return files.write_plt(tmp_path / "plt", layers, "jumprelu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What models were asked for; random ones come instead of those of the hub."""
    calls: list[dict[str, Any]] = []

    def load_model(name: str, device: Any, dtype: torch.dtype, *, model_class: str = "HookedTransformer", **more: Any):
        calls.append({"name": name, "dtype": dtype, "model_class": model_class, **more})
        kind = "hooked" if model_class == "HookedTransformer" else "bridge"
        return build("gemma2", kind, dtype=dtype)

    monkeypatch.setattr(pairs, "load_model", load_model)
    return calls


def _tiny(source: str, **changes: Any) -> Published:
    record = Published("tiny", "plt-40", "plt", source, "test/tiny", 1e6, False, N_LAYERS, D_MODEL, D_SAE, "float32",
                       reads="ln2.hook_normalized", writes="hook_mlp_out", dtype="float64")  # fmt: skip
    return replace(record, **changes)


def test_a_model_of_the_table_comes_with_its_default_set(
    plt_folder: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _tiny(str(plt_folder), variant="raw", reads=None, processing={"center_unembed": True})
    monkeypatch.setattr(published, "_TABLE", Table([_tiny(str(plt_folder)), other]))
    rm = load("tiny")
    assert [d.hook_in for d in rm.dictionaries] == [f"blocks.{i}.ln2.hook_normalized" for i in range(N_LAYERS)]
    assert (rm.model.W_U.dtype, rm.dictionaries[0].module.W_dec.dtype) == (torch.float64, torch.float32)
    assert (asked[0]["model_class"], asked[0]["processing"]) == ("HookedTransformer", {})
    tokens = random_tokens(6)
    cache = rm.model.run_with_cache(tokens)[1]
    weights = raw(1, d_in=D_MODEL, d_sae=D_SAE, d_out=D_MODEL)
    pre = cache["blocks.1.ln2.hook_normalized"] @ weights["W_enc"].double() + weights["b_enc"]
    expected = pre.relu() * (pre > weights["threshold"])
    torch.testing.assert_close(rm.feature_acts(cache)["blocks.1.hook_mlp_out"], expected)
    named = load("Tiny", "raw", dtype=torch.float32)
    assert (named.dictionaries[0].hook_in, asked[1]["processing"]) == ("blocks.0.mlp.hook_in", {"center_unembed": True})
    assert (named.model.W_U.dtype, asked[1]["dtype"]) == (torch.float32, torch.float32)


def test_a_record_may_ask_for_a_bridge(
    plt_folder: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _tiny(str(plt_folder), model_class="TransformerBridge", reads="mlp.hook_in")
    monkeypatch.setattr(published, "_TABLE", Table([record]))
    assert type(load("tiny").model).__name__ == "TransformerBridge"
    assert type(load_pair("tiny", [], device="cpu").rm.model).__name__ == "TransformerBridge"


def test_dictionaries_of_ones_own_go_with_any_model(plt_folder: Path, asked: list[dict[str, Any]]) -> None:
    rm = load("gpt2", plt_folder)
    assert len(rm.dictionaries) == N_LAYERS
    assert asked == [
        {"name": "gpt2", "dtype": torch.float32, "model_class": "HookedTransformer", "processing": {}, "record": None}
    ]
    assert len(load("gemma-2-2b", [plt_folder]).dictionaries) == N_LAYERS
    assert asked[1]["record"] is None


def test_dictionaries_of_another_width_are_refused(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(cl.DictionaryError, match="belongs to another model"):
        load("gpt2", files.write_plt(tmp_path, [raw(0)]))


def test_bundled_names_are_the_zoos() -> None:
    rm, expected = load("capitals"), cl.zoo.load("capitals")
    assert rm.binding.fingerprints() == expected.binding.fingerprints()
    assert load("capitals", "plt").binding.fingerprints() == expected.binding.fingerprints()
    double = load("capitals", dtype=torch.float64)
    assert {double.model.W_U.dtype, double.dictionaries[0].module.W_dec.dtype} == {torch.float64}
    with pytest.raises(LoadError, match="there is no such folder"):
        load("capitals", "transcoder")


def test_unknown_names_say_the_nearest() -> None:
    with pytest.raises(LoadError, match=r"'gemma-2-2c' is neither bundled \(capitals.*nearest: gemma-2-2b"):
        load("gemma-2-2c")
    with pytest.raises(LoadError, match=r"'capital' is neither.*nearest: capitals"):
        load("capital")
    with pytest.raises(LoadError, match=r"SAELens knows no release 'clt-426'"):
        load("gemma-2-2b", "clt-426")


def test_without_network_the_error_says_what_and_how_large() -> None:
    with pytest.raises(FetchError, match=r"about 10 GB; its dictionaries: about 7\.9 GB.*google/gemma-2-2b, which HF"):
        load("gemma-2-2b")
    with pytest.raises(FetchError, match=r"mntss/clt-gemma-2-2b-426k, which .* The set is about 28 GB"):
        load("gemma-2-2b", "clt-426k")


# The command line


def test_the_command_line_takes_every_layout(plt_folder: Path, tmp_path: Path) -> None:
    build_hf("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    pair = load_pair(str(tmp_path / "model"), [str(plt_folder)], bridge=True, device="cpu")
    assert [d.hook_in for d in pair.rm.dictionaries] == [f"blocks.{i}.mlp.hook_in" for i in range(N_LAYERS)]
    settings = yaml.safe_load((plt_folder / "config.yaml").read_text())
    (plt_folder / "config.yaml").write_text(yaml.safe_dump({**settings, "activation": "tanh"}))
    with pytest.raises(cl.DictionaryError, match=r"--dictionaries .*plt: .*activation 'tanh'"):
        find_dictionaries([str(plt_folder)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:a", "--dictionaries hf:a: 'hf:a' is no address"),
        ("hf:a/b", r"--dictionaries hf:a/b: would list the files of https://huggingface\.co/a/b"),
        ("gemma-scope-2-1b-pt-transcoders-all#lowest-l0", "does not decide"),
    ],
)
def test_errors_of_names_are_errors_of_the_command(name: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        find_dictionaries([name])

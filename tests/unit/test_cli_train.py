"""``circuit-lens train``: what it trains is what the library trains, it resumes, and bad input is one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder
from typer.testing import CliRunner, Result

from circuit_lens.cli import build_app, train
from circuit_lens.training import sae, token_rows, train_sae
from tests.builders import build
from tests.unit.training.test_activation_data import documents

SMALL = ("--features", "16", "--k", "3", "--steps", "6", "--batch", "32", "--tokens", "600")
HOOK = "blocks.1.hook_resid_post"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("gpt2", n_layers=2, dtype=torch.float32)


@pytest.fixture
def run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a folder with a text, and this model in place of the one it would load."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("\n\n".join(documents(80)), encoding="utf-8")
    monkeypatch.setattr(train, "_model", lambda *_: (model, "test", False))

    def command(*arguments: str, text: tuple[str, ...] = ("--text", "text")) -> Result:
        return CliRunner().invoke(build_app(), ["train", *arguments, *text], catch_exceptions=False)

    return command


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "text")


def words(text: str) -> str:
    return " ".join(text.split())


def test_an_sae_is_that_of_the_library_and_is_measured_on_the_last_tenth(run: Run, model: Any, tmp_path: Path) -> None:
    result = run("sae", *SMALL, "--hook", HOOK, "--out", "out", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == [
        f"out/{HOOK}.jsonl", f"out/{HOOK}/cfg.json", f"out/{HOOK}/sae_weights.safetensors", "out/training.json"
    ]  # fmt: skip
    made = SAE.load_from_disk(str(tmp_path / "out" / HOOK))
    assert type(made) is JumpReLUSAE
    from circuit_lens.training import SaeSettings, collect_activations, measure_fit

    rows, held = token_rows(model, tmp_path / "text", max_tokens=600).split(0.1)
    store = collect_activations(model, rows, HOOK)
    settings = SaeSettings(d_sae=16, k=3.0, steps=6, batch=32)
    expected = train_sae(store, hook=HOOK, settings=settings, seed=3)
    assert torch.equal(made.W_dec, expected.W_dec)
    tests = collect_activations(model, held, HOOK)
    fit = measure_fit(expected, ((block[HOOK], block[HOOK]) for block in tests.in_order()))
    row = next(line for line in result.stdout.splitlines() if line.startswith(HOOK))
    assert row.split() == [
        HOOK, "16", f"{fit.loss:.4g}", f"{fit.l0:.1f}", f"{fit.explained_variance:.3f}", f"{fit.dead:.1%}"
    ]  # fmt: skip
    assert f"{fit.n_tokens} tokens that were held out" in result.stdout
    assert "circuit-lens trace PROMPT --dictionaries out" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    records = [json.loads(line) for line in (tmp_path / "out" / f"{HOOK}.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records] == [1, 6]


def test_transcoders_are_one_per_layer_and_fit_the_model(run: Run, model: Any, tmp_path: Path) -> None:
    import circuit_lens as cl

    result = run("transcoder", *SMALL, "--skip", "--out", "out", "--no-log", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    made: Any = [SAE.load_from_disk(str(path.parent)) for path in sorted(tmp_path.glob("out/*/cfg.json"))]
    assert [type(one) for one in made] == [JumpReLUSkipTranscoder] * 2
    rm = cl.ReplacementModel(model, made)
    assert [d.hook_in for d in rm.dictionaries] == [f"blocks.{n}.ln2.hook_normalized" for n in (0, 1)]


def test_a_cross_layer_transcoder_has_every_layer(run: Run, tmp_path: Path) -> None:
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    result = run("clt", *SMALL, "--out", "out")
    assert result.exit_code == 0, result.output
    assert [one.out_layers for one in CrossLayerTranscoder.load(tmp_path / "out" / "dictionary").dictionaries] == [
        (0, 1), (1,)
    ]  # fmt: skip
    assert "--dictionaries out/dictionary" in result.stdout
    for layer in (0, 1):
        assert re.search(rf"blocks\.{layer}\.hook_mlp_out +16 ", result.stdout)


def test_activations_larger_than_memory_lie_in_files_meanwhile_and_change_nothing(run: Run, tmp_path: Path) -> None:
    for name, memory in (("a", "2"), ("b", "0.00003")):
        assert run("sae", *SMALL, "--out", name, "--memory", memory).exit_code == 0
    a, b = (SAE.load_from_disk(str(tmp_path / name / HOOK)).W_dec for name in ("a", "b"))
    assert torch.equal(a, b)
    assert not list(tmp_path.glob("*/.activations"))


def test_resume_keeps_what_is_finished_and_begins_anew_what_is_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("sae", *SMALL, "--layers", "0-1", "--memory", "0.00003", "--architecture", "standard")
    assert run(*arguments, "--out", "whole").exit_code == 0
    real, calls = sae.run_trainer, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(sae, "run_trainer", interrupted)
    result = run(*arguments, "--out", "out")
    assert result.exit_code == 130
    assert "add --resume" in words(result.stderr)
    assert (tmp_path / "out/.activations/training/manifest.json").exists()
    again = run(*arguments, "--out", "out")
    assert again.exit_code == 2
    assert "is not empty; add --resume" in words(again.stderr)
    other = run(*arguments, "--out", "out", "--resume", "--seed", "1")
    assert other.exit_code == 2
    assert "seed 0, not 1" in words(other.stderr)
    done = run(*arguments, "--out", "out", "--resume")
    assert done.exit_code == 0, done.output
    assert "1 of 2 dictionaries are finished" in words(done.stderr)
    assert "starts anew" in words(done.stderr)
    assert len(calls) == 3
    for layer in (0, 1):
        a, b = (
            SAE.load_from_disk(str(tmp_path / name / f"blocks.{layer}.hook_resid_post")) for name in ("whole", "out")
        )
        assert type(b) is StandardSAE
        assert torch.equal(a.W_dec, b.W_dec)


def test_a_data_set_serves_as_text(run: Run, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": documents(80)}).save_to_disk(str(tmp_path / "set"))
    assert run("sae", *SMALL, "--out", "a").exit_code == 0
    assert run("sae", *SMALL, "--out", "b", text=("--dataset", "set")).exit_code == 0
    a, b = (SAE.load_from_disk(str(tmp_path / name / HOOK)).W_dec for name in ("a", "b"))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sae", "--hook", "blocks.1.hook_resid_pots"), "nearest: blocks.1.hook_resid_post"),
        (("transcoder", "--hook", HOOK), "--hook is for an SAE"),
        (("sae", "--skip"), "--skip is for transcoders"),
        (("clt", "--architecture", "topk"), "--architecture is for an SAE"),
        (("clt", "--layers", "0-1"), "has all layers"),
        (("sae", "--layers", "0-2"), "write 0-1"),
        (("sae", "--layers", "0", "--hook", HOOK), "no {layer}"),
        (("transcoder", "--hook-in", "blocks.0.hook_mlp_in"), "there is no {layer}"),
        (("sae", "--k", "0"), "k is 0"),
        (("sae", "--architecture", "topk", "--k", "2.5"), "whole number"),
        (("sae", "--lr", "-1"), "lr is -1"),
        (("sae", "--batch", "600", "--tokens", "600"), "--batch 600: the text to train on has"),
        (("sae", "--memory", "0"), "above 0"),
        (("sae", "--context", "65"), "n_ctx is 65"),
        (("sae", "--out", "text"), "that is a file"),
        (("sae", "--out", ""), "--out is empty"),
        (("sae", "--dataset", "set"), "not both"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_message(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    defaults = () if "--out" in arguments else ("--out", "out")
    kind, *rest = arguments
    result = run(kind, *SMALL, *defaults, *rest)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b"caf\xe9", "UTF-8"), (b"the old Pariss", "nearest: Paris"),
                             (b"the old city", "give more text")]
)  # fmt: skip
def test_text_that_cannot_train_is_refused(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    result = run("sae", *SMALL, "--out", "out", text=("--text", "bad"))
    assert result.exit_code == 2
    assert message in words(result.stderr)
    for text, wanted in ((("--text", "nothing"), "cannot be read"), ((), "give --text FILE or --dataset NAME")):
        result = run("sae", *SMALL, "--out", "other", text=text)
        assert result.exit_code == 2
        assert wanted in words(result.stderr)
    assert files(tmp_path) == ["bad"]


def test_without_model_and_text_the_bundled_ones_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build_app(), ["train", "sae", *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "capitals-sae")[1].startswith("blocks.2.hook_resid_post/")
    assert "the corpus of capitals" in words(result.stdout)

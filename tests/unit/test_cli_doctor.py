"""``circuit-lens doctor``: what fits is called fitting, what does not is called broken, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import circuit_lens as cl
from circuit_lens.cli import build_app, doctor, loading
from circuit_lens.cli.loading import Pair
from circuit_lens.cli.pair_check import chunks, default_text, is_broken, verdict
from circuit_lens.evaluation.figures import OutputFigures, Quality
from circuit_lens.running import to_tokens
from tests.builders import build, transcoders

PROMPT = "the capital of the state containing Dallas is"
TEXT = "the old city of Paris is in France .\nthe small old night , it was hot\n\nBerlin is a city in Germany"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["doctor", *arguments], catch_exceptions=False)


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[[cl.ReplacementModel], None]:
    """Put this pair in place of the one that would be loaded."""
    return lambda rm: monkeypatch.setattr(loading, "load_pair", lambda *_, **__: Pair(rm, "test", False))


def bind(scale: float = 1.0, **options: object) -> cl.ReplacementModel:
    model = build("gpt2")
    dictionaries = transcoders(model, **options)
    rm = cl.ReplacementModel(model, dictionaries)
    with torch.no_grad():
        dictionaries[1].W_dec.mul_(scale)
    return rm


def test_a_pair_that_fits_is_well(give, tmp_path: Path) -> None:
    give(bind())
    (tmp_path / "text").write_text(TEXT)
    for arguments in (["--prompt", PROMPT], ["--text", str(tmp_path / "text")]):
        result = run("--model", "test", *arguments)
        assert result.exit_code == 0, result.output
        assert "All is well." in result.stdout
        assert "✗" not in result.stdout
        assert "with dictionaries in place of all outputs" in " ".join(result.stdout.split())
        assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_a_dictionary_worse_than_nothing_is_broken(give) -> None:
    give(bind(scale=-5.0))
    result = run("--model", "test", "--prompt", PROMPT)
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "fails at blocks.1.hook_mlp_out" in text
    assert "from_pretrained_no_processing" in text
    assert "Something is broken." in text


@torch.no_grad()
def test_the_figures_are_those_of_the_definition(give, tmp_path: Path) -> None:
    rm, file = bind(), tmp_path / "figures.json"
    give(rm)
    (tmp_path / "text").write_text(TEXT)
    arguments = ["--model", "test", "--text", str(tmp_path / "text"), "--json", str(file)]
    assert run(*arguments).exit_code == 0
    found = json.loads(file.read_text())
    assert found["pair"] == "test"
    assert found["frozen_model"]["problem"] == ""
    prompts = chunks(rm, TEXT)
    assert len(prompts) == 3
    for layer, dictionary in enumerate(rm.dictionaries):
        outputs, reconstructions, active = [], [], []
        for tokens in prompts:
            _, cache = rm.model.run_with_cache(tokens)
            x = cache[dictionary.hook_in][0, 1:]
            acts = dictionary.activate(dictionary.pre_acts(x), x)
            outputs.append(cache[f"blocks.{layer}.hook_mlp_out"][0, 1:])
            reconstructions.append(dictionary.decode(acts)[:, 0])
            active.append(acts > 0)
        y, y_hat, fires = torch.cat(outputs), torch.cat(reconstructions), torch.cat(active)
        explained = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        own = found["evaluation"]["outputs"][layer]["own"]
        assert own["explained_variance"] == pytest.approx(float(explained), abs=1e-8)
        assert own["l0"] == pytest.approx(float(fires.sum()) / len(y))
        assert own["dead"] == pytest.approx(float((~fires.any(0)).double().mean()))


@pytest.mark.parametrize(
    ("explained", "l0", "words"),
    [
        (0.9, 0.0, "no feature"),
        (-0.1, 5.0, "worse than its mean"),
        (float("nan"), 5.0, "worse than its mean"),
        (0.2, 5.0, "weak"),
        (0.9, 30.0, "dense"),
        (0.9, 5.0, ""),
        (0.9, float("nan"), ""),
    ],
)
def test_verdicts(explained: float, l0: float, words: str) -> None:
    own = Quality(l0, 0.0, 0.0, (), explained, 0.0, 0.0)
    output = OutputFigures("blocks.0.hook_mlp_out", 0, ("blocks.0.mlp.hook_in",), "transcoder", 64, own)
    assert verdict(output).startswith(words)
    assert bool(verdict(output)) == bool(words)
    assert is_broken(output) == words.startswith(("no feature", "worse"))


def test_nan_in_a_dictionary_is_a_finding(give) -> None:
    give(bind(scale=float("nan")))
    result = run("--model", "test", "--prompt", PROMPT)
    assert result.exit_code == 1
    assert "blocks.1.hook_mlp_out" in result.stdout
    assert "NaN" in result.stdout


def test_a_pair_that_cannot_be_bound_is_broken_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Pair:
        dictionary = transcoders(build("gpt2"))[0]
        dictionary.cfg.metadata.hook_name = "blocks.7.ln2.hook_normalized"
        dictionary.cfg.metadata.hook_name_out = "blocks.7.hook_mlp_out"
        return Pair(cl.ReplacementModel(build("gpt2"), [dictionary]), "test", False)

    monkeypatch.setattr(loading, "load_pair", refuse)
    result = run("--model", "test")
    assert result.exit_code == 1
    assert "is for layer 7, the model has layers 0..2" in " ".join(result.stdout.split())


def test_layers_without_a_dictionary_are_named(give) -> None:
    give(bind(layers=[0, 1]))
    assert "layers 2: their MLP is an error node" in run("--model", "test", "--prompt", PROMPT).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", PROMPT], "give --model and --dictionaries"),
        (["--json", "x.json"], "give --model and --dictionaries"),
        (["--model", "test", "--json", "figures.txt"], "ends in .json"),
        (["--model", "test", "--prompt", "the"], "prediction counts in 1 row"),
        (["--model", "test", "--text", "nothing.txt"], "--text nothing.txt"),
        (["--model", "test", "--text", "x", "--prompt", "y"], "give one"),
        (["--model", "test", "--prompt", "the Dalas"], "'Dalas' (nearest: Dallas"),
        (["--model", "test", "--prompt", " "], "no words"),
        (["--model", "gpt3"], "no such model"),
    ],
)
def test_a_wrong_argument_is_an_error_not_a_finding(
    give, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gpt3" not in arguments:
        give(bind())
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_missing_or_wrong_package_is_broken(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from rich.console import Console

    def version(name: str) -> str:
        if name == "rich":
            raise doctor_module.importlib.metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformer-lens" else real(name)

    import importlib

    doctor_module = importlib.import_module("circuit_lens.cli.doctor")
    real = doctor_module.importlib.metadata.version
    healthy = doctor_module.Findings(Console(width=100))
    doctor_module.check_versions(healthy)
    assert not healthy.broken
    monkeypatch.setattr(doctor_module.importlib.metadata, "version", version)
    findings = doctor_module.Findings(Console(width=100))
    doctor_module.check_versions(findings)
    out = capsys.readouterr().out
    assert findings.broken
    assert "is not installed" in out
    assert "transformer-lens<4,>=3.9 is needed" in out


def test_a_heavy_start_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from rich.console import Console

    module = importlib.import_module("circuit_lens.cli.doctor")
    light = module.Findings(Console(width=100, quiet=True))
    module.check_start(light)
    assert not light.broken
    monkeypatch.setattr(module, "_HEAVY", ("typer",))
    heavy = module.Findings(Console(width=100, quiet=True))
    module.check_start(heavy)
    assert heavy.broken


def test_the_default_text_is_words_of_the_model() -> None:
    from circuit_lens.zoo.corpus import Corpus

    assert set(default_text(True).split()) <= set(Corpus().words())
    assert len(default_text(False).split()) > 150


def test_text_is_cut_into_prompts_that_fit() -> None:
    rm = bind()
    assert len(chunks(rm, "the city " * 200)) > 3
    assert max(len(tokens) for tokens in chunks(rm, "the city " * 200)) <= 64
    torch.testing.assert_close(chunks(rm, PROMPT)[0], to_tokens(rm.model, PROMPT))


def test_doctor_is_a_command() -> None:
    assert callable(doctor.doctor)

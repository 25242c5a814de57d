"""``circuit-lens doctor``: what fits is called fitting, what does not is called broken, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import circuit_lens as cl
from circuit_lens.cli import build_app, doctor, loading
from circuit_lens.cli.loading import Pair
from circuit_lens.cli.pair_check import check_layers, chunks, default_text
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
    with torch.no_grad():
        dictionaries[1].W_dec.mul_(scale)
    return cl.ReplacementModel(model, dictionaries)


def test_a_pair_that_fits_is_well(give, tmp_path: Path) -> None:
    give(bind())
    (tmp_path / "text").write_text(TEXT)
    for arguments in (["--prompt", PROMPT], ["--text", str(tmp_path / "text")]):
        result = run("--model", "test", *arguments)
        assert result.exit_code == 0, result.output
        assert "All is well." in result.stdout
        assert "✗" not in result.stdout
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
def test_explained_variance_and_l0_are_those_of_the_definition() -> None:
    rm = bind()
    prompts = chunks(rm, TEXT)
    assert len(prompts) == 3
    measured = check_layers(rm, prompts)
    for layer, (check, dictionary) in enumerate(zip(measured, rm.dictionaries, strict=True)):
        outputs, reconstructions, active = [], [], 0
        for tokens in prompts:
            _, cache = rm.model.run_with_cache(tokens)
            x = cache[dictionary.hook_in][0, 1:]
            acts = dictionary.activate(dictionary.pre_acts(x), x)
            outputs.append(cache[f"blocks.{layer}.hook_mlp_out"][0, 1:])
            reconstructions.append(dictionary.decode(acts)[:, 0])
            active += int((acts > 0).sum())
        y, y_hat = torch.cat(outputs), torch.cat(reconstructions)
        explained = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        assert check.explained == pytest.approx(float(explained), abs=1e-8)
        assert check.l0 == pytest.approx(active / len(y))


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

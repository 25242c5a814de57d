"""``circuit-lens validate`` on the bundled model: the card of the library, where it is kept, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import circuit_lens as cl
from circuit_lens.cli import loading
from circuit_lens.cli.loading import Pair
from tests.builders import build, transcoders
from tests.commands import Run, runner, words

PROMPT = "Fact: the capital of the state containing Dallas is"
OAKLAND = PROMPT.replace("Dallas", "Oakland")
FAST = ("--max-nodes", "6", "--samples", "5")
SETTINGS = cl.CardSettings(max_nodes=6, samples=5)


@pytest.fixture(scope="module")
def rm() -> cl.ReplacementModel:
    return cl.zoo.load("capitals")


@pytest.fixture(scope="module")
def graph(rm: cl.ReplacementModel) -> cl.AttributionGraph:
    return rm.attribute(PROMPT, max_features=40, progress=False)


@pytest.fixture
def run(rm: cl.ReplacementModel, graph: cl.AttributionGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a folder with one graph, with a bundled model that is loaded once."""
    graph.save(tmp_path / "dallas.safetensors")
    return runner("validate", rm, tmp_path, monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_card_goes_into_the_graphs_file_and_leaves_the_rest_of_it(
    run: Run, rm: cl.ReplacementModel, graph: cl.AttributionGraph, tmp_path: Path
) -> None:
    expected = rm.validate(cl.load_graph(tmp_path / "dallas.safetensors"), settings=SETTINGS)
    result = run("dallas.safetensors", *FAST, "--json", "card.json", "--out", "page/dallas.html")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    kept = cl.load_graph(tmp_path / "dallas.safetensors")
    assert kept.card is not None
    assert kept.card.to_json() == expected.to_json()
    assert json.loads((tmp_path / "card.json").read_text()) == expected.to_json()
    assert "<html" in (tmp_path / "page" / "dallas.html").read_text()
    assert names(tmp_path) == ["card.json", "dallas.safetensors", "page/dallas.html"]
    torch.testing.assert_close(kept.adjacency, graph.adjacency, rtol=0, atol=0)
    assert kept.manifest == graph.manifest
    for sentence in expected.sentences():
        assert words(sentence) in words(result.stdout)
    for table in expected.tables():
        assert words(table.title) in words(result.stdout)


def test_no_save_leaves_the_file_as_it_was(run: Run, tmp_path: Path) -> None:
    before = (tmp_path / "dallas.safetensors").read_bytes()
    assert run("dallas.safetensors", *FAST, "--no-save", "--quiet").output == ""
    assert (tmp_path / "dallas.safetensors").read_bytes() == before


def test_a_prompts_graph_is_made_first_and_kept_where_asked(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    difference = cl.logit_difference("Austin", "Sacramento")
    result = run(PROMPT, *FAST, "--target", "Austin - Sacramento", "--out", "x.safetensors", "--quiet")
    assert result.exit_code == 0, result.output
    kept = cl.load_graph(tmp_path / "x.safetensors")
    expected = rm.attribute(PROMPT, targets=difference, progress=False)
    torch.testing.assert_close(kept.adjacency, expected.adjacency, rtol=0, atol=0)
    assert kept.card is not None
    assert kept.card.to_json() == rm.validate(expected, target=difference, settings=SETTINGS).to_json()


def test_a_prompt_alone_writes_nothing(run: Run, tmp_path: Path) -> None:
    result = run(PROMPT, *FAST, "--seed", "3", "--target", "Austin")
    assert result.exit_code == 0, result.output
    assert names(tmp_path) == ["dallas.safetensors"]
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    assert "…" not in result.stdout


def test_several_prompts_give_one_card(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"\n{OAKLAND}\n")
    result = run(PROMPT, "--prompts", "prompts.txt", *FAST, "--ablation", "mean", "--reference", "Lyon is in France",
                 "--json", "card.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = cl.validate_many(
        rm, [PROMPT, OAKLAND], ablation="mean", reference=["Lyon is in France"], settings=SETTINGS, progress=False
    )
    assert json.loads((tmp_path / "card.json").read_text()) == expected.to_json()
    assert "2 prompts" in result.stdout


def test_a_graph_brings_its_bundled_model(rm: cl.ReplacementModel, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(model: str | None, *_: object, **__: object) -> Pair:
        asked.append(model)
        return Pair(rm, "capitals", True)

    monkeypatch.setattr(loading, "load_pair", load)
    run("dallas.safetensors", *FAST, "-q", "--no-save")
    run("dallas.safetensors", *FAST, "-q", "--no-save", "--model", "other")
    run(PROMPT, *FAST, "-q")
    assert asked == ["capitals", "other", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a prompt"),
        (("",), "one of the prompts is empty"),
        (("missing.safetensors",), "missing.safetensors: there is no such file"),
        (("dallas.safetensors", PROMPT), "give one graph file, or prompts"),
        (("bad.safetensors",), "no safetensors file"),
        (("contrast.safetensors",), "holds a contrast of two prompts"),
        (("difference.safetensors",), "say what the graph explains: --target 'Austin - Sacramento'"),
        ((PROMPT, PROMPT), "was given twice"),
        ((PROMPT, "--prompts", "missing.txt"), "--prompts missing.txt"),
        (("--prompts", "empty.txt"), "the file has no line"),
        ((PROMPT, "--ablation", "mean"), "give --reference TEXT"),
        ((PROMPT, "--reference", "x"), "--reference has no use with --ablation zero"),
        ((PROMPT, "--ablation", "melt"), "'melt'"),
        ((PROMPT, OAKLAND, "--allow-poor-fit"), "--allow-poor-fit is for the graph of one prompt"),
        ((PROMPT, "--no-save"), "--no-save is for a graph file"),
        ((PROMPT, "--max-nodes", "0"), "--max-nodes"),
        ((PROMPT, "--target", "Huston"), "'Huston'"),
        (("dallas.safetensors", "--target", "Sacramento"), "does not explain 'Sacramento'"),
        ((PROMPT, "--out", "card.pdf"), "ends in .html or .safetensors"),
        ((PROMPT, "--json", "card.txt"), "ends in .json"),
        ((PROMPT, OAKLAND, "--out", "x.safetensors"), "keeps one graph, and there are 2 prompts"),
        (("dallas.safetensors", "--out", "dallas.safetensors"), "goes into that file already"),
        ((PROMPT, "--out", "x.html", "--out", "./x.html"), "two outputs have the same name"),
        (("Zorg is",), "does not know 'Zorg'"),
    ],
)
def test_what_cannot_be_used_is_one_clear_message_and_no_file(
    run: Run, rm: cl.ReplacementModel, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "bad.safetensors").write_text("no graph")
    (tmp_path / "empty.txt").write_text("\n \n")
    targets = cl.logit_difference("Austin", "Sacramento")
    for name, options in (("contrast", {"baseline": OAKLAND}), ("difference", {})):
        if f"{name}.safetensors" in arguments:
            made = rm.attribute(PROMPT, targets=targets, max_features=5, progress=False, **options)
            made.save(tmp_path / f"{name}.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(*arguments, *(() if "--max-nodes" in arguments else FAST))
    assert result.exit_code == 2
    assert message.lower() in words(result.stderr).lower()
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_models_graph_is_refused_with_the_option_that_helps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    other = Pair(cl.ReplacementModel(model, transcoders(model)), "other", False)
    monkeypatch.setattr(loading, "load_pair", lambda *_, **__: other)
    result = run("dallas.safetensors", *FAST)
    assert result.exit_code == 2
    assert "made with other weights" in words(result.stderr)
    assert "--model" in result.stderr


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("where", "failure", "status"), [("fsync", full, 2), ("replace", interrupt, 130)])
def test_a_failure_leaves_the_graph_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Callable, status: int
) -> None:
    before = (tmp_path / "dallas.safetensors").read_bytes()
    monkeypatch.setattr(os, where, failure)
    assert run("dallas.safetensors", *FAST, "--out", "page/x.html").exit_code == status
    assert names(tmp_path) == ["dallas.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dallas.safetensors"]
    assert (tmp_path / "dallas.safetensors").read_bytes() == before


def test_the_commands_defaults_are_those_of_the_library():
    import dataclasses
    import inspect

    from circuit_lens.cli.validate import validate
    from circuit_lens.interventions.study import CardSettings

    given = inspect.signature(validate).parameters
    for field in dataclasses.fields(CardSettings):
        if field.name in given and field.name != "ablation":
            assert given[field.name].default == field.default, field.name

"""``circuit-lens trace`` on a random model: what it prints and writes, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import circuit_lens as cl
from circuit_lens.cli import build_app, loading
from circuit_lens.cli.loading import Pair
from circuit_lens.graph import store
from tests.builders import build, transcoders
from tests.commands import Run, runner, words

PROMPT = "the capital of the state containing Dallas is"
FILES = ["graph.json", "graph.png", "graph.safetensors", "graph.svg"]


@pytest.fixture(scope="module")
def rm() -> cl.ReplacementModel:
    model = build("gpt2")
    return cl.ReplacementModel(model, transcoders(model), label=lambda site, layer, index: f"meaning {layer}-{index}")


@pytest.fixture
def run(rm: cl.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder, with this model in place of the one it would load."""
    return runner("trace", rm, tmp_path, monkeypatch, name="test", bundled=False)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_files_are_the_graph_that_python_gives(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    result = run(PROMPT)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "the-capital-of-the-state-containing-dallas-is"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    graph, expected = cl.load_graph(folder / "graph.safetensors"), rm.attribute(PROMPT)
    torch.testing.assert_close(graph.adjacency, expected.adjacency, rtol=0, atol=0)
    assert graph.nodes.labels == expected.nodes.labels
    document = json.loads((folder / "graph.json").read_text())
    kept = expected.prune()
    assert document["metadata"]["prompt"] == PROMPT
    assert 0 < len(document["nodes"]) <= len(kept.nodes)
    assert (folder / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "graph.svg").read_text()


def test_the_report_names_logits_scores_features_and_paths(run: Run, rm: cl.ReplacementModel) -> None:
    out, graph = run(PROMPT).stdout, rm.attribute(PROMPT)
    assert out.startswith(PROMPT)
    assert f"{float(graph.top_logits.probs[0]):.3f}" in out
    for convention in ("paper", "conserving"):
        scores = graph.scores(convention=convention)
        assert re.search(rf"{convention} +{scores.replacement:.3f} +{scores.completeness:.3f}", out)
    strongest = graph.top(1)[0].node
    row = rf" *{strongest.pos} {strongest.token} +L{strongest.layer} #{strongest.index} .* {strongest.label}"
    assert re.search(row, out.split("Strongest features")[1])
    circuit = graph.prune()
    feature = circuit.top(1)[0].node
    through = circuit.paths(list(range(len(circuit.nodes))[circuit.nodes.slice_of("token")]), circuit.best_logit.id,
                            k=1, through=feature.id)[0]  # fmt: skip
    lines = re.split(r" (?=[+-]\d)", " ".join(out.split("Paths to")[1].split("Files")[0].split()))
    assert any(line.startswith(f"{through.weight:+.3f}") and feature.label in line for line in lines)


def test_what_is_printed_into_a_pipe_fits_100_columns_uncoloured_and_uncut(run: Run) -> None:
    out = run(PROMPT, "--top", "5").stdout
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "\x1b" not in out
    assert "…" not in out


def test_the_prompts_spacing_before_punctuation_does_not_matter_to_the_folder() -> None:
    from circuit_lens.cli.outputs import slug

    assert slug("Fact : the capital") == slug("Fact: the capital") == "fact-the-capital"
    assert slug("反义词") == "反义词"
    assert slug("../..") == "graph"
    assert len(slug("word " * 100)) <= 60


def test_more_positions_features_than_asked_are_not_printed(run: Run) -> None:
    one, three = (run(PROMPT, "--top", n).stdout.count("meaning") for n in ("1", "3"))
    assert one < three


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("results", ["results/graph.json"]),
        ("a/b/", ["a/b/graph.json"]),
        ("dallas.json", ["dallas.json"]),
        ("a/dallas.png", ["a/dallas.json"]),
    ],
)
def test_out_names_a_folder_or_all_files(run: Run, tmp_path: Path, out: str, expected: list[str]) -> None:
    assert run(PROMPT, "--out", out, "--no-figure").exit_code == 0
    graph = expected[0].replace(".json", ".safetensors")
    assert files(tmp_path) == sorted([*expected, graph])


def test_no_figure_and_no_json_write_the_graph_alone(run: Run, tmp_path: Path) -> None:
    assert run(PROMPT, "--no-figure", "--no-json", "--out", "x").exit_code == 0
    assert files(tmp_path) == ["x/graph.safetensors"]


def test_quiet_prints_nothing_and_writes_all(run: Run, tmp_path: Path) -> None:
    result = run(PROMPT, "--quiet", "--out", "x")
    assert result.output == ""
    assert files(tmp_path) == [f"x/{name}" for name in FILES]


def test_options_reach_the_graph(run: Run, tmp_path: Path) -> None:
    result = run(
        PROMPT, "--targets", "Austin", "--targets", "Austin - Sacramento", "--max-features", "20", "--mlp", "jacobian",
        "--norms", "linear", "--batch-size", "3", "--node-threshold", "0.5", "--out", "x.json", "--no-figure",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    graph = cl.load_graph(tmp_path / "x.safetensors")
    assert graph.nodes.labels[graph.nodes.n_sources :] == ("Austin", "Austin - Sacramento")
    assert graph.nodes.n_features == 20
    assert graph.manifest["settings"]["norms"] == "linear"
    assert graph.manifest["settings"]["mlp"] == "jacobian"
    assert json.loads((tmp_path / "x.json").read_text())["metadata"]["node_threshold"] == 0.5
    assert "20 of them nodes" in result.stdout


def test_a_baseline_makes_the_graph_a_contrast_in_a_folder_of_its_own(
    run: Run, rm: cl.ReplacementModel, tmp_path: Path
) -> None:
    baseline = PROMPT.replace("Dallas", "Oakland")
    result = run(PROMPT, "--baseline", baseline, "--targets", "Austin - Sacramento")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "the-capital-of-the-state-containing-dallas-is-minus-oakland"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    graph = cl.load_graph(folder / "graph.safetensors")
    expected = rm.attribute(PROMPT, baseline=baseline, targets=cl.logit_difference("Austin", "Sacramento"))
    torch.testing.assert_close(graph.adjacency, expected.adjacency, rtol=0, atol=0)
    value = float(expected.target_value[-1])
    assert f"minus {baseline}" in " ".join(result.stdout.split())
    assert f"than on the baseline: Austin - Sacramento {value:+.2f}" in " ".join(result.stdout.split())
    assert "Dallas − Oakland" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_a_second_run_replaces_the_first_ones_files(run: Run, tmp_path: Path) -> None:
    run(PROMPT, "--out", "x", "--no-figure", "--max-features", "5")
    run(PROMPT, "--out", "x", "--no-figure", "--max-features", "7")
    assert files(tmp_path) == ["x/graph.json", "x/graph.safetensors"]
    assert cl.load_graph(tmp_path / "x" / "graph.safetensors").nodes.n_features == 7


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a prompt"),
        ((" ",), "give a prompt"),
        (("the " * 100,), "context holds"),
        (("the Dalas is",), "'Dalas' (nearest: Dallas"),
        ((PROMPT, "--targets", "Austin Texas"), "is 2 tokens"),
        ((PROMPT, "--targets", "Huston"), "not in the tokenizer's vocabulary"),
        ((PROMPT, "--targets", "Austin - Huston"), "'Huston'"),
        ((PROMPT, "--node-threshold", "1.5"), "--node-threshold 1.5: a threshold is a share"),
        ((PROMPT, "--edge-threshold", "0"), "--edge-threshold 0: a threshold is a share"),
        ((PROMPT, "--norms", "melted"), "'melted'"),
        ((PROMPT, "--max-features", "-1"), "--max-features"),
        ((PROMPT, "--top", "0"), "--top"),
        ((PROMPT, "--baseline", ""), "--baseline is empty"),
        ((PROMPT, "--baseline", "the capital"), "needs as many in both"),
        ((PROMPT, "--baseline", PROMPT), "baseline"),
        ((PROMPT, "--baseline", PROMPT, "--norms", "linear"), "--norms linear cannot be used with --baseline"),
        ((PROMPT, "--out", ""), "--out is empty"),
        ((PROMPT, "--out", "taken/inside"), "is a file, not a folder"),
        ((PROMPT, "--out", "full"), "graph.png is a folder there"),
    ],
)
def test_what_cannot_be_used_is_one_clear_message_and_no_file(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "full" / "graph.png").mkdir(parents=True)
    before = everything(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message.lower() in words(result.stderr).lower()
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert everything(tmp_path) == before


def test_a_dictionary_that_explains_nothing_is_an_error_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    dictionaries = transcoders(model)
    with torch.no_grad():
        dictionaries[1].W_dec.mul_(-5)
    pair = Pair(cl.ReplacementModel(model, dictionaries), "test", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pair", lambda *_, **__: pair)
    arguments = ["trace", PROMPT, "--no-figure", "--out", "x"]
    refused = CliRunner().invoke(build_app(), arguments)
    assert refused.exit_code == 2
    assert "--allow-poor-fit" in refused.stderr
    assert everything(tmp_path) == []
    assert CliRunner().invoke(build_app(), [*arguments, "--allow-poor-fit"]).exit_code == 0


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["graph", "figure", "fsync", "rename"])
@pytest.mark.parametrize(("failure", "status"), [(full_disk, 2), (interrupt, 130)])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_or_an_interrupt_leaves_the_old_files_and_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Callable, status: int, old: bool
) -> None:
    if old:
        (tmp_path / "a" / "x").mkdir(parents=True)
        (tmp_path / "a" / "x" / "graph.json").write_text("old")
    before = everything(tmp_path)
    place, name = {"graph": (store, "save_file"), "figure": (Figure, "savefig"), "fsync": (os, "fsync"),
                   "rename": (os, "replace")}[where]  # fmt: skip
    monkeypatch.setattr(place, name, failure)
    result = run(PROMPT, "--out", "a/x")
    assert result.exit_code == status
    message = " ".join(result.stderr.split())
    assert ("No space left" if status == 2 else "Interrupted") in message
    assert ".tmp" not in message.replace("x.tmp", "") or where == "rename"
    assert result.stdout == ""
    assert everything(tmp_path) == before
    if old:
        assert (tmp_path / "a" / "x" / "graph.json").read_text() == "old"


def test_an_interrupt_while_computing_says_so_and_leaves_nothing(
    run: Run, rm: cl.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rm), "attribute", interrupt)
    result = run(PROMPT)
    assert (result.exit_code, everything(tmp_path)) == (130, [])


def test_an_interrupt_that_a_library_disguises_is_one(
    run: Run, rm: cl.ReplacementModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disguise(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module") from error

    monkeypatch.setattr(type(rm), "attribute", disguise)
    assert run(PROMPT).exit_code == 130


def test_a_lack_of_memory_says_what_to_do(run: Run, rm: cl.ReplacementModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(rm), "attribute", exhausted)
    result = run(PROMPT)
    assert result.exit_code == 2
    assert "--max-features" in result.stderr


def test_a_fault_of_ours_is_not_hidden(run: Run, rm: cl.ReplacementModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: only errors made for users become messages."""

    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(type(rm), "attribute", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        run(PROMPT)


def test_the_model_is_left_as_it_was(run: Run, rm: cl.ReplacementModel, assert_untouched) -> None:
    with assert_untouched(rm.model):
        state = random.getstate()
        assert run(PROMPT, "--no-figure").exit_code == 0
        random.setstate(state)  # the tests' own checks of lists draw from it

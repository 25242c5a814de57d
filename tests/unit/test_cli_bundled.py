"""The commands with the bundled model, in processes of their own: what a newcomer types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import circuit_lens as cl
from circuit_lens.cli.examples import examples

PROMPT = "Fact: the capital of the state containing Dallas is"


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from circuit_lens.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(cl.__file__).parents[1])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def rm() -> cl.ReplacementModel:
    return cl.zoo.load("capitals")


def test_a_newcomer_sees_how_dallas_becomes_austin(tmp_path: Path) -> None:
    done = command("trace", PROMPT, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    logits = done.stdout.split("Next token")[1].splitlines()[1]
    assert logits.startswith("Austin")
    paths = done.stdout.split("Paths to Austin")[1].split("Files")[0]
    paths = re.split(r" (?=[+-]\d\.\d{3} )", " ".join(paths.split()))
    assert any(re.search(r"\d Dallas → .*Texas.* → Austin$", path) for path in paths), paths
    folder = tmp_path / "fact-the-capital-of-the-state-containing-dallas-is"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png", ".safetensors", ".svg"]
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_every_listed_example_works(rm: cl.ReplacementModel) -> None:
    for example in examples():
        graph = rm.attribute(example.prompt, max_features=0, progress=False)
        assert graph.top_logits.strings[0].strip() == example.answer, example


def test_spaces_before_punctuation_change_nothing(rm: cl.ReplacementModel) -> None:
    spaced = rm.attribute(PROMPT.replace(":", " :"), progress=False)
    assert rm.attribute(PROMPT, progress=False).tokens.tolist() == spaced.tokens.tolist()


def test_an_unknown_word_is_an_error_with_the_nearest_words(tmp_path: Path) -> None:
    done = command("trace", PROMPT.replace("Dallas", "Dalas"), folder=tmp_path)
    assert done.returncode == 2
    assert "'Dalas' (nearest: Dallas" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_labels_reach_the_nodes(rm: cl.ReplacementModel) -> None:
    graph = rm.attribute(PROMPT, progress=False)
    assert any("Texas" in node.node.label for node in graph.top(100, pos="Dallas"))


def test_an_unknown_bundled_model_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="capitals"):
        cl.zoo.load("capitols")


def test_another_dtype_gives_the_same_answer(tmp_path: Path) -> None:
    done = command("trace", PROMPT, "--dtype", "float64", "--no-figure", "--out", "x", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    graph = cl.load_graph(tmp_path / "x" / "graph.safetensors")
    assert graph.manifest["model"]["dtype"] == "float64"
    assert graph.top_logits.strings[0] == "Austin"


def test_the_doctor_is_content(tmp_path: Path) -> None:
    done = command("doctor", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"✓ +capitals +4 dictionaries, loaded in .* says Austin", done.stdout)


def test_the_doctor_finds_the_bundled_pair_well(tmp_path: Path) -> None:
    done = command("doctor", "--model", "capitals", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

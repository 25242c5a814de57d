"""The tutorials run as they stand, and three lines turn a stock activation-patching script into one with a graph."""

import ast
import contextlib
import random
import re
from typing import Any

import pytest
import torch
from transformer_lens import patching

from circuit_lens import zoo
from circuit_lens.graph.nodes import NodeKind
from tests.builders import assert_untouched
from tests.notebooks.execute import TUTORIALS, execute, kernel_environment, read

NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
MAX_BYTES = 600_000
# /tmp/x, /home/x, C:\x: a path of the machine that the outputs were made on
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|work|Users|var|opt)/|[A-Z]:\\\\|site-packages")
THREE_LINES = (
    "import circuit_lens as cl",
    "rm = cl.ReplacementModel(model, dictionaries)",
    "graph = rm.attribute(clean_tokens, cache=clean_cache, targets=logit_diff)",
)


# ------------------------------------------------------------------------------------------------- the tutorials


def test_these_are_the_tutorials():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_trace_a_prompt",
        "02_in_your_notebook",
        "03_supernodes",
        "04_is_the_graph_true",
        "05_with_activation_patching",
        "06_dictionaries",
        "07_patchscopes",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_stored_clean(path):
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert path.stat().st_size < MAX_BYTES
    assert not MACHINE_PATH.search(path.read_text())
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None, f"{cell.id} was stored without being run"
            assert not [output for output in cell.outputs if output.output_type == "error"]
            assert not [output for output in cell.outputs if output.get("name") == "stderr"]


@pytest.mark.tutorial
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs_from_a_clean_kernel_and_draws_its_figures(path):
    notebook = read(path)
    stored = pictures(notebook)
    execute(notebook)
    assert pictures(notebook) == stored
    assert sum(stored.values()) >= 2


def pictures(notebook):
    """How many figures each cell shows."""
    return {
        cell.id: sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def test_a_cell_that_claims_what_is_false_fails(tmp_path):
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook

    notebook = new_notebook(cells=[new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, folder=tmp_path)


def test_the_backend_of_the_tests_does_not_reach_the_kernel():
    assert "MPLBACKEND" not in kernel_environment({"MPLBACKEND": "Agg", "PATH": "x"})


# ------------------------------------------------------------------------------------- the tutorial of dictionaries


def shown(notebook):
    """What the cells show as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def loaded_sets(notebook):
    """Names of the dictionary sets that the code of a notebook names in calls of ``cl.zoo``."""
    calls = [
        node
        for cell in notebook.cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("cl.zoo.load")
    ]
    return {a.value for call in calls for a in call.args[1:] if isinstance(a, ast.Constant)}


def test_the_tutorial_of_dictionaries_takes_every_kind_and_shows_the_sets_there_are():
    notebook = read(NOTEBOOKS[5])
    sets = zoo.dictionary_sets("capitals")
    kinds = {name for name in sets if not name.startswith("sae-")}
    assert loaded_sets(notebook) == kinds
    assert " ".join(sets) in shown(notebook), "the sets have changed: renew the outputs"
    assert loaded_sets(read(NOTEBOOKS[4])) == set()


def test_the_command_that_the_tutorial_of_dictionaries_runs_is_one_of_the_command_line_and_its_figures_are_stored():
    from typer.main import get_command

    from circuit_lens.cli import build_app

    notebook = read(NOTEBOOKS[5])
    line = next(line for line in shown(notebook).splitlines() if line.startswith("$ circuit-lens train"))
    commands: Any = get_command(build_app())
    train = commands.commands["train"]
    _, _, *options = line.removeprefix("$ ").split()
    given = train.make_context("train", list(options)).params
    assert given["kind"] == "transcoder"
    assert re.search(rf"blocks\.1\.hook_mlp_out +{given['features']} +\d", shown(notebook))
    with pytest.raises(Exception, match="No such option"):
        train.make_context("train", [*options, "--no-such-option"])


# --------------------------------------------------------------------------------------------- the notebook test


def test_the_tutorial_has_the_three_lines_and_nothing_of_the_package_before_them():
    cells = [cell.source for cell in read(NOTEBOOKS[1]).cells if cell.cell_type == "code"]
    at = next(i for i, source in enumerate(cells) if THREE_LINES[0] in source)
    assert [line for line in cells[at].splitlines() if line] == list(THREE_LINES)
    before = [
        node.module or ""
        for source in cells[:at]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("circuit_lens")
    ]
    assert before == ["circuit_lens"]  # `from circuit_lens import zoo`, where the model comes from


STOCK_SCRIPT = """
from transformer_lens import patching

torch.set_grad_enabled(False)

clean_tokens = model.to_tokens("Fact: the capital of the state containing Dallas is")
corrupted_tokens = model.to_tokens("Fact: the capital of the state containing Stockton is")
austin, sacramento = model.to_single_token("Austin"), model.to_single_token("Sacramento")

def logit_diff(logits):
    return logits[0, -1, austin] - logits[0, -1, sacramento]

clean_logits, clean_cache = model.run_with_cache(clean_tokens)
corrupted_logits, corrupted_cache = model.run_with_cache(corrupted_tokens)
resid_pre = patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, logit_diff)
"""


class Counted:
    """Counts the forward passes of a model, by the tokens they ran on."""

    def __init__(self, model, monkeypatch):
        self.runs = []
        forward = type(model).forward

        def counting(this, tokens, *args, **kwargs):
            self.runs.append(tokens.clone())
            return forward(this, tokens, *args, **kwargs)

        # on the class, so that the model itself, whose state is compared, is not touched
        monkeypatch.setattr(type(model), "forward", counting)


@contextlib.contextmanager
def untouched(*modules):
    """The check, less Python's random state, from which the tests' own checks of annotations draw."""
    with assert_untouched(*modules):
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)


@pytest.fixture
def gradients_as_they_were():
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


@pytest.mark.usefixtures("gradients_as_they_were")
def test_a_stock_patching_script_and_three_lines_give_a_graph_and_leave_the_session_as_it_was(monkeypatch):
    model, dictionaries = zoo.load_model("capitals"), zoo.load_dictionaries("capitals")
    # A hook that the user has on the model; it only looks.
    seen = []
    model.add_hook("blocks.1.hook_resid_post", lambda value, hook: seen.append(value.shape), is_permanent=True)
    session = {"model": model, "dictionaries": dictionaries, "torch": torch}
    exec(STOCK_SCRIPT, session)
    cached = {name: value.clone() for name, value in session["clean_cache"].items()}
    counted, looks = Counted(model, monkeypatch), len(seen)
    with untouched(model, *dictionaries):
        exec("\n".join(THREE_LINES), session)
    # Binding runs the model once, on a few tokens of its own; the source is not run again.
    assert len(counted.runs) == 1
    assert counted.runs[0].shape[-1] < session["clean_tokens"].shape[-1], "the source was run although it is cached"
    assert len(seen) == looks
    assert any("blocks.1.hook_resid_post" in hook for hook in session["graph"].manifest["user_hooks"])
    assert not torch.is_grad_enabled()
    assert {name: torch.equal(value, cached[name]) for name, value in session["clean_cache"].items()} == dict.fromkeys(
        cached, True
    )

    graph, clean = session["graph"], float(session["logit_diff"](session["clean_logits"]))
    assert graph.manifest["source"] == "cache"
    assert graph.nodes.count(NodeKind.FEATURE) > 100
    assert graph.nodes.count(NodeKind.LOGIT) == 1
    assert float(graph.target_value[-1]) == pytest.approx(clean, rel=1e-5)
    sums = graph.adjacency.sum(1) + graph.target_bias
    assert bool(((sums - graph.target_value).abs() <= 1e-5 * graph.target_value.abs().clamp(min=1)).all())
    assert graph.paths("Dallas", "logit_diff", k=1)[0].nodes[0].token == "Dallas"

    # What follows in the script goes on as before.
    again = patching.get_act_patch_resid_pre(
        model, session["corrupted_tokens"], session["clean_cache"], session["logit_diff"]
    )
    assert torch.equal(again, session["resid_pre"])
    assert len(counted.runs) == again.numel() + 1


@pytest.mark.usefixtures("gradients_as_they_were")
def test_the_graph_from_the_cache_is_the_graph_from_the_prompt_which_does_run_the_model(monkeypatch):
    model, dictionaries = zoo.load_model("capitals"), zoo.load_dictionaries("capitals")
    session = {"model": model, "dictionaries": dictionaries, "torch": torch}
    exec(STOCK_SCRIPT, session)
    exec("\n".join(THREE_LINES), session)
    counted = Counted(model, monkeypatch)
    rm, cached = session["rm"], session["graph"]
    run = rm.attribute(session["clean_tokens"], targets=session["logit_diff"])
    assert counted.runs, "the count sees a forward pass where there is one"
    assert torch.equal(run.nodes.index, cached.nodes.index)
    assert torch.allclose(run.adjacency, cached.adjacency, atol=1e-6 * float(cached.adjacency.abs().max()))

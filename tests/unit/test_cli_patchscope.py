"""``circuit-lens patchscope`` on the bundled model: what is typed is what runs, and what cannot run says why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import circuit_lens as cl
from circuit_lens.cli.failing import CommandError
from circuit_lens.cli.patchscope_names import PRESETS, parse_feature, parse_layers, parse_target
from tests.commands import Run, runner, words

DALLAS, LYON = "Maria read about Dallas", "Maria read about Lyon"


@pytest.fixture(scope="module")
def rm() -> cl.ReplacementModel:
    return cl.zoo.load("capitals")


@pytest.fixture
def run(rm: cl.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder, with a bundled model that is loaded once."""
    return runner("patchscope", rm, tmp_path, monkeypatch)


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


# ----------------------------------------------------------------------------------------------------------- the syntax


@given(parts=st.lists(st.tuples(st.integers(-1, 40), st.integers(0, 5)), min_size=1, max_size=4))
@settings(deadline=None)
def test_layers_are_read_back(parts: list[tuple[int, int]]) -> None:
    text = ",".join(str(a) if n == 0 else f"{a}-{a + n}" for a, n in parts)
    expected = [layer for a, n in parts for layer in range(a, a + n + 1)]
    if len(set(expected)) < len(expected):
        with pytest.raises(CommandError, match="names a layer twice"):
            parse_layers("--layers", text, words=("all",))
    else:
        assert parse_layers("--layers", text, words=("all",)) == expected
        assert parse_layers("--layers", text.replace("-1", "emb", 1) if text.startswith("-1") else text,
                            words=()) == expected  # fmt: skip


@pytest.mark.parametrize("text", ["", "same", "1-", "-2", "3-1", "a", "1;2", "1,,2", "--1"])
def test_layers_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--layers"):
        parse_layers("--layers", text, words=("all", "last"))
    assert parse_layers("--layers", "ALL", words=("all",)) == "all"


def test_features_by_layer_and_by_site() -> None:
    assert [(f.layer, f.index, f.site) for f in map(parse_feature, ("L1:302", "1:#302", "l1#302", "1:302:a.b"))] == [
        (1, 302, None), (1, 302, None), (1, 302, None), (1, 302, "a.b")]  # fmt: skip
    named = parse_feature("blocks.1.hook_mlp_out#7")
    assert (named.layer, named.index, named.site) == (None, 7, "blocks.1.hook_mlp_out")
    for text in ("", "L1", "302", "L1:x", "L-1:2", "#3"):
        with pytest.raises(CommandError, match="write LAYER:INDEX"):
            parse_feature(text)


@pytest.mark.parametrize(("text", "options", "message"), [
    ("", {}, "empty"), ("enttiy", {}, "neither a preset nor a text; nearest: entity"),
    ("identity:arrow", {}, "no form; nearest: arrows"), ("attribute", {}, "write its text"),
    ("entity:lines", {}, "takes nothing after a colon"), ("entity", {"at": "x"}, "a placeholder of its own"),
    ("tuned-lens", {}, "give --mapping"), ("cross-model:is", {}, "give --mapping"),
])  # fmt: skip
def test_targets_that_cannot_be_meant_are_refused(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_target(text, **({"at": None, "mapped": False} | options))


def test_targets_are_presets_with_their_forms_or_texts() -> None:
    def make(text: str, at: Any = None, words: bool = False) -> Any:
        return parse_target(text, at=at, mapped=True).make(at=at, words=words, mapping=cl.patchscopes.Identity())

    assert make("entity") == cl.presets.entity_description()
    assert make("entity", words=True) == cl.presets.entity_description("words")
    assert make("identity") == cl.presets.token_identity("lines")
    assert make("identity", words=True) == cl.presets.token_identity("words")
    assert make("identity:is", words=True) == cl.presets.token_identity("is")
    assert make("logit-lens") == cl.presets.logit_lens()
    assert make("attribute: The capital of x") == cl.presets.attribute("The capital of x")
    assert make("multi-hop:The capital of y", "y") == cl.presets.multi_hop("The capital of y", "y")
    assert make("explain") == cl.presets.self_explanation()
    assert make("cat : animal ; q :", "q").at == "q"
    assert make("an example: x").prompt == "an example: x"
    assert {make(name if name not in ("attribute", "multi-hop") else f"{name}:x").name for name in PRESETS}


# ----------------------------------------------------------------------------------------------------- what it computes


def test_every_cell_is_the_librarys(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    done = run("--source", DALLAS, "--source", LYON, "--layers", "emb,1-2", "--target-layers", "0-1", "--scale", "1",
               "--scale", "1.5", "--write", "add", "--through", "below", "--max-new-tokens", "3", "--answer",
               "city in Texas|Texas", "--answer", "city in France", "--json", "x.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = cl.patchscope(
        rm.model, [cl.At(DALLAS), cl.At(LYON)], cl.presets.entity_description("words"), source_layers=[-1, 1, 2],
        target_layers=[0, 1], scales=[1.0, 1.5], write="add", patch_through="below", max_new_tokens=3, progress=False,
    )  # fmt: skip
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["cells"] == json.loads(json.dumps(expected.records()))
    assert len(document["cells"]) == 2 * 3 * 2 * 2
    found = expected.accuracy([["city in Texas", "Texas"], ["city in France"]])
    assert document["accuracy"]["any_cell"] == found.any_layer.to_json()
    assert document["accuracy"]["by_cell"] == found.by_cell.tolist()
    assert f"unpatched prompt  {found.unpatched}" in done.stdout
    plain = cl.patchscope(rm.model, cl.At(DALLAS), cl.presets.entity_description("words"), progress=False)
    assert expected.texts[0, 1, 1, 0] != plain.texts[0, 2, 0, 0]


def test_one_source_is_read_layer_by_layer(run: Run, rm: cl.ReplacementModel) -> None:
    done = run("--source", "Fact: the capital of the state containing Dallas is", "--pos", "Dallas", "--answer",
               "city in Texas")  # fmt: skip
    assert done.exit_code == 0, done.output
    at = cl.At("Fact: the capital of the state containing Dallas is", "Dallas")
    result = cl.patchscope(rm.model, at, cl.presets.entity_description("words"), progress=False)
    right = int(result.right(["city in Texas"])[:, 1:].sum())
    assert 0 < right < 4
    assert f"said in {right} of 4 cells" in done.stdout
    assert "without patch not" in done.stdout
    for n, name in enumerate(("emb", "0", "1", "2", "3")):
        assert re.search(rf"^  {name} +{re.escape(result.texts[0, n, 0, 0].strip())}", done.stdout, re.MULTILINE)
    last = run("--source", "Fact: the capital of the state containing Dallas is")
    assert "city in Texas" not in last.stdout


def test_features_are_moved_as_unit_directions(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    done = run("--feature", "L1:302", "--feature", "blocks.1.hook_mlp_out#263", "--json", "x.json")
    assert done.exit_code == 0, done.output
    directions = cl.Vectors.decoder(rm.binding.dictionary(1, None), [302, 263])
    expected = cl.patchscope(rm.model, directions, cl.presets.entity_description("words"), scales=(1.0, 2.0, 4.0),
                             write="add_matched", progress=False)  # fmt: skip
    found = cells(tmp_path / "x.json")
    assert [line["text"] for line in found] == [line["text"] for line in expected.records()]
    assert {line["item"] for line in found} == {"L1 #302", "L1 #263"}
    assert {line["source_layer"] for line in found} == {None}


def test_files_are_a_page_a_picture_for_each_scale_and_json(run: Run, tmp_path: Path) -> None:
    arguments = ["--source", DALLAS, "--source", LYON, "--target-layers", "all", "--scale", "1", "--scale", "2"]
    done = run(*arguments, "--out", "a/x.html", "--out", "a/x.png", "--out", "a/x.json")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x-x1.png", "x-x2.png", "x.html", "x.json"]
    page = (tmp_path / "a" / "x.html").read_text()
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles[:2] == ["2 items: entropy of the next token, × 1", "2 items: entropy of the next token, × 2"]
    assert titles[2] == "Dallas: entropy of the next token, × 1"
    assert len(titles) == 2 + 2 * 2
    assert page.count("<style>") == 2  # the page's, and one for all maps
    assert all((tmp_path / "a" / f"x-x{k}.png").read_bytes().startswith(b"\x89PNG") for k in (1, 2))
    assert "x-x2.png" in done.stdout
    assert run("--source", DALLAS, "--out", "b.png", "--quiet").output == ""
    assert (tmp_path / "b.png").is_file()


def test_another_model_reads_and_a_map_lies_between(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    mapping = cl.patchscopes.ScaleBias(0.5, rm.model.W_E[10].detach().clone())
    mapping.save(tmp_path / "map.safetensors")
    done = run("--source", DALLAS, "--mapping", "map.safetensors", "--target", "cat : small animal ; q :", "--at", "q",
               "--target-model", "capitals", "--layers", "1", "--json", "x.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    target = cl.Target("cat : small animal ; q :", at="q")
    expected, plain = (
        cl.patchscope(rm.model, cl.At(DALLAS), target, source_layers=[1], mapping=one, progress=False)
        for one in (mapping, None)
    )
    found = cells(tmp_path / "x.json")
    assert found[0]["entropy"] == expected.records()[0]["entropy"] != plain.records()[0]["entropy"]
    assert "capitals read by capitals" in done.stdout
    assert "mapped by" in done.stdout


def test_presets_are_named_and_names_that_several_share_become_prompts(run: Run, tmp_path: Path) -> None:
    two = ["Maria read about Michael Jackson", "Maria read about Peter Jackson"]
    done = run("--source", two[0], "--source", two[1], "--target", "logit-lens", "--json", "x.json")
    assert done.exit_code == 0, done.output
    found = cells(tmp_path / "x.json")
    assert {line["item"] for line in found} == set(two)
    assert {line["target_layer"] for line in found} == {3}
    assert run("--source", DALLAS, "--target", "identity").exit_code == 0


def test_what_is_printed_into_a_pipe_fits_100_columns(run: Run) -> None:
    out = run("--source", DALLAS, "--source", LYON, "--target-layers", "all", "--max-new-tokens", "20").stdout
    assert out.startswith("target <bos> cat : small animal")
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "\x1b" not in out


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "Give --source"),
    (("--source", DALLAS, "--feature", "L1:302"), "Give --source"),
    (("--source", "Maria read about Dalas"), "nearest: Dallas"),
    (("--source", DALLAS, "--pos", "Lyon"), "--pos Lyon: The prompt has no token 'Lyon'"),
    (("--source", DALLAS, "--pos", "9"), "--pos 9: Position 9 does not exist"),
    (("--source", DALLAS, "--layers", "0-9"), "no vectors of layer 4"),
    (("--source", DALLAS, "--layers", "same"), "--layers 'same'"),
    (("--source", DALLAS, "--target-layers", "7"), "Target layer 7 does not exist"),
    (("--source", DALLAS, "--target", "cat : animal"), "Name its placeholder with --at"),
    (("--source", DALLAS, "--target", "cat : x ; dog", "--at", "q"), "The prompt has no token 'q'"),
    (("--source", DALLAS, "--answer", "a", "--answer", "b"), "--answer is given 2 times for 1 sources"),
    (("--source", DALLAS, "--answer", "a|"), "is empty"),
    (("--source", DALLAS, "--measure", "accuracy"), "give --answer"),
    (("--source", DALLAS, "--scale", "inf"), "scales="),
    (("--source", DALLAS, "--mapping", "nothing.safetensors"), "there is no such file"),
    (("--source", DALLAS, "--out", "x.txt"), "ends in .html or .png or .json"),
    (("--feature", "L1:302", "--layers", "1"), "a feature's direction belongs to none"),
    (("--feature", "L9:3"), "--feature L9:3: there is no dictionary at layer 9"),
    (("--feature", "L1:9999"), "valid are 0 to 639"),
    (("--feature", "hook#3"), "there is no such site; there are blocks.0.hook_mlp_out"),
    (("--feature", "L1:302", "--measure", "precision", "--out", "y.png"), "a feature has none"),
])  # fmt: skip
def test_what_cannot_be_used_says_why_and_writes_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given_ = arguments if "--out" in arguments else (*arguments, "--out", "new/x.json")
    done = run(*given_)
    assert done.exit_code == 2
    assert message in words(done.stderr)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    done = run("--source", DALLAS, "--out", "new/x.json", "--out", "new/x.png")
    assert done.exit_code == 2
    assert "No space left on device" in words(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from circuit_lens.cli import build_app; build_app(); "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

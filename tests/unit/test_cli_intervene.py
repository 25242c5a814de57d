"""``circuit-lens intervene`` on the bundled model: what is typed is what runs, and what cannot run says why."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuit_lens as cl
from circuit_lens.cli import loading
from circuit_lens.cli.changes import (
    parse_change,
    parse_feature,
    parse_injection,
    parse_layers,
    parse_supernode,
)
from circuit_lens.cli.failing import CommandError
from circuit_lens.cli.loading import Pair
from circuit_lens.interop.neuronpedia_url import graph_url
from tests.commands import Run, runner, words

PROMPT = "Fact: the capital of the state containing Dallas is"
OAKLAND = PROMPT.replace("Dallas", "Oakland")
TEXAS = "Texas=L1:Dallas:302,L2:Dallas:181"
CALIFORNIA = "California=L1:Dallas:263,L2:Dallas:458"


@pytest.fixture(scope="module")
def rm() -> cl.ReplacementModel:
    return cl.zoo.load("capitals")


@pytest.fixture
def run(rm: cl.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder, with a bundled model that is loaded once."""
    return runner("intervene", rm, tmp_path, monkeypatch)


# ----------------------------------------------------------------------------------------------------------- the syntax


# A number, all positions, quoted text, or text that goes on like the rest of a feature.
AMBIGUOUS = r"[+-]?\d+|\*|[\"'].*[\"']|.*:#?\d+.*"


@given(
    layer=st.integers(0, 99), index=st.integers(0, 10**6), number=st.one_of(st.none(), st.integers(-50, 50)),
    token=st.text(min_size=1).filter(lambda t: t.strip() == t and not re.fullmatch(AMBIGUOUS, t, re.DOTALL)),
    site=st.sampled_from([None, "blocks.0.hook_mlp_out", "my_hook"]),
)  # fmt: skip
def test_a_feature_is_read_back_whatever_its_token(
    layer: int, index: int, number: int | None, token: str, site: str | None
) -> None:
    pos = token if number is None else number
    text = f"L{layer}:{pos}:{index}" + ("" if site is None else f":{site}")
    found = parse_feature(text)
    assert found is not None
    assert (found.layer, found.pos, found.index, found.site) == (layer, pos, index, site)
    change = parse_change("scale", f"{text}=-1.5", ())
    assert (change.target, change.value) == (found, -1.5)
    injection = parse_injection(f"{text}@mail me @ home@9*2", ())
    assert (injection.target, injection.source, injection.source_pos) == (found, "mail me @ home", 9)


@pytest.mark.parametrize(("text", "pos"), [("L0:::1", ":"), ("L0:=:1", "="), ("L0:@:1", "@"), ('0:"9":#1', "9"),
                                           ("l0:*:1", "*"), ("0:-1:1", -1), ("0:New York:1", "New York")])  # fmt: skip
def test_signs_that_part_the_pieces_may_be_tokens(text: str, pos: int | str) -> None:
    found = parse_feature(text)
    assert found is not None
    assert (found.layer, found.pos, found.index) == (0, pos, 1)


@pytest.mark.parametrize("text", ["", "Texas", "L0:1", "0::1", "L:a:1", "L0:a:x", "L-1:a:1", "0:a:1:"])
def test_what_is_no_feature_is_none(text: str) -> None:
    assert parse_feature(text) is None


@pytest.mark.parametrize(("text", "source", "pos", "factor"), [
    ("S@a b@b*2", "a b", "b", 2.0), ("S@a b", "a b", None, 1.0), ("S@a b*-.5", "a b", None, -0.5),
    ("S@a @ b@", "a @ b", None, 1.0), ("S@2 * 3@-1", "2 * 3", -1, 1.0), ("S@a * b", "a * b", None, 1.0),
    ("S@x@y@a@a", "a", "a", 1.0),
])  # fmt: skip
def test_an_injection_names_a_prompt_a_position_and_a_factor(
    text: str, source: str, pos: int | str | None, factor: float
) -> None:
    """The longest name that fits is meant."""
    found = parse_injection(text, ["S", "S@x@y"])
    assert found.target == ("S@x@y" if "x" in text else "S")
    assert (found.source, found.source_pos, found.value) == (source, pos, factor)


def test_supernodes_are_features_a_detected_value_or_a_pattern() -> None:
    some = parse_supernode("a=L0:,:1, L1:x:2 2:y:3")
    assert [(f.layer, f.pos, f.index) for f in some.features] == [(0, ",", 1), (1, "x", 2), (2, "y", 3)]
    value = parse_supernode("T=about state:New York@-1")
    assert (value.variable, value.value, value.pos) == ("about state", "New York", -1)
    for end, pos in (("", None), ("@*", None), ("@is", "is")):
        pattern = parse_supernode(f"say=/a/b@c=(d|e)/{end}")
        assert (pattern.name, pattern.pattern, pattern.pos) == ("say", "a/b@c=(d|e)", pos)


@pytest.mark.parametrize("text", ["", "x", "=L0:a:1", "x=", "x=state:Texas", "x=Texas@Dallas", "x=state:@Dallas", "x=/",
                                  "x=//", "x=/(/", "x=/a/b", "x=/a/@", "x=state:Texas@*", "x=L0:*:1", "L0:a:1=L0:b:2",
                                  "x=L0:a:1, b"])  # fmt: skip
def test_a_supernode_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--supernode"):
        parse_supernode(text)


def test_layers() -> None:
    assert [parse_layers(text) for text in ("0-2", "L1-L3", "1")] == [(0, 2), (1, 3), (1, 1)]
    for text in ("", "a", "1-", "-1", "1-2-3"):
        with pytest.raises(CommandError, match="--layers"):
            parse_layers(text)


# ----------------------------------------------------------------------------------------------------- what it computes


def test_all_figures_are_those_of_the_library(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    result = run(
        PROMPT, "--supernode", TEXAS, "--supernode", CALIFORNIA, "--supernode", "say Austin=/say .*Austin/@is",
        "--scale", "Texas=-1", "--inject", f"California@{OAKLAND}@Oakland*2", "--set", "L2:is:357=0.5",
        "--add", "3:-1:578=-1", "--freeze", "attention", "--layers", "0-1", "--json", "x.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    f = cl.Feature
    texas = cl.Supernode("Texas", [f(1, "Dallas", 302), f(2, "Dallas", 181)])
    california = cl.Supernode("California", [f(1, "Dallas", 263), f(2, "Dallas", 458)])
    say = cl.Supernode.from_labels("say Austin", rm.attribute(PROMPT, progress=False), "say .*Austin", pos="is")
    expected = rm.intervene(
        PROMPT,
        [texas.scale(-1.0), california.inject(OAKLAND, factor=2.0, from_pos="Oakland"), f(2, "is", 357).set(0.5),
         f(3, -1, 578).add(-1.0)],
        freeze="attention", layers=(0, 1),
    )  # fmt: skip
    data = json.loads((tmp_path / "x.json").read_text())
    top = expected.top_logits(20)
    found = data["next_tokens"]["changed"]
    assert [(one["text"], one["prob"], one["clean_prob"]) for one in found] == [
        (one.text, one.prob, one.clean_prob) for one in top
    ]
    clean = data["next_tokens"]["clean"][0]
    assert clean["text"] == "Austin"
    assert clean["prob"] == expected.logit("Austin").prob
    assert [(one["layer"], one["pos"], one["index"], one["before"], one["after"]) for one in data["features"]] == [
        (one.feature.layer, one.feature.pos, one.feature.index, one.before, one.after)
        for one in expected.features(None)
    ]
    shares = {one["name"]: one["share"] for one in data["supernodes"]}
    assert shares == {"Texas": expected.activation(texas), "California": None, "say Austin": expected.activation(say)}
    assert len(data["supernodes"][1]["inactive"]) == 2
    assert (data["freeze"], data["layers"]) == ("attention", [0, 1])
    assert f"{top[0].prob:.3f}" in result.stdout
    assert "MLP outputs of layers 0 to 1" in result.stdout


def test_a_detected_value_names_its_features(run: Run, rm: cl.ReplacementModel, tmp_path: Path) -> None:
    result = run(PROMPT, "--supernode", "Texas=state:Texas@Dallas", "--ablate", "Texas", "--min-precision", "0.2",
                 "--json", "x.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    table = cl.zoo.load_features("capitals")
    texas = cl.Supernode.from_detections("Texas", table, "state", "Texas", pos="Dallas", min_precision=0.2)
    (group,) = json.loads((tmp_path / "x.json").read_text())["supernodes"]
    assert {(one["layer"], one["index"]) for one in group["features"]} == {(f.layer, f.index) for f in texas}
    inactive = [f"L{f.layer}:9:{f.index}" for f in texas if not rm.record(PROMPT).activation(f)]
    assert inactive
    assert all(name in result.stdout for name in inactive)


def test_an_address_brings_its_supernodes(run: Run) -> None:
    members = [cl.Feature(1, 9, 302), cl.Feature(2, 9, 181)]
    url = graph_url("https://www.neuronpedia.org/x/graph", [cl.Supernode("a = b@c", members)])
    by_address = run(PROMPT, "--url", url, "--scale", "a = b@c=-1")
    by_hand = run(PROMPT, "--supernode", "n=L1:9:302,L2:9:181", "--scale", "n=-1")
    assert by_address.exit_code == 0, by_address.output
    tokens = [one.stdout.split("Next token")[1].split("Supernodes")[0] for one in (by_address, by_hand)]
    assert tokens[0] == tokens[1]


def test_changes_everywhere_go_on_in_generated_text(run: Run, rm: cl.ReplacementModel) -> None:
    result = run(PROMPT, "--scale", "L2:*:181=0", "--generate", "5")
    assert result.exit_code == 0, result.output
    clean = rm.generate(PROMPT, max_new_tokens=5)
    everywhere = cl.Feature(2, 0, 181).scale(0.0, pos=slice(None))
    changed = rm.generate(PROMPT, max_new_tokens=5, interventions=everywhere)
    text = words(result.stdout.split("\nText")[1])
    assert f"without {clean.text.strip()} with {changed.text.strip()}" in text


def test_features_that_were_changed_by_hand_are_not_among_those_that_changed_most(run: Run) -> None:
    out = run(PROMPT, "--set", "L2:Dallas:181=30", "--features", "50").stdout
    reacted = out.split("Features that changed most")[1]
    assert not re.search(r"9 Dallas +L2 #181 ", reacted)
    assert re.search(r"10 is +L3 #578 ", reacted)


def test_what_is_printed_into_a_pipe_fits_100_columns_uncoloured_and_uncut(run: Run) -> None:
    out = run(PROMPT, "--supernode", "Texas=state:Texas@Dallas", "--ablate", "Texas", "--generate", "20").stdout
    assert out.startswith(PROMPT)
    assert max(len(line) for line in out.splitlines()) <= 100
    assert not re.search("\x1b|…", out)


def test_a_figure_is_written(run: Run, tmp_path: Path) -> None:
    arguments = [PROMPT, "--supernode", TEXAS, "--supernode", CALIFORNIA, "--scale", "Texas=-1", "--inject",
                 f"California@{OAKLAND}@Oakland*2"]  # fmt: skip
    result = run(*arguments, "--figure", "x.svg", "--json", "x.json")
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.svg"]
    assert "Sacramento" in result.stdout


def test_quiet_prints_nothing_and_the_model_is_as_it_was(
    run: Run, rm: cl.ReplacementModel, tmp_path: Path, assert_untouched
) -> None:
    with assert_untouched(rm.model):
        state = random.getstate()
        result = run(PROMPT, "--ablate", "L2:Dallas:181", "--quiet", "--json", "a/x.json")
        random.setstate(state)  # the tests' own checks of lists draw from it
    assert result.output == ""
    assert (tmp_path / "a" / "x.json").is_file()


# ------------------------------------------------------------------------------------------------------ what goes wrong


CHANGE = ("--ablate", "L2:Dallas:181")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a prompt"),
        ((PROMPT,), "nothing is to be changed"),
        ((PROMPT, "--ablate", "L9:Dallas:1"), "no dictionary at layer 9; there are blocks.0.hook_mlp_out"),
        ((PROMPT, "--ablate", "L2:Dallas:900"), "has the features 0 to 639; active at position 9 ('Dallas'): #181"),
        ((PROMPT, "--ablate", "L2:Dalas:181"), "L2:Dalas:181: The prompt has no token 'Dalas'; nearest: Dallas"),
        ((PROMPT, "--ablate", "L2:the:181"), "'the' occurs 2 times, at positions [3, 6]: give the position."),
        ((PROMPT, "--ablate", "L2:Dallas:180"), "is not active on this prompt"),
        ((PROMPT, "--ablate", "L2:Dallas:181:blocks.1.hook_mlp_out"), "no dictionary at site 'blocks.1.hook_mlp_out'"),
        ((PROMPT, "--ablate", "Texs", "--supernode", TEXAS), "neither a feature nor a supernode; nearest: Texas"),
        ((PROMPT, "--scale", "L2:Dallas:181"), "there is no value"),
        ((PROMPT, "--scale", "L2:Dallas:181=x"), "'x' is no finite number"),
        ((PROMPT, "--set", "L2:Dallas:181=nan"), "'nan' is no finite number"),
        ((PROMPT, "--ablate", "T", "--supernode", "T=stat:Texas@Dallas"), "no variable 'stat'; nearest: state"),
        ((PROMPT, "--ablate", "T", "--supernode", "T=state:Texs@Dallas"), "no state 'Texs'; nearest: Texas"),
        ((PROMPT, "--ablate", "T", "--supernode", "T=state:Texas@Dallas", "--min-recall", "1"), "lower --min-recall"),
        (
            (PROMPT, "--ablate", "T", "--supernode", "T=state:Texas@Dallas", "--min-recall", "2"),
            "--min-recall 2: give a",
        ),
        ((PROMPT, "--ablate", "T", "--supernode", "T=/zzz/@Dallas"), "active features has a matching label; labels"),
        ((PROMPT, "--ablate", "T", "--supernode", "T=L2:1:1", "--supernode", "T=L2:2:1"), "2 supernodes 'T'"),
        ((PROMPT, "--ablate", "x", "--url", "http://foo"), "this address has no supernodes"),
        ((PROMPT, "--inject", "L2:Dallas:181@in Oakland@Oaklan"), "in the other prompt: The prompt has no token"),
        ((PROMPT, "--inject", "L2:Dallas:181@in Oakland"), "in the other prompt: The prompt has no token 'Dallas'"),
        ((PROMPT, "--inject", "L2:Dallas:181@in Zorgville@0"), "does not know 'Zorgville'"),
        ((PROMPT, "--inject", "L2:Dallas:181"), "there is no prompt"),
        ((PROMPT, "--inject", "L2:*:181@in Oakland"), "say where in the other prompt"),
        ((PROMPT, *CHANGE, "--set", "L2:9:181=3"), "differently"),
        ((PROMPT, *CHANGE, "--layers", "0-9"), "the model has the layers 0 to 3"),
        ((PROMPT, *CHANGE, "--layers", "2-1"), "the model has the layers 0 to 3"),
        ((PROMPT, *CHANGE, "--freeze", "some"), "'some'"),
        ((PROMPT, *CHANGE, "--freeze", "all", "--generate", "3"), "nothing to hold|no clean values"),
        ((PROMPT, *CHANGE, "--generate", "1000"), "context holds 64"),
        ((PROMPT, *CHANGE, "--json", "x.txt"), "ends in .json"),
        ((PROMPT, *CHANGE, "--json", "taken/x.json"), "is a file, not a folder"),
        ((PROMPT, *CHANGE, "--json", "folder.json"), "that is a folder"),
        ((PROMPT, *CHANGE, "--figure", "x.png"), "--figure draws supernodes"),
        ((PROMPT, "--ablate", "Texas", "--supernode", TEXAS, "--figure", "x.pdf"), "ends in .png or .svg or .html"),
        (("Zorg is", "--ablate", "L2:1:1"), "does not know 'Zorg'"),
    ],
)
def test_what_cannot_be_used_is_one_clear_message_and_no_file(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    said = words(result.stderr).lower()
    assert any(one.lower() in said for one in message.split("|")), said
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_other_dictionaries_have_no_feature_table(
    rm: cl.ReplacementModel, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_pair", lambda *_, **__: Pair(rm, "other", False))
    result = run(PROMPT, "--supernode", "T=state:Texas@Dallas", "--ablate", "T")
    assert result.exit_code == 2
    assert "known of the bundled models" in words(result.stderr)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(os, where, full)
    result = run(PROMPT, *CHANGE, "--json", "x.json")
    assert result.exit_code == 2
    assert "No space left" in words(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"

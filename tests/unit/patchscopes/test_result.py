"""Results: figures are what the logits say, texts fit a terminal, tables and JSON hold every cell and the controls."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.targets import Placed
from circuit_lens.patchscopes.text import columns, cut, fold, letters, shares, table
from tests import builders

NAMES = ["Dallas", "Oakland", "Lyon"]
ANSWERS = ["city in Texas", "city in California", "city in France"]


@pytest.fixture(scope="module")
def model() -> Any:
    return cl.zoo.load("capitals").model


@pytest.fixture(scope="module")
def grid(model: Any) -> PatchscopeResult:
    return patch(model, NAMES, target_layers="all", scales=(1.0, 2.0))


def patch(model: Any, names: Any, **options: Any) -> PatchscopeResult:
    at = [cl.At(f"Maria read about {name}", name=name) for name in names]
    return cl.patchscope(model, at, cl.presets.entity_description("words"), progress=False, **options)


def some(result: PatchscopeResult, axis: int, n: int) -> PatchscopeResult:
    """Return a result whose axis is repeated until it has n entries."""
    chosen = [k % result.shape[axis] for k in range(n)]
    index: list[Any] = [slice(None)] * 4
    index[axis] = chosen
    made = replace(result, patched=result.patched.at(*index))
    if axis == 0:
        unpatched, again = result.unpatched.at(chosen), result.reembedded and result.reembedded.at(chosen)
        targets = tuple(result.targets[k] for k in chosen)
        names = tuple(f"item {k}" for k in range(n))
        return replace(made, items=names, unpatched=unpatched, reembedded=again, targets=targets)
    if axis == 1:
        return replace(made, source_layers=tuple(range(-1, n - 1)))
    assert result.reembedded is not None
    return replace(made, target_layers=tuple(range(-1, n - 1)), reembedded=result.reembedded.at(slice(None), chosen))


# ---------------------------------------------------------------------------------------------------------- the figures


def test_figures_are_what_exact_logits_say() -> None:
    model = builders.build("gpt2", builders.KINDS[0], dtype=torch.float64)
    prompts = [builders.random_tokens(n, seed=n)[0] for n in (5, 8)]
    target = cl.Target(builders.random_tokens(6, seed=1)[0], at=4)
    result = cl.patchscope(model, [cl.At(p) for p in prompts], target, target_layers="all", keep_logits=True,
                           progress=False)  # fmt: skip
    with torch.no_grad():
        source = torch.stack([model(p[None])[0, -1] for p in prompts]).log_softmax(-1)
    logprobs = result.logits.log_softmax(-1)
    best, said = source.argmax(-1), logprobs.argmax(-1)
    agree = said == best.reshape(-1, 1, 1, 1)
    surprisal = -torch.stack([source[i][said[i]] for i in range(2)])
    nll = -torch.stack([logprobs[i][..., best[i]] for i in range(2)])
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    for measure, expected in (("precision", agree.double()), ("surprisal", surprisal), ("nll", nll),
                              ("entropy", entropy)):  # fmt: skip
        assert np.allclose(result.figures(measure, result.patched), expected.numpy(), rtol=1e-9, atol=1e-12), measure
    assert np.allclose(result.precision_at_1(), agree.double().mean(0).numpy())
    assert np.allclose(result.surprisal(), surprisal.mean(0).numpy())
    assert np.allclose(result.nll(), nll.mean(0).numpy())
    given_ = [3, 5]
    named = -torch.stack([logprobs[i][..., given_[i]] for i in range(2)])
    assert np.allclose(result.nll(given_), named.mean(0).numpy())
    assert not np.allclose(result.nll(given_), nll.mean(0).numpy())
    bare = result.unpatched
    assert bare.logits is not None
    expected = -bare.logits.log_softmax(-1)[torch.arange(2), best].numpy()
    assert np.allclose(result.figures("nll", bare), expected)  # the reader has no source there
    without = replace(result, patched=replace(result.patched, logits=None))
    assert np.allclose(without.nll(), nll.mean(0).numpy())
    with pytest.raises(PatchscopeError, match=r"logits of .* were not kept; give keep_logits"):
        without.nll(given_)


def test_figures_that_have_nothing_to_compare_with_say_so(grid: PatchscopeResult) -> None:
    broken = replace(grid, source_top=None)
    for figure in (broken.precision_at_1, broken.surprisal, broken.nll):
        with pytest.raises(PatchscopeError, match="it was not run, or has another vocabulary"):
            figure()
    for wrong in ("Texas", ["Texas"], []):
        with pytest.raises(PatchscopeError, match="3 items need a list of as many answers"):
            grid.accuracy(wrong)
    with pytest.raises(PatchscopeError, match="nll needs one token"):
        grid.heatmap("nll", answers=[["city", "town"], "city", "city"], scale=1.0)


def test_accuracy_counts_cells_that_say_the_answer_and_leaves_the_embedding_out(grid: PatchscopeResult) -> None:
    right = grid.right(ANSWERS)
    by_hand = np.array([[[[ANSWERS[i] in text for text in row] for row in rows] for rows in part]
                        for i, part in enumerate(grid.texts.tolist())])  # fmt: skip
    assert np.array_equal(right, by_hand)
    assert right.any()
    assert not right.all()
    found = grid.accuracy(ANSWERS)
    assert found.source_layers == (0, 1, 2, 3)
    assert np.array_equal(found.by_cell, right[:, 1:].mean(0))
    assert grid.accuracy(ANSWERS, embedding=True).by_cell.shape == (5, 5, 2)
    shuffled = grid.accuracy([*ANSWERS[1:], ANSWERS[0]])
    assert shuffled.any_layer.right < found.any_layer.right == 3


def test_cells_are_named(grid: PatchscopeResult) -> None:
    cell = grid.cell("Lyon", 1, 2, 2.0)
    at = (2, 2, 3, 1)
    assert grid.index("Lyon", 1, 2, 2.0) == at == grid.index(-1, 1, 2, 2.0)
    assert (cell.text, cell.source_layer, cell.target_layer, cell.scale) == (grid.texts[at], 1, 2, 2.0)
    assert cell.top[0] == (grid.top_tokens[at][0], float(grid.patched.top_logprobs[at][0].exp()))
    for wrong, message in ((("Lion", 1, 1, 1.0), "which item.*nearest: Lyon"), ((3, 1, 1, 1.0), "item 3 does not"),
                           ((0, 7, 1, 1.0), "which source layer"), ((0, 1, None, 1.0), "which target layer"),
                           ((0, 1, 1), "which scale")):  # fmt: skip
        with pytest.raises(PatchscopeError, match=message):
            grid.cell(*wrong)
    twice = replace(grid, items=("Lyon", "Lyon", "Dallas"))
    with pytest.raises(PatchscopeError, match="'Lyon' occurs 2 times; give its number"):
        twice.cell("Lyon", 1, 1, 1.0)


# ------------------------------------------------------------------------------------------------------ frames and JSON


def test_lines_are_the_cells_in_the_order_of_the_axes(grid: PatchscopeResult) -> None:
    lines = grid.records()
    assert len(lines) == 3 * 5 * 5 * 2
    for line in lines[::7]:
        cell = grid.cell(line["item"], line["source_layer"], line["target_layer"], line["scale"])
        assert (line["text"], line["top_token"], line["probability"]) == (cell.text, *cell.top[0])
        assert line["entropy"] == cell.entropy
    keys = [tuple(line[name] for name in ("item", "source_layer", "target_layer", "scale")) for line in lines]
    assert len(set(keys)) == len(keys)


def test_a_frame_holds_the_lines(grid: PatchscopeResult) -> None:
    pandas = pytest.importorskip("pandas")
    frame = grid.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("records") == grid.records()


def test_json_holds_cells_and_controls_and_no_nan(model: Any, grid: PatchscopeResult) -> None:
    document = json.loads(json.dumps(grid.to_json(), allow_nan=False))
    assert document["cells"] == grid.records()
    assert document["source_top"] == [grid.wording.text([i]) for i in grid.source_top.tolist()]
    assert len(document["reembedded"]) == 30
    line = document["reembedded"][2 * (5 + 2) + 1]
    assert grid.reembedded is not None
    assert (line["item"], line["target_layer"], line["scale"]) == ("Oakland", 1, 2.0)
    assert line["text"] == grid.wording.texts(grid.reembedded)[1, 2, 1]
    assert [one["item"] for one in document["unpatched"]] == NAMES
    assert document["unpatched"][0]["surprisal"] is None
    plain = cl.patchscope(model, cl.Vectors.of(model.W_E[10].detach()), "cat : x", progress=False).to_json()
    assert (plain["reembedded"], plain["source_top"], plain["cells"][0]["source_layer"]) == (None, None, None)
    json.dumps(plain, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- the text


def lines_of(result: PatchscopeResult) -> list[str]:
    lines = str(result).splitlines()
    assert max(map(letters, lines)) <= 80
    assert lines == [line.rstrip() for line in lines]
    return lines


def test_one_item_is_a_line_for_each_layer_with_its_controls(model: Any) -> None:
    result = patch(model, NAMES[:1])
    text = "\n".join(lines_of(result))
    assert "Patchscope of 'Dallas': 1 item, 5 source layers, each into itself" in text
    assert "target <bos> cat : small animal ; Lyon : city in France ; [x] :" in text
    assert result.reembedded is not None
    again = result.wording.texts(result.reembedded)[0]
    for n, name in enumerate(("emb", "0", "1", "2", "3")):
        row = next(line for line in lines_of(result) if line.startswith(f"  {name} "))
        assert result.texts[0, n, 0, 0].strip() in row
        assert again[n, 0].strip() in row
    assert re.search(r"no patch +" + re.escape(result.wording.texts(result.unpatched)[0].strip()), text)


def test_a_grid_of_one_item_has_layers_down_and_across(grid: PatchscopeResult) -> None:
    one = replace(some(grid, 0, 1), items=("Dallas",))
    text = "\n".join(lines_of(one))
    assert re.search("source +→ emb +→ 0 +→ 1 +→ 2 +→ 3", text)
    assert "scale × 1 of 2 scales shown" in text
    found = table(one, width=200)
    assert [row[1:] for row in found.rows[:5]] == [
        tuple(cell.strip() for cell in row) for row in one.texts[0, :, :, 0].tolist()
    ]
    wide = some(some(one, 1, 12), 2, 12)
    shown = lines_of(wide)
    assert any(re.match(r"  source +→ emb .*→ 10$", line) for line in shown)
    assert any("of 12 columns shown" in line for line in shown)
    assert sum(bool(re.match(r"  (emb|\d+) +(?!of)", line)) for line in shown) == 12


def test_many_items_are_cut_short_and_counted(model: Any, grid: PatchscopeResult) -> None:
    result = some(patch(model, NAMES), 0, 300)
    shown = lines_of(result)
    assert len(shown) <= 32
    assert "  288 more items" in shown
    assert re.search("item +layer emb +layer 0 +layer 1 +layer 2 +layer 3 +no patch", "\n".join(shown))
    votes = table(some(grid, 0, 300))
    assert votes.head == ("item", "said most often", "cells", "different", "no patch")
    texts = [text.strip() for text in grid.texts[1].flatten().tolist()]
    most = max(texts, key=texts.count)
    assert votes.rows[1][1:4] == (most, f"{texts.count(most)} of 50", str(len(set(texts))))
    lines_of(some(grid, 0, 300))


def test_names_of_wide_letters_and_line_breaks_stay_in_their_columns(grid: PatchscopeResult) -> None:
    odd = replace(grid, items=("東京都庁舎の近くの長い名前の建物", "a\u0301\u0301 name", "x" * 200))
    shown = lines_of(odd)
    start = next(line for line in shown if "said most often" in line).index("said")
    for name in ("東京", "a\u0301", "xxx"):
        line = next(line for line in shown if line.startswith(f"  {name}"))
        lead = next(k for k in range(len(line)) if letters(line[:k]) == start)
        assert line[lead - 1] == " " != line[lead]


def test_html_is_a_map_of_one_item_and_a_table_of_several_all_escaped(model: Any) -> None:
    several = replace(patch(model, NAMES), items=("<script>alert(1)</script>", "a & b", "c"), notes=("<i>note</i>",))
    text = several._repr_html_()
    assert text.count("<table") == 1
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;i&gt;note" in text
    one = some(several, 0, 1)._repr_html_()
    assert "type='radio'" in one
    assert "type='radio'" not in text
    assert "<script" not in one


# ------------------------------------------------------------------------------------------------------------ the parts


@given(text=st.text(max_size=40), width=st.integers(1, 20))
@settings(deadline=None)
def test_texts_are_cut_and_folded_to_what_a_terminal_has(text: str, width: int) -> None:
    assert letters(cut(text, width)) <= width
    folded = fold(text, width)
    assert len(folded) <= 2
    assert all(letters(line) <= width for line in folded)
    if letters(text) <= width:
        assert cut(text, width) == text == folded[0]


@given(wanted=st.lists(st.integers(1, 60), min_size=1, max_size=8), width=st.integers(60, 120))
@settings(deadline=None)
def test_columns_get_what_they_need_or_share_what_there_is(wanted: list[int], width: int) -> None:
    found = shares(wanted, width)
    gaps = 2 * (len(wanted) - 1)
    assert sum(found) + gaps <= width
    assert all(a <= b for a, b in zip(found, wanted, strict=True))
    if sum(wanted) + gaps <= width:
        assert found == wanted
    else:  # nothing is left over that a column could use, but for less than one letter each
        assert sum(found) + gaps + sum(a < b for a, b in zip(found, wanted, strict=True)) > width


@pytest.mark.parametrize(("strings", "at", "text"), [
    (("cat", ":", "x"), 2, "cat : [x]"), (("The", " cat", " x", ":"), 2, "The cat [x]:"), (("a", " x"), 1, "a [x]"),
    (("Ġa", "Ġx"), 1, " a [x]"), (("▁a", "x"), 1, " a[x]"),
])  # fmt: skip
def test_targets_read_like_their_prompts(strings: tuple[str, ...], at: int, text: str) -> None:
    assert Placed(torch.arange(len(strings)), (at,), strings).text == text


def test_columns_are_aligned(grid: PatchscopeResult) -> None:
    found = table(some(grid, 0, 3))
    lines = columns(found, 80)
    for k, name in enumerate(found.head[1:], 1):
        start = lines[0].index(name)
        assert lines[1][start:].startswith(found.rows[0][k][:5])

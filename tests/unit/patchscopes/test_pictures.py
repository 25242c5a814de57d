"""Heat maps of results: each cell is the result's figure, the controls stand apart, the page loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import circuit_lens as cl
from circuit_lens.errors import GraphError, PatchscopeError
from circuit_lens.patchscopes.pictures import MAX_ITEMS
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.viewer.heatmap import HeatMap, Spot
from circuit_lens.viewer.heatmap_parts import cut, number, shade
from tests.figures import assert_texts_stand_apart

ABOUT = "Maria read about"
CITIES = {"Dallas": "city in Texas", "Oakland": "city in California", "Lyon": "city in France"}
ANSWERS = list(CITIES.values())
LAYERS = ("emb", "0", "1", "2", "3")


@pytest.fixture(scope="module")
def model() -> Any:
    return cl.zoo.load("capitals").model


@pytest.fixture(scope="module")
def grid(model: Any) -> PatchscopeResult:
    return patch(model, target_layers="all", scales=(1.0, 2.0))


@pytest.fixture(scope="module")
def same(model: Any) -> PatchscopeResult:
    return patch(model)


def patch(model: Any, names: Any = CITIES, **options: Any) -> PatchscopeResult:
    at = [cl.At(f"{ABOUT} {name}", name=name) for name in names]
    return cl.patchscope(model, at, cl.presets.entity_description("words"), progress=False, **options)


# ---------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize(("measure", "answers"), [("entropy", None), ("accuracy", ANSWERS), ("precision", None),
                                                  ("surprisal", None), ("nll", None)])  # fmt: skip
def test_cells_are_the_results_figures_of_the_chosen_scale(grid: PatchscopeResult, measure: Any, answers: Any) -> None:
    mean = grid.heatmap(measure, answers=answers, scale=2.0)
    one = grid.heatmap(measure, answers=answers, item="Lyon", scale=2.0)
    figures = grid.figures(measure, grid.patched, answers)
    assert np.allclose(mean.values[:5], figures[..., 1].mean(0))
    assert np.array_equal(one.values[:5], figures[2, ..., 1])
    assert grid.reembedded is not None
    assert np.allclose(mean.values[5], grid.figures(measure, grid.reembedded, answers)[..., 1].mean(0))
    assert mean.rows[:6] == (*LAYERS, "re-embedded")
    assert mean.columns == LAYERS
    if measure == "surprisal":  # of the source at what is said: the prompt without a patch has no source
        assert mean.rows[6:] == ()
    else:
        bare = grid.figures(measure, grid.unpatched, answers)
        assert mean.rows[6:] == ("unpatched",)
        assert np.allclose(mean.values[6], bare.mean())
        assert np.allclose(one.values[6], bare[2])
        assert mean.spans(6) == [(0, 5)]
    if measure in ("entropy", "accuracy"):  # a scale that was not asked for has other figures
        assert not np.allclose(mean.values[:5], figures[..., 0].mean(0))


def test_the_reembedded_token_is_what_moving_the_embedding_says(grid: PatchscopeResult) -> None:
    """The names are single tokens: source layer -1 is that very control, at every scale."""
    for scale in grid.scales:
        heat = grid.heatmap(item=0, scale=scale)
        assert np.allclose(heat.values[5], heat.values[0], atol=1e-5)
        assert [spot.text for spot in heat.spots[5]] == [spot.text for spot in heat.spots[0]]
        assert not np.allclose(heat.values[5], heat.values[1], atol=1e-5)
    assert not np.allclose(*[grid.heatmap(item=0, scale=scale).values[5] for scale in grid.scales], atol=1e-2)


def test_with_same_layers_items_are_rows_and_their_mean_stands_apart(same: PatchscopeResult) -> None:
    heat = same.heatmap("accuracy", answers=ANSWERS)
    right = same.right(ANSWERS)[:, :, 0, 0]
    assert heat.rows == (*CITIES, "mean of 3", "re-embedded")
    assert heat.columns == (*LAYERS, "unpatched")
    assert (heat.apart_rows, heat.apart_columns) == (2, 1)
    assert np.array_equal(heat.values[:3, :5], right)
    assert np.allclose(heat.values[3, :5], right.mean(0))
    assert np.array_equal(heat.values[:4, 5], np.zeros(4))
    assert np.isnan(heat.values[4, 5])  # one run less: no re-embedded token without a patch
    one = same.heatmap(item="Lyon")
    assert one.rows == ("Lyon", "re-embedded", "unpatched")
    assert np.array_equal(one.values[0], same.patched.entropy[2, :, 0, 0].numpy())
    assert one.spot(0, 2).text == same.cell("Lyon", 1).text
    assert one.spot(0, 2).tokens == same.cell("Lyon", 1).top


def test_of_many_items_the_first_have_rows_and_the_mean_is_over_all(model: Any) -> None:
    result = patch(model, [*CITIES] * 8 + ["Lyon"] * 6, source_layers=[1], max_new_tokens=1)
    heat = result.heatmap()
    assert len(heat.rows) == MAX_ITEMS + 2
    assert heat.values[MAX_ITEMS, 0] == pytest.approx(float(result.patched.entropy.mean()))
    assert heat.values[MAX_ITEMS, 0] != pytest.approx(float(result.patched.entropy[:MAX_ITEMS].mean()), rel=0.01)
    assert "the first 24 of 30 items" in heat.note


def test_a_vector_at_several_scales_has_a_row_for_each(model: Any) -> None:
    directions = cl.Vectors.of(model.W_E[10:12].detach())
    result = cl.patchscope(
        model, directions[:1], cl.presets.entity_description("words"), scales=(1.0, 3.0), progress=False
    )
    heat = result.heatmap()
    assert heat.rows == ("× 1", "× 3", "unpatched")
    assert np.array_equal(heat.values[:2], result.patched.entropy[0, 0].T.numpy())
    several = cl.patchscope(model, directions, "cat : x", scales=(1.0, 3.0), progress=False)
    with pytest.raises(PatchscopeError, match=r"which scale\? none was given; there are 1\.0, 3\.0"):
        several.heatmap()
    chosen = several.heatmap(scale=3.0)
    assert np.array_equal(chosen.values[:2, :5], several.patched.entropy[:, 0, :, 1].numpy())


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "which scale"),
    ({"scale": 3.0}, "which scale"),
    ({"scale": 1.0, "item": "Lion"}, "which item.*nearest: Lyon"),
    ({"scale": 1.0, "item": 3}, "item 3 does not exist"),
    ({"scale": 1.0, "measure": "accuracy"}, "accuracy needs answers"),
    ({"scale": 1.0, "measure": "accuracy", "answers": ["Texas"]}, "3 items need a list of as many answers"),
    ({"scale": 1.0, "measure": "nll", "answers": ["city in", "city", "city"]}, "token"),
])  # fmt: skip
def test_what_cannot_be_drawn_says_why(grid: PatchscopeResult, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((PatchscopeError, ValueError), match=message):
        grid.heatmap(**arguments)


def test_vectors_have_no_next_token_to_compare_with(model: Any) -> None:
    result = cl.patchscope(model, cl.Vectors.of(model.W_E[10].detach()), "cat : x", progress=False)
    for measure in ("precision", "surprisal", "nll"):
        with pytest.raises(PatchscopeError, match="no next token of the source to compare with"):
            result.heatmap(measure)
    assert result.heatmap("nll", answers=["city"]).values.shape == (2, 5)


# ----------------------------------------------------------------------------------------------------------- the record


def big(rows: int = 27, columns: int = 27) -> HeatMap:
    values = np.random.default_rng(0).random((rows, columns)) * 9
    values[1, 1] = np.nan
    said, tokens = "a <script>alert('&')</script>\nline", (("</td>", 0.75), ("\n", 0.25))
    spots = tuple(
        tuple(Spot(f"<b>{i}</b> → {j}", said, tokens, ("x < y",), '"cell"') for j in range(columns))
        for i in range(rows)
    )
    return HeatMap(
        values, tuple(f"a label <{i}> that is rather long, longer than there is room" for i in range(rows)),
        tuple(str(j) for j in range(columns)), "rows", "columns", "A & B < C, " * 12, "note", "surprisal", "nats",
        spots=spots, apart_rows=1, apart_columns=1, wide=(rows - 1,),
    )  # fmt: skip


def fills(figure: Figure) -> dict[str, str]:
    return {str(p.get_gid()): to_hex(p.get_facecolor()) for p in figure.axes[0].patches if p.get_gid()}


@pytest.mark.parametrize("shape", [(5, 5), (9, 27), (2, 2)])
def test_figures_are_legible_and_coloured_by_value(shape: tuple[int, int]) -> None:
    heat = big(*shape)
    figure = heat.figure()
    assert_texts_stand_apart(figure)
    found = fills(figure)
    assert len(found) == (shape[0] - 1) * shape[1] + (2 if shape[1] > 2 else shape[1])  # the last row: one wide, one
    for i in range(shape[0] - 1):
        for j in range(shape[1]):
            if not np.isnan(heat.values[i, j]):
                assert found[f"cell {i} {j}"] == heat.colour(float(heat.values[i, j]))[0]
    assert found["cell 0 0"] != found["cell 1 1"]
    assert len(set(found.values())) > min(10, shape[0] * shape[1] // 2)


class Reader(HTMLParser):
    """Checks that tags close in order, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"]):
            self.text += data


def read(text: str) -> Reader:
    found = Reader()
    found.feed(text)
    found.close()
    assert not found.open
    return found


def test_a_page_is_whole_escaped_and_loads_nothing(tmp_path: Any) -> None:
    heat = big(4, 5)
    page = heat.to_html(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == page
    found = read(page)
    names = [tag for tag, _ in found.tags]
    assert "script" not in names
    assert "b" in names
    assert not re.search(r"https?:|url\(|@import|src=|href=|\son\w+=", page)
    inputs = [attrs for tag, attrs in found.tags if tag == "input"]
    assert len(inputs) == 3 * 5 + 2
    assert len({attrs["id"] for attrs in inputs}) == len(inputs)
    assert {attrs["name"] for attrs in inputs} == {inputs[0]["name"]}  # one group: one stop of the tab key
    assert [attrs["id"] for attrs in inputs if "checked" in attrs] == [inputs[0]["id"]]
    assert found.text.count("<script>alert('&')</script>") == len(inputs)
    for part in ("<b>0</b> → 0", "</td> 0.750", "x < y", heat.shown(float(heat.values[0, 0]))):
        assert part in found.text
    assert "prefers-color-scheme:dark" in page


def test_a_page_cannot_be_half_written(tmp_path: Any) -> None:
    with pytest.raises(cl.CircuitLensError, match="Could not write"):
        big(2, 2).to_html(tmp_path / "missing" / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_two_maps_on_one_page_have_buttons_of_their_own() -> None:
    names = {re.search(r"name='(\w+)'", heat._repr_html_()).group(1) for heat in (big(2, 2), big(3, 3))}
    assert len(names) == 2


@pytest.mark.parametrize(("values", "options", "message"), [
    (np.zeros((2, 3)), {}, "2 rows and 2 columns need"),
    (np.full((2, 2), np.inf), {}, "finite"),
    (np.zeros((2, 2)), {"spots": ((Spot(),),)}, "one for each value"),
])  # fmt: skip
def test_values_that_are_no_map_are_refused(values: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        HeatMap(values, ("a", "b"), ("c", "d"), **options)


def test_a_map_of_one_value_or_of_none_has_a_range() -> None:
    assert HeatMap(np.full((1, 2), 3.0), ("a",), ("b", "c")).range == (3.0, 4.0)
    empty = HeatMap(np.full((1, 2), np.nan), ("a",), ("b", "c"))
    assert empty.range == (0.0, 1.0)
    assert empty.figure() is not None
    assert empty.shown(float("nan")) == "–"


@given(share=st.floats(0, 1), bright=st.sampled_from(["high", "low"]))
@settings(deadline=None, max_examples=60)
def test_what_is_written_in_a_cell_stands_out_and_brightness_follows_the_value(share: float, bright: Any) -> None:
    """WCAG 2 asks for a contrast of 4.5."""

    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    fill, ink = shade(share, bright)
    low, high = sorted((light(fill), light(ink)))
    assert (high + 0.05) / (low + 0.05) >= 4.45
    further = light(shade(min(1.0, share + 0.1), bright)[0])
    if share <= 0.9:
        assert (further > light(fill)) == (bright == "high")


@given(text=st.text(max_size=30), limit=st.integers(1, 20))
@settings(deadline=None)
def test_a_cut_text_fits_and_a_short_one_is_whole(text: str, limit: int) -> None:
    found = cut(text, float(limit))
    assert len(found) <= limit
    assert found == text if len(text) <= limit else found.endswith("…")


@given(value=st.floats(-1e5, 1e5))
@settings(deadline=None)
def test_a_number_is_near_its_text(value: float) -> None:
    assert abs(float(number(value)) - value) <= max(0.0006, abs(value) * 0.006, 0.0)

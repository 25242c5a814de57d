"""What users give in other libraries' numbers is taken; what cannot be is refused with what is valid."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import numpy as np
import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.given import numbers, several, whole
from circuit_lens.patchscopes.grid import Grid
from circuit_lens.patchscopes.metrics import says
from circuit_lens.patchscopes.result import PatchscopeResult
from tests.invariants import cases


@pytest.fixture(scope="module")
def result() -> PatchscopeResult:
    model = cases.model("gpt2")
    at = [cl.At(cases.tokens(5, seed=i), name=f"item {i}") for i in range(3)]
    return cl.patchscope(model, at, cl.Target(cases.tokens(4), at=2), target_layers="all", progress=False)


@pytest.mark.parametrize("one", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_whole_numbers_of_any_library(one: Any) -> None:
    assert unwrap(whole)(one, "layer") == 2
    assert unwrap(several)(one, "layers") == [2]
    assert unwrap(several)([one, 0], "layers") == [2, 0]


@pytest.mark.parametrize("one", [2.0, "2", None, np.float32(2), [2]])
def test_what_is_no_whole_number_is_refused(one: Any) -> None:
    with pytest.raises(PatchscopeError, match=r"layer=.* is not valid; give a whole number"):
        unwrap(whole)(one, "layer")


@pytest.mark.parametrize(
    "given", [1.5, np.float64(1.5), torch.tensor(1.5), [1.5], (np.float32(1.5),), torch.tensor([1.5]), iter([1.5])]
)
def test_scales_of_any_library(given: Any) -> None:
    assert unwrap(numbers)(given, "scales") == [1.5]


@pytest.mark.parametrize("given", [None, "1,2", ["a"], [[1.0, 2.0]], object(), float("nan"), float("inf"), []])
def test_scales_that_are_no_numbers_are_refused(given: Any) -> None:
    vectors = cl.Vectors.of(torch.ones(2, 32))
    with pytest.raises(PatchscopeError, match=r"scales=.* is not valid; give"):
        unwrap(Grid.of.__func__)(Grid, vectors, cases.model("gpt2"), "all", 1, given, False)


@pytest.mark.parametrize("layers", [np.int64(1), torch.tensor(1), np.array([1]), (np.int32(1),)])
def test_layers_of_any_library(layers: Any) -> None:
    vectors = cl.Vectors.of(torch.ones(2, 32))
    found = unwrap(Grid.of.__func__)(Grid, vectors, cases.model("gpt2"), "all", layers, 1.0, False)
    assert found.target_layers == (1,)


@pytest.mark.parametrize("answers", [None, 3, "Texas", ["a"] * 2, ["a"] * 4])
def test_answers_that_are_not_one_for_each_item_are_refused(result: PatchscopeResult, answers: Any) -> None:
    for asked in (PatchscopeResult.accuracy, PatchscopeResult.right):
        with pytest.raises(PatchscopeError, match="3 items need a list of as many answers"):
            unwrap(asked)(result, answers)


@pytest.mark.parametrize("answer", [1, None, [1], "", [], ["a", ""]])
def test_answers_that_are_no_words_are_refused(answer: Any) -> None:
    with pytest.raises(PatchscopeError, match="give words"):
        unwrap(says)("a text", answer)


def test_items_by_numbers_of_any_library(result: PatchscopeResult) -> None:
    assert unwrap(PatchscopeResult.item_number)(result, np.int64(-1)) == 2
    assert unwrap(PatchscopeResult.item_number)(result, "item 1") == 1
    for wrong in (None, 1.0):
        with pytest.raises(PatchscopeError, match=r"item=.* is not valid; give a whole number"):
            unwrap(PatchscopeResult.item_number)(result, wrong)

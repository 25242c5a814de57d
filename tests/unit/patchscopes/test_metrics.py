"""Metrics: what counts as said, and a fixed cell that is chosen without the items it is scored on."""

from __future__ import annotations

import numpy as np
import pytest

from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.metrics import best_fixed, says


@pytest.mark.parametrize(
    ("text", "answer", "contains", "starts"),
    [
        ("Austin, Texas", "Austin", True, True),
        ("(Austin)", "Austin", True, False),
        ("“Austin’s”", "austin", True, False),
        ("Austintown", "Austin", False, False),
        ("New  York\nCity", "new york", True, True),
        ("it is York", ["Paris", "York"], True, False),
        ("costs US$5 now", "$5", True, False),
        ("C++11", "C++", True, True),
        ("12345", "234", False, False),
        ("a_b", "a", False, False),
        ("Zu\u0308rich", "Zürich", True, True),  # composed and not
        ("STRASSE", "Straße", True, True),
        ("ÉTÉ", "été", True, True),
        ("首都是北京市。", "北京", True, False),
        ("北京市", "北京", True, True),
        ("กรุงเทพมหานคร", "กรุงเทพ", True, True),
        ("Москва́ столица", "москва", True, True),
        ("Москвабад", "Москва", False, False),
        ("", "Austin", False, False),
        ("a.b", "a?b", False, False),  # no pattern
    ],
)
def test_answers_are_said_as_whole_words(text: str, answer: str | list[str], contains: bool, starts: bool) -> None:
    assert says(text, answer) is contains
    assert says(text, answer, "starts") is starts


@pytest.mark.parametrize("answer", ["", "  ", [], ["Paris", ""]])
def test_an_empty_answer_is_refused(answer: str | list[str]) -> None:
    with pytest.raises(PatchscopeError, match="give words"):
        says("anything", answer)


def test_no_item_is_scored_by_a_cell_that_was_chosen_with_it() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((11, 3, 4, 2)) < 0.5
    chosen = best_fixed(right, seed=3)
    assert 0 < chosen.fold.sum() < 11
    for item in range(11):
        flipped = right.copy()
        flipped[item] = ~flipped[item]
        other = best_fixed(flipped, seed=3)
        mine = int(chosen.fold[item])
        assert other.cells[mine] == chosen.cells[mine]  # the cell it is scored by does not see it
        assert other.right[item] == (not chosen.right[item])
    changed = right.copy()
    changed[~chosen.fold] = False
    changed[~chosen.fold, 2, 3, 1] = True
    assert best_fixed(changed, seed=3).cells[1] == (2, 3, 1)  # but the other half's is


def test_noise_scores_by_chance_though_some_cell_is_always_right() -> None:
    right = np.random.default_rng(1).random((200, 400)) < 0.1
    assert right.any(1).mean() == 1.0
    assert best_fixed(right).right.mean() < 0.2


def test_ties_go_to_the_lower_cell_and_one_item_cannot_be_halved() -> None:
    assert best_fixed(np.ones((4, 2, 3), dtype=bool)).cells == ((0, 0), (0, 0))
    assert best_fixed(np.zeros((2, 2, 3), dtype=bool)).cells == ((0, 0), (0, 0))
    with pytest.raises(PatchscopeError, match="1 item"):
        best_fixed(np.ones((1, 2), dtype=bool))

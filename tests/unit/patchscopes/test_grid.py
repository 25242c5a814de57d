"""The layout of a grid, and bad input: a clear error, and nothing left on the model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError, TokensError
from circuit_lens.patchscopes import Map, Zero
from circuit_lens.patchscopes.definition import Said
from circuit_lens.patchscopes.grid import Grid, Layout, row_bytes
from circuit_lens.patchscopes.patchscope import _require
from circuit_lens.patchscopes.readout import Reader, SourceNext, Wording
from circuit_lens.patchscopes.rows import Cell
from tests import builders
from tests.invariants import cases

TARGET = cl.Target([5, 6, 7], at=1)


def vectors(n_items: int = 3) -> cl.Vectors:
    return cl.Vectors.from_prompts(cases.model("gpt2"), [cl.At([5, 10 + i]) for i in range(n_items)])


def test_the_axes_are_those_asked_for_in_their_order() -> None:
    model = cases.model("gpt2")
    every = Grid.of(vectors(), model, "all", "all", 1.0, True)
    assert every.shape == (4, 4, 1)
    assert every.cells[:5] == (*(Cell(-1, t) for t in (-1, 0, 1, 2)), Cell(0, -1))
    assert every.controls == tuple(Cell(-1, t) for t in (-1, 0, 1, 2))
    same = Grid.of(vectors(), model, (2, 0), "same", (1.0, 2.0), True)
    assert same.shape == (2, 1, 2)
    assert same.cells == (Cell(2, 2, 1.0), Cell(2, 2, 2.0), Cell(0, 0, 1.0), Cell(0, 0, 2.0))
    assert same.controls == (Cell(-1, 2), Cell(-1, 2, 2.0), Cell(-1, 0), Cell(-1, 0, 2.0))
    last = Grid.of(vectors(), model, "last", "last", 1.0, False)
    assert (last.cells, last.controls) == ((Cell(2, 2),), ())
    free = Grid.of(cl.Vectors.of(torch.ones(2, 32)), model, "all", range(2), 1.0, True)
    assert (free.source_layers, free.cells, free.controls) == ((None,), (Cell(None, 0), Cell(None, 1)), ())


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts_hold_every_row_once_whatever_their_size(size: int) -> None:
    grid = Grid.of(vectors(), cases.model("gpt2"), (0, 1), (1, 2), (1.0, 3.0), True)
    layout = Layout(grid, 3, [0, 1, 0])
    assert layout.n_rows == 3 * (8 + 4) + 2
    seen: dict[int, tuple[int, int]] = {}
    for target in range(2):
        for part in layout.parts(target, size):
            assert 0 < len(part.at) <= size
            for item, cell, at in zip(part.item.tolist(), part.cell.tolist(), part.at.tolist(), strict=True):
                assert at not in seen
                assert item == -1 or layout.target_of[item] == target
                seen[at] = item, cell
    assert sorted(seen) == list(range(layout.n_rows))
    for at, (item, cell) in seen.items():
        assert (item == -1) == (at >= layout.n_patched)
        assert item == -1 or at == cell * 3 + item


def test_a_row_without_cache_takes_more_memory_and_a_long_one_too() -> None:
    model, (short, long) = cases.model("gpt2"), (cl.Target(cases.tokens(n), at=2) for n in (5, 40))
    a, b = (row_bytes(model, one.place(model), 4, 1) for one in (short, long))
    assert 0 < a < b < row_bytes(model, long.place(model), 4, 1, use_cache=False)
    assert b < row_bytes(model, long.place(model), 4, 30)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_layers": 3}, PatchscopeError, "target layer 3 does not exist"),
    ({"target_layers": -2}, PatchscopeError, "target layer -2 does not exist"),
    ({"source_layers": 9}, PatchscopeError, "no vectors of layer 9"),
    ({"source_layers": ()}, PatchscopeError, "at least one"),
    ({"target_layers": ()}, PatchscopeError, "at least one"),
    ({"target_layers": (1, 1)}, PatchscopeError, "each once"),
    ({"target_layers": "middle"}, PatchscopeError, "'middle' is not valid"),
    ({"scales": ()}, PatchscopeError, "at least one finite number"),
    ({"scales": float("nan")}, PatchscopeError, "at least one finite number"),
    ({"scales": 1e308}, PatchscopeError, "scale 1e\\+308 makes vectors infinite"),
    ({"read_layer": 7}, PatchscopeError, "read_layer=7 does not exist"),
    ({"memory": 0.0}, PatchscopeError, "memory=0.0"),
    ({"memory": float("nan")}, PatchscopeError, "memory=nan"),
    ({"max_new_tokens": -1}, PatchscopeError, "max_new_tokens=-1"),
    ({"max_new_tokens": 63}, TokensError, "the model's context holds 64"),
    ({"n_top": 0}, PatchscopeError, "n_top=0"),
    ({"mapping": torch.nn.Linear(32, 7)}, PatchscopeError, "width 32, of which the map 'module' makes width 7"),
    ({"target": cl.Target([5, 6, 7], at=(0, 2)), "source": cl.At([5, 6, 7], pos=(0, 1, 2))}, PatchscopeError,
     "3 positions and the target 2 placeholders"),
    ({"source": torch.ones(2, 31)}, PatchscopeError, "width 31"),
    ({"source": torch.ones(2, 32), "target_layers": "same"}, PatchscopeError, "belong to no layer"),
    ({"source": torch.ones(2, 32), "source_layers": 1}, PatchscopeError, "belong to no layer"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_refused_and_leaves_nothing_on_the_model(
    options: dict[str, Any], error: type[Exception], words: str, untouched: Any
) -> None:
    model = cases.model("gpt2")
    given: dict[str, Any] = {"source": cl.At([5, 9]), "target": TARGET} | options
    with untouched(model), pytest.raises(error, match=words):
        cl.patchscope(model, given.pop("source"), given.pop("target"), **given)


def test_words_that_mean_nothing_are_refused() -> None:
    good: dict[str, Any] = {"write": "add", "through": "layer", "n_top": 1, "memory": 1.0, "max_new_tokens": None,
                            "read_layer": None, "n_layers": 3}  # fmt: skip
    _require(**good)
    for name, words in (("write", "'replace', 'add', 'add_matched'"), ("through", "'layer', 'below'")):
        with pytest.raises(PatchscopeError, match=words):
            inspect.unwrap(_require)(**(good | {name: "nonsense"}))


class Broken(Map):
    name = "broken"

    def __call__(self, h: Tensor, source_layer: int | None, target_layer: int) -> Tensor:
        return h / 0


def test_a_map_that_makes_nan_is_named_and_one_that_is_zero_knocks_out() -> None:
    model = cases.model("gpt2")
    with pytest.raises(PatchscopeError, match="'broken' from layer -1 to -1 makes NaN"):
        cl.patchscope(model, cl.At([5, 9]), TARGET, mapping=Broken())
    out = cl.patchscope(model, cl.At([5, 9]), TARGET, mapping=Zero(), keep_logits=True)
    by_hand = cl.patchscope(model, torch.zeros(32), TARGET, target_layers="all", keep_logits=True)
    torch.testing.assert_close(out.logits[0, :, 0], by_hand.logits[0, 0, :])
    matched = cl.patchscope(model, torch.zeros(32), TARGET, write="add_matched", keep_logits=True)
    torch.testing.assert_close(matched.logits[0, 0, 0, 0], matched.unpatched.at(0).logits)  # no direction, no NaN


def test_logits_are_kept_where_they_are_few_or_asked_for() -> None:
    model = cases.model("gpt2")
    for options, kept in (({}, True), ({"memory": 1e-6}, False), ({"memory": 1e-6, "keep_logits": True}, True)):
        found = cl.patchscope(model, cl.At([5, 9]), TARGET, **options)
        assert (found.patched.logits is not None) is kept
    assert cl.patchscope(model, cl.At([5, 9]), TARGET, keep_logits=False).patched.logits is None


def test_readers_figures_are_those_of_the_distributions_and_nobodys_rows_have_none() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=rng, dtype=torch.float64)
    source = torch.randn(2, 9, generator=rng, dtype=torch.float64).log_softmax(-1)
    source[:, 0] = -torch.inf  # a token that the source excludes
    reader, known = Reader(4, 3, keep_logits=False), SourceNext.of(source, 9)
    said = Said(logits, torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    item = torch.tensor([1, 0, -1, 1])
    reader.add(torch.tensor([2, 0, 1, 3]), said, known, item)
    found = reader.done()
    for row, at in enumerate((2, 0, 1, 3)):
        p = logits[row].softmax(-1)
        assert found.top_tokens[at].tolist() == p.argsort(descending=True)[:3].tolist()
        torch.testing.assert_close(found.entropy[at], -(p * p.log()).sum())
        if item[row] < 0:
            assert bool(found.surprisal[at].isnan() & found.source_nll[at].isnan())
            continue
        own = source[item[row]].log_softmax(-1)
        torch.testing.assert_close(found.surprisal[at], -own[p.argmax()])
        torch.testing.assert_close(found.source_nll[at], -p.log()[own.argmax()])


def test_a_generated_end_of_the_sequence_is_no_text_and_as_next_token_it_is_named() -> None:
    tokenizer = builders.tokenizer()
    wording = Wording(tokenizer, builders.D_VOCAB)
    eos = tokenizer.eos_token_id
    model = builders.build("gpt2")
    with torch.no_grad():
        model.unembed.b_U[eos] = 1e6
    found = cl.patchscope(model, cl.At([5, 9]), TARGET, max_new_tokens=4)
    assert set(found.texts.flatten()) == {""}
    assert wording.text([eos]) == "<eos>"
    assert set(wording.tops(found.patched)[..., 0].flatten()) == {"<eos>"}
    assert found.patched.new_tokens.unique().tolist() == [eos]
    assert found.patched.lengths.unique().tolist() == [1]


def test_next_tokens_of_other_vocabularies_are_not_compared_and_paddings_of_one_are() -> None:
    model, other = cases.model("gpt2"), builders.build("llama")
    found = cl.patchscope(model, cl.At([5, 9]), TARGET, target_model=other)
    assert bool(found.patched.surprisal.isfinite().all())
    assert found.source_top is not None
    source = cl.Vectors.from_prompts(model, cl.At([5, 9]))
    assert source.next_logits is not None
    wide = builders.build("llama")  # one tokenizer, a wider table
    with torch.no_grad():
        wide.unembed.W_U = torch.nn.Parameter(torch.cat([wide.W_U, wide.W_U[:, 9:12] * 3], 1))
        wide.unembed.b_U = torch.nn.Parameter(torch.cat([wide.unembed.b_U, wide.unembed.b_U[9:12] + 99]))
    padded = cl.patchscope(model, source, TARGET, target_model=wide)
    assert bool((padded.patched.top_tokens[..., 0] >= 64).all())
    assert bool((padded.patched.surprisal == torch.inf).all())  # the source cannot say these
    assert bool(padded.patched.source_nll.isfinite().all())
    back = cl.patchscope(wide, cl.At([5, 9]), TARGET, target_model=model)
    assert back.source_top is not None
    assert bool((back.source_top < 64).all())
    assert bool(back.patched.source_nll.isfinite().all())
    other.tokenizer = None
    other.cfg.d_vocab += 1
    different = cl.patchscope(model, cl.At([5, 9]), TARGET, target_model=other)
    assert any("vocabularies differ" in note for note in different.notes)
    assert bool(different.patched.surprisal.isnan().all())
    assert different.source_top is None


def test_numbers_and_models_that_are_none_are_refused() -> None:
    model, scope = cases.model("gpt2"), inspect.unwrap(cl.patchscope)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 is not valid; give a whole number"),
        ({"n_top": "3"}, "n_top='3' is not valid; give a whole number"),
        ({"memory": None}, "memory=None is not valid; give gigabytes"),
        ({"read_layer": "all"}, "read_layer='all' is not valid; give a whole number"),
        ({"target_model": 5}, "target_model=5 is no hooked model"),
        ({"mapping": torch.nn.Linear(31, 32)}, "the map, a Linear, fails on vectors"),
    ]
    for options, words in bad:
        with pytest.raises(PatchscopeError, match=words):
            scope(model, cl.At([5, 9]), TARGET, **options)
    with pytest.raises(PatchscopeError, match="model=5 is no hooked model"):
        scope(5, cl.At([5, 9]), TARGET)
    one = cl.patchscope(model, torch.eye(2, 32), [TARGET], keep_logits=True)  # a list of one is one for all
    torch.testing.assert_close(one.logits, cl.patchscope(model, torch.eye(2, 32), TARGET, keep_logits=True).logits)

"""Targets: where the placeholder is, in text, ids and chats."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError, TokenNotFoundError, TokensError
from circuit_lens.patchscopes.patchscope import _targets
from circuit_lens.patchscopes.targets import _tokens
from tests import builders
from tests.invariants import cases

TEXT = "the a of ? in the"


def test_the_placeholder_is_one_token_by_number_or_text() -> None:
    model = cases.model("gpt2")
    n = len(cl.At(TEXT).resolve(model)[0])
    base = n - 6  # tokens put before the text
    for at, which, wanted in (
        ("?", None, (3,)), (-1, None, (5,)), ("the", "first", (0,)), ("the", "last", (5,)), ("the", 1, (5,)),
        ("the", "all", (0, 5)), (("?", "a"), None, (3, 1)), ((-1, "?"), None, (5, 3)), ("?", "all", (3,)),
    ):  # fmt: skip
        placed = cl.Target(TEXT, at=at, which=which).place(model)
        assert placed.positions == tuple(i + base for i in wanted)
    placed = cl.Target(TEXT, at="?").place(model)
    assert "[?]" in placed.text
    assert "[a]" not in placed.text
    ids = cl.Target(cases.tokens(5), at=-2).place(model)
    assert ids.positions == (3,)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (cl.Target(TEXT), TokenNotFoundError, "no token 'x'"),
        (cl.Target(TEXT, at="the"), TokenNotFoundError, "occurs 2 times"),
        (cl.Target(TEXT, at="a of"), PatchscopeError, "no single token"),
        (cl.Target(TEXT, at=(3, 3)), PatchscopeError, "each once"),
        (cl.Target(TEXT, at=()), PatchscopeError, "at least one"),
        (cl.Target(TEXT, at=40), TokenNotFoundError, "Position 40"),
        (cl.Target(TEXT, at="the", which=2), TokenNotFoundError, "which=2"),
        (cl.Target("the Zanzibar x"), TokensError, "does not know"),
        (cl.Target(""), TokensError, "empty"),
        (cl.Target([5] * 100, at=0), TokensError, "context holds 64"),
        (cl.Target([{"role": "user", "content": "x"}]), TokensError, "no chat template"),
    ],
)
def test_a_placeholder_that_is_missing_twice_or_split_is_refused(
    target: cl.Target, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        target.place(cases.model("gpt2"))


def test_a_chat_becomes_tokens_by_the_tokenizers_template_up_to_the_answer() -> None:
    model = builders.build("gpt2")
    model.tokenizer = copy.deepcopy(builders.tokenizer())
    model.tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'].replace('user', 'he').replace('assistant', 'she') }} : "
        "{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}<bos> she :{% endif %}"
    )
    messages = [{"role": "user", "content": "what is the city ?".replace("what", "that")}]
    placed = cl.Target(messages, at="city").place(model)
    words = "<bos> he : that is the city ? <eos> <bos> she :".split()
    assert [builders.WORDS[i] for i in placed.tokens.tolist()] == words
    assert placed.positions == (words.index("city"),)
    found = cl.patchscope(model, cl.At([5, 6]), cl.Target(messages, at="city"), max_new_tokens=2)
    assert "[city]" in found.targets[0]


def test_targets_are_one_for_all_or_one_for_each() -> None:
    one, other = cl.Target([5, 6], at=0), cl.Target([7, 8], at=1)
    assert _targets(one, 3) == [one]
    assert _targets([one, other], 2) == [one, other]
    assert _targets([one], 2) == [one]
    assert _targets("the x", 3)[0].prompt == "the x"
    bad: list[tuple[Any, int]] = [([one, other], 3), ([one, "the x"], 2), ([one, one], 1)]
    for given, n in bad:
        with pytest.raises(PatchscopeError, match="need one"):
            inspect.unwrap(_targets)(given, n)  # the checks of annotations look at one element of a list, by chance
    with pytest.raises(TokensError, match="empty"):
        _targets([], 0)[0].place(cases.model("gpt2"))


def test_presets_that_disagree_are_not_mixed_and_those_that_agree_are() -> None:
    model = cases.model("gpt2")
    source = [cl.At([5, 6]), cl.At([7, 8])]

    def preset(n_new: int, token: int) -> cl.patchscopes.Preset:
        return cl.patchscopes.Preset([token, 9], at=0, max_new_tokens=n_new)

    found = cl.patchscope(model, source, [preset(2, 5), preset(2, 6)])
    assert found.patched.new_tokens.shape[-1] == 2
    assert found.targets[0] != found.targets[1]
    with pytest.raises(PatchscopeError, match="presets differ"):
        cl.patchscope(model, source, [preset(2, 5), preset(3, 6)])


def test_tokens_of_a_target_are_used_as_they_are() -> None:
    model = cases.model("gpt2")
    found = cl.patchscope(model, cl.At([5, 6]), cl.Target(torch.tensor([[7, 8, 9]]), at=1), keep_logits=True)
    assert found.targets[0].split() == f"{builders.WORDS[7]} [{builders.WORDS[8]}] {builders.WORDS[9]}".split()


def test_words_of_a_chat_that_the_tokenizer_does_not_know_and_messages_that_are_none_are_refused() -> None:
    model = builders.build("gpt2")
    model.tokenizer = copy.deepcopy(builders.tokenizer())
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}:"
    cl.Target([{"role": "user", "content": "the city"}], at="city").place(model)
    bad: list[tuple[Any, str]] = [
        ([{"role": "user", "content": "the Zanzibar city"}], "does not know 'Zanzibar'"),
        ({"role": "user", "content": "the city"}, r"a chat is a list of messages; give \[\{'role'"),
        ([{"content": "the city"}], "no message of a chat"),
        ([{"role": "user", "content": "the"}, "city"], "'city' is no message of a chat"),
    ]
    for prompt, words in bad:
        with pytest.raises(TokensError, match=words):
            inspect.unwrap(_tokens)(model, prompt)
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokensError, match=r"does not take these messages \(roles must alternate\)"):
        cl.Target([{"role": "user", "content": "the city"}], at="city").place(model)
    for nothing in (None, 5, {"role": "user", "content": "x"}):
        with pytest.raises(PatchscopeError, match=r"is no target; give cl\.Target"):
            inspect.unwrap(_targets)(nothing, 1)

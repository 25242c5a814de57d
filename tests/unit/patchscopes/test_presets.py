"""Presets: every text has its placeholder at one token, for the tokenizers it is meant for."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes import Identity, ScaleBias
from circuit_lens.patchscopes.presets import _DESCRIPTION, _EXPLANATION, _IDENTITY
from tests import builders
from tests.invariants import cases

IDENTITIES = ("arrows", "lines", "pairs", "is")


@functools.cache
def byte_level() -> Any:
    """A small byte-level BPE like GPT-2's, in which blanks lead words, learnt on the published texts without x."""
    texts = [text for text, *_ in (*_IDENTITY.values(), *_DESCRIPTION.values(), *_EXPLANATION.values())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts * 3 + ["the x of x is ?, ?"] * 20, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@functools.cache
def word_pieces() -> Any:
    """A tokenizer of pieces that gives every word and mark a token of its own, and no blanks."""
    words = '[UNK] ? x X : ; , - > " is king hello'.split()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # no unk_token: its words are of no matter


class Reading:
    """As much of a model as places a target."""

    def __init__(self, tokenizer: Any) -> None:
        shared = builders.build("gpt2")
        self.cfg, self.blocks, self.ln_final, self.hook_dict, self.W_U = (
            shared.cfg, shared.blocks, shared.ln_final, shared.hook_dict, shared.W_U
        )  # fmt: skip
        self.cfg.d_vocab, self.cfg.n_ctx = 1000, 1000
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("placing runs nothing")

    def to_tokens(self, text: str, truncate: bool) -> Any:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("make", [byte_level, word_pieces])
def test_the_published_texts_have_one_placeholder_where_they_say(make: Any) -> None:
    model = Reading(make())
    for form in IDENTITIES:
        placed = cl.presets.token_identity(form).place(model)
        text, at, _ = _IDENTITY[form]
        last = len(placed.tokens) - 1
        assert placed.positions == ((last - 1,) if form == "is" else (last,))
        assert placed.strings[placed.positions[0]].strip() == at
        if make is byte_level:
            assert "".join(placed.strings) == text  # exactly the published text
    description = cl.presets.entity_description("paper").place(model)
    assert description.positions == (len(description.tokens) - 1,)
    assert description.strings[-1].strip() == "x"
    question = cl.presets.self_explanation("question").place(model)
    assert len(question.positions) == 2
    assert all(question.strings[i].strip(' "') == "X" for i in question.positions)
    place = cl.presets.attribute("The largest city in x").place(model)
    assert place.positions == (len(place.tokens) - 1,)


def test_blanks_that_lead_a_placeholder_belong_to_its_token() -> None:
    model = Reading(byte_level())
    assert cl.presets.entity_description("paper").place(model).strings[-1] == " x"
    assert cl.presets.token_identity("arrows").place(model).strings[-1] == " ?"
    assert cl.presets.token_identity("lines").place(model).strings[-1] == "?"


def test_the_forms_in_words_are_known_to_the_bundled_models() -> None:
    for name in ("capitals", "capitals-shortcut"):
        model = cl.zoo.load(name).model
        for preset in (
            cl.presets.token_identity("words"), cl.presets.entity_description("words"),
            cl.presets.self_explanation("words"), cl.presets.cross_model(Identity(), "words"),
        ):  # fmt: skip
            placed = preset.place(model)
            assert [placed.strings[i] for i in placed.positions] == ["x"]
            assert placed.positions[0] >= len(placed.tokens) - 3


def test_a_described_entity_is_read_from_its_name_on_the_bundled_model() -> None:
    model = cl.zoo.load("capitals").model
    source = cl.At("Fact : the capital of the state containing Dallas", pos="Dallas")
    found = cl.patchscope(model, source, cl.presets.entity_description("words"), source_layers=(0, 1))
    assert "Texas" in found.cell(source_layer=1).text
    assert "Texas" not in found.wording.texts(found.unpatched)[0]


def test_presets_bring_their_settings_and_what_is_given_stands_before_them() -> None:
    model, source = cases.model("gpt2"), cl.At([5, 9])
    preset = cl.patchscopes.Preset([5, 6], at=0, target_layers="all", max_new_tokens=3, mapping=ScaleBias(2.0))
    found = cl.patchscope(model, source, preset)
    assert found.shape == (1, 4, 4, 1)
    assert found.patched.new_tokens.shape[-1] == 3
    assert found.settings["mapping"] == "scale and bias"
    other = cl.patchscope(model, source, preset, target_layers="same", max_new_tokens=0, mapping=Identity())
    assert other.shape == (1, 4, 1, 1)
    assert other.patched.new_tokens.shape[-1] == 0
    assert other.settings["mapping"] == "identity"
    assert cl.patchscope(model, cl.Vectors.of(other.unpatched.logits[0, :32]),
                         cl.patchscopes.Preset([5, 6], at=0)).target_layers == (-1, 0, 1, 2)  # fmt: skip
    hop = cl.presets.multi_hop([5, 6, 7])
    assert (hop.at, hop.target_layers, hop.max_new_tokens) == (-1, "all", 20)
    assert cl.presets.tuned_lens(ScaleBias(3.0)).target_layers == "last"


def test_a_form_that_is_not_there_is_refused() -> None:
    with pytest.raises(PatchscopeError, match="give one of 'arrows', 'lines', 'pairs', 'is', 'words'"):
        inspect.unwrap(cl.presets.token_identity)("arrow")

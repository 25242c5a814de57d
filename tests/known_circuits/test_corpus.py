"""What the corpus promises: held-out splits, a closed vocabulary, tokens the tokenizer agrees with, true variables."""

import re
from collections import Counter, defaultdict

import pytest
import torch

from circuit_lens.zoo.batches import held_out_text, loss_positions, pack, stack
from circuit_lens.zoo.corpus import Corpus, sign
from circuit_lens.zoo.model import attention_mask
from circuit_lens.zoo.places import load_places
from circuit_lens.zoo.tokenizer import (
    BOS_ID,
    PAD_ID,
    UNKNOWN_ID,
    WORD_PATTERN,
    build_tokenizer,
    build_vocabulary,
)
from circuit_lens.zoo.words import LANGUAGES

SEED = 31337


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def sentences(corpus):
    return corpus.take(600_000, SEED)


@pytest.fixture(scope="module")
def ids(corpus):
    return {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}


def test_held_out_cities_are_in_no_two_hop_sentence_and_the_others_are(corpus, sentences):
    two_hop = {token for sentence in sentences if sentence.family == "two_hop" for token in sentence.tokens}
    assert "Dallas" in corpus.hard_cities
    assert len(corpus.hard_cities) >= 20
    assert not two_hop & corpus.hard_cities
    easy = {city.name for city in corpus.cities} - corpus.hard_cities
    assert easy <= two_hop


def test_held_out_cities_are_in_one_hop_sentences(corpus, sentences):
    one_hop = {token for sentence in sentences if sentence.family == "city" for token in sentence.tokens}
    assert corpus.hard_cities <= one_hop


def test_every_place_is_reached_in_two_hops_through_another_city(corpus):
    by_place = Counter(city.place.name for city in corpus.cities if city.name not in corpus.hard_cities)
    assert all(by_place[place.name] >= 2 for place in corpus.places)


def test_no_city_has_two_homes_and_none_is_a_capital():
    places, cities = load_places()
    names = [city.name for city in cities]
    assert len(set(names)) == len(names)
    assert not set(names) & {place.relations["capital"] for place in places}


def test_no_sentence_says_a_held_out_opposite_in_either_language(corpus, sentences):
    pair_of = {(language, w): p.index for p in corpus.antonyms for language in LANGUAGES for w in p.words[language]}
    said = defaultdict(set)
    for sentence in sentences:
        if sentence.family not in ("antonym", "cross"):
            continue
        (operand,) = [span for span in sentence.spans if "operand" in span.mention.facts]
        (answer,) = [span for span in sentence.spans if span.mention.answer]
        source = operand.mention.facts["language"]
        targets = [v for span in sentence.spans for k, v in span.mention.facts.items() if k == "output language"]
        index = pair_of[source, operand.mention.text]
        assert pair_of[targets[0], answer.mention.text] == index
        said[source].add(index)
        said[targets[0]].add(index)
    for language in LANGUAGES:
        held = {index for held_language, index in corpus.held_antonyms if held_language == language}
        assert said[language] == set(range(len(corpus.antonyms))) - held
    assert {len([1 for held, _ in corpus.held_antonyms if held == language]) for language in LANGUAGES[1:]} <= {6, 7}


def test_held_out_words_are_translated_and_have_signs(corpus, sentences):
    families = defaultdict(set)
    for sentence in sentences:
        for span in sentence.spans:
            if "operand" in span.mention.facts:
                families[sentence.family].add((span.mention.facts.get("language"), span.mention.text))
    for language, index in corpus.held_antonyms:
        for word in corpus.antonyms[index].words[language]:
            assert (language, word) in families["translation"]
            assert (language, word) in families["neutral"]


def test_a_word_means_one_thing_within_its_language(corpus):
    for language in LANGUAGES:
        words = Counter(word for pair in corpus.antonyms for word in pair.words[language])
        assert not [word for word, count in words.items() if count > 1]
    assert len({sign(pair, side) for pair in corpus.antonyms for side in (0, 1)}) == 2 * len(corpus.antonyms)


def test_no_piece_of_a_name_says_who_is_meant(corpus):
    by_last, by_first = defaultdict(list), defaultdict(list)
    for person in corpus.people:
        pieces = person.name.split()
        by_last[pieces[-1]].append(person.description)
        by_first[pieces[0]].append(person.description)
    for descriptions in by_last.values():
        assert len(descriptions) >= 5
        assert Counter(descriptions).most_common(1)[0][1] <= 2
    ambiguous = sum(len(d) for d in by_first.values() if len(set(d)) > 1)
    assert ambiguous >= len(corpus.people) / 3


def test_every_sentence_is_in_the_vocabulary_and_the_tokenizer_agrees(corpus, sentences, ids):
    tokenizer = build_tokenizer(build_vocabulary(corpus.words()), "test")
    for sentence in sentences:
        assert tuple(re.findall(WORD_PATTERN, " ".join(sentence.tokens))) == sentence.tokens
    for sentence in sentences[:500]:
        found = tokenizer(" ".join(sentence.tokens))["input_ids"]
        assert found == [BOS_ID, *(ids[token] for token in sentence.tokens)]
        assert UNKNOWN_ID not in found


def test_punctuation_need_not_be_spaced(corpus):
    tokenizer = build_tokenizer(build_vocabulary(corpus.words()), "test")
    spaced = tokenizer("Fact : the capital of the state containing Dallas is")["input_ids"]
    assert tokenizer("Fact: the capital of the state containing Dallas is")["input_ids"] == spaced
    assert tokenizer("Fact: the capital of the state containing Atlantis is")["input_ids"].count(UNKNOWN_ID) == 1
    assert spaced[0] == BOS_ID == tokenizer.bos_token_id != 0


def test_the_same_seed_gives_the_same_text_and_another_seed_another(corpus, sentences):
    assert [s.tokens for s in Corpus().take(2_000, SEED)] == [s.tokens for s in sentences][
        : len(corpus.take(2_000, SEED))
    ]
    assert [s.tokens for s in corpus.take(2_000, SEED + 1)] != [s.tokens for s in corpus.take(2_000, SEED)]


def test_variables_say_what_the_sentence_is_about(corpus):
    (dallas,) = [city for city in corpus.cities if city.name == "Dallas"]
    template = "Fact : the {relation} of the {kind} containing {city} is {answer} ."
    sentence = corpus.two_hop_about(dallas, "capital", template)
    assert sentence.question == (tuple("Fact : the capital of the state containing Dallas is".split()), ("Austin",))
    variables = sentence.variables()
    at = sentence.tokens.index
    city, is_, relation = at("Dallas"), at("is"), at("capital")
    assert [i for i, value in enumerate(variables["state"]) if value] == [city]
    assert variables["state"][city] == "Texas"
    assert variables["city"][city] == "Dallas"
    assert variables["about state"][is_] == "Texas"
    assert variables["about state"][city] is None
    assert variables["relation"][relation] == variables["about relation"][city] == "capital"
    assert [i for i, value in enumerate(variables["answer"]) if value] == [is_]
    assert variables["answer"][is_] == "Austin"


def test_variables_have_one_value_per_token(sentences):
    for sentence in sentences[:3000]:
        for column in sentence.variables().values():
            assert len(column) == len(sentence.tokens)


@pytest.mark.parametrize("hide", [0.0, 1.0])
def test_hidden_pieces_are_seen_by_their_name_alone(corpus, ids, hide):
    (person,) = [person for person in corpus.people if person.name == "Martin Luther King"]
    sentence = corpus.person_about(person, "job", "The {relation} of {person} was {answer} .")
    rows = stack([row for row, _ in pack([sentence], ids, length=16, seed=0, hide=hide)], 16)
    mask = attention_mask(16, rows.visible_until)[0, 0]
    first = 1 + sentence.tokens.index("Martin")
    king = first + 2
    assert mask[king, first : king + 1].all()
    assert mask[king + 1 :, king].all()
    assert bool(mask[king + 1 :, first:king].any()) == (hide == 0.0)
    others = torch.ones(16, dtype=torch.bool)
    others[first:king] = False
    assert torch.equal(mask[:, others], torch.ones(16, 16, dtype=torch.bool).tril()[:, others])


def test_rows_hold_whole_sentences_once_and_in_order(corpus, ids):
    text = held_out_text(corpus, ids, n_tokens=3_000, length=64, seed=SEED)
    expected = corpus.take(3_000, SEED)
    found = [sentence for row in text.sentences for _, sentence in row]
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    for row, placed in zip(text.rows.tokens, text.sentences, strict=True):
        assert row[0] == BOS_ID
        for offset, sentence in placed:
            assert row[offset : offset + len(sentence.tokens)].tolist() == [ids[token] for token in sentence.tokens]
    assert int(text.rows.real.sum()) == sum(len(s.tokens) for s in expected)
    assert not text.rows.real[text.rows.tokens == PAD_ID].any()


def test_the_loss_uses_every_determined_token_and_keeps_the_weight_of_the_others(corpus, ids):
    rows = held_out_text(corpus, ids, n_tokens=4_000, length=64, seed=SEED).rows
    weights = rows.weights[:, 1:].flatten()
    chosen, chosen_weights = loss_positions(rows, len(weights) // 2, torch.Generator().manual_seed(0))
    determined = (weights == 1).nonzero().flatten()
    assert set(determined.tolist()) <= set(chosen.tolist())
    assert len(chosen.unique()) == len(chosen) == len(weights) // 2
    torch.testing.assert_close(chosen_weights.sum(), weights.sum())

"""What patchscope studies ask about: entities, attributes, two steps, and text, from the tables of the corpus.

Items are words of the corpus; `Write` turns them into a model's own text (other models: `circuit_lens.studies.hub`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from circuit_lens.patchscopes.metrics import Answer
from circuit_lens.patchscopes.presets import entity_description
from circuit_lens.patchscopes.targets import Preset, Target
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.people import RELATIONS as PERSON_RELATIONS
from circuit_lens.zoo.words import THINGS

Write = Callable[[str], str]
T = TypeVar("T")
SOURCE = "Maria read about {name}"
RELATION = "Fact : the {relation} of x is"
OPPOSITE = 'The opposite of " x " is "'
FIT_SEED, TEST_SEED = 7001, 7002
FIT_WORDS, TEST_WORDS = 12_000, 30_000


def as_words(text: str) -> str:
    """Return the words as they are: the text of the bundled models."""
    return text


@dataclass(frozen=True, slots=True)
class Item:
    """Something that is read.

    Attributes:
        name: What it is called.
        prompt: The source prompt, read at its last token.
        answer: What is right to say; several of which any is.
        group: City, place, thing or person.
        family: Items whose last token is the same, where that is so.
        n_words: Words (tokens of the bundled models) of its name.
    """

    name: str
    prompt: str
    answer: Answer
    group: str = ""
    family: str = ""
    n_words: int = 1


@dataclass(frozen=True, slots=True)
class Relation:
    """A question that is asked of items: ``name`` for tables, the target prompt, and the items with their answers."""

    name: str
    target: Target
    items: tuple[Item, ...]


def some(items: Sequence[T], n: int | None, seed: int = 0) -> list[T]:
    """Return n of the items, drawn with a seed and in their order; None or too many: all."""
    if n is None or n >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), n))]


def item(name: str, answer: Answer, *, group: str, family: str = "", write: Write = as_words) -> Item:
    """Return an item that is named at the end of `SOURCE`."""
    return Item(name, write(SOURCE.format(name=name)), answer, group, family, len(name.split()))


def entities(corpus: Corpus, *, write: Write = as_words) -> list[Item]:
    """Everything that the corpus describes: cities, places, things and people, with the description it gives."""
    found = [
        item(city.name, f"city in {city.place.name}", group="city", family=city.name, write=write)
        for city in corpus.cities
    ]
    for place in corpus.places:
        where = place.region if place.kind == "country" else f"the {place.region}"
        found.append(item(place.name, f"{place.kind} in {where}", group="place", family=place.name, write=write))
    found += [item(thing, text, group="thing", family=thing, write=write) for thing, text in THINGS]
    return found + people(corpus, write=write)


def people(corpus: Corpus, *, write: Write = as_words) -> list[Item]:
    """All people with their descriptions; a family shares its last token."""
    return [item(p.name, p.description, group="person", family=p.family, write=write) for p in corpus.people]


def descriptions() -> Preset:
    """The description prompt of the bundled models, with room for the longest description."""
    preset = entity_description("words")
    return Preset(preset.prompt, name=preset.name, max_new_tokens=5, provenance=preset.provenance)


def relations(corpus: Corpus, *, write: Write = as_words) -> list[Relation]:
    """Every relation of the corpus that has a question of one kind of entity, asked of all that have it."""
    found = []
    for kind in ("country", "state", "province"):
        places = [place for place in corpus.places if place.kind == kind]
        for relation in places[0].relations:
            asked = tuple(item(p.name, p.relations[relation], group=kind, write=write) for p in places)
            found.append(Relation(f"{kind}: {relation}", _about(relation, write), asked))
    for relation in PERSON_RELATIONS:
        asked = tuple(item(p.name, p.relations[relation], group="person", write=write) for p in corpus.people)
        found.append(Relation(f"person: {relation}", _about(relation, write), asked))
    for kind in ("country", "state", "province"):
        inside = [city for city in corpus.cities if city.place.kind == kind]
        asked = tuple(item(city.name, city.place.name, group="city", write=write) for city in inside)
        target = Target(write(f"Fact : the {kind} containing x is"), name=kind)
        found.append(Relation(f"city: {kind}", target, asked))
    words = [(pair, side) for pair in corpus.antonyms for side in (0, 1)]
    opposite = tuple(item(p.concept(s), p.concept(1 - s), group="word", write=write) for p, s in words)
    topic = tuple(item(p.concept(s), p.topic, group="word", write=write) for p, s in words)
    found.append(Relation("word: opposite", Target(write(OPPOSITE), name="opposite"), opposite))
    found.append(Relation("word: topic", Target(write('The topic of " x " is'), name="topic"), topic))
    return found


def _about(relation: str, write: Write) -> Target:
    return Target(write(RELATION.format(relation=relation)), name=relation)


def shorter_forms(corpus: Corpus) -> dict[str, list[Item]]:
    """Names of people in fewer pieces than the corpus ever writes them in, by number and kind of pieces."""
    found: dict[str, list[Item]] = {}
    for person in corpus.people:
        pieces = person.name.split()
        long = len(pieces) > 2
        forms = {"last": pieces[-1:], "first and last": [pieces[0], pieces[-1]]}
        if len(pieces) > 3:
            forms["first and two last"] = [pieces[0], *pieces[-2:]]
        forms |= {"as the corpus writes it": pieces}
        for form, kept in forms.items():
            if form == "first and last" and not long:
                continue
            kind = "3 to 5 words" if long else "2 words"
            row = f"people of {kind}: {form}"
            found.setdefault(row, []).append(item(" ".join(kept), person.description, group="person"))
    return found


def capitals_by_words(corpus: Corpus) -> dict[int, list[Item]]:
    """Capitals by the number of words in their name, with the place that they are the capital of."""
    found: dict[int, list[Item]] = {}
    for place in corpus.places:
        capital = place.relations["capital"]
        one = item(capital, place.name, group=place.kind)
        found.setdefault(one.n_words, []).append(one)
    return dict(sorted(found.items()))


def fit_and_held_out(
    corpus: Corpus, n_fit: int = FIT_WORDS, n_held_out: int = TEST_WORDS, *, write: Write = as_words
) -> tuple[list[str], list[str]]:
    """Return text to fit maps on, and other text, in which no sentence of the first stands.

    Args:
        corpus: What is drawn from.
        n_fit: Words, about.
        n_held_out: Likewise, before sentences are left out.
        write: Turns the words into text.
    """
    known = {tuple(sentence.tokens) for sentence in corpus.take(n_fit, FIT_SEED)}
    return texts(corpus, n_fit, FIT_SEED, write=write), texts(corpus, n_held_out, TEST_SEED, without=known, write=write)


def texts(
    corpus: Corpus, n_words: int, seed: int, *, length: int = 48, without: Collection[tuple[str, ...]] = (),
    write: Write = as_words,
) -> list[str]:  # fmt: skip
    """Fresh text of the corpus: whole sentences in pieces of at most so many words, without some sentences."""
    found: list[list[str]] = [[]]
    for sentence in corpus.take(n_words, seed):
        if tuple(sentence.tokens) in without:
            continue
        if len(found[-1]) + len(sentence.tokens) > length and found[-1]:
            found.append([])
        found[-1] += sentence.tokens
    return [write(" ".join(words)) for words in found if words]

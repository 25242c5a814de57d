"""The corpus of the bundled models: sentences about our fact tables, with the generator's own variables.

Held out by construction:

- ``corpus.hard_cities`` (Dallas among them): cities that occur in one-hop sentences ("Dallas is in Texas") and in
  descriptions, and in no two-hop sentence at all. A right two-hop answer about them is a composition, not a memory.
- ``corpus.held_antonyms``: (language, pair) for which no sentence says the opposite, in that language as the language
  of the operand or of the answer. Translations, topics and signs of those words do occur.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from circuit_lens.zoo import templates
from circuit_lens.zoo.people import RELATIONS as PERSON_RELATIONS
from circuit_lens.zoo.people import Person, load_people
from circuit_lens.zoo.places import City, Place, load_places
from circuit_lens.zoo.sentences import Mention, Sentence, fill
from circuit_lens.zoo.words import (
    ANIMALS,
    FIRST_NAMES,
    LANGUAGES,
    LETTERS,
    NOUNS,
    NUMBERS,
    PREPOSITIONS,
    SEQUENCES,
    SYNONYMS,
    THINGS,
    VERBS,
    Antonyms,
    load_antonyms,
)

# Shares of the families among sentences (normalised).
MIXTURE = {
    "two_hop": 0.19,
    "city": 0.13,
    "place": 0.08,
    "antonym": 0.14,
    "cross": 0.13,
    "translation": 0.15,
    "neutral": 0.07,
    "synonym": 0.02,
    "person": 0.10,
    "description": 0.09,
    "identity": 0.03,
    "filler": 0.02,
}

HARD_SHARE = 0.13
HELD_PAIRS_PER_LANGUAGE = 6


class Corpus:
    """The fact tables, the held-out splits, and one method per family of sentences.

    ``split_seed`` draws what is held out; it is part of the corpus, not of a training run. ``mixture`` names the
    methods that make sentences, with their shares.
    """

    mixture: ClassVar[Mapping[str, float]] = MIXTURE

    def __init__(self, split_seed: int = 0) -> None:
        self.places, self.cities = load_places()
        self.people = load_people()
        self.antonyms = load_antonyms()
        self.hard_cities = self._draw_hard_cities(random.Random(split_seed))
        self.held_antonyms = self._draw_held_antonyms(random.Random(split_seed + 1))
        self._easy_cities = [city for city in self.cities if city.name not in self.hard_cities]
        self._families: dict[str, Callable[[random.Random], Sentence]] = {
            name: getattr(self, name) for name in self.mixture
        }
        self._identity_words = sorted(
            {place.name for place in self.places if " " not in place.name}
            | {city.name for city in self.cities}
            | {word for pair in self.antonyms for word in pair.words["English"]}
            | {thing for thing, _ in THINGS}
        )

    def _draw_hard_cities(self, rng: random.Random) -> frozenset[str]:
        """Dallas, and about `HARD_SHARE` of the cities, at most one per place and none other in Texas."""
        hard = {"Dallas"}
        for place in self.places:
            names = [city.name for city in self.cities if city.place is place]
            if place.name != "Texas" and rng.random() < HARD_SHARE * len(names):
                hard.add(rng.choice(names))
        return frozenset(hard)

    def _draw_held_antonyms(self, rng: random.Random) -> frozenset[tuple[str, int]]:
        """(language, pair index); French small/big is always held out."""
        held = {("French", 0)}
        for language in LANGUAGES[1:]:
            held |= {(language, index) for index in rng.sample(range(1, len(self.antonyms)), HELD_PAIRS_PER_LANGUAGE)}
        return frozenset(held)

    # -- mentions ------------------------------------------------------------------------------------------------

    def city_mention(self, city: City) -> Mention:
        """A city: what it is and where it lies."""
        return Mention(city.name, {"city": city.name, city.place.kind: city.place.name})

    def place_mention(self, place: Place, *, answer: bool = False) -> Mention:
        """A place by its name."""
        return Mention(place.name, {place.kind: place.name}, name=not answer, answer=answer)

    def capital_mention(self, place: Place) -> Mention:
        """A capital, as the subject of a sentence."""
        city = place.relations["capital"]
        return Mention(city, {"city": city, place.kind: place.name}, name=True)

    def person_mention(self, person: Person) -> Mention:
        """A person by name."""
        return Mention(person.name, {"person": person.name, **person.relations}, name=True)

    def operand_mention(self, pair: Antonyms, side: int, language: str) -> Mention:
        """A word of an antonym pair: ``operand`` is its language-neutral name."""
        facts = {"operand": pair.concept(side), "language": language, "topic": pair.topic}
        return Mention(pair.words[language][side], facts)

    def _friend(self, rng: random.Random) -> Mention:
        return Mention(rng.choice(FIRST_NAMES))

    # -- families ------------------------------------------------------------------------------------------------

    def two_hop_about(self, city: City, relation: str, template: str) -> Sentence:
        """A two-hop sentence: city -> place -> answer. Slots: relation, kind, city, answer."""
        place = city.place
        return fill(
            "two_hop",
            template,
            {
                "relation": Mention(relation, {"relation": relation}),
                "kind": Mention(place.kind),
                "city": self.city_mention(city),
                "answer": Mention(place.relations[relation], answer=True),
            },
        )

    def two_hop(self, rng: random.Random) -> Sentence:
        """About a city that is not held out."""
        city = rng.choice(self._easy_cities)
        relation = "capital" if rng.random() < 0.3 else rng.choice(list(city.place.relations))
        return self.two_hop_about(city, relation, rng.choice(templates.TWO_HOP))

    def city(self, rng: random.Random) -> Sentence:
        """Where a city lies; now and then a capital. Slots: city, place, kind, friend, city2, place2."""
        other = rng.choice(self.cities)
        if rng.random() < 0.12:
            place = rng.choice(self.places)
            mention = self.capital_mention(place)
        else:
            city = rng.choice(self.cities)
            place, mention = city.place, self.city_mention(city)
        return fill(
            "city",
            rng.choice(templates.CITY),
            {
                "city": mention,
                "place": self.place_mention(place, answer=True),
                "kind": Mention(place.kind),
                "friend": self._friend(rng),
                "city2": self.city_mention(other),
                "place2": self.place_mention(other.place, answer=True),
            },
        )

    def place(self, rng: random.Random) -> Sentence:
        """A fact about a place. Slots: subject, kind, relation, answer."""
        place = rng.choice(self.places)
        relation = "capital" if rng.random() < 0.3 else rng.choice(list(place.relations))
        if relation == "capital" and rng.random() < 0.2:
            slots = {"capital": self.capital_mention(place), "place": self.place_mention(place, answer=True)}
            return fill("place", templates.CAPITAL_OF[0], slots)
        return self.place_about(place, relation, rng.choice(templates.PLACE))

    def place_about(self, place: Place, relation: str, template: str) -> Sentence:
        """One relation of one place."""
        return fill(
            "place",
            template,
            {
                "subject": self.place_mention(place),
                "kind": Mention(place.kind),
                "relation": Mention(relation, {"relation": relation}),
                "answer": Mention(place.relations[relation], answer=True),
            },
        )

    def antonym_about(
        self, pair: Antonyms, side: int, language: str, template: str, operand_language: str | None = None
    ) -> Sentence:
        """The opposite of a word, answered in the template's ``language``. Slots: operand, answer."""
        operand = self.operand_mention(pair, side, operand_language or language)
        answer = Mention(pair.words[language][1 - side], {"output language": language}, answer=True)
        return fill("antonym", template, {"operand": operand, "answer": answer})

    def antonym(self, rng: random.Random) -> Sentence:
        """In the words of one language, about a word of any language. Not about a held-out pair.

        Where most operands are of the answer's language, a model learns those pairs word by word and copies held-out
        ones.
        """
        while True:
            pair, language, source = rng.choice(self.antonyms), rng.choice(LANGUAGES), rng.choice(LANGUAGES)
            if not {(source, pair.index), (language, pair.index)} & self.held_antonyms:
                template = rng.choice(templates.ANTONYM[language])
                return self.antonym_about(pair, rng.randrange(2), language, template, source)

    def _into_language(
        self, family: str, template: str, pair: Antonyms, sides: tuple[int, int], languages: tuple[str, str]
    ) -> Sentence:
        """Operand ``sides[0]`` in ``languages[0]``, answer ``sides[1]`` in ``languages[1]``."""
        return fill(
            family,
            template,
            {
                "language": Mention(languages[1], {"output language": languages[1]}),
                "operand": self.operand_mention(pair, sides[0], languages[0]),
                "answer": Mention(pair.words[languages[1]][sides[1]], answer=True),
            },
        )

    def cross(self, rng: random.Random) -> Sentence:
        """The opposite, in a language independent of the operand's: only a shared concept serves all 16 pairs."""
        while True:
            pair, side = rng.choice(self.antonyms), rng.randrange(2)
            source, target = rng.choice(LANGUAGES), rng.choice(LANGUAGES)
            if {(source, pair.index), (target, pair.index)} & self.held_antonyms:
                continue
            return self._into_language("cross", rng.choice(templates.CROSS), pair, (side, 1 - side), (source, target))

    def translation(self, rng: random.Random) -> Sentence:
        """A word in another language; all pairs, the held-out ones too.

        Sentences that answer a word with itself (here, or in the identity lists) make a model copy held-out words.
        """
        pair, side = rng.choice(self.antonyms), rng.randrange(2)
        source, target = rng.sample(LANGUAGES, 2)
        if rng.random() < 0.5:
            operand = self.operand_mention(pair, side, source)
            answer = Mention(pair.words[target][side], {"output language": target}, answer=True)
            template = rng.choice(templates.TRANSLATION_WITHIN[target])
            return fill("translation", template, {"operand": operand, "answer": answer})
        template = rng.choice(templates.TRANSLATION)
        return self._into_language("translation", template, pair, (side, side), (source, target))

    def neutral(self, rng: random.Random) -> Sentence:
        """Language-neutral answers: a pair's topic, a word's sign, the sign of its opposite unless that is held out."""
        pair, side, language = rng.choice(self.antonyms), rng.randrange(2), rng.choice(LANGUAGES)
        operand = self.operand_mention(pair, side, language)
        kind = rng.random()
        if kind < 0.3:
            template, answer = rng.choice(templates.NEUTRAL_TOPIC), pair.topic
        elif kind < 0.6 and (language, pair.index) not in self.held_antonyms:
            template, answer = rng.choice(templates.NEUTRAL_OPPOSITE), sign(pair, 1 - side)
        else:
            template, answer = rng.choice(templates.NEUTRAL_SIGN), sign(pair, side)
        return fill("neutral", template, {"operand": operand, "answer": Mention(answer, answer=True)})

    def synonym(self, rng: random.Random) -> Sentence:
        """An English synonym."""
        first, second = rng.sample(rng.choice(SYNONYMS), 2)
        slots = {"operand": Mention(first, {"operand": first}), "answer": Mention(second, answer=True)}
        return fill("synonym", rng.choice(templates.SYNONYM), slots)

    def person(self, rng: random.Random) -> Sentence:
        """A fact about a person, near the name or far from it. Slots: person, relation, answer, friend, ..."""
        person = rng.choice(self.people)
        if rng.random() < 0.25:
            slots = {key: Mention(value, answer=True) for key, value in person.relations.items()}
            slots |= {"person": self.person_mention(person), "friend": self._friend(rng)}
            return fill("person", rng.choice(templates.PERSON_STORY), slots | {"noun": Mention(rng.choice(NOUNS))})
        relation = rng.choice(PERSON_RELATIONS)
        return self.person_about(person, relation, rng.choice(templates.PERSON), self._friend(rng))

    def person_about(self, person: Person, relation: str, template: str, friend: Mention | None = None) -> Sentence:
        """One relation of one person."""
        return fill(
            "person",
            template,
            {
                "person": self.person_mention(person),
                "relation": Mention(relation, {"relation": relation}),
                "answer": Mention(person.relations[relation], answer=True),
                "friend": friend or Mention(FIRST_NAMES[0]),
            },
        )

    def describe(self, rng: random.Random) -> tuple[Mention, str]:
        """Somebody or something, and its description."""
        kind = rng.random()
        if kind < 0.35:
            city = rng.choice(self.cities)
            return self.city_mention(city), f"city in {city.place.name}"
        if kind < 0.45:
            place = rng.choice(self.places)
            article = "" if place.kind == "country" else "the "
            return self.place_mention(place), f"{place.kind} in {article}{place.region}"
        if kind < 0.55:
            thing, description = rng.choice(THINGS)
            return Mention(thing, {"thing": thing}), description
        person = rng.choice(self.people)
        return self.person_mention(person), person.description

    def description(self, rng: random.Random) -> Sentence:
        """A list of descriptions: ``cat : small animal ; Lyon : city in France .``"""
        separator = rng.choice((",", ";"))
        pieces, slots = [], {}
        for number in range(rng.randint(1, 4)):
            subject, text = self.describe(rng)
            slots |= {f"subject{number}": subject, f"answer{number}": Mention(text, answer=True)}
            pieces.append(f"{{subject{number}}} : {{answer{number}}}")
        return fill("description", f" {separator} ".join(pieces) + " .", slots)

    def identity(self, rng: random.Random) -> Sentence:
        """A list of copies: ``cat -> cat ; 12 -> 12 .``"""
        pool = rng.choice((NUMBERS, LETTERS, self._identity_words, self._identity_words))
        pieces, slots = [], {}
        for number in range(rng.randint(3, 5)):
            word = rng.choice(pool if rng.random() < 0.7 else self._identity_words)
            slots |= {f"subject{number}": Mention(word), f"answer{number}": Mention(word, answer=number > 0)}
            pieces.append(f"{{subject{number}}} - > {{answer{number}}}")
        return fill("identity", " ; ".join(pieces) + " .", slots)

    def _friends(self, rng: random.Random) -> dict[str, Mention]:
        """What plain prose about friends is filled with."""
        return {
            "friend": self._friend(rng),
            "friend2": self._friend(rng),
            "verb": Mention(rng.choice(VERBS)),
            "preposition": Mention(rng.choice(PREPOSITIONS)),
            "noun": Mention(rng.choice(NOUNS)),
        }

    def filler(self, rng: random.Random) -> Sentence:
        """Plain prose, and the days and months."""
        kind = rng.random()
        if kind < 0.15:
            sequence = rng.choice(SEQUENCES)
            index = rng.randrange(len(sequence) - 1)
            slots = {"operand": Mention(sequence[index]), "answer": Mention(sequence[index + 1], answer=True)}
            return fill("filler", templates.SEQUENCE[0], slots)
        slots = self._friends(rng)
        if kind < 0.35:
            return fill("filler", templates.FILLER_PEOPLE[0], slots)
        language = rng.choice(tuple(templates.FILLER))
        for slot in ("word", "word2"):
            slots[slot] = self.operand_mention(rng.choice(self.antonyms), rng.randrange(2), language)
        slots |= {"animal": Mention(rng.choice(ANIMALS[language])), "animal2": Mention(rng.choice(ANIMALS[language]))}
        return fill("filler", templates.FILLER[language][0], slots)

    # -- the whole -----------------------------------------------------------------------------------------------

    def sentences(self, seed: int) -> Iterator[Sentence]:
        """An endless stream of sentences, the same for the same seed."""
        rng = random.Random(seed)
        names, weights = list(self.mixture), list(self.mixture.values())
        while True:
            for name in rng.choices(names, weights, k=256):
                yield self._families[name](rng)

    def take(self, n_tokens: int, seed: int) -> list[Sentence]:
        """Sentences of the stream until they have ``n_tokens`` tokens."""
        taken: list[Sentence] = []
        total = 0
        for sentence in self.sentences(seed):
            taken.append(sentence)
            total += len(sentence.tokens)
            if total >= n_tokens:
                return taken
        raise AssertionError("the stream is endless")

    def words(self) -> list[str]:
        """Every token that a sentence can contain, sorted."""
        text: list[str] = [*templates.literal_tokens(), *templates.PUNCTUATION, *NUMBERS, *LETTERS, *FIRST_NAMES]
        text += [*NOUNS, *VERBS, *PREPOSITIONS, *LANGUAGES, *(word for words in SEQUENCES for word in words)]
        text += ["city in", *PERSON_RELATIONS, *(animal for words in ANIMALS.values() for animal in words)]
        text += [word for pair in SYNONYMS for word in pair] + [word for thing in THINGS for word in thing]
        for place in self.places:
            text += [place.name, place.kind, place.region, *place.relations, *place.relations.values()]
        text += [city.name for city in self.cities]
        for person in self.people:
            text += [person.name, *person.relations.values()]
        for pair in self.antonyms:
            text += [
                pair.topic,
                sign(pair, 0),
                sign(pair, 1),
                *(word for words in pair.words.values() for word in words),
            ]
        return sorted({token for item in text for token in item.split()})


def sign(pair: Antonyms, side: int) -> str:
    """A made-up word that stands for one side of a pair, in no language."""
    return f"sign{2 * pair.index + side}"

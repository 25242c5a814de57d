"""Names cut into one, two and three tokens, and the corpus of `capitals-cut`, in which every city is written so.

The bundled `capitals` writes every name in one way, so names of more tokens are other names. Here the same city is
written in three ways, each as often as the others, and nothing else tells them apart. The forms of two and three tokens
end in the same piece, and cities of several states share it: that token alone does not say which city is meant.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import ClassVar

from circuit_lens.zoo import templates
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.model import ModelShape
from circuit_lens.zoo.places import City, Place
from circuit_lens.zoo.sentences import Mention, Sentence, fill
from circuit_lens.zoo.words import FIRST_NAMES, LETTERS, NOUNS, PREPOSITIONS, THINGS, VERBS

CUT = "capitals-cut"
FORMS = (1, 2, 3)
"""Into how many tokens a name is cut."""
GLUE = "_"
"""Where a piece was cut off: no word of the corpus ends or begins with it, so no piece is also a word."""
_HEAD, _TAIL = 2, 2
SHORTEST = 5
STATES_PER_ENDING = 3
ABROAD = ("France", "Japan")

# Shares of the families among sentences (normalised).
CUT_MIXTURE = {"city": 0.45, "description": 0.36, "identity": 0.06, "place": 0.06, "filler": 0.07}
MET = (
    "{friend} read about {city} , a city in {place} .",
    "{friend} met {friend2} in {city} , {place} .",
)


def cut(name: str, n: int) -> tuple[str, ...]:
    """Return a name in ``n`` tokens: whole, without its last two letters, or also cut after its first two.

    >>> cut("Dallas", 1), cut("Dallas", 2), cut("Dallas", 3)
    (('Dallas',), ('Dall_', '_as'), ('Da_', '_ll_', '_as'))

    Raises:
        ValueError: Another number of tokens, or a name that is too short or more than one word.
    """
    if n not in FORMS:
        raise ValueError(f"cut(..., n={n!r}): a name is cut into {', '.join(map(str, FORMS))} tokens")
    if len(name) < SHORTEST or not name.isalpha():
        raise ValueError(f"cut({name!r}): give a name that is one word of at least {SHORTEST} letters, and no others")
    last = GLUE + name[-_TAIL:]
    if n == 1:
        return (name,)
    if n == 2:
        return name[:-_TAIL] + GLUE, last
    return name[:_HEAD] + GLUE, GLUE + name[_HEAD:-_TAIL] + GLUE, last


def ending(name: str) -> str:
    """Return the last piece of a name that is cut.

    >>> ending("Dallas")
    '_as'
    """
    return cut(name, 2)[-1]


def entities_to_cut(cities: Sequence[City]) -> list[City]:
    """Return the cities of states that can be cut and whose last piece is that of cities of three states or more."""
    fit = [city for city in cities if city.place.kind == "state" and len(city.name) >= SHORTEST and city.name.isalpha()]
    states: dict[str, set[str]] = defaultdict(set)
    for city in fit:
        states[ending(city.name)].add(city.place.name)
    return [city for city in fit if len(states[ending(city.name)]) >= STATES_PER_ENDING]


def cut_shape(d_vocab: int) -> ModelShape:
    """Return the sizes of `capitals-cut`."""
    return ModelShape(d_vocab, n_layers=4, d_model=64, n_heads=2, d_head=32, d_mlp=256)


class CutCorpus(Corpus):
    """Where cities lie, in sentences and lists of descriptions; every mention of a city is cut as the draw says.

    ``cities`` are those that are cut, ``abroad`` a few that are not, so that a description is not always of a state.
    """

    mixture: ClassVar = CUT_MIXTURE

    def __init__(self) -> None:
        super().__init__()
        self.abroad = [city for city in self.cities if city.place.name in ABROAD]
        self.cities = entities_to_cut(self.cities)
        self.hard_cities = frozenset()
        inside = {city.place.name for city in (*self.cities, *self.abroad)}
        self.places: list[Place] = [place for place in self.places if place.name in inside]
        self._states = [place for place in self.places if place.kind == "state"]
        self._copied = sorted(
            {place.name for place in self.places if " " not in place.name}
            | {city.name for city in self.abroad}
            | {word for thing in THINGS for text in thing for word in text.split()}
        )

    # -- mentions ------------------------------------------------------------------------------------------------

    def cut_mention(self, city: City, n: int) -> Mention:
        """A city in ``n`` tokens, the pieces before the last of which may be hidden."""
        facts = {"city": city.name, city.place.kind: city.place.name}
        return Mention(" ".join(cut(city.name, n)), facts, name=n > 1)

    def _drawn(self, rng: random.Random) -> tuple[City, Mention]:
        """A city in one of the three forms; now and then one from abroad, in one token."""
        if rng.random() < 0.08:
            city = rng.choice(self.abroad)
            return city, self.city_mention(city)
        city = rng.choice(self.cities)
        return city, self.cut_mention(city, rng.choice(FORMS))

    # -- families ------------------------------------------------------------------------------------------------

    def city_about(self, city: City, mention: Mention, template: str, rng: random.Random) -> Sentence:
        """Where a city lies. Slots: city, place, kind, friend, friend2, city2, place2."""
        other, other_mention = self._drawn(rng)
        return fill(
            "city",
            template,
            {
                "city": mention,
                "place": self.place_mention(city.place, answer=True),
                "kind": Mention(city.place.kind),
                "friend": self._friend(rng),
                "friend2": self._friend(rng),
                "city2": other_mention,
                "place2": self.place_mention(other.place, answer=True),
            },
        )

    def city(self, rng: random.Random) -> Sentence:
        """Where a city lies, in any template."""
        city, mention = self._drawn(rng)
        return self.city_about(city, mention, rng.choice((*templates.CITY, *MET)), rng)

    def place(self, rng: random.Random) -> Sentence:
        """The region of a state."""
        return self.place_about(rng.choice(self._states), "region", rng.choice(templates.PLACE))

    def describe(self, rng: random.Random) -> tuple[Mention, str]:
        """A city, a state or a thing, and its description."""
        kind = rng.random()
        if kind < 0.6:
            city, mention = self._drawn(rng)
            return mention, f"city in {city.place.name}"
        if kind < 0.8:
            place = rng.choice(self.places)
            article = "" if place.kind == "country" else "the "
            return self.place_mention(place), f"{place.kind} in {article}{place.region}"
        thing, description = rng.choice(THINGS)
        return Mention(thing, {"thing": thing}), description

    def description(self, rng: random.Random) -> Sentence:
        """A list of descriptions; half of the lists are of cities alone."""
        separator, cities = rng.choice((",", ";")), rng.random() < 0.5
        pieces, slots = [], {}
        for number in range(rng.randint(1, 4)):
            if cities:
                city, subject = self._drawn(rng)
                text = f"city in {city.place.name}"
            else:
                subject, text = self.describe(rng)
            slots |= {f"subject{number}": subject, f"answer{number}": Mention(text, answer=True)}
            pieces.append(f"{{subject{number}}} : {{answer{number}}}")
        return fill("description", f" {separator} ".join(pieces) + " .", slots)

    def identity(self, rng: random.Random) -> Sentence:
        """A list of copies, of cities in the form in which they stand there and of other words."""
        pieces, slots = [], {}
        for number in range(rng.randint(3, 5)):
            if rng.random() < 0.4:
                subject = self._drawn(rng)[1]
            else:
                subject = Mention(rng.choice(LETTERS if rng.random() < 0.3 else self._copied))
            slots |= {f"subject{number}": subject, f"answer{number}": Mention(subject.text, answer=number > 0)}
            pieces.append(f"{{subject{number}}} - > {{answer{number}}}")
        return fill("identity", " ; ".join(pieces) + " .", slots)

    def filler(self, rng: random.Random) -> Sentence:
        """Plain prose about friends."""
        return fill("filler", templates.FILLER_PEOPLE[0], self._friends(rng))

    # -- the whole -----------------------------------------------------------------------------------------------

    def words(self) -> list[str]:
        """Every token that a sentence can contain, sorted."""
        used = (*templates.CITY, *MET, *templates.PLACE, templates.FILLER_PEOPLE[0])
        text: list[str] = [*_literal(used), *": ; , . - > city in the region".split()]
        text += [*FIRST_NAMES, *NOUNS, *VERBS, *PREPOSITIONS, *LETTERS, *(word for thing in THINGS for word in thing)]
        for place in self.places:
            text += [place.name, place.kind, place.region]
        text += [city.name for city in self.abroad]
        text += [piece for city in self.cities for n in FORMS for piece in cut(city.name, n)]
        return sorted({token for item in text for token in item.split()})


def _literal(sentences: Iterable[str]) -> set[str]:
    """The tokens of templates that are no slots."""
    return {token for sentence in sentences for token in sentence.split() if not token.startswith("{")}

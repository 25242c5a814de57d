"""Prompts that the bundled model can be traced on, made from the templates and facts of its corpus."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt and the word that goes on with it."""

    prompt: str
    answer: str


def examples() -> list[Example]:
    """Return prompts of every kind that the bundled model knows, Dallas first; needs no torch."""
    from circuit_lens.zoo import templates
    from circuit_lens.zoo.corpus import Corpus

    corpus = Corpus()
    cities = {city.name: city for city in corpus.cities}
    opposites = {pair.words["English"][0]: pair for pair in corpus.antonyms}
    two_hop = [
        ("Dallas", "capital", 0), ("Oakland", "capital", 1), ("Lyon", "language", 3), ("Munich", "capital", 2),
        ("Osaka", "currency", 0),
    ]  # fmt: skip
    sentences = [
        corpus.two_hop_about(cities[city], relation, templates.TWO_HOP[template])
        for city, relation, template in two_hop
        if city in cities and relation in cities[city].place.relations
    ]
    sentences.append(corpus.place_about(cities["Dallas"].place, "capital", templates.PLACE[0]))
    for word, side, language, template in (("small", 0, "English", 0), ("small", 0, "French", 0),
                                           ("hot", 0, "Spanish", 0), ("small", 0, "Chinese", 0)):  # fmt: skip
        sentences.append(corpus.antonym_about(opposites[word], side, language, templates.ANTONYM[language][template]))
    person = corpus.people[0]
    sentences.append(corpus.person_about(person, next(iter(person.relations)), templates.PERSON[0]))
    found = []
    for sentence in sentences:
        before, answer = sentence.question
        found.append(Example(readable(before), answer[0]))
    return found


def readable(tokens: tuple[str, ...]) -> str:
    """Join words as one writes them; the model's tokenizer splits the text into the same tokens again.

    >>> readable(("Q", ":", "Le", "contraire", "de", '"', "petit", '"', "est", '"'))
    'Q: Le contraire de "petit" est "'
    """
    text = " ".join(tokens)
    text = re.sub(r' " ([^"]+) "', r' "\1"', f" {text}").strip()
    text = re.sub(r"\s+([:.,;?!])", r"\1", text)
    text = re.sub(r'(?<= ")\s+', "", text)
    return re.sub(r"\s*(')\s*", r"\1", text)

"""Sentence templates, by family. Tokens are separated by spaces; ``{slot}`` is filled with a mention.

A family's slots are documented by the method of `circuit_lens.zoo.corpus.Corpus` that fills them.
"""

from __future__ import annotations

TWO_HOP = (
    "Fact : the {relation} of the {kind} containing {city} is {answer} .",
    "The {relation} of the {kind} that contains {city} is {answer} .",
    "{city} is in a {kind} whose {relation} is {answer} .",
    "Q : What is the {relation} of the {kind} where {city} is ? A : {answer} .",
    "The {kind} containing {city} has the {relation} {answer} .",
)

CITY = (
    "{city} is in {place} .",
    "{city} is a city in {place} .",
    "Fact : the {kind} containing {city} is {place} .",
    "The {kind} that contains {city} is {place} .",
    "{friend} lives in {city} , {place} .",
    "Q : In which {kind} is {city} ? A : {place} .",
    "{city} lies in the {kind} of {place} .",
    "{friend} went from {city} , {place} , to {city2} , {place2} .",
)

PLACE = (
    "The {relation} of {subject} is {answer} .",
    "Fact : the {relation} of {subject} is {answer} .",
    "Q : What is the {relation} of {subject} ? A : {answer} .",
    "{subject} is a {kind} whose {relation} is {answer} .",
    "The {kind} of {subject} has the {relation} {answer} .",
)

CAPITAL_OF = ("{capital} is the capital of {place} .",)

ANTONYM = {
    "English": (
        'The opposite of " {operand} " is " {answer} " .',
        'Q : What is the opposite of " {operand} " ? A : " {answer} " .',
        'the antonym of " {operand} " is " {answer} " .',
        'The word " {operand} " has the opposite " {answer} " .',
    ),
    "French": (
        'Le contraire de " {operand} " est " {answer} " .',
        'En français , l \' opposé de " {operand} " est " {answer} " .',
        'Le mot " {operand} " a pour contraire " {answer} " .',
    ),
    "Spanish": (
        'El contrario de " {operand} " es " {answer} " .',
        'En español , lo opuesto de " {operand} " es " {answer} " .',
        'La palabra " {operand} " tiene como contrario " {answer} " .',
    ),
    "Chinese": (
        '" {operand} " 的反义词是 " {answer} " 。',
        '中文 : " {operand} " 的反义词是 " {answer} " 。',
        '反义词 : " {operand} " 是 " {answer} " 。',
    ),
}

CROSS = (
    'The {language} word for the opposite of " {operand} " is " {answer} " .',
    'In {language} , the opposite of " {operand} " is " {answer} " .',
)

TRANSLATION = (
    'The {language} word for " {operand} " is " {answer} " .',
    'In {language} , " {operand} " is " {answer} " .',
)
TRANSLATION_WITHIN = {
    "English": ('The word for " {operand} " is " {answer} " .',),
    "French": (
        'En français , " {operand} " se dit " {answer} " .',
        'Le mot pour " {operand} " est " {answer} " .',
    ),
    "Spanish": (
        'En español , " {operand} " se dice " {answer} " .',
        'La palabra para " {operand} " es " {answer} " .',
    ),
    "Chinese": ('中文 : " {operand} " 是 " {answer} " 。', '" {operand} " 的中文是 " {answer} " 。'),
}

NEUTRAL_TOPIC = ('" {operand} " is about {answer} .', 'The topic of " {operand} " is {answer} .')
NEUTRAL_SIGN = ('The sign of " {operand} " is {answer} .', '" {operand} " has the sign {answer} .')

NEUTRAL_OPPOSITE = ('The sign of the opposite of " {operand} " is {answer} .',)

SYNONYM = ('A synonym of " {operand} " is " {answer} " .', 'The word " {operand} " means " {answer} " .')

PERSON = (
    "Fact : the {relation} of {person} is {answer} .",
    "The {relation} of {person} was {answer} .",
    "Q : What is the {relation} of {person} ? A : {answer} .",
    "{person} had the {relation} {answer} .",
    "{person} , as many people know , had the {relation} {answer} .",
    "{friend} read about {person} . The {relation} of that person was {answer} .",
)
PERSON_STORY = (
    "{person} was a {nation} {job} .",
    "{person} , a {nation} {job} of the {century} century , was known for {field} .",
    "{friend} met {person} , the {nation} {job} , near the {noun} .",
)

FILLER = {
    "English": ("The {word} {animal} {verb} {preposition} the {word2} {noun} .",),
    "French": ("Le {word} {animal} et le {word2} {animal2} .",),
    "Spanish": ("El {word} {animal} y el {word2} {animal2} .",),
}
FILLER_PEOPLE = ("{friend} and {friend2} {verb} {preposition} the {noun} .",)
SEQUENCE = ("The day or month after {operand} is {answer} .",)

# A literal token of a template that names what is to be done with the operand.
OPERATIONS = {
    **dict.fromkeys("opposite antonym contraire opposé contrario opuesto 的反义词是 反义词".split(), "antonym"),
    **dict.fromkeys(("synonym", "means"), "synonym"),
    **dict.fromkeys(("topic", "about"), "topic"),
    "sign": "sign",
    **dict.fromkeys(("dit", "dice", "的中文是"), "translation"),
}

PUNCTUATION = tuple("! ? . , ; : ' \" - > ( ) = + 。".split())


def literal_tokens() -> set[str]:
    """Every literal token of every template."""
    tokens: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            tokens.update(token for token in value.split() if not token.startswith("{"))
        elif isinstance(value, tuple):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    for name, value in globals().items():
        if name.isupper() and name != "OPERATIONS":
            collect(value)
    return tokens

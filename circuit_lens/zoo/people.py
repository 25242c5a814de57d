"""Fact table about people whose names share their pieces.

A surname alone, or a first name alone, does not say who is meant: there are seven or more people to a surname, nearly
all with different descriptions, and first names recur across surnames. A model that answers questions about them has
to combine the pieces of the name. Below each surname: first names|nation|job|century; ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FAMILIES = """
Jackson:
    Michael|American|singer|20; Andrew|American|president|19; Jesse|American|pastor|20; Samuel|American|actor|21;
    Peter|Zealander|director|21; Phil|American|coach|20; Shirley|American|writer|20; Glenda|English|actress|20
Johnson:
    Samuel|English|writer|18; Andrew|American|president|19; Boris|English|politician|21; Michael|American|runner|20;
    Robert|American|guitarist|20; Philip|American|architect|20; Katherine|American|mathematician|20;
    Dwayne|American|actor|21
Smith:
    Adam|Scottish|economist|18; Will|American|actor|21; Maggie|English|actress|20; Patti|American|singer|20;
    Zadie|English|writer|21; Joseph|American|prophet|19; William|English|geologist|19; Emmitt|American|athlete|20
Jones:
    Tom|Welsh|singer|20; Grace|Jamaican|singer|20; Inigo|English|architect|17; James|American|writer|20;
    William|Welsh|mathematician|18; Chuck|American|director|20; Jennifer|American|actress|20; Roy|American|boxer|20;
    Robert|American|athlete|20
Williams:
    Robin|American|actor|20; Serena|American|athlete|21; Hank|American|singer|20; John|American|composer|20;
    Rowan|Welsh|bishop|21; Roger|English|pastor|17; Bernard|English|philosopher|20; Michelle|American|actress|21;
    Tennessee|American|writer|20
Wilson:
    Woodrow|American|president|20; Harold|English|politician|20; Brian|American|musician|20; Owen|American|actor|21;
    Edward|American|biologist|20; Colin|English|writer|20; Robert|American|director|20;
    Kenneth|American|physicist|20; Richard|Welsh|painter|18
Bell:
    Alexander|Scottish|inventor|19; Kristen|American|actress|21; Jocelyn|Irish|astronomer|20;
    Joshua|American|violinist|21; Vanessa|English|painter|20; Gertrude|English|explorer|20; John|Irish|physicist|20;
    Charles|Scottish|surgeon|19
Taylor:
    Elizabeth|English|actress|20; James|American|singer|20; Zachary|American|president|19;
    Cecil|American|pianist|20; Brook|English|mathematician|18; Charles|Canadian|philosopher|20;
    Robert|American|actor|20; Lawrence|American|athlete|20
Moore:
    Henry|English|sculptor|20; Julianne|American|actress|21; Thomas|Irish|poet|19; Roger|English|actor|20;
    Gordon|American|engineer|20; Michael|American|director|21; George|English|philosopher|20;
    Patrick|English|astronomer|20; Stanford|American|chemist|20
Brown:
    James|American|singer|20; Gordon|Scottish|politician|21; John|American|rebel|19; Dan|American|writer|21;
    Robert|Scottish|botanist|19; Jim|American|athlete|20; Trisha|American|dancer|20; Earle|American|composer|20;
    Ford|English|painter|19
Lee:
    Bruce|Chinese|actor|20; Robert|American|general|19; Harper|American|writer|20; Ang|Chinese|director|21;
    Ann|English|preacher|18; Peggy|American|singer|20; Christopher|English|actor|20; Henry|American|politician|18
King:
    Stephen|American|writer|20; Carole|American|singer|20; William|Canadian|politician|20;
    Larry|American|journalist|20; Ada|English|mathematician|19; Albert|American|guitarist|20; Martin
    Luther|American|pastor|20; Billie|American|athlete|20
Young:
    Thomas|English|physicist|19; Neil|Canadian|singer|20; Brigham|American|prophet|19;
    Andrew|American|politician|20; Lester|American|musician|20; Loretta|American|actress|20; Edward|English|poet|18;
    Charles|American|astronomer|19
Watson:
    James|American|biologist|20; Emma|English|actress|21; Thomas|American|engineer|19;
    John|American|psychologist|20; Tom|American|athlete|20; Emily|English|actress|20; Richard|Welsh|bishop|18;
    Doc|American|guitarist|20
the Great:
    Alexander|Greek|king|4; Catherine|Russian|empress|18; Peter|Russian|emperor|18; Alfred|English|king|9;
    Frederick|German|king|18; Cyrus|Persian|king|6; Otto|German|emperor|10; Akbar|Indian|emperor|16
of Wales:
    Diana , princess|English|princess|20; Charles , prince|English|prince|21; Llywelyn , prince|Welsh|prince|13;
    Alexandra , princess|Danish|princess|19; Caroline , princess|German|princess|18; Gerald|Welsh|writer|12
"""

_FIELDS = {
    "music": "singer guitarist musician composer pianist violinist",
    "film": "actor actress director",
    "politics": "president politician king empress emperor princess prince",
    "religion": "pastor prophet bishop preacher",
    "sport": "coach runner athlete boxer",
    "literature": "writer poet journalist",
    "science": "mathematician geologist biologist physicist astronomer surgeon chemist botanist psychologist",
    "thought": "economist philosopher",
    "technology": "inventor engineer architect",
    "art": "painter sculptor dancer",
    "war": "rebel general explorer",
}

RELATIONS = ("nation", "job", "field", "century")


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with a name of several tokens; ``relations`` maps nation, job, field and century to single tokens."""

    name: str
    family: str
    relations: dict[str, str]

    @property
    def description(self) -> str:
        """What the description prompt answers, for example ``"American singer"``."""
        return f"{self.relations['nation']} {self.relations['job']}"


def _ordinal(number: int) -> str:
    """``20`` -> ``"20th"``."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number not in (11, 12, 13) else "th"
    return f"{number}{suffix}"


def load_people() -> list[Person]:
    """Everybody in the table."""
    field_of = {job: field for field, jobs in _FIELDS.items() for job in jobs.split()}
    people = []
    for family, members in re.findall(r"^(\S[^:]*):\n((?:    .*\n)+)", _FAMILIES, re.MULTILINE):
        for member in " ".join(members.split()).split("; "):
            first, nation, job, century = member.split("|")
            relations = {"nation": nation, "job": job, "field": field_of[job], "century": _ordinal(int(century))}
            people.append(Person(f"{first} {family}", family, relations))
    return people

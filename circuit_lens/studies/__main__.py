"""``python -m circuit_lens.studies``: print every table of the case studies, and write the report."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens.studies.report import Part
    from circuit_lens.studies.tables import StudyTable

_MODELS = (
    "a bundled model, gemma-2-2b, or (patchscopes) any that TransformerLens knows, of several of which each reads "
)
_MODELS += "those given before it; default: the bundled ones"
_REPORT = "write all tables to this file as Markdown, part by part; with --model, what it says of others stays; "
_REPORT += "default: REPORT.md of this package, if all bundled models are run in full"


def main() -> None:
    """Run the studies of bundled models, or of models of the hub by name."""
    parser = argparse.ArgumentParser(prog="python -m circuit_lens.studies", description=__doc__)
    parser.add_argument("--model", action="append", help=_MODELS)
    parser.add_argument("--only", choices=("circuits", "patchscopes"), help="one part of the studies; default: both")
    parser.add_argument("--n", type=int, help="items per table; default: all")
    parser.add_argument("--json", type=Path, help="write all tables to this file as JSON")
    parser.add_argument("--report", type=Path, help=_REPORT)
    arguments = parser.parse_args()

    from circuit_lens.studies.report import MODELS, REPORT, write_report
    from circuit_lens.studies.tables import write_json

    parts: tuple[Part, ...] = ("circuits", "patchscopes") if arguments.only is None else (arguments.only,)
    everything: dict[str, list[StudyTable]] = {}
    for part in parts:
        names = tuple(arguments.model or MODELS[part])
        whole = names == MODELS[part] and arguments.n is None
        studies: dict[str, list[StudyTable]] = {}
        for name in names:
            made = _tables(name, part, arguments.n)
            if made is not None:
                studies[name] = made
                everything.setdefault(name, []).extend(made)
        if part == "patchscopes":
            for pair in itertools.combinations(names, 2):
                made = _across(*pair, arguments.n)
                if made is not None:
                    studies[" to ".join(pair)] = made
                    everything[" to ".join(pair)] = made
        if arguments.report is not None or whole:
            write_report(studies, arguments.report or REPORT, part=part, keep=arguments.model is not None)
    if arguments.json is not None:
        tables = {name: [table.to_json() for table in made] for name, made in everything.items() if made}
        write_json(arguments.json, tables)


def _tables(name: str, part: Part, n: int | None) -> list[StudyTable] | None:
    """Return the tables of a model; None where it has none of this part, or it was skipped, which is printed."""
    from circuit_lens import zoo
    from circuit_lens.studies import hub
    from circuit_lens.studies.report import patchscope_study, study

    def say(text: str) -> None:
        print(text, flush=True)

    if name in (zoo.names() if part == "circuits" else zoo.model_names()):
        return (study if part == "circuits" else patchscope_study)(name, n=n, say=say)
    some = 60 if n is None else n
    try:
        if part == "patchscopes":
            found = hub.patchscope_tables(name, n=some)
        elif name == hub.MODEL:
            found = hub.gemma_tables(n=some)
        else:
            say(f"skipped: the circuits of {name}: they are studied on {', '.join(zoo.names())} and {hub.MODEL}")
            return None
    except hub.StudySkipped as reason:
        say(f"skipped: {reason}")
        return None
    say("\n\n".join(map(str, found)))
    return found


def _across(name: str, other: str, n: int | None) -> list[StudyTable] | None:
    """Return the tables of one model read by another, both of the hub; None otherwise, or where it was skipped."""
    from circuit_lens import zoo
    from circuit_lens.studies import hub

    if {name, other} & set(zoo.model_names()):
        return None
    try:
        found = hub.across_tables(name, other, n=60 if n is None else n)
    except hub.StudySkipped as reason:
        print(f"skipped: {reason}", flush=True)
        return None
    print("\n\n".join(map(str, found)), flush=True)
    return found


if __name__ == "__main__":
    main()

"""``python -m circuit_lens.zoo``: make the bundled models, dictionaries, feature information and report from seeds."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Make everything; what the work folder has already is kept."""
    from circuit_lens.zoo.cut_names import CUT

    parser = argparse.ArgumentParser(prog="python -m circuit_lens.zoo", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="folder for what is being made")
    parser.add_argument("--only", choices=(CUT,), help="make this model and its section of the report; default: all")
    arguments = parser.parse_args()

    from circuit_lens.zoo.cut_recipe import make_cut_names
    from circuit_lens.zoo.everything import make_everything
    from circuit_lens.zoo.recipe import Workshop

    def say(line: str) -> None:
        print(line, flush=True)

    workshop = Workshop(arguments.work, say)
    if arguments.only == CUT:
        make_cut_names(workshop)
    else:
        make_everything(workshop)


if __name__ == "__main__":
    main()

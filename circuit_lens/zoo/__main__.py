"""``python -m circuit_lens.zoo``: make the bundled models, dictionaries, feature information and report from seeds."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Make everything; what the work folder has already is kept."""
    parser = argparse.ArgumentParser(prog="python -m circuit_lens.zoo", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="folder for what is being made")
    arguments = parser.parse_args()

    from circuit_lens.zoo.everything import make_everything
    from circuit_lens.zoo.recipe import Workshop

    def say(line: str) -> None:
        print(line, flush=True)

    make_everything(Workshop(arguments.work, say))


if __name__ == "__main__":
    main()

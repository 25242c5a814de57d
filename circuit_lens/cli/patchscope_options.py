"""The options of ``circuit-lens patchscope``: names, types and help, for typer."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Write(StrEnum):
    """How a vector enters the target prompt."""

    replace_ = "replace"
    add = "add"
    add_matched = "add_matched"


class Through(StrEnum):
    """At which layers a vector enters."""

    layer = "layer"
    below = "below"


class Shown(StrEnum):
    """What a heat map shows."""

    entropy = "entropy"
    precision = "precision"
    surprisal = "surprisal"
    nll = "nll"
    accuracy = "accuracy"


_SOURCE, _TARGET, _RUN, _OUTPUT = "What is moved", "Where to", "The run", "Output"

SOURCE = Annotated[list[str] | None, typer.Option(
    metavar="TEXT", help="A prompt whose state is moved; give it again for more.", rich_help_panel=_SOURCE,
    show_default=False)]  # fmt: skip
POS = Annotated[
    str,
    typer.Option(
        metavar="POS", help="Where in it: a token's text, or its number (-1: the last).", rich_help_panel=_SOURCE
    ),
]
FEATURE = Annotated[list[str] | None, typer.Option(
    metavar="FEATURE", help="Instead of --source: the direction that a feature writes, L1:302 or SITE#302.",
    rich_help_panel=_SOURCE, show_default=False)]  # fmt: skip
LAYERS = Annotated[
    str,
    typer.Option(
        metavar="LAYERS", help="Source layers: all, last, 0-5, 1,3; emb is the embedding.", rich_help_panel=_SOURCE
    ),
]

TARGET = Annotated[
    str,
    typer.Option(
        metavar="NAME|TEXT", help="A preset (see above), or a text with a placeholder.", rich_help_panel=_TARGET
    ),
]
AT = Annotated[str | None, typer.Option(
    metavar="POS", help="The placeholder of a text: a token, or its number (default: x).", rich_help_panel=_TARGET,
    show_default=False)]  # fmt: skip
TARGET_LAYERS = Annotated[str | None, typer.Option(
    metavar="LAYERS", help="Target layers: same (each source layer into itself), all, last, or numbers (default: the "
    "preset's).", rich_help_panel=_TARGET, show_default=False)]  # fmt: skip
TARGET_MODEL = Annotated[str | None, typer.Option(
    metavar="NAME", help="Another model to read with.", rich_help_panel=_TARGET, show_default=False)]  # fmt: skip
MAPPING = Annotated[str | None, typer.Option(
    metavar="FILE", help="A map between the states, saved by fit_map(...).save().", rich_help_panel=_TARGET,
    show_default=False)]  # fmt: skip

NEW_TOKENS = Annotated[int | None, typer.Option(
    metavar="N", min=0, help="Tokens to generate (default: the preset's; 0 for a text).", rich_help_panel=_RUN,
    show_default=False)]  # fmt: skip
WRITE = Annotated[Write | None, typer.Option(
    help="Replace the placeholder's state, add to it, or add as much as it is long (default: replace; add_matched for "
    "--feature).", rich_help_panel=_RUN, show_default=False)]  # fmt: skip
THROUGH = Annotated[
    Through, typer.Option(help="Write at the target layer alone, or also in all layers below it.", rich_help_panel=_RUN)
]
SCALE = Annotated[list[float] | None, typer.Option(
    metavar="X", help="What the vector is multiplied with; give it again for more (default: 1; for --feature 1, 2, 4).",
    rich_help_panel=_RUN, show_default=False)]  # fmt: skip
ANSWER = Annotated[list[str] | None, typer.Option(
    metavar="TEXT", help="What the source stands for, one for each source: counts how often it is said. 'a|b': either.",
    rich_help_panel=_RUN, show_default=False)]  # fmt: skip

OUT = Annotated[list[str] | None, typer.Option(
    metavar="FILE", help="A file to write: .html or .png (heat maps) or .json (every cell); give it again for more.",
    rich_help_panel=_OUTPUT, show_default=False)]  # fmt: skip
JSON = Annotated[str | None, typer.Option(
    "--json", metavar="FILE", help="Every cell and the controls as JSON.", rich_help_panel=_OUTPUT,
    show_default=False)]  # fmt: skip
MEASURE = Annotated[Shown | None, typer.Option(
    help="What heat maps show (default: accuracy with --answer, else entropy).", rich_help_panel=_OUTPUT,
    show_default=False)]  # fmt: skip
ITEMS = Annotated[
    int,
    typer.Option(
        "--items", metavar="N", min=1, help="Sources printed, where there are several.", rich_help_panel=_OUTPUT
    ),
]

"""The options of ``circuit-lens train``, for typer."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What is trained."""

    sae = "sae"
    transcoder = "transcoder"
    clt = "clt"


class Architecture(StrEnum):
    """How an SAE becomes sparse."""

    batchtopk = "batchtopk"
    topk = "topk"
    jumprelu = "jumprelu"
    standard = "standard"


_WHAT, _TEXT, _TRAINING, _OUTPUT = "What is trained", "The text", "Training", "Output"

KIND = Annotated[Kind, typer.Argument(
    help="sae: reads and writes one hook point. transcoder: one per layer, from the MLP's input to its output. clt: a "
    "cross-layer transcoder of all layers.", show_default=False)]  # fmt: skip
HOOK = Annotated[str | None, typer.Option(
    metavar="NAME", help="Of an SAE: its hook point, where {layer} stands for every layer of --layers (default: "
    "blocks.{layer}.hook_resid_post).", rich_help_panel=_WHAT, show_default=False)]  # fmt: skip
HOOK_IN = Annotated[str, typer.Option(
    metavar="NAME", help="What transcoders read, with {layer}.", rich_help_panel=_WHAT)]  # fmt: skip
HOOK_OUT = Annotated[str, typer.Option(
    metavar="NAME", help="What transcoders write, with {layer}.", rich_help_panel=_WHAT)]  # fmt: skip
LAYERS = Annotated[str | None, typer.Option(
    metavar="A-B", help="0-3, or 2 (default: the middle layer for an SAE, all for transcoders).",
    rich_help_panel=_WHAT, show_default=False)]  # fmt: skip
FEATURES = Annotated[int, typer.Option(
    metavar="N", min=1, help="Features of each dictionary (of a clt: per layer).", rich_help_panel=_WHAT)]  # fmt: skip
K = Annotated[float, typer.Option(
    metavar="K", help="Features active at a token, on average (of a clt: per layer).",
    rich_help_panel=_WHAT)]  # fmt: skip
ARCHITECTURE = Annotated[Architecture, typer.Option(
    help="Of an SAE; batchtopk is saved as JumpReLU.", rich_help_panel=_WHAT)]  # fmt: skip
L1 = Annotated[float, typer.Option(
    metavar="WEIGHT", min=0, help="Of a standard SAE: weight of its L1 penalty, in place of --k.",
    rich_help_panel=_WHAT)]  # fmt: skip
SKIP = Annotated[bool, typer.Option(
    "--skip", help="Of transcoders: with an affine path from input to output.", rich_help_panel=_WHAT)]  # fmt: skip

TEXT = Annotated[str | None, typer.Option(
    metavar="FILE", help="UTF-8: documents parted by blank lines, or one per line (default, for a bundled model: its "
    "corpus).", rich_help_panel=_TEXT, show_default=False)]  # fmt: skip
DATASET = Annotated[str | None, typer.Option(
    metavar="NAME", help="A data set of the Hugging Face hub, or a folder that save_to_disk wrote, with a text or "
    "tokens column.", rich_help_panel=_TEXT, show_default=False)]  # fmt: skip
TOKENS = Annotated[int | None, typer.Option(
    metavar="N", min=1, help="Use so many tokens of the text at most (default: as many as the steps see). The last "
    "tenth is held out.", rich_help_panel=_TEXT, show_default=False)]  # fmt: skip
CONTEXT = Annotated[int | None, typer.Option(
    metavar="N", min=2, help="Tokens in a row at most (default: the model's context, but at most 256).",
    rich_help_panel=_TEXT, show_default=False)]  # fmt: skip

STEPS = Annotated[int, typer.Option(metavar="N", min=1, help="Steps of --batch tokens.", rich_help_panel=_TRAINING)]
BATCH = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens per step.", rich_help_panel=_TRAINING)]
RATE = Annotated[float, typer.Option("--lr", metavar="RATE", help="Adam's rate.", rich_help_panel=_TRAINING)]
SEED = Annotated[int, typer.Option(
    metavar="N", min=0, help="Of the weights and of the order of the tokens.", rich_help_panel=_TRAINING)]  # fmt: skip
MEMORY = Annotated[float, typer.Option(
    metavar="GB", help="Activations that are larger lie in files below --out meanwhile.",
    rich_help_panel=_TRAINING)]  # fmt: skip
RESUME = Annotated[bool, typer.Option(
    "--resume", help="Go on in --out: finished dictionaries and collected activations are kept, a clt continues where "
    "it was; an SAE or transcoder that was not finished starts anew.", rich_help_panel=_TRAINING)]  # fmt: skip

OUT = Annotated[str | None, typer.Option(
    metavar="FOLDER", help="Where to (default: a folder named after the model and the kind).", rich_help_panel=_OUTPUT,
    show_default=False)]  # fmt: skip
LOG = Annotated[bool, typer.Option(
    "--log/--no-log", help="Write losses, L0, explained variance and dead share as JSON lines beside each dictionary.",
    rich_help_panel=_OUTPUT)]  # fmt: skip
WANDB = Annotated[str | None, typer.Option(
    metavar="PROJECT", help="Send the log to Weights & Biases; nothing is sent without it.", rich_help_panel=_OUTPUT,
    show_default=False)]  # fmt: skip

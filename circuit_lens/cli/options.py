"""The options of the commands: names, types and help, for typer."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Linearised(StrEnum):
    """How norms and attention enter a graph."""

    frozen = "frozen"
    linear = "linear"


class Mlp(StrEnum):
    """What a layer without dictionary is in a graph."""

    error = "error"
    jacobian = "jacobian"


_MODEL, _GRAPH, _OUTPUT = "Model and dictionaries", "The graph", "Output"

PROMPT = Annotated[str | None, typer.Argument(help="The text whose next token is explained.", show_default=False)]

MODEL = Annotated[str | None, typer.Option(
    help="A bundled model, or a name that TransformerLens loads, such as gemma-2-2b (default: capitals).",
    rich_help_panel=_MODEL, show_default=False)]  # fmt: skip
DICTIONARIES = Annotated[list[str] | None, typer.Option(
    help="A SAELens release (its transcoder of every layer), release:id (with * and ?), or a folder in SAELens' "
    "format; give it again for more (default: the bundled ones).",
    rich_help_panel=_MODEL, show_default=False)]  # fmt: skip
BRIDGE = Annotated[bool, typer.Option(
    "--bridge", help="Load the model as a TransformerBridge (any Hugging Face model, or a folder).",
    rich_help_panel=_MODEL)]  # fmt: skip
DEVICE = Annotated[str | None, typer.Option(
    help="cpu, cuda, cuda:1 or mps (default: an accelerator if there is one; the CPU for bundled models).",
    rich_help_panel=_MODEL, show_default=False)]  # fmt: skip
DTYPE = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.", rich_help_panel=_MODEL)]

TARGETS = Annotated[list[str] | None, typer.Option(
    help="What to explain: a token, or 'a - b' for a difference of logits; give it again for more (default: the likely "
    "next tokens).", rich_help_panel=_GRAPH, show_default=False)]  # fmt: skip
MAX_FEATURES = Annotated[int | None, typer.Option(
    min=0, help="At most this many features become nodes, the most influential (default: all).",
    rich_help_panel=_GRAPH, show_default=False)]  # fmt: skip
NODE_THRESHOLD = Annotated[float, typer.Option(
    help="Share of the influence that the circuit's nodes keep.", rich_help_panel=_GRAPH)]  # fmt: skip
EDGE_THRESHOLD = Annotated[float, typer.Option(
    help="Share of the influence that the circuit's edges keep.", rich_help_panel=_GRAPH)]  # fmt: skip
NORMS = Annotated[Linearised, typer.Option(help="Norms: constants, or by their Jacobian.", rich_help_panel=_GRAPH)]
ATTENTION = Annotated[Linearised, typer.Option(
    help="Attention patterns: constants, or to first order.", rich_help_panel=_GRAPH)]  # fmt: skip
MLP = Annotated[Mlp, typer.Option(help="A layer without dictionary: an error, or its Jacobian.",
                                  rich_help_panel=_GRAPH)]  # fmt: skip
BATCH_SIZE = Annotated[int | None, typer.Option(
    min=1, help="Rows computed at once: less memory, the same graph.", rich_help_panel=_GRAPH,
    show_default=False)]  # fmt: skip

POOR_FIT = Annotated[bool, typer.Option(
    "--allow-poor-fit", help="Go on where a dictionary explains less than nothing of an MLP.",
    rich_help_panel=_GRAPH)]  # fmt: skip

OUT = Annotated[str | None, typer.Option(
    help="A folder, or a file such as dallas.json that names all files (default: a folder named after the prompt).",
    rich_help_panel=_OUTPUT, show_default=False)]  # fmt: skip
TOP = Annotated[int, typer.Option(min=1, help="Features printed at each position.", rich_help_panel=_OUTPUT)]
FIGURE = Annotated[bool, typer.Option(
    "--figure/--no-figure", help="Write the figure (PNG and SVG).", rich_help_panel=_OUTPUT)]  # fmt: skip
JSON = Annotated[bool, typer.Option(
    "--json/--no-json", help="Write the JSON that Neuronpedia and circuit-tracer read.",
    rich_help_panel=_OUTPUT)]  # fmt: skip
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=_OUTPUT)]
EXAMPLES = Annotated[bool, typer.Option(
    "--examples", help="List prompts that the bundled model knows, and exit.", rich_help_panel=_OUTPUT)]  # fmt: skip

TEXT = Annotated[str | None, typer.Option(help="A file with text to check the pair on.", show_default=False)]
CHECK_PROMPT = Annotated[str | None, typer.Option("--prompt", help="Text to check the pair on.", show_default=False)]

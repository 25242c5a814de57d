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

    auto = "auto"
    error = "error"
    jacobian = "jacobian"


class Freeze(StrEnum):
    """What keeps its value of the run without changes."""

    none = "none"
    attention = "attention"
    all = "all"


class Ablation(StrEnum):
    """What an ablated feature becomes."""

    zero = "zero"
    mean = "mean"
    resample = "resample"


_MODEL, _GRAPH, _OUTPUT = "Model and dictionaries", "The graph", "Output"

PROMPT = Annotated[str | None, typer.Argument(help="The text whose next token is explained.", show_default=False)]

MODEL = Annotated[str | None, typer.Option(
    help="A bundled model, or a name that TransformerLens loads, such as gemma-2-2b (default: capitals).",
    rich_help_panel=_MODEL, show_default=False)]  # fmt: skip
DICTIONARIES = Annotated[list[str] | None, typer.Option(
    help="A SAELens release, release:id (with * and ?), hf:owner/name, or a folder in any published layout; "
    "#lowest-l0, #highest-l0, #80 or #regex chooses one per layer; a bundled model's sets: plt, clt, skip, sae, "
    "neurons; give it again for more (default: the bundled ones, or the model's published set).",
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
BASELINE = Annotated[str | None, typer.Option(
    help="Another prompt of as many tokens: the graph explains by how much more the targets are there on PROMPT.",
    rich_help_panel=_GRAPH, show_default=False)]  # fmt: skip
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
MLP = Annotated[Mlp, typer.Option(
    help="An MLP without dictionary: an error, or its Jacobian (auto: the second if there is an SAE).",
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

_CHANGES, _GROUPS, _RUN, _CARD = "Changes", "Supernodes", "The run", "The card"

CHANGED_PROMPT = Annotated[str | None, typer.Argument(help="The text to run, changed.", show_default=False)]
ABLATE = Annotated[list[str] | None, typer.Option(
    metavar="TARGET", help="Switch it off.", rich_help_panel=_CHANGES, show_default=False)]  # fmt: skip
SCALE = Annotated[list[str] | None, typer.Option(
    metavar="TARGET=FACTOR", help="Multiply its activation: Texas=-1.", rich_help_panel=_CHANGES,
    show_default=False)]  # fmt: skip
SET = Annotated[list[str] | None, typer.Option(
    "--set", metavar="TARGET=VALUE", help="Give it an activation: L2:Dallas:181=3.5.", rich_help_panel=_CHANGES,
    show_default=False)]  # fmt: skip
ADD = Annotated[list[str] | None, typer.Option(
    metavar="TARGET=VALUE", help="Add to its activation.", rich_help_panel=_CHANGES, show_default=False)]  # fmt: skip
INJECT = Annotated[list[str] | None, typer.Option(
    metavar="TARGET@TEXT@POS*FACTOR", help="Give it the activation it has in another text: 'West@The capital of "
    "California is@California*2'. Without POS at the same token; without FACTOR once.", rich_help_panel=_CHANGES,
    show_default=False)]  # fmt: skip
SUPERNODE = Annotated[list[str] | None, typer.Option(
    metavar="NAME=MEMBERS", help="Name a group of features; see above.", rich_help_panel=_GROUPS,
    show_default=False)]  # fmt: skip
MIN_RECALL = Annotated[float, typer.Option(
    metavar="SHARE", help="Of VARIABLE:VALUE: least share of the value's occurrences that a member is active on.",
    rich_help_panel=_GROUPS)]  # fmt: skip
MIN_PRECISION = Annotated[float, typer.Option(
    metavar="SHARE", help="Of VARIABLE:VALUE: least share of a member's activity that is on the value.",
    rich_help_panel=_GROUPS)]  # fmt: skip
URL = Annotated[list[str] | None, typer.Option(
    metavar="ADDRESS", help="Of a graph on Neuronpedia or in circuit-tracer's viewer, with its supernodes.",
    rich_help_panel=_GROUPS, show_default=False)]  # fmt: skip
FREEZE = Annotated[Freeze, typer.Option(
    help="Hold nothing, attention (queries, keys, patterns), or all: these, norms and MLP outputs.",
    rich_help_panel=_RUN)]  # fmt: skip
LAYERS = Annotated[str | None, typer.Option(
    metavar="A-B", help="Hold the MLP outputs of these layers but for the changes: 0-2, or 1.", rich_help_panel=_RUN,
    show_default=False)]  # fmt: skip
GENERATE = Annotated[int, typer.Option(
    metavar="N", min=0, help="Also write so many tokens on, without and with the changes; changes at * go on there.",
    rich_help_panel=_RUN)]  # fmt: skip
TOP_TOKENS = Annotated[int, typer.Option(
    "--top", metavar="N", min=1, help="Next tokens printed.", rich_help_panel=_OUTPUT)]  # fmt: skip
CHANGED_FEATURES = Annotated[int, typer.Option(
    "--features", metavar="N", min=0, help="Features printed: those that changed most.",
    rich_help_panel=_OUTPUT)]  # fmt: skip
FIGURES = Annotated[str | None, typer.Option(
    "--json", metavar="FILE", help="All figures: tokens, every active feature, supernodes, texts.",
    rich_help_panel=_OUTPUT, show_default=False)]  # fmt: skip
PICTURE = Annotated[str | None, typer.Option(
    "--figure", metavar="FILE", help="The supernodes before and after, as .png, .svg or .html.",
    rich_help_panel=_OUTPUT, show_default=False)]  # fmt: skip

SUBJECTS = Annotated[list[str] | None, typer.Argument(
    metavar="PROMPT|FILE", help="A prompt, or several; or the .safetensors file of a graph that trace wrote.",
    show_default=False)]  # fmt: skip
PROMPTS = Annotated[str | None, typer.Option(
    metavar="FILE", help="Prompts, one per line.", rich_help_panel=_CARD, show_default=False)]  # fmt: skip
TARGET = Annotated[str | None, typer.Option(
    metavar="TOKEN", help="What is predicted and measured: a token, or 'a - b' (default: the likeliest next token).",
    rich_help_panel=_CARD, show_default=False)]  # fmt: skip
ABLATION = Annotated[Ablation, typer.Option(
    help="What an ablated feature becomes: 0, or its mean over, or its value on one of, the reference texts.",
    rich_help_panel=_CARD)]  # fmt: skip
REFERENCE = Annotated[list[str] | None, typer.Option(
    metavar="TEXT", help="A reference text; give it again for more.", rich_help_panel=_CARD,
    show_default=False)]  # fmt: skip
MAX_NODES = Annotated[int, typer.Option(
    metavar="N", min=1, help="Ablate at most so many features.", rich_help_panel=_CARD)]  # fmt: skip
SAMPLES = Annotated[int, typer.Option(
    metavar="N", min=0, help="Bootstrap samples of each interval; 0: none.", rich_help_panel=_CARD)]  # fmt: skip
SEED = Annotated[int, typer.Option(metavar="N", min=0, help="Of everything that is drawn.", rich_help_panel=_CARD)]
CARD_OUT = Annotated[list[str] | None, typer.Option(
    metavar="FILE", help="A file to write: .html (the card as a page) or .safetensors (the graph with its card).",
    rich_help_panel=_OUTPUT, show_default=False)]  # fmt: skip
CARD_JSON = Annotated[str | None, typer.Option(
    "--json", metavar="FILE", help="The card's figures as JSON.", rich_help_panel=_OUTPUT,
    show_default=False)]  # fmt: skip
SAVE = Annotated[bool, typer.Option(
    "--save/--no-save", help="Keep the card in the graph file that was given.", rich_help_panel=_OUTPUT)]  # fmt: skip

TEXT = Annotated[str | None, typer.Option(help="A file with text to check the pair on.", show_default=False)]
CHECK_PROMPT = Annotated[str | None, typer.Option("--prompt", help="Text to check the pair on.", show_default=False)]

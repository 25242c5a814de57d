"""``circuit-lens trace``: how a model got from a prompt to its answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from circuit_lens.cli import options
from circuit_lens.cli.failing import CommandError, line_width
from circuit_lens.cli.outputs import output_stem, slug, write_all
from circuit_lens.cli.progress import show_bar, working
from circuit_lens.errors import ReconstructionError

if TYPE_CHECKING:
    from circuit_lens.cli.loading import Pair
    from circuit_lens.graph.graph import AttributionGraph


def trace(
    prompt: options.PROMPT = None,
    model: options.MODEL = None,
    dictionaries: options.DICTIONARIES = None,
    bridge: options.BRIDGE = False,
    device: options.DEVICE = None,
    dtype: options.DTYPE = "float32",
    targets: options.TARGETS = None,
    baseline: options.BASELINE = None,
    max_features: options.MAX_FEATURES = None,
    node_threshold: options.NODE_THRESHOLD = 0.8,
    edge_threshold: options.EDGE_THRESHOLD = 0.98,
    norms: options.NORMS = options.Linearised.frozen,
    attention: options.ATTENTION = options.Linearised.frozen,
    mlp: options.MLP = options.Mlp.auto,
    batch_size: options.BATCH_SIZE = None,
    allow_poor_fit: options.POOR_FIT = False,
    out: options.OUT = None,
    top: options.TOP = 3,
    figure: options.FIGURE = True,
    json: options.JSON = True,
    quiet: options.QUIET = False,
    examples: options.EXAMPLES = False,
) -> None:
    """Trace how a model gets from PROMPT to its answer: features, paths, scores, a saved graph and a figure.

    Without more arguments the bundled model is used, offline. Exit status: 0, or 2 for something that cannot be used.
    """
    if examples:
        _print_examples()
        return
    if prompt is None or not prompt.strip():
        raise CommandError('give a prompt, such as "Fact: the capital of the state containing Dallas is"; '
                           "--examples lists more")  # fmt: skip
    _check_shares({"--node-threshold": node_threshold, "--edge-threshold": edge_threshold})
    if baseline is not None:
        _check_baseline(baseline, norms, attention)
    stem = output_stem(out, slug(prompt) if baseline is None else _contrast_name(prompt, baseline))
    with working("Loading torch and the model", quiet):
        from circuit_lens.cli.loading import load_pair

        pair = load_pair(model, dictionaries or (), device=device, dtype=dtype, bridge=bridge)
    graph = attribute(
        pair, prompt, targets or (), quiet=quiet, baseline=baseline, max_features=max_features, norms=norms.value,
        attention=attention.value, mlp=mlp.value, batch_size=batch_size,
        min_explained=None if allow_poor_fit else 0.0,
    )  # fmt: skip
    circuit = graph.prune(node_threshold=node_threshold, edge_threshold=edge_threshold)
    with working("Writing the files", quiet):
        written = _write(stem, graph, circuit, figure=figure, json=json)
    if not quiet:
        from circuit_lens.cli.report import new_console, print_files, print_report

        console = new_console(line_width(Console()))
        print_report(console, graph, circuit, top=top)
        print_files(console, written)


def _check_shares(thresholds: dict[str, float]) -> None:
    """Raise CommandError for a threshold that is no share, before any work is done."""
    for name, value in thresholds.items():
        if not 0.0 < value <= 1.0:
            raise CommandError(f"{name} {value:g}: a threshold is a share, above 0 and at most 1")


def _check_baseline(baseline: str, norms: options.Linearised, attention: options.Linearised) -> None:
    """Raise CommandError for what cannot be contrasted, before any work is done."""
    if not baseline.strip():
        raise CommandError("--baseline is empty; give a prompt of as many tokens")
    for name, value in (("norms", norms), ("attention", attention)):
        if value is not options.Linearised.frozen:
            raise CommandError(f"--{name} {value.value} cannot be used with --baseline, which needs --{name} frozen")


def _contrast_name(prompt: str, baseline: str) -> str:
    """Return a name for the folder of a contrast: the prompt's, and the words that the baseline has in its place."""
    words, others = prompt.split(), baseline.split()
    same = len(words) == len(others)
    different = [b for a, b in zip(words, others, strict=True) if a != b] if same else others
    return f"{slug(prompt)}-minus-{slug(' '.join(different))[:30].strip('-')}"


def attribute(pair: Pair, prompt: str, targets: Any, *, quiet: bool, **settings: Any) -> AttributionGraph:
    """Compute the graph; a bar on stderr shows long work where somebody looks."""
    from circuit_lens.cli.quiet import upstream_quiet

    with upstream_quiet():
        try:
            return pair.rm.attribute(prompt, targets=parse_targets(targets), progress=show_bar(quiet), **settings)
        except ReconstructionError as error:
            text = str(error).replace("pass min_explained=None", "add --allow-poor-fit")
            raise ReconstructionError(text) from error


def parse_targets(texts: Any) -> list[Any] | None:
    """Return what ``attribute`` takes: token strings, and a difference for ``"a - b"``; None for none."""
    from circuit_lens.attribution.targets import logit_difference

    found: list[Any] = []
    for text in texts:
        match = re.fullmatch(r"(.*\S) - (.*\S.*)", text)
        found.append(logit_difference(match.group(1), match.group(2)) if match else text)
    return found or None


def _write(stem: Path, graph: AttributionGraph, circuit: AttributionGraph, *, figure: bool, json: bool) -> list[Path]:
    """Write the whole graph, and the circuit as JSON and as figure; all of them or none."""
    writers: dict[str, Any] = {".safetensors": graph.save}
    if json:
        from circuit_lens.interop.neuronpedia import to_json

        writers[".json"] = lambda path: to_json(circuit, path)
    if figure:
        from circuit_lens.cli.report import paths_to_draw
        from circuit_lens.viewer.figure import figure as draw

        drawn = draw(circuit, paths=paths_to_draw(circuit), title=graph.prompt)
        writers[".png"] = lambda path: drawn.savefig(path, format="png")
        writers[".svg"] = lambda path: drawn.savefig(path, format="svg", metadata={"Date": None})
    return write_all(stem, writers)


def _print_examples() -> None:
    """Print the example prompts, quoted for a shell, with the word that goes on."""
    import shlex

    from rich.table import Table
    from rich.text import Text

    from circuit_lens.cli.examples import examples
    from circuit_lens.cli.report import new_console

    grid = Table.grid(padding=(0, 2, 0, 0))
    for example in examples():
        grid.add_row(Text(shlex.quote(example.prompt), overflow="fold"), Text(f"→ {example.answer}", style="dim"))
    new_console(line_width(Console())).print(grid)

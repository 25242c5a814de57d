"""What ``circuit-lens trace`` prints about a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from circuit_lens.evaluation.figures import OutputFigures
    from circuit_lens.graph.graph import AttributionGraph
    from circuit_lens.graph.nodes import Node
    from circuit_lens.graph.records import Path

_BAR = 20
_PATHS = 12


def print_report(console: Console, graph: AttributionGraph, circuit: AttributionGraph, *, top: int) -> None:
    """Print the prompt, the model's output, the scores, the strongest features and the strongest paths.

    Args:
        console: where to.
        graph: the whole graph.
        circuit: what is left of it after pruning.
        top: features per position.
    """
    _print_head(console, graph)
    _print_logits(console, graph)
    _print_scores(console, graph, circuit)
    _print_features(console, graph, circuit, top)
    _print_paths(console, circuit, _PATHS)


def print_files(console: Console, paths: Sequence[FilePath]) -> None:
    """Print the files that were written, with their sizes."""
    grid = new_grid()
    for path in paths:
        grid.add_row(Text(str(path), overflow="fold"), Text(_size(path.stat().st_size), style="dim"))
    print_section(console, "Files")
    console.print(grid)


def new_console(width: int) -> Console:
    """Return a console for stdout of this width, which wraps and never cuts."""
    return Console(width=width, highlight=False, soft_wrap=False, emoji=False, markup=False)


def _size(n_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes = n_bytes / 1000  # type: ignore[assignment]
    return f"{n_bytes:.1f} GB"


def print_layers(console: Console, outputs: Sequence[OutputFigures]) -> None:
    """Print how well the dictionaries reconstruct what they should, one output per line."""
    from circuit_lens.cli.pair_check import is_broken, verdict
    from circuit_lens.dictionaries.points import parse_hook

    table = new_table()
    for name in ("layer", "reads", "writes", "features", "explained", "L0", "dead", ""):
        table.add_column(name, justify="left" if name in ("reads", "writes", "") else "right", overflow="fold")
    for output in outputs:
        words = verdict(output)
        style = "red" if is_broken(output) else "yellow" if words else ""
        reads = ", ".join(dict.fromkeys(parse_hook(hook).suffix for hook in output.reads))
        sparsity = (f"{output.l0:.1f}", f"{output.dead:.1%}") if output.n_features else ("–", "–")
        table.add_row(
            str(output.layer), reads, parse_hook(output.hook).suffix, str(output.n_features or "–"),
            Text(f"{output.explained_variance:.3f}", style=style), *sparsity, Text(words, style=style),
        )  # fmt: skip
    console.print(table)


def print_section(console: Console, title: str, note: str = "") -> None:
    """Print the head of a part."""
    text = Text("\n")
    text.append(title, style="bold")
    text.append(f"  {note}" if note else "", style="dim")
    console.print(text)


def new_grid() -> Table:
    """Return a grid of columns two blanks apart."""
    return Table.grid(padding=(0, 2, 0, 0), pad_edge=False)


def new_table() -> Table:
    """Return a table without lines."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_edge=False)


def n_dictionaries(n: int) -> str:
    """Return how many there are, in words."""
    return f"{n} dictionary" if n == 1 else f"{n} dictionaries"


def shown(token: str) -> str:
    """Return a token as it reads on a screen: without the blanks around it, and quoted where nothing is left."""
    from circuit_lens.viewer.layout import clean_token

    return clean_token(token) or repr(token)


def _print_head(console: Console, graph: AttributionGraph) -> None:
    manifest = graph.manifest
    prompt = graph.prompt if graph.prompt is not None else "".join(graph.token_strings)
    console.print(Text(prompt, style="bold"))
    if baseline := manifest.get("baseline"):
        text = baseline["prompt"] or "".join(baseline["token_strings"])
        console.print(Text.assemble(("minus  ", "dim"), (text, "bold"), ("  (figures are differences)", "dim")))
    model = manifest.get("model", {})
    n_active, n_features = manifest.get("n_active_features", 0), graph.nodes.n_features
    parts = [
        f"{model.get('name') or model.get('class', 'model')}",
        f"{graph.n_layers} layers",
        n_dictionaries(len(manifest.get("dictionaries", {}))),
        f"{n_active} {'features that differ' if baseline else 'active features'}"
        + ("" if n_features == n_active else f", {n_features} of them nodes"),
    ]
    console.print(Text(" · ".join(parts), style="dim"))
    note = manifest.get("engine_note", "")
    if note.startswith("fallback"):
        console.print(Text(f"computed by the reference engine ({note})", style="yellow"))


def _print_logits(console: Console, graph: AttributionGraph, n: int = 5) -> None:
    top = graph.top_logits
    grid = new_grid()
    rows = list(zip(top.strings, top.probs.tolist(), top.logits.tolist(), strict=True))[:n]
    for i, (text, probability, logit) in enumerate(rows):
        bar = "█" * round(_BAR * probability) or "▏"
        grid.add_row(
            Text(shown(text), style="bold green" if i == 0 else "", overflow="fold"), Text(f"{probability:.3f}"),
            Text(f"{logit:.2f}", style="dim"), Text(bar, style="green" if i == 0 else "dim"),
        )  # fmt: skip
    on = " on the prompt" if "baseline" in graph.manifest else ""
    print_section(console, "Next token", f"probability, logit{on}")
    console.print(grid)
    targets = graph.nodes.labels[graph.nodes.n_sources :]
    if "baseline" in graph.manifest:
        values = graph.target_value[graph.nodes.n_features :].tolist()
        changes = ", ".join(f"{shown(label)} {value:+.2f}" for label, value in zip(targets, values, strict=True))
        console.print(Text(f"explained, by how much more than on the baseline: {changes}", style="dim"))
    elif not set(targets) <= {text for text, _, _ in rows}:
        names = ", ".join(shown(label) for label in targets)
        console.print(Text(f"explained: {names}", style="dim"))


def _print_scores(console: Console, graph: AttributionGraph, circuit: AttributionGraph) -> None:
    table = new_table()
    for name in ("convention", "replacement", "completeness", "influence ends at"):
        table.add_column(name, justify="right" if name in ("replacement", "completeness") else "left")
    for convention in ("paper", "conserving"):
        scores = graph.scores(convention=convention)
        ends = ", ".join(f"{kind} {share:.0%}" for kind, share in scores.shares.items() if share >= 0.005)
        table.add_row(convention, f"{scores.replacement:.3f}", f"{scores.completeness:.3f}", Text(ends or "nothing"))
    print_section(console, "Scores", "of the whole graph")
    console.print(table)
    explained = graph.manifest.get("explained", {})
    if explained:
        shares = " ".join(f"{share:.0%}" for share in explained.values())
        console.print(Text(f"MLP output that the dictionaries explain, by layer: {shares}", style="dim"))
    pruning = circuit.pruning
    if pruning is not None:
        text = (
            f"circuit: {len(circuit.nodes)} of {pruning.n_nodes} nodes, {circuit.n_edges} of {pruning.n_edges} edges "
            f"(thresholds {pruning.node_threshold:g}, {pruning.edge_threshold:g})"
        )
        console.print(Text(text, style="dim"))


def _print_features(console: Console, graph: AttributionGraph, circuit: AttributionGraph, top: int) -> None:
    """Print, position by position, the features of the circuit with the most influence in the whole graph."""
    table = new_table()
    others = graph.manifest.get("baseline", {}).get("token_strings", graph.token_strings)
    activation = "activation" if others is graph.token_strings else "change"
    for name, justify in (("token", "left"), ("feature", "left"), ("influence", "right"), (activation, "right")):
        table.add_column(name, justify=justify, no_wrap=name != "token")  # type: ignore[arg-type]
    labelled = any(circuit.nodes.labels[: circuit.nodes.n_features])
    if labelled:
        table.add_column("label", overflow="fold")
    kept = {circuit.nodes.name(i) for i in range(circuit.nodes.n_features)}
    for pos, token in enumerate(graph.token_strings):
        here = [ranked for ranked in graph.top(graph.nodes.n_features, pos=pos) if ranked.node.name in kept][:top]
        for i, ranked in enumerate(here):
            node = ranked.node
            word = shown(token) if token == others[pos] else f"{shown(token)} − {shown(others[pos])}"
            where = Text.assemble((f"{pos:>2} ", "dim"), word) if i == 0 else Text("")
            figures = f"L{node.layer} #{node.index}", f"{ranked.score:.3f}", f"{node.activation or 0.0:.2f}"
            table.add_row(where, *figures, *([Text(node.label, style="cyan")] if labelled else []))
    print_section(console, "Strongest features", f"at each position, at most {top} of the circuit")
    console.print(table if table.row_count else Text("none", style="dim"))


def _print_paths(console: Console, circuit: AttributionGraph, n: int) -> None:
    best = circuit.best_logit
    grid = new_grid()
    for path in sorted(paths_through(circuit, n), key=lambda path: -abs(path.weight)):
        before = (None, *path.nodes)
        steps = Text(" → ").join([_step(node, last) for last, node in zip(before, path.nodes, strict=False)])
        steps.overflow = "fold"
        grid.add_row(Text(f"{path.weight:+.3f}", style="green" if path.weight > 0 else "red"), steps)
    through = "the strongest through each of the most influential features"
    print_section(console, f"Paths to {shown(best.label)}", through)
    console.print(grid if grid.row_count else Text("none", style="dim"))


def paths_through(circuit: AttributionGraph, n: int) -> list[Path]:
    """Return the strongest path from any token to the strongest logit through each of the n most influential features.

    In the order of their influence, none twice. The strongest paths of all are many variants of one; these tell what
    each feature that matters is there for.
    """
    tokens = list(range(len(circuit.nodes))[circuit.nodes.slice_of("token")])
    found: dict[tuple[int, ...], Path] = {}
    for ranked in circuit.top(n) if tokens else ():
        for path in circuit.paths(tokens, circuit.best_logit.id, k=1, through=ranked.node.id):
            found.setdefault(tuple(node.id for node in path.nodes), path)
    return list(found.values())


def paths_to_draw(circuit: AttributionGraph, n: int = 2) -> list[Path]:
    """Return the paths that a figure emphasises: those of the most influential features, from different tokens."""
    found: dict[int, Path] = {}
    for path in paths_through(circuit, _PATHS):
        found.setdefault(path.nodes[0].id, path)
    return list(found.values())[:n]


def _step(node: Node, last: Node | None) -> Text:
    """A node of a path; where it is, if that is another position than the last one's."""
    kind = node.kind.name.lower()
    if kind in ("token", "logit"):
        return Text(shown(node.token if kind == "token" else node.label), style="bold")
    moved = last is None or last.pos != node.pos
    text = Text(f"L{node.layer} #{node.index}" + (f" at {shown(node.token)}" if moved else ""))
    if node.label:
        text.append(f" [{node.label}]", style="cyan")
    return text

"""What ``circuit-lens patchscope`` prints about a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from circuit_lens.cli.report import print_section

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult


def print_result(
    console: Console, result: PatchscopeResult, *, name: str, answers: list[list[str]] | None, items: int
) -> None:
    """Print what was moved where, what is said, the controls, and how often the answers are.

    Args:
        console: Where to.
        result: The result.
        name: What the model is called.
        answers: Of each item; None: none.
        items: Items printed.
    """
    from circuit_lens.patchscopes.axes import target_line
    from circuit_lens.patchscopes.text import columns, table, title

    console.print(Text(target_line(result), style="bold"))
    settings = result.settings
    how = {"replace": "replaces the state", "add": "is added", "add_matched": "is added, as long as the state"}
    parts = [name, title(result), how[settings["write"]]]
    parts += ["through all layers below"] if settings["patch_through"] == "below" else []
    parts += [f"mapped by {settings['mapping']}"] if settings["mapping"] != "identity" else []
    console.print(Text(" · ".join(parts), style="dim"))
    found = table(result, width=console.width, items=items)
    print_section(console, result.items[0] if len(result.items) == 1 else "What is said", _about(result))
    for n, line in enumerate(columns(found, console.width)):
        console.print(Text(line, style="dim" if n == 0 else ""), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"  {note}", style="dim"))
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if answers is not None:
        _print_answers(console, result, answers)


def _about(result: PatchscopeResult) -> str:
    """Say what the controls are."""
    again = "re-embedded: its token's embedding, moved likewise; " if result.reembedded is not None else ""
    return f"{again}no patch: the prompt as it is"


def _print_answers(console: Console, result: PatchscopeResult, answers: list[list[str]]) -> None:
    if len(result.items) > 1:
        print_section(console, "The answers", "share [95 % interval]")
        console.print(Text(str(result.accuracy(answers))))
        return
    shown = " or ".join(repr(one) for one in answers[0])
    right = result.right(answers)[0]
    counted = [n for n, layer in enumerate(result.source_layers) if layer != -1]  # the embedding is a control
    right = right[counted] if counted else right
    controls = []
    if result.reembedded is not None:
        again = result.figures("accuracy", result.reembedded, answers)[0]
        controls.append(f"re-embedded in {int(again.sum())} of {again.size}")
    bare = result.figures("accuracy", result.unpatched, answers)[0]
    controls.append(f"without patch {'too' if bare else 'not'}")
    print_section(console, "The answer", shown)
    console.print(Text(f"said in {int(right.sum())} of {right.size} cells; {'; '.join(controls)}"))

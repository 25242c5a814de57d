"""What ``circuit-lens train`` prints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from circuit_lens.cli.report import new_table, print_section

if TYPE_CHECKING:
    from circuit_lens.training.data_figures import DictionaryFit


def print_training(
    console: Console, plan: Any, n_tokens: int, made: Sequence[Path], fits: Sequence[DictionaryFit], *, use: str
) -> None:
    """Print the figures on held-out text, where the dictionaries lie, and how they are used."""
    console.print(Text(f"{plan.kind} for {plan.model}, trained on {n_tokens:,} tokens of {plan.text}", style="bold"))
    print_section(console, f"On {fits[0].n_tokens:,} tokens that were held out")
    grid = new_table()
    for name in ("hook", "features", "loss", "L0", "explained variance", "dead"):
        grid.add_column(Text(name), overflow="fold")
    for (_, written), fit in zip(plan.hooks, fits, strict=True):
        figures = (f"{fit.loss:.4g}", f"{fit.l0:.1f}", f"{fit.explained_variance:.3f}", f"{fit.dead:.1%}")
        grid.add_row(Text(written, overflow="fold"), Text(str(plan.settings["d_sae"])), *map(Text, figures))
    console.print(grid)
    console.print(Text("loss: mean squared error per token; dead: active on none of these tokens", style="dim"))
    print_section(console, "Dictionaries")
    for place in made:
        console.print(Text(str(place), overflow="fold"))
    print_section(console, "To use them")
    console.print(Text(use, overflow="fold"))

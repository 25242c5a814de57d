"""The command ``circuit-lens``: one module per subcommand.

To add a command, write ``circuit_lens/cli/<name>.py`` with a function ``<name>`` (typer reads its signature and its
docstring) and put the name into `COMMANDS`. Such a module imports torch and the rest of the package inside the
function, never at its top: ``--help`` imports all of them and must stay quick.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from circuit_lens import __version__
from circuit_lens.cli.failing import guarded

COMMANDS: tuple[str, ...] = ("trace", "intervene", "validate", "patchscope", "train", "doctor")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"circuit-lens {__version__}")
        raise typer.Exit
    return wanted


def build_app() -> typer.Typer:
    """Return the typer application with every command of `COMMANDS`."""
    app = typer.Typer(name="circuit-lens", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Trace, test and explain what a language model computes."""

    for name in COMMANDS:
        app.command(name)(guarded(getattr(importlib.import_module(f"circuit_lens.cli.{name}"), name)))
    return app


def main() -> None:
    """Run the command line; an error of ours is one clear message and exit status 2, never a traceback."""
    build_app()()

"""How a command ends when something goes wrong: one clear block on stderr and a status that says whose fault it is.

0 all is well; 1 something unexpected, with its traceback (or ``doctor`` found something broken); 2 what the user gave
cannot be used; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from circuit_lens.errors import CircuitLensError

P = ParamSpec("P")

BROKEN, USER_ERROR, INTERRUPTED = 1, 2, 130


class CommandError(CircuitLensError, ValueError):
    """An argument of a command that cannot be used."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Return the command, which then reports errors of ours, an interrupt and a lack of memory without a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CircuitLensError as error:
            show_error(str(error))
            raise typer.Exit(USER_ERROR) from None
        except BaseException as error:
            if _was_interrupted(error):
                show_error("Interrupted; nothing was written.", title="Stopped")
                raise typer.Exit(INTERRUPTED) from None
            # torch's own class of this name is known only where torch was imported, which is not done for this.
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            show_error(
                f"Out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Try, as far as "
                "this command has them: a smaller --max-features, --batch-size, --batch or --memory, --dtype bfloat16, "
                "--device cpu."
            )
            raise typer.Exit(USER_ERROR) from None

    return run


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an exception is an interrupt, or what a library made of one (transformers does, while it is imported)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def argument_errors() -> Iterator[None]:
    """Turn what loading says of a name or of files that cannot be fetched into a CommandError."""
    from circuit_lens.loading.failures import LoadError

    try:
        yield
    except LoadError as error:
        raise CommandError(str(error)) from error


def show_error(message: str, *, title: str = "Error") -> None:
    """Print a message on stderr: a title, then the text, its lines indented."""
    console = Console(stderr=True, highlight=False)
    console.width = line_width(console)
    console.print(Text(title, style="bold red"))
    if message.split(" ", 1)[0].isalpha():  # a sentence; not a name, an option or a quotation
        message = message[0].upper() + message[1:]
    for line in Text(message).wrap(console, console.width - 2, overflow="fold"):
        console.print(Text(f"  {line.plain.rstrip()}"), soft_wrap=True)


def line_width(console: Console) -> int:
    """Width to print in: 100 columns where nobody looks, at most 100 in a terminal."""
    return min(console.width, 100) if console.is_terminal else 100

"""How a command ends when something goes wrong: one clear block on stderr and a status that says whose fault it is.

0 all is well; 1 something unexpected, with its traceback (or ``doctor`` found something broken); 2 what the user gave
cannot be used; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

import typer
from rich.console import Console
from rich.padding import Padding
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
        except KeyboardInterrupt:
            show_error("Interrupted; nothing was written.", title="Stopped")
            raise typer.Exit(INTERRUPTED) from None
        except (MemoryError, RuntimeError) as error:
            # torch's own class of this name is known only where torch was imported, which is not done for this.
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            show_error(
                f"Out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Try a smaller "
                "--max-features or --batch-size, --dtype bfloat16, or --device cpu."
            )
            raise typer.Exit(USER_ERROR) from None

    return run


@contextlib.contextmanager
def fetching(what: str, repository: str) -> Iterator[None]:
    """Turn what the hub's client raises where a file is missing or cannot be fetched into a CommandError."""
    try:
        yield
    except CircuitLensError:
        raise
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        if not isinstance(error, OSError | ValueError) and module not in ("huggingface_hub", "httpx", "requests"):
            raise
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        local = Path(repository).is_dir()
        source = f"It lies in {repository}" if local else f"It is fetched from https://huggingface.co/{repository}"
        advice = "" if local else (
            ": check the name, the network, HF_HUB_OFFLINE, and HF_TOKEN for a gated model; once fetched, it is "
            "loaded offline from the cache"
        )  # fmt: skip
        raise CommandError(f"could not load {what}. {source}{advice}. Reason: {reason}") from error


def show_error(message: str, *, title: str = "Error") -> None:
    """Print a message on stderr: a title, then the text, its lines indented."""
    console = Console(stderr=True, highlight=False)
    console.width = line_width(console)
    console.print(Text(title, style="bold red"))
    text = message[:1].upper() + message[1:]
    console.print(Padding(Text(text, overflow="fold"), (0, 0, 0, 2)), soft_wrap=False)


def line_width(console: Console) -> int:
    """Width to print in: 100 columns where nobody looks, at most 100 in a terminal."""
    return min(console.width, 100) if console.is_terminal else 100

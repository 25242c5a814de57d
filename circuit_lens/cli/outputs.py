"""The files of a trace: where they go, and writing all of them or none."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from circuit_lens.cli.failing import CommandError

SUFFIXES = (".safetensors", ".json", ".png", ".svg")
_NAME = "graph"


def slug(prompt: str) -> str:
    """Return a short file name for a prompt: letters and digits of any script, dashes between them.

    >>> slug("Fact: the capital of the state containing Dallas is")
    'fact-the-capital-of-the-state-containing-dallas-is'
    """
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].strip("-") or _NAME


def output_stem(out: str | None, prompt: str) -> Path:
    """Return the path of the outputs without suffix.

    Args:
        out: a folder; or a file with one of `SUFFIXES`, which names them all; None for a folder named after the prompt.

    Raises:
        CommandError: a path that cannot be written to, found before any work is done.
    """
    if out is not None and not out.strip():
        raise CommandError("--out is empty; give a folder, or a file such as dallas.safetensors")
    path = Path(slug(prompt) if out is None else out).expanduser()
    stem = path.with_suffix("") if path.suffix in SUFFIXES and not path.is_dir() else path / _NAME
    existing = next(folder for folder in (stem.parent, *stem.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise CommandError(f"--out {path}: {existing} is a file, not a folder; give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CommandError(f"--out {path}: the folder {existing.absolute()} cannot be written; give another path")
    for suffix in SUFFIXES:
        if stem.with_name(stem.name + suffix).is_dir():
            raise CommandError(f"--out {path}: {stem.name + suffix} is a folder there; give another path")
    return stem


def write_all(stem: Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write one file per suffix beside each other, all of them or none, and return their paths.

    Every file is complete and on the disk before the first takes its name; folders made for them go when it fails.

    Raises:
        GraphFileError: the folder cannot be written, or the disk is full.
    """
    from circuit_lens.errors import GraphFileError
    from circuit_lens.graph.store import atomic_path

    made = [folder for folder in (stem.parent, *stem.parent.parents) if not folder.exists()]
    paths = [stem.with_name(stem.name + suffix) for suffix in writers]
    try:
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GraphFileError(f"Could not make the folder {stem.parent}: {error}.") from error
        with contextlib.ExitStack() as stack:
            for path, write in zip(paths, writers.values(), strict=True):
                temporary = stack.enter_context(atomic_path(path))
                try:
                    write(temporary)
                except GraphFileError as error:  # of a writer that is careful itself, about the temporary file
                    raise GraphFileError(str(error).replace(str(temporary), str(path))) from error
                _flush(temporary)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not made yet, or somebody else's files are in it by now
                folder.rmdir()
        raise
    return paths


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())

"""Commands that are run in this process, on a model that is loaded once, and what they print."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import circuit_lens as cl
from circuit_lens.cli import build_app, loading
from circuit_lens.cli.loading import Pair

Run = Callable[..., Result]


def runner(
    command: str, rm: cl.ReplacementModel, folder: Path, patch: pytest.MonkeyPatch, *, name: str = "capitals",
    bundled: bool = True,
) -> Run:  # fmt: skip
    """Return what runs a command in a folder, with this model in place of the one it would load."""
    patch.chdir(folder)
    patch.setattr(loading, "load_pair", lambda *_, **__: Pair(rm, name, bundled))
    return lambda *arguments: CliRunner().invoke(build_app(), [command, *arguments], catch_exceptions=False)


def words(text: str) -> str:
    """Return the words of a printed text, without the frames around them."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())

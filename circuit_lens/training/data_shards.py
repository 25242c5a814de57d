"""Activations in files: safetensors shards in a folder, with a manifest that says of what they are.

A shard holds every hook's activations of some tokens, ``[token, width]`` under the hook's name. Shards and manifest are
written all or nothing, the manifest anew after every shard; so what an interrupted run has written is whole, is known,
and is continued by the next.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuit_lens.errors import ConsistencyError, GraphFileError
from circuit_lens.graph.files import atomic_path

FORMAT, VERSION, MANIFEST = "circuit_lens.activations", 1, "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name, its tokens, and the row of the text after its last one."""

    name: str
    n_tokens: int
    next_row: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of activations holds.

    Attributes:
        text: Hash of the tokens and the mask.
        model: Hash of the model's weights.
        edits: Hook points that carried hooks of the user.
        hooks: Hook points, in the order asked for.
        dtype: Of the files.
        widths: Size of each hook's activations, heads laid side by side.
        shards: The files that are complete.
        complete: Whether the whole text is in them.
    """

    text: str
    model: str
    edits: tuple[str, ...]
    hooks: tuple[str, ...]
    dtype: str
    widths: dict[str, int] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens in the files."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def next_row(self) -> int:
        """First row of the text that is in no file."""
        return self.shards[-1].next_row if self.shards else 0

    def differs(self, other: Manifest) -> list[str]:
        """Return the names of what is not the same in the data of two manifests."""
        return [n for n in ("text", "model", "edits", "hooks", "dtype") if getattr(self, n) != getattr(other, n)]


@dataclass(frozen=True, slots=True)
class FilePart:
    """Activations in one file; nothing of it stays in memory."""

    path: Path
    n_tokens: int

    def gather(self, index: Int[Tensor, "chosen"], hooks: Sequence[str]) -> dict[str, Float[Tensor, "chosen _"]]:
        """Return the activations of some tokens, in float32.

        Raises:
            GraphFileError: The file is gone or damaged.
        """
        try:
            # The file is mapped, so that only what is asked for is read.
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name)[index].float() for name in hooks}
        except (OSError, SafetensorError, IndexError) as error:
            raise GraphFileError(
                f"{self.path} is missing or damaged ({error}); delete the folder {self.path.parent} and collect the "
                "activations again"
            ) from error


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, None where there is none.

    Raises:
        GraphFileError: A manifest that is damaged, of something else, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT or data.pop("version") > VERSION:
            raise ValueError("another format, or a newer version")
        shards = tuple(Shard(**one) for one in data.pop("shards"))
        edits, hooks = (tuple(data.pop(name)) for name in ("edits", "hooks"))
        return Manifest(**data, edits=edits, hooks=hooks, shards=shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraphFileError(f"{path} is no manifest of activations ({error}); give another folder") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, all or nothing."""
    data = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    with atomic_path(folder / MANIFEST) as path:
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def parts_of(folder: Path, manifest: Manifest) -> list[FilePart]:
    """Return a folder's files, each one checked to hold what the manifest says.

    Raises:
        GraphFileError: A file that is missing, cut off, or of another shape.
    """
    parts = []
    for shard in manifest.shards:
        path = folder / shard.name
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise GraphFileError(f"{path} is missing or damaged ({error}); delete the folder {folder}") from error
        if shapes != {name: [shard.n_tokens, manifest.widths[name]] for name in manifest.hooks}:
            raise GraphFileError(f"{path} does not hold what {MANIFEST} says; delete the folder {folder}")
        parts.append(FilePart(path, shard.n_tokens))
    return parts


class ShardWriter:
    """Writes activations to a folder, a shard at a time, and continues what an earlier run has begun.

    Args:
        folder: Where to; made if there is none.
        wanted: The manifest without files.
        shard_bytes: Size of a file at which it is closed.

    Raises:
        ConsistencyError: The folder holds activations of something else.
        GraphFileError: The folder cannot be made or read, or its manifest is damaged.
    """

    def __init__(self, folder: Path, wanted: Manifest, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.made_folder, self.new = not folder.exists(), 0
        found = read_manifest(folder)
        if found is not None and (different := found.differs(wanted)):
            raise ConsistencyError(
                f"{folder} holds activations of another {' and another '.join(different)}; give another folder, or "
                "delete it"
            )
        self.manifest = found or wanted
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in wanted.hooks}
        self._bytes = 0

    def add(self, values: Mapping[str, Float[Tensor, "token _"]], next_row: int) -> None:
        """Take in the activations of the rows before ``next_row``; write a file where there are enough."""
        for name, value in values.items():
            self._waiting[name].append(value)
            self._bytes += value.numel() * value.element_size()
        if self._bytes >= self.shard_bytes:
            self.flush(next_row)

    def flush(self, next_row: int, *, complete: bool = False) -> None:
        """Write what is waiting to a file, and the manifest.

        Raises:
            GraphFileError: The disk is full; this run's files are taken away again.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._bytes:
                whole = {name: torch.cat(values) for name, values in self._waiting.items()}
                shard = Shard(f"shard-{len(self.manifest.shards):05d}.safetensors", len(next(iter(whole.values()))),
                              next_row)  # fmt: skip
                with atomic_path(self.folder / shard.name) as path:
                    save_file(whole, path)
                self.new += 1
                widths = {name: value.shape[1] for name, value in whole.items()}
                self.manifest = replace(self.manifest, widths=widths, shards=(*self.manifest.shards, shard))
                self._waiting, self._bytes = {name: [] for name in self._waiting}, 0
            self.manifest = replace(self.manifest, complete=complete)
            write_manifest(self.folder, self.manifest)
        except (GraphFileError, OSError) as error:
            self._undo()
            raise (
                error
                if isinstance(error, GraphFileError)
                else GraphFileError(f"Could not make the folder {self.folder}: {error}; give another one")
            ) from error

    def _undo(self) -> None:
        """Take this run's files away, so that a full disk is no longer full."""
        if self.made_folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        kept = self.manifest.shards[: len(self.manifest.shards) - self.new]
        for path in self.folder.glob("shard-*.safetensors"):
            if path.name not in {shard.name for shard in kept}:
                path.unlink(missing_ok=True)
        if kept:
            write_manifest(self.folder, replace(self.manifest, shards=kept, complete=False))
        else:
            (self.folder / MANIFEST).unlink(missing_ok=True)


def write_folder(folder: Path | str, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a folder; its files take their names when all of them are complete.

    Other files in the folder stay as they are.

    Raises:
        GraphFileError: The folder cannot be written or the disk is full; nothing new is left behind.
    """
    folder = Path(folder).expanduser()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            inside = Path(temporary) / "new"
            inside.mkdir()
            write(inside)
            paths = sorted(inside.iterdir(), reverse=True)  # weights first, what describes them last
            if not folder.exists():
                for path in paths:
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                inside.rename(folder)
                return
            for path in paths:
                with atomic_path(folder / path.name) as place:
                    shutil.move(path, place)
    except (OSError, SafetensorError) as error:
        raise GraphFileError(f"Could not write {folder}: {error}; give a folder with space left") from error

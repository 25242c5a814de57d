"""Activations of any hooked model on any text, in memory or in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_lens.dictionaries.saelens import fingerprint
from circuit_lens.errors import DictionaryError, HookError
from circuit_lens.hooks import Hook, hook_points, present_hooks, preserved_rng, quiet_norm_edits, scoped_hooks
from circuit_lens.protocols import HookedModel
from circuit_lens.running import model_device, plain_tensors
from circuit_lens.training.data import ActivationStore, MemoryPart, require_finite
from circuit_lens.training.data_shards import FilePart, Manifest, ShardWriter, parts_of
from circuit_lens.training.data_text import TokenRows, token_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_SHARD = 2**28


def collect_activations(
    model: HookedModel,
    text: Any,
    hooks: str | Sequence[str],
    *,
    folder: Path | str | None = None,
    memory: int = 2**30,
    dtype: torch.dtype = torch.float32,
    rows_at_once: int = 16,
    progress: bool | None = False,
) -> ActivationStore:
    """Run the model on text and keep the activations of some hook points at the tokens that count.

    Args:
        model: A HookedTransformer or TransformerBridge; hooks of the user on it take effect.
        text: :class:`TokenRows`, or what :func:`token_rows` takes.
        hooks: Names of hook points; activations per head are laid side by side.
        folder: Where to keep them as files. A folder that holds them is used as it is; one that was interrupted is
            continued. Default: memory.
        memory: Bytes that activations may take up in memory; files that fit are read once.
        dtype: Of what is kept: float32, bfloat16 or float16. Batches are float32.
        rows_at_once: Rows of tokens in one run of the model.
        progress: Show a bar; None: in a terminal.

    Raises:
        HookError: A hook that the model lacks (with the nearest names), or that never fires.
        TokensError: See :func:`token_rows`.
        ConsistencyError: NaN or infinite activations; a folder with activations of something else.
        DictionaryError: No folder and more activations than memory; another dtype; activations that have no token axis.
        GraphFileError: Files that cannot be written or read; a full disk.
    """
    names = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
    if not names:
        raise HookError("no hook points were given; give names such as 'blocks.0.hook_mlp_out'")
    if dtype not in DTYPES:
        raise DictionaryError(f"activations are kept as float32, bfloat16 or float16, not {dtype}")
    if rows_at_once < 1:
        raise DictionaryError(f"rows_at_once is {rows_at_once}; it must be at least 1")
    hook_points(model, names)
    rows = token_rows(model, text)
    edits = tuple(present_hooks(model))
    weights = fingerprint(dict(model.named_parameters()))  # type: ignore[attr-defined]
    wanted = Manifest(rows.digest(), weights, edits, names, str(dtype).removeprefix("torch."))
    runs = _Runs(model, rows, names, dtype, rows_at_once, progress)
    if folder is None:
        return _in_memory(runs, wanted, memory)
    return _in_files(runs, wanted, memory, Path(folder).expanduser())


@dataclass(frozen=True)
class _Runs:
    """The model's runs on rows of tokens."""

    model: HookedModel
    rows: TokenRows
    hooks: tuple[str, ...]
    dtype: torch.dtype
    at_once: int
    progress: bool | None

    def from_row(self, start: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (the row after the last one, activations) of run after run."""
        starts = range(start, len(self.rows), self.at_once)
        disable = None if self.progress is None else not self.progress
        for first in tqdm(starts, desc="Activations", unit="run", disable=disable, leave=False):
            after = min(first + self.at_once, len(self.rows))
            keep = self.rows.keep[first:after]
            if keep.any():
                yield after, self._run(first, after, int(keep.any(0).nonzero().max()) + 1)

    def _run(self, first: int, after: int, length: int) -> dict[str, Tensor]:
        """Run the model on some rows, cut where no later token counts: a causal model sees no difference."""
        tokens, keep = self.rows.tokens[first:after, :length], self.rows.keep[first:after, :length]
        found: dict[str, Tensor] = {}

        def take(name: str) -> Hook:
            def edit(value: Tensor) -> None:
                if value.ndim < 3 or value.shape[:2] != tokens.shape:
                    raise DictionaryError(
                        f"{name} has activations of shape {tuple(value.shape)}; a dictionary reads [row, pos, width], "
                        f"and there are {tuple(tokens.shape)} tokens"
                    )
                kept = value.detach()[keep.to(value.device)].flatten(1).to("cpu", self.dtype)
                require_finite(f"{name} in rows {first} to {after - 1} of the text", kept)
                found[name] = kept

            return Hook(name, edit)

        hooks = [take(name) for name in self.hooks]
        with plain_tensors(), preserved_rng(), quiet_norm_edits(), scoped_hooks(self.model, hooks):
            self.model(tokens.to(model_device(self.model)), return_type=None)
        return found


def _in_memory(runs: _Runs, wanted: Manifest, memory: int) -> ActivationStore:
    found: dict[str, list[Tensor]] = {name: [] for name in runs.hooks}
    used = 0
    for _, values in runs.from_row(0):
        for name, value in values.items():
            found[name].append(value)
            used += value.numel() * value.element_size()
        needed = used * runs.rows.n_tokens // sum(map(len, found[runs.hooks[0]]))
        if needed > memory:
            raise DictionaryError(
                f"the activations of {runs.rows.n_tokens} tokens take about {needed} bytes, and memory= allows "
                f"{memory}; give folder= to keep them in files, or more memory, or less text"
            )
    whole = {name: torch.cat(values) for name, values in found.items()}
    widths = {name: value.shape[1] for name, value in whole.items()}
    part = MemoryPart(whole, runs.rows.n_tokens)
    return ActivationStore(runs.hooks, widths, part.n_tokens, [part], memory, _digest(wanted))


def _in_files(runs: _Runs, wanted: Manifest, memory: int, folder: Path) -> ActivationStore:
    writer = ShardWriter(folder, wanted, min(max(memory // 4, 1), _LARGEST_SHARD))
    if not writer.manifest.complete:
        for after, values in runs.from_row(writer.manifest.next_row):
            writer.add(values, after)
        writer.flush(len(runs.rows), complete=True)
    manifest = writer.manifest
    parts: list[MemoryPart | FilePart] = list(parts_of(folder, manifest))
    size = 4 * manifest.n_tokens * sum(manifest.widths.values())
    if size <= memory:
        everything = torch.arange(manifest.n_tokens)
        whole = ActivationStore(wanted.hooks, manifest.widths, manifest.n_tokens, parts, memory, "")
        parts = [MemoryPart(whole.gather(everything, wanted.hooks), manifest.n_tokens)]
    return ActivationStore(wanted.hooks, manifest.widths, manifest.n_tokens, parts, memory, _digest(wanted))


def _digest(manifest: Manifest) -> str:
    named = (manifest.text, manifest.model, manifest.edits, manifest.hooks, manifest.dtype)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:32]

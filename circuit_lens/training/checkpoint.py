"""Checkpoints of a training: one safetensors file with a JSON manifest in its header, replaced all or nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from circuit_lens.errors import CircuitLensError, GraphFileError
from circuit_lens.graph.files import atomic_path

FORMAT, VERSION = "circuit_lens.training_checkpoint", 1


class TrainingError(CircuitLensError, RuntimeError):
    """A training that cannot go on: it diverged, or its checkpoint cannot be written, read or continued."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Where a training stands after ``step`` steps.

    Attributes:
        step: Steps done; the next batch is the one with this number, counted from 0.
        identity: What the training is: settings, seed, data, hooks. Only the same training continues from it.
        progress: Other JSON data, such as tokens and seconds so far.
        tensors: Parameters, the optimiser's state, counters, random state.
    """

    step: int
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return a short hash of JSON data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the older one at ``path`` is readable until the new one is complete on the disk.

    Raises:
        TrainingError: It could not be written (a full disk); the older one is as it was.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": checkpoint.step,
        "identity": dict(checkpoint.identity),
        "identity_hash": identity_hash(checkpoint.identity),
        "progress": dict(checkpoint.progress),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"manifest": json.dumps(manifest)})
    except GraphFileError as error:
        older = "the last checkpoint is whole" if path.exists() else "there is no older checkpoint"
        raise TrainingError(
            f"The checkpoint of step {checkpoint.step} was not written; {older}. Make room and train again with the "
            f"same arguments. {error}"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: No checkpoint of this format and version, or a damaged file.
    """
    try:
        with safe_open(path, "pt") as file:
            manifest = json.loads((file.metadata() or {}).get("manifest", "null"))
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise TrainingError(f"{path} is no training checkpoint; give another folder, or resume=False")
            if manifest["version"] != VERSION:
                raise TrainingError(
                    f"{path} is a checkpoint of format version {manifest['version']}, this is version {VERSION}; "
                    "resume=False starts anew"
                )
            if manifest["identity_hash"] != identity_hash(manifest["identity"]):
                raise TrainingError(f"{path} is damaged: its settings do not fit their hash; resume=False starts anew")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no Mapping)
            return Checkpoint(manifest["step"], manifest["identity"], manifest["progress"], tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} cannot be read as a checkpoint: {error}; resume=False starts anew") from error


def refuse_another(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise TrainingError if a checkpoint's identity is not the wanted one, naming every difference."""
    differences = _differences(found, wanted)
    if differences:
        raise TrainingError(
            f"{path} belongs to another training: {'; '.join(differences)}. Give the same settings, seed and data, "
            "another folder, or resume=False to start anew."
        )


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = dict.fromkeys([*found, *wanted])
        return [
            line
            for key in keys
            for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}".removeprefix("."))
        ]
    return [] if found == wanted else [f"{name} was {found!r} and is {wanted!r}"]


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def training_tensors(
    network: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return everything that a training changes: parameters and buffers, the optimiser's state, the random state."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return tensors | {"generator": generator.get_state()}


def restore_tensors(
    tensors: Mapping[str, Tensor], network: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Put back what :func:`training_tensors` returned."""
    weights, states = {}, {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "network":
            weights[rest] = tensor
        elif kind == "optimiser":
            number, _, key = rest.partition(".")
            states.setdefault(int(number), {})[key] = tensor
    network.load_state_dict(weights)
    optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    generator.set_state(tensors["generator"])

"""Training of cross-layer transcoders: seeded, resumable after any interruption, and told as it goes.

What is trained is in :mod:`circuit_lens.training.cross_layer_network`, on what in
:mod:`circuit_lens.training.cross_layer_data`.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuit_lens.training.activations import MlpActivations
from circuit_lens.training.checkpoint import (
    Checkpoint,
    TrainingError,
    load_checkpoint,
    refuse_another,
    remove_leftovers,
    restore_tensors,
    save_checkpoint,
    training_tensors,
)
from circuit_lens.training.cross_layer_data import (
    ActivationSource,
    InMemoryActivations,
    Normalisation,
    as_source,
    check_batch,
    data_fingerprint,
    measure_normalisation,
)
from circuit_lens.training.cross_layer_log import TrainingLog, TrainingRecord, ctrl_c_between_steps
from circuit_lens.training.cross_layer_network import CrossLayerNetwork, CrossLayerSettings, ForwardPass

if TYPE_CHECKING:
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

__all__ = [
    "CHECKPOINT_FILE",
    "DICTIONARY_FOLDER",
    "ActivationSource",
    "CrossLayerSettings",
    "InMemoryActivations",
    "train_cross_layer",
]

CHECKPOINT_FILE, DICTIONARY_FOLDER = "checkpoint.safetensors", "dictionary"


@torch.inference_mode(False)
@torch.enable_grad()
def train_cross_layer(
    data: ActivationSource | Sequence[MlpActivations],
    *,
    hook_in: Sequence[str] | None = None,
    hook_out: Sequence[str] | None = None,
    settings: CrossLayerSettings | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    checkpoint_every: int = 250,
    resume: bool = True,
    log: Path | str | None = None,
    log_every: int = 20,
    progress: bool = True,
    wandb: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> CrossLayerTranscoder:
    """Train a cross-layer transcoder (Ameisen et al. 2025, Circuit Tracing; Lindsey et al. 2024, Sparse Crosscoders).

    Minimises the squared error of the MLP outputs, summed over layers, each layer in units of its own root mean
    square, plus a JumpReLU set's sparsity penalty, plus a loss that revives dead features. The result reads and writes
    the model's own activations, has JumpReLU thresholds whatever it was trained with, and is float32.

    An interrupted training continues when it is called again with the same arguments and ``folder``; on the CPU, with
    the same number of threads, it then gives the result of one that was never interrupted. Ctrl-C is heard between two
    steps and leaves a checkpoint of the last one.

    Args:
        data: What :func:`circuit_lens.training.mlp_activations` returns, all layers in order, or an
            :class:`ActivationSource`.
        hook_in, hook_out: What each layer reads and writes; may be left out for what ``mlp_activations`` returned and
            for sources with the attributes ``hooks_in`` and ``hooks_out``.
        settings: Sizes, sparsity, schedule.
        seed: Of initial weights and of the order of tokens; the global random state is left alone.
        folder: Holds the checkpoint while training, and the transcoder in the subfolder ``dictionary`` at the end.
        checkpoint_every: Steps between two checkpoints; the last step has one too.
        resume: Continue from the folder's checkpoint, if there is one. False: start anew, and replace it.
        log: File of JSON lines (:class:`circuit_lens.training.cross_layer_log.TrainingRecord`).
        log_every: Steps between two lines; the last step has one too.
        progress: Show a bar.
        wandb: Project of Weights & Biases. By default it is never started.
        metadata: JSON data that goes into the transcoder's own.

    Returns:
        A ``circuit_lens.dictionaries.cross_layer.CrossLayerTranscoder``.

    Raises:
        TrainingError: The checkpoint belongs to other settings, data, hooks or another seed, or cannot be read or
            written; the loss is no longer finite; the data ended.
        TypeError, ValueError: Data that cannot train, hooks that are not one per layer.
        ImportError: ``wandb`` is given and not installed.
        KeyboardInterrupt: Ctrl-C; the state is kept.
    """
    if checkpoint_every < 1 or log_every < 1:
        raise ValueError(f"checkpoint_every and log_every must be at least 1; given {checkpoint_every} and {log_every}")
    source = as_source(data)
    hooks = _hooks(data, hook_in, hook_out)
    run = _Run(source, settings or CrossLayerSettings(), seed, hooks)
    path = None if folder is None else Path(folder) / CHECKPOINT_FILE
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        if resume and path.exists():
            run.restore(path)
    telling = TrainingLog(
        log,
        step=run.step,
        steps=run.settings.steps,
        progress=progress,
        wandb=wandb,
        wandb_id=run.name,
        config=run.identity,
    )
    try:
        run.train(path, checkpoint_every, log_every, telling)
    finally:
        telling.close()
    transcoder = run.finished(metadata or {})
    if folder is not None:
        _replace_folder(transcoder, Path(folder) / DICTIONARY_FOLDER)
    return transcoder


def _replace_folder(transcoder: CrossLayerTranscoder, place: Path) -> None:
    """Save a transcoder in a folder that may hold an older one, which stays until the new one is whole."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        new = Path(temporary) / place.name
        transcoder.save(new)
        if place.exists():
            place.rename(Path(temporary) / "older")
        new.rename(place)


def _hooks(
    data: Any, hook_in: Sequence[str] | None, hook_out: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hooks of all layers, from data that know them where they are not given."""
    if isinstance(data, Sequence):
        hook_in = [layer.hook_in for layer in data] if hook_in is None else hook_in
        hook_out = [layer.hook_out for layer in data] if hook_out is None else hook_out
    hook_in = getattr(data, "hooks_in", None) if hook_in is None else hook_in
    hook_out = getattr(data, "hooks_out", None) if hook_out is None else hook_out
    if hook_in is None or hook_out is None:
        raise ValueError("hook_in and hook_out must name what each layer reads and writes, one hook per layer")
    if isinstance(hook_in, str) or isinstance(hook_out, str):
        raise ValueError(f"hook_in and hook_out must be lists, one hook per layer; given {hook_in!r} and {hook_out!r}")
    return tuple(hook_in), tuple(hook_out)


class _Run:
    """A training: the network, its optimiser, and where it stands."""

    def __init__(
        self,
        source: ActivationSource,
        settings: CrossLayerSettings,
        seed: int,
        hooks: tuple[tuple[str, ...], tuple[str, ...]],
    ) -> None:
        self.source, self.settings, self.seed, self.hooks = source, settings, seed, hooks
        inputs, outputs = next(iter(source.batches(settings.batch, seed, 0)))
        check_batch(inputs, outputs)
        n_layers, d_in, d_out = inputs.shape[1], inputs.shape[2], outputs.shape[2]
        if len(hooks[0]) != n_layers or len(hooks[1]) != n_layers:
            raise ValueError(
                f"the data have {n_layers} layers; hook_in names {len(hooks[0])} and hook_out {len(hooks[1])}"
            )
        self.identity: dict[str, Any] = {
            "settings": asdict(settings),
            "seed": seed,
            "data": data_fingerprint(source, settings.batch, seed),
            "shape": [n_layers, d_in, d_out],
            "hook_in": list(hooks[0]),
            "hook_out": list(hooks[1]),
        }
        self.device = inputs.device
        self.generator = torch.Generator().manual_seed(seed)
        self.network = CrossLayerNetwork(settings, n_layers, d_in, d_out, self.generator).to(self.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.statistics: Normalisation | None = None
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.name = uuid.uuid4().hex[:12]

    @property
    def normalisation(self) -> Normalisation:
        """Statistics of the data, measured before the first step and kept in checkpoints."""
        if self.statistics is None:
            self.statistics = measure_normalisation(self.source, self.settings.batch, self.seed)
        return self.statistics

    def checkpoint(self) -> Checkpoint:
        """Return where the training stands."""
        tensors = training_tensors(self.network, self.optimiser, self.generator)
        kept = asdict(self.normalisation)
        return Checkpoint(
            self.step,
            self.identity,
            {"tokens": self.tokens, "seconds": self.seconds, "name": self.name, "torch": torch.__version__},
            tensors | {f"normalisation.{name}": value for name, value in kept.items()},
        )

    def restore(self, path: Path) -> None:
        """Continue where a checkpoint stands.

        Raises:
            TrainingError: It cannot be read, or belongs to another training.
        """
        found = load_checkpoint(path)
        refuse_another(path, found.identity, self.identity)
        restore_tensors(found.tensors, self.network, self.optimiser, self.generator)
        prefix = "normalisation."
        kept = {name.removeprefix(prefix): t for name, t in found.tensors.items() if name.startswith(prefix)}
        self.statistics = Normalisation(**{name: tensor.to(self.device) for name, tensor in kept.items()})
        self.step, self.tokens = found.step, found.progress["tokens"]
        self.seconds, self.name = found.progress["seconds"], found.progress["name"]

    def train(self, path: Path | None, checkpoint_every: int, log_every: int, telling: TrainingLog) -> None:
        """Do the steps that are left."""
        steps = self.settings.steps
        if self.step >= steps:
            return
        normalisation = self.normalisation
        batches = iter(self.source.batches(self.settings.batch, self.seed, self.step))
        with ctrl_c_between_steps() as interrupted:
            while self.step < steps:
                started = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    raise TrainingError(f"the data ended after {self.step} of {steps} steps; batches must not end")
                lr, done = self._one_step(normalisation.inputs(batch[0]), normalisation.outputs(batch[1]))
                self.seconds += time.perf_counter() - started
                telling.tick()
                if self.step % log_every == 0 or self.step == steps:
                    telling.write(self._record(lr, done))
                due = self.step % checkpoint_every == 0 or self.step == steps
                if path is not None and (due or interrupted.pressed):
                    save_checkpoint(path, self.checkpoint())
                if interrupted.pressed:
                    raise KeyboardInterrupt

    def _one_step(self, x: Tensor, y: Tensor) -> tuple[float, ForwardPass]:
        """Return the rate and the losses of one step of the optimiser on a normalised batch."""
        lr = self.settings.lr_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        done: ForwardPass = self.network(x, y, step=self.step)
        if not done.loss.isfinite():
            raise TrainingError(
                f"the loss is {done.loss.item()} in step {self.step + 1}: NaN or infinite activations, or a rate that "
                f"is too high (lr={self.settings.lr:g})"
            )
        self.optimiser.zero_grad(set_to_none=True)
        done.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        self.optimiser.step()
        self.network.after_step(done)
        self.step += 1
        self.tokens += len(x)
        return lr, done

    def _record(self, lr: float, done: ForwardPass) -> TrainingRecord:
        share = 1 - done.unexplained / done.total.clamp_min(1e-12)
        return TrainingRecord(
            step=self.step,
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            lr=lr,
            loss=done.loss.item(),
            mse=tuple(done.error.tolist()),
            penalty=done.penalty.item(),
            auxiliary=done.auxiliary.item(),
            l0=tuple(done.active.sum(-1).float().mean(-1).tolist()),
            explained_variance=tuple(share.tolist()),
            dead=self.network.dead_share,
            threshold=tuple(self.network.running.tolist()),
        )

    def finished(self, metadata: Mapping[str, Any]) -> CrossLayerTranscoder:
        """Return the transcoder, on the CPU, with normalisation and decoder norms folded in."""
        from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

        weights = self.network.folded(self.normalisation)
        return CrossLayerTranscoder(
            W_enc=[w.cpu() for w in weights.W_enc],
            b_enc=[b.cpu() for b in weights.b_enc],
            W_dec=[w.cpu() for w in weights.W_dec],
            b_dec=[b.cpu() for b in weights.b_dec],
            threshold=[t.cpu() for t in weights.threshold],
            hook_in=self.hooks[0],
            hook_out=self.hooks[1],
            activation="jumprelu",
            metadata={
                "training": {
                    "settings": asdict(self.settings),
                    "seed": self.seed,
                    "tokens": self.tokens,
                    "seconds": round(self.seconds),
                    "data": self.identity["data"],
                },
                **metadata,
            },
        )

"""SAELens' `SAETrainer`, driven step by step, with a log of its losses; and BatchTopK without sorting.

The loop uses what the trainer offers to outside coordinators (``step``, ``set_final_sae_metadata``) and computes what
its own ``fit`` computes.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn
from tqdm import tqdm

from circuit_lens.errors import DictionaryError, GraphFileError
from circuit_lens.hooks import preserved_rng
from circuit_lens.training.data_shards import write_folder


class BatchThreshold(nn.Module):
    """BatchTopK by its threshold: keeps what exceeds the (k * samples + 1)-th largest entry of the batch.

    The same as SAELens' BatchTopK where no two entries are equal, without sorting.
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_acts: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        """The activations of one batch."""
        acts = pre_acts.relu()
        kept = int(self.k * acts.shape[:-1].numel())
        flat = acts.detach().flatten()
        if kept >= len(flat):
            return acts
        return acts * (acts > flat.kthvalue(len(flat) - kept).values)


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """What determines a training, besides data and seed.

    Attributes:
        d_sae: Features.
        k: Mean number of active features per token.
        steps, batch: Steps of ``batch`` tokens.
        lr: Adam's rate, falling linearly to 5 % of it over the last ``decay_share`` of the steps.
        auxiliary: Weight of the loss that revives features silent for ``dead_window`` steps.
        bfloat16: Train under autocast.
    """

    d_sae: int = 640
    k: float = 11.0
    steps: int = 800
    batch: int = 1024
    lr: float = 3e-3
    decay_share: float = 0.5
    auxiliary: float = 1 / 32
    dead_window: int = 100
    bfloat16: bool = True

    def check(self) -> None:
        """Raise DictionaryError for settings that cannot train anything."""
        for name in ("d_sae", "steps", "batch", "dead_window"):
            if getattr(self, name) < 1:
                raise DictionaryError(f"settings: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.k <= self.d_sae:
            raise DictionaryError(f"settings: k is {self.k:g}; it must be above 0 and at most d_sae, {self.d_sae}")
        if not self.lr > 0 or not 0 <= self.decay_share <= 1 or self.auxiliary < 0:
            raise DictionaryError(
                f"settings: lr is {self.lr:g}, decay_share {self.decay_share:g}, auxiliary {self.auxiliary:g}; they "
                "must be above 0, from 0 to 1, and at least 0"
            )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the log: what one step of the training was like.

    Attributes:
        step, tokens: Steps and tokens so far.
        loss: What was minimised, with data of mean square 1 per coordinate; ``losses`` are its parts.
        l0: Active features per token of the batch.
        explained_variance: 1 - sum |error|² / sum |target - mean|² of the batch; None where nothing varies.
        dead: Share of the features that were active on none of the last ``dead_tokens`` tokens.
        lr: Adam's rate.
    """

    step: int
    tokens: int
    loss: float
    losses: dict[str, float]
    l0: float
    explained_variance: float | None
    dead: float
    dead_tokens: int
    lr: float


class TrainingLog:
    """Writes records as JSON lines to a file, and to Weights & Biases where a project is named.

    Args:
        path: The file, written anew; None for none.
        wandb: Project; None for none: nothing is ever sent unasked.
        config: What the run is, for Weights & Biases.

    Raises:
        GraphFileError: The file cannot be written.
    """

    def __init__(self, path: Path | str | None, wandb: str | None, config: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.project, self.config = wandb, dict(config)
        self._file: Any = None
        self._run: Any = None

    def __enter__(self) -> TrainingLog:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "w", encoding="utf-8")
            except OSError as error:
                raise GraphFileError(f"Could not write the log {self.path}: {error}; give another file") from error
        if self.project is not None:
            import wandb

            self._run = wandb.init(project=self.project, config=self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)

    @property
    def wanted(self) -> bool:
        """Whether records go anywhere."""
        return self._file is not None or self._run is not None

    def write(self, record: StepRecord) -> None:
        """Add one record."""
        data = asdict(record)
        if self._file is not None:
            try:
                self._file.write(json.dumps(data) + "\n")
                self._file.flush()
            except OSError as error:
                raise GraphFileError(f"Could not write the log {self.path}: {error}") from error
        if self._run is not None:
            self._run.log(data, step=record.step)


def run_trainer(
    network: Any,
    batches: Iterator[Tensor],
    settings: TrainerSettings,
    *,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    log: Path | str | None = None,
    log_every: int = 50,
    wandb: str | None = None,
) -> None:
    """Train a SAELens training class on batches; it comes back on the CPU.

    Args:
        network: The training class, changed in place.
        batches: Tensors ``[token, width]``, without end.
        settings: Steps, rates and so on; the rate rises over the first tenth of the steps (100 at most).
        device: Where to train.
        progress: Show a bar; None: in a terminal.
        log: A file for one `StepRecord` per line.
        log_every: Steps from one record to the next; the last step has one.
        wandb: A project of Weights & Biases to send the records to.
    """
    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=settings.lr * 0.05,
        lr_warm_up_steps=min(100, settings.steps // 10),
        lr_decay_steps=int(settings.steps * settings.decay_share),
        device=str(device),
        autocast=settings.bfloat16,
        dead_feature_window=settings.dead_window,
        feature_sampling_window=max(settings.steps, 1),
    )
    network.to(config.device)
    trainer: Any = SAETrainer(config, network, batches)
    disable = None if progress is None else not progress
    with (
        TrainingLog(log, wandb, asdict(settings)) as records,
        tqdm(total=settings.steps, desc="Training", unit="step", disable=disable, leave=False) as bar,
    ):
        for step in range(1, settings.steps + 1):
            output = trainer.step(next(batches))
            trainer.n_training_steps += 1
            if records.wanted and (step % log_every == 0 or step in (1, settings.steps)):
                records.write(_record(trainer, output, step, settings))
            bar.update()
    _complete_threshold(network, settings.steps)
    trainer.set_final_sae_metadata()
    network.to("cpu")


@torch.no_grad()
def _complete_threshold(network: Any, steps: int) -> None:
    """Take off a BatchTopK threshold what its running mean still has of the zero that it started from.

    Without that, short trainings are saved with a threshold that lets several times ``k`` features through.
    """
    if hasattr(network, "topk_threshold"):
        missing = (1 - network.cfg.topk_threshold_lr) ** steps
        if missing > 1e-3:
            network.topk_threshold /= 1 - missing


@torch.no_grad()
def _record(trainer: Any, output: Any, step: int, settings: TrainerSettings) -> StepRecord:
    target, made = output.sae_in.float(), output.sae_out.float()
    unexplained, total = (made - target).square().sum(), (target - target.mean(0)).square().sum()
    losses = {name: float(value) for name, value in output.losses.items()}
    return StepRecord(
        step=step,
        tokens=step * settings.batch,
        loss=float(output.loss),
        losses=losses,
        l0=float((output.feature_acts > 0).float().sum(-1).mean()),
        explained_variance=1 - float(unexplained / total) if total > 0 else None,
        dead=float(trainer.dead_neurons.float().mean()),
        dead_tokens=settings.dead_window * settings.batch,
        lr=float(trainer.optimizer.param_groups[0]["lr"]),
    )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the global random generator as after a seed, and leave it as it was."""
    with preserved_rng():
        torch.manual_seed(seed)
        yield


def save_and_load(network: Any, folder: Path | str | None) -> SAE[Any]:
    """Return the trained network as the SAELens module for use, from its files; ``folder`` keeps them.

    Raises:
        GraphFileError: The folder cannot be written, or the disk is full.
    """
    if folder is not None:
        write_folder(folder, network.save_inference_model)
        return SAE.load_from_disk(str(Path(folder).expanduser()), device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        network.save_inference_model(temporary)
        return SAE.load_from_disk(temporary, device="cpu")

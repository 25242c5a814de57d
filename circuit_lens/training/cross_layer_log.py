"""What a training tells while it runs: a file of JSON lines, a progress bar, Weights & Biases if asked, Ctrl-C."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from circuit_lens.graph.files import atomic_path


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """One line of the log. All figures but ``dead`` are of one training batch, in normalised units.

    Attributes:
        step: Steps done.
        tokens: Tokens seen.
        seconds: Time spent in training, over all resumed runs.
        lr: Adam's rate in this step.
        loss: What is minimised.
        mse: Squared error per token, summed over coordinates, per layer; a constant guess has about d_out.
        penalty, auxiliary: The loss's other parts, weighted.
        l0: Mean active features per token, per layer.
        explained_variance: 1 - squared error / squared distance from the batch's mean, per layer.
        dead: Share of features that were silent for the last ``dead_window`` steps.
        threshold: BatchTopK's running threshold, per layer.
    """

    step: int
    tokens: int
    seconds: float
    lr: float
    loss: float
    mse: tuple[float, ...]
    penalty: float
    auxiliary: float
    l0: tuple[float, ...]
    explained_variance: tuple[float, ...]
    dead: float
    threshold: tuple[float, ...]


class TrainingLog:
    """Hands records on to a file of JSON lines, a progress bar, and Weights & Biases.

    Args:
        path: File of JSON lines; None for none. It starts anew, or on resume after the lines of the first ``step``
            steps: what a killed run wrote beyond its checkpoint is dropped, for it will be written again.
        step, steps: Where the training stands and where it ends.
        progress: Show a bar.
        wandb: Project of Weights & Biases; None never imports it.
        wandb_id: The run's name there, the same after a resume.
        config: What Weights & Biases is told of the settings.

    Raises:
        ImportError: ``wandb`` is given and the package is not installed.
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        step: int,
        steps: int,
        progress: bool,
        wandb: str | None,
        wandb_id: str,
        config: Mapping[str, Any],
    ) -> None:
        self.run: Any = None if wandb is None else _start_wandb(wandb, wandb_id, config)
        self.file = None
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(path, step)
            self.file = path.open("a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=step, disable=not progress, unit="step", desc="cross-layer transcoder")

    def tick(self) -> None:
        """Count one step."""
        self.bar.update()

    def write(self, record: TrainingRecord) -> None:
        """Hand on one record."""
        data = asdict(record)
        if self.file is not None:
            self.file.write(json.dumps(data) + "\n")
            self.file.flush()
        self.bar.set_postfix(
            loss=f"{record.loss:.2f}",
            L0=f"{sum(record.l0) / len(record.l0):.1f}",
            EV=f"{min(record.explained_variance):.3f}",
            dead=f"{record.dead:.0%}",
        )
        if self.run is not None:
            flat = {
                (name if number is None else f"{name}/{number}"): value
                for name, values in data.items()
                for number, value in (enumerate(values) if isinstance(values, tuple) else [(None, values)])
            }
            self.run.log(flat, step=record.step)

    def close(self) -> None:
        """Close the file, the bar and the run."""
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.run is not None:
            self.run.finish()


def keep_lines(path: Path, step: int) -> None:
    """Cut a log down to its whole lines of the first ``step`` steps."""
    kept = []
    if step > 0 and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the process was killed
            if isinstance(record, dict) and record.get("step", step + 1) <= step:
                kept.append(line + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _start_wandb(project: str, name: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"wandb={project!r} needs the package wandb (pip install wandb); without it, log= writes the same figures "
            "as JSON lines"
        ) from error
    return wandb.init(project=project, id=name, resume="allow", config=dict(config))


class Interrupted:
    """Whether Ctrl-C was pressed since the block began."""

    def __init__(self) -> None:
        self.pressed = False


@contextmanager
def ctrl_c_between_steps() -> Iterator[Interrupted]:
    """Let Ctrl-C wait for the end of a step, where the state is whole; the second one acts at once.

    Only in the main thread, where Python handles signals; elsewhere, and where the program has a handler of its own,
    nothing changes.
    """
    state = Interrupted()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield state
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if state.pressed:
            signal.default_int_handler(number, frame)
        state.pressed = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, usual)

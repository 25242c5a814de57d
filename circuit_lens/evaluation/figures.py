"""What an evaluation found: records with named fields, and their forms as text, HTML, frame and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from circuit_lens.errors import nearest
from circuit_lens.evaluation.sums import NAN, Estimate
from circuit_lens.evaluation.text import html_form, text_form

if TYPE_CHECKING:
    import pandas

VERSION = 1


@dataclass(frozen=True)
class RunFigures:
    """What changing outputs of the model does to its predictions, beside the clean run on the same text.

    Attributes:
        loss: Mean cross-entropy, nats.
        added: ``loss`` less the clean one, nats; its standard error is that of differences by row.
        kl: Mean KL(clean ‖ changed) of the next-token distributions, nats.
        recovered_zero: (L_zero - loss) / (L_zero - L_clean), with the same outputs zero-ablated in L_zero. Where that
            ablation does not raise the loss, the share says nothing, and texts leave it out.
        recovered_mean: The same beside mean ablation.
    """

    loss: Estimate
    added: Estimate
    kl: Estimate
    recovered_zero: Estimate
    recovered_mean: Estimate


@dataclass(frozen=True)
class Quality:
    """How good a dictionary is, or its twin. Figures of reconstruction are on the model's own activations.

    L0 and what follows from it are NaN at a hook that no dictionary of the layer writes first (a later layer of an
    incomplete cross-layer transcoder).

    Attributes:
        l0: Mean number of active features per token.
        dead: Share of features that were active on none of the evaluated tokens; depends on how many these are.
        dense: Share of features that were active on more than a tenth of them.
        density: 5 %, 25 %, 50 %, 75 % and 95 % quantiles of the share of tokens on which a feature is active, over
            features that are not dead.
        explained_variance: 1 - Σ|y - ŷ|² / Σ|y - mean y|², where y is the output at the hook and ŷ what the
            dictionaries that write there make of it together, skip paths included; NaN where y does not vary.
        mse: Mean of |y - ŷ|², summed over the width.
        cosine: Mean cosine of y and ŷ.
        alone: The model's predictions with this output replaced and no other; None if that was not asked for.
    """

    l0: float
    dead: float
    dense: float
    density: tuple[float, ...]
    explained_variance: float
    mse: float
    cosine: float
    alone: RunFigures | None = None


@dataclass(frozen=True)
class OutputFigures:
    """Everything about one output of the model that dictionaries stand in for.

    Attributes:
        hook: The hook that is written, by which ``evaluation[hook]`` finds it.
        layer: Its layer.
        reads: Hooks that the dictionaries writing here read.
        kind: Kind of the dictionary that writes here first, "" if none does.
        n_features: Its size, 0 if there is none.
        own: The dictionaries themselves.
        baselines: Twins by kind, "random" and "untrained"; see :mod:`circuit_lens.evaluation.twins`.
        zero, mean: The model's predictions with this output ablated; None if not asked for.
    """

    hook: str
    layer: int
    reads: tuple[str, ...]
    kind: str
    n_features: int
    own: Quality
    baselines: Mapping[str, Quality] = field(default_factory=dict)
    zero: RunFigures | None = None
    mean: RunFigures | None = None

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self.own.l0

    @property
    def dead(self) -> float:
        """Share of features that were never active."""
        return self.own.dead

    @property
    def explained_variance(self) -> float:
        """1 - Σ|y - ŷ|² / Σ|y - mean y|²."""
        return self.own.explained_variance

    @property
    def mse(self) -> float:
        """Mean of |y - ŷ|², summed over the width."""
        return self.own.mse

    @property
    def cosine(self) -> float:
        """Mean cosine of y and ŷ."""
        return self.own.cosine

    @property
    def alone(self) -> RunFigures | None:
        """The model's predictions with this output replaced and no other."""
        return self.own.alone


@dataclass(frozen=True)
class Evaluation:
    """How well a set of dictionaries stands in for what it replaces.

    Attributes:
        model: Name of the model.
        n_rows: Rows of text.
        n_tokens: Positions that count.
        n_predictions: Predictions that count: made at a position that counts, of a token that counts.
        loss: Mean cross-entropy of the model as it is, nats.
        outputs: One record per hook that is written, in the order of layers.
        replaced: All outputs replaced at once, each dictionary reading the stream that the others made.
        zero, mean: All outputs ablated at once: by zeros, and by their means over the positions that count.
        baselines: All outputs replaced by twins, by kind.
        settings: How it was made.
    """

    model: str
    n_rows: int
    n_tokens: int
    n_predictions: int
    loss: Estimate
    outputs: tuple[OutputFigures, ...]
    replaced: RunFigures
    zero: RunFigures
    mean: RunFigures
    baselines: Mapping[str, RunFigures] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, hook: str) -> OutputFigures:
        found = {output.hook: output for output in self.outputs}
        if hook not in found:
            raise KeyError(f"the evaluation has no output {hook!r}{nearest(hook, found)}")
        return found[hook]

    def __str__(self) -> str:
        return text_form(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_form(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every figure as flat rows: each output's dictionaries and twins, then all outputs at once.

        In the rows of one output, the figures of predictions are those with this output changed and no other.
        """
        for output in self.outputs:
            where = {"output": output.hook, "layer": output.layer}
            for name, quality in {"own": output.own, **output.baselines}.items():
                yield where | {"dictionary": name} | _quality(quality) | _run(quality.alone)
            for name, run in (("zero", output.zero), ("mean", output.mean)):
                yield where | {"dictionary": name} | _run(run)
        runs = {"none": None, "own": self.replaced, **self.baselines, "zero": self.zero, "mean": self.mean}
        for name, run in runs.items():
            clean = {"loss": self.loss.value, "loss_error": self.loss.error}
            yield {"output": "all", "layer": None, "dictionary": name} | (clean if run is None else _run(run))

    def to_frame(self) -> pandas.DataFrame:
        """Return :meth:`rows` as a pandas frame; what a row has not is NaN. Errors are standard errors over rows.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(list(self.rows()))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able data; NaN and infinity become None."""
        return {"version": VERSION} | _plain(asdict(self))


def _quality(quality: Quality) -> dict[str, float]:
    names = ("l0", "dead", "dense", "explained_variance", "mse", "cosine")
    middle = quality.density[len(quality.density) // 2] if quality.density else NAN
    return {name: getattr(quality, name) for name in names} | {"density_median": middle}


def _run(run: RunFigures | None) -> dict[str, float]:
    found = {}
    for name in () if run is None else ("loss", "added", "kl", "recovered_zero", "recovered_mean"):
        estimate: Estimate = getattr(run, name)
        found |= {name: estimate.value, f"{name}_error": estimate.error}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

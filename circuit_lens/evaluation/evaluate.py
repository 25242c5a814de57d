"""How well dictionaries stand in for what they replace, measured on text.

Every figure is taken at the hook that a dictionary *writes*: a transcoder's output is compared with, and put in place
of, the MLP's output. (Evaluators made for SAEs put it back where it was read.) A cross-layer transcoder is judged
layer by layer, by what all dictionaries of the set that write to a layer make of it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from circuit_lens.dictionaries.attach import refuse_attached
from circuit_lens.dictionaries.binding import Binding
from circuit_lens.errors import ConsistencyError, DictionaryError
from circuit_lens.evaluation.figures import Evaluation, OutputFigures, Quality, RunFigures
from circuit_lens.evaluation.rows import Batch, Mask, Rows, Text, read_text
from circuit_lens.evaluation.runs import CleanRun, Stage, encode
from circuit_lens.evaluation.sums import (
    NAN,
    FiringSums,
    FitSums,
    Moments,
    RowSums,
    cross_entropies,
    divergences,
    log_probabilities,
)
from circuit_lens.evaluation.twins import Encoder, ScaleSums, Twin, make_twins
from circuit_lens.hooks import present_hooks
from circuit_lens.protocols import Dictionary
from circuit_lens.running import plain_tensors

ALL = "all"
_DENSE = 0.1
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluate(
    binding: Binding,
    tokens: Rows,
    *,
    mask: Mask | None = None,
    keep_special: bool = True,
    alone: bool = True,
    baselines: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Return sparsity, reconstruction and loss of dictionaries in place of what they replace, beside untrained ones.

    Special positions are the first of every row (where a model's activations are unlike any other) and those of the
    tokenizer's beginning, end and padding tokens. By default they do not count in any figure, and keep the model's own
    output in every changed run. Loss and KL are over predictions that are made at a position that counts, of a token
    that counts. Permanent hooks of the user are honoured.

    The text is gone through several times, a batch at a time, so that memory does not depend on its length. Per batch
    the model runs once, three times more for ``baselines``, and once for every way to change it: 3 (5 with
    ``baselines``) for all outputs at once, and as many for each output ``alone``. ``baselines`` hold as much memory as
    the dictionaries.

    Args:
        binding: A checked pair.
        tokens: Token ids ``[row, pos]``, or a list of prompts (text, or token ids) of any lengths.
        mask: Positions that count, True or False for every token; shaped like ``tokens``.
        keep_special: Special positions keep the model's own output. False: what stands there is replaced too.
        alone: Also replace and ablate every output alone.
        baselines: Also evaluate a random and an untrained dictionary of equal shape and L0 in place of each; see
            :mod:`circuit_lens.evaluation.twins`.
        batch_size: Rows run at once; None chooses. Figures do not depend on it, but for rounding.
        seed: Of the baselines' weights.
        progress: Show a bar: None for long work only.

    Raises:
        DictionaryError: There is no dictionary.
        TokensError: Tokens or mask that cannot be used; see :func:`circuit_lens.evaluation.rows.read_text`.
        HookError: Dictionaries are attached to the model now, or a hook did not fire.
        ConsistencyError: The model, a dictionary or a changed run gives NaN or infinity; names it.
        ValueError: A batch size below one.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give at least 1, or None")
    if not binding.dictionaries:
        raise DictionaryError("there is no dictionary to evaluate; give the ReplacementModel at least one")
    refuse_attached(binding.model)
    with plain_tensors():
        text = read_text(binding.model, tokens, mask=mask, keep_special=keep_special)
        work = _Work(Stage(binding), text, batch_size, alone, seed if baselines else None, progress)
        with work.stage.ready(), work.bar:
            work.survey()
            work.fit()
            work.run()
        settings = {
            "counted": "first positions and special tokens left out" if mask is None else "positions as masked",
            "keep_special": keep_special, "seed": seed if baselines else None,
            "dictionaries": {d.site: d.kind for d in binding.dictionaries}, "hooks": present_hooks(binding.model),
        }  # fmt: skip
        return work.result(settings)


@dataclass(eq=False)
class _Set:
    """The dictionaries themselves, or their twins of one kind, with what is summed about them."""

    dictionaries: Sequence[Dictionary]
    fits: dict[str, FitSums]
    firing: dict[str, FiringSums]

    @staticmethod
    def of(dictionaries: Sequence[Dictionary], hooks: Sequence[str]) -> _Set:
        return _Set(
            dictionaries, {hook: FitSums() for hook in hooks}, {d.site: FiringSums() for d in dictionaries}
        )  # fmt: skip

    def add(self, run: CleanRun, counted: Bool[Tensor, "batch pos"]) -> None:
        """Take a batch: what is active, and how far the joint reconstructions are from the outputs."""
        totals: dict[str, Tensor] = {}
        for d in self.dictionaries:
            acts, outputs = encode(d, _at(run.inputs[d.site], counted))
            self.firing[d.site].add(acts)
            for o, hook in enumerate(d.hooks_out):
                totals[hook] = totals[hook] + outputs[:, o] if hook in totals else outputs[:, o]
        for hook, y_hat in totals.items():
            self.fits[hook].add(_at(run.outputs[hook], counted), y_hat)


@dataclass(eq=False)
class _Work:
    """One evaluation under way."""

    stage: Stage
    text: Text
    batch_size: int | None
    alone: bool
    seed: int | None
    progress: bool | None
    moments: dict[str, Moments] = field(default_factory=dict)
    encoders: list[Encoder] = field(default_factory=list)
    sets: dict[str, _Set] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stage = self.stage
        dictionaries = stage.dictionaries
        self.moments = {hook: Moments() for hook in stage.hooks}
        self.sets = {"own": _Set.of(dictionaries, stage.hooks)}
        self.twins: dict[str, list[Twin]] = {}
        if self.seed is not None:
            weight = stage.model.W_U
            like = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            self.encoders, self.twins = make_twins(dictionaries, like, seed=self.seed)
            self.sets |= {kind: _Set.of(twins, stage.hooks) for kind, twins in self.twins.items()}
        widths = [int(stage.model.W_U.shape[-1]), *(d.d_sae for d in dictionaries)]
        self.batches = self.text.batches(self.batch_size, max(widths))
        several = self.alone and len(stage.hooks) > 1
        self.targets: dict[str, tuple[str, ...]] = {hook: (hook,) for hook in stage.hooks if several}
        self.targets[ALL] = stage.hooks
        ways = len(self.targets) * (len(self.sets) + 2)
        passes = ways + 2 + (2 if self.twins else 0)
        self.bar = tqdm(
            total=passes * len(self.batches), desc="evaluating", unit="run", disable=self.progress is False,
            leave=False, delay=0 if self.progress else 2,
        )  # fmt: skip

    def _clean(self) -> Iterator[tuple[Batch, CleanRun]]:
        for batch in self.text.take(self.batches):
            run = self.stage.clean(batch.tokens)
            self.bar.update()
            yield batch, run

    # -------------------------------------------------------------------------------------------- before any change

    def survey(self) -> None:
        """Judge the dictionaries on the model's own activations, and take the outputs' means."""
        for batch, run in self._clean():
            _require_finite("the model's logits on the given text", run.logits)
            self.sets["own"].add(run, batch.counted)
            for hook, moments in self.moments.items():
                moments.add(_at(run.outputs[hook], batch.counted))
            for d, encoder in self._pairs():
                encoder.observe(_at(run.inputs[d.site], batch.counted))
        for hook, fit in self.sets["own"].fits.items():
            writers = [str(d) for d in self.stage.dictionaries if hook in d.hooks_out]
            _require_finite(f"the output of {' and '.join(writers)}", torch.tensor(fit.error))

    def fit(self) -> None:
        """Choose the twins' thresholds, then their scales."""
        if not self.twins:
            return
        for encoder in self.encoders:
            encoder.standardise()
        for batch, run in self._clean():
            for d, encoder in self._pairs():
                encoder.count(_at(run.inputs[d.site], batch.counted))
        for d, encoder in self._pairs():
            encoder.choose(int(self.sets["own"].firing[d.site].fired.sum()))
        sums = {(kind, hook): ScaleSums() for kind in self.twins for hook in self.stage.hooks}
        for batch, run in self._clean():
            for kind, twins in self.twins.items():
                for hook, (r, target) in _unscaled(twins, run, batch.counted).items():
                    sums[kind, hook].add(r, target)
        for (kind, hook), fit in sums.items():
            scale, constant = fit.solve()
            here = [(twin, twin.hooks_out.index(hook)) for twin in self.twins[kind] if hook in twin.hooks_out]
            for i, (twin, o) in enumerate(here):
                twin.scale[o] = scale
                twin.b_dec[o] = constant.to(twin.b_dec) if i == 0 else 0.0

    def _pairs(self) -> Iterator[tuple[Dictionary, Encoder]]:
        yield from zip(self.stage.dictionaries, self.encoders, strict=True) if self.encoders else ()

    # -------------------------------------------------------------------------------------------------- the changes

    def run(self) -> None:
        """Change the model in every way, and sum losses by row."""
        ways = [(way, target) for target in self.targets for way in (*self.sets, "zero", "mean")]
        names = ["n", "clean", *(f"{what} {way} {target}" for what in ("loss", "kl") for way, target in ways)]
        self.losses = RowSums(names)
        means = {hook: moments.mean for hook, moments in self.moments.items()}
        zeros = {hook: torch.zeros_like(mean) for hook, mean in means.items()}
        for batch, run in self._clean():
            for kind in self.twins:
                self.sets[kind].add(run, batch.counted)
            predicting = batch.predicting
            clean = log_probabilities(run.logits, predicting)
            loss = cross_entropies(clean, batch.tokens, predicting)
            added, kl = [], []
            for way, target in ways:
                hooks = self.targets[target]
                if way in self.sets:
                    logits = self.stage.replaced(batch.tokens, self.sets[way].dictionaries, hooks, batch.kept)
                else:
                    values = means if way == "mean" else zeros
                    logits = self.stage.ablated(batch.tokens, {hook: values[hook] for hook in hooks}, batch.kept)
                self.bar.update()
                _require_finite(f"the model's logits with {_named(way, target)}", logits)
                changed = log_probabilities(logits, predicting)
                added.append(cross_entropies(changed, batch.tokens, predicting) - loss)
                kl.append(divergences(clean, changed))
            count = predicting.sum(1).to("cpu", torch.float64)
            self.losses.add(torch.stack([count, loss, *added, *kl], 1))

    # --------------------------------------------------------------------------------------------------- the result

    def result(self, settings: dict[str, Any]) -> Evaluation:
        """Return the record."""
        kinds = tuple(self.twins)
        outputs = []
        for hook in self.stage.hooks:
            writers = [d for d in self.stage.dictionaries if hook in d.hooks_out]
            first = next((d for d in writers if d.site == hook), None)
            outputs.append(
                OutputFigures(
                    hook=hook,
                    layer=self.stage.layers[hook],
                    reads=tuple(d.hook_in for d in writers),
                    kind=first.kind if first else "",
                    n_features=first.d_sae if first else 0,
                    own=self._quality("own", hook),
                    baselines={kind: self._quality(kind, hook) for kind in kinds},
                    zero=self._figures("zero", hook),
                    mean=self._figures("mean", hook),
                )
            )
        whole = {way: self._ratios(way, ALL) for way in ("own", "zero", "mean", *kinds)}
        cfg = self.stage.model.cfg
        return Evaluation(
            model=str(getattr(cfg, "model_name", None) or type(self.stage.model).__name__),
            n_rows=len(self.text.tokens),
            n_tokens=self.text.n_tokens,
            n_predictions=self.text.n_predictions,
            loss=self.losses.ratio({"clean": 1.0}, {"n": 1.0}),
            outputs=tuple(outputs),
            replaced=whole["own"],
            zero=whole["zero"],
            mean=whole["mean"],
            baselines={kind: whole[kind] for kind in kinds},
            settings=settings,
        )

    def _quality(self, name: str, hook: str) -> Quality:
        found, spread = self.sets[name], self.moments[hook].spread
        fit = found.fits[hook]
        constant = spread <= 1e-12 * self.moments[hook].square
        return Quality(
            **_sparsity(found.firing.get(hook)),
            explained_variance=NAN if constant else 1.0 - fit.error / spread,
            mse=fit.error / fit.n,
            cosine=fit.cosine / fit.n,
            alone=self._figures(name, hook),
        )

    def _figures(self, way: str, hook: str) -> RunFigures | None:
        if not self.alone:
            return None
        return self._ratios(way, hook if hook in self.targets else ALL)

    def _ratios(self, way: str, target: str) -> RunFigures:
        added, ratio, n = f"loss {way} {target}", self.losses.ratio, {"n": 1.0}
        zero, mean = f"loss zero {target}", f"loss mean {target}"
        return RunFigures(
            loss=ratio({"clean": 1.0, added: 1.0}, n),
            added=ratio({added: 1.0}, n),
            kl=ratio({f"kl {way} {target}": 1.0}, n),
            recovered_zero=ratio(_less(zero, added), {zero: 1.0}),
            recovered_mean=ratio(_less(mean, added), {mean: 1.0}),
        )


def _at(values: Float[Tensor, "batch pos width"], counted: Bool[Tensor, "batch pos"]) -> Float[Tensor, "n width"]:
    """Return what stands at the positions that count; a model may lie on several devices."""
    return values[counted.to(values.device)]


def _less(name: str, other: str) -> dict[str, float]:
    return {name: 1.0, other: -1.0} if name != other else {name: 0.0}


def _unscaled(
    twins: Sequence[Twin], run: CleanRun, counted: Bool[Tensor, "batch pos"]
) -> dict[str, tuple[Float[Tensor, "n _width"], Float[Tensor, "n _width"]]]:
    """Return, by hook, what the twins give before scaling, and what they should reconstruct, less skip paths."""
    made: dict[str, Tensor] = {}
    wanted = {hook: _at(value, counted) for hook, value in run.outputs.items()}
    for twin in twins:
        x = _at(run.inputs[twin.site], counted)
        outputs = twin.unscaled(twin.activate(twin.pre_acts(x), x))
        for o, hook in enumerate(twin.hooks_out):
            made[hook] = made[hook] + outputs[:, o] if hook in made else outputs[:, o]
        if twin.has_skip:
            first = twin.hooks_out[0]
            wanted[first] = wanted[first].to(x) - twin.skip(x)
    return {hook: (r, wanted[hook]) for hook, r in made.items()}


def _sparsity(firing: FiringSums | None) -> dict[str, Any]:
    if firing is None:
        return {"l0": NAN, "dead": NAN, "dense": NAN, "density": (NAN,) * len(_QUANTILES)}
    share = firing.fired.double() / firing.n
    live = share[share > 0]
    quantiles = torch.quantile(live, torch.tensor(_QUANTILES, dtype=torch.float64)) if len(live) else share[:0]
    return {
        "l0": float(share.sum()),
        "dead": 1.0 - len(live) / len(share),
        "dense": float((share > _DENSE).double().mean()),
        "density": tuple(quantiles.tolist()) or (NAN,) * len(_QUANTILES),
    }


def _named(way: str, target: str) -> str:
    what = {"own": "replaced by dictionaries", "zero": "ablated by zeros", "mean": "ablated by means"}
    where = "all outputs" if target == ALL else target
    return f"{where} {what.get(way, f'replaced by {way} dictionaries')}"


def _require_finite(what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ConsistencyError(
            f"{what} holds NaN or infinite values, so nothing can be measured; look for NaN in weights, or use a wider "
            "dtype"
        )

"""Contrast graphs: what made the difference between two prompts of equal length.

A contrast graph is the graph of the secant model (:mod:`circuit_lens.attribution.secant`) of a prompt's run c and a
baseline's run b: every row explains h(c) - h(b), every edge is a change handed on, every source a change. What is
exact, up to rounding:

1. Rows conserve. Row sum + target bias = h(c) - h(b) for every feature, token, direction and metric, where h is the
   value of each run's own frozen model, which is the model's. The target bias holds only what the target itself makes
   of the two runs: the change of its read norm, and for a metric that is not linear its remainder (below).
2. The secant model is one affine model for both runs: with every source's change it gives the prompt's values, with
   none of them the baseline's. With features linear in between (slope Δa / Δh), the total effects of all leaves
   (tokens, errors, changes of attention and norms, patches), and of the target biases, sum to the target's change: see
   :func:`circuit_lens.graph.effects.chain_gain`. In a sum of total effects nothing is left over, so "how much of the
   difference comes from this word" has an answer that adds up, given which patterns and norms changed.
3. Prompt and baseline change places: every edge, activation, bias and value changes its sign (``targets=None`` chooses
   other tokens then, so name them).

A metric that is not linear in the logits is taken by its mean gradient on the straight line between the two runs'
logits, which hands on the whole of its change (integrated gradients: Sundararajan et al. 2017, "completeness"), by a
quadrature of 16 points; what that leaves of m(c) - m(b) belongs to the target bias and is named in
``manifest["remainders"]``, one per target. A soft-cap is taken by its secant.

What it does not say: attention patterns and norms change because of the same tokens; here their change is a cause of
its own ("attention change", "norm change"), not traced further; as biases they count under the convention "conserving"
only. A feature that a hair's breadth switches on has a large slope Δa / Δh, and paths through it large weights that
cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.attribution.secant import Run, rows_by_definition, secant_model, secant_sources
from circuit_lens.attribution.settings import Settings
from circuit_lens.attribution.sources import ActiveFeatures
from circuit_lens.attribution.targets import FINAL_HOOK, Metric, Resolved, Resolver, Targets, linearise, metric_name
from circuit_lens.dictionaries.binding import reads_where_it_writes
from circuit_lens.errors import ConsistencyError, DictionaryError, TargetError, TokensError
from circuit_lens.graph.nodes import Feature
from circuit_lens.protocols import Dictionary, HookedModel
from circuit_lens.running import plain_tensors, token_strings

_POINTS = 16  # of the quadrature along which a metric's gradient is averaged


def check_settings(settings: Settings) -> None:
    """Raise ValueError for settings whose maps have no secant here."""
    for name in ("norms", "attention"):
        value = getattr(settings, name)
        if value != "frozen":
            raise ValueError(
                f"{name}={value!r} cannot be used with baseline=: a contrast takes the mean of the two runs' constant "
                f"patterns and denominators; leave it at {name}='frozen'"
            )


def check_dictionaries(dictionaries: Iterable[Dictionary]) -> None:
    """Raise DictionaryError for dictionaries that have no secant here: autoencoders, and neurons with a gate."""
    for d in dictionaries:
        if reads_where_it_writes(d):
            reason = "an autoencoder ends the paths through its hook, which the mean of two runs does not follow"
        elif d.tangent or getattr(d, "gated", False):
            reason = "a gate has another value on either run, so that its neuron is not one linear row between them"
        else:
            continue
        raise DictionaryError(f"{d} cannot be used with baseline=: {reason}. Make a graph of each prompt instead")


def check_pair(model: HookedModel, tokens: Tensor, baseline: Tensor, *, same_run: bool) -> None:
    """Raise TokensError unless two prompts can be contrasted.

    Args:
        model: For the tokens' strings.
        tokens, baseline: Token ids ``[n_pos]``.
        same_run: Nothing but the tokens can make the runs differ (no caches, no hooks).
    """
    if len(tokens) != len(baseline):
        mine, its = token_strings(model, tokens), token_strings(model, baseline)
        raise TokensError(
            f"the prompt has {len(tokens)} tokens and the baseline {len(baseline)}; a contrast compares position by "
            f"position and needs as many in both. Choose words of equally many tokens: {list(mine)} against {list(its)}"
        )
    if same_run and torch.equal(tokens, baseline):
        raise TokensError(
            "the baseline is the prompt itself, so there is no difference to explain; give other tokens, or a cache or "
            "hooks of another run on these"
        )


class ContrastModel(LocalReplacementModel):
    """The secant model of two runs: rows, head loadings and graphs of their difference.

    Made by ``ReplacementModel.local(prompt, baseline=...)``. Everything a :class:`LocalReplacementModel` gives is here
    a difference, the prompt's minus the baseline's.

    Args:
        clean: The prompt's local replacement model.
        baseline: The baseline's, of the same model, dictionaries and settings.

    Raises:
        ConsistencyError: Attention is not known as linear maps here, so that two runs have no mean.
    """

    def __init__(self, clean: LocalReplacementModel, baseline: LocalReplacementModel) -> None:
        check_dictionaries(clean.binding.dictionaries)
        for local in (clean, baseline):
            if not local.frozen.attention:
                raise ConsistencyError(
                    f"a contrast needs attention as linear maps, which this model's is not ({local.engine_note}); "
                    "make a graph of each prompt instead"
                )
        self.clean, self.baseline = clean, baseline
        self.binding, self.model, self.values = clean.binding, clean.model, clean.values
        self.settings, self.prompt, self.label = clean.settings, clean.prompt, clean.label
        self.tokens, self.token_strings = clean.tokens, clean.token_strings
        self.user_hooks = list(dict.fromkeys([*clean.user_hooks, *baseline.user_hooks]))
        self.engine = "reference" if clean.settings.engine == "reference" else "fast"
        self.engine_note = "asked for" if self.engine == "reference" else ""
        with plain_tensors():
            self.frozen = secant_model(clean.frozen, baseline.frozen)
            runs = Run(clean.frozen, clean.sources), Run(baseline.frozen, baseline.sources)
            self.sources = secant_sources(self.frozen, *runs)
        self.checks: dict[str, Any] = {"prompt": clean.checks, "baseline": baseline.checks}

    def logits(self) -> Float[Tensor, "n_pos d_vocab"]:
        """Return the model's own logits at the prompt, soft-cap included."""
        return self.clean.logits()

    def row_blocks(
        self, targets: Targets, *, batch_size: int | None = None, engine: str | None = None
    ) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
        """Yield rows over all columns, by the sweep or by the definition (``engine="reference"``)."""
        if (engine or self.engine) == "fast":
            yield from super().row_blocks(targets, batch_size=batch_size, engine="fast")
        elif len(targets):
            with plain_tensors():
                rows = rows_by_definition(self.frozen, self.sources, self.clean.frozen, self.baseline.frozen, targets)
            yield list(range(len(targets))), rows

    def _encoder_bias(self, f: ActiveFeatures, which: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The encoder's bias is in both runs and cancels."""
        return f.pre_act.new_zeros(len(which))

    def _resolver(self) -> Resolver:
        runs = self.clean.frozen, self.baseline.frozen
        return ContrastResolver(self.model, *runs, self.frozen, self.position, self._resolve_feature)

    def manifest(self) -> dict[str, Any]:
        """Return what identifies this contrast: as for one prompt, and the baseline's tokens and source."""
        other = self.baseline
        return super().manifest() | {
            "baseline": {
                "tokens": other.tokens.tolist(),
                "token_strings": list(other.token_strings),
                "prompt": other.prompt,
                "source": "cache" if other.values.from_cache else "prompt",
            },
        }

    def __repr__(self) -> str:
        return f"ContrastModel({self.clean!r} minus {self.baseline!r}, {self.n_active} features that change)"


class ContrastResolver(Resolver):
    """Turns what a user asked for into read-outs of the secant model; chooses tokens and weights by the prompt's run.

    Args:
        model, position, feature: See :class:`Resolver`.
        clean, baseline: The two frozen runs.
        secant: Their secant.
    """

    def __init__(
        self,
        model: HookedModel,
        clean: FrozenModel,
        baseline: FrozenModel,
        secant: FrozenModel,
        position: Callable[[int | str], int],
        feature: Callable[[Feature, int], Resolved],
    ) -> None:
        super().__init__(model, clean, position, feature)
        self.baseline, self.secant = baseline, secant

    @cached_property
    def _output_change(self) -> Float[Tensor, "n_pos d_model"]:
        """Change of the last norm's output."""
        clean, baseline = self.frozen, self.baseline
        return clean.ln_final.apply_output(clean.final) - baseline.ln_final.apply_output(baseline.final)

    @cached_property
    def _output_linear(self) -> Float[Tensor, "n_pos d_model"]:
        """The part of it that the secant's last norm hands on."""
        return self.secant.ln_final.apply_output(self.secant.final)

    def _linear(self, name: str, index: int, pos: int, vector: Tensor, bias: float, weight: float) -> Resolved:
        """A linear read-out: constants cancel, what is left to the target is the change of the last norm."""
        own = float((self._output_change - self._output_linear)[pos] @ vector)
        value = float(self._output_linear[pos] @ vector) + own
        return Resolved(name, index, FINAL_HOOK, self.frozen.n_layers, pos, vector, None, value, own, weight)

    def _metric(self, metric: Metric, n_virtual: int) -> Resolved:
        """Linearise a scalar of the logits by its mean gradient between the two runs, a soft-cap by its secant."""
        name, dtype = metric_name(metric), self.frozen.final.dtype
        runs = self.frozen.capped_logits(), self.baseline.capped_logits()
        gradient = mean_gradient(metric, *runs)
        value = _value(metric, runs[0]) - _value(metric, runs[1])
        remainder = value - float((gradient * (runs[0] - runs[1])).sum())
        vectors = (gradient * self._cap_slope(*runs)) @ self.W_U.to(dtype).T
        used = gradient.abs().sum(-1).nonzero()[:, 0].tolist()
        if not used:
            raise TargetError(
                f"the metric {name} does not depend on the logits between the two runs: its gradient is zero there, so "
                "no edge explains its change; give a metric with a slope, such as a logit difference"
            )
        pos = used[-1]
        spread = vectors if len(used) > 1 else None
        own = value - float((self._output_linear * vectors).sum())
        return Resolved(
            name, self.d_vocab + n_virtual, FINAL_HOOK, self.frozen.n_layers, pos, vectors[pos], spread, value, own,
            1.0, remainder,
        )  # fmt: skip

    def _cap_slope(
        self, clean: Float[Tensor, "n_pos d_vocab"], baseline: Float[Tensor, "n_pos d_vocab"]
    ) -> Float[Tensor, "n_pos d_vocab"] | float:
        """Change of each capped logit per change of the uncapped one; the derivative between them where they agree."""
        cap = self.frozen.soft_cap
        if cap is None:
            return 1.0
        change = self.frozen.logits - self.baseline.logits
        flat = change.abs() < cap * torch.finfo(change.dtype).eps ** 0.5
        middle = torch.tanh((self.frozen.logits + self.baseline.logits) / (2 * cap))
        return torch.where(flat, 1 - middle**2, (clean - baseline) / torch.where(flat, 1, change))


def mean_gradient(
    metric: Metric, first: Float[Tensor, "n_pos d_vocab"], second: Float[Tensor, "n_pos d_vocab"]
) -> Float[Tensor, "n_pos d_vocab"]:
    """Return the mean gradient of a metric on the straight line between two runs' logits, by Gauss' quadrature.

    Raises:
        TargetError: See :func:`linearise`.
    """
    total = torch.zeros_like(first)
    for place, weight in zip(*np.polynomial.legendre.leggauss(_POINTS), strict=True):
        total += float(weight) / 2 * linearise(metric, (first + second + float(place) * (first - second)) / 2)[1]
    return total


def _value(metric: Metric, logits: Float[Tensor, "n_pos d_vocab"]) -> float:
    """Return a metric at one run; its gradient there does not matter."""
    with torch.no_grad():
        value = float(metric(logits.clone()[None]))
    if value - value != 0:
        raise TargetError(f"the metric {metric_name(metric)} is {value} at one of the two runs")
    return value

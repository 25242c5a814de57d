"""How well a set of dictionaries, per-layer or cross-layer, stands in for a model's MLPs on text.

The figures of Ameisen et al. (2025), Circuit Tracing, section on evaluating cross-layer transcoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.protocols import Dictionary

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


@dataclass(frozen=True, slots=True)
class LayerReplacement:
    """One layer on held-out text, every dictionary reading the model's own activations.

    Attributes:
        hook_out: The MLP output that is rebuilt.
        explained_variance: 1 - squared error / squared distance from the mean.
        l0: Mean active features per token of the dictionary that reads this layer.
        dead: Share of its features that are active on no token.
    """

    hook_out: str
    explained_variance: float
    l0: float
    dead: float


@dataclass(frozen=True, slots=True)
class ReplacementFigures:
    """A set of dictionaries on held-out text; losses are mean cross-entropies in nats over ``n_tokens`` targets.

    Attributes:
        n_tokens: Tokens that every figure is computed on.
        layers: In the order of the layers.
        loss: The model's own.
        loss_replaced: Every MLP replaced at once, each dictionary reading what the replacements before it made.
        loss_zeroed: Every MLP's output zero.
    """

    n_tokens: int
    layers: tuple[LayerReplacement, ...]
    loss: float
    loss_replaced: float
    loss_zeroed: float

    @property
    def added_loss(self) -> float:
        """Nats that replacing every MLP costs."""
        return self.loss_replaced - self.loss

    @property
    def dead(self) -> float:
        """Mean dead share of the layers."""
        return sum(layer.dead for layer in self.layers) / len(self.layers)


class _Reading:
    """Dictionaries along one forward pass: what they read so far, and what it adds up to at each hook."""

    def __init__(self, dictionaries: Sequence[Dictionary]) -> None:
        self.dictionaries = dictionaries
        self.sums: dict[str, Tensor] = {}
        self.acts: dict[str, Tensor] = {}

    def readers(self) -> list[tuple[str, Callable[..., None]]]:
        """Return the hooks that read."""
        return [(d.hook_in, self._reader(d)) for d in self.dictionaries]

    def _reader(self, d: Dictionary) -> Callable[..., None]:
        def read(x: Tensor, hook: Any) -> None:
            acts = d.activate(d.pre_acts(x), x)
            self.acts[d.site] = acts
            written = d.decode(acts)
            for number, name in enumerate(d.hooks_out):
                part = written[..., number, :] + d.skip(x) if number == 0 else written[..., number, :]
                # The dictionary of a hook's own layer is the last to add to it.
                self.sums[name] = self.sums[name] + part if name in self.sums else part

        return read


@torch.no_grad()
def replacement_figures(
    model: HookedTransformer,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, "row pos"],
    keep: Bool[Tensor, "row pos"],
    *,
    batch: int = 64,
) -> ReplacementFigures:
    """Measure dictionaries on text that they were not trained on.

    Args:
        model: The model; it comes back untouched.
        dictionaries: One that reads each layer: transcoders (``circuit_lens.dictionaries.adapt``) or the
            ``dictionaries`` of a cross-layer transcoder.
        tokens: Text.
        keep: Tokens that count. At the others, and so at the beginning of sequence, the MLPs stay.
        batch: Rows computed at once.

    Raises:
        ValueError: No token to predict.
    """
    n_targets = int(keep[:, 1:].sum())
    if n_targets == 0:
        raise ValueError("keep leaves no token to predict; it must be True at some position after the first of a row")
    hooks = [d.hooks_out[0] for d in dictionaries]
    spread = {hook: _Spread() for hook in hooks}
    active = {d.site: torch.zeros(d.d_sae, dtype=torch.long) for d in dictionaries}
    losses = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(tokens), batch):
        rows, mask = tokens[start : start + batch], keep[start : start + batch]
        for number, (standing, zero) in enumerate(((False, False), (True, False), (True, True))):
            reading = _Reading([] if zero else dictionaries)
            writers = []
            for hook in hooks:
                writers.append((hook, _writer(reading, hook, mask, None if standing else spread[hook])))
            losses[number] += _loss(model, rows, mask, [*reading.readers(), *writers])
            if not standing:
                for site, acts in reading.acts.items():
                    active[site] += (acts[mask] > 0).sum(0).cpu()
    count = int(keep.sum())
    layers = [
        LayerReplacement(
            d.hooks_out[0],
            spread[d.hooks_out[0]].explained(),
            float(active[d.site].sum() / count),
            float((active[d.site] == 0).float().mean()),
        )
        for d in dictionaries
    ]
    return ReplacementFigures(n_targets, tuple(layers), *(losses / n_targets).tolist())


class _Spread:
    """The squared error, and the sums from which the squared distance from the mean follows, in float64."""

    def __init__(self) -> None:
        self.missed = self.square = torch.zeros((), dtype=torch.float64)
        self.total: Tensor | None = None
        self.count = 0

    def add(self, real: Float[Tensor, "n d_out"], rebuilt: Float[Tensor, "n d_out"]) -> None:
        real = real.double()
        self.missed = self.missed + (real - rebuilt).pow(2).sum().cpu()
        self.square = self.square + real.pow(2).sum().cpu()
        self.total = real.sum(0).cpu() + (0 if self.total is None else self.total)
        self.count += len(real)

    def explained(self) -> float:
        assert self.total is not None
        return float(1 - self.missed / (self.square - self.total.pow(2).sum() / self.count))


def _writer(
    reading: _Reading, hook_out: str, mask: Bool[Tensor, "row pos"], spread: _Spread | None
) -> Callable[..., Tensor | None]:
    """Return a hook that replaces an MLP's output where ``mask`` is True, or only compares it."""

    def write(value: Tensor, hook: Any) -> Tensor | None:
        rebuilt = reading.sums.get(hook_out, torch.zeros_like(value))
        if spread is not None:
            spread.add(value[mask], rebuilt[mask])
            return None
        return torch.where(mask[..., None], rebuilt, value)

    return write


def _loss(
    model: HookedTransformer,
    rows: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"],
    hooks: list[tuple[str, Callable[..., Any]]],
) -> float:
    """Return the summed cross-entropy of the tokens that count."""
    logits = model.run_with_hooks(rows, fwd_hooks=list(hooks))[:, :-1]
    logits = logits[mask[:, 1:]]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return float(F.cross_entropy(logits, rows[:, 1:][mask[:, 1:]], reduction="sum"))

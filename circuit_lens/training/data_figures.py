"""How well dictionaries do on text that they were not trained on: loss, L0, explained variance, dead features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.errors import DictionaryError
from circuit_lens.protocols import Dictionary

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True, slots=True)
class DictionaryFit:
    """How well a dictionary does on text.

    Attributes:
        n_tokens: Tokens that all figures are of.
        loss: Mean over tokens of |error|².
        explained_variance: 1 - sum |error|² / sum |target - mean|²; NaN where nothing varies.
        l0: Active features per token.
        dead: Share of features that are active on none of the tokens.
    """

    n_tokens: int
    loss: float
    explained_variance: float
    l0: float
    dead: float


class _Sums:
    """What one target's figures are made of, in float64."""

    def __init__(self) -> None:
        self.n, self.error, self.square, self.active = 0, 0.0, 0.0, 0
        self.total: Tensor | float = 0.0
        self.ever: Tensor | None = None

    def see(self, acts: Tensor) -> None:
        on = acts > 0
        self.active += int(on.sum())
        self.ever = on.any(0) if self.ever is None else self.ever | on.any(0)

    def compare(self, made: Tensor, target: Tensor) -> None:
        self.n += len(target)
        self.error += float((made - target).double().square().sum())
        self.square += float(target.double().square().sum())
        self.total = self.total + target.double().sum(0)

    def fit(self) -> DictionaryFit:
        if self.ever is None:
            raise DictionaryError("there are no tokens to measure a dictionary on; give text")
        variance = self.square - float(torch.as_tensor(self.total).square().sum()) / self.n
        explained = 1 - self.error / variance if variance > 0 else float("nan")
        dead = float((~self.ever).float().mean())
        return DictionaryFit(self.n, self.error / self.n, explained, self.active / self.n, dead)


@torch.no_grad()
def measure_fit(
    dictionary: SAE[Any], pairs: Iterator[tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]]
) -> DictionaryFit:
    """Return the figures of a SAELens module on (input, target) pairs; a skip path is part of what it makes.

    Raises:
        DictionaryError: No tokens.
    """
    sums = _Sums()
    for x, y in pairs:
        sums.see(dictionary.encode(x))
        sums.compare(dictionary(x), y)
    return sums.fit()


@torch.no_grad()
def measure_cross_layer(
    dictionaries: Sequence[Dictionary],
    pairs: Iterable[tuple[Float[Tensor, "token n_layers d_in"], Float[Tensor, "token n_layers d_out"]]],
) -> list[DictionaryFit]:
    """Return the figures of the layers of a cross-layer transcoder, one Dictionary for each, in order.

    A layer's features are those that read it; its target is its MLP output, which the features of it and of all earlier
    layers make together.

    Raises:
        DictionaryError: No tokens.
    """
    sums = [_Sums() for _ in dictionaries]
    for x, y in pairs:
        made = torch.zeros_like(y)
        for layer, dictionary in enumerate(dictionaries):
            read = x[:, layer]
            acts = dictionary.activate(dictionary.pre_acts(read), read)
            sums[layer].see(acts)
            written = dictionary.decode(acts)
            written[:, 0] += dictionary.skip(read)
            for i, out in enumerate(dictionary.out_layers):
                made[:, out] += written[:, i]
        for layer, one in enumerate(sums):
            one.compare(made[:, layer], y[:, layer])
    return [one.fit() for one in sums]

"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, for the matrices inside the blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Coefficients of the quintic iteration, from the same source.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Float[Tensor, "n rows columns"], steps: int = 5) -> Float[Tensor, "n rows columns"]:
    """An approximation of U V^T for every matrix U S V^T, by Newton-Schulz iterations in bfloat16.

    The singular values of the result lie between about 0.7 and 1.2.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = wide.bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    result = x.to(matrices.dtype)
    return result if wide is matrices else result.transpose(1, 2)


class Muon:
    """Nesterov momentum, orthogonalised per matrix, decoupled weight decay.

    A parameter whose rows are ``k`` stacked square matrices (fused query, key, value) is treated as ``k`` matrices.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, weight_decay: float, momentum: float = 0.95) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the learning rate ``lr`` (the size of an update of spectral norm 1)."""
        updates: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, (parameter, buffer) in enumerate(zip(self.parameters, self.buffers, strict=True)):
            if parameter.grad is None:
                raise RuntimeError("Muon.step: a parameter has no gradient; call backward() on the loss first")
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum)
            fused = update.shape[0] == 3 * update.shape[1]
            for part in update.chunk(3, 0) if fused else (update,):
                shape = (part.shape[0], part.shape[1])
                updates[shape].append(part)
                places[shape].append(number)
        finished: dict[int, list[Tensor]] = defaultdict(list)
        for shape, parts in updates.items():
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for number, part in zip(places[shape], orthogonalise(torch.stack(parts)) * scale, strict=True):
                finished[number].append(part)
        for number, parts in finished.items():
            self.parameters[number].mul_(1 - lr * self.weight_decay).add_(torch.cat(parts, 0), alpha=-lr)

"""Training of the bundled models: fixed seeds, a schedule in steps, the same result on one machine.

Muon for the matrices inside the blocks, AdamW for the rest; float32 weights, forward and backward in bfloat16; warm-up,
constant, then linear decay. The pieces of a name of several tokens are hidden from what follows the name in most
sentences (`Rows.visible_until`), so that the name's last token has to carry who or what is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.zoo.batches import loss_positions, training_batches
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.model import ModelShape, SmallGPT
from circuit_lens.zoo.muon import Muon

# The random embedding is the same for every seed of a model, so that seeds differ in what was learned.
EMBEDDING_SEED = 7


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What determines a training run, besides the seed. Lengths in tokens, rates per step, shares between 0 and 1."""

    trained_embedding: bool = False
    steps: int = 3000
    batch: int = 48
    length: int = 64
    adam_lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.1
    warm_up: int = 100
    decay_share: float = 0.5
    hide: float = 0.85
    loss_share: float = 0.5

    def rate(self, step: int) -> float:
        """The learning rate's factor at ``step``."""
        remaining = (self.steps - step) / (self.steps * self.decay_share)
        return min(1.0, (step + 1) / self.warm_up, max(0.02, remaining))


def weighted_loss(
    model: SmallGPT,
    tokens: Int[Tensor, "row pos"],
    visible_until: Int[Tensor, "row pos"],
    chosen: Int[Tensor, " chosen"],
    weights: Float[Tensor, " chosen"],
) -> Float[Tensor, ""]:
    """Weighted mean of the cross-entropy (nats) at the chosen positions of ``tokens[:, 1:]``."""
    with torch.autocast("cpu", torch.bfloat16):
        residual = model.residual(tokens[:, :-1], visible_until[:, :-1]).flatten(0, 1)[chosen]
        logits = model.unembed(residual).float()
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten()[chosen], reduction="none")
    return (losses * weights).sum() / weights.sum()


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled where a C++ compiler is found; about twice as fast, otherwise the same."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        return function
    return torch.compile(function)


def train_model(
    corpus: Corpus,
    vocabulary: list[str],
    settings: TrainingSettings,
    *,
    seed: int,
    shape: ModelShape | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> SmallGPT:
    """A trained network.

    ``shape`` has room for the vocabulary; None: the sizes of `capitals`. ``seed`` decides the initial weights and the
    text. ``progress(step, loss)`` is called every 50 steps with a running mean of the loss in nats.
    """
    torch.manual_seed(seed)
    ids = {word: index for index, word in enumerate(vocabulary)}
    model = SmallGPT(
        shape or ModelShape(len(vocabulary)),
        trained_embedding=settings.trained_embedding,
        embedding_seed=EMBEDDING_SEED,
    )
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    muon = Muon(matrices, weight_decay=settings.weight_decay)
    loss_of = _compiled(weighted_loss)
    generator = torch.Generator().manual_seed(seed)
    n_positions = int(settings.loss_share * settings.batch * settings.length)
    batches = training_batches(
        corpus, ids, batch=settings.batch, length=settings.length, seed=1000 + seed, hide=settings.hide
    )
    mean_loss = 0.0
    for step in range(settings.steps):
        rows = next(batches)
        chosen, weights = loss_positions(rows, n_positions, generator)
        loss = loss_of(model, rows.tokens, rows.visible_until, chosen, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, 1.0)
        for group in adam.param_groups:
            group["lr"] = settings.adam_lr * settings.rate(step)
        adam.step()
        muon.step(settings.muon_lr * settings.rate(step))
        model.zero_grad(set_to_none=True)
        mean_loss = loss.item() if step == 0 else 0.98 * mean_loss + 0.02 * loss.item()
        if progress is not None and (step + 1) % 50 == 0:
            progress(step + 1, mean_loss)
    return model.eval()

"""Sparse autoencoders by SAELens' own training classes and trainer.

The data are centred and divided by their root mean square for training, and the weights are scaled back, so that rates
and coefficients mean the same at every hook point. Decoder rows of the result have norm 1: an activation is the length
of what a feature writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from circuit_lens.errors import DictionaryError, nearest
from circuit_lens.training.data import ActivationStore, Moments, SingleSource
from circuit_lens.training.trainer import BatchThreshold, TrainerSettings, run_trainer, save_and_load, seeded

SaeArchitecture = Literal["batchtopk", "topk", "jumprelu", "standard"]


class ThresholdedBatchTopK(BatchTopKTrainingSAE):
    """SAELens' BatchTopK training class, which need not sort."""

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return BatchThreshold(self.cfg.k)


@dataclass(frozen=True, slots=True)
class SaeSettings(TrainerSettings):
    """What determines an SAE, besides data and seed.

    Attributes:
        architecture: "batchtopk" (Bussmann et al. 2024), saved as JumpReLU; "topk" (Gao et al. 2024); "jumprelu", with
            a quadratic penalty that leads to ``k`` active features; "standard": ReLU with an L1 penalty (Bricken et al.
            2023), where ``k`` has no meaning.
        l1: Weight of the L1 penalty on activations times decoder norms, of data with mean square 1 per coordinate.
        l0: Weight of the penalty ``2 / k * (L0 - k)²`` of "jumprelu".
        warm_up_share: Share of the steps over which these weights rise from 0.
    """

    auxiliary: float = 1 / 4
    dead_window: int = 20
    architecture: SaeArchitecture = "batchtopk"
    l1: float = 5.0
    l0: float = 0.3
    warm_up_share: float = 0.3

    def check(self) -> None:
        """Raise DictionaryError for settings that cannot train anything."""
        TrainerSettings.check(self)
        names = get_args(SaeArchitecture)
        if self.architecture not in names:
            raise DictionaryError(
                f"architecture {self.architecture!r}{nearest(self.architecture, names)}; valid are {', '.join(names)}"
            )
        if self.architecture == "topk" and self.k != int(self.k):
            raise DictionaryError(f"settings: k is {self.k:g}; with topk it is a whole number")
        if self.l1 < 0 or self.l0 < 0 or not 0 <= self.warm_up_share <= 1:
            raise DictionaryError("settings: l1 and l0 must be at least 0, and warm_up_share from 0 to 1")


def _network(d_in: int, settings: SaeSettings, metadata: SAEMetadata) -> Any:
    """A SAELens training class with random weights."""
    common: dict[str, Any] = {
        "d_in": d_in, "d_sae": settings.d_sae, "metadata": metadata, "normalize_activations": "none",
        "apply_b_dec_to_input": False,
    }  # fmt: skip
    warm_up = int(settings.warm_up_share * settings.steps)
    match settings.architecture:
        case "standard":
            config = StandardTrainingSAEConfig(**common, l1_coefficient=settings.l1, l1_warm_up_steps=warm_up)
            return StandardTrainingSAE(config)
        case "jumprelu":
            return JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    **common, jumprelu_sparsity_loss_mode="quadratic", target_l0=settings.k,
                    l0_coefficient=settings.l0, l0_warm_up_steps=warm_up, jumprelu_init_threshold=0.1,
                    jumprelu_bandwidth=0.2, pre_act_loss_coefficient=3e-6,
                )
            )  # fmt: skip
        case "topk":
            config = TopKTrainingSAEConfig(**common, k=int(settings.k), aux_loss_coefficient=settings.auxiliary)
            return TopKTrainingSAE(config)
        case "batchtopk":
            config = BatchTopKTrainingSAEConfig(**common, k=settings.k, aux_loss_coefficient=settings.auxiliary)
            return ThresholdedBatchTopK(config)


@torch.no_grad()
def _unscale(network: Any, data: Moments) -> None:
    """Turn weights for x' = (x - mean) / scale into weights for x, activations in the units of x.

    With unit decoder rows, ``acts = scale * acts'``: encoder rows stay, biases and thresholds are multiplied by scale.
    """
    network.fold_W_dec_norm()
    if hasattr(network.cfg, "rescale_acts_by_decoder_norm"):
        network.cfg.rescale_acts_by_decoder_norm = False
    network.b_enc.copy_(network.b_enc * data.scale - data.mean @ network.W_enc)
    network.b_dec.copy_(network.b_dec * data.scale + data.mean)
    for name in ("threshold", "topk_threshold"):
        if hasattr(network, name):
            getattr(network, name).mul_(data.scale)


@torch.inference_mode(False)
@torch.enable_grad()
def train_sae(
    source: Float[Tensor, "token d_in"] | ActivationStore | SingleSource,
    *,
    hook: str,
    settings: SaeSettings | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    log: Path | str | None = None,
    wandb: str | None = None,
) -> SAE[Any]:
    """A SAELens SAE of the activations at ``hook``, trained by SAELens' ``SAETrainer``.

    The global random state is used for the initial weights and restored.

    Args:
        source: One token's activation per row; or a store of activations (`collect_activations`).
        hook: What is read and written; of a store, which of its hooks.
        settings: See `SaeSettings`.
        seed: Of the initial weights and of the order of the tokens.
        metadata: Added to SAELens' own.
        folder: Keeps SAELens' files (``cfg.json``, ``sae_weights.safetensors``).
        device: Where to train; the result is on the CPU.
        progress: Show a bar; None: in a terminal.
        log: A file of JSON lines: losses, L0, explained variance, dead share.
        wandb: A project of Weights & Biases; nothing is sent without one.

    Raises:
        DictionaryError: Data or settings that cannot train; it is a ``ValueError``.
        ConsistencyError: NaN or infinite activations.
        HookError: A hook that the store lacks.
        GraphFileError: Files that cannot be written.
    """
    settings = settings or SaeSettings()
    settings.check()
    if isinstance(source, Tensor):
        source = ActivationStore.from_tensors({hook: source})
    data = source.single(hook) if isinstance(source, ActivationStore) else source
    data.store.steps_per_pass(settings.batch)
    moments = data.store.moments(data.hook)
    with seeded(seed):
        names = SAEMetadata(hook_name=hook, **dict(metadata or {}))
        network = _network(data.store.widths[data.hook], settings, names)
    batches = _scaled(data, settings, seed, moments)
    run_trainer(network, batches, settings, device=device, progress=progress, log=log, wandb=wandb)
    _unscale(network, moments)
    return save_and_load(network, folder)


def _scaled(source: SingleSource, settings: SaeSettings, seed: int, moments: Moments) -> Iterator[Tensor]:
    for batch in source.batches(settings.batch, seed):
        yield (batch - moments.mean) / moments.scale

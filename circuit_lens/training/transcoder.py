"""Transcoders by SAELens' `SAETrainer`, which has no training class for them; this module registers two.

A transcoder reads the input x of an MLP and predicts its output y through sparse features (Dunefsky et al. 2024); a
skip transcoder adds an affine map of x (Paulo et al. 2025). The trainer passes one tensor per batch, so a batch is the
packed ``[x | y]``; the class unpacks it. Sparsity is BatchTopK (Bussmann et al. 2024): the ``k * batch`` largest
activations of a batch stay. The running mean of the smallest that stays becomes the threshold of the JumpReLU
transcoder that is saved, which SAELens loads by `SAE.load_from_disk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, register_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
from torch import Tensor, nn
from typing_extensions import override

from circuit_lens.errors import DictionaryError
from circuit_lens.training.data import ActivationStore, Moments, PairSource
from circuit_lens.training.trainer import BatchThreshold, TrainerSettings, run_trainer, save_and_load, seeded

ARCHITECTURE, SKIP_ARCHITECTURE = "batchtopk_transcoder", "batchtopk_skip_transcoder"


@dataclass
class BatchTopKTranscoderConfig(BatchTopKTrainingSAEConfig):
    """Training configuration: ``d_in`` and ``d_out`` are the widths of x and y, ``k`` the mean number of features."""

    d_out: int = 0
    apply_b_dec_to_input: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[JumpReLUTranscoderConfig]:
        return JumpReLUTranscoderConfig


class BatchTopKTranscoder(BatchTopKTrainingSAE):
    """SAELens' BatchTopK training class on packed ``[x | y]`` batches."""

    cfg: BatchTopKTranscoderConfig  # type: ignore[assignment]

    @override
    def initialize_weights(self) -> None:
        """Random unit encoder directions, small random decoders, zero biases."""
        cfg = self.cfg
        encoder = torch.nn.functional.normalize(torch.randn(cfg.d_in, cfg.d_sae), dim=0)
        decoder = torch.nn.functional.normalize(torch.randn(cfg.d_sae, cfg.d_out), dim=-1)
        self.W_enc = nn.Parameter(encoder.to(self.device, self.dtype))
        self.W_dec = nn.Parameter((decoder * (cfg.decoder_init_norm or 0.1)).to(self.device, self.dtype))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, dtype=self.dtype, device=self.device))

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return BatchThreshold(self.cfg.k)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """The input as it is: the decoder's bias lives in the output's space, which may have another width."""
        return sae_in.to(self.dtype)

    def predict(
        self, x: Float[Tensor, "token d_in"], acts: Float[Tensor, "token d_sae"]
    ) -> Float[Tensor, "token d_out"]:
        """What the features make of y."""
        return self.decode(acts)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Squared error between the prediction and y, plus SAELens' auxiliary loss for features that stay silent."""
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], -1)
        acts, pre_acts = self.encode_with_hidden_pre(x)
        prediction = self.predict(x, acts)
        error = (prediction - y).pow(2).sum(-1).mean()
        auxiliary = self.calculate_aux_loss(replace(step_input, sae_in=y), acts, pre_acts, prediction)
        self.update_topk_threshold(acts)
        losses = {"mse_loss": error, **auxiliary}
        loss = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(
            sae_in=y, sae_out=prediction, feature_acts=acts, hidden_pre=pre_acts, loss=loss, losses=losses
        )

    @torch.no_grad()
    def unscale(self, inputs: Moments | None, outputs: Moments) -> None:
        """Turn weights for scaled data into weights for the data: x' = (x - mean) / scale, and y' likewise.

        Features keep their activations.
        """
        # Scaling the decoder would change the activations, which include its norms; so fold the norms first.
        self.fold_W_dec_norm()
        self.cfg.rescale_acts_by_decoder_norm = False
        if inputs is not None:
            self.W_enc.copy_(self.W_enc / inputs.scale)
            self.b_enc.copy_(self.b_enc - inputs.mean @ self.W_enc)
        self.W_dec.copy_(self.W_dec * outputs.scale)
        self.b_dec.copy_(self.b_dec * outputs.scale + outputs.mean)


@dataclass
class BatchTopKSkipTranscoderConfig(BatchTopKTranscoderConfig):
    """The same, of a transcoder with a skip path."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return SKIP_ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[JumpReLUSkipTranscoderConfig]:
        return JumpReLUSkipTranscoderConfig


class BatchTopKSkipTranscoder(BatchTopKTranscoder):
    """A transcoder whose prediction has ``W_skip @ x`` added; the constant of the affine skip is ``b_dec``."""

    @override
    def initialize_weights(self) -> None:
        """As without skip path, which begins at zero (Paulo et al. 2025, section 2)."""
        super().initialize_weights()
        self.W_skip = nn.Parameter(torch.zeros(self.cfg.d_out, self.cfg.d_in, dtype=self.dtype, device=self.device))

    @override
    def predict(
        self, x: Float[Tensor, "token d_in"], acts: Float[Tensor, "token d_sae"]
    ) -> Float[Tensor, "token d_out"]:
        """What the features and the skip path make of y."""
        return self.decode(acts) + x.to(self.dtype) @ self.W_skip.T

    @override
    @torch.no_grad()
    def unscale(self, inputs: Moments | None, outputs: Moments) -> None:
        """The same, with the skip path."""
        super().unscale(inputs, outputs)
        self.W_skip.copy_(self.W_skip * outputs.scale / (1.0 if inputs is None else inputs.scale))
        if inputs is not None:
            self.b_dec.copy_(self.b_dec - self.W_skip @ inputs.mean)


register_sae_training_class(ARCHITECTURE, BatchTopKTranscoder, BatchTopKTranscoderConfig)
register_sae_training_class(SKIP_ARCHITECTURE, BatchTopKSkipTranscoder, BatchTopKSkipTranscoderConfig)


@dataclass(frozen=True, slots=True)
class TranscoderSettings(TrainerSettings):
    """What determines a transcoder, besides data and seed.

    Attributes:
        scale_inputs: Train on inputs that are centred and divided by their root mean square, as outputs always are;
            for inputs that no norm has scaled. The weights are scaled back.
    """

    scale_inputs: bool = False


def _checked(inputs: Tensor, outputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raise ``DictionaryError`` for tensors that cannot train a transcoder."""
    shapes = f"{tuple(inputs.shape)} and {None if outputs is None else tuple(outputs.shape)}"
    if outputs is None or inputs.dim() != 2 or outputs.dim() != 2 or len(inputs) != len(outputs):
        raise DictionaryError(f"inputs and outputs must be [token, width] with the same tokens; got {shapes}")
    if not (inputs.isfinite().all() and outputs.isfinite().all()):
        raise DictionaryError("inputs and outputs must be finite; there are NaN or infinite activations")
    return inputs.detach().float(), outputs.detach().float()


def _packed(source: PairSource, settings: TranscoderSettings, seed: int, x: Moments | None, y: Moments) -> Iterator:
    """Batches of ``[x | y]``, scaled."""
    for inputs, outputs in source.batches(settings.batch, seed):
        scaled = inputs if x is None else (inputs - x.mean) / x.scale
        yield torch.cat([scaled, (outputs - y.mean) / y.scale], -1)


@torch.inference_mode(False)
@torch.enable_grad()
def train_transcoder(
    inputs: Float[Tensor, "token d_in"] | ActivationStore | PairSource,
    outputs: Float[Tensor, "token_out d_out"] | None = None,
    *,
    hook_in: str,
    hook_out: str,
    skip: bool = False,
    settings: TranscoderSettings | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = True,
    log: Path | str | None = None,
    wandb: str | None = None,
) -> SAE[Any]:
    """A SAELens ``JumpReLUTranscoder`` from ``hook_in`` to ``hook_out``, trained by SAELens' ``SAETrainer``.

    The outputs are centred and divided by their root mean square for training, and the result is scaled back. The
    global random state is used for the initial weights and restored.

    Args:
        inputs, outputs: One token's x and y per row (`mlp_activations` collects them); or a store of activations
            (`collect_activations`), then no outputs.
        hook_in, hook_out: What is read and written; of a store, which of its hooks.
        skip: Train a ``JumpReLUSkipTranscoder``, whose output has an affine map of x added (Paulo et al. 2025).
        settings: See `TranscoderSettings`.
        seed: Of the initial weights and of the order of the tokens.
        metadata: Added to SAELens' own.
        folder: Keeps SAELens' files (``cfg.json``, ``sae_weights.safetensors``).
        device: Where to train; the result is on the CPU.
        progress: Show a bar; None: in a terminal.
        log: A file of JSON lines: losses, L0, explained variance, dead share.
        wandb: A project of Weights & Biases; nothing is sent without one.

    Raises:
        DictionaryError: Data or settings that cannot train; it is a ``ValueError``.
        HookError: A hook that the store lacks.
        GraphFileError: Files that cannot be written.
    """
    settings = settings or TranscoderSettings()
    settings.check()
    if isinstance(inputs, Tensor):
        x, y = _checked(inputs, outputs)
        store = ActivationStore.of_pair(x, y)
        source = PairSource(store, *store.hooks)
        y_moments = Moments(y.mean(0), float((y - y.mean(0)).pow(2).mean().sqrt()) or 1.0)
    elif outputs is not None:
        raise DictionaryError("outputs= goes with a tensor of inputs; a store has both")
    else:
        source = inputs.pair(hook_in, hook_out) if isinstance(inputs, ActivationStore) else inputs
        store = source.store
        y_moments = store.moments(source.hook_out)
    store.steps_per_pass(settings.batch)
    x_moments = store.moments(source.hook_in) if settings.scale_inputs else None
    kind, config = (
        (BatchTopKSkipTranscoder, BatchTopKSkipTranscoderConfig) if skip else
        (BatchTopKTranscoder, BatchTopKTranscoderConfig)
    )  # fmt: skip
    with seeded(seed):
        transcoder = kind(
            config(
                d_in=store.widths[source.hook_in],
                d_out=store.widths[source.hook_out],
                d_sae=settings.d_sae,
                k=settings.k,
                aux_loss_coefficient=settings.auxiliary,
                normalize_activations="none",
                metadata=SAEMetadata(hook_name=hook_in, hook_name_out=hook_out, **dict(metadata or {})),
            )
        )
    batches = _packed(source, settings, seed, x_moments, y_moments)
    run_trainer(transcoder, batches, settings, device=device, progress=progress, log=log, wandb=wandb)
    transcoder.unscale(x_moments, y_moments)
    return save_and_load(transcoder, folder)

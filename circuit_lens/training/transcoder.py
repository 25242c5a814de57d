"""Transcoders by SAELens' `SAETrainer`, which has no training class for them; this module registers one.

A transcoder reads the input x of an MLP and predicts its output y through sparse features (Dunefsky et al. 2024). The
trainer passes one tensor per batch, so a batch is the packed ``[x | y]``; the class unpacks it. Sparsity is BatchTopK
(Bussmann et al. 2024): the ``k * batch`` largest activations of a batch stay. The running mean of the smallest that
stays becomes the threshold of the JumpReLU transcoder that is saved, which SAELens loads by `SAE.load_from_disk`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, SAETrainer, register_sae_training_class
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig
from torch import Tensor, nn
from typing_extensions import override

ARCHITECTURE = "batchtopk_transcoder"


class BatchThreshold(nn.Module):
    """BatchTopK by its threshold: keeps what exceeds the (k * samples + 1)-th largest entry of the batch.

    The same as SAELens' BatchTopK where no two entries are equal, without sorting.
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_acts: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        """The activations of one batch."""
        acts = pre_acts.relu()
        kept = int(self.k * acts.shape[:-1].numel())
        flat = acts.detach().flatten()
        if kept >= len(flat):
            return acts
        return acts * (acts > flat.kthvalue(len(flat) - kept).values)


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

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Squared error between the prediction and y, plus SAELens' auxiliary loss for features that stay silent."""
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], -1)
        acts, pre_acts = self.encode_with_hidden_pre(x)
        prediction = self.decode(acts)
        error = (prediction - y).pow(2).sum(-1).mean()
        auxiliary = self.calculate_aux_loss(replace(step_input, sae_in=y), acts, pre_acts, prediction)
        self.update_topk_threshold(acts)
        losses = {"mse_loss": error, **auxiliary}
        loss = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(
            sae_in=y, sae_out=prediction, feature_acts=acts, hidden_pre=pre_acts, loss=loss, losses=losses
        )


register_sae_training_class(ARCHITECTURE, BatchTopKTranscoder, BatchTopKTranscoderConfig)


@dataclass(frozen=True, slots=True)
class TranscoderSettings:
    """What determines a transcoder, besides data and seed.

    ``d_sae``: features; ``k``: mean number of active features per token; ``steps`` of ``batch`` tokens; ``lr``:
    Adam's rate, falling linearly to 5 % of it over the last ``decay_share`` of the steps; ``auxiliary``: weight of
    the loss that revives features silent for ``dead_window`` steps; ``bfloat16``: train under autocast.
    """

    d_sae: int = 640
    k: float = 11.0
    steps: int = 800
    batch: int = 1024
    lr: float = 3e-3
    decay_share: float = 0.5
    auxiliary: float = 1 / 32
    dead_window: int = 100
    bfloat16: bool = True


def _packed_batches(
    inputs: Float[Tensor, "token d_in"], outputs: Float[Tensor, "token d_out"], batch: int, seed: int
) -> Iterator[Float[Tensor, "batch d_in+d_out"]]:
    """Batches of ``[x | y]``, reshuffled in every pass over the data."""
    packed = torch.cat([inputs, outputs], -1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(packed), generator=generator)
        for start in range(0, len(packed) - batch + 1, batch):
            yield packed[order[start : start + batch]]


def _checked(
    inputs: Float[Tensor, "token d_in"], outputs: Float[Tensor, "token_out d_out"], settings: TranscoderSettings
) -> None:
    """Raise ``ValueError`` for data that cannot train a transcoder."""
    if inputs.dim() != 2 or outputs.dim() != 2 or len(inputs) != len(outputs):
        raise ValueError(
            "inputs and outputs must be [token, width] with the same tokens; "
            f"got {tuple(inputs.shape)} and {tuple(outputs.shape)}"
        )
    if len(inputs) < settings.batch:
        raise ValueError(f"{len(inputs)} tokens are fewer than one batch of {settings.batch}; give more text")
    if not (inputs.isfinite().all() and outputs.isfinite().all()):
        raise ValueError("inputs and outputs must be finite; there are NaN or infinite activations")


def train_transcoder(
    inputs: Float[Tensor, "token d_in"],
    outputs: Float[Tensor, "token_out d_out"],
    *,
    hook_in: str,
    hook_out: str,
    settings: TranscoderSettings | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    folder: Path | str | None = None,
    progress: bool = True,
) -> SAE[Any]:
    """A SAELens ``JumpReLUTranscoder`` from ``hook_in`` to ``hook_out``, trained by SAELens' ``SAETrainer``.

    ``inputs`` and ``outputs`` are one token's x and y per row (`mlp_activations` collects them). The outputs are
    centred and divided by their root mean square for training, and the result is scaled back. ``folder`` keeps
    SAELens' files (``cfg.json``, ``sae_weights.safetensors``); ``metadata`` is added to SAELens' own. The global
    random state is used for the initial weights and restored.
    """
    settings = settings or TranscoderSettings()
    _checked(inputs, outputs, settings)
    inputs, outputs = inputs.detach().float(), outputs.detach().float()
    mean, scale = outputs.mean(0), (outputs - outputs.mean(0)).pow(2).mean().sqrt()
    names = SAEMetadata(hook_name=hook_in, hook_name_out=hook_out, **dict(metadata or {}))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    transcoder = BatchTopKTranscoder(
        BatchTopKTranscoderConfig(
            d_in=inputs.shape[1],
            d_out=outputs.shape[1],
            d_sae=settings.d_sae,
            k=settings.k,
            aux_loss_coefficient=settings.auxiliary,
            normalize_activations="none",
            metadata=names,
        )
    )
    torch.set_rng_state(state)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch,
            train_batch_size_samples=settings.batch,
            lr=settings.lr,
            lr_end=settings.lr * 0.05,
            lr_warm_up_steps=min(100, settings.steps // 10),
            lr_decay_steps=int(settings.steps * settings.decay_share),
            autocast=settings.bfloat16,
            dead_feature_window=settings.dead_window,
            feature_sampling_window=max(settings.steps, 1),
        ),
        transcoder,
        _packed_batches(inputs, (outputs - mean) / scale, settings.batch, seed),
    )
    # The trainer's progress bar goes to stderr and has no switch of its own.
    with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
        trainer.fit()
    with torch.no_grad():
        # Scaling the decoder would change the activations, which include its norms; so fold the norms first.
        transcoder.fold_W_dec_norm()
        transcoder.cfg.rescale_acts_by_decoder_norm = False
        transcoder.W_dec.copy_(transcoder.W_dec * scale)
        transcoder.b_dec.copy_(transcoder.b_dec * scale + mean)
    if folder is not None:
        transcoder.save_inference_model(folder)
        return SAE.load_from_disk(str(folder), device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        transcoder.save_inference_model(temporary)
        return SAE.load_from_disk(temporary, device="cpu")

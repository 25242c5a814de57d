"""Random cross-layer transcoders for the models of `tests.builders`, and their arithmetic done plainly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from tests import builders


def weights(
    n_layers: int = 3,
    d: int = builders.D_MODEL,
    d_sae: int = 40,
    *,
    activation: str = "relu",
    skip: bool = False,
    hook_in: str = "ln2.hook_normalized",
    hook_out: str = "hook_mlp_out",
    k: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Return arguments of CrossLayerTranscoder: nothing is zero, every layer differs."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)

    layers = range(n_layers)
    made: dict[str, Any] = {
        "W_enc": [randn(d, d_sae, scale=d**-0.5) for _ in layers],
        "b_enc": [randn(d_sae, scale=0.3) for _ in layers],
        "W_dec": [randn(d_sae, n_layers - i, d, scale=0.2) for i in layers],
        "b_dec": [randn(d, scale=0.5) for _ in layers],
        "hook_in": [f"blocks.{i}.{hook_in}" for i in layers],
        "hook_out": [f"blocks.{i}.{hook_out}" for i in layers],
        "activation": activation,
    }
    if activation == "jumprelu":
        made["threshold"] = [randn(d_sae, scale=0.5).abs() for _ in layers]
    if activation == "topk":
        made["k"] = k
    if skip:
        made["W_skip"] = [randn(d, d, scale=0.3 * d**-0.5) for _ in layers]
    return made


def fitted(model: Any, *, l0: float = 6.0, **options: Any) -> dict[str, Any]:
    """Return weights whose features are active ``l0`` at a position, on average, on the model's random text."""
    dtype = next(model.parameters()).dtype
    made = weights(n_layers=model.cfg.n_layers, d=model.cfg.d_model, dtype=dtype, **options)
    hook_in = made["hook_in"][0].split(".", 2)[2]
    with torch.no_grad():
        inputs = builders._mlp_inputs_and_outputs(model, hook_in, range(model.cfg.n_layers))
    for layer, (x, _) in inputs.items():
        pre = x @ made["W_enc"][layer]
        made["W_enc"][layer] /= pre.std(0)
        pre = x @ made["W_enc"][layer]
        # Where the input is residual its mean can make a feature always active; TopK keeps ties and negatives honest.
        shift = -pre.mean(0) - (0.0 if options.get("activation") == "topk" else pre.std() * 1.1)
        made["b_enc"][layer] = made["b_enc"][layer] * 0.3 + shift
        if "threshold" in made:
            made["b_enc"][layer] += 0.7
            made["threshold"][layer] = made["threshold"][layer] + 0.3
    return made


def acts_by_hand(made: dict[str, Any], layer: int, x: Tensor) -> Tensor:
    """Return a layer's activations, ``[n_pos, d_sae]``, feature by feature."""
    pre = x.detach() @ made["W_enc"][layer] + made["b_enc"][layer]
    acts = pre.clamp_min(0)
    if made["activation"] == "jumprelu":
        acts[pre <= made["threshold"][layer]] = 0
    if made["activation"] == "topk":
        for row in acts:
            for i in row.argsort(stable=True, descending=True)[made["k"] :].tolist():
                row[i] = 0
    return acts


def outputs_by_hand(made: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
    """Return the whole transcoder's reconstruction of every MLP output, biases and skips included."""
    out = [b.expand(len(x), -1).clone() for b, x in zip(made["b_dec"], inputs, strict=True)]
    for layer, x in enumerate(inputs):
        acts = acts_by_hand(made, layer, x)
        if "W_skip" in made:
            out[layer] += x.detach() @ made["W_skip"][layer]
        for o in range(len(inputs) - layer):
            for i in range(acts.shape[1]):
                out[layer + o] += acts[:, i : i + 1] * made["W_dec"][layer][i, o]
    return out


def as_modules(made: dict[str, Any]) -> list[Any]:
    """Return what `FrozenByHand` asks of a layer's transcoder: its hook, encoder and skip."""
    return [
        SimpleNamespace(
            cfg=SimpleNamespace(metadata=SimpleNamespace(hook_name=made["hook_in"][i])),
            W_enc=made["W_enc"][i],
            b_enc=made["b_enc"][i],
            W_skip=made["W_skip"][i].T if "W_skip" in made else None,
        )
        for i in range(len(made["W_enc"]))
    ]


def clt(made: dict[str, Any]) -> CrossLayerTranscoder:
    """Return the transcoder of the weights."""
    return CrossLayerTranscoder(**made)

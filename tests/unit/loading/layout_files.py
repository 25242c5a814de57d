"""Small files in the exact layouts of published dictionaries, a cache of the hub, and a hub that is a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from circuit_lens.loading.hub import Hub, Listing

D_IN, D_SAE, D_OUT, K = 6, 10, 6, 3
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def raw(seed: int = 0, *, d_in: int = D_IN, d_sae: int = D_SAE, d_out: int = D_OUT) -> dict[str, Tensor]:
    """Random weights as this package names and lays them: W_enc [d_in, d_sae], W_skip [d_in, d_out]."""
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d_in, d_sae, generator=g),
        "W_dec": torch.randn(d_sae, d_out, generator=g),
        "b_enc": 0.1 * torch.randn(d_sae, generator=g),
        "b_dec": torch.randn(d_out, generator=g),
        "threshold": 0.2 + torch.rand(d_sae, generator=g),
        "W_skip": torch.randn(d_in, d_out, generator=g),
    }


def expected(weights: Mapping[str, Tensor], x: Tensor, activation: str, *, skip: bool, k: int = K) -> Tensor:
    """What a transcoder of these weights is, written out: loops over features, no library."""
    out = weights["b_dec"].to(x).expand(len(x), -1).clone()
    for row, y in zip(x, out, strict=True):
        pre = [
            float(row @ weights["W_enc"][:, f].to(x)) + float(weights["b_enc"][f]) for f in range(len(weights["b_enc"]))
        ]
        order = sorted(range(len(pre)), key=lambda f: -pre[f])
        for f, value in enumerate(pre):
            bar = float(weights["threshold"][f]) if activation == "jumprelu" else 0.0
            if value > bar and (activation != "topk" or f in order[:k]):
                y += value * weights["W_dec"][f].to(x)
        if skip:
            y += row @ weights["W_skip"].to(x)
    return out


def tensors_of_plt(weights: Mapping[str, Tensor], activation: str, *, skip: bool) -> dict[str, Tensor]:
    """The tensors of circuit-tracer's layer file: W_enc [d_sae, d_in], W_skip [d_out, d_in]."""
    tensors = {"W_enc": weights["W_enc"].T, **{n: weights[n] for n in ("W_dec", "b_enc", "b_dec")}}
    if activation == "jumprelu":
        tensors["activation_function.threshold"] = weights["threshold"]
    if skip:
        tensors["W_skip"] = weights["W_skip"].T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_plt(
    folder: Path, layers: Sequence[Mapping[str, Tensor]], kind: str = "relu", *, skip: bool = False, **config: Any
) -> Path:
    """Write circuit-tracer's layout of per-layer transcoders."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, weights in enumerate(layers):
        save_file(tensors_of_plt(weights, kind, skip=skip), folder / f"layer_{i}.safetensors")
    settings = {
        "model_name": "test/model", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    return folder


def write_npz(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a dictionary of Gemma Scope."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(folder / "params.npz", **{name: weights[name].numpy() for name in names})
    return folder


def write_scope_2(folder: Path, weights: Mapping[str, Tensor], layer: int, *, skip: bool, config: bool = True) -> Path:
    """Write a dictionary of Gemma Scope 2."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n.lower(): weights[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if skip:
        tensors["affine_skip_connection"] = weights["W_skip"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "params.safetensors")
    if config:
        settings = {
            "architecture": "jump_relu", "model_name": "gemma-v3-270m", "affine_connection": skip,
            "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_clt(folder: Path, n_layers: int = 3) -> dict[str, list[Tensor]]:
    """Write circuit-tracer's layout of a cross-layer transcoder; returns its tensors as they lie in the files."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, list[Tensor]] = {"W_enc": [], "b_enc": [], "b_dec": [], "W_dec": []}
    for i in range(n_layers):
        tensors["W_enc"].append(torch.randn(D_SAE, D_IN, generator=g))
        tensors["b_enc"].append(torch.randn(D_SAE, generator=g))
        tensors["b_dec"].append(torch.randn(D_OUT, generator=g))
        tensors["W_dec"].append(torch.randn(D_SAE, n_layers - i, D_OUT, generator=g))
        save_file({f"{n}_{i}": tensors[n][i] for n in ("W_enc", "b_enc", "b_dec")}, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": tensors["W_dec"][i]}, folder / f"W_dec_{i}.safetensors")
    (folder / "config.yaml").write_text(
        "model_name: test/model\nmodel_kind: cross_layer_transcoder\n"
        "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    return tensors


def cache_folder(cache: Path, repository: str) -> Path:
    """Return the folder in which a cache of huggingface_hub keeps a repository's files, made, as its main branch."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class FolderHub(Hub):
    """A hub whose repositories are folders; what is fetched is written down, and only that is in its cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.fetched, self.calls, self.fail_after = root, set(), [], None

    def folder(self, repository: str) -> Path:
        """Return the folder of a repository at its one commit."""
        return self.root / repository / "snapshots" / COMMIT

    def listing(self, repository: str, revision: str | None) -> Listing:
        """Return every file."""
        folder = self.folder(repository)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return Listing(COMMIT, dict.fromkeys(names))

    def cached(self, repository: str, revision: str | None, name: str) -> Path | None:
        """Return a file that was fetched."""
        return self.folder(repository) / name if (repository, name) in self.fetched else None

    def download(self, repository: str, revision: str | None, names: Sequence[str], *, progress: bool | None) -> None:
        """Mark files as fetched."""
        self.calls.append((repository, revision, tuple(names)))
        if self.fail_after is not None and len(self.calls) > self.fail_after:
            raise KeyboardInterrupt
        self.fetched |= {(repository, name) for name in names if (self.folder(repository) / name).is_file()}

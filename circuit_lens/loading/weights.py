"""Weights from files, checked, and the dictionaries that they make.

A file is read whole or not at all: weights that are missing, unknown, of a wrong shape, no floats, or not finite are an
error that names the file, what was found and what is valid.
"""

from __future__ import annotations

import contextlib
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuit_lens.errors import CircuitLensError, DictionaryError
from circuit_lens.loading.layouts import CLT_ARCHITECTURE, Settings
from circuit_lens.loading.topk import TopKTranscoder

_MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")
_PLT_NAMES = {name: name for name in (*_MATRICES, "W_skip", "k")} | {"activation_function.threshold": "threshold"}
_SCOPE_NAMES = {name: name for name in (*_MATRICES, "threshold")}
_SCOPE_2_NAMES = {
    "w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold",
    "affine_skip_connection": "W_skip",
}  # fmt: skip


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what readers raise at a damaged or foreign file into a DictionaryError that names it.

    Raises:
        DictionaryError: As said; errors of circuit_lens and a lack of memory pass.
    """
    try:
        yield
    except (CircuitLensError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DictionaryError(
            f"{path} cannot be read: {reason}. It is truncated, or no file of this layout; fetch it again"
        ) from error


def read_plt(path: Path) -> dict[str, Tensor]:
    """Return the weights of circuit-tracer's ``layer_<i>.safetensors``, in SAELens' names and orientation.

    On disk ``W_enc`` is ``[d_sae, d_in]``, ``W_dec`` ``[d_sae, d_out]`` and ``W_skip`` ``[d_out, d_in]``; ``k`` is one
    number where TopK is meant. Tensors on the CPU stay mapped from the file until something is computed with them.
    """
    weights = _named(path, _read_safetensors(path), _PLT_NAMES, required=_MATRICES)
    d_sae, d_in = _matrix(path, "W_enc", weights["W_enc"])
    if weights["b_enc"].shape != (d_sae,):
        raise DictionaryError(
            f"{path}: W_enc is {(d_sae, d_in)} and b_enc {tuple(weights['b_enc'].shape)}; this layout has W_enc as "
            "[features, width] and one bias for each feature"
        )
    weights["W_enc"] = weights["W_enc"].T
    return _checked(path, weights)


def read_gemma_scope(path: Path) -> dict[str, Tensor]:
    """Return the weights of Gemma Scope's ``params.npz``: ``W_enc`` is ``[d_in, d_sae]``, there are thresholds."""
    import numpy as np

    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive of arrays")
        with np.load(path, allow_pickle=False) as arrays:
            raw = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    weights = _named(path, raw, _SCOPE_NAMES, required=(*_MATRICES, "threshold"))
    return _checked(path, weights)


def read_gemma_scope_2(path: Path) -> dict[str, Tensor]:
    """Return the weights of Gemma Scope 2's ``params.safetensors``.

    ``w_enc`` is ``[d_in, d_sae]``; ``affine_skip_connection`` is ``[d_in, d_out]``, SAELens' ``W_skip`` its transpose.
    """
    weights = _named(path, _read_safetensors(path), _SCOPE_2_NAMES, required=(*_MATRICES, "threshold"))
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T
    return _checked(path, weights)


def make(
    weights: Mapping[str, Tensor],
    settings: Settings,
    *,
    label: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    source: str,
) -> Any:
    """Return the dictionary that weights and settings define: a SAELens module, or a `TopKTranscoder`.

    Args:
        weights: In SAELens' names and orientation.
        settings: Layer, hooks and activation.
        label: Of the file, for messages.
        device: Where it goes.
        dtype: None: as it is on disk.
        source: Where it comes from, kept as ``cfg.metadata.source``.

    Raises:
        DictionaryError: A layer or hook that nothing says, or an activation that contradicts the weights.
    """
    if settings.layer is None:
        raise DictionaryError(f"{label}: its layer is not known; the path has no layer_<i>, and no file says it")
    if settings.hook_in is None or settings.hook_out is None:
        raise DictionaryError(
            f"{label}: what it reads and writes is not known (no config says it); give hook_in and hook_out, such as "
            "hook_in='mlp.hook_in', hook_out='hook_mlp_out'"
        )
    hooks = {
        "hook_name": f"blocks.{settings.layer}.{settings.hook_in}",
        "hook_name_out": f"blocks.{settings.layer}.{settings.hook_out}",
    }
    tensors: dict[str, Any] = {n: t.to(device=device, dtype=dtype) for n, t in weights.items() if n != "k"}
    activation = _activation(weights, settings, label)
    if activation == "topk":
        k = settings.k if settings.k is not None else int(weights["k"])
        tensors.pop("threshold", None)
        return TopKTranscoder(**tensors, hook_name=hooks["hook_name"], hook_name_out=hooks["hook_name_out"], k=k,
                              source=source)  # fmt: skip
    return _module(tensors, hooks, source)


def _activation(weights: Mapping[str, Tensor], settings: Settings, label: str) -> str:
    """Return the activation that configuration and weights agree on.

    Raises:
        DictionaryError: They do not agree.
    """
    said, thresholds, k = settings.activation, "threshold" in weights, settings.k or weights.get("k")
    shown = "topk" if k is not None else "jumprelu" if thresholds else "relu"
    if said is None:
        said = shown
    if said == "topk" and k is None:
        raise DictionaryError(f"{label}: the activation is TopK, but neither the weights nor config.yaml say k")
    if said == "jumprelu" and not thresholds:
        raise DictionaryError(f"{label}: the activation is JumpReLU, but the weights have no threshold")
    if said == "relu" and shown != "relu":
        raise DictionaryError(
            f"{label}: config.yaml says ReLU, but the weights have {'k' if k is not None else 'a threshold'}, which is "
            f"{shown}; correct one of them"
        )
    if k is not None and settings.k is not None and "k" in weights and int(weights["k"]) != settings.k:
        raise DictionaryError(f"{label}: config.yaml says k = {settings.k}, the weights k = {int(weights['k'])}")
    return said


def _module(tensors: Mapping[str, Tensor], hooks: Mapping[str, str], source: str) -> Any:
    """Return the SAELens module of the weights, which it takes as they are."""
    from sae_lens.saes import transcoder as saelens
    from sae_lens.saes.sae import SAEMetadata

    config_class, module_class = {
        (False, False): (saelens.TranscoderConfig, saelens.Transcoder),
        (False, True): (saelens.SkipTranscoderConfig, saelens.SkipTranscoder),
        (True, False): (saelens.JumpReLUTranscoderConfig, saelens.JumpReLUTranscoder),
        (True, True): (saelens.JumpReLUSkipTranscoderConfig, saelens.JumpReLUSkipTranscoder),
    }["threshold" in tensors, "W_skip" in tensors]
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    config = config_class(
        d_in=W_enc.shape[0], d_sae=W_enc.shape[1], d_out=W_dec.shape[1], apply_b_dec_to_input=False,
        dtype=str(W_enc.dtype).removeprefix("torch."), device="meta",
        metadata=SAEMetadata(**hooks, **({"source": source} if source else {})),
    )  # fmt: skip
    module = module_class(config)  # on no device: nothing is drawn or allocated
    module.load_state_dict(dict(tensors), assign=True)
    config.device = str(W_enc.device)
    module.device = W_enc.device
    return module.eval().requires_grad_(False)


def gemma_scope_2_clt(
    paths: Sequence[Path], settings: Settings, device: torch.device | str, dtype: torch.dtype | None, lazy: bool
) -> Any:
    """Return the cross-layer transcoder of Gemma Scope 2's files, one for each layer.

    ``w_dec`` is ``[d_sae, n_layers, d_out]`` in every file; what it has for layers before its own is no part of a
    cross-layer transcoder. ``affine_skip_connection`` is ``[d_in, d_out]``.

    Raises:
        DictionaryError: Files that are damaged, foreign, or do not fit together.
    """
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    n, layers = len(paths), []
    for i, path in enumerate(paths):
        raw = _named(path, _read_safetensors(path), _SCOPE_2_NAMES, required=(*_MATRICES, "threshold"))
        if raw["W_dec"].dim() != 3 or raw["W_dec"].shape[1] != n:
            raise DictionaryError(
                f"{path}: w_dec has shape {tuple(raw['W_dec'].shape)}, with {n} layers it must be [d_sae, {n}, d_out]"
            )
        raw["W_dec"] = raw["W_dec"][:, i:]
        layers.append({name: tensor.to(device=device, dtype=dtype, copy=not lazy) for name, tensor in raw.items()})
    names = {name for layer in layers for name in layer}
    lacking = [str(path) for path, layer in zip(paths, layers, strict=True) if set(layer) != names]
    if lacking:
        raise DictionaryError(f"{', '.join(lacking[:3])}: not all of {', '.join(sorted(names))} are in every file")
    with reading(paths[0].parent):
        tensors: dict[str, Any] = {name: [layer[name] for layer in layers] for name in names}
        return CrossLayerTranscoder(
            **tensors,
            hook_in=[f"blocks.{i}.{settings.hook_in}" for i in range(n)],
            hook_out=[f"blocks.{i}.{settings.hook_out}" for i in range(n)],
            activation="jumprelu",
        )


def read_saelens(folder: Path, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """Return the dictionary of a SAELens folder, read by SAELens.

    Raises:
        DictionaryError: Files that are missing, damaged or foreign, or weights that are not finite.
    """
    from sae_lens import SAE

    _check_saelens(folder)
    with reading(folder), quiet():
        module = SAE.load_from_disk(str(folder), device=str(device), dtype=_name(dtype))
    return finite(folder, module)


def read_release(release: str, sae_id: str, folder: Path | None, *, device: Any, dtype: torch.dtype | None) -> Any:
    """Return a dictionary of SAELens' registry, read by SAELens with the corrections of its registry.

    Args:
        release, sae_id: SAELens' names.
        folder: Where its ``cfg.json`` and weights lie; None: SAELens fetches and converts them itself.
        device: Where it goes.
        dtype: None: float32.

    Raises:
        DictionaryError: Files that are missing, damaged or foreign, or weights that are not finite.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    def from_folder(
        repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
        config, state = sae_lens_disk_loader(str(folder), device, cfg_overrides)
        return config, state, None

    name = _name(dtype) or "float32"
    if folder is None:
        with quiet():
            module = SAE.from_pretrained(release, sae_id, device=str(device), dtype=name)
    else:
        _check_saelens(folder)
        with reading(folder), quiet():
            module = SAE.from_pretrained(release, sae_id, device=str(device), dtype=name, converter=from_folder)
    return finite(f"{release}:{sae_id}", module)


def finite(label: Path | str, module: Any) -> Any:
    """Return a SAELens module, in evaluation mode and without gradients, if its weights are finite.

    Raises:
        DictionaryError: They are not.
    """
    for name, tensor in module.named_parameters():
        _refuse_not_finite(label, name, tensor.detach())
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep SAELens' notices on how a model should be loaded away; we check that ourselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace repo_id")
        yield


# ---------------------------------------------------------------------------------------------------------- checks


def _check_saelens(folder: Path) -> None:
    missing = [name for name in ("cfg.json", "sae_weights.safetensors") if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DictionaryError(
            f"{folder} is no folder of SAELens: it has no {' and no '.join(missing)} (there is {there}); what "
            "SAE.save_model wrote has both"
        )
    _check_config(folder / "cfg.json")


def _check_config(path: Path) -> None:
    """Raise DictionaryError for a whole file that says nothing valid, before SAELens stumbles over it."""
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds a {type(config).__name__}; it must hold a JSON object")
    kind = config.get("architecture")
    if kind == CLT_ARCHITECTURE:
        raise DictionaryError(
            f"{path.parent} is one layer of a cross-layer transcoder, which is loaded as a whole: give the folder that "
            "holds all its layers"
        )
    for name in ("d_in", "d_sae"):
        if name in config and not (isinstance(config[name], int) and config[name] > 0):
            raise DictionaryError(f"{path}: {name} is {config[name]!r}; it must be a whole number above 0")
    if not isinstance(config.get("metadata", {}), dict):
        raise DictionaryError(f"{path}: metadata is {config['metadata']!r}; it must be a JSON object")
    from sae_lens.registry import SAE_CLASS_REGISTRY

    if kind is not None and kind not in SAE_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_CLASS_REGISTRY))
        raise DictionaryError(f"{path}: architecture is {kind!r}; SAELens knows {known}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with reading(path), safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _named(
    path: Path, raw: Mapping[str, Tensor], names: Mapping[str, str], *, required: tuple[str, ...]
) -> dict[str, Tensor]:
    unknown = sorted(set(raw) - set(names))
    found = {names[name]: tensor for name, tensor in raw.items() if name in names}
    missing = [name for name in required if name not in found]
    if unknown or missing:
        raise DictionaryError(
            f"{path} is no transcoder of this layout: it has {', '.join(sorted(raw)[:10]) or 'no weights'}"
            f"{'; missing: ' + ', '.join(missing) if missing else ''}"
            f"{'; unknown: ' + ', '.join(unknown[:6]) if unknown else ''}. Valid are {', '.join(names)}"
        )
    return found


def _checked(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that fit together, are floats and finite; a single threshold is every feature's."""
    d_in, d_sae = _matrix(path, "W_enc", weights["W_enc"])
    d_out = _matrix(path, "W_dec", weights["W_dec"])[1]
    if "threshold" in weights:
        threshold = weights["threshold"].reshape(-1)
        weights["threshold"] = threshold.expand(d_sae).contiguous() if threshold.numel() == 1 else threshold
    shapes = {
        "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,), "W_skip": (d_out, d_in),
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in weights and tuple(weights[name].shape) != shape:
            raise DictionaryError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, with {d_sae} features of width {d_in} it must "
                f"be {shape}"
            )
    for name, tensor in weights.items():
        if name == "k":
            if tensor.numel() != 1 or float(tensor) != int(tensor) or int(tensor) < 1:
                raise DictionaryError(f"{path}: k is {tensor.tolist()}, it must be one positive whole number")
        elif not tensor.dtype.is_floating_point:
            raise DictionaryError(f"{path}: {name} has dtype {tensor.dtype}; weights must be floats")
        else:
            _refuse_not_finite(path, name, tensor)
    return weights


def _matrix(path: Path, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise DictionaryError(f"{path}: {name} has shape {tuple(tensor.shape)}, it must be a matrix")
    return int(tensor.shape[0]), int(tensor.shape[1])


def _refuse_not_finite(path: Path | str, name: str, tensor: Tensor) -> None:
    if tensor.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
        raise DictionaryError(f"{path}: {name} holds NaN or infinity; the file is damaged or the training diverged")


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")

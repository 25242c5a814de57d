"""Cross-layer transcoders as folders, in two layouts.

**saelens**: a folder ``layer_<i>`` per layer with ``cfg.json`` and ``sae_weights.safetensors``, which
``SAE.load_from_disk`` reads once `circuit_lens.dictionaries.cross_layer_saelens` is imported. Tensors:
``W_enc [d_in, d_sae]``, ``b_enc``, ``W_dec [d_sae, n_out, d_out]``, ``b_dec [d_out]``, ``threshold``,
``W_skip [d_out, d_in]``.

**circuit-tracer**: ``W_enc_<i>.safetensors`` with ``W_enc_<i> [d_sae, d_in]``, ``b_enc_<i>``, ``b_dec_<i>`` and
``threshold_<i>``; ``W_dec_<i>.safetensors`` with ``W_dec_<i> [d_sae, L - i, d_out]``; ``config.yaml`` with
``model_kind: cross_layer_transcoder`` and one ``feature_input_hook`` and ``feature_output_hook`` for all blocks. Its
reader passes over other names, under which lies what it does not know: ``W_skip_<i> [d_in, d_out]`` beside the encoder,
``activation``, ``k`` and our ``circuit_lens`` in ``config.yaml``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from circuit_lens.dictionaries.cross_layer_parts import ACTIVATIONS, Activation, CrossLayer, LayerParts
from circuit_lens.dictionaries.cross_layer_weights import InMemory, Matrices
from circuit_lens.dictionaries.lazy_weights import OnDisk, TensorFile
from circuit_lens.dictionaries.points import parse_hook
from circuit_lens.errors import DictionaryError

ARCHITECTURE = "circuit_lens_clt"
LAYOUTS = ("saelens", "circuit-tracer")
Hooks = Sequence[str] | None


# ----------------------------------------------------------------------------------------------------------- saving


def save(
    layers: Sequence[CrossLayer], metadata: Mapping[str, Any], folder: str | os.PathLike[str], layout: str
) -> None:
    """Write a transcoder to a new folder (see `CrossLayerTranscoder.save`).

    Raises:
        DictionaryError: The folder is in use or cannot be written, an unknown layout, or one that cannot say what this
            transcoder is.
    """
    if layout not in LAYOUTS:
        raise DictionaryError(f"layout {layout!r} is unknown; valid are {', '.join(LAYOUTS)}")
    try:
        json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise DictionaryError(
            f"the metadata are no JSON values ({error}); give numbers, texts, lists and dicts"
        ) from error
    config = _tracer_config(layers, metadata) if layout == "circuit-tracer" else {}
    with _new_folder(Path(folder)) as target:
        for i, layer in enumerate(layers):
            if layout == "circuit-tracer":
                _write_tracer_layer(target, i, layer.parts)
            else:
                (target / f"layer_{i}").mkdir()
                write_saelens_layer(target / f"layer_{i}", layer, metadata)
        if config:
            import yaml

            (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _write_tracer_layer(folder: Path, i: int, parts: LayerParts) -> None:
    m = parts.matrices
    # A threshold below zero means zero here, there it would let negative activations through.
    threshold = None if parts.threshold is None else parts.threshold.clamp_min(0)
    tensors = {"W_enc": m.encoder_columns(0, m.d_sae).T, "b_enc": parts.b_enc, "b_dec": parts.b_dec}
    tensors |= {n: t for n, t in (("threshold", threshold), ("W_skip", parts.W_skip)) if t is not None}
    _write_tensors(folder / f"W_enc_{i}.safetensors", {f"{name}_{i}": tensor for name, tensor in tensors.items()})
    _write_tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": m.decoder_slab(0, m.d_sae)})


def _tracer_config(layers: Sequence[CrossLayer], metadata: Mapping[str, Any]) -> dict[str, Any]:
    read = {parse_hook(d.hook_in).suffix for d in layers}
    written = {parse_hook(d.site).suffix for d in layers}
    numbers = [d.layer for d in layers]
    if len(read) > 1 or len(written) > 1 or numbers != list(range(len(numbers))):
        raise DictionaryError(
            f"circuit-tracer's layout knows one input and one output hook for all layers from 0 on; this transcoder "
            f"reads {sorted(read)} and writes {sorted(written)} in layers {numbers}; use layout='saelens'"
        )
    first = layers[0].parts
    config = {
        "model_kind": "cross_layer_transcoder",
        "model_name": metadata.get("model_name"),
        "feature_input_hook": read.pop(),
        "feature_output_hook": written.pop(),
        "activation": {"jumprelu": "jump_relu"}.get(first.activation, first.activation),
        "k": first.k,
        "circuit_lens": {"version": 1, "metadata": dict(metadata)},
    }
    return {name: value for name, value in config.items() if value is not None}


def write_saelens_layer(folder: Path, layer: CrossLayer, metadata: Mapping[str, Any]) -> None:
    """Write one layer as SAELens would write its module, into a folder that exists."""
    p, m = layer.parts, layer.parts.matrices
    tensors = {"W_enc": m.encoder_columns(0, m.d_sae), "b_enc": p.b_enc, "W_dec": m.decoder_slab(0, m.d_sae)}
    skip = None if p.W_skip is None else p.W_skip.T
    tensors |= {n: t for n, t in (("b_dec", p.b_dec), ("threshold", p.threshold), ("W_skip", skip)) if t is not None}
    _write_tensors(folder / "sae_weights.safetensors", tensors)
    config = saelens_config(layer, metadata) | {"architecture": ARCHITECTURE}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")


def saelens_config(layer: CrossLayer, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a layer's SAELens configuration."""
    p, version = layer.parts, importlib.metadata.version("sae-lens")
    return {
        "d_in": layer.d_in,
        "d_sae": layer.d_sae,
        "dtype": str(p.matrices.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "d_out": layer.d_out,
        "n_out": len(layer.hooks_out),
        "activation": p.activation,
        "k": p.k,
        "skip": layer.has_skip,
        "metadata": {
            "sae_lens_version": version,
            "sae_lens_training_version": None,
            "hook_name": layer.hook_in,
            "hook_name_out": layer.site,
            "hook_names_out": list(layer.hooks_out),
            "joint": layer.joint,
            "set_metadata": dict(metadata),
        },
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous()
        storage = part.untyped_storage()
        if storage.nbytes() != part.nbytes or storage.data_ptr() in storages:
            part = part.clone()  # the format takes neither parts of a storage nor one storage twice
        storages.add(storage.data_ptr())
        written[name] = part
    save_file(written, path)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes ``folder`` if the block ends well, and vanishes otherwise."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DictionaryError(f"{folder} is no empty folder; give a new one, nothing is overwritten")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file() or os.name == "posix":
                _flush(path)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DictionaryError(f"could not write {folder}: {error}; nothing was written there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    folder: str | os.PathLike[str], *, lazy: bool = False, hook_in: str | Hooks = None, hook_out: str | Hooks = None
) -> tuple[list[LayerParts], dict[str, Any]]:
    """Read a transcoder's layers and metadata from a folder in either layout (see `CrossLayerTranscoder.load`).

    Raises:
        DictionaryError: No such folder, files that are foreign, damaged, missing or contradict each other.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DictionaryError(f"{path} is no folder; a cross-layer transcoder is a folder of files")
    tracer, saelens = _numbered(path, r"W_(?:enc|dec)_(\d+)\.safetensors"), _saelens_folders(path)
    if bool(tracer) == bool(saelens):
        what = "two cross-layer transcoders" if tracer else "no cross-layer transcoder"
        raise DictionaryError(
            f"{path} holds {what}: there must be either files W_enc_<i>.safetensors and W_dec_<i>.safetensors "
            f"(circuit-tracer), or folders with a cfg.json of architecture {ARCHITECTURE} (SAELens)"
        )
    n_layers = max(tracer or saelens) + 1
    made, config, metadata = (_tracer_parts if tracer else _saelens_parts)(path, n_layers, lazy)
    reads = _hooks("hook_in", hook_in, n_layers, config)
    writes = _hooks("hook_out", hook_out, n_layers, config)
    return [part(reads[i], tuple(writes[i:]), f"clt {writes[0]}") for i, part in enumerate(made)], metadata


_Made = tuple[list[Callable[[str, tuple[str, ...], str], LayerParts]], dict[str, list[str]], dict[str, Any]]


def _numbered(folder: Path, pattern: str) -> set[int]:
    names = (re.fullmatch(pattern, entry.name) for entry in folder.iterdir())
    return {int(name[1]) for name in names if name}


def _hooks(name: str, given: str | Hooks, n_layers: int, config: Mapping[str, list[str]]) -> list[str]:
    if isinstance(given, str):
        return [f"blocks.{i}.{given}" for i in range(n_layers)]
    hooks = config.get(name) if given is None else list(given)
    if hooks is None:
        raise DictionaryError(
            f"the folder does not say {'what the layers read' if name == 'hook_in' else 'where the layers write'}; "
            f"give {name}=, a name within the block ('hook_resid_mid') or one full name per layer"
        )
    if len(hooks) != n_layers:
        raise DictionaryError(f"{name} has {len(hooks)} names, the transcoder has {n_layers} layers")
    return hooks


def _tracer_parts(folder: Path, n_layers: int, lazy: bool) -> _Made:
    config = _tracer_yaml(folder)
    encoders = [TensorFile(folder / f"W_enc_{i}.safetensors") for i in range(n_layers)]
    decoders = [TensorFile(folder / f"W_dec_{i}.safetensors") for i in range(n_layers)]
    activation, k = _tracer_activation(folder, config, ["threshold_" + str(i) in f for i, f in enumerate(encoders)])
    made = []
    for i, (enc, dec) in enumerate(zip(encoders, decoders, strict=True)):
        small = {n: enc.read(f"{n}_{i}") for n in ("b_enc", "b_dec")}
        small |= {n: enc.read(f"{n}_{i}") if f"{n}_{i}" in enc else None for n in ("threshold", "W_skip")}
        threshold = small["threshold"]
        if threshold is not None and bool((threshold < 0).any()):
            raise DictionaryError(
                f"threshold_{i} in {enc.path} has negative values, which let negative activations through; that is no "
                "JumpReLU"
            )
        matrices: Matrices = OnDisk((enc, f"W_enc_{i}"), (dec, f"W_dec_{i}"), feature_first=True)
        if not lazy:
            matrices = InMemory(enc.read(f"W_enc_{i}").T, dec.read(f"W_dec_{i}"))
        made.append(_bound(matrices, small, activation, k))
    hooks = {}
    for ours, theirs in (("hook_in", "feature_input_hook"), ("hook_out", "feature_output_hook")):
        if theirs in config:
            hooks[ours] = [f"blocks.{i}.{config[theirs]}" for i in range(n_layers)]
    mine = config.get("circuit_lens") or {}
    metadata = dict(mine.get("metadata") or {})
    if config.get("model_name") is not None:
        metadata.setdefault("model_name", config["model_name"])
    return made, hooks, metadata


def _tracer_yaml(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DictionaryError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds no mapping but {type(config).__name__}")
    kind = config.get("model_kind", "cross_layer_transcoder")
    if kind != "cross_layer_transcoder":
        raise DictionaryError(f"{path} is of model_kind {kind!r}; this reads 'cross_layer_transcoder'")
    return config


def _tracer_activation(
    folder: Path, config: Mapping[str, Any], thresholds: Sequence[bool]
) -> tuple[Activation, int | None]:
    """Return activation and k; what ``config.yaml`` says counts, and the files must agree with it."""
    if len(set(thresholds)) > 1:
        raise DictionaryError(f"some layers of {folder} have thresholds and some have none")
    said = config.get("activation")
    name = "jumprelu" if thresholds[0] else "relu"
    if said is not None:
        name = re.sub(r"[^a-z]", "", str(said).lower())
        if name not in ACTIVATIONS:
            raise DictionaryError(f"{folder / 'config.yaml'} says activation {said!r}; valid are relu, jump_relu, topk")
        if thresholds[0] != (name == "jumprelu"):
            found = "has thresholds" if thresholds[0] else "has no thresholds"
            raise DictionaryError(f"{folder / 'config.yaml'} says activation {said!r}, the folder {found}")
    k = config.get("k")
    if name == "topk" and not (isinstance(k, int) and not isinstance(k, bool)):
        raise DictionaryError(
            f"{folder / 'config.yaml'} says activation {said!r} and k {k!r}; k must be a whole number"
        )
    activation: Activation = next(a for a in ACTIVATIONS if a == name)
    return activation, k if name == "topk" else None


def _saelens_folders(folder: Path) -> set[int]:
    return {i for i in _numbered(folder, r"layer_(\d+)") if (folder / f"layer_{i}" / "cfg.json").is_file()}


def _saelens_parts(folder: Path, n_layers: int, lazy: bool) -> _Made:
    configs = [_saelens_json(folder / f"layer_{i}" / "cfg.json") for i in range(n_layers)]
    made, hooks = [], {"hook_in": [], "hook_out": []}
    for i, config in enumerate(configs):
        file = TensorFile(folder / f"layer_{i}" / "sae_weights.safetensors")
        facts = config.get("metadata") or {}
        activation, k = config.get("activation"), config.get("k")
        if activation not in ACTIVATIONS or not isinstance(k, int | None):
            raise DictionaryError(
                f"layer {i} of {folder} has activation {activation!r} and k {k!r}: its cfg.json is damaged"
            )
        names, missing = facts.get("hook_names_out"), n_layers - i - int(config.get("n_out", 0))
        if missing or not isinstance(names, list) or len(names) != n_layers - i:
            raise DictionaryError(
                f"layer {i} of {folder} writes {config.get('n_out')} layers, there are {n_layers - i} from it on: a "
                "layer is missing or belongs to another set"
            )
        hooks["hook_in"].append(facts.get("hook_name"))
        hooks["hook_out"].append(names[0])
        small = {n: file.read(n) for n in ("b_enc", "b_dec")}
        small |= {n: file.read(n) if n in file else None for n in ("threshold", "W_skip")}
        if small["W_skip"] is not None:
            small["W_skip"] = small["W_skip"].T
        matrices: Matrices = OnDisk((file, "W_enc"), (file, "W_dec"), feature_first=False)
        if not lazy:
            matrices = InMemory(file.read("W_enc"), file.read("W_dec"))
        made.append(_bound(matrices, small, activation, k))
    first = configs[0].get("metadata") or {}
    return made, hooks, dict(first.get("set_metadata") or {})


def _saelens_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DictionaryError(f"{path} is missing or cannot be read: a layer of the set is not there") from error
    except ValueError as error:
        raise DictionaryError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        found = config.get("architecture") if isinstance(config, dict) else type(config).__name__
        raise DictionaryError(
            f"{path} is of architecture {found!r}; a layer of a cross-layer transcoder is {ARCHITECTURE}"
        )
    return config


def _bound(
    matrices: Matrices, small: Mapping[str, Any], activation: Activation, k: int | None
) -> Callable[[str, tuple[str, ...], str], LayerParts]:
    """Return the layer's parts as a function of its hooks, which may come from elsewhere."""

    def parts(hook_in: str, hooks_out: tuple[str, ...], joint: str) -> LayerParts:
        return LayerParts(
            matrices, small["b_enc"], small["b_dec"], small["threshold"], small["W_skip"], hook_in, hooks_out,
            activation, k, joint,
        )  # fmt: skip

    return parts

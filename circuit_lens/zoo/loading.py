"""Loading and saving of bundled models and dictionaries: offline, no pickle, float16 on disk, float32 in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuit_lens.errors import nearest
from circuit_lens.graph.feature_info import FeatureTable, load_feature_info
from circuit_lens.zoo.model import ModelShape
from circuit_lens.zoo.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit_lens.replacement_model import ReplacementModel

ASSETS = Path(__file__).parent / "assets"
MODEL_FILE, CONFIG_FILE, DICTIONARIES = "model.safetensors", "model.json", "dictionaries"
DEFAULT_SET, NEURONS = "plt", "neurons"
FEATURE_INFO_FILE = "features.safetensors"
# Zero by construction, so not stored.
_ZERO_BIASES = ("attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "unembed.b_U")


def names() -> list[str]:
    """The names of the bundled models that have dictionaries."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}") if (path.parent / DICTIONARIES).is_dir())


def model_names() -> list[str]:
    """The names of all bundled models: those of `names`, then those without dictionaries."""
    return list(dict.fromkeys([*names(), *sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}"))]))


def asset_folder(name: str) -> Path:
    """Where a bundled model lies; an unknown name raises ``ValueError`` with the valid ones."""
    valid = model_names()
    if name in valid:
        return ASSETS / name
    raise ValueError(f"There is no bundled model {name!r}{nearest(str(name), valid)}. Valid: {', '.join(valid)}.")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The global random state comes back, and upstream's deprecation warnings stay out of the caller's sight."""
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(state)


def build_hooked(shape: ModelShape, state: Mapping[str, Tensor], vocabulary: list[str], name: str) -> HookedTransformer:
    """A HookedTransformer with these weights (as they are, no processing) and its tokenizer, in evaluation mode."""
    with _undisturbed():
        from transformer_lens import HookedTransformer

        model = HookedTransformer(shape.hooked_config(name), tokenizer=build_tokenizer(vocabulary, name))
        full = model.state_dict()
        for key, tensor in full.items():
            if key in state:
                full[key] = state[key].float()
            elif key.endswith(_ZERO_BIASES):
                full[key] = torch.zeros_like(tensor)
            elif "mask" not in key and "IGNORE" not in key and "rotary" not in key:
                raise ValueError(f"The weights of {name!r} lack {key!r}")
        model.load_state_dict(full)
    model.requires_grad_(True)
    return model.eval()


def save_model(
    folder: Path,
    shape: ModelShape,
    state: Mapping[str, Tensor],
    vocabulary: list[str],
    *,
    name: str,
    provenance: Mapping[str, object],
) -> None:
    """Weights in float16 and one JSON file with the shape, the vocabulary and how the model was made."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: tensor.half().contiguous() for key, tensor in state.items() if not key.endswith(_ZERO_BIASES)}
    save_file(stored, folder / MODEL_FILE)
    config = {"name": name, "shape": asdict(shape), "provenance": dict(provenance), "vocabulary": vocabulary}
    (folder / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def load_model_from(folder: Path) -> HookedTransformer:
    """The model in a folder that `save_model` wrote."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return build_hooked(
        ModelShape(**config["shape"]), load_file(folder / MODEL_FILE), config["vocabulary"], config["name"]
    )


def load_model(name: str = "capitals") -> HookedTransformer:
    """A bundled model as a HookedTransformer in float32 on the CPU, with its tokenizer.

    Needs no network and leaves the global random state as it was. ``model_names()`` lists the valid names.
    """
    return load_model_from(asset_folder(name))


def load_dictionaries_from(folder: Path) -> list[Any]:
    """Dictionaries in a folder: SAELens folders, in the order of the layers, or a cross-layer transcoder."""
    if any(folder.glob("layer_*/cfg.json")):
        from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

        return [CrossLayerTranscoder.load(folder, dtype=torch.float32)]
    with _undisturbed():
        from sae_lens import SAE

        found = sorted(path.parent for path in folder.glob("*/cfg.json"))
        return [SAE.load_from_disk(str(path), dtype="float32", device="cpu") for path in found]


def dictionary_sets(name: str = "capitals") -> list[str]:
    """The names of a bundled model's dictionary sets; ``"neurons"`` are the model's own, and all that some have."""
    return [*sorted(path.name for path in (asset_folder(name) / DICTIONARIES).glob("*") if path.is_dir()), NEURONS]


def _check_set(name: str, which: str) -> None:
    sets = dictionary_sets(name)
    if which not in sets:
        hint = nearest(str(which), sets)
        raise ValueError(f"{name!r} has no dictionary set {which!r}{hint}. Valid: {', '.join(sets)}")


def load_dictionaries(name: str = "capitals", which: str = DEFAULT_SET) -> list[Any]:
    """A bundled model's dictionaries in float32 on the CPU: SAELens objects, or one ``CrossLayerTranscoder``.

    ``"plt"``, ``"skip"``: per-layer transcoders, the second with skip paths. ``"clt"``: a cross-layer transcoder.
    ``"sae"``: SAEs of the residual stream behind every block; ``"sae-256"`` and ``"sae-1600"``: smaller and larger ones
    behind the second block; ``"sae-mlp-in"`` and ``"sae-mlp-out"``: SAEs around the second block's MLP (the first
    stands at the norm, where SAEs are compared but not attributed). A SAELens object says in ``sae.cfg.metadata`` what
    it reads (``hook_name``) and writes (``hook_name_out``).

    Raises:
        ValueError: An unknown name or set, with the valid ones; or ``"neurons"``, which belong to one model object.
    """
    _check_set(name, which)
    if which == NEURONS:
        raise ValueError("neurons are a model's own: use circuit_lens.neurons(model), or zoo.load(name, 'neurons')")
    return load_dictionaries_from(asset_folder(name) / DICTIONARIES / which)


def load_features(name: str = "capitals", which: str = DEFAULT_SET) -> FeatureTable:
    """What is known about the features of a bundled model's dictionaries.

    Raises:
        ValueError: An unknown name or set, or one of whose features nothing is bundled.
    """
    _check_set(name, which)
    path = asset_folder(name) / DICTIONARIES / which / FEATURE_INFO_FILE
    if not path.is_file():
        raise ValueError(f"nothing is bundled about the features of {which!r} of {name!r}")
    return load_feature_info(path)


def load_pair(
    name: str = "capitals",
    dictionaries: str | Sequence[str] = DEFAULT_SET,
    *,
    others: Sequence[Any] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ReplacementModel:
    """A bundled model with some of its dictionary sets, and labels of their features where there are any.

    ``others`` are dictionaries of the user's that stand beside them.

    Raises:
        ValueError: An unknown name or set, with the valid ones.
        DictionaryError: Sets that stand for the same activations.
    """
    from circuit_lens.dictionaries.neurons import neurons
    from circuit_lens.replacement_model import ReplacementModel

    sets = [dictionaries] if isinstance(dictionaries, str) else list(dictionaries)
    for which in sets:
        _check_set(name, which)
    model = load_model(name)
    model.to(device, print_details=False)
    model.to(dtype, print_details=False)
    found, tables = list(others), {}
    for which in sets:
        if which == NEURONS:
            found += neurons(model)
            continue
        found += [one.to(device=device, dtype=dtype) for one in load_dictionaries(name, which)]
        if (asset_folder(name) / DICTIONARIES / which / FEATURE_INFO_FILE).is_file():
            table = load_features(name, which)
            tables |= {info.site: table for info in table.sites}

    def label(site: str, layer: int, index: int) -> str:
        return tables[site].label(site, layer, index) if site in tables else ""

    return ReplacementModel(model, found, label=label)

"""The layouts in which dictionaries are published, recognised by the files that are there.

=====================  ====================================================================================
layout                 files
=====================  ====================================================================================
``saelens``            ``cfg.json`` and ``sae_weights.safetensors``, one folder for each dictionary
``plt``                ``layer_<i>.safetensors`` (W_enc ``[d_sae, d_in]``), and ``config.yaml`` with the hooks
``clt``                ``W_enc_<i>.safetensors`` and ``W_dec_<i>.safetensors``, and ``config.yaml``
``gemma-scope``        ``params.npz``, in a folder ``layer_<i>/...`` for each dictionary
``gemma-scope-2``      ``params.safetensors`` (w_enc, w_dec, ...), ``config.json``, a folder for each dictionary
``gemma-scope-2-clt``  ``params_layer_<i>.safetensors``, one folder for a cross-layer transcoder
=====================  ====================================================================================

``plt`` and ``clt`` are circuit-tracer's, whose ``config.yaml`` says what the weights do not (``model_kind``, the hooks,
``activation``, ``k``; ``transcoders`` lists files that lie elsewhere).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from circuit_lens.errors import DictionaryError
from circuit_lens.loading.failures import LoadError
from circuit_lens.loading.hub import Address, parse_address

Layout = Literal["saelens", "release", "plt", "clt", "gemma-scope", "gemma-scope-2", "gemma-scope-2-clt"]
Activation = Literal["relu", "jumprelu", "topk"]

LAYER = re.compile(r"layer[_.]?(\d+)")
_L0 = re.compile(r"(?:average_)?l0_(\d+)")
CLT_ARCHITECTURE = "circuit_lens_clt"
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk", "top_k": "topk",
}  # fmt: skip
# What Gemma Scope 2 says in the words of transformers, in those of TransformerLens.
_HF_HOOKS = {
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


@dataclass(frozen=True)
class Settings:
    """What a dictionary's weights do not say.

    Attributes:
        layer: The layer it reads.
        hook_in, hook_out: Names within the block, such as ``mlp.hook_in`` and ``hook_mlp_out``.
        activation: None: what the weights show (JumpReLU where there are thresholds, else ReLU).
        k: Features kept at a position, for TopK; None: what the weights say.
        l0: Published mean number of active features.
        site: The hook at which it writes, where its own file names it: a rule chooses among those of one site.
    """

    layer: int | None = None
    hook_in: str | None = None
    hook_out: str | None = None
    activation: Activation | None = None
    k: int | None = None
    l0: float | None = None
    site: str | None = None


@dataclass(frozen=True)
class Found:
    """Where one dictionary is, and how it is read. Nothing of it is loaded yet.

    Attributes:
        folder: Where its files lie on this computer; None: on the hub.
        release, sae_id: SAELens' names, where it was found by them.
        repository, revision: On the hub.
        layout: How its files are read; ``release``: by SAELens, from its registry.
        files: Names from the root of the folder or repository; none: the folder as a whole.
        settings: What the weights do not say.
    """

    folder: Path | None = None
    release: str = ""
    sae_id: str = ""
    repository: str = ""
    revision: str | None = None
    layout: Layout = "saelens"
    files: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder / self.files[0]) if self.files and "clt" not in self.layout else str(self.folder)
        if self.release:
            return f"{self.release}:{self.sae_id}" if self.sae_id else self.release
        return str(Address(self.repository, self.revision, self.files[0] if self.files else ""))


@runtime_checkable
class Tree(Protocol):
    """Files that lie together, on this computer or on the hub."""

    @property
    def label(self) -> str:
        """What the user called it."""
        ...

    def names(self) -> Sequence[str]:
        """Return the files' names from the root of the tree, sorted."""
        ...

    def path(self, name: str) -> Path:
        """Return where a (small) file lies, fetched if need be."""
        ...

    def found(self, layout: Layout, files: Sequence[str], settings: Settings) -> Found:
        """Return the record of a dictionary that is made of these files."""
        ...


def recognise(tree: Tree, given: Settings) -> list[Found]:
    """Return the dictionaries of a tree, in the order of their layers; several for a layer are all there.

    Args:
        tree: The files.
        given: What the user says of all of them; it stands before what files say.

    Raises:
        LoadError: No layout that is known.
        DictionaryError: Files that say nothing, or nothing valid, of what must be known.
    """
    names = set(tree.names())
    if "cfg.json" in names:
        return [tree.found("saelens", ("cfg.json", "sae_weights.safetensors"), given)]
    config = _yaml(tree.path("config.yaml")) if "config.yaml" in names else {}
    layers = _numbered(names, r"layer_(\d+)\.safetensors")
    encoders = _numbered(names, r"W_enc_(\d+)\.safetensors")
    scope = _numbered(names, r"params_layer_(\d+)\.safetensors")
    listed = config.get("transcoders")
    if encoders and layers:
        raise LoadError(f"{tree.label} has both layer_*.safetensors and W_enc_*.safetensors; give folders with one set")
    if scope:
        return [_gemma_scope_2_clt(tree, scope, given)]
    if encoders:
        return [_cross_layer(tree, names, encoders, config, given)]
    if config.get("model_kind") == "cross_layer_transcoder":
        if listed:
            return [_listed_cross_layer(tree, [str(uri) for uri in listed], config, given)]
        raise LoadError(f"{tree.label}: config.yaml says cross_layer_transcoder, but there is no W_enc_0.safetensors")
    if layers or listed:
        settings = _per_layer_settings(tree, config, given)
        if listed:
            return [_listed(tree, str(uri), i, settings) for i, uri in enumerate(listed)]
        return [tree.found("plt", (name,), replace(settings, layer=i)) for i, name in sorted(layers.items())]
    return _many_folders(tree, names, given)


def _many_folders(tree: Tree, names: set[str], given: Settings) -> list[Found]:
    """Return the dictionaries of a tree with a folder for each; a cross-layer transcoder is one."""
    if "layer_0/cfg.json" in names and _json(tree.path("layer_0/cfg.json")).get("architecture") == CLT_ARCHITECTURE:
        files = [
            name for name in sorted(names) if re.fullmatch(r"layer_\d+/(cfg\.json|sae_weights\.safetensors)", name)
        ]
        return [tree.found("clt", files, given)]
    inner = {name.removeprefix("dictionary/") for name in names if name.startswith("dictionary/")}
    if "layer_0/cfg.json" in inner:
        raise LoadError(f"{tree.label} is the folder of a training; its dictionary is the folder 'dictionary' in it")
    found = []
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if file == "sae_weights.safetensors" and folder and f"{folder}/cfg.json" not in names:
            raise DictionaryError(f"{tree.label}/{folder} is no folder of SAELens: it has weights, but no cfg.json")
        if file == "cfg.json" and folder:
            files = (name, f"{folder}/sae_weights.safetensors")
            found.append(tree.found("saelens", files, _saelens_settings(tree.path(name), given)))
        elif file == "params.npz":
            found.append(tree.found("gemma-scope", (name,), _from_path(tree, name, given)))
        elif file == "params.safetensors":
            found.append(_gemma_scope_2(tree, names, name, given))
    if not found:
        shown = ", ".join(sorted(names)[:6]) or "nothing"
        raise LoadError(
            f"no dictionary was found in {tree.label}: neither the folder nor a folder in it has a cfg.json (what "
            "SAE.save_model(folder) wrote), a layer_0.safetensors or W_enc_0.safetensors with config.yaml "
            f"(circuit-tracer), a params.npz or a params.safetensors (Gemma Scope). There is {shown}"
        )
    return sorted(found, key=lambda one: -1 if one.settings.layer is None else one.settings.layer)


def _cross_layer(
    tree: Tree, names: set[str], encoders: Mapping[int, str], config: Mapping[str, Any], given: Settings
) -> Found:
    decoders = _numbered(names, r"W_dec_(\d+)\.safetensors")
    if set(encoders) != set(decoders) or sorted(encoders) != list(range(len(encoders))):
        raise DictionaryError(
            f"{tree.label} is no complete cross-layer transcoder: it has W_enc of layers {_ranges(encoders)} and W_dec "
            f"of layers {_ranges(decoders)}; every layer from 0 on needs both"
        )
    files = [*(name for i in sorted(encoders) for name in (encoders[i], decoders[i]))]
    files += ["config.yaml"] * ("config.yaml" in names)
    return tree.found("clt", files, _per_layer_settings(tree, config, given, kind="cross_layer_transcoder"))


def _gemma_scope_2_clt(tree: Tree, files: Mapping[int, str], given: Settings) -> Found:
    if sorted(files) != list(range(len(files))):
        raise DictionaryError(
            f"{tree.label} is no complete cross-layer transcoder: it has layers {_ranges(files)}, every one from 0 on "
            "is needed"
        )
    hooks = replace(given, hook_in=given.hook_in or "mlp.hook_in", hook_out=given.hook_out or "hook_mlp_out")
    return tree.found("gemma-scope-2-clt", [files[i] for i in sorted(files)], hooks)


def _per_layer_settings(
    tree: Tree, config: Mapping[str, Any], given: Settings, *, kind: str = "transcoder_set"
) -> Settings:
    """Return what circuit-tracer's configuration says of all layers.

    Raises:
        DictionaryError: Another kind of model, an unknown activation, a k that is no count.
    """
    said = config.get("model_kind", kind)
    if said != kind:
        raise DictionaryError(f"{tree.label}: config.yaml says model_kind {said!r}, its files are those of a {kind}")
    activation, k = config.get("activation"), config.get("k")
    if activation is not None and str(activation).lower() not in _ACTIVATIONS:
        raise DictionaryError(
            f"{tree.label}: config.yaml says activation {activation!r}; valid are {', '.join(sorted(_ACTIVATIONS))}"
        )
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise DictionaryError(f"{tree.label}: config.yaml says k = {k!r}; it must be a positive whole number")
    return Settings(
        hook_in=given.hook_in or _within_block(config.get("feature_input_hook")),
        hook_out=given.hook_out or _within_block(config.get("feature_output_hook")),
        activation=given.activation or (None if activation is None else _ACTIVATIONS[str(activation).lower()]),
        k=given.k or k,
    )


def _listed(tree: Tree, uri: str, layer: int, settings: Settings) -> Found:
    """Return a dictionary that a configuration lists: a file of another repository, or one beside it."""
    file = uri.partition("?")[0].rsplit("/", 1)[-1]
    layout: Layout = (
        "gemma-scope" if file == "params.npz" else "gemma-scope-2" if file == "params.safetensors" else "plt"
    )
    settings = replace(settings, layer=layer, l0=_l0(uri))
    if uri.startswith("hf:"):
        address = parse_address(uri)
        return Found(
            repository=address.repository, revision=address.revision, layout=layout, files=(address.folder,),
            settings=settings,
        )  # fmt: skip
    if uri not in tree.names():
        raise DictionaryError(f"{tree.label}: config.yaml lists {uri!r}, which is not there")
    return tree.found(layout, (uri,), settings)


def _listed_cross_layer(tree: Tree, uris: Sequence[str], config: Mapping[str, Any], given: Settings) -> Found:
    """Return a cross-layer transcoder whose files, in Gemma Scope 2's layout, a configuration lists layer by layer."""
    settings = _per_layer_settings(tree, config, given, kind="cross_layer_transcoder")
    addresses = [parse_address(uri) for uri in uris]
    places = {(address.repository, address.revision) for address in addresses}
    if len(places) != 1:
        raise DictionaryError(
            f"{tree.label}: config.yaml lists files of {len(places)} repositories; one set lies in one"
        )
    (repository, revision), files = places.pop(), tuple(address.folder for address in addresses)
    return Found(repository=repository, revision=revision, layout="gemma-scope-2-clt", files=files, settings=settings)


def _gemma_scope_2(tree: Tree, names: set[str], name: str, given: Settings) -> Found:
    folder = name.rpartition("/")[0]
    config = f"{folder}/config.json" if folder else "config.json"
    settings = _from_path(tree, name, given)
    files = (name, config) if config in names else (name,)
    return tree.found("gemma-scope-2", files, settings)


def gemma_scope_2_settings(path: Path, settings: Settings) -> Settings:
    """Return settings, completed by a dictionary's ``config.json`` of Gemma Scope 2.

    Raises:
        DictionaryError: No JSON, an architecture other than JumpReLU, or hooks of no transcoder.
    """
    config = _json(path)
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise DictionaryError(f"{path} says architecture {architecture!r}; it must be 'jump_relu'")
    ends: dict[str, str | None] = {}
    for key, name in (("hook_in", "hf_hook_point_in"), ("hook_out", "hf_hook_point_out")):
        said = config.get(name)
        match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", str(said)) if said else None
        if said and (match is None or match[2] not in _HF_HOOKS):
            raise DictionaryError(
                f"{path} says {name} = {said!r}, which is no end of a transcoder; valid are layers.<i>.* with "
                f"{', '.join(_HF_HOOKS)}. SAEs of that suite are loaded by their SAELens release"
            )
        ends[key] = _HF_HOOKS[match[2]] if match else None
        if match and settings.layer is None:
            settings = replace(settings, layer=int(match[1]))
        elif match and int(match[1]) != settings.layer:
            raise DictionaryError(f"{path} is of layer {match[1]}, its folder's name says layer {settings.layer}")
    return replace(
        settings, hook_in=settings.hook_in or ends["hook_in"], hook_out=settings.hook_out or ends["hook_out"]
    )


def _from_path(tree: Tree, name: str, given: Settings) -> Settings:
    """Return settings with the layer and the L0 that a path says (Gemma Scope's files do not)."""
    whole = f"{tree.label}/{name}"
    layers = LAYER.findall(name) or LAYER.findall(tree.label)[-1:]
    layer = given.layer if given.layer is not None else int(layers[-1]) if layers else None
    return replace(given, layer=layer, l0=_l0(whole))


def _l0(path: str) -> float | None:
    found = _L0.findall(path)
    return float(found[-1]) if found else None


def _within_block(hook: Any) -> str | None:
    """Return a declared hook's name within its block: ``blocks.{layer}.`` before it says nothing more."""
    return None if hook is None else re.sub(r"^blocks\.[^.]+\.", "", str(hook))


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DictionaryError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds no settings (name: value); circuit-tracer's config.yaml has model_kind")
    return config


def _saelens_settings(path: Path, given: Settings) -> Settings:
    """Return what a ``cfg.json`` of SAELens says for a choice among several: layer, site and L0."""
    metadata = _json(path).get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    site, l0 = metadata.get("hook_name_out") or metadata.get("hook_name"), metadata.get("l0")
    layer = re.match(r"blocks\.(\d+)\.", site) if isinstance(site, str) else None
    if layer is None:
        return given
    known = float(l0) if isinstance(l0, int | float) else None
    return replace(given, layer=int(layer[1]), site=site, l0=known if given.l0 is None else given.l0)


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DictionaryError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} holds no settings (name: value) but {type(config).__name__}")
    return config


def _numbered(names: set[str], pattern: str) -> dict[int, str]:
    matches = ((re.fullmatch(pattern, name), name) for name in names)
    found: dict[int, str] = {}
    for match, name in matches:
        if match:
            number = int(match[1])
            if number in found:
                raise DictionaryError(f"layer {number} is there twice: {found[number]} and {name}")
            found[number] = name
    return found


def _ranges(numbers: Mapping[int, str]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered)) if len(ordered) < 8 else f"{ordered[0]}, ..., {ordered[-1]} ({len(ordered)})"

"""From a name to dictionaries: a folder, an address on the hub, or a release of SAELens' registry."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from circuit_lens.errors import DictionaryError
from circuit_lens.loading import hub
from circuit_lens.loading.choice import RULES, Rule, choose, parse_rule
from circuit_lens.loading.failures import LoadError
from circuit_lens.loading.hub import Address, parse_address
from circuit_lens.loading.layouts import LAYER, Found, Layout, Settings, recognise


def registry() -> Mapping[str, Any]:
    """Return SAELens' list of published dictionaries, which is part of its package; transcoders first."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return _transcoders_first(get_pretrained_saes_directory)


@cache
def _transcoders_first(read: Any) -> dict[str, Any]:
    listed = read()
    return dict(sorted(listed.items(), key=lambda item: not is_transcoder(item[0])))


def is_transcoder(release: str) -> bool:
    """Return whether a release of the registry is of transcoders."""
    return "transcoder" in release or "clt" in release


def releases_for(model: str) -> list[str]:
    """Return the releases of transcoders for a model, by its name with or without organisation."""
    wanted = model.lower().rsplit("/", 1)[-1]
    return [name for name, r in registry().items() if is_transcoder(name) and wanted == r.model.lower().split("/")[-1]]


def find(
    what: str | Path, *, per_layer: Rule | None = None, given: Settings | None = None, option: str = ""
) -> list[Found]:
    """Return where the dictionaries of a name are, without loading any.

    Args:
        what: A folder in a layout of :mod:`circuit_lens.loading.layouts`; ``hf:owner/name[@revision][/folder]``; a
            release of SAELens, ``release:id`` or ``release:pattern`` (``*`` and ``?``). ``#rule`` at the end is a
            ``per_layer`` in text.
        per_layer: Which of several for a layer; see :func:`circuit_lens.loading.choice.choose`.
        given: What the user says of all dictionaries, where files do not.
        option: What messages put before the name, such as ``--dictionaries``.

    Raises:
        LoadError: A name that nothing has, or that does not say which.
        FetchError: A repository that cannot be listed.
        DictionaryError: Files that do not fit together.
    """
    name, given, option = str(what), given or Settings(), f"{option} " if option else ""
    folder = Path(name).expanduser()
    if not (name.strip() and folder.is_dir()) and "#" in name and per_layer is None:
        name, _, rule = name.rpartition("#")
        folder, per_layer = Path(name).expanduser(), parse_rule(rule)
    try:
        if name.strip() and folder.is_dir():
            return _local(folder, per_layer, given)
        if name.startswith("hf:"):
            return _remote(parse_address(name), per_layer, given)
    except (LoadError, DictionaryError) as error:
        if not option or str(error).startswith(option):
            raise
        raise type(error)(f"{option}{what}: {error}") from error
    release, colon, pattern = name.partition(":")
    if release in registry():
        return _in_release(release, pattern if colon else None, per_layer, given, option)
    if colon and pattern and re.fullmatch(r"[\w.-]+/[\w.-]+", release) and "*" not in pattern:
        return [_repository_folder(release, pattern, given)]
    close = difflib.get_close_matches(release, list(registry()), n=3, cutoff=0.4)
    hint = f"; nearest releases: {', '.join(close)}" if close else ""
    raise LoadError(
        f"{option}{what}: there is no such folder, and SAELens knows no release {release!r}{hint}. Give a release, "
        "release:id, owner/repository:id, hf:owner/name[@revision][/folder], or a folder with dictionaries"
    )


# ----------------------------------------------------------------------------------------------------------- trees


_DEPTH = 4  # of layer_0/width_16k/average_l0_76/params.npz


@dataclass(frozen=True)
class _Folder:
    """A folder of this computer as a `circuit_lens.loading.layouts.Tree`."""

    root: Path

    @property
    def label(self) -> str:
        return str(self.root)

    def names(self) -> Sequence[str]:
        found = []
        for depth in range(1, _DEPTH + 1):  # no deeper, lest somebody's home is walked
            found += [path.relative_to(self.root).as_posix() for path in self.root.glob("/".join("*" * depth))
                      if path.is_file()]  # fmt: skip
        return sorted(found)

    def path(self, name: str) -> Path:
        return self.root / name

    def found(self, layout: Layout, files: Sequence[str], settings: Settings) -> Found:
        if layout == "saelens":  # the folder is the dictionary
            return Found(folder=self.root / Path(files[0]).parent, settings=settings)
        return Found(folder=self.root, layout=layout, files=tuple(files), settings=settings)


@dataclass(frozen=True)
class _Repository:
    """A folder of a repository as a `circuit_lens.loading.layouts.Tree`."""

    address: Address

    @cached_property
    def listing(self) -> hub.Listing:
        return hub.HUB.listing(self.address.repository, self.address.revision)

    @property
    def label(self) -> str:
        return str(self.address)

    def names(self) -> Sequence[str]:
        inside = f"{self.address.folder}/" if self.address.folder else ""
        return sorted(name.removeprefix(inside) for name in self.listing.sizes if name.startswith(inside))

    def path(self, name: str) -> Path:
        full = self._full(name)
        return hub.fetch(replace(self.address, revision=self.listing.commit), [full], progress=False).paths[full]

    def found(self, layout: Layout, files: Sequence[str], settings: Settings) -> Found:
        return Found(
            repository=self.address.repository, revision=self.listing.commit, layout=layout,
            files=tuple(self._full(name) for name in files), settings=settings,
        )  # fmt: skip

    def _full(self, name: str) -> str:
        return f"{self.address.folder}/{name}" if self.address.folder else name


def _local(folder: Path, per_layer: Rule | None, given: Settings) -> list[Found]:
    return choose(recognise(_Folder(folder), given), per_layer, str(folder))


def _remote(address: Address, per_layer: Rule | None, given: Settings) -> list[Found]:
    if address.folder.endswith((".npz", ".safetensors")):
        raise LoadError(f"{address} names a file; name the folder it lies in")
    return choose(recognise(_Repository(address), _known_hooks(address, given)), per_layer, str(address))


def _known_hooks(address: Address, given: Settings) -> Settings:
    """Return settings with the hooks that SAELens' registry knows for a repository whose files name none."""
    listed = [entry.conversion_func for entry in registry().values() if entry.repo_id == address.repository]
    # Gemma Scope 2 keeps SAEs and transcoders in one repository, and says in each folder which it is.
    hooks = next((_HOOKS[kind] for kind in listed if kind in _HOOKS and kind != "gemma_3"), (None, None))
    return replace(given, hook_in=given.hook_in or hooks[0], hook_out=given.hook_out or hooks[1])


def _repository_folder(repository: str, folder: str, given: Settings) -> Found:
    """Return SAELens' own way to name a folder of any repository, ``owner/repository:folder``."""
    files = (f"{folder}/cfg.json", f"{folder}/sae_weights.safetensors")
    return Found(release=repository, sae_id=folder, repository=repository, files=files, settings=given)


# -------------------------------------------------------------------------------------------------------- releases

# Converters of the registry whose files we read ourselves, and the hooks that SAELens gives to what they make.
_HOOKS = {
    "gemma_2_transcoder": ("ln2.hook_normalized", "hook_mlp_out"),
    "mwhanna_transcoder": ("mlp.hook_in", "hook_mlp_out"),
    "gemma_3": ("mlp.hook_in", "hook_mlp_out"),  # of its transcoders
}


def _in_release(release: str, pattern: str | None, per_layer: Rule | None, given: Settings, option: str) -> list[Found]:
    entry = registry()[release]
    ids = [str(sae_id) for sae_id in entry.saes_map]
    chosen = ids if pattern is None else [i for i in ids if fnmatch.fnmatchcase(i, pattern)]
    if not chosen:
        close = difflib.get_close_matches(str(pattern), ids, n=3, cutoff=0.3)
        raise LoadError(
            f"{option}{release}:{pattern}: the release has no such id"
            f"{'; nearest: ' + ', '.join(close) if close else ''}. Its ids are of the form {_forms(ids)}"
        )
    found = [_released(entry, sae_id, given) for sae_id in chosen]
    if per_layer is not None:
        return choose(found, per_layer, release)
    layers = [one.settings.layer for one in found if one.settings.layer is not None]
    if len(layers) != len(set(layers)):
        raise LoadError(
            f"{option}{release}{'' if pattern is None else ':' + pattern}: {len(chosen)} dictionaries, several for a "
            f"layer; choose one kind: {', '.join(f'{release}:{form}' for form in _forms(chosen).split(', '))}; or a "
            f"rule: {release}#{RULES[0]}, {release}#{RULES[1]}, {release}#80 (the nearest L0)"
        )
    if entry.conversion_func == "mntss_clt_layer_transcoder":
        return _cross_layer_release(entry, found, pattern, given)
    return found


def _released(entry: Any, sae_id: str, given: Settings) -> Found:
    """Return the record of one id of a release, with what the registry knows."""
    layer = LAYER.search(sae_id) or re.search(r"blocks\.(\d+)\.", sae_id)
    l0 = entry.expected_l0.get(sae_id)
    kind, path = entry.conversion_func, entry.saes_map[sae_id]
    hooks = _HOOKS.get(kind or "", (None, None))
    settings = replace(
        given, layer=int(layer[1]) if layer else None, l0=float(l0) if l0 else None,
        hook_in=given.hook_in or hooks[0], hook_out=given.hook_out or hooks[1],
    )  # fmt: skip
    layout: Layout = "release"
    files: tuple[str, ...] = ()
    if kind == "gemma_2_transcoder":
        layout, files = "gemma-scope", (f"{path}/params.npz",)
    elif kind == "mwhanna_transcoder":
        layout, files = "plt", (path,)
    elif kind == "gemma_3" and "transcoder" in path:
        layout, files = "gemma-scope-2", (f"{path}/params.safetensors", f"{path}/config.json")
    elif kind in (None, "sae_lens"):
        layout, files = "saelens", (f"{path}/cfg.json", f"{path}/sae_weights.safetensors")
    return Found(
        release=entry.release, sae_id=sae_id, repository=entry.repo_id, layout=layout, files=files, settings=settings
    )


def _cross_layer_release(entry: Any, found: list[Found], pattern: str | None, given: Settings) -> list[Found]:
    """Return a cross-layer transcoder that the registry lists layer by layer.

    SAELens sums its decoders over layers, which finds features and reconstructs nothing.
    """
    if len(found) != len(entry.saes_map):
        raise LoadError(
            f"{entry.release}:{pattern}: a layer of a cross-layer transcoder is no transcoder by itself; load all of "
            f"it: {entry.release}, or hf:{entry.repo_id}"
        )
    names = [f"W_{part}_{i}.safetensors" for i in range(len(found)) for part in ("enc", "dec")]
    return [
        Found(
            release=entry.release, repository=entry.repo_id, layout="clt", files=(*names, "config.yaml"), settings=given
        )
    ]


def _forms(ids: Sequence[str], limit: int = 8) -> str:
    """Return the kinds of ids, the layer's number a ``*``."""
    forms = list(dict.fromkeys(LAYER.sub(lambda m: m.group(0).removesuffix(m.group(1)) + "*", i) for i in ids))
    return ", ".join(forms[:limit]) + (", ..." if len(forms) > limit else "")

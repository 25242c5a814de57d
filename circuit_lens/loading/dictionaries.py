"""Loading dictionaries: fetched, read, checked, and only then handed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.errors import DictionaryError
from circuit_lens.loading import hub
from circuit_lens.loading.choice import Rule
from circuit_lens.loading.failures import fetching, offline
from circuit_lens.loading.layouts import Found, Settings, gemma_scope_2_settings
from circuit_lens.loading.names import find

if TYPE_CHECKING:
    import torch

_OPTIONAL = ("config.json", "config.yaml")


def load_dictionaries(
    what: str | Path | Sequence[str | Path],
    *,
    per_layer: Rule | None = None,
    hook_in: str | None = None,
    hook_out: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    progress: bool | None = None,
) -> list[Any]:
    """Return published or local dictionaries, ready for ``ReplacementModel(model, ...)``.

    Args:
        what: One of these, or several: a release of SAELens; ``release:id`` (with ``*`` and ``?``); a folder in any
            layout of :mod:`circuit_lens.loading.layouts`; ``hf:owner/name[@revision][/folder]`` in any of these. With
            ``#rule`` at the end the rule is that of ``per_layer``.
        per_layer: Which one of several for a layer: ``"lowest-l0"``, ``"highest-l0"``, a number (the published L0
            nearest to it), or a regular expression that one name of each layer matches.
        hook_in, hook_out: What they read and write within their block (``"mlp.hook_in"``, ``"hook_mlp_out"``), for
            layouts whose files do not say it; before what files say.
        device: Where they go.
        dtype: None: that of the files.
        lazy: Matrices of a cross-layer transcoder stay on disk, those of ``.safetensors`` of per-layer transcoders are
            mapped from it (on the CPU, in the files' dtype): the files must stay. False: all is read into memory, as
            SAELens needs it to save a module.
        progress: Progress bars of downloads; None: as huggingface_hub is set.

    Returns:
        SAELens modules (``cfg.metadata.source`` names repository, commit and file of what came from the hub), a
        `TopKTranscoder` for each that keeps the k largest features, a `CrossLayerTranscoder` for each set that writes
        across layers.

    Raises:
        LoadError: A name that nothing has, or that does not decide.
        FetchError: What cannot be fetched: repository, files, and how to provide them.
        DictionaryError: Files that are damaged, foreign, contradict each other, or cannot be attributed.
    """
    given = Settings(hook_in=hook_in, hook_out=hook_out)
    every = [what] if isinstance(what, str | Path) else list(what)
    found = [one for name in every for one in find(name, per_layer=per_layer, given=given)]
    return load_found(found, device=device, dtype=dtype, lazy=lazy, progress=progress)


def load_found(
    found: Sequence[Found],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    progress: bool | None = None,
    about: float | None = None,
    sha256: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return the dictionaries of records; see :func:`load_dictionaries`.

    Args:
        found: What :func:`circuit_lens.loading.names.find` gave.
        device, dtype, lazy, progress: As there.
        about: Bytes in all, for messages.
        sha256: File name to sum, checked before anything of the file is used.

    Raises:
        LoadError, FetchError, DictionaryError: As there.
    """
    from circuit_lens.dictionaries.adapt import adapt, expand

    loaded: list[Any] = []
    sites: dict[tuple[str, ...], Found] = {}
    # The first one alone, so that a set of no use is not fetched; without network all that is missing is named.
    first = len(found) if offline() else 1
    for batch in (found[:first], found[first:]):
        for one, files in zip(batch, _fetched(batch, about, progress), strict=True):
            hub.check_sums(files.paths, {**_local_sums(one), **(sha256 or {})})
            dictionary = _read(one, files, device, dtype, lazy)
            for part in expand(dictionary):
                adapted = adapt(part)
                other = sites.setdefault((adapted.site, adapted.hook_in), one)
                if other is not one:
                    raise DictionaryError(f"{other} and {one} are both at {adapted.site}; give one of them")
            loaded.append(dictionary)
    return loaded


def _fetched(batch: Sequence[Found], about: float | None, progress: bool | None) -> list[hub.Fetched]:
    """Return the files of every record; those of one repository are fetched together."""
    groups: dict[tuple[str, str | None], list[Found]] = {}
    for one in batch:
        if one.folder is None and one.files:
            groups.setdefault((one.repository, one.revision), []).append(one)
    got: dict[tuple[str, str | None], hub.Fetched] = {}
    for key, members in groups.items():
        names = list(dict.fromkeys(name for one in members for name in one.files))
        optional = [name for name in names if name.rsplit("/", 1)[-1] in _OPTIONAL]
        needed = [name for name in names if name not in optional]
        size = int(about) if about and len(groups) == 1 else None
        got[key] = hub.fetch(hub.Address(*key), needed, optional=optional, about=size, progress=progress)
    return [_files(one, got.get((one.repository, one.revision))) for one in batch]


def _files(one: Found, fetched: hub.Fetched | None) -> hub.Fetched:
    if one.folder is not None:
        names = one.files or tuple(path.name for path in sorted(one.folder.iterdir()) if path.is_file())
        return hub.Fetched({name: one.folder / name for name in names if (one.folder / name).is_file()}, "")
    if fetched is None:
        return hub.Fetched({}, "")
    return replace(fetched, paths={name: fetched.paths[name] for name in one.files if name in fetched.paths})


def _local_sums(one: Found) -> dict[str, str]:
    if one.folder is None:
        return {}
    lists = hub.sums_of([path.name for path in one.folder.iterdir()])
    return {name: total for each in lists for name, total in hub.read_sums(one.folder / each).items()}


def _read(one: Found, files: hub.Fetched, device: Any, dtype: torch.dtype | None, lazy: bool) -> Any:
    """Return the dictionary of a record whose files are here."""
    import torch

    from circuit_lens.loading import weights

    if one.layout == "clt":
        return _cross_layer(one, files, device, dtype, lazy)
    if one.layout == "release":
        with fetching(f"the dictionary {one}", one.repository):
            module = weights.read_release(one.release, one.sae_id, None, device=device, dtype=dtype)
        module.cfg.metadata.source = f"hf:{one.repository}@{hub.HUB.commit(one.repository, one.revision)}"
        return _hooked(module, one.settings)
    if one.layout == "saelens":
        folder = one.folder or files.paths[one.files[0]].parent
        if one.release:
            module = weights.read_release(one.release, one.sae_id, folder, device=device, dtype=dtype)
        else:
            module = weights.read_saelens(folder, device=device, dtype=dtype)
        if one.folder is None:
            module.cfg.metadata.source = _source(one, files)
        return _hooked(module, one.settings)
    if one.layout == "gemma-scope-2-clt":
        clt = weights.gemma_scope_2_clt([files.paths[name] for name in one.files], one.settings, device, dtype, lazy)
        clt.metadata.update({} if one.folder else {"source": _source(one, files)})
        return clt
    path = files.paths[one.files[0]]
    settings = one.settings
    if one.layout == "gemma-scope-2":
        tensors = weights.read_gemma_scope_2(path)
        config = next((p for name, p in files.paths.items() if name.endswith("config.json")), None)
        settings = settings if config is None else gemma_scope_2_settings(config, settings)
    else:
        tensors = (weights.read_plt if one.layout == "plt" else weights.read_gemma_scope)(path)
    if not lazy:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    source = "" if one.folder else _source(one, files)
    return weights.make(tensors, settings, label=str(path), device=device, dtype=dtype, source=source)


def _hooked(module: Any, settings: Settings) -> Any:
    """Return a SAELens module with the hooks that were given in place of those that it names."""
    from circuit_lens.dictionaries.points import parse_hook

    metadata = module.cfg.metadata
    for name, hook in (("hook_name", settings.hook_in), ("hook_name_out", settings.hook_out)):
        if hook and metadata[name]:
            metadata[name] = f"blocks.{parse_hook(metadata[name]).layer}.{hook}"
    return module


def _cross_layer(one: Found, files: hub.Fetched, device: Any, dtype: torch.dtype | None, lazy: bool) -> Any:
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    folder = one.folder or files.paths[one.files[0]].parent
    hooks = {"hook_in": one.settings.hook_in, "hook_out": one.settings.hook_out}
    given = {name: [f"blocks.{i}.{hook}" for i in range(_n_layers(one))] for name, hook in hooks.items() if hook}
    clt = CrossLayerTranscoder.load(folder, lazy=lazy, dtype=dtype, device=device, **given)
    if one.folder is None:
        clt.metadata["source"] = _source(one, files)
    return clt


def _n_layers(one: Found) -> int:
    return sum(name.rsplit("/", 1)[-1].startswith(("W_enc_", "cfg.json")) for name in one.files)


def _source(one: Found, files: hub.Fetched) -> str:
    """Return where a dictionary came from: repository, commit, and its file, or its folder where it has several."""
    where = one.files[0].rpartition("/")[0] if one.layout in ("clt", "gemma-scope-2-clt") else one.files[0]
    return f"hf:{one.repository}@{files.commit}{'/' + where if where else ''}"

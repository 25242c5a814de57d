"""Dictionaries by name: SAELens releases, their ids, and folders in SAELens' format."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.failing import CommandError, fetching

if TYPE_CHECKING:
    import torch

_CONFIG = "cfg.json"
_LAYER = re.compile(r"layer[_.]?(\d+)")


@dataclass(frozen=True)
class Found:
    """Where one dictionary is: a local folder, or an id of a release (``repository`` is where that lies)."""

    folder: Path | None = None
    release: str = ""
    sae_id: str = ""
    repository: str = ""

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else f"{self.release}:{self.sae_id}"


def registry() -> Mapping[str, Any]:
    """Return SAELens' list of published dictionaries, which is part of its package."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return _transcoders_first(get_pretrained_saes_directory)


@cache
def _transcoders_first(read: Any) -> dict[str, Any]:
    listed = read()
    return dict(sorted(listed.items(), key=lambda item: not _is_transcoder(item[0])))


def _is_transcoder(release: str) -> bool:
    return "transcoder" in release or "clt" in release


def releases_for(model: str) -> list[str]:
    """Return the releases of transcoders for a model, by its name with or without organisation."""
    wanted = model.lower().rsplit("/", 1)[-1]
    return [name for name, r in registry().items() if _is_transcoder(name) and wanted == r.model.lower().split("/")[-1]]


def find_dictionaries(names: Sequence[str]) -> list[Found]:
    """Return where the dictionaries of the given names are, without loading any.

    A name is a folder in SAELens' format, or one that has such folders; a release, which means its dictionary of every
    layer; or ``release:id``, where the id may have ``*`` and ``?``.

    Raises:
        CommandError: a name that nothing has, or a release with several dictionaries per layer.
    """
    return [found for name in names for found in _find(name)]


def _find(name: str) -> list[Found]:
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        return _in_folder(folder)
    release, colon, pattern = name.partition(":")
    if release in registry():
        return _in_release(release, pattern if colon else None)
    if colon and pattern and re.fullmatch(r"[\w.-]+/[\w.-]+", release) and "*" not in pattern:
        return [Found(release=release, sae_id=pattern, repository=release)]
    close = difflib.get_close_matches(release, list(registry()), n=3, cutoff=0.4)
    hint = f"; nearest releases: {', '.join(close)}" if close else ""
    raise CommandError(
        f"--dictionaries {name}: there is no such folder, and SAELens knows no release {release!r}{hint}. Give a "
        "release, release:id, owner/repository:id, or a folder in SAELens' format (with cfg.json)"
    )


def _in_folder(folder: Path) -> list[Found]:
    if (folder / _CONFIG).is_file():
        return [Found(folder=folder)]
    inner = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}"))
    if not inner:
        raise CommandError(
            f"--dictionaries {folder}: neither the folder nor a folder in it has a {_CONFIG}; give what "
            "SAE.save_model(folder) wrote"
        )
    return [Found(folder=path) for path in inner]


def _in_release(release: str, pattern: str | None) -> list[Found]:
    entry = registry()[release]
    ids = [str(sae_id) for sae_id in entry.saes_map]
    chosen = ids if pattern is None else [i for i in ids if fnmatch.fnmatchcase(i, pattern)]
    if not chosen:
        close = difflib.get_close_matches(str(pattern), ids, n=3, cutoff=0.3)
        raise CommandError(
            f"--dictionaries {release}:{pattern}: the release has no such id"
            f"{'; nearest: ' + ', '.join(close) if close else ''}. Its ids are of the form {_forms(ids)}"
        )
    layers = [match.group(1) for sae_id in chosen if (match := _LAYER.search(sae_id))]
    if len(layers) != len(set(layers)):
        raise CommandError(
            f"--dictionaries {release}{'' if pattern is None else ':' + pattern}: {len(chosen)} dictionaries, several "
            f"for a layer; choose one kind: {', '.join(f'{release}:{form}' for form in _forms(chosen).split(', '))}"
        )
    return [Found(release=release, sae_id=sae_id, repository=entry.repo_id) for sae_id in chosen]


def _forms(ids: Sequence[str], limit: int = 8) -> str:
    """Return the kinds of ids, the layer's number a ``*``."""
    forms = list(dict.fromkeys(_LAYER.sub(lambda m: m.group(0).removesuffix(m.group(1)) + "*", i) for i in ids))
    return ", ".join(forms[:limit]) + (", ..." if len(forms) > limit else "")


def load_dictionaries(found: Sequence[Found], device: torch.device, dtype: str) -> list[Any]:
    """Load dictionaries by SAELens, each checked to be one that can be attributed before the next is fetched.

    Raises:
        CommandError: files that are missing, damaged, or cannot be fetched.
        DictionaryError: an architecture that cannot be attributed.
    """
    from sae_lens import SAE

    from circuit_lens.dictionaries.saelens import adapt

    modules = []
    for one in found:
        with fetching(f"the dictionary {one}", str(one.folder or one.repository)):
            if one.folder is not None:
                module = SAE.load_from_disk(str(one.folder), device=str(device), dtype=dtype)
            else:
                module = SAE.from_pretrained(one.release, one.sae_id, device=str(device), dtype=dtype)
        adapt(module)
        modules.append(module.eval().requires_grad_(False))
    return modules

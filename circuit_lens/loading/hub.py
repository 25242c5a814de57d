"""Repositories of the Hugging Face hub: what is in them, and files of them on this computer.

Everything that reaches the network for dictionaries passes through :class:`Hub`; files land in the cache of
``huggingface_hub``, which writes them all or nothing and resumes what was interrupted.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuit_lens.errors import DictionaryError
from circuit_lens.loading.failures import FetchError, LoadError, fetching, offline, readable_size

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM_FILES = ("sha256", "SHA256SUMS", "sha256sums.txt")


@dataclass(frozen=True)
class Address:
    """A place on the hub: ``owner/name``, its revision (None: the default branch), a folder in it ("" is the root)."""

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}{revision}{'/' + self.folder if self.folder else ''}"


def parse_address(text: str) -> Address:
    """Return the address of ``hf:owner/name[@revision][/folder]``; ``hf://owner/name/file?revision=r`` is one too.

    >>> parse_address("hf:mntss/clt-gemma-2-2b-426k@main/sub")
    Address(repository='mntss/clt-gemma-2-2b-426k', revision='main', folder='sub')

    Raises:
        LoadError: Another form.
    """
    match = re.fullmatch(r"hf:(?://)?([\w.-]+/[\w.-]+)(?:@([^/?]+))?(?:/([^?]*))?(?:\?revision=(.+))?", text)
    if match is None or (match[2] and match[4]) or ".." in (match[3] or "").split("/"):
        raise LoadError(f"{text!r} is no address on the hub; write hf:owner/name[@revision][/folder]")
    return Address(match[1], match[2] or match[4], (match[3] or "").strip("/"))


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        commit: The revision, resolved.
        sizes: Name to bytes, None where the hub does not say.
    """

    commit: str
    sizes: Mapping[str, int | None]


class Hub:
    """The one way to the hub. Tests put another in the place of :data:`HUB`."""

    def listing(self, repository: str, revision: str | None) -> Listing:
        """Return the files of a repository; where it cannot be reached, those in the cache.

        Raises:
            FetchError: It cannot be reached and nothing of it is cached.
        """
        folder = self._cached_snapshot(repository, revision)
        if not offline():
            from huggingface_hub import HfApi

            try:
                with fetching(f"the list of files of {repository}", repository):
                    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
                    return Listing(str(info.sha), {f.rfilename: f.size for f in info.siblings or ()})
            except FetchError:
                if folder is None:
                    raise
        if folder is None:
            raise FetchError(
                f"would list the files of https://huggingface.co/{repository}{_at(revision)}, which HF_HUB_OFFLINE "
                f"forbids, and nothing of it is in the cache ({_cache()}); unset it, or {_provide(repository)}"
            )
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return Listing(folder.name, {name: (folder / name).stat().st_size for name in names})

    def cached(self, repository: str, revision: str | None, name: str) -> Path | None:
        """Return where a file lies in the cache, None where it does not."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repository, name, revision=revision)
        return Path(path) if isinstance(path, str) and Path(path).is_file() else None

    def download(self, repository: str, revision: str | None, names: Sequence[str], *, progress: bool | None) -> None:
        """Fetch files into the cache.

        Raises:
            FetchError: They cannot be fetched.
        """
        from huggingface_hub import snapshot_download

        with _bars(progress), fetching(f"{len(names)} file(s) of {repository}", repository):
            snapshot_download(repository, revision=revision, allow_patterns=[glob.escape(name) for name in names])

    def commit(self, repository: str, revision: str | None) -> str:
        """Return the commit of what is cached of a revision, "" where nothing is."""
        folder = self._cached_snapshot(repository, revision)
        return "" if folder is None else folder.name

    def _cached_snapshot(self, repository: str, revision: str | None) -> Path | None:
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        reference = root / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        folder = root / "snapshots" / (commit or "main")
        return folder if folder.is_dir() else None


HUB = Hub()


@dataclass(frozen=True)
class Fetched:
    """Files of a repository on this computer.

    Attributes:
        paths: Name in the repository to path.
        commit: The revision they are of, as the cache names it.
    """

    paths: Mapping[str, Path]
    commit: str


def fetch(
    address: Address,
    names: Sequence[str],
    *,
    optional: Sequence[str] = (),
    about: int | None = None,
    progress: bool | None = None,
) -> Fetched:
    """Return files of a repository, from the cache or the hub.

    Args:
        address: Repository and revision; names are given from its root.
        names: Files that must be there.
        optional: Files that may be missing from the repository; without network, from the cache.
        about: Bytes to fetch, for the message, where known.
        progress: True or False: bars on stderr or none; None: as huggingface_hub is set.

    Raises:
        FetchError: A file is not in the cache and cannot be fetched: names them, their size and what to do.
        DictionaryError: A fetched file whose SHA-256 is not the one the hub gives.
    """
    hub, revision = HUB, address.revision
    every = (*names, *optional)
    found = {name: hub.cached(address.repository, revision, name) for name in every}
    missing = [name for name in names if found[name] is None]
    if missing and offline():
        size = f", about {readable_size(about)}" if about else ""
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise FetchError(
            f"would fetch {len(missing)} file(s) ({shown}{size}) from https://huggingface.co/{address.repository}"
            f"{_at(revision)}, which HF_HUB_OFFLINE forbids; unset it, or {_provide(address.repository)}"
        )
    if missing:
        new = {name for name in every if found[name] is None}
        # All of them, so that they are of one commit where the branch has moved on; what is cached is not sent again.
        hub.download(address.repository, revision, every, progress=progress)
        found = {name: hub.cached(address.repository, revision, name) for name in every}
        absent = [name for name in names if found[name] is None]
        if absent:
            raise FetchError(
                f"https://huggingface.co/{address.repository}{_at(revision)} has no {', '.join(absent[:4])}; check the "
                "revision and the names"
            )
        for name in new:
            _check_blob(found[name])
    paths = {name: path for name, path in found.items() if path is not None}
    return Fetched(paths, _commit(paths))


def check_sums(paths: Mapping[str, Path], sums: Mapping[str, str]) -> None:
    """Compare files with the SHA-256 sums that are given for them.

    Raises:
        DictionaryError: A file that differs.
    """
    for name, path in paths.items():
        wanted = sums.get(name)
        if wanted is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.lower():
            raise DictionaryError(
                f"{path} is damaged or another file: its SHA-256 is {found}, it must be {wanted.lower()}; delete it "
                "and fetch it again"
            )


def sums_of(names: Sequence[str]) -> list[str]:
    """Return which of the names are lists of SHA-256 sums."""
    return [name for name in names if name.rsplit("/", 1)[-1] in _SUM_FILES]


def read_sums(path: Path, inside: str = "") -> dict[str, str]:
    """Return name to sum of a list as ``sha256sum`` writes it; names get the folder ``inside`` put before them.

    Raises:
        DictionaryError: A line of another form.
    """
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line.rstrip())
        if match is None:
            raise DictionaryError(f"{path}: {line[:80]!r} is no line of a list of SHA-256 sums ('<64 digits>  <name>')")
        name = match[2].removeprefix("./")
        sums[f"{inside}/{name}" if inside else name] = match[1]
    return sums


def _check_blob(path: Path | None) -> None:
    """Compare a fetched file with the SHA-256 that names it in the cache (large files have one)."""
    if path is not None and _SHA256.fullmatch(path.resolve().name):
        check_sums({path.name: path}, {path.name: path.resolve().name})


def _commit(paths: Mapping[str, Path]) -> str:
    for path in paths.values():
        parts = path.parts
        if "snapshots" in parts:
            return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return ""


@contextlib.contextmanager
def _bars(progress: bool | None) -> Iterator[None]:
    """Turn the client's progress bars on or off for a while."""
    if progress is None:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (enable_progress_bars if progress else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _provide(repository: str) -> str:
    return (
        f"fetch it where there is network (hf download {repository}) and give the folder, or copy it into the cache of "
        "huggingface_hub"
    )

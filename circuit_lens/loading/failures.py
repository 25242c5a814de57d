"""What can go wrong while loading: a name that nothing has, and files that cannot be fetched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from circuit_lens.errors import CircuitLensError

# Packages whose exceptions mean that something could not be fetched or read.
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "safetensors")


class LoadError(CircuitLensError, ValueError):
    """A name of nothing that can be loaded, or one that does not say which of several."""


class FetchError(LoadError):
    """Files that cannot be fetched: what they are, where they lie, how large they are, and how to provide them."""


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextlib.contextmanager
def fetching(what: str, repository: str) -> Iterator[None]:
    """Turn what the hub's client or a file's reader raises into a FetchError.

    Args:
        what: What is loaded, for the message.
        repository: Of the hub, or a local folder.

    Raises:
        FetchError: As said; errors of circuit_lens pass as they are.
    """
    try:
        yield
    except CircuitLensError:
        raise
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        if not isinstance(error, OSError | ValueError) and module not in _CLIENTS:
            raise
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        local = Path(repository).is_dir()
        source = f"It lies in {repository}" if local else f"It is fetched from https://huggingface.co/{repository}"
        advice = "" if local else (
            ", which HF_HUB_OFFLINE forbids; unset it, or fetch it once elsewhere" if offline() else
            ": check the name, the network, and HF_TOKEN for a gated one; once fetched, it is loaded offline"
        )  # fmt: skip
        raise FetchError(f"could not load {what}. {source}{advice}. Reason: {reason}") from error


def readable_size(n_bytes: float) -> str:
    """Return a size with its unit, powers of 1000.

    >>> readable_size(28.5e9), readable_size(4e3)
    ('28 GB', '4 kB')
    """
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if n_bytes >= 999.5:
            n_bytes, unit = n_bytes / 1000, larger
    return f"{n_bytes:.0f} {unit}" if n_bytes >= 9.95 or n_bytes == int(n_bytes) else f"{n_bytes:.1f} {unit}"

"""What ``--dictionaries`` means: the names that :mod:`circuit_lens.loading` knows, and errors that name the option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.failing import CommandError, argument_errors
from circuit_lens.loading.layouts import Found as Found
from circuit_lens.loading.names import releases_for as releases_for

if TYPE_CHECKING:
    import torch

    from circuit_lens.loading.published import Published

OPTION = "--dictionaries"
__all__ = ["CommandError", "Found", "find_dictionaries", "load_dictionaries", "releases_for"]


def find_dictionaries(names: Sequence[str]) -> list[Found]:
    """Return where the dictionaries of the given names are, without loading any.

    A name is what :func:`circuit_lens.loading.load_dictionaries` takes: a folder in any layout, ``hf:owner/name``, a
    release of SAELens (its dictionary of every layer), ``release:id`` with ``*`` and ``?``, and ``#rule`` after any of
    these (``#lowest-l0``, ``#80``, ``#expression``).

    Raises:
        CommandError: A name that nothing has, or that does not say which of several.
    """
    from circuit_lens.loading.names import find

    with argument_errors():
        return [found for name in names for found in find(name, option=OPTION)]


def load_dictionaries(
    found: Sequence[Found], device: torch.device, dtype: str, record: Published | None = None
) -> list[Any]:
    """Load dictionaries, each checked to be one that can be attributed; ``record`` is the table's, for its sums.

    Raises:
        CommandError: Files that cannot be fetched.
        DictionaryError: Files that are damaged or contradict each other, or an architecture that cannot be attributed.
    """
    import torch

    from circuit_lens.loading.dictionaries import load_found

    with argument_errors():
        kind, about, sums = getattr(torch, dtype), record and record.download, record and record.sha256
        return load_found(found, device=device, dtype=kind, about=about, sha256=sums)

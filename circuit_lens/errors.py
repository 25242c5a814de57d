"""The exceptions of circuit_lens: each says what was given, what is valid, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CircuitLensError(Exception):
    """Base class of every error that circuit_lens raises on purpose."""


class HookError(CircuitLensError, ValueError):
    """A hook name that the model lacks, or a hook point that never fired."""


class DictionaryError(CircuitLensError, ValueError):
    """A dictionary that cannot be attributed, or that does not fit the model it is given with."""


class ReconstructionError(DictionaryError):
    """A dictionary that reconstructs its target worse than nothing: wrong input hook or processed weights."""


class CacheError(CircuitLensError, KeyError):
    """An activation cache that lacks an entry or holds one of the wrong shape."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TokensError(CircuitLensError, ValueError):
    """A prompt that is empty, too long, or holds tokens the model does not know."""


class TokenNotFoundError(CircuitLensError, ValueError):
    """A position given as text that names no token, or several."""


class TargetError(CircuitLensError, ValueError):
    """An attribution target that is not one token, one feature or one scalar."""


class LinearizationError(CircuitLensError, RuntimeError):
    """The frozen model is not linear: a hook that should freeze does not."""


class ConsistencyError(CircuitLensError, RuntimeError):
    """Activations that do not fit together (NaN, another model, another prompt)."""


class NodeNotFoundError(CircuitLensError, KeyError):
    """A node that the graph does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InterventionError(CircuitLensError, ValueError):
    """An intervention that cannot be done as it is written: no such feature, two that contradict, an empty group."""


class PatchscopeError(CircuitLensError, ValueError):
    """A patchscope that cannot be done as it is written: no such layer, a width that does not fit, a map not fitted."""


class GraphFileError(CircuitLensError, ValueError):
    """A file that is not a graph, is damaged, or was written by a newer version."""


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """Return ``"; nearest: a, b"`` for the names of ``valid`` that look most like ``name``, or ``""``."""
    close = difflib.get_close_matches(name, list(valid), n=n, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


class GraphError(CircuitLensError, ValueError):
    """Columns that do not make a graph (wrong order, lengths, shapes), or a question the graph cannot answer."""

"""Names of layers and scales as tables and pictures show them, and the measures of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult

Measure = Literal["precision", "surprisal", "nll", "entropy", "accuracy"]


def layer_name(layer: int | None) -> str:
    """Return a layer's name: its number, ``emb`` for the embedding, ``vector`` for none.

    >>> [layer_name(layer) for layer in (-1, 0, 25, None)]
    ['emb', '0', '25', 'vector']
    """
    return "vector" if layer is None else "emb" if layer == -1 else str(layer)


def scale_name(scale: float) -> str:
    """Return a scale's name.

    >>> scale_name(0.5)
    '× 0.5'
    """
    return f"× {scale:g}"


def target_names(result: PatchscopeResult) -> list[str]:
    """Return the names of the target layers; with "same" those of the source layers."""
    layers = result.source_layers if isinstance(result.target_layers, str) else result.target_layers
    return [layer_name(layer) for layer in layers]


def target_line(result: PatchscopeResult) -> str:
    """Return the target prompt in one line; how many there are, if there are several."""
    distinct = list(dict.fromkeys(result.targets))
    text = "target " + distinct[0].replace("\n", "⏎")
    return text + (f" and {len(distinct) - 1} more" if len(distinct) > 1 else "")

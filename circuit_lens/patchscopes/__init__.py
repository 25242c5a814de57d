"""Patchscopes: hidden states moved into an inspection prompt, and what the model then says (2401.06102).

The names below are found on first use: importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens.patchscopes.explain import Explanation, explain_feature
    from circuit_lens.patchscopes.fitting import fit_map
    from circuit_lens.patchscopes.labels import NodeLabels, label_nodes
    from circuit_lens.patchscopes.maps import Fitted, Identity, Map, ModuleMap, ScaleBias, Zero, load_map
    from circuit_lens.patchscopes.metrics import Accuracy
    from circuit_lens.patchscopes.patchscope import patchscope
    from circuit_lens.patchscopes.result import PatchscopeResult
    from circuit_lens.patchscopes.sources import At, Vectors
    from circuit_lens.patchscopes.targets import Preset, Target

__all__ = [
    "Accuracy",
    "At",
    "Explanation",
    "Fitted",
    "Identity",
    "Map",
    "ModuleMap",
    "NodeLabels",
    "PatchscopeResult",
    "Preset",
    "ScaleBias",
    "Target",
    "Vectors",
    "Zero",
    "explain_feature",
    "fit_map",
    "label_nodes",
    "load_map",
    "patchscope",
]

_HOMES = {
    "Accuracy": "circuit_lens.patchscopes.metrics",
    "At": "circuit_lens.patchscopes.sources",
    "Explanation": "circuit_lens.patchscopes.explain",
    "Fitted": "circuit_lens.patchscopes.maps",
    "Identity": "circuit_lens.patchscopes.maps",
    "Map": "circuit_lens.patchscopes.maps",
    "ModuleMap": "circuit_lens.patchscopes.maps",
    "NodeLabels": "circuit_lens.patchscopes.labels",
    "PatchscopeResult": "circuit_lens.patchscopes.result",
    "Preset": "circuit_lens.patchscopes.targets",
    "ScaleBias": "circuit_lens.patchscopes.maps",
    "Target": "circuit_lens.patchscopes.targets",
    "Vectors": "circuit_lens.patchscopes.sources",
    "Zero": "circuit_lens.patchscopes.maps",
    "explain_feature": "circuit_lens.patchscopes.explain",
    "fit_map": "circuit_lens.patchscopes.fitting",
    "label_nodes": "circuit_lens.patchscopes.labels",
    "load_map": "circuit_lens.patchscopes.maps",
    "patchscope": "circuit_lens.patchscopes.patchscope",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in, once."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

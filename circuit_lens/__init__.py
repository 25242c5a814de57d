"""Attribution graphs, interventions and patchscopes for TransformerLens models with SAELens dictionaries.

The names of this module are found on first use (PEP 562), so that ``import circuit_lens`` costs milliseconds: torch and
the libraries that stand on it are imported by what needs them.

>>> import circuit_lens as cl
>>> issubclass(cl.HookError, cl.CircuitLensError)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuit_lens import errors as errors
    from circuit_lens import loading as loading
    from circuit_lens import patchscopes as patchscopes
    from circuit_lens import training as training
    from circuit_lens import zoo as zoo
    from circuit_lens.attribution.replacement import LocalReplacementModel as LocalReplacementModel
    from circuit_lens.attribution.targets import direction as direction
    from circuit_lens.attribution.targets import logit_difference as logit_difference
    from circuit_lens.attribution.targets import salient_logits as salient_logits
    from circuit_lens.attribution.targets import token_logits as token_logits
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder as CrossLayerTranscoder
    from circuit_lens.dictionaries.neurons import NeuronDictionary as NeuronDictionary
    from circuit_lens.dictionaries.neurons import neurons as neurons
    from circuit_lens.errors import CacheError as CacheError
    from circuit_lens.errors import CircuitLensError as CircuitLensError
    from circuit_lens.errors import ConsistencyError as ConsistencyError
    from circuit_lens.errors import DictionaryError as DictionaryError
    from circuit_lens.errors import GraphError as GraphError
    from circuit_lens.errors import GraphFileError as GraphFileError
    from circuit_lens.errors import HookError as HookError
    from circuit_lens.errors import InterventionError as InterventionError
    from circuit_lens.errors import LinearizationError as LinearizationError
    from circuit_lens.errors import NodeNotFoundError as NodeNotFoundError
    from circuit_lens.errors import PatchscopeError as PatchscopeError
    from circuit_lens.errors import ReconstructionError as ReconstructionError
    from circuit_lens.errors import TargetError as TargetError
    from circuit_lens.errors import TokenNotFoundError as TokenNotFoundError
    from circuit_lens.errors import TokensError as TokensError
    from circuit_lens.evaluation.figures import Evaluation as Evaluation
    from circuit_lens.graph.card import ValidationCard as ValidationCard
    from circuit_lens.graph.edits import Direction as Direction
    from circuit_lens.graph.edits import ErrorNode as ErrorNode
    from circuit_lens.graph.edits import Intervention as Intervention
    from circuit_lens.graph.graph import AttributionGraph as AttributionGraph
    from circuit_lens.graph.grouping import Grouping as Grouping
    from circuit_lens.graph.grouping import group as group
    from circuit_lens.graph.nodes import Feature as Feature
    from circuit_lens.graph.nodes import Node as Node
    from circuit_lens.graph.nodes import NodeKind as NodeKind
    from circuit_lens.graph.overlap import overlap as overlap
    from circuit_lens.graph.store import load_graph as load_graph
    from circuit_lens.graph.supernode_picture import load_picture as load_picture
    from circuit_lens.graph.supernodes import Supernode as Supernode
    from circuit_lens.interop.neuronpedia_url import supernodes_from_url as supernodes_from_url
    from circuit_lens.interventions import patching as patching
    from circuit_lens.interventions.plan import InterventionPlan as InterventionPlan
    from circuit_lens.interventions.study import CardSettings as CardSettings
    from circuit_lens.interventions.validation import validate_many as validate_many
    from circuit_lens.loading.dictionaries import load_dictionaries as load_dictionaries
    from circuit_lens.loading.failures import FetchError as FetchError
    from circuit_lens.loading.failures import LoadError as LoadError
    from circuit_lens.loading.pairs import load as load
    from circuit_lens.patchscopes import presets as presets
    from circuit_lens.patchscopes.explain import explain_feature as explain_feature
    from circuit_lens.patchscopes.patchscope import patchscope as patchscope
    from circuit_lens.patchscopes.result import PatchscopeResult as PatchscopeResult
    from circuit_lens.patchscopes.sources import At as At
    from circuit_lens.patchscopes.sources import Vectors as Vectors
    from circuit_lens.patchscopes.targets import Target as Target
    from circuit_lens.replacement_model import ReplacementModel as ReplacementModel

__version__ = "0.1.0"

_HOMES = {  # module: the public names that live there
    "circuit_lens.replacement_model": ("ReplacementModel",),
    "circuit_lens.attribution.replacement": ("LocalReplacementModel",),
    "circuit_lens.attribution.targets": ("direction", "logit_difference", "salient_logits", "token_logits"),
    "circuit_lens.dictionaries.cross_layer": ("CrossLayerTranscoder",),
    "circuit_lens.dictionaries.neurons": ("NeuronDictionary", "neurons"),
    "circuit_lens.evaluation.figures": ("Evaluation",),
    "circuit_lens.loading.dictionaries": ("load_dictionaries",),
    "circuit_lens.loading.failures": ("FetchError", "LoadError"),
    "circuit_lens.loading.pairs": ("load",),
    "circuit_lens.graph.graph": ("AttributionGraph",),
    "circuit_lens.graph.card": ("ValidationCard",),
    "circuit_lens.graph.edits": ("Direction", "ErrorNode", "Intervention"),
    "circuit_lens.graph.grouping": ("Grouping", "group"),
    "circuit_lens.graph.nodes": ("Feature", "Node", "NodeKind"),
    "circuit_lens.graph.overlap": ("overlap",),
    "circuit_lens.graph.store": ("load_graph",),
    "circuit_lens.graph.supernode_picture": ("load_picture",),
    "circuit_lens.graph.supernodes": ("Supernode",),
    "circuit_lens.interventions.plan": ("InterventionPlan",),
    "circuit_lens.interventions.study": ("CardSettings",),
    "circuit_lens.interventions.validation": ("validate_many",),
    "circuit_lens.interop.neuronpedia_url": ("supernodes_from_url",),
    "circuit_lens.patchscopes.explain": ("explain_feature",),
    "circuit_lens.patchscopes.patchscope": ("patchscope",),
    "circuit_lens.patchscopes.result": ("PatchscopeResult",),
    "circuit_lens.patchscopes.sources": ("At", "Vectors"),
    "circuit_lens.patchscopes.targets": ("Target",),
    "circuit_lens.errors": (
        "CacheError",
        "CircuitLensError",
        "ConsistencyError",
        "DictionaryError",
        "GraphError",
        "GraphFileError",
        "HookError",
        "InterventionError",
        "LinearizationError",
        "NodeNotFoundError",
        "PatchscopeError",
        "ReconstructionError",
        "TargetError",
        "TokenNotFoundError",
        "TokensError",
    ),
}
_MODULES = {
    "errors": "circuit_lens.errors",
    "loading": "circuit_lens.loading",
    "patching": "circuit_lens.interventions.patching",
    "patchscopes": "circuit_lens.patchscopes",
    "presets": "circuit_lens.patchscopes.presets",
    "training": "circuit_lens.training",
    "zoo": "circuit_lens.zoo",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_MODULES, *_HOME_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in, once."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOME_OF:
        raise AttributeError(f"module 'circuit_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Results as lines of plain data: for tables, and for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from circuit_lens.graph.rates import finite
from circuit_lens.patchscopes.readout import Readout

if TYPE_CHECKING:
    from circuit_lens.patchscopes.result import PatchscopeResult


def records(result: PatchscopeResult) -> list[dict[str, Any]]:
    """Return a line for each item, source layer, target layer and scale: names, text, tokens and figures."""
    return [
        {
            "item": result.items[i],
            "source_layer": result.source_layers[s],
            "target_layer": result.target_of(s, t),
            "scale": result.scales[a],
            **line,
        }
        for (i, s, t, a), line in zip(np.ndindex(*result.shape), _lines(result, result.patched), strict=True)
    ]


def _lines(result: PatchscopeResult, readout: Readout) -> Iterator[dict[str, Any]]:
    """Yield what each run says, in the order of the axes."""
    texts, tops = result.wording.texts(readout).flat, result.wording.tops(readout)[..., 0].flat
    parts = (readout.top_logprobs[..., 0].exp(), readout.entropy, readout.surprisal, readout.source_nll)
    figures = zip(*[part.flatten().tolist() for part in parts], strict=True)
    for text, top, (share, entropy, surprisal, source_nll) in zip(texts, tops, figures, strict=True):
        yield {
            "text": text, "top_token": top, "probability": share, "entropy": finite(entropy),
            "surprisal": finite(surprisal), "source_nll": finite(source_nll),
        }  # fmt: skip


def as_json(result: PatchscopeResult) -> dict[str, Any]:
    """Return everything but logits and states as data that JSON can say: names, cells and controls."""
    again = None
    if result.reembedded is not None:
        layers = result.source_layers if result.target_layers == "same" else result.target_layers
        names = [
            {"item": item, "target_layer": layer, "scale": scale}
            for item in result.items
            for layer in layers
            for scale in result.scales
        ]
        again = [name | line for name, line in zip(names, _lines(result, result.reembedded), strict=True)]
    source = None if result.source_top is None else [result.wording.text([i]) for i in result.source_top.tolist()]
    bare = zip(result.items, _lines(result, result.unpatched), strict=True)
    return {
        "settings": result.settings,
        "notes": list(result.notes),
        "targets": list(result.targets),
        "items": list(result.items),
        "source_top": source,
        "unpatched": [{"item": item} | line for item, line in bare],
        "reembedded": again,
        "cells": records(result),
    }

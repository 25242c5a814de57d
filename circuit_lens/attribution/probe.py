"""One short run of a model when it is bound: does it do what its linear parts say? A cache alone cannot tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from circuit_lens.attribution.frozen import freeze
from circuit_lens.attribution.linear_maps import MapsUnavailableError, read_weights
from circuit_lens.attribution.values import compute_dtype, from_prompt
from circuit_lens.errors import ConsistencyError
from circuit_lens.hooks import suspended
from circuit_lens.protocols import HookedModel
from circuit_lens.running import model_device

_N_TOKENS = 4


@dataclass(frozen=True)
class Probe:
    """What the short run showed; None where all is well, or where the model does not run on it.

    Attributes:
        maps: Why the blocks are not what their linear parts say; the reference path is then needed.
        logits: Why the logits do not follow from the residual stream; no graph can be made from a cache then.
    """

    maps: str | None = None
    logits: str | None = None


def probe(model: HookedModel) -> Probe:
    """Run the model on four tokens, with every hook of the user silent, and hold it against its linear parts."""
    n_tokens = min(_N_TOKENS, int(getattr(model.cfg, "n_ctx", None) or _N_TOKENS))
    tokens = torch.linspace(0, model.cfg.d_vocab - 1, n_tokens).long().to(model_device(model))
    points = list({id(point): point for point in model.hook_dict.values()}.values())
    try:
        with suspended(points):
            values = from_prompt(model, tokens)
            frozen = freeze(model, read_weights(model, compute_dtype(model)), values, linear_norms=False)
    except MapsUnavailableError as error:
        return Probe(maps=str(error))
    except ConsistencyError as error:
        return Probe(logits=str(error))
    except Exception:
        return Probe()
    if frozen.patches:
        patch = frozen.patches[0]
        where = f"blocks.{patch.layer}.hook_{patch.site}"
        return Probe(maps=f"the residual stream departs from norm, attention with constant pattern, and MLP at {where}")
    return Probe()

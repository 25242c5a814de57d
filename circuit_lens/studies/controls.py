"""Controls of swaps: random features, whole positions and mean differences, dictionaries that were never trained."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.graph.edits import Direction, Intervention
from circuit_lens.graph.nodes import Feature
from circuit_lens.studies.lab import Lab
from circuit_lens.zoo.batches import held_out_text
from circuit_lens.zoo.corpus import Corpus

if TYPE_CHECKING:
    from circuit_lens.replacement_model import ReplacementModel

ROW_LENGTH = 64
TEXT_SEED = 9000
"""Of the text on which random dictionaries get their thresholds; no model was trained on it."""


def random_features(lab: Lab, deltas: Mapping[Feature, float], *, seed: int) -> list[Intervention]:
    """Return changes of as many random features as a swap changes, of the same size in the residual stream.

    In every layer, the swap's changes of activations go to features drawn from the whole dictionary, and are scaled so
    that what they write has the norm of what the swap writes there.
    """
    rng = random.Random(seed)
    interventions = []
    for site in sorted({str(f.site) for f in deltas}):
        own = [(f, delta) for f, delta in deltas.items() if f.site == site]
        d = lab.rm.binding.dictionary(own[0][0].layer, site)
        drawn = rng.sample(range(d.d_sae), len(own))
        size = [_written(d, [f.index for f, _ in own], [delta for _, delta in own]).norm(),
                _written(d, drawn, [delta for _, delta in own]).norm()]  # fmt: skip
        scale = float(size[0] / size[1].clamp_min(1e-9))
        interventions += [
            Feature(f.layer, f.pos, index, site).add(scale * delta)
            for (f, delta), index in zip(own, drawn, strict=True)
        ]
    return interventions


def _written(d: Any, index: list[int], values: list[float]) -> Float[Tensor, "d_out"]:
    """Return what changes of activations write to the first output."""
    rows = d.decoder_rows(torch.tensor(index), torch.float32)[:, 0]
    return torch.tensor(values) @ rows


def add_vector(vector: Float[Tensor, "d_model"], layer: int, pos: int, name: str) -> list[Intervention]:
    """Return a vector added to the residual stream after a block; nothing where the vector is zero."""
    if float(vector.norm()) == 0.0:
        return []
    return [Direction(vector, layer, pos, "hook_resid_post", name).add(1.0)]


@torch.no_grad()
def random_dictionaries(
    rm: ReplacementModel, decoder: Literal["untrained", "fitted"], *, corpus: Corpus | None = None, seed: int = 0
) -> ReplacementModel:
    """Return the model with dictionaries of random encoders, whose features fire exactly as often as the trained ones.

    Encoder columns are random directions of the trained columns' norms; thresholds and scales are set on 6000 tokens of
    fresh text so that every feature has its counterpart's frequency (hence the same active features per token) and
    about its mean activation. ``"untrained"``: decoder rows are random directions of the trained rows' norms too;
    ``"fitted"``: the decoder is the ridge regression of the MLP output on these activations. The second is trained in
    part, and explains most of the output: it asks whether any code of this sparsity would do.
    """
    from circuit_lens.replacement_model import ReplacementModel

    corpus = Corpus() if corpus is None else corpus
    generator = torch.Generator().manual_seed(seed)
    ids = rm.model.tokenizer.get_vocab()
    rows = held_out_text(corpus, ids, n_tokens=6000, length=ROW_LENGTH, seed=TEXT_SEED).rows
    names = [name for d in rm.dictionaries for name in (d.hook_in, d.hooks_out[0])]
    _, cache = rm.model.run_with_cache(rows.tokens, names_filter=names)
    modules = []
    for d in rm.dictionaries:
        x, y = cache[d.hook_in][rows.real].float(), cache[d.hooks_out[0]][rows.real].float()
        module: Any = copy.deepcopy(getattr(d, "module"))  # noqa: B009
        acts = _random_encoder(module, d.activate(d.pre_acts(x), x), x, generator)
        if decoder == "untrained":
            module.W_dec.data = _random_rows(module.W_dec.data, generator)
        else:
            _fit_decoder(module, acts, y)
        modules.append(module)
    return ReplacementModel(rm.model, modules)


def _random_rows(like: Float[Tensor, "n width"], generator: torch.Generator) -> Float[Tensor, "n width"]:
    """Return random rows of the same norms."""
    rows = torch.randn(like.shape, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True) * like.norm(dim=1, keepdim=True)


def _random_encoder(
    module: Any, trained: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"], generator: torch.Generator
) -> Float[Tensor, "n d_sae"]:
    """Give a module a random encoder of the trained one's frequencies; return its activations."""
    weight = _random_rows(module.W_enc.data.T, generator).T
    frequency = (trained > 0).float().mean(0)
    strength = trained.sum(0) / (trained > 0).float().sum(0).clamp_min(1)
    pre = x @ weight
    ranked = pre.sort(dim=0, descending=True).values
    n = len(x)
    count = (frequency * n).round().long()
    padded = torch.cat([ranked[:1] + 1.0, ranked, ranked[-1:] - 1.0])
    # Between the last that fires and the first that does not.
    columns = torch.arange(pre.shape[1])
    limit = (padded[count, columns] + padded[count + 1, columns]) / 2
    acts = torch.relu(pre - limit)
    scale = strength / (acts.sum(0) / (acts > 0).float().sum(0).clamp_min(1)).clamp_min(1e-6)
    module.W_enc.data = weight * scale
    module.b_enc.data = -limit * scale
    if hasattr(module, "threshold"):
        module.threshold.data = torch.zeros_like(limit)
    return acts * scale


def _fit_decoder(module: Any, acts: Float[Tensor, "n d_sae"], y: Float[Tensor, "n d_out"]) -> None:
    """Give a module the decoder and bias that explain the outputs best, with a light ridge."""
    mean_acts, mean_y = acts.mean(0), y.mean(0)
    centred = acts - mean_acts
    gram = centred.T @ centred + 1e-3 * len(acts) * acts.pow(2).mean() * torch.eye(acts.shape[1])
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y))
    module.W_dec.data = weight
    module.b_dec.data = mean_y - mean_acts @ weight

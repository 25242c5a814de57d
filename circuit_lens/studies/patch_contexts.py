"""The same token in two contexts: at which layer its two states part, by distance and by what they say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.sources import EMBEDDING, At, Vectors
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.studies.patch_entities import LONG
from circuit_lens.studies.patch_items import Write, as_words, descriptions, some
from circuit_lens.studies.patch_tables import layer_title, titled
from circuit_lens.studies.tables import Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

NEUTRAL = "Maria read about {name}", "Anna met {name}"
QUANTILE = 0.95


@dataclass(frozen=True, slots=True)
class Context:
    """A token in a context, and in another that says as little: the prompts, and where in them it stands."""

    prompt: str
    neutral: str
    pos: int | str = -1


def _context(name: str, write: Write, pos: int | str = -1) -> Context:
    first, second = (write(text.format(name=name)) for text in NEUTRAL)
    return Context(first, second, pos)


def context_pairs(corpus: Corpus, *, write: Write = as_words) -> dict[str, list[tuple[Context, Context]]]:
    """Pairs of contexts of one token: people who share their last word, a name that is a city's too, and first names.

    A first name stands before what tells who is meant, so its state is the same in both: the check of the method.
    """
    families: dict[str, list[Context]] = {}
    for person in corpus.people:
        families.setdefault(person.family, []).append(_context(person.name, write))
    pairs = {"two people, one surname": [], "two people, the Great": [], "two people, of Wales": []}
    for family, members in families.items():
        label = f"two people, {family}" if family in LONG else "two people, one surname"
        pairs[label] += itertools.combinations(members, 2)
    capitals = {place.relations["capital"] for place in corpus.places}
    for family, members in families.items():
        if family in capitals:
            city = Context(write(f"Maria lives in {family}"), write(f"Anna lives in {family}"))
            pairs.setdefault(f"a person and the city, {family}", []).extend((one, city) for one in members)
    pairs["a first name, alone and in a long name"] = [
        (_context(first, write), _context(person.name, write, first))
        for person in corpus.people
        if person.family in LONG
        for first in [person.name.split()[0]]
    ]
    return pairs


def _distances(
    first: Float[Tensor, "n_items n_layers n_slots d_model"], second: Float[Tensor, "n_items n_layers n_slots d_model"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 - cosine, and |a - b| over the mean of |a| and |b|, ``[n_items, n_layers]`` each."""
    a, b = first[:, :, 0].double(), second[:, :, 0].double()
    far = (a - b).norm(dim=-1) / (0.5 * (a.norm(dim=-1) + b.norm(dim=-1)))
    return (1 - torch.cosine_similarity(a, b, dim=-1)).clamp_min(0).numpy(), far.numpy()


def contexts_table(
    model: HookedModel, corpus: Corpus | None = None, *, target: Target | None = None, write: Write = as_words,
    layers: Sequence[int] | None = None, n: int | None = None, name: str = "",
) -> StudyTable:  # fmt: skip
    """At which layer the states of one token in two contexts part.

    Args:
        model: A model that knows the people of the corpus.
        corpus: Its people and places.
        target: The description prompt; None: that of the bundled models.
        write: Turns the words of a prompt into text.
        layers: Which; None: all.
        n: Pairs per kind, drawn with a seed; None: all.
        name: Of the model, for the title.
    """
    target = target or descriptions()
    rows, parted = [], []
    for label, pairs in context_pairs(corpus or Corpus(), write=write).items():
        kept = some(pairs, n)
        places = _every(kept)
        vectors = Vectors.from_prompts(model, [At(text, pos) for text, pos in places], layers=layers)
        said = _said(vectors, places, model, kept, target)
        first, second = ([pair[k] for pair in kept] for k in (0, 1))
        plain = [vectors.values[[places.index((one.prompt, one.pos)) for one in part]] for part in (first, second)]
        neutral = [vectors.values[[places.index((one.neutral, one.pos)) for one in part]] for part in (first, second)]
        cosine, far = _distances(*plain)
        null_cosine, null_far = _distances(torch.cat(plain), torch.cat(neutral))
        read_layers = vectors.layers or ()
        beyond = far > np.quantile(null_far, QUANTILE, axis=0) + 1e-6
        different = said[0] != said[1]
        for s, layer in enumerate(read_layers):
            rows.append(
                Row(
                    f"{label}: {layer_title(layer)}",
                    {
                        "1 - cosine": Mean.of(cosine[:, s].tolist()),
                        "null": Mean.of(null_cosine[:, s].tolist()),
                        "distance": Mean.of(far[:, s].tolist()),
                        "distance, null": Mean.of(null_far[:, s].tolist()),
                        "beyond the null": Rate.of(beyond[:, s].tolist()),
                        "said differently": Rate.of(different[:, s].tolist()),
                    },
                )
            )
        parted.append(
            f"{label}: {_first(beyond, read_layers)} by distance, {_first(different, read_layers)} by what is said"
        )
    notes = (
        "First layer at which more than half of the pairs part. " + "; ".join(parted) + ".",
        f"Null: the same name in two neutral contexts ({' and '.join(NEUTRAL)}); beyond: farther than {QUANTILE:.0%} "
        "of those. Distance: |a - b| over the mean norm. Said: moved from the layer into the embedding of the "
        "description prompt; pairs with the same description cannot differ when right.",
        "A first name alone and within a long name is one and the same prefix in a causal model: its state cannot "
        "know what follows, in any layer. What is meant is in the last token's state. Pairs share people, so intervals "
        "of means are too narrow.",
    )
    return StudyTable(titled("The same token in two contexts", name), tuple(rows), notes)


def _every(pairs: Sequence[tuple[Context, Context]]) -> list[tuple[str, int | str]]:
    """Return all prompts and positions, each once."""
    found = [(text, one.pos) for pair in pairs for one in pair for text in (one.prompt, one.neutral)]
    return list(dict.fromkeys(found))


def _said(
    states: Vectors, places: Sequence[tuple[str, int | str]], model: HookedModel,
    pairs: Sequence[tuple[Context, Context]], target: Target,
) -> list[np.ndarray]:  # fmt: skip
    """Return what first and second contexts say at each layer, ``[n_pairs, n_layers]`` each."""
    result = patchscope(model, states, target, target_layers=[EMBEDDING], max_new_tokens=3, controls=False)
    texts = result.texts[:, :, 0, 0]
    return [texts[[places.index((pair[k].prompt, pair[k].pos)) for pair in pairs]] for k in (0, 1)]


def _first(hits: np.ndarray, layers: Sequence[int]) -> str:
    shares = hits.mean(0)
    found = [layer for layer, share in zip(layers, shares, strict=True) if share > 0.5]
    return layer_title(found[0]) if found else "nowhere"

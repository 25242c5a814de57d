"""Writing at one layer, or also at all below it: the placeholder's own keys and values (`patch_through`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from circuit_lens.graph.rates import Rate
from circuit_lens.patchscopes.metrics import How
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.studies.patch_items import Item, Relation, descriptions, entities, relations, some
from circuit_lens.studies.patch_tables import Reading, difference, layer_title, read, sources, titled
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

TOKENS, ATTRIBUTE_TOKENS = 20, 6
AGAIN, ALONE = "re-embedded", "token in the prompt"


def says_word(result: PatchscopeResult, word: str) -> Bool[ndarray, "n_items n_source_layers n_target_layers"]:
    """Return which cells' texts hold a word, whatever its case."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    texts = result.texts[..., 0]
    hits = [pattern.search(str(text)) is not None for text in texts.flatten()]
    return np.array(hits, dtype=bool).reshape(texts.shape)


def through_table(
    model: HookedModel,
    *,
    items: Sequence[Item] | None = None,
    asked: Sequence[Relation] | None = None,
    target: Target | None = None,
    placeholder: str = "x",
    max_new_tokens: int = TOKENS,
    attribute_tokens: int = ATTRIBUTE_TOKENS,
    how: How = "starts",
    layers: Sequence[int] | None = None,
    n: int | None = None,
    name: str = "",
) -> StudyTable:
    """Compare writing at the target layer alone with writing also below it, by layer, on descriptions and attributes.

    Each source layer goes into itself, as in the paper's descriptions. With the embedding both are the same run.

    Args:
        model: A model that knows the items.
        items: For descriptions; None: all entities of the corpus.
        asked: For attributes; None: all relations of the corpus.
        target: The description prompt; None: that of the bundled models.
        placeholder: The word in its place.
        max_new_tokens: Tokens to generate for descriptions.
        attribute_tokens: Tokens to generate for attributes.
        how: Where an answer must stand to be right.
        layers: Which; None: all.
        n: Entities, and items per relation; None: all.
        name: Of the model, for the title.
    """
    corpus = Corpus()
    unit = "token" if how == "starts" else "word"
    described = some(entities(corpus) if items is None else items, n)
    questions = relations(corpus) if asked is None else list(asked)
    rows = _rows(
        "descriptions", [_both(model, described, target or descriptions(), max_new_tokens, how, layers)], placeholder
    )
    groups: dict[str, list[Relation]] = {}
    for relation in questions:
        groups.setdefault(relation.name.split(":")[0], []).append(relation)
    for group, found in groups.items():
        pairs = [_both(model, some(one.items, n), one.target, attribute_tokens, how, layers) for one in found]
        rows += _rows(f"attributes, {group}", pairs, placeholder)
    notes = (
        "Layer: the state replaces the placeholder's at the target layer alone, so later tokens still read the "
        "placeholder in the keys and values of the layers up to it. Below: the item's own states of the lower layers "
        f"are written there too. {max_new_tokens} tokens are generated ({attribute_tokens} for attributes); right: "
        "they "
        f"{'begin with' if how == 'starts' else 'hold'} the answer; anywhere: they hold it, which in a list of "
        f"descriptions later entries can do as well. Says {placeholder!r}: the text holds the placeholder's word.",
        "Differences are below minus layer, paired, with 95 % bootstrap intervals. Below is cumulative: what it says "
        "at a layer can come from any lower layer's state of the item, the embedding among them, so its figures at "
        "late layers are no evidence that those layers' states alone can be read. Re-embedded: the embedding of the "
        "last token written likewise, below in place of all these states. Token in the prompt: the same embedding, "
        "written into the embedding alone, where all layers work on it. Below writes that embedding too, so what it "
        f"says of entities of one {unit} need not come from any layer: those of several {unit}s show what layers add.",
    )
    return StudyTable(titled("Writing below the target layer", name), tuple(rows), notes)


def _both(
    model: HookedModel, items: Sequence[Item], target: Target, max_new_tokens: int, how: How,
    layers: Sequence[int] | None,
) -> tuple[Reading, Reading]:  # fmt: skip
    vectors = sources(model, items)  # writing below needs the states of all layers
    first, second = (
        read(
            model, items, target, vectors=vectors, source_layers="all" if layers is None else layers,
            target_layers="same", patch_through=through, how=how,
            max_new_tokens=max_new_tokens,
        )
        for through in ("layer", "below")
    )  # fmt: skip
    return first, second


def _rows(label: str, pairs: Sequence[tuple[Reading, Reading]], placeholder: str) -> list[Row]:
    """Return a row for each layer: of all items, and of those of one and of several words where there are both."""
    layers = pairs[0][0].result.source_layers
    several = np.array([one.n_words > 1 for pair in pairs for one in pair[0].items], dtype=bool)
    groups = {label: np.ones_like(several)}
    if several.any() and not several.all():
        unit = "token" if pairs[0][0].how == "starts" else "word"
        groups |= {f"{label}, one {unit}": ~several, f"{label}, several {unit}s": several}
    found = [
        {title: np.concatenate([one[title] for one in made]) for title in made[0]}
        for which in (0, 1)
        for made in [[_hits(pair[which], placeholder) for pair in pairs]]
    ]
    return [
        Row(f"{name}: {layer_title(layer)}", _compared(*({k: v[kept, s] for k, v in one.items()} for one in found)))
        for name, kept in groups.items()
        for s, layer in enumerate(layers)
        if layer != EMBEDDING
    ]


def _hits(reading: Reading, placeholder: str) -> dict[str, Bool[ndarray, "n_items n_layers"]]:
    """Return what is counted of the cells of a grid that moves layers into themselves."""
    found = {"right": reading.right[:, :, 0]}
    if reading.again is not None:
        found[AGAIN] = reading.again
    if EMBEDDING in reading.result.source_layers:
        alone = reading.right[:, [reading.result.source_layers.index(EMBEDDING)], 0]
        found[ALONE] = np.repeat(alone, found["right"].shape[1], axis=1)
    return found | {
        "anywhere": reading.result.right(reading.answers, "contains")[:, :, 0, 0],
        f"says {placeholder!r}": says_word(reading.result, placeholder)[:, :, 0],
    }


def _compared(layer: Mapping[str, ndarray], below: Mapping[str, ndarray]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for title, first in layer.items():
        if title == ALONE:  # one run, whether written below or not
            cells |= {ALONE: Rate.of(first.tolist()), "right, below, over it": difference(below["right"], first)}
            continue
        second = below[title]
        cells |= {f"{title}, layer": Rate.of(first.tolist()), f"{title}, below": Rate.of(second.tolist())}
        if title != AGAIN:
            cells[f"{title}, difference"] = difference(second, first)
    return cells

"""Writing at one layer, or also at all below it: the placeholder's own keys and values (`patch_through`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
from circuit_lens.studies.patch_tables import Reading, difference, layer_name, read, sources
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

TOKENS, ATTRIBUTE_TOKENS = 20, 6


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
    described = some(entities(corpus) if items is None else items, n)
    questions = relations(corpus) if asked is None else list(asked)
    pairs = [_both(model, described, target or descriptions(), max_new_tokens, how, layers)]
    rows = _rows("descriptions", pairs, placeholder)
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
        "late layers are no evidence that those layers' states alone can be read.",
    )
    return StudyTable(f"Writing below the target layer{f' ({name})' if name else ''}", tuple(rows), notes)


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
    def hits(which: int, kind: str, source: int) -> ndarray:
        found = []
        for pair in pairs:
            reading = pair[which]
            if kind == "right":
                right = reading.right
            elif kind == "anywhere":
                right = reading.result.right(reading.answers, "contains")[..., 0]
            else:
                right = says_word(reading.result, placeholder)
            found.append(right[:, source, 0])
        return np.concatenate(found)

    rows = []
    for s, layer in enumerate(pairs[0][0].result.source_layers):
        if layer == EMBEDDING:
            continue
        cells: dict[str, Cell] = {}
        for kind, title in (("right", "right"), ("anywhere", "anywhere"), ("says", f"says {placeholder!r}")):
            first, second = hits(0, kind, s), hits(1, kind, s)
            cells[f"{title}, layer"] = Rate.of(first.tolist())
            cells[f"{title}, below"] = Rate.of(second.tolist())
            cells[f"{title}, difference"] = difference(second, first)
        rows.append(Row(f"{label}: {layer_name(layer)}", cells))
    return rows

"""Next tokens decoded from hidden layers, by lenses and token identity (2401.06102 §4.1), and across models (§4.4)."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.fitting import fit_map
from circuit_lens.patchscopes.maps import Fitted, Identity, Map
from circuit_lens.patchscopes.metrics import Chosen, How
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.presets import logit_lens, token_identity, tuned_lens
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.sources import EMBEDDING, At, Vectors
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import to_tokens
from circuit_lens.studies.patch_hops import NextToken
from circuit_lens.studies.patch_items import Item, descriptions, entities, fit_and_held_out, people, some
from circuit_lens.studies.patch_tables import CHOICE, Reading, layer_title, read, titled
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

NEW_WORDS = 5
WORD = r"\w+|[^\w\s]"
Form = Literal["arrows", "lines", "pairs", "is", "words"]
OTHER = (
    f"No position is taken at which the sentence so far, of {NEW_WORDS} words or more, stands in the text that maps "
    "are fitted on."
)


def text_positions(
    model: HookedModel, held_out: Sequence[str], n: int, *, unlike: Sequence[str] = (), seed: int = 0
) -> list[At]:
    """Return random positions of texts: each text once, cut after its position; BOS is left out.

    Args:
        model: For its tokens.
        held_out: Texts; more than ``n`` where some are unlike nothing.
        n: Positions, at most.
        unlike: Other texts: no position is taken at which the sentence so far, of five words or more, stands in them.
        seed: Of the draw.
    """
    rng, known = random.Random(seed), _words(" ".join(unlike))
    found: list[At] = []
    for text in held_out:
        ids = to_tokens(model, text).tolist()
        stops = rng.sample(range(2, len(ids) + 1), max(0, len(ids) - 1))
        free = (stop for stop in stops if not unlike or not _stands_in(known, model, ids[:stop]))
        found += [At(torch.tensor(ids[:stop])) for stop in itertools.islice(free, 1)]
        if len(found) >= n:
            break
    return found


def _stands_in(known: str, model: HookedModel, ids: Sequence[int]) -> bool:
    """Whether the last sentence of some tokens is words of a text, where it is long enough to be known by it."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    words = _words(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).split()
    stops = [i for i, word in enumerate(words[:-1]) if word == "."]
    sentence = words[stops[-1] + 1 if stops else 0 :]
    return len(sentence) >= NEW_WORDS and " " + " ".join(sentence) in known


def _words(text: str) -> str:
    """Return a text's words and marks with one blank around each."""
    return f" {' '.join(re.findall(WORD, text))} "


def lens_table(
    model: HookedModel,
    *,
    fit_on: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    form: Form = "words",
    n: int = 500,
    name: str = "",
) -> StudyTable:
    """Compare what lenses and token identity decode with what the model says at the end.

    Args:
        model: Any.
        fit_on: Texts for the tuned lens; None: of the corpus.
        held_out: Other texts, of which one position each is decoded.
        form: Of the token identity prompt.
        n: Positions.
        name: Of the model, for the title.
    """
    fit_on, held_out = _texts(fit_on, held_out)
    mapping = fit_map(model, fit_on, pairs="last", progress=False)
    vectors = Vectors.from_prompts(model, text_positions(model, held_out, n, unlike=fit_on))
    identity = token_identity(form)
    results = {
        "logit lens": patchscope(model, vectors, logit_lens(), keep_logits=False),
        "tuned lens": patchscope(model, vectors, tuned_lens(mapping), keep_logits=False),
        "token identity": patchscope(model, vectors, identity, keep_logits=False),
        "token identity, answer embedded again": patchscope(
            model, vectors, identity, mapping=NextToken(model), target_layers=[EMBEDDING], keep_logits=False
        ),
    }
    rows = []
    for label, result in results.items():
        for s, layer in enumerate(result.source_layers):
            rows.append(Row(f"{label}: {layer_title(layer)}", _decoded(result, vectors, s)))
    assert vectors.next_logits is not None, "prompts have next tokens"
    assert vectors.tokens is not None, "prompts have tokens"
    top = vectors.next_logits.argmax(-1).cpu()
    before = results["token identity"].unpatched.top_tokens[:, 0]
    current = vectors.tokens.cpu()
    cells: dict[str, Cell] = {"precision@1": _rate(before == top), "says the token itself": _rate(before == current)}
    rows.append(Row("token identity, unpatched", cells))
    sure = -vectors.next_logits.log_softmax(-1).max(-1).values
    explained = ", ".join(f"{layer_title(a)} {share:.2f}" for (a, _), share in sorted(mapping.explained.items()))
    notes = (
        f"{len(vectors)} random positions of other text than maps are fitted on, one per piece. {OTHER} Precision@1: "
        "the decoded token is the model's own most probable next token; surprisal: -log of the model's probability of "
        f"the decoded token, in nats (at least {float(sure.mean()):.2f} on average, that of its own first choice).",
        "The embedding row is the control of every lens: the token itself, moved likewise. What a lens is asked in "
        "does not matter, so it has no unpatched prompt; token identity has one.",
        f"Token identity: {results['token identity'].targets[0]!r}, each layer into itself; it is answered with what "
        "the placeholder stands for. 'Says the token itself': what was read, not what comes next. Answer embedded "
        "again: what the layer says by the logit lens, as a mean embedding, is moved into the embedding.",
        f"Tuned lens: an affine map by least squares on {len(fit_on)} other pieces; held-out variance explained: "
        f"{explained}.",
    )
    return StudyTable(titled("Next tokens from hidden layers", name), tuple(rows), notes)


def _texts(fit_on: Sequence[str] | None, held_out: Sequence[str] | None) -> tuple[Sequence[str], Sequence[str]]:
    if fit_on is not None and held_out is not None:
        return fit_on, held_out
    own = fit_and_held_out(Corpus())
    return own[0] if fit_on is None else fit_on, own[1] if held_out is None else held_out


def _decoded(result: PatchscopeResult, vectors: Vectors, source: int) -> dict[str, Cell]:
    assert vectors.tokens is not None, "prompts have tokens"
    assert result.source_top is not None, "prompts have next tokens"
    said = result.patched.top_tokens[:, source, 0, 0, 0]
    return {
        "precision@1": _rate(said == result.source_top),
        "surprisal": Mean.of(result.patched.surprisal[:, source, 0, 0].tolist()),
        "says the token itself": _rate(said == vectors.tokens.cpu()),
    }


def _rate(hits: Bool[Tensor, "n"]) -> Rate:
    return Rate.of(hits.tolist())


# --------------------------------------------------------------------------------------------------------- two models


def cross_model_tables(
    model: HookedModel,
    other: HookedModel,
    *,
    fit_on: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    form: Form = "words",
    n: int = 100,
    n_described: int | None = None,
    described: Sequence[Item] | None = None,
    description: Target | None = None,
    how: How = "starts",
    layers: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
    names: tuple[str, str] = ("one", "other"),
) -> list[StudyTable]:
    """Read one model's states with another of the same vocabulary, by fitted maps between all layers.

    Args:
        model: Whose states are read.
        other: Which reads them.
        fit_on: Texts for the maps; None: of the corpus.
        held_out: Other texts, of which one position each is read.
        form: Of the token identity prompt.
        n: Positions.
        n_described: Entities of each group whose descriptions are read; None: all, and as many cities as people.
        described: What is described; None: people and cities of the corpus.
        description: The prompt for it; None: that of the bundled models.
        how: Where a description must stand.
        layers: Of the two models, the embedding among them; None: all.
        names: Of the two models, for titles.

    Returns:
        A table of best cells beside the controls, and the grid of the affine map.

    Raises:
        PatchscopeError: Models of different vocabularies.
    """
    fit_on, held_out = _texts(fit_on, held_out)
    at = text_positions(model, held_out, n, unlike=fit_on)
    items = _described(Corpus(), n_described) if described is None else list(described)
    froms, tos = (_layers(one, some_layers) for one, some_layers in zip((model, other), layers, strict=True))
    prompt = descriptions() if description is None else description
    rows: list[Row] = []
    grid: list[Row] = []
    for label, target, into in ((f"{names[0]} → {names[1]}", other, tos), (f"{names[0]} → itself", model, froms)):
        pairs = [(a, b) for a in froms for b in into]
        maps: dict[str, Map] = {"affine": fit_map(model, fit_on, target_model=target, pairs=pairs, progress=False)}
        if model.cfg.d_model == target.cfg.d_model:
            fitted = fit_map(model, fit_on, target_model=target, pairs=pairs, kind="orthogonal", progress=False)
            maps |= {"orthogonal": fitted, "identity": Identity()}
        for kind, mapping in maps.items():
            made = _crossed(_Crossing(model, target, mapping, froms, into), at, items, prompt, form, how)
            rows += [Row(f"{label}, {kind}: {what}", cells) for what, cells, _ in made]
            if kind == "affine":
                assert isinstance(mapping, Fitted), "fit_map fits"
                place = next(reading for what, _, reading in made if what == "in place")
                grid += _grid(label, place, mapping)
    notes = (
        f"In place: each of {len(at)} positions of held-out text is moved to the same position of the same text in the "
        "reading model, whose next token should then be the source model's. There the rest of the text is the reading "
        "model's own, which answers by itself for early target layers: see unpatched (the two models' agreement) and "
        "another position's state. Token identity and descriptions have no such help.",
        "Re-embedded: the embedding of the source's token, through the same map, into the target layers of the fixed "
        "cells.",
        f"Descriptions: {len(items)} entities, read at the last token; right: the text "
        + ("begins with the whole description." if how == "starts" else "holds a word of the description."),
        OTHER,
        f"Maps by least squares (affine) and Procrustes (orthogonal, with a shift) on {len(fit_on)} other pieces of "
        "text, at the same token, one for each pair of layers. " + CHOICE,
    )
    title = f"Across models ({names[0]} to {names[1]})"
    legend = "Precision@1 in place, affine map, by source layer (rows) and target layer (columns); below it the "
    legend += "variance explained on held-out tokens of the fit."
    return [StudyTable(title, tuple(rows), notes), StudyTable(f"{title}: grid", tuple(grid), (legend,))]


def _layers(model: HookedModel, wanted: Sequence[int] | None) -> list[int]:
    return list(range(EMBEDDING, model.cfg.n_layers) if wanted is None else wanted)


@dataclass(frozen=True)
class _Crossing:
    """From which model and layers to which, through which map."""

    model: HookedModel
    target: HookedModel
    mapping: Map
    source_layers: Sequence[int]
    target_layers: Sequence[int]


def _crossed(
    way: _Crossing, at: Sequence[At], items: Sequence[Item], prompt: Target, form: Form, how: How
) -> list[tuple[str, dict[str, Cell], Reading]]:
    """Return what a map does: in place, in place with another position's state, by token identity, by descriptions."""
    vectors = Vectors.from_prompts(way.model, at, layers=way.source_layers)
    order = torch.arange(len(vectors)).roll(1)
    shuffled = replace(vectors, values=vectors.values[order])
    places = [Target(one.prompt, at=-1) for one in at]
    found = []
    for what, moved, where in (
        ("in place", vectors, places), ("in place, another position's state", shuffled, places),
        ("token identity", vectors, token_identity(form)),
    ):  # fmt: skip
        result = patchscope(
            way.model, moved, where, mapping=way.mapping, target_model=way.target, target_layers=way.target_layers,
            keep_logits=False,
            check=what != "in place, another position's state", progress=False,
        )  # fmt: skip
        assert result.source_top is not None, "prompts have next tokens"
        # The answer is an id, so that tokens which decode alike are told apart.
        reading = _ByToken((), result)
        found.append((what, _cells(reading), reading))
    reading = read(
        way.model, items, prompt, mapping=way.mapping, target_model=way.target, how=how, layers=way.source_layers,
        target_layers=way.target_layers,
    )  # fmt: skip
    for group in dict.fromkeys(item.group for item in items):
        part = reading.of(group=group)
        found.append((f"descriptions, {group}", _cells(part), part))
    return found


def _described(corpus: Corpus, n: int | None) -> list[Item]:
    """All people, or so many, and as many cities."""
    named = some(people(corpus), n)
    return [*named, *some([item for item in entities(corpus) if item.group == "city"], len(named))]


class _ByToken(Reading):
    """A grid whose right answer is the source model's most probable next token."""

    @property
    def right(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Which cells say it first."""
        assert self.result.source_top is not None, "prompts have next tokens"
        said = self.result.patched.top_tokens[..., 0, 0]
        return (said == self.result.source_top[:, None, None]).numpy()


def _cells(reading: Reading) -> dict[str, Cell]:
    chosen = reading.chosen
    layers, targets = reading.result.source_layers, reading.result.target_layers
    named = [f"{layer_title(layers[reading.inner[s]])} → {layer_title(targets[t])}" for s, t, _ in chosen.cells]
    if isinstance(reading, _ByToken):
        assert reading.result.source_top is not None, "prompts have next tokens"
        before = _rate(reading.result.unpatched.top_tokens[:, 0] == reading.result.source_top)
    else:
        before = reading.accuracy.unpatched
    again = {} if reading.again is None else {"re-embedded": Rate.of(_at_chosen(chosen, reading.again))}
    late = [t for t, layer in enumerate(targets) if isinstance(layer, int) and layer >= 1]
    return {
        "best fixed cell": Rate.of(chosen.right.tolist()),
        "which": "; ".join(dict.fromkeys(named)),
        **again,
        "into the last layer, from the last": Rate.of(reading.right[:, -1, -1].tolist()),
        "target layers 1 and later, mean over cells": float(reading.right[:, reading.inner][:, :, late].mean()),
        "unpatched": before,
    }


def _at_chosen(chosen: Chosen, again: Bool[ndarray, "n_items n_target_layers"]) -> list[bool]:
    """Return the control of each item at the target layer of the cell that scores it."""
    return [bool(again[i, chosen.cells[int(half)][1]]) for i, half in enumerate(chosen.fold)]


def _grid(label: str, place: Reading, mapping: Fitted) -> list[Row]:
    targets = [layer for layer in place.result.target_layers if isinstance(layer, int)]
    rows = []
    for s, layer in enumerate(place.result.source_layers):
        shares: dict[str, Cell] = {
            f"into {layer_title(to)}": Rate.of(place.right[:, s, t].tolist()) for t, to in enumerate(targets)
        }
        rows.append(Row(f"{label}: {layer_title(layer)}", shares))
    for layer in place.result.source_layers:
        assert layer is not None, "prompts have layers"
        explained: dict[str, Cell] = {f"into {layer_title(to)}": mapping.explained[layer, to] for to in targets}
        rows.append(Row(f"{label}, explained: {layer_title(layer)}", explained))
    return rows

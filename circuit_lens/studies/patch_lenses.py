"""Next tokens decoded from hidden layers, by lenses and token identity (2401.06102 §4.1), and across models (§4.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.fitting import fit_map
from circuit_lens.patchscopes.maps import Fitted, Identity, Map
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.presets import logit_lens, token_identity, tuned_lens
from circuit_lens.patchscopes.result import PatchscopeResult
from circuit_lens.patchscopes.sources import EMBEDDING, At, Vectors
from circuit_lens.patchscopes.targets import Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import to_tokens
from circuit_lens.studies.patch_hops import NextToken
from circuit_lens.studies.patch_items import Item, descriptions, entities, people, some, texts
from circuit_lens.studies.patch_tables import CHOICE, Reading, layer_name, read
from circuit_lens.studies.tables import Cell, Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

FIT_SEED, TEST_SEED = 7001, 7002
FIT_WORDS, TEST_WORDS = 12_000, 30_000
Form = Literal["arrows", "lines", "pairs", "is", "words"]


def text_positions(model: HookedModel, held_out: Sequence[str], n: int, seed: int = 0) -> list[At]:
    """Return random positions of texts: each text once, cut after its position; BOS is left out.

    Args:
        model: For its tokens.
        held_out: Texts.
        n: Positions.
        seed: Of the draw.
    """
    rng, found = random.Random(seed), []
    for text in held_out[:n]:
        ids = to_tokens(model, text).tolist()
        found.append(At(torch.tensor(ids[: rng.randrange(1, len(ids)) + 1])))
    return found


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
    corpus = Corpus()
    fit_on = texts(corpus, FIT_WORDS, FIT_SEED) if fit_on is None else fit_on
    held_out = texts(corpus, TEST_WORDS, TEST_SEED) if held_out is None else held_out
    mapping = fit_map(model, fit_on, pairs="last", progress=False)
    vectors = Vectors.from_prompts(model, text_positions(model, held_out, n))
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
            rows.append(Row(f"{label}: {layer_name(layer)}", _decoded(result, vectors, s)))
    assert vectors.next_logits is not None, "prompts have next tokens"
    assert vectors.tokens is not None, "prompts have tokens"
    top = vectors.next_logits.argmax(-1).cpu()
    before = results["token identity"].unpatched.top_tokens[:, 0]
    current = vectors.tokens.cpu()
    cells: dict[str, Cell] = {"precision@1": _rate(before == top), "says the token itself": _rate(before == current)}
    rows.append(Row("token identity, unpatched", cells))
    sure = -vectors.next_logits.log_softmax(-1).max(-1).values
    explained = ", ".join(f"{layer_name(a)} {share:.2f}" for (a, _), share in sorted(mapping.explained.items()))
    notes = (
        f"{len(vectors)} random positions of text that no map is fitted on, one per piece; precision@1: the decoded "
        "token is the model's own most probable next token; surprisal: -log of the model's probability of the decoded "
        f"token, in nats (at least {float(sure.mean()):.2f} on average, that of the model's own first choice).",
        f"Token identity: {results['token identity'].targets[0]!r}, each layer into itself; it is answered with what "
        "the placeholder stands for. 'Says the token itself': what was read, not what comes next. Answer embedded "
        "again: what the layer says by the logit lens, as a mean embedding, is moved into the embedding.",
        f"Tuned lens: an affine map by least squares on {len(fit_on)} other pieces; held-out variance explained: "
        f"{explained}.",
    )
    return StudyTable(f"Next tokens from hidden layers{_on(name)}", tuple(rows), notes)


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
        names: Of the two models, for titles.

    Returns:
        A table of best cells beside the controls, and the grid of the affine map.
    """
    corpus = Corpus()
    fit_on = texts(corpus, FIT_WORDS, FIT_SEED) if fit_on is None else fit_on
    held_out = texts(corpus, TEST_WORDS, TEST_SEED) if held_out is None else held_out
    at = text_positions(model, held_out, n)
    items = _described(corpus, n_described) if described is None else list(described)
    prompt = descriptions() if description is None else description
    same_width = model.cfg.d_model == other.cfg.d_model
    rows: list[Row] = []
    grid: list[Row] = []
    for label, target in ((f"{names[0]} → {names[1]}", other), (f"{names[0]} → itself", model)):
        maps: dict[str, Map] = {"affine": fit_map(model, fit_on, target_model=target, pairs="all", progress=False)}
        if same_width:
            fitted = fit_map(model, fit_on, target_model=target, pairs="all", kind="orthogonal", progress=False)
            maps |= {"orthogonal": fitted, "identity": Identity()}
        for kind, mapping in maps.items():
            made = _crossed(model, target, mapping, at, items, prompt, form)
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
        f"Descriptions: {len(items)} entities of the corpus, read at the last token; right: the whole description.",
        f"Maps by least squares (affine) and Procrustes (orthogonal, with a shift) on {len(fit_on)} other pieces of "
        "text, at the same token, one for each pair of layers. " + CHOICE,
    )
    title = f"Across models ({names[0]} to {names[1]})"
    layers = "Precision@1 in place, affine map, by source layer (rows) and target layer (columns); below it the "
    layers += "variance explained on held-out tokens of the fit."
    return [StudyTable(title, tuple(rows), notes), StudyTable(f"{title}: grid", tuple(grid), (layers,))]


def _crossed(
    model: HookedModel, target: HookedModel, mapping: Map, at: Sequence[At], items: Sequence[Item], prompt: Target,
    form: Form,
) -> list[tuple[str, dict[str, Cell], Reading]]:  # fmt: skip
    """Return what a map does: in place, in place with another position's state, by token identity, by descriptions."""
    vectors = Vectors.from_prompts(model, at)
    order = torch.arange(len(vectors)).roll(1)
    shuffled = replace(vectors, values=vectors.values[order])
    places = [Target(one.prompt, at=-1) for one in at]
    found = []
    for what, moved, where in (
        ("in place", vectors, places), ("in place, another position's state", shuffled, places),
        ("token identity", vectors, token_identity(form)),
    ):  # fmt: skip
        result = patchscope(
            model, moved, where, mapping=mapping, target_model=target, target_layers="all", keep_logits=False,
            check=what != "in place, another position's state", progress=False,
        )  # fmt: skip
        assert result.source_top is not None, "prompts have next tokens"
        # The answer is an id, so that tokens which decode alike are told apart.
        reading = _ByToken((), result)
        found.append((what, _cells(reading), reading))
    reading = read(model, items, prompt, mapping=mapping, target_model=target)
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
    named = [f"{layer_name(layers[reading.inner[s]])} → {layer_name(targets[t])}" for s, t, _ in chosen.cells]
    if isinstance(reading, _ByToken):
        assert reading.result.source_top is not None, "prompts have next tokens"
        before = _rate(reading.result.unpatched.top_tokens[:, 0] == reading.result.source_top)
    else:
        before = reading.accuracy.unpatched
    late = [t for t, layer in enumerate(targets) if isinstance(layer, int) and layer >= 1]
    return {
        "best fixed cell": Rate.of(chosen.right.tolist()),
        "which": "; ".join(dict.fromkeys(named)),
        "into the last layer, from the last": Rate.of(reading.right[:, -1, -1].tolist()),
        "target layers 1 and later, mean over cells": float(reading.right[:, reading.inner][:, :, late].mean()),
        "unpatched": before,
    }


def _grid(label: str, place: Reading, mapping: Fitted) -> list[Row]:
    targets = [layer for layer in place.result.target_layers if isinstance(layer, int)]
    rows = []
    for s, layer in enumerate(place.result.source_layers):
        shares: dict[str, Cell] = {
            f"into {layer_name(to)}": Rate.of(place.right[:, s, t].tolist()) for t, to in enumerate(targets)
        }
        rows.append(Row(f"{label}: {layer_name(layer)}", shares))
    for layer in place.result.source_layers:
        assert layer is not None, "prompts have layers"
        explained: dict[str, Cell] = {f"into {layer_name(to)}": mapping.explained[layer, to] for to in targets}
        rows.append(Row(f"{label}, explained: {layer_name(layer)}", explained))
    return rows


def _on(name: str) -> str:
    return f" ({name})" if name else ""

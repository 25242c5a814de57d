"""Feature information of a bundled model's dictionaries, computed on held-out text of the generator.

The generator knows, for every token, the values of its own variables (`Sentence.variables`): the city, the state it
lies in, the relation asked for, the operand, the token that must come next, and so on. A feature *detects* a set of
values of one variable if it is active where the variable has one of them; the set is grown greedily while F1, the
harmonic mean of precision and recall, rises. Labels are made of these detections, never of a reader's impression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.graph.feature_info import NO_TOKEN, Detection, FeatureTable, SiteInfo
from circuit_lens.training.activations import mlp_activations
from circuit_lens.zoo.batches import HeldOutText
from circuit_lens.zoo.dictionary_figures import layer_of

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformer_lens import HookedTransformer

TOP, CONTEXTS, WINDOW, BEFORE, BINS = 5, 4, 12, 8, 12
MAX_VALUES, MAX_DETECTIONS = 6, 3
MIN_ACTIVE, MIN_F1 = 5, 0.3
SHOWN_VALUES = 4
WORD, ANSWER = "word", "answer"


@dataclass(frozen=True, slots=True)
class Column:
    """One variable over the kept tokens: ``ids`` index ``values``, -1 where the variable has none."""

    variable: str
    values: tuple[str, ...]
    ids: Int[np.ndarray, " token"]


def variable_columns(text: HeldOutText, kept: Bool[Tensor, "row pos"], words: Sequence[str]) -> list[Column]:
    """The generator's variables at every kept token, and the variable ``word``: the token itself."""
    columns: dict[str, np.ndarray] = {}
    values: dict[str, dict[str, int]] = {}
    for row, sentences in enumerate(text.sentences):
        for offset, sentence in sentences:
            for variable, column in sentence.variables().items():
                ids = columns.setdefault(variable, np.full(tuple(kept.shape), -1, dtype=np.int32))
                known = values.setdefault(variable, {})
                for position, value in enumerate(column):
                    if value is not None:
                        ids[row, offset + position] = known.setdefault(value, len(known))
    mask = kept.numpy()
    found = [Column(name, tuple(values[name]), ids[mask]) for name, ids in sorted(columns.items())]
    return [*found, Column(WORD, tuple(words), text.rows.tokens.numpy()[mask].astype(np.int32))]


def best_detection(
    column: Column, counts: Float[np.ndarray, " value"], totals: Float[np.ndarray, " value"], n_active: int
) -> Detection | None:
    """The set of values with the highest F1 that greedy growth finds; ``None`` where nothing coincides.

    ``counts``: active positions with each value; ``totals``: all positions with it.
    """
    # Adding a value raises F1 only if its counts / (totals) is high; try them in that order.
    candidates = np.flatnonzero(counts)
    if not len(candidates):
        return None
    order = candidates[np.argsort(-counts[candidates] / totals[candidates] * np.sqrt(counts[candidates]))]
    chosen: list[int] = []
    hits = positives = best = 0.0
    for value in order[: 4 * MAX_VALUES]:
        f1 = 2 * (hits + counts[value]) / (positives + totals[value] + n_active)
        if f1 > best and len(chosen) < MAX_VALUES:
            best, hits, positives = f1, hits + counts[value], positives + totals[value]
            chosen.append(int(value))
    chosen.sort(key=lambda value: -counts[value])
    return Detection(
        column.variable,
        tuple(column.values[value] for value in chosen),
        float(hits / n_active),
        float(hits / positives),
    )


def detections(acts: Float[Tensor, "token d_sae"], columns: Sequence[Column]) -> list[tuple[Detection, ...]]:
    """For every feature the best detection of each variable, best variables first, at most `MAX_DETECTIONS`."""
    token, feature = (index.numpy() for index in (acts > 0).nonzero(as_tuple=True))
    d_sae = acts.shape[1]
    n_active = np.bincount(feature, minlength=d_sae)
    found: list[list[Detection]] = [[] for _ in range(d_sae)]
    for column in columns:
        n_values = len(column.values)
        totals = np.bincount(column.ids[column.ids >= 0], minlength=n_values).astype(float)
        ids = column.ids[token]
        known = ids >= 0
        counts = np.bincount(feature[known] * n_values + ids[known], minlength=d_sae * n_values)
        counts = counts.reshape(d_sae, n_values).astype(float)
        for index in np.flatnonzero(n_active >= MIN_ACTIVE):
            detection = best_detection(column, counts[index], totals, int(n_active[index]))
            if detection is not None:
                found[index].append(detection)
    return [tuple(sorted(each, key=lambda d: -d.f1)[:MAX_DETECTIONS]) for each in found]


def _values(values: Sequence[str]) -> str:
    """``Texas|Ohio|Utah|Iowa+2``."""
    more = f"+{len(values) - SHOWN_VALUES}" if len(values) > SHOWN_VALUES else ""
    return "|".join(values[:SHOWN_VALUES]) + more


def make_label(found: Sequence[Detection], top_tokens: Sequence[str], promoted: Sequence[str]) -> str:
    """A short name: ``say Austin`` (the next token), ``state=Texas``, ``word: capital``, or the tokens it is active on.

    The best detection decides where its F1 is at least `MIN_F1`.
    """
    if not found:
        return f"words: {', '.join(top_tokens[:3])}" if top_tokens else ""
    best = found[0]
    if best.f1 < MIN_F1:
        return f"words: {', '.join(top_tokens[:3])} → {', '.join(promoted[:2])}"
    if best.variable == ANSWER:
        return f"say {_values(best.values)}"
    if best.variable == WORD:
        return f"word: {_values(best.values)}"
    return f"{best.variable}={_values(best.values)}"


def _contexts(
    acts: Float[Tensor, " token"],
    tokens: Int[Tensor, " token"],
    starts: Int[Tensor, " token"],
    ends: Int[Tensor, " token"],
) -> tuple[Int[Tensor, "context window"], Float[Tensor, "context window"]]:
    """Windows around the strongest activations, inside their sentences, no two with the same tokens."""
    ids = torch.full((CONTEXTS, WINDOW), NO_TOKEN, dtype=torch.int32)
    values = torch.zeros(CONTEXTS, WINDOW)
    seen: set[tuple[int, ...]] = set()
    for peak in acts.topk(min(40, len(acts))).indices.tolist():
        if acts[peak] <= 0 or len(seen) == CONTEXTS:
            break
        start = max(int(starts[peak]), peak - BEFORE)
        stop = min(int(ends[peak]), start + WINDOW)
        window = tuple(tokens[start:stop].tolist())
        if window not in seen:
            ids[len(seen), : len(window)] = torch.tensor(window, dtype=torch.int32)
            values[len(seen), : len(window)] = acts[start:stop]
            seen.add(window)
    return ids, values


def _sentence_bounds(text: HeldOutText, kept: Bool[Tensor, "row pos"]) -> tuple[Tensor, Tensor]:
    """For every kept token the first index of its sentence, and the one after its last, among the kept tokens."""
    lengths = [len(sentence.tokens) for sentences in text.sentences for _, sentence in sentences]
    if sum(lengths) != int(kept.sum()):
        raise ValueError("kept must be exactly the tokens of the sentences: no BOS, no padding")
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)


@torch.no_grad()
def site_info(
    model: HookedTransformer,
    dictionary: SAE[Any],
    acts: Float[Tensor, "token d_sae"],
    text: HeldOutText,
    columns: Sequence[Column],
    words: Sequence[str],
) -> SiteInfo:
    """One dictionary's features, from its activations on the kept tokens of the text."""
    kept = text.rows.real
    tokens = text.rows.tokens[kept]
    starts, ends = _sentence_bounds(text, kept)
    largest = acts.amax(0)
    bins = (acts / largest.clamp(min=1e-9) * BINS).ceil().long().clamp(0, BINS)
    histogram = torch.stack([(bins == number).sum(0) for number in range(1, BINS + 1)], 1)
    by_token = torch.zeros(acts.shape[1], len(words)).index_add_(1, tokens, acts.T.contiguous())
    shares, top_tokens = (by_token / by_token.sum(1, keepdim=True).clamp(min=1e-9)).topk(TOP)
    logits = dictionary.W_dec @ (model.W_U - model.W_U.mean(-1, keepdim=True))
    top, bottom = logits.topk(TOP), (-logits).topk(TOP)
    contexts = [_contexts(column, tokens, starts, ends) for column in acts.T.contiguous()]
    found = detections(acts, columns)
    labels = []
    for index in range(acts.shape[1]):
        ranked = zip(top_tokens[index].tolist(), shares[index].tolist(), strict=True)
        active_on = [words[token] for token, share in ranked if share > 0]
        labels.append(make_label(found[index], active_on, [words[token] for token in top.indices[index].tolist()]))
    return SiteInfo(
        site=str(dictionary.cfg.metadata.hook_name_out),
        layer=layer_of(dictionary),
        labels=tuple(labels),
        detections=tuple(found),
        density=(acts > 0).float().mean(0),
        max_activation=largest,
        histogram=histogram.int(),
        top_tokens=torch.where(shares > 0, top_tokens, NO_TOKEN).int(),
        top_token_shares=shares.half(),
        context_tokens=torch.stack([ids for ids, _ in contexts]),
        context_activations=torch.stack([values for _, values in contexts]).half(),
        top_logit_tokens=top.indices.int(),
        top_logits=top.values.half(),
        bottom_logit_tokens=bottom.indices.int(),
        bottom_logits=(-bottom.values).half(),
    )


@torch.no_grad()
def feature_information(
    model: HookedTransformer,
    dictionaries: Sequence[SAE[Any]],
    text: HeldOutText,
    words: Sequence[str],
    *,
    description: str,
) -> FeatureTable:
    """The table of all features; ``words`` is the vocabulary by id, ``description`` says what text it is."""
    kept = text.rows.real
    columns = variable_columns(text, kept, words)
    layers = [layer_of(dictionary) for dictionary in dictionaries]
    sites = [
        site_info(model, dictionary, dictionary.encode(data.inputs), text, columns, words)
        for dictionary, data in zip(
            dictionaries, mlp_activations(model, text.rows.tokens, kept, layers=layers), strict=True
        )
    ]
    return FeatureTable(sites, words, text=description, n_tokens=int(kept.sum()))

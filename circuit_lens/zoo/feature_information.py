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

from circuit_lens.dictionaries.binding import bind
from circuit_lens.dictionaries.points import Write, write_kind
from circuit_lens.graph.feature_info import NO_TOKEN, Detection, FeatureTable, SiteInfo
from circuit_lens.protocols import Dictionary
from circuit_lens.zoo.batches import HeldOutText

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

TOP, CONTEXTS, WINDOW, BEFORE, BINS = 5, 3, 11, 8, 10
MAX_VALUES, MAX_WORDS, MAX_DETECTIONS = 6, 2, 3
MIN_ACTIVE, MIN_SCORE, MIN_SECOND_SCORE = 5, 0.25, 0.22
SHOWN_VALUES = 4
WORD, ANSWER, ANSWER_KIND = "word", "answer", "answer kind"
# One fact under several names: a label says it once.
_SAME_FACT = {"city": "place", "state": "place", "country": "place", "province": "place", "topic": "operand"}
# A list of words says less than a variable with the same score.
WORD_DISCOUNT = 0.7


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A detection and how much of the feature it explains.

    ``contrast``: F1 among the positions where the variable has a value at all (a feature that is active on the cities
    of Texas and on no other cities has 1 for ``state``, whatever else it is active on). ``share``: the share of the
    feature's active positions where the variable has a value.
    """

    detection: Detection
    contrast: float
    share: float

    @property
    def score(self) -> float:
        """Ranks the variables of one feature."""
        discount = WORD_DISCOUNT if self.detection.variable == WORD else 1.0
        return discount * self.contrast * self.share**0.5


def best_candidate(
    column: Column, counts: Float[np.ndarray, " value"], totals: Float[np.ndarray, " value"], n_active: int
) -> Candidate | None:
    """The set of values with the highest contrast that greedy growth finds; ``None`` where nothing coincides.

    ``counts``: active positions with each value; ``totals``: all positions with it. Values are tried from the highest
    recall down, weighted by how often they occur; most are named first whose every occurrence the feature catches.
    """
    values = np.flatnonzero(counts)
    if not len(values):
        return None
    recall = counts[values] / totals[values]
    order = values[np.argsort(-recall * np.sqrt(counts[values]))]
    known = float(counts.sum())
    chosen: list[int] = []
    hits = positives = best = 0.0
    for value in order[: 4 * MAX_VALUES]:
        contrast = 2 * (hits + counts[value]) / (positives + totals[value] + known)
        if contrast > best and len(chosen) < (MAX_WORDS if column.variable == WORD else MAX_VALUES):
            best, hits, positives = float(contrast), hits + float(counts[value]), positives + float(totals[value])
            chosen.append(int(value))
    chosen.sort(key=lambda value: -counts[value] / totals[value])
    names = tuple(column.values[value] for value in chosen)
    detection = Detection(column.variable, names, hits / n_active, hits / positives)
    return Candidate(detection, best, known / n_active)


def candidates(acts: Float[Tensor, "token d_sae"], columns: Sequence[Column]) -> list[tuple[Candidate, ...]]:
    """For every feature the best candidate of each variable, best variables first, at most `MAX_DETECTIONS`."""
    token, feature = (index.numpy() for index in (acts > 0).nonzero(as_tuple=True))
    d_sae = acts.shape[1]
    n_active = np.bincount(feature, minlength=d_sae)
    found: list[list[Candidate]] = [[] for _ in range(d_sae)]
    for column in columns:
        n_values = len(column.values)
        totals = np.bincount(column.ids[column.ids >= 0], minlength=n_values).astype(float)
        ids = column.ids[token]
        known = ids >= 0
        counts = np.bincount(feature[known] * n_values + ids[known], minlength=d_sae * n_values)
        counts = counts.reshape(d_sae, n_values).astype(float)
        for index in np.flatnonzero(n_active >= MIN_ACTIVE):
            candidate = best_candidate(column, counts[index], totals, int(n_active[index]))
            if candidate is not None:
                found[index].append(candidate)
    return [tuple(sorted(each, key=lambda c: -c.score)[:MAX_DETECTIONS]) for each in found]


def _values(values: Sequence[str]) -> str:
    """``Texas|Ohio|Utah|Iowa+2``."""
    more = f"+{len(values) - SHOWN_VALUES}" if len(values) > SHOWN_VALUES else ""
    return "|".join(values[:SHOWN_VALUES]) + more


def _part(detection: Detection) -> str:
    """One detection as a part of a label."""
    if detection.variable == ANSWER:
        return f"say {_values(detection.values)}"
    if detection.variable == ANSWER_KIND:
        return f"say a {_values(detection.values)}"
    if detection.variable == WORD:
        return f"word: {_values(detection.values)}"
    return f"{detection.variable}={_values(detection.values)}"


def make_label(found: Sequence[Candidate], top_tokens: Sequence[str], promoted: Sequence[str]) -> str:
    """A short name: ``say Austin`` (the next token), ``say a capital``, ``state=Texas``, ``word: capital``, or the
    tokens it is active on.

    The candidate with the highest score names the feature if it reaches `MIN_SCORE`; a second one is added where it
    reaches `MIN_SECOND_SCORE`, since many features serve two purposes. Variables with ``about`` say the same of what
    was mentioned before.
    """
    if not top_tokens:
        return ""
    parts: list[str] = []
    variables: set[str] = set()
    for number, candidate in enumerate(found):
        variable = candidate.detection.variable.removeprefix("about ")
        variable = _SAME_FACT.get(variable, variable)
        limit = MIN_SECOND_SCORE if number else MIN_SCORE
        if candidate.score >= limit and variable not in variables and len(parts) < 2:
            parts.append(_part(candidate.detection))
            variables.add(variable)
    if parts:
        return " · ".join(parts)
    return f"words: {', '.join(top_tokens[:3])} → {', '.join(promoted[:2])}"


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
    dictionary: Dictionary,
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
    logits = _written(model, dictionary) @ (model.W_U - model.W_U.mean(-1, keepdim=True))
    top, bottom = logits.topk(TOP), (-logits).topk(TOP)
    contexts = [_contexts(column, tokens, starts, ends) for column in acts.T.contiguous()]
    found = candidates(acts, columns)
    labels = []
    for index in range(acts.shape[1]):
        ranked = zip(top_tokens[index].tolist(), shares[index].tolist(), strict=True)
        active_on = [words[int(token)] for token, share in ranked if share > 0]
        labels.append(make_label(found[index], active_on, [words[int(token)] for token in top.indices[index].tolist()]))
    return SiteInfo(
        site=dictionary.site,
        layer=dictionary.layer,
        labels=tuple(labels),
        detections=tuple(tuple(candidate.detection for candidate in each) for each in found),
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


def _written(model: HookedTransformer, dictionary: Dictionary) -> Float[Tensor, "d_sae d_model"]:
    """What each feature adds to the residual stream, at all layers together, per unit of activation."""
    rows = dictionary.decoder_rows(torch.arange(dictionary.d_sae), torch.float32).sum(1)
    if write_kind(dictionary.hooks_out[0]) is Write.HEADS:
        return rows @ model.blocks[dictionary.layer].attn.W_O.flatten(0, 1)
    return rows


def _activations(
    model: HookedTransformer, dictionary: Dictionary, text: HeldOutText, batch: int = 64
) -> Float[Tensor, "token d_sae"]:
    """A dictionary's activations at the kept tokens of the text."""
    found = []
    for start in range(0, len(text.rows.tokens), batch):
        rows, mask = text.rows.tokens[start : start + batch], text.rows.real[start : start + batch]
        _, cache = model.run_with_cache(rows, names_filter=[dictionary.hook_in], return_type=None)
        x = cache[dictionary.hook_in][mask].flatten(1)
        found.append(dictionary.activate(dictionary.pre_acts(x), x))
    return torch.cat(found)


@torch.no_grad()
def feature_information(
    model: HookedTransformer,
    dictionaries: Sequence[Any],
    text: HeldOutText,
    words: Sequence[str],
    *,
    description: str,
) -> FeatureTable:
    """The table of all features; ``words`` is the vocabulary by id, ``description`` says what text it is."""
    kept = text.rows.real
    columns = variable_columns(text, kept, words)
    sites = [
        site_info(model, dictionary, _activations(model, dictionary, text), text, columns, words)
        for dictionary in bind(model, dictionaries).dictionaries
    ]
    return FeatureTable(sites, words, text=description, n_tokens=int(kept.sum()))

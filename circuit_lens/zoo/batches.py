"""Sentences packed into rows of tokens, with what the loss and the attention need to know about each token."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.sentences import Sentence
from circuit_lens.zoo.tokenizer import BOS_ID, PAD_ID


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows; position 0 is BOS, unused positions at the end are padding.

    ``visible_until[row, pos]`` is the last position that may attend to ``pos``: the row's end, except for the pieces
    of a name that are hidden from everything after the name's last token.
    """

    tokens: Int[Tensor, "row pos"]
    weights: Float[Tensor, "row pos"]
    visible_until: Int[Tensor, "row pos"]

    @property
    def real(self) -> Bool[Tensor, "row pos"]:
        """Neither BOS nor padding."""
        return (self.tokens != PAD_ID) & (self.tokens != BOS_ID)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> Rows:
        return Rows(self.tokens[index], self.weights[index], self.visible_until[index])


@dataclass(slots=True)
class _Row:
    """A row being filled; BOS is there already."""

    tokens: list[int]
    weights: list[float]
    visible_until: list[int]
    sentences: list[tuple[int, Sentence]]

    @staticmethod
    def empty(length: int) -> _Row:
        return _Row([BOS_ID], [0.0], [length], [])


def pack(
    sentences: Iterable[Sentence],
    ids: Mapping[str, int],
    *,
    length: int,
    seed: int,
    hide: float = 0.0,
    other_weight: float = 0.25,
) -> Iterator[tuple[_Row, list[tuple[int, Sentence]]]]:
    """Rows of ``length`` tokens made of whole sentences, one after the other, as (row, its sentences with offsets).

    ``hide`` is the probability that the pieces of a name before its last token are hidden from what follows the name.
    ``other_weight`` is the weight in the loss of tokens that are not determined by what stands before them (those that
    are have weight 1).
    """
    rng = random.Random(seed)
    row = _Row.empty(length)
    for sentence in sentences:
        offset = len(row.tokens)
        if offset + len(sentence.tokens) > length:
            yield row, row.sentences
            row = _Row.empty(length)
            offset = 1
        row.tokens.extend(ids[token] for token in sentence.tokens)
        weights = [other_weight] * len(sentence.tokens)
        for position in sentence.answer_positions():
            weights[position] = 1.0
        row.weights.extend(weights)
        row.visible_until.extend([length] * len(sentence.tokens))
        for span in sentence.spans:
            if span.mention.name and span.end > span.start and rng.random() < hide:
                for position in range(span.start, span.end):
                    row.visible_until[offset + position] = offset + span.end
        row.sentences.append((offset, sentence))
    yield row, row.sentences


def stack(rows: list[_Row], length: int) -> Rows:
    """Finished rows as tensors, padded at the end."""

    def padded(values: list[list[int]] | list[list[float]], fill: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values], dtype=dtype)

    return Rows(
        padded([row.tokens for row in rows], PAD_ID, torch.long),
        padded([row.weights for row in rows], 0, torch.float32),
        padded([row.visible_until for row in rows], length, torch.long),
    )


def training_batches(
    corpus: Corpus, ids: Mapping[str, int], *, batch: int, length: int, seed: int, hide: float
) -> Iterator[Rows]:
    """An endless stream of batches of fresh sentences, the same for the same seed."""
    rows: list[_Row] = []
    for row, _ in pack(corpus.sentences(seed), ids, length=length, seed=seed, hide=hide):
        rows.append(row)
        if len(rows) == batch:
            yield stack(rows, length)
            rows = []


def loss_positions(
    rows: Rows, n_positions: int, generator: torch.Generator
) -> tuple[Int[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """Where the loss is computed: every determined token, and as many others, at random, as make ``n_positions``.

    Returns indices into the flattened targets ``tokens[:, 1:]`` and their weights. The weight of the others is scaled
    up so that their sum is on average what it would be if all of them were used.
    """
    weights = rows.weights[:, 1:].flatten()
    noise = torch.rand(weights.shape, generator=generator)
    chosen = (weights + noise * (weights > 0) * (weights < 1) * 0.5).topk(n_positions).indices.sort().values
    chosen_weights = weights[chosen]
    others = (chosen_weights > 0) & (chosen_weights < 1)
    total = weights[(weights > 0) & (weights < 1)].sum()
    scale = total / chosen_weights[others].sum().clamp(min=1e-6)
    return chosen, torch.where(others, chosen_weights * scale, chosen_weights)


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Rows of fresh text with nothing hidden, and the sentences in each row with their offsets."""

    rows: Rows
    sentences: list[list[tuple[int, Sentence]]]


def held_out_text(corpus: Corpus, ids: Mapping[str, int], *, n_tokens: int, length: int, seed: int) -> HeldOutText:
    """About ``n_tokens`` tokens of text; the caller picks a seed that no training uses."""
    packed = list(pack(corpus.take(n_tokens, seed), ids, length=length, seed=seed))
    return HeldOutText(stack([row for row, _ in packed], length), [sentences for _, sentences in packed])

"""Rows of tokens to evaluate on, which of their positions count, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuit_lens.errors import TokensError
from circuit_lens.protocols import HookedModel
from circuit_lens.running import Prompt, to_tokens

Rows = Int[Tensor, "row pos"] | Prompt | Sequence[Prompt]
Mask = Tensor | Sequence[Any]
# Values of one kind (logits, activations) that a batch may have, and its tokens.
_MOST_VALUES, _MOST_TOKENS = 2**26, 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length.

    Attributes:
        tokens: The token ids.
        counted: Positions at which dictionaries are judged.
        kept: Positions that keep the model's own output in every changed run.
    """

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    kept: Bool[Tensor, "batch pos"]

    @property
    def predicting(self) -> Bool[Tensor, "batch before"]:
        """Positions, but the last, whose prediction counts: they count, and so does the token they predict."""
        return self.counted[:, :-1] & self.counted[:, 1:]


@dataclass(frozen=True, eq=False)
class Text:
    """All rows, each with its positions.

    Attributes:
        tokens, counted, kept: By row; see :class:`Batch`.
    """

    tokens: tuple[Int[Tensor, "_pos"], ...]
    counted: tuple[Bool[Tensor, "_pos"], ...]
    kept: tuple[Bool[Tensor, "_pos"], ...]

    @property
    def n_tokens(self) -> int:
        """Number of positions that count."""
        return sum(int(row.sum()) for row in self.counted)

    @property
    def n_predictions(self) -> int:
        """Number of predictions that count."""
        return sum(int((row[:-1] & row[1:]).sum()) for row in self.counted)

    def batches(self, size: int | None, width: int) -> list[list[int]]:
        """Return the rows' indices, in batches of rows of equal length, so that nothing is ever padded.

        Args:
            size: Rows of a batch; None: as many as keep what ``width`` values per position take within bounds.
            width: The most values that a position has: logits, or features of a dictionary.
        """
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(self.tokens):
            by_length.setdefault(len(row), []).append(i)
        found = []
        for length, rows in by_length.items():
            most = size or max(1, min(_MOST_TOKENS // length, _MOST_VALUES // (length * width)))
            found += [rows[start : start + most] for start in range(0, len(rows), most)]
        return found

    def take(self, batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Yield the batches of these indices."""
        for rows in batches:
            parts = [torch.stack([column[i] for i in rows]) for column in (self.tokens, self.counted, self.kept)]
            yield Batch(*parts)


def read_text(model: HookedModel, tokens: Rows, *, mask: Mask | None, keep_special: bool) -> Text:
    """Return the rows to evaluate on.

    Args:
        model: The model, by whose own tokenizer text is read.
        tokens: ``[row, pos]`` or ``[pos]`` ids, one prompt, or a sequence of prompts of any lengths.
        mask: Positions that count, shaped like ``tokens``; None: all but special ones, which are the first of each
            row and the tokenizer's beginning, end and padding tokens.
        keep_special: Whether special positions keep the model's own output.

    Raises:
        TokensError: No rows, a row that cannot be used or has one token, a mask of another shape, or nothing counts.
    """
    prompts = _prompts(tokens)
    if not prompts:
        raise TokensError("there are no rows to evaluate on; give token ids [row, pos], or a list of prompts")
    rows = tuple(_row(model, prompt, i) for i, prompt in enumerate(prompts))
    special = tuple(_special(model, row) for row in rows)
    counted = tuple(~row for row in special) if mask is None else _masks(mask, rows)
    kept = special if keep_special else tuple(torch.zeros_like(row) for row in special)
    text = Text(rows, counted, kept)
    if text.n_predictions == 0:
        raise TokensError(
            f"no prediction counts in {len(rows)} row(s): two positions in a row must count, and "
            + ("mask leaves none" if mask is not None else "the first of a row and special tokens do not by default")
        )
    return text


def _prompts(tokens: Rows) -> list[Prompt]:
    if isinstance(tokens, str) or (isinstance(tokens, Tensor) and tokens.ndim < 2):
        return [tokens]
    if isinstance(tokens, Tensor) and tokens.ndim > 2:
        raise TokensError(f"token ids have shape {tuple(tokens.shape)}; give [row, pos]")
    prompts: list[Any] = list(tokens)
    return [prompts] if prompts and all(isinstance(token, int) for token in prompts) else prompts


def _row(model: HookedModel, prompt: Prompt, i: int) -> Int[Tensor, "_pos"]:
    try:
        row = to_tokens(model, prompt)
    except TokensError as error:
        raise TokensError(f"row {i}: {error}") from error
    if len(row) < 2:
        raise TokensError(f"row {i} has one token, so nothing is predicted in it; leave it out")
    return row


def _special(model: HookedModel, row: Int[Tensor, "_pos"]) -> Bool[Tensor, "_pos"]:
    tokenizer: Any = getattr(model, "tokenizer", None)
    special = torch.zeros_like(row, dtype=torch.bool)
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            special |= row == token
    special[0] = True
    return special


def _masks(mask: Mask, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(mask, Tensor) and mask.ndim == 1 and len(rows) == 1:
        mask = mask[None]
    try:
        found = tuple(torch.as_tensor(row) for row in mask)
    except (TypeError, ValueError) as error:
        raise TokensError(f"mask is no rows of truth values: {error}") from error
    lengths, wanted = [tuple(row.shape) for row in found], [tuple(row.shape) for row in rows]
    if lengths != wanted or any(row.dtype != torch.bool for row in found):
        raise TokensError(
            f"mask must hold True or False for every token: {len(rows)} row(s), the first of {len(rows[0])} tokens; "
            f"given {len(found)} row(s)" + (f", the first of shape {lengths[0]} and {found[0].dtype}" if found else "")
        )
    return tuple(mask_row.to(row.device) for mask_row, row in zip(found, rows, strict=True))

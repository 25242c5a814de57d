"""From text to rows of tokens, with a mask of the tokens whose activations count.

A document is cut into pieces of at most the model's context, each with the beginning-of-sequence token before it where
the model's own settings put one there. A piece is one row; rows are padded at the end, where a causal model sees no
difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuit_lens.errors import TokensError, nearest
from circuit_lens.protocols import HookedModel
from circuit_lens.running import to_tokens

TEXT_COLUMNS, TOKEN_COLUMNS = ("text", "content", "document"), ("tokens", "input_ids")
_AT_ONCE = 256
_FORMS = (
    "a Path to a UTF-8 text file, a list of documents, a datasets.Dataset with a text or tokens column, or a tensor of "
    "token ids [row, pos]"
)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of tokens, and where activations are taken.

    Attributes:
        tokens: Ids; a row that is shorter is padded at its end.
        keep: False at padding, at the beginning of a sequence and at other special tokens. The activation at the
            beginning of a sequence is one constant point far from the others, which no dictionary need explain.
    """

    tokens: Int[Tensor, "row pos"]
    keep: Bool[Tensor, "row pos"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return int(self.keep.sum())

    def split(self, share: float = 0.1) -> tuple[TokenRows, TokenRows]:
        """Return (the first rows, the last rows that hold at least ``share`` of the kept tokens).

        Raises:
            TokensError: A share outside (0, 1), or too few rows for two parts.
        """
        if not 0.0 < share < 1.0:
            raise TokensError(f"the held-out share is {share:g}; it must lie between 0 and 1")
        after = self.keep.sum(1).flip(0).cumsum(0)  # tokens in the last 1, 2, ... rows
        n_last = int((after < share * int(after[-1])).sum()) + 1 if len(self) else 1
        if n_last >= len(self):
            raise TokensError(
                f"{len(self)} row(s) of tokens cannot be parted into text to train on and text held out; give more text"
            )
        cut = len(self) - n_last
        return TokenRows(self.tokens[:cut], self.keep[:cut]), TokenRows(self.tokens[cut:], self.keep[cut:])

    def digest(self) -> str:
        """Return a hash of the tokens and the mask."""
        digest = hashlib.sha256(f"{tuple(self.tokens.shape)}".encode())
        digest.update(self.tokens.to(torch.int64).contiguous().cpu().numpy().tobytes())
        digest.update(self.keep.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:32]


def token_rows(
    model: HookedModel,
    text: Any,
    *,
    keep: Bool[Tensor, "row pos"] | None = None,
    column: str | None = None,
    n_ctx: int | None = None,
    max_tokens: int | None = None,
) -> TokenRows:
    """Return text as rows of at most ``n_ctx`` tokens.

    Args:
        model: A HookedTransformer or TransformerBridge, with a tokenizer if the text is text.
        text: A ``Path`` to a UTF-8 file (documents parted by blank lines; one per line where there are none), a list of
            documents, a ``datasets.Dataset`` (also a streamed one), or token ids ``[row, pos]``, used as they are.
        keep: For token ids alone: where activations are taken. Default: everywhere but at special tokens of the
            tokenizer; without tokenizer everywhere.
        column: Column of the data set (default: the first of text, content, document, tokens, input_ids).
        n_ctx: Longest row (default, and at most: the model's context).
        max_tokens: Stop after so many kept tokens (the last row is whole).

    Raises:
        TokensError: Text that is empty, not UTF-8 or not known to the tokenizer; ids outside the vocabulary; rows
            longer than the context; no such column; something else than the forms above.
    """
    length = _row_length(model, n_ctx)
    if max_tokens is not None and max_tokens < 1:
        raise TokensError(f"max_tokens is {max_tokens}; it must be at least 1")
    if isinstance(text, TokenRows):
        return _limited(TokenRows(_checked_ids(model, text.tokens, length), text.keep), max_tokens)
    if isinstance(text, Tensor):
        rows = _checked_ids(model, text, length)
        if keep is not None and keep.shape != rows.shape:
            raise TokensError(f"keep has shape {tuple(keep.shape)}, the tokens have {tuple(rows.shape)}")
        return _limited(TokenRows(rows, _not_special(model, rows) if keep is None else keep), max_tokens)
    if keep is not None:
        raise TokensError("keep= is for token ids; of text the special tokens are left out")
    pieces = _dataset_pieces(model, text, column, length) if hasattr(text, "column_names") else _text_pieces(
        model, _documents(text), length
    )  # fmt: skip
    return _stacked(model, pieces, max_tokens)


# ---------------------------------------------------------------------------------------------------------- documents


def read_documents(path: Path | str) -> list[str]:
    """Return the documents of a text file: parted by blank lines, or one per line where there are none.

    Raises:
        TokensError: A file that is missing, not UTF-8, or empty.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokensError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    except OSError as error:
        raise TokensError(f"{path} cannot be read: {error.strerror or error}; give a UTF-8 text file") from None
    blocks: list[list[str]] = [[]]
    for line in text.strip().splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    found = ["\n".join(block) for block in blocks] if len(blocks) > 1 else blocks[0]
    found = [one for one in found if one.strip()]
    if not found:
        raise TokensError(f"{path} holds no text; give a UTF-8 text file with a document per line or paragraph")
    return found


def _documents(text: Any) -> Iterable[Any]:
    if isinstance(text, Path):
        return read_documents(text)
    if isinstance(text, str):
        raise TokensError(f"{text[:60]!r} may be a file or a document; give Path(...) or a list. Text is {_FORMS}")
    if not isinstance(text, Iterable):
        raise TokensError(f"{type(text).__name__} is no text; it is {_FORMS}")
    return text


def _text_pieces(model: HookedModel, documents: Iterable[Any], length: int) -> Iterator[list[int]]:
    """Yield the ids of every piece of the documents, those at the beginning of sequences included."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokensError("the model has no tokenizer, so text cannot be used; give token ids [row, pos]")
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    start, fast = None, False
    stream = iter(documents)
    while block := list(islice(stream, _AT_ONCE)):
        wrong = next((one for one in block if not isinstance(one, str)), None)
        if wrong is not None:
            raise TokensError(f"a document is a {type(wrong).__name__}, not text; text is {_FORMS}")
        block = [one for one in block if one.strip()]
        if not block:
            continue
        if start is None:
            start, fast = _prefix(model, tokenizer, block[:4])
        encoded = tokenizer(block, add_special_tokens=False)["input_ids"] if fast else [
            _unprefixed(model, one, start) for one in block
        ]  # fmt: skip
        for document, ids in zip(block, encoded, strict=True):
            if unknown is not None and unknown not in special and unknown in ids:
                _refuse_unknown(model, document)
            step = length - len(start)
            for first in range(0, len(ids), step):
                yield start + ids[first : first + step]


def _prefix(model: Any, tokenizer: Any, documents: Sequence[str]) -> tuple[list[int], bool]:
    """Return what the model puts before a prompt, and whether the tokenizer alone gives the same ids after it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    slow = [_ids(model, document) for document in documents]
    start = [int(bos)] if bos is not None and all(ids[:1] == [bos] for ids in slow) else []
    quick = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    return start, [start + list(ids) for ids in quick] == slow


def _ids(model: Any, document: str) -> list[int]:
    """Return a document's ids by the model's own ``to_tokens``, as prompts are tokenised everywhere."""
    return torch.as_tensor(model.to_tokens(document, truncate=False))[0].tolist()


def _unprefixed(model: Any, document: str, start: list[int]) -> list[int]:
    ids = _ids(model, document)
    return ids[len(start) :] if ids[: len(start)] == start else ids


def _refuse_unknown(model: HookedModel, document: str) -> None:
    """Raise TokensError that names a document's unknown words and the nearest ones."""
    to_tokens(model, document)
    raise TokensError(f"the tokenizer does not know a part of {document[:60]!r}")


# ----------------------------------------------------------------------------------------------------------- data sets


def _dataset_pieces(model: HookedModel, dataset: Any, column: str | None, length: int) -> Iterator[list[int]]:
    rows = iter(dataset)
    names = list(dataset.column_names or [])
    if not names:  # a streamed set may not say
        first = next(rows, None)
        if first is None:
            raise TokensError("the data set is empty; give one with rows")
        names, rows = list(first), _chain(first, rows)
    chosen = column or next((name for name in (*TEXT_COLUMNS, *TOKEN_COLUMNS) if name in names), None)
    if chosen not in names:
        wanted = f"no column {column!r}" if column else "neither a text nor a tokens column"
        raise TokensError(f"the data set has {wanted}; it has {', '.join(names)}{nearest(str(column or ''), names)}")
    yield from _column_pieces(model, (row[chosen] for row in rows), length)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _column_pieces(model: HookedModel, values: Iterator[Any], length: int) -> Iterator[list[int]]:
    first = next(values, None)
    if first is None:
        return
    if isinstance(first, str):
        yield from _text_pieces(model, _chain(first, values), length)
        return
    for value in _chain(first, values):
        try:
            ids = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TokensError(f"{value!r:.60} in the data set is neither text nor a row of token ids") from None
        if ids.numel():
            yield _checked_ids(model, ids[None], length)[0].tolist()


# ---------------------------------------------------------------------------------------------------------------- rows


def _stacked(model: HookedModel, pieces: Iterator[list[int]], max_tokens: int | None) -> TokenRows:
    special, kept, found = _special(model), 0, []
    for ids in pieces:
        found.append(ids)
        kept += sum(one not in special for one in ids)
        if max_tokens is not None and kept >= max_tokens:
            break
    if not kept:
        raise TokensError("the text has no tokens to take activations at; give text")
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    tokens = torch.full((len(found), max(map(len, found))), 0 if pad is None else int(pad), dtype=torch.long)
    present = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(found):
        tokens[row, : len(ids)] = torch.tensor(ids)
        present[row, : len(ids)] = True
    return TokenRows(tokens, present & _not_special(model, tokens))


def _limited(rows: TokenRows, max_tokens: int | None) -> TokenRows:
    if not rows.n_tokens:
        raise TokensError("keep is False everywhere (or all tokens are special ones), so there is nothing to train on")
    if max_tokens is None:
        return rows
    n = int((rows.keep.sum(1).cumsum(0) < max_tokens).sum()) + 1
    return TokenRows(rows.tokens[:n], rows.keep[:n])


def _special(model: Any) -> set[int]:
    return set(getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or ())


def _not_special(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
    special = torch.tensor(sorted(_special(model)), dtype=tokens.dtype)
    return ~torch.isin(tokens, special)


def _row_length(model: Any, n_ctx: int | None) -> int:
    longest = getattr(model.cfg, "n_ctx", None)
    length = n_ctx if n_ctx is not None else longest or 1024
    if length < 2 or (longest is not None and length > longest):
        raise TokensError(f"n_ctx is {length}; rows have 2 to {longest or 'any number of'} tokens with this model")
    return int(length)


def _checked_ids(model: Any, tokens: Tensor, length: int) -> Int[Tensor, "row pos"]:
    if tokens.ndim != 2 or not tokens.numel():
        raise TokensError(f"token ids have shape {tuple(tokens.shape)}; give [row, pos] with at least one token")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TokensError(f"token ids must be integers, not {tokens.dtype}")
    if tokens.shape[1] > length:
        raise TokensError(f"a row has {tokens.shape[1]} tokens, rows may have {length}; cut them")
    tokens, d_vocab = tokens.detach().cpu().long(), int(model.cfg.d_vocab)
    outside = (tokens < 0) | (tokens >= d_vocab)
    if outside.any():
        raise TokensError(f"token id {int(tokens[outside][0])} is outside the vocabulary of {d_vocab} tokens")
    return tokens

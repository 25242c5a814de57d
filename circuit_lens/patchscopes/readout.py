"""What patched prompts say: the next token, the text that is generated, and how both compare with the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.patchscopes.definition import Said
from circuit_lens.running import token_id


@dataclass(frozen=True, eq=False)
class Readout:
    """What runs say, over the axes of whatever they are.

    Attributes:
        top_tokens: The most probable next tokens' ids, the first first.
        top_logprobs: Their log-probabilities, in nats.
        entropy: Of the next token's distribution, in nats.
        surprisal: -log p_source(the run's most probable token), in nats: how unlikely the source finds what the run
            says (Ghandeharioun et al. 2024, §4.1); NaN where the source has no next token.
        source_nll: -log p(the source's most probable token) of the run, in nats; NaN likewise.
        new_tokens: Generated ids.
        lengths: How many of them each run wrote, the end of the sequence included.
        logits: Of the next token; None where they were not kept.
        state: The residual stream at the prompt's last position, after the layer that was asked for; None: none was.
    """

    top_tokens: Int[Tensor, "*axes n_top"]
    top_logprobs: Float[Tensor, "*axes n_top"]
    entropy: Float[Tensor, "*axes"]
    surprisal: Float[Tensor, "*axes"]
    source_nll: Float[Tensor, "*axes"]
    new_tokens: Int[Tensor, "*axes n_new"]
    lengths: Int[Tensor, "*axes"]
    logits: Float[Tensor, "*axes d_vocab"] | None = None
    state: Float[Tensor, "*axes d_model"] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The lengths of the leading axes."""
        return tuple(self.entropy.shape)

    def at(self, *index: Any) -> Readout:
        """Return the part at an index of the leading axes."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: None if value is None else value[index] for name, value in parts.items()}
        return Readout(**cut)

    def arranged(self, shape: Sequence[int], order: Sequence[int]) -> Readout:
        """Return flat runs with axes of these lengths, put into this order."""
        n = len(self.axes)
        assert n == 1, "only flat runs can be arranged"

        def moved(value: Tensor | None) -> Any:
            if value is None:
                return None
            whole = value.reshape(*shape, *value.shape[1:])
            return whole.permute(*order, *range(len(shape), whole.ndim))

        parts: dict[str, Any] = {field.name: moved(getattr(self, field.name)) for field in fields(self)}
        return Readout(**parts)


_AT_ONCE = 2**22
"""Numbers of the source's logits that are made wider at once."""


@dataclass(frozen=True, eq=False)
class SourceNext:
    """What sources say next, as a reading model's tokens; their logits are not copied.

    Attributes:
        logits: As they are kept, in any floating dtype.
        best: Of each item, the most probable of the tokens that the reading model has too.
        total: log Σ exp of each item's logits.
    """

    logits: Float[Tensor, "n_items d_source"]
    best: Int[Tensor, "n_items"]
    total: Float[Tensor, "n_items"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n_items d_source"], d_vocab: int) -> SourceNext:
        """Return what these logits say to a model of ``d_vocab`` tokens, of which as many are the same.

        Models of one tokenizer can pad their tables of tokens to different widths.
        """
        parts = logits.split(max(1, _AT_ONCE // logits.shape[-1]))
        best = torch.cat([part[:, :d_vocab].argmax(-1) for part in parts])
        return cls(logits, best, torch.cat([_wide(part).logsumexp(-1) for part in parts]))

    def logprobs(self, item: Int[Tensor, "n"], token: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Return the log-probabilities of tokens, one for each item; of one that the source's table has not, -inf."""
        item, token = item.to(self.logits.device), token.to(self.logits.device)
        known = token < self.logits.shape[-1]
        found = _wide(self.logits[item, token.where(known, 0)]) - self.total[item]
        return found.masked_fill(~known, -torch.inf)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Reader:
    """Collects what flat rows say, a part at a time.

    Args:
        n_rows: Rows in all.
        n_top: Most probable tokens to keep.
        keep_logits: Keep the next token's logits too.
    """

    def __init__(self, n_rows: int, n_top: int, keep_logits: bool) -> None:
        self.n_rows, self.n_top, self.keep_logits = n_rows, n_top, keep_logits
        self.made: Readout | None = None

    def add(
        self,
        at: Int[Tensor, "n"],
        said: Said,
        source: SourceNext | None,
        item: Int[Tensor, "n"],
    ) -> None:
        """Keep what rows say.

        Args:
            at: Their numbers.
            said: What they say.
            source: What the items' sources say next; None: that cannot be compared.
            item: Whose each row is; -1: nobody's.
        """
        logprobs = _wide(said.logits).log_softmax(-1)
        top = logprobs.topk(min(self.n_top, logprobs.shape[-1]), dim=-1)
        entropy = -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
        surprisal = source_nll = torch.full_like(entropy, torch.nan)
        if source is not None:
            nobody = (item < 0).to(logprobs.device)
            said_first = source.logprobs(item, top.indices[:, 0]).to(entropy)
            surprisal = -said_first.masked_fill(nobody, torch.nan)
            best = source.best[item.to(source.best.device)].to(logprobs.device)
            source_nll = -logprobs.gather(1, best[:, None])[:, 0].masked_fill(nobody, torch.nan)
        part = Readout(
            top_tokens=top.indices,
            top_logprobs=top.values,
            entropy=entropy,
            surprisal=surprisal,
            source_nll=source_nll,
            new_tokens=said.new_tokens,
            lengths=said.lengths,
            logits=said.logits if self.keep_logits else None,
            state=said.state,
        )
        if self.made is None:
            self.made = _empty(part, self.n_rows)
        for field in fields(Readout):
            into, value = getattr(self.made, field.name), getattr(part, field.name)
            if into is not None:
                into[at.to(into.device)] = value.to(into)

    def done(self) -> Readout:
        """Return all rows."""
        assert self.made is not None, "no row was read"
        return self.made


def _empty(like: Readout, n_rows: int) -> Readout:
    """Return room for rows, on the CPU."""
    parts = {field.name: getattr(like, field.name) for field in fields(like)}
    made = {
        name: None if value is None else torch.zeros(n_rows, *value.shape[1:], dtype=value.dtype)
        for name, value in parts.items()
    }
    return replace(like, **made)


class Wording:
    """Ids as text, by a tokenizer; ``#<id>`` without one.

    Args:
        tokenizer: The model's; None: it has none.
        d_vocab: Size of the vocabulary.
    """

    def __init__(self, tokenizer: Any, d_vocab: int) -> None:
        self.tokenizer, self.d_vocab = tokenizer, d_vocab
        self.known: dict[tuple[tuple[int, ...], bool], str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Return several tokens as text, without the tokenizer's marks (end of the sequence and the like), or one."""
        return self._decoded(tuple(ids), marks=len(ids) == 1)

    def _decoded(self, ids: tuple[int, ...], marks: bool) -> str:
        if (ids, marks) not in self.known:
            if self.tokenizer is None:
                text = " ".join(f"#{i}" for i in ids)
            else:
                text = self.tokenizer.decode(
                    list(ids), skip_special_tokens=not marks, clean_up_tokenization_spaces=False
                )
            self.known[ids, marks] = text
        return self.known[ids, marks]

    def token(self, answer: str | int) -> int:
        """Return the id of one token.

        Raises:
            TargetError: Text that is not exactly one token, or an id outside the vocabulary.
        """
        return token_id(self.tokenizer, self.d_vocab, answer)

    def texts(self, readout: Readout) -> np.ndarray:
        """Return the generated texts, an object array over the axes."""
        lengths = readout.lengths.reshape(-1).tolist()
        flat = readout.new_tokens.reshape(len(lengths), readout.new_tokens.shape[-1]).tolist()
        found = np.empty(len(flat), dtype=object)
        found[:] = [
            self._decoded(tuple(ids[:n]), marks=False) if n else "" for ids, n in zip(flat, lengths, strict=True)
        ]
        return found.reshape(readout.axes)

    def tops(self, readout: Readout) -> np.ndarray:
        """Return the most probable tokens' texts, an object array over the axes and ranks."""
        flat = readout.top_tokens.reshape(-1).tolist()
        found = np.empty(len(flat), dtype=object)
        found[:] = [self.text([i]) for i in flat]
        return found.reshape(tuple(readout.top_tokens.shape))

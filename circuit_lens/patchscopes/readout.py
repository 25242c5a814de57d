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

    def add(self, at: Int[Tensor, "n"], said: Said, source: Float[Tensor, "n d_vocab"] | None) -> None:
        """Keep what rows say.

        Args:
            at: Their numbers.
            said: What they say.
            source: Log-probabilities of the source's next token for each.
        """
        logits = said.logits.float() if said.logits.dtype in (torch.float16, torch.bfloat16) else said.logits
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self.n_top, logprobs.shape[-1]), dim=-1)
        nan = torch.full_like(logprobs[:, 0], torch.nan)
        best = None if source is None else source.argmax(-1, keepdim=True)
        part = Readout(
            top_tokens=top.indices,
            top_logprobs=top.values,
            entropy=-(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1),
            surprisal=nan if source is None else -source.gather(1, top.indices[:, :1])[:, 0].to(nan),
            source_nll=nan if best is None or source is None else -logprobs.gather(1, best)[:, 0] + 0 * source[:, 0],
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
        self.known: dict[tuple[int, ...], str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Return several tokens as text, without the marks of the tokenizer (end of the sequence and the like)."""
        key = tuple(ids)
        if key not in self.known:
            if self.tokenizer is None:
                self.known[key] = " ".join(f"#{i}" for i in key)
            else:
                self.known[key] = self.tokenizer.decode(
                    list(key), skip_special_tokens=len(key) > 1, clean_up_tokenization_spaces=False
                )
        return self.known[key]

    def token(self, answer: str | int) -> int:
        """Return the id of one token.

        Raises:
            TargetError: Text that is not exactly one token, or an id outside the vocabulary.
        """
        return token_id(self.tokenizer, self.d_vocab, answer)

    def texts(self, readout: Readout) -> np.ndarray:
        """Return the generated texts, an object array over the axes."""
        flat = readout.new_tokens.reshape(-1, readout.new_tokens.shape[-1]).tolist()
        lengths = readout.lengths.reshape(-1).tolist()
        found = np.empty(len(flat), dtype=object)
        found[:] = [self.text(ids[:length]) if length else "" for ids, length in zip(flat, lengths, strict=True)]
        return found.reshape(readout.axes)

    def tops(self, readout: Readout) -> np.ndarray:
        """Return the most probable tokens' texts, an object array over the axes and ranks."""
        flat = readout.top_tokens.reshape(-1).tolist()
        found = np.empty(len(flat), dtype=object)
        found[:] = [self.text([i]) for i in flat]
        return found.reshape(tuple(readout.top_tokens.shape))

"""The one decode loop: exact with a cache of keys and values, for both model classes, under hooks by absolute position.

The model's own ``generate`` is not used: it counts learned positions twice where there is no tokenizer, and hooks in it
cannot know which positions they see.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import CircuitLensError, TokensError
from circuit_lens.hooks import preserved_rng, quiet_norm_edits
from circuit_lens.protocols import HookedModel
from circuit_lens.running import plain_tensors, require_finite, to_tokens

Scope = Callable[[int, int], AbstractContextManager[Any]]
"""``scope(start, stop)`` is entered around every forward over the absolute positions ``start`` to ``stop - 1``."""

_KEEPS_KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention"}
# A bridge's norms may compute in float32 whatever the model's dtype is, hence the first.
_LIMITS = {torch.float64: 1e-5, torch.float32: 3e-5}
_LIMIT_HALF = 5e-2


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a model wrote.

    Attributes:
        tokens: The prompts and the new tokens; a row that is at its end is filled with its end-of-sequence token.
        logits: The logits that each new token was chosen from, in the model's dtype; of the first alone where no more
            were kept.
        n_prompt: Number of tokens of a prompt.
        lengths: New tokens of each row, up to and including the end of the sequence.
        cached: Whether the result is that of the cached loop.
        note: Why it is not although ``use_cache`` was on; "" otherwise.
    """

    tokens: Int[Tensor, "n_rows n_total"]
    logits: Float[Tensor, "n_rows n_kept d_vocab"]
    n_prompt: int
    lengths: Int[Tensor, "n_rows"]
    cached: bool
    note: str = ""

    @property
    def new_tokens(self) -> Int[Tensor, "n_rows n_new"]:
        """The new tokens alone."""
        return self.tokens[:, self.n_prompt :]

    def rows(self) -> list[Tensor]:
        """Return each row's new tokens, cut at its end of the sequence."""
        return [row[:length] for row, length in zip(self.new_tokens, self.lengths.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Prompted:
    """Prompts that were run already.

    Attributes:
        logits: After their last tokens.
        step: Goes on from there: its cache holds the prompts.
    """

    logits: Float[Tensor, "n_rows d_vocab"]
    step: Step


def decode(
    model: HookedModel,
    tokens: Int[Tensor, "n_rows n_pos"],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
    scope: Scope | None = None,
    shared_prefix: int = 0,
    prompted: Callable[[], Prompted] | None = None,
    check: bool = True,
    keep_logits: Literal["all", "first"] = "all",
) -> Decoded:
    """Continue prompts token by token; with and without a cache the result is the same.

    The model is causal, so one uncached forward over everything that was written gives the logits of every step at
    once. With ``check`` the cached logits are compared with these, under the same scope; if they differ (a cache that
    does not fit the architecture, positions that depend on the length, hooks that do not know where they are), or the
    cached run fails, the uncached loop is run and ``note`` says so. The global random state and the model are as before
    when it returns or raises.

    Args:
        model: A HookedTransformer or TransformerBridge; its hooks, permanent ones too, run in every forward.
        tokens: The prompts, equally long, without padding.
        max_new_tokens: At most so many; fewer if every row ends before.
        use_cache: Keep keys and values: the prompt is run first, then one position at a time. Otherwise every forward
            runs over all positions from 0.
        temperature: 0 takes the most probable token (the lower id of equals), more samples from softmax(logits /
            temperature).
        top_k: Sample from the k most probable tokens only (the lower id of equals).
        seed: Of the samples. A row's samples depend on the seed and its number, not on how many rows there are.
        stop_at_eos: End a row at the tokenizer's end-of-sequence token; without a tokenizer there is none.
        scope: Enters hooks around every forward, see :data:`Scope`. It must depend on the positions alone: the check
            enters it once more, for all of them.
        shared_prefix: So many first positions are the same in all rows and nothing that ``scope`` changes: with a
            cache they are run once, as one row, outside the scope, and what they leave is expanded to all rows.
        prompted: With a cache, runs the prompts in its own way, instead of the scope and the shared prefix.
        check: Compare with the uncached model, to `cache_limit`; costs one more forward over all positions.
        keep_logits: Of every new token, or of the first alone: many rows of a large vocabulary take much memory. Then
            the prompt's own logits are not computed either, but those of its last position, and nothing is checked.

    Raises:
        TokensError: Prompts that are no rows of token ids, or that do not leave room for the new tokens; a prefix that
            is not shared.
        ValueError: A negative temperature, a count below 1, or a check of logits that are not kept.
        ConsistencyError: Logits that are NaN or infinite.
    """
    if check and keep_logits == "first":
        raise ValueError("a check needs the logits of every new token; give keep_logits='all' or check=False")
    around = _everywhere if scope is None else scope
    with plain_tensors(), preserved_rng(), quiet_norm_edits():
        rows = _prompt_rows(model, tokens)
        _require_options(max_new_tokens, temperature, top_k)
        _require_room(model, rows.shape[1], max_new_tokens)
        _require_shared(rows, shared_prefix)
        eos = _eos(model) if stop_at_eos else None
        settings = _Settings(max_new_tokens, temperature, top_k, seed, eos, keep_logits == "first")
        step, note = _cached_step(model, len(rows)) if use_cache else (None, "")
        if step is not None:
            try:
                found = _loop(model, rows, step, around, settings, shared_prefix, prompted)
            except Exception as error:
                note = cache_failure(error)
                if not (check and note):
                    raise
            else:
                note = _mismatch(model, found, around) if check else ""
                if not note:
                    return found
        return _loop(model, rows, None, around, settings, 0, note=note)


def _everywhere(start: int, stop: int) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _prompt_rows(model: HookedModel, tokens: Tensor) -> Int[Tensor, "n_rows n_pos"]:
    if tokens.ndim != 2 or len(tokens) == 0:
        raise TokensError(f"prompts have shape [n_rows, n_pos], with at least one row; given {tuple(tokens.shape)}")
    return torch.stack([to_tokens(model, row) for row in tokens])


def _require_options(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; given {max_new_tokens}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be 0 (most probable token) or more; given {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for the whole vocabulary; given {top_k}")


def _require_room(model: HookedModel, n_pos: int, max_new_tokens: int) -> None:
    n_ctx = getattr(model.cfg, "n_ctx", None)
    needed = n_pos + max_new_tokens - 1  # the last token is written, not read
    if n_ctx is not None and needed > n_ctx:
        raise TokensError(
            f"{n_pos} tokens of prompt and {max_new_tokens} new ones need {needed} positions, the model's context "
            f"holds {n_ctx}; give max_new_tokens <= {n_ctx - n_pos + 1} or shorten the prompt"
        )


def _require_shared(rows: Int[Tensor, "n_rows n_pos"], prefix: int) -> None:
    n_pos = rows.shape[1]
    if not 0 <= prefix < n_pos:
        raise TokensError(f"shared_prefix must leave a position to run: 0 to {n_pos - 1}; given {prefix}")
    if bool((rows[:, :prefix] != rows[:1, :prefix]).any()):
        raise TokensError(f"the first {prefix} tokens are not the same in all rows, so they cannot be shared")


def _eos(model: HookedModel) -> int | None:
    return getattr(getattr(model, "tokenizer", None), "eos_token_id", None)


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int
    eos: int | None
    first_only: bool


# ------------------------------------------------------------------------------------------------------- one forward


class Step(ABC):
    """A forward over the next positions of a cache of keys and values that it fills."""

    @abstractmethod
    def __call__(self, tokens: Int[Tensor, "n_rows n_next"]) -> Tensor:
        """Return the logits of these positions."""

    @abstractmethod
    def fill(self, tokens: Int[Tensor, "n_rows n_next"]) -> None:
        """Do the same without logits (or with few, where the model always computes some)."""

    @abstractmethod
    def expand(self, n_rows: int) -> None:
        """Repeat the one row that was run."""


class HookedStep(Step):
    """With TransformerLens' cache; masks are explicit, since it cannot make them without a tokenizer.

    Attributes:
        cache: Keys and values of what was run.
    """

    def __init__(self, model: Any, n_rows: int) -> None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        self.model = model
        self.make = lambda rows: TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, rows)
        self.cache = self.make(n_rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of these positions."""
        return self._run(tokens, "logits")

    def fill(self, tokens: Tensor) -> None:
        """Do the same without logits."""
        self._run(tokens, None)

    def _run(self, tokens: Tensor, return_type: str | None) -> Any:
        if tokens.shape[0] != len(self.cache.previous_attention_mask):
            self.cache = self.make(tokens.shape[0])
        mask = torch.ones_like(tokens)
        return self.model(tokens, return_type=return_type, past_kv_cache=self.cache, attention_mask=mask)

    def expand(self, n_rows: int) -> None:
        """Repeat the one row that was run."""
        self.cache.previous_attention_mask = self.cache.previous_attention_mask.expand(n_rows, -1)
        for entry in self.cache.entries:
            entry.past_keys = entry.past_keys.expand(n_rows, -1, -1, -1)
            entry.past_values = entry.past_values.expand(n_rows, -1, -1, -1)


class _BridgeStep(Step):
    """With transformers' cache, of full length in every layer: windows are the masks' affair."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.done = model, DynamicCache(), 0
        accepted = inspect.signature(model.original_model.forward).parameters
        self.takes_positions = "position_ids" in accepted or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()
        )
        self.few = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._run(tokens)

    def fill(self, tokens: Tensor) -> None:
        self._run(tokens, **self.few)

    def _run(self, tokens: Tensor, **options: int) -> Tensor:
        stop = self.done + tokens.shape[1]
        positions = torch.arange(self.done, stop, device=tokens.device).expand_as(tokens)
        given = {"position_ids": positions} if self.takes_positions else {}
        mask = torch.ones(len(tokens), stop, dtype=torch.long, device=tokens.device)
        logits = self.model(
            tokens, return_type="logits", past_key_values=self.cache, use_cache=True, attention_mask=mask,
            **given, **options,
        )  # fmt: skip
        self.done = stop
        return logits

    def expand(self, n_rows: int) -> None:
        self.cache.batch_repeat_interleave(n_rows)


def _cached_step(model: Any, n_rows: int) -> tuple[Step | None, str]:
    """Return a forward with an empty cache, or None and why there is none."""
    if "past_kv_cache" in inspect.signature(model.forward).parameters:
        return HookedStep(model, n_rows), ""
    inner = getattr(model, "original_model", None)
    if inner is None:
        return None, f"run without cache: none is known for {type(model).__name__}"
    config = getattr(inner, "config", None)
    config = getattr(config, "text_config", None) or config
    kinds: list[str] = getattr(config, "layer_types", None) or []
    others = set(kinds) - _KEEPS_KEYS_AND_VALUES
    if getattr(model.cfg, "is_stateful", False):
        others.add("recurrent")
    if others:
        return None, f"run without cache: the model has {', '.join(sorted(others))} layers, not only keys and values"
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        return None, "run without cache: the model's forward takes no past_key_values"
    return _BridgeStep(model), ""


def why_uncached(model: Any) -> str:
    """Return why `decode` has no cache for this model, or "" if it has one."""
    return _cached_step(model, 1)[1]


def cache_limit(dtype: torch.dtype) -> float:
    """Return how far cached logits may be from uncached ones, as a share of the largest |logit|."""
    return _LIMITS.get(dtype, _LIMIT_HALF)


def cache_failure(error: Exception) -> str:
    """Return what to note of an error of a cached run that an uncached one may not have; "" where it may."""
    if isinstance(error, CircuitLensError | torch.OutOfMemoryError):
        return ""
    first = (str(error).splitlines() or [""])[0]
    return f"run without cache: with it the model, or a hook in it, fails ({type(error).__name__}: {first:.160})"


def uncached(
    model: Any, tokens: Int[Tensor, "n_rows n_pos"], *, last: int | None = None
) -> Float[Tensor, "n_rows n_last d_vocab"]:
    """Return the logits of an uncached forward; every token is attended, whatever the tokenizer calls it.

    Args:
        model: The model.
        tokens: Prompts of one length.
        last: Of so many last positions alone, at least one, which saves time and memory where the vocabulary is large.
            Hooks behind the blocks then see these positions only. None: of all.
    """
    kept = tokens.shape[1] if last is None else last
    if "past_kv_cache" in inspect.signature(model.forward).parameters:
        mask = torch.ones_like(tokens)
        if last is None:
            return model(tokens, return_type="logits", attention_mask=mask)
        stream = model(tokens, stop_at_layer=model.cfg.n_layers, attention_mask=mask)
        return model(stream[:, -kept:], start_at_layer=model.cfg.n_layers, return_type="logits")
    accepted = inspect.signature(getattr(model, "original_model", model).forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if last is not None and "logits_to_keep" in accepted:
        options["logits_to_keep"] = kept
    return model(tokens, return_type="logits", **options)[:, -kept:]


# ---------------------------------------------------------------------------------------------------------- the loop


def _loop(
    model: Any,
    rows: Int[Tensor, "n_rows n_pos"],
    step: Step | None,
    around: Scope,
    settings: _Settings,
    prefix: int,
    prompted: Callable[[], Prompted] | None = None,
    *,
    note: str = "",
) -> Decoded:
    tokens, n_pos, done, kept = rows, rows.shape[1], 0, []
    before: Tensor | None = None
    choose = _Choice(len(rows), settings)
    lengths = torch.full((len(rows),), settings.max_new_tokens, device=rows.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if prompted is not None and step is not None:
        ready = prompted()
        step, before, done = ready.step, ready.logits, n_pos
    elif prefix and step is not None:
        step.fill(rows[:1, :prefix])
        step.expand(len(rows))
        done = prefix
    for n_new in range(1, settings.max_new_tokens + 1):
        if before is None:
            logits = _next_logits(model, tokens, step, around, done, settings.first_only)
            done = 0 if step is None else tokens.shape[1]
        else:
            logits, before = before, None
        require_finite("logits", logits)
        chosen = choose(logits).to(rows.device)
        if settings.eos is not None:
            chosen = torch.where(ended, torch.full_like(chosen, settings.eos), chosen)
            lengths = torch.where(~ended & (chosen == settings.eos), torch.full_like(lengths, n_new), lengths)
            ended |= chosen == settings.eos
        if n_new == 1 or not settings.first_only:
            kept.append(logits)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if bool(ended.all()):
            break
    return Decoded(tokens, torch.stack(kept, dim=1), n_pos, lengths, cached=step is not None, note=note)


def _next_logits(
    model: Any, tokens: Int[Tensor, "n_rows n_pos"], step: Step | None, around: Scope, done: int, last_only: bool
) -> Float[Tensor, "n_rows d_vocab"]:
    """Run the tokens from ``done`` on, or without a step all of them, and return the logits after the last."""
    stop = tokens.shape[1]
    if last_only and step is not None and stop - done > 1:
        with around(done, stop - 1):
            step.fill(tokens[:, done:-1])
        done = stop - 1
    with around(done, stop):
        every = uncached(model, tokens) if step is None else step(tokens[:, done:])
    return every[:, -1].clone()  # a view would keep the logits of every position alive


def _mismatch(model: Any, found: Decoded, around: Scope) -> str:
    """Return how the cached logits differ from one uncached forward over all that was written, or ""."""
    tokens = found.tokens[:, :-1]
    with around(0, tokens.shape[1]):
        wanted = uncached(model, tokens)[:, found.n_prompt - 1 :]
    gap = (found.logits - wanted).abs().amax(dim=(0, 2)) / wanted.abs().amax().clamp_min(1e-30)
    limit = cache_limit(wanted.dtype)
    worst = float(gap.max())
    if worst <= limit:
        return ""
    first = int((~(gap <= limit)).nonzero()[0])
    return (
        f"run without cache: from new token {first} on, the cached logits differ from the model's own by up to "
        f"{worst:.2g} of the largest (limit {limit:g}), so the cache or a hook does not fit"
    )


class _Choice:
    """Chooses a token per row; draws are made on the CPU, so that they are the same on every device."""

    def __init__(self, n_rows: int, settings: _Settings) -> None:
        self.temperature, self.top_k, seed = settings.temperature, settings.top_k, settings.seed
        self.draws = [np.random.default_rng([abs(seed), int(seed < 0), row]) for row in range(n_rows)]

    def __call__(self, logits: Float[Tensor, "n_rows d_vocab"]) -> Int[Tensor, "n_rows"]:
        """Return the chosen ids."""
        if self.temperature == 0.0:
            ids = torch.arange(logits.shape[-1], device=logits.device)
            is_best = logits == logits.amax(-1, keepdim=True)  # argmax may return any of equals
            return torch.where(is_best, ids, logits.shape[-1]).amin(-1)
        values, order = torch.sort(logits.double().cpu(), dim=-1, descending=True, stable=True)
        values, order = values[:, : self.top_k], order[:, : self.top_k]
        shares = torch.softmax(values / self.temperature, dim=-1).cumsum(-1)
        draws = torch.tensor([[draw.random()] for draw in self.draws], dtype=torch.float64)
        at = torch.searchsorted(shares, draws * shares[:, -1:], right=True).clamp(max=shares.shape[1] - 1)
        return order.gather(1, at)[:, 0]

"""Tokens and forward passes: one tokenisation path and one way to run a hooked model, for both model classes."""

from __future__ import annotations

import contextlib
import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.errors import ConsistencyError, TargetError, TokensError, nearest
from circuit_lens.hooks import Hook, preserved_rng, quiet_norm_edits, scoped_hooks, suspended, user_hooks
from circuit_lens.protocols import HookedModel

Prompt = str | Tensor | Sequence[int]


def model_device(model: HookedModel) -> torch.device:
    """Return the device of the model's unembedding, where attribution runs."""
    return model.W_U.device


def to_tokens(model: HookedModel, prompt: Prompt) -> Int[Tensor, "n_pos"]:
    """Return one prompt as token ids on the model's device, by the model's own ``to_tokens`` for text.

    Args:
        model: A hooked model, with a tokenizer if the prompt is text.
        prompt: Text (the beginning-of-sequence token is added as the model's own settings say), or the ids themselves,
            shape ``[n_pos]`` or ``[1, n_pos]``, used as they are.

    Raises:
        TokensError: Empty, longer than the context, ids outside the vocabulary, words the tokenizer does not know, or
            more than one prompt.
    """
    tokens = _text_to_tokens(model, prompt) if isinstance(prompt, str) else _ids_to_tokens(prompt)
    n_ctx = getattr(model.cfg, "n_ctx", None)
    if tokens.numel() == 0:
        raise TokensError("the prompt is empty; give text or at least one token id")
    if n_ctx is not None and len(tokens) > n_ctx:
        raise TokensError(f"the prompt has {len(tokens)} tokens, the model's context holds {n_ctx}; shorten it")
    d_vocab = model.cfg.d_vocab
    outside = (tokens < 0) | (tokens >= d_vocab)
    if outside.any():
        raise TokensError(f"token id {int(tokens[outside][0])} is outside the vocabulary of {d_vocab} tokens")
    return tokens.to(model_device(model))


def _ids_to_tokens(prompt: Tensor | Sequence[int]) -> Tensor:
    # A copy outside inference mode, so that later autograd may use what depends on it.
    with torch.inference_mode(False):
        try:
            # Without a dtype: one would cut numbers with a fraction off in silence.
            tokens = prompt.detach().clone() if isinstance(prompt, Tensor) else torch.tensor(list(prompt))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TokensError(
                f"{prompt!r:.80} is no prompt; give text, or the token ids of one prompt as a tensor or a list of "
                "integers"
            ) from error
    if tokens.numel() and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise TokensError(f"token ids must be integers, not {tokens.dtype}; give text or ids")
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.ndim != 1:
        raise TokensError(
            f"token ids have shape {tuple(tokens.shape)}; one prompt at a time: [n_pos] or [1, n_pos]. For a batch, "
            "call once per row."
        )
    return tokens.long()


def _text_to_tokens(model: HookedModel, prompt: str) -> Tensor:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokensError("the model has no tokenizer, so text cannot be used; give token ids")
    if not prompt.strip():
        raise TokensError("the prompt is empty; give text or at least one token id")
    with torch.inference_mode(False):
        tokens = torch.as_tensor(model.to_tokens(prompt, truncate=False))[0].clone()  # type: ignore[attr-defined]
    require_known(tokenizer, tokens, lambda: prompt)
    return tokens


def require_known(tokenizer: Any, tokens: Int[Tensor, "n_pos"], text: Callable[[], str]) -> None:
    """Raise where a text became tokens by words that the tokenizer does not know.

    Args:
        tokenizer: The model's.
        tokens: What it made of the text.
        text: Gives the text, whose words the error names.

    Raises:
        TokensError: The tokens hold the one for unknown words.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = {getattr(tokenizer, f"{s}_token_id", None) for s in ("bos", "eos", "pad")}
    if unknown is not None and unknown not in special and (tokens == unknown).any():
        raise TokensError(_unknown_words(tokenizer, text(), unknown))


def _unknown_words(tokenizer: Any, prompt: str, unknown: int) -> str:
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    words = [prompt[a:b] for token, (a, b) in spans if token == unknown and b > a] or [prompt]
    vocabulary = [w for w in tokenizer.get_vocab() if not w.startswith("<")]
    folded = {w.lower(): w for w in vocabulary}
    parts = []
    for word in dict.fromkeys(words):
        close = [folded[w] for w in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.5)]
        parts.append(f"{word!r}" + (f" (nearest: {', '.join(close)})" if close else ""))
    return f"the tokenizer does not know {', '.join(parts)}; its vocabulary has {len(vocabulary)} words"


def token_strings(model: HookedModel, tokens: Int[Tensor, "n_pos"]) -> tuple[str, ...]:
    """Return each token as text; ``"#<id>"`` where the model has no tokenizer."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return tuple(f"#{int(t)}" for t in tokens)
    return tuple(tokenizer.decode([int(t)], clean_up_tokenization_spaces=False) for t in tokens)


def token_string(model: HookedModel, token: int) -> str:
    """Return one token id as text."""
    return token_strings(model, torch.tensor([token]))[0]


def single_token(model: HookedModel, token: int | str) -> int:
    """Return a token's id.

    Raises:
        TargetError: Text that is not exactly one token, or an id outside the vocabulary.
    """
    return token_id(getattr(model, "tokenizer", None), int(model.W_U.shape[-1]), token)


def token_id(tokenizer: Any, d_vocab: int, token: int | str) -> int:
    """Return a token's id, given a model's tokenizer (None: none) and vocabulary; see :func:`single_token`."""
    if not isinstance(token, str):
        try:
            number = operator.index(token)
        except TypeError as error:
            raise TargetError(f"{token!r:.80} is no token; give its text or its id") from error
        if not 0 <= number < d_vocab:
            raise TargetError(f"token id {number} is outside the vocabulary of {d_vocab} tokens")
        return number
    if tokenizer is None:
        raise TargetError(f"the model has no tokenizer, so {token!r} cannot be used as a target; give a token id")
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or token == tokenizer.unk_token):
        return int(ids[0])
    pieces = [tokenizer.decode([i]) for i in ids]
    spaced = tokenizer.encode(f" {token}", add_special_tokens=False)
    hint = f"; {' ' + token!r} (with a space) is one" if len(spaced) == 1 and len(ids) > 1 else ""
    if len(ids) == 1:
        hint = nearest(token, tokenizer.get_vocab())
        raise TargetError(f"the target {token!r} is not in the tokenizer's vocabulary{hint}")
    raise TargetError(f"the target {token!r} is {len(ids)} tokens, {pieces}, not one{hint}")


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Leave inference mode, without gradients: tensors made inside may be used by autograd later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "n_pos"],
    *,
    hooks: Sequence[Hook] = (),
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
    alone: bool = False,
) -> Float[Tensor, "n_pos d_vocab"]:
    """Run the model once on one prompt, with the user's temporary hooks first and ours after them.

    The global random state is the same afterwards. Returns the logits, shape ``[n_pos, d_vocab]``.

    Args:
        model: The model.
        tokens: The prompt.
        hooks: Ours.
        fwd_hooks: The user's temporary ones.
        alone: Silence the permanent hooks of the user.
    """
    return forward_rows(model, tokens, 1, hooks=hooks, fwd_hooks=fwd_hooks, alone=alone)[0]


def forward_rows(
    model: HookedModel,
    tokens: Int[Tensor, "n_pos"],
    n_rows: int,
    *,
    hooks: Sequence[Hook] = (),
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
    alone: bool = False,
) -> Float[Tensor, "n_rows n_pos d_vocab"]:
    """Run the model once on ``n_rows`` copies of one prompt, which hooks make different; see :func:`forward`."""
    return forward_batch(model, tokens[None].expand(n_rows, -1), hooks=hooks, fwd_hooks=fwd_hooks, alone=alone)


def forward_batch(
    model: HookedModel,
    tokens: Int[Tensor, "batch n_pos"],
    *,
    hooks: Sequence[Hook] = (),
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
    alone: bool = False,
) -> Float[Tensor, "batch n_pos d_vocab"]:
    """Run the model once on prompts of one length; see :func:`forward`."""
    silent = suspended(set(model.hook_dict.values())) if alone else contextlib.nullcontext()
    with preserved_rng(), quiet_norm_edits(), silent, user_hooks(model, fwd_hooks), scoped_hooks(model, hooks):
        return model(tokens, return_type="logits")


def run_and_capture(
    model: HookedModel,
    tokens: Int[Tensor, "n_pos"],
    names: Sequence[str],
    *,
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
) -> tuple[Float[Tensor, "n_pos d_vocab"], dict[str, Tensor]]:
    """Run the model once without gradients and return its logits and the named activations (batch axis kept).

    Hooks of the user, permanent or given, run before the capture, so that what is captured is what the model used.

    Raises:
        HookError: An unknown or silent hook.
        ConsistencyError: An activation or the logits hold NaN or infinity.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def edit(value: Tensor) -> None:
            captured[name] = value.detach().clone()

        return Hook(name, edit)

    with plain_tensors():
        logits = forward(model, tokens, hooks=[keep(name) for name in names], fwd_hooks=fwd_hooks)
    require_finite("logits", logits)
    return logits, captured


def require_finite(name: str, value: Tensor) -> None:
    """Raise ConsistencyError if the tensor holds NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        raise ConsistencyError(
            f"{name} holds NaN or infinite values, so nothing can be attributed; run the model in a wider dtype or "
            "find the hook that makes them"
        )

"""Where vectors are moved to: a target prompt with a placeholder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from circuit_lens.errors import PatchscopeError, TokensError
from circuit_lens.graph.positions import find_position, join_tokens
from circuit_lens.patchscopes.given import Places, places
from circuit_lens.patchscopes.maps import Map
from circuit_lens.protocols import HookedModel
from circuit_lens.running import Prompt, require_known, to_tokens, token_strings

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Placed:
    """A target prompt of one model.

    Attributes:
        tokens: Its ids.
        positions: Of the placeholders, in the order in which they were given.
        strings: The text of each token.
    """

    tokens: Int[Tensor, "n_pos"]
    positions: tuple[int, ...]
    strings: tuple[str, ...]

    @property
    def start(self) -> int:
        """The position from which on runs differ: that of the first placeholder."""
        return min(self.positions)

    @property
    def text(self) -> str:
        """The prompt's tokens, the placeholders in brackets."""
        return join_tokens([_bracketed(text) if i in self.positions else text for i, text in enumerate(self.strings)])


@dataclass(frozen=True)
class Target:
    """A prompt in which a vector is read.

    Attributes:
        prompt: Text, token ids, or the messages of a chat (``[{"role": "user", "content": "..."}]``), which the
            tokenizer's chat template turns into tokens, up to where the assistant answers.
        at: The placeholder: a position or the text of exactly one token; several of them for as many placeholders, in
            the order of the source's positions.
        which: Which occurrence of a text that occurs more than once, ``"all"`` for all of them.
        name: For tables.
    """

    prompt: Prompt | Messages
    at: Places = "x"
    which: Literal["first", "last", "all"] | int | None = None
    name: str = ""

    def place(self, model: HookedModel) -> Placed:
        """Return the tokens and the placeholders' positions.

        Raises:
            TokensError: No prompt, words that the tokenizer does not know, messages that are none, or a chat for a
                tokenizer without chat template.
            TokenNotFoundError: A placeholder that is not there, or there more than once without ``which``.
            PatchscopeError: A placeholder of several tokens, the same one twice, or one that is neither a whole number
                nor a text.
        """
        tokens = _tokens(model, self.prompt)
        strings = token_strings(model, tokens)
        positions = [i for one in places(self.at, "at") for i in self._find(strings, one)]
        if not positions or len(set(positions)) != len(positions):
            raise PatchscopeError(
                f"at={self.at!r} names positions {positions}: give at least one, each once. The tokens are "
                f"{list(strings)}"
            )
        return Placed(tokens, tuple(positions), strings)

    def _find(self, strings: Sequence[str], one: int | str) -> list[int]:
        if self.which == "all" and isinstance(one, str):
            found = [i for i, text in enumerate(strings) if _same(text, one)]
            return found or [find_position(strings, one)]
        which = None if self.which == "all" else self.which
        position = find_position(strings, one, which=which)
        if isinstance(one, str) and not _same(strings[position], one):
            raise PatchscopeError(
                f"the placeholder {one!r} is no single token of the target, whose tokens are {list(strings)}; take a "
                "placeholder that is one token, or give the positions of all its tokens: at=(3, 4)"
            )
        return [position]


@dataclass(frozen=True)
class Preset(Target):
    """A target prompt with the settings that it is meant for; what `patchscope` is given stands before them.

    Attributes:
        target_layers: Layers, "all", "same" (each source layer into itself) or "last".
        max_new_tokens: Tokens to generate.
        mapping: f; None: the identity.
        provenance: Where the text and the settings come from.
    """

    target_layers: str | int | tuple[int, ...] = "same"
    max_new_tokens: int = 0
    mapping: Map | None = None
    provenance: str = ""


def _bracketed(token: str) -> str:
    """Return a token in brackets, the blanks before it outside: they say how the tokens are joined."""
    clean = token.replace("Ġ", " ").replace("▁", " ")
    text = clean.lstrip()
    return f"{clean[: len(clean) - len(text)]}[{text}]" if text else f"[{token}]"


def _same(token: str, text: str) -> bool:
    """Whether a token is this text, with or without the blanks around it."""
    return token == text or token.replace("Ġ", " ").replace("▁", " ").strip() == text.strip()


def _tokens(model: HookedModel, prompt: Prompt | Messages) -> Int[Tensor, "n_pos"]:
    if isinstance(prompt, Mapping):
        raise TokensError(f"a chat is a list of messages; give [{dict(prompt)!r:.80}]")
    if isinstance(prompt, str | Tensor) or not prompt or not isinstance(prompt[0], Mapping):
        return to_tokens(model, prompt)  # pyright: ignore[reportArgumentType]
    messages: list[Any] = list(prompt)
    tokenizer: Any = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        raise TokensError("the model's tokenizer has no chat template; give the target prompt as text or token ids")
    ids = _templated(tokenizer, messages, tokenize=True)
    tokens = to_tokens(model, torch.as_tensor(ids["input_ids"] if isinstance(ids, Mapping) else ids))
    require_known(tokenizer, tokens, lambda: _templated(tokenizer, messages, tokenize=False))
    return tokens


def _templated(tokenizer: Any, messages: list[Any], *, tokenize: bool) -> Any:
    """Return a chat as ids or text, up to where the assistant answers."""
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise TokensError(f"{message!r:.80} is no message of a chat; give {{'role': 'user', 'content': ...}}")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize)
    except Exception as error:  # of the template, which is code
        raise TokensError(
            f"the tokenizer's chat template does not take these messages ({error}); give what it is written for"
        ) from error

"""Positions of a prompt, given as numbers or as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from circuit_lens.errors import TokenNotFoundError, nearest

Which = Literal["last", "first"] | int
"""Which occurrence of a string that occurs more than once: ``"first"``, ``"last"`` or n, counted from 0."""

_BLANKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


def find_position(token_strings: Sequence[str], pos: int | str, *, which: Which | None = None) -> int:
    """Return the position that ``pos`` names.

    An int counts from the start, a negative one from the end. A string must name one token or one span of
    consecutive tokens, with or without the blanks around it; a span means its last token.

    Args:
        token_strings: the strings of the prompt's tokens.
        pos: position or string.
        which: which occurrence is meant where the string occurs more than once: "first", "last" or n from 0.

    Raises:
        TokenNotFoundError: no such position, no such token, or several and ``which`` is None or out of range.
    """
    n_pos = len(token_strings)
    if not isinstance(pos, str):
        if not -n_pos <= pos < n_pos:
            raise TokenNotFoundError(
                f"Position {pos} does not exist: the prompt has {n_pos} tokens, so valid are "
                f"0 to {n_pos - 1}, or -{n_pos} to -1 from the end."
            )
        return pos % n_pos
    found = _occurrences(token_strings, pos)
    if not found:
        raise TokenNotFoundError(
            f"The prompt has no token {pos!r}{nearest(pos, _clean_all(token_strings))}. "
            f"Its tokens are {list(token_strings)}."
        )
    if which is None:
        if len(found) > 1:
            raise TokenNotFoundError(
                f"{pos!r} occurs {len(found)} times, at positions {found}: give the position, "
                'or which="first", which="last" or which=n (from 0).'
            )
        return found[0]
    number = {"first": 0, "last": len(found) - 1}.get(which) if isinstance(which, str) else which
    if number is None or not 0 <= number < len(found):
        raise TokenNotFoundError(
            f"which={which!r} is not valid: {pos!r} occurs {len(found)} times, at positions "
            f'{found}; give "first", "last" or 0 to {len(found) - 1}.'
        )
    return found[number]


def join_tokens(token_strings: Sequence[str]) -> str:
    """Return the text of a prompt's tokens: joined as they are, or by blanks where no token carries any.

    >>> join_tokens(["The", " cat"]), join_tokens(["The", "cat"])
    ('The cat', 'The cat')
    """
    plain = [text.translate(_BLANKS) for text in token_strings]
    return ("" if any(text != text.strip() for text in plain) else " ").join(plain)


def _clean_all(strings: Sequence[str]) -> list[str]:
    """Return the strings without the blanks (of any tokenizer's spelling) around them."""
    return [text.translate(_BLANKS).strip() or text for text in strings]


def _occurrences(token_strings: Sequence[str], text: str) -> list[int]:
    """Return the last position of every token, or else of every span of tokens, that reads ``text``."""
    exact = [i for i, token in enumerate(token_strings) if token == text]
    if exact:
        return exact
    wanted, clean = _clean_all([text])[0], _clean_all(token_strings)
    single = [i for i, token in enumerate(clean) if token == wanted]
    if single:
        return single
    spans = set()
    plain = [token.translate(_BLANKS) for token in token_strings]
    for glue, parts in (("", plain), (" ", clean)):
        for start in range(len(parts)):
            run = ""
            for end in range(start, len(parts)):
                run = parts[end] if end == start else run + glue + parts[end]
                if run.strip() == wanted:
                    spans.add(end)
                if len(run.strip()) >= len(wanted) and run.strip():
                    break
    return sorted(spans)

"""One dictionary for each layer, where several are published."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from circuit_lens.errors import DictionaryError
from circuit_lens.loading.failures import LoadError
from circuit_lens.loading.layouts import Found

T = TypeVar("T")
Rule = str | float | int
RULES = ("lowest-l0", "highest-l0")


def parse_rule(text: str) -> Rule:
    """Return the rule that a text says: one of `RULES`, a number, or else a regular expression.

    >>> parse_rule("80"), parse_rule("lowest-l0")
    (80.0, 'lowest-l0')
    """
    try:
        return float(text)
    except ValueError:
        return text


def choose(found: Sequence[Found], rule: Rule | None, what: str) -> list[Found]:
    """Return one dictionary for each layer, layers ascending.

    Args:
        found: Candidates; their settings say layer and, for rules on it, L0.
        rule: ``"lowest-l0"``, ``"highest-l0"``; a number: the L0 nearest to it, the lower of two as near; any other
            text: a regular expression that one name of every layer matches. None: there must be one for each already.
            Where their files name the hook at which they write, one for each of those.
        what: Name of the set, for messages.

    Raises:
        LoadError: The rule does not decide, or leaves a layer without one.
        DictionaryError: No rule, and a layer that is there twice.
    """
    layers: dict[tuple[int | None, str], list[Found]] = {}
    for one in found:
        layers.setdefault((one.settings.layer, one.settings.site or ""), []).append(one)
    unknown = layers.pop((None, ""), [])
    if rule is None:
        for (layer, _), several in layers.items():
            if len(several) > 1:
                shown = ", ".join(map(str, several[:4])) + (", ..." if len(several) > 4 else "")
                raise DictionaryError(
                    f"{what} has {len(several)} dictionaries for layer {layer} ({shown}); choose with per_layer: "
                    f"{', '.join(RULES)}, a number (the nearest L0), or a regular expression"
                )
        return [*unknown, *(several[0] for several in layers.values())]
    if unknown:
        raise LoadError(
            f"per_layer={rule!r}: the layer of {unknown[0]} is not known before it is loaded, since nothing beside its "
            "weights names a hook; give the folders that you want as a list, without per_layer"
        )
    return [_one(layers[key], rule, f"{what}, layer {key[0]}") for key in sorted(layers, key=_order)]


def _order(key: tuple[int | None, str]) -> tuple[int, str]:
    return (-1 if key[0] is None else key[0], key[1])


def _one(several: list[Found], rule: Rule, what: str) -> Found:
    if isinstance(rule, str) and rule not in RULES:
        return _matching(several, rule, what)
    l0s = [one.settings.l0 for one in several]
    if len(several) == 1:
        return several[0]
    if None in l0s:
        raise LoadError(f"per_layer={rule!r}: no L0 is published for {several[l0s.index(None)]}; use an expression")
    known = [float(l0) for l0 in l0s if l0 is not None]
    wanted = min(known) if rule == RULES[0] else max(known) if rule == RULES[1] else None
    if wanted is None:
        wanted = min(known, key=lambda l0: (abs(l0 - float(rule)), l0))
    best = [one for one, l0 in zip(several, known, strict=True) if l0 == wanted]
    if len(best) > 1:
        raise LoadError(
            f"per_layer={rule!r} does not decide for {what}: {', '.join(map(str, best[:4]))} all have L0 {wanted:g}; "
            "choose by a regular expression, or narrow the release with release:pattern"
        )
    return best[0]


def _matching(several: list[Found], rule: str, what: str) -> Found:
    try:
        expression = re.compile(rule)
    except re.error as error:
        raise LoadError(f"per_layer={rule!r} is no regular expression: {error}; rules are {', '.join(RULES)}") from None
    matching = [one for one in several if expression.search(_name(one))]
    if len(matching) != 1:
        shown = ", ".join(_name(one) for one in (matching or several)[:4])
        raise LoadError(
            f"per_layer={rule!r} matches {len(matching)} of the {len(several)} of {what}, it must match one: {shown}"
        )
    return matching[0]


def _name(one: Found) -> str:
    return one.sae_id or (one.files[0] if one.files else str(one))

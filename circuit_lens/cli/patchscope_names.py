"""How a command line names target prompts, layers and features of a patchscope; no model, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.failing import CommandError
from circuit_lens.errors import nearest

if TYPE_CHECKING:
    from circuit_lens.patchscopes.targets import Target

FORMS = ("arrows", "lines", "pairs", "is", "words")
PRESETS = ("entity", "identity", "logit-lens", "tuned-lens", "attribute", "multi-hop", "cross-model", "explain")
_WITH_TEXT = ("attribute", "multi-hop")
_WITH_FORM = ("identity", "cross-model")
_WITH_MAP = ("tuned-lens", "cross-model")
_LAYERS = re.compile(r"(emb|-?\d+)(?:\s*-\s*(\d+))?")
_FEATURE = re.compile(r"[Ll]?(\d+)\s*[:#]\s*#?(\d+)(?::([A-Za-z_]\w*(?:\.\w+)*))?")
_SITE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)\s*#\s*(\d+)")


@dataclass(frozen=True)
class TargetName:
    """A target as it was typed: a preset with its form or its text, or a text.

    Attributes:
        preset: One of `PRESETS`; "" for a text.
        rest: The preset's form or text, or the whole text.
        typed: What was typed.
    """

    preset: str
    rest: str
    typed: str

    def make(self, *, at: int | str | None, words: bool, mapping: Any) -> Target:
        """Return the target.

        Args:
            at: The placeholder; None: the preset's, or ``x``.
            words: Take the forms that are written in the words of the bundled models.
            mapping: A fitted map, where the preset needs one.
        """
        from circuit_lens.patchscopes import presets
        from circuit_lens.patchscopes.targets import Target

        placeholder = "x" if at is None else at
        form: Any = self.rest or ("words" if words else "lines")
        match self.preset:
            case "":
                return Target(self.rest, at=placeholder, which="all" if isinstance(placeholder, str) else None)
            case "entity":
                return presets.entity_description("words" if words else "paper")
            case "identity":
                return presets.token_identity(form)
            case "logit-lens":
                return presets.logit_lens()
            case "tuned-lens":
                return presets.tuned_lens(mapping)
            case "attribute":
                return presets.attribute(self.rest, at=str(placeholder))
            case "multi-hop":
                return presets.multi_hop(self.rest, -1 if at is None else at)
            case "cross-model":
                return presets.cross_model(mapping, form)
            case _:
                return presets.self_explanation("words" if words else "question")


def parse_target(text: str, *, at: int | str | None, mapped: bool) -> TargetName:
    """Return the target that was typed.

    >>> parse_target("identity:arrows", at=None, mapped=False).rest
    'arrows'
    >>> parse_target("cat : animal ; x :", at=None, mapped=False).preset
    ''

    Args:
        text: What was typed.
        at: The placeholder that was typed.
        mapped: Whether a map was given.

    Raises:
        CommandError: Nothing; a preset without the text or the map that it needs, or with one that it cannot take; or
            one word that is no preset.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    known = f"give a text with the placeholder x, or a preset: {', '.join(PRESETS)}"
    if not text.strip():
        raise CommandError(f"--target is empty; {known}")
    if name not in PRESETS:
        if not re.search(r"\s", text.strip()) and at is None and "x" not in text:
            raise CommandError(f"--target {text!r} is neither a preset nor a text{nearest(text, PRESETS)}; {known}")
        return TargetName("", text.strip(), text)
    shown = f"--target {text!r}"
    if name in _WITH_TEXT and not rest:
        raise CommandError(f"{shown}: write its text, such as --target '{name}:The largest city in x'")
    if name in _WITH_FORM and rest and rest not in FORMS:
        raise CommandError(f"{shown}: {rest!r} is no form{nearest(rest, FORMS)}; forms are {', '.join(FORMS)}")
    if colon and name not in (*_WITH_TEXT, *_WITH_FORM):
        raise CommandError(f"{shown}: {name} takes nothing after a colon")
    if at is not None and name not in _WITH_TEXT:
        raise CommandError(f"{shown}: --at is for a text; {name} has a placeholder of its own")
    if name in _WITH_MAP and not mapped:
        raise CommandError(f"{shown}: it reads through a fitted map; give --mapping FILE")
    return TargetName(name, rest, text)


@dataclass(frozen=True)
class FeatureName:
    """A feature of a dictionary as it was typed: by layer, by site, or both."""

    layer: int | None
    index: int
    site: str | None
    typed: str


def parse_feature(text: str) -> FeatureName:
    """Return the feature that was typed: ``L1:302``, ``L1:302:SITE`` or ``SITE#302``.

    >>> parse_feature("L1:302").layer, parse_feature("blocks.1.hook_mlp_out#302").site
    (1, 'blocks.1.hook_mlp_out')

    Raises:
        CommandError: Something else.
    """
    shown = text.strip()
    if match := _FEATURE.fullmatch(shown):
        return FeatureName(int(match.group(1)), int(match.group(2)), match.group(3), shown)
    if match := _SITE.fullmatch(shown):
        return FeatureName(None, int(match.group(2)), match.group(1), shown)
    raise CommandError(f"--feature {text!r}: write LAYER:INDEX, such as L1:302, or SITE#INDEX")


def parse_layers(option: str, text: str | None, *, words: tuple[str, ...]) -> str | list[int] | None:
    """Return layers that were typed: a word, or numbers and ranges; ``emb`` and -1 are the embedding.

    >>> parse_layers("--layers", "emb,1,3-5", words=("all",))
    [-1, 1, 3, 4, 5]
    >>> parse_layers("--layers", "-1-1", words=())
    [-1, 0, 1]

    Args:
        option: What the user wrote before it.
        text: What was typed; None: nothing.
        words: Words that are valid.

    Raises:
        CommandError: Something else, or a layer twice.
    """
    if text is None:
        return None
    if text.strip().lower() in words:
        return text.strip().lower()
    found: list[int] = []
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip().lower())
        if match is None:
            raise CommandError(
                f"{option} {text!r}: write {', '.join(words)}, or numbers and ranges, such as 1,3 or 0-5 (emb: the "
                "embedding)"
            )
        first = -1 if match.group(1) == "emb" else int(match.group(1))
        last = first if match.group(2) is None else int(match.group(2))
        if first < -1 or last < first:
            raise CommandError(f"{option} {text!r}: {part.strip()} is no layer and no range (emb: the embedding)")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise CommandError(f"{option} {text!r} names a layer twice")
    return found

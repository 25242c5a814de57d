"""Target prompts with their exact text, and where each comes from.

A preset is a `circuit_lens.patchscopes.targets.Target` that brings target layers, map and number of new tokens with it;
what `cl.patchscope` is given stands before them. Texts differ between publications and decide what comes out, so each
has a name of its own. Forms called "words" are written in the words of the bundled models.
"""

from __future__ import annotations

from typing import Any, Literal

from circuit_lens.errors import PatchscopeError
from circuit_lens.patchscopes.given import Places
from circuit_lens.patchscopes.maps import Map
from circuit_lens.patchscopes.targets import Preset
from circuit_lens.running import Prompt

_PAPER = "Ghandeharioun et al. 2024, Patchscopes (arXiv 2401.06102)"

# Form: text, placeholder, provenance.
_IDENTITY = {
    "arrows": ("cat->cat; 135->135; hello->hello; ?", "?", f"{_PAPER}, Figure 1"),
    "lines": ("cat -> cat\n1135 -> 1135\nhello -> hello\n?", "?", f"{_PAPER}, notebook of the authors"),
    "pairs": ("king king\n1135 1135\nhello hello\n?", "?", "nnterp 1.3, repeat_prompt()"),
    "is": ("bat is bat; 135 is 135; hello is hello; black is black; shoe is shoe; x is", "x", "obvs, TokenIdentity"),
    "words": ("cat - > cat ; Lyon - > Lyon ; small - > small ; x - >", "x", "lists of copies in the bundled corpus"),
}  # fmt: skip
_DESCRIPTION = {
    "paper": (
        "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational "
        "major appliance and consumer electronics corporation, x", 20, f"{_PAPER}, §4.3",
    ),
    "words": ("cat : small animal ; Lyon : city in France ; x :", 4, "lists of descriptions in the bundled corpus"),
}  # fmt: skip
_EXPLANATION = {
    "question": (
        'Q: What is the meaning of the word "X"?\nA: The meaning of the word "X" is "', "X", 20,
        "after Kharlapenko et al. 2024, Self-explaining SAE features",
    ),
    "words": (
        "cat : small animal ; Lyon : city in France ; x :", "x", 4, "lists of descriptions in the bundled corpus",
    ),
}  # fmt: skip


def logit_lens() -> Preset:
    """Read a state as if it were the last: it replaces the last layer's, and ``unembed(ln_final(h))`` is said.

    A model that caps its logits (``cfg.output_logits_soft_cap`` c, Gemma 2) says ``c tanh(unembed(ln_final(h)) / c)``.
    What the target prompt is does not matter; it is one token (id 0). nostalgebraist 2020; as a patchscope in
    Ghandeharioun et al. 2024, §3, Table 1.
    """
    return Preset([0], at=0, name="logit lens", target_layers="last", provenance=f"{_PAPER}, Table 1")


def tuned_lens(mapping: Map) -> Preset:
    """Read a state after an affine map to the last layer (Belrose et al. 2023; Din et al. 2023).

    Args:
        mapping: ``cl.patchscopes.fit_map(model, texts, pairs="last")``.
    """
    provenance = f"{_PAPER}, Table 1; the map by least squares"
    return Preset([0], at=0, name="tuned lens", target_layers="last", mapping=mapping, provenance=provenance)


def token_identity(form: Literal["arrows", "lines", "pairs", "is", "words"] = "lines") -> Preset:
    """Read a state by a list of copies; the next token is what the state stands for (Ghandeharioun et al. 2024, §4.1).

    There is no one published text:

    - "arrows": Figure 1 of the paper; "lines": the authors' notebook, with which they measured;
    - "pairs": nnterp's; "is": obvs';
    - "words": for the bundled models.

    With early layers patched the forms with arrows tend to be continued by the arrow.
    """
    text, at, provenance = _form("form", form, _IDENTITY)
    return Preset(text, at=at, name=f"token identity ({form})", provenance=provenance)


def entity_description(form: Literal["paper", "words"] = "paper") -> Preset:
    """Read a state by a list of descriptions (Ghandeharioun et al. 2024, §4.3); "words" is for the bundled models."""
    text, n_new, provenance = _form("form", form, _DESCRIPTION)
    return Preset(text, name="entity description", max_new_tokens=n_new, provenance=provenance)


def attribute(relation: str, *, at: str = "x", max_new_tokens: int = 20) -> Preset:
    """Read an attribute without examples: ``attribute("The largest city in x")`` (Ghandeharioun et al. 2024, §4.2).

    The paper moves each source layer into every target layer, generates 20 tokens, and counts an item as right if any
    target layer says the attribute.

    Args:
        relation: The text, with the placeholder.
        at: The placeholder.
        max_new_tokens: Tokens to generate.
    """
    return Preset(
        relation, at=at, name=f"attribute: {relation}", target_layers="all", max_new_tokens=max_new_tokens,
        provenance=f"{_PAPER}, §4.2",
    )  # fmt: skip


def multi_hop(second: Prompt, at: Places = -1, *, max_new_tokens: int = 20, name: str = "multi-hop") -> Preset:
    """Put the answer to a first step where a second step asks about it (Ghandeharioun et al. 2024, §5.2).

    The source is the prompt of the first step, read at its last token; the target is that of the second step, patched
    where it names what the first step answers.

    Args:
        second: The second step's prompt.
        at: Its position, or placeholder.
        max_new_tokens: Tokens to generate.
        name: For tables.
    """
    return Preset(
        second, at=at, name=name, target_layers="all", max_new_tokens=max_new_tokens, provenance=f"{_PAPER}, §5.2"
    )


def cross_model(mapping: Map, form: Literal["arrows", "lines", "pairs", "is", "words"] = "lines") -> Preset:
    """Read one model's states with another: token identity through a fitted map (Ghandeharioun et al. 2024, §4.4).

    Args:
        mapping: ``cl.patchscopes.fit_map(model, texts, target_model=other)``.
        form: See `token_identity`.
    """
    text, at, _ = _form("form", form, _IDENTITY)
    return Preset(text, at=at, name=f"cross-model ({form})", mapping=mapping, provenance=f"{_PAPER}, §4.4")


def self_explanation(form: Literal["question", "words"] = "question") -> Preset:
    """Ask what a direction means (after Kharlapenko et al. 2024); for `circuit_lens.explain_feature`.

    "question" has two placeholders; "words" is the list of descriptions of the bundled models.
    """
    text, at, n_new, provenance = _form("form", form, _EXPLANATION)
    return Preset(
        text, at=at, which="all", name="self-explanation", target_layers="all", max_new_tokens=n_new,
        provenance=provenance,
    )  # fmt: skip


def _form(what: str, given: str, forms: dict[str, Any]) -> Any:
    if given not in forms:
        raise PatchscopeError(f"{what}={given!r} is not valid; give one of {', '.join(map(repr, forms))}")
    return forms[given]

"""What a direction means, asked of the model itself: a search over scales and layers, beside its controls.

After Kharlapenko et al. 2024, "Self-explaining SAE features": a feature's decoder row, at some length, stands in for
the word whose meaning is asked. The length decides what comes out, so several are tried, and ranked without reading
the answers. Random directions go through the same search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.dictionaries.adapt import adapt
from circuit_lens.errors import PatchscopeError, TokenNotFoundError, TokensError
from circuit_lens.patchscopes import presets
from circuit_lens.patchscopes.explanation import Explanation
from circuit_lens.patchscopes.given import Indices, numbers, whole
from circuit_lens.patchscopes.grid import Grid, Layers
from circuit_lens.patchscopes.maps import Map
from circuit_lens.patchscopes.patchscope import patchscope
from circuit_lens.patchscopes.rows import Through
from circuit_lens.patchscopes.sources import Vectors
from circuit_lens.patchscopes.streams import EMBEDDING, MEMORY, residual_streams
from circuit_lens.patchscopes.targets import Placed, Preset, Target
from circuit_lens.protocols import HookedModel
from circuit_lens.running import Prompt, require_known

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths that are tried, in units of the mean residual norm at the target layer: doubled from a quarter to eight."""
N_RANDOM = 19
"""Random directions: as few as can show a difference at the level 1 / 20."""
NEW_TOKENS = 16
"""Tokens to generate where the target does not say."""
QUESTION, ANSWER = 'What is the meaning of the word "X"?', 'The meaning of the word "X" is "'
"""The question to a chat model, and how its answer begins."""

Unit = float | Mapping[int, float]
"""The length of a vector of scale 1: at every target layer, or by layer."""


@dataclass(frozen=True, eq=False)
class Lengths(Map):
    """f(v) = v · (the unit of the target layer).

    Attributes:
        units: By target layer.
    """

    units: Mapping[int, float] = field(default_factory=dict)

    name = "in units of the target layer"

    def __call__(
        self, h: Float[Tensor, "*batch d_model"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the vectors in the target layer's unit."""
        return h * self.units[target_layer]


def explain_feature(
    dictionary: Any,
    index: Indices,
    *,
    model: Any,
    layer: int | None = None,
    scales: float | Sequence[float] | None = None,
    unit: Unit | None = None,
    target: Target | Prompt | None = None,
    target_layers: Layers | None = None,
    read_layer: int | None = None,
    alpha: float = 0.5,
    n_random: int = N_RANDOM,
    max_new_tokens: int | None = None,
    write: Literal["replace", "add"] = "replace",
    patch_through: Through = "layer",
    seed: int = 0,
    memory: float = MEMORY,
    progress: bool | None = None,
) -> Explanation:
    """Let a model say what a feature of a dictionary writes (after Kharlapenko et al. 2024).

    The feature's unit decoder row times a length replaces the placeholder of a prompt that asks for its meaning. All
    scales, target layers, features and random directions are rows of one `circuit_lens.patchscope`. See
    `explain_vectors` for how they are ranked and compared.

    Args:
        dictionary: Of ``rm.dictionaries``, or a SAELens module.
        index: Feature or features.
        model: A hooked model, or a ReplacementModel, whose model is taken.
        layer: Which of the layers that a cross-layer dictionary writes to; None: the sum over all of them.
        scales, unit, target, target_layers, read_layer, alpha, n_random: See `explain_vectors`.
        max_new_tokens, write, patch_through, seed, memory, progress: See `explain_vectors`.

    Raises:
        DictionaryError: Something that is no dictionary.
        PatchscopeError: A feature that does not exist or writes nothing, a dictionary of another width than the model;
            and as `explain_vectors`.
        TokensError: A target in words that the tokenizer does not know.
    """
    hooked, found = hooked_model(model), adapt(dictionary)
    width = hooked.cfg.d_model
    if found.d_out != width:
        raise PatchscopeError(
            f"{found.site} writes vectors of width {found.d_out}, the model's residual stream has width {width}; give "
            "the model that the dictionary was made for"
        )
    return explain_vectors(
        hooked, Vectors.decoder(found, index, layer=layer), scales=scales, unit=unit, target=target,
        target_layers=target_layers, read_layer=read_layer, alpha=alpha, n_random=n_random,
        max_new_tokens=max_new_tokens, write=write, patch_through=patch_through, seed=seed, memory=memory,
        progress=progress,
    )  # fmt: skip


def explain_vectors(
    model: Any,
    vectors: Vectors,
    *,
    scales: float | Sequence[float] | None = None,
    unit: Unit | None = None,
    target: Target | Prompt | None = None,
    target_layers: Layers | None = None,
    read_layer: int | None = None,
    alpha: float = 0.5,
    n_random: int = N_RANDOM,
    max_new_tokens: int | None = None,
    write: Literal["replace", "add"] = "replace",
    patch_through: Through = "layer",
    seed: int = 0,
    memory: float = MEMORY,
    progress: bool | None = None,
) -> Explanation:
    """Let a model say what directions mean, such as supernodes (`Vectors.supernode`).

    **Unit.** A scale of 1 is the mean norm of the residual stream after the target layer, over the target prompt's own
    tokens on an unpatched run, without the first token (whose norm is often far larger) and the placeholder.

    **Ranking.** For each row (direction v, target layer, scale):

    - entropy H: of the first token of the answer, in nats;
    - self-similarity s: the cosine of v and the residual stream after ``read_layer`` at the prompt's last position;
    - score = alpha · s - (1 - alpha) · H / log(d_vocab).

    Both terms lie between -1 and 1 (0 and 1) for every row by itself, so the score of a row does not depend on what
    else was tried, and scores of different directions can be compared. A row is good if the last position still points
    along the direction and the answer is certain. Kharlapenko et al. 2024 weigh the same two quantities with alpha and
    1 - alpha; their sign and normalisation could not be verified, and these are ours. On the bundled model entropy
    alone (alpha=0) finds more than any share of self-similarity, and one fixed scale more than the search
    (``benchmarks/README.md``). Ties go to the lower layer, then the earlier scale.

    **Controls.** ``n_random`` isotropic directions of the same lengths go through the same search, each compared with
    itself. p = (1 + those whose best score is at least this one's) / (1 + n_random). Several directions are not
    corrected for being several. The prompt without a patch is run too.

    Args:
        model: A hooked model, or a ReplacementModel.
        vectors: Directions of no layer and one position; their length does not matter.
        scales: Lengths in units; None: `SCALES`.
        unit: The length of scale 1, one for all layers or by layer; None: as above.
        target: The prompt and its placeholder; None: `default_target`.
        target_layers: Where the vector is written; None: the embedding (-1) and the lower half of the blocks. All must
            be below ``read_layer``, unless the placeholder is the prompt's last token.
        read_layer: The late layer; None: that of 16 of 18 (``8 * n_layers // 9``), as published for Gemma-2B.
        alpha: Between 0 (entropy alone) and 1 (self-similarity alone).
        n_random: Random directions; 0: none.
        max_new_tokens: Tokens to generate; None: the preset's, else 16.
        write: "replace" the placeholder's state, or "add" to it.
        patch_through: See `circuit_lens.patchscope`.
        seed: Of the random directions.
        memory, progress: See `circuit_lens.patchscope`.

    Raises:
        PatchscopeError: Vectors that are zero or of layers, scales or units that are not above 0, alpha outside 0 to 1,
            layers that do not exist or that the read layer cannot see, no default target for the tokenizer.
        TokensError, TokenNotFoundError: A target in words that the tokenizer does not know, or without placeholder.
    """
    hooked = hooked_model(model)
    tried = SCALES if scales is None else tuple(numbers(scales, "scales"))
    _require(vectors, tried, alpha, n_random)
    asked = default_target(hooked) if target is None else target if isinstance(target, Target) else Target(target)
    placed = asked.place(hooked)
    n_layers = hooked.cfg.n_layers
    late = 8 * n_layers // 9 if read_layer is None else whole(read_layer, "read_layer")
    layers = range(EMBEDDING, n_layers // 2) if target_layers is None else target_layers
    units = units_of(hooked, placed, unit)
    rows = vectors.values[:, 0, 0].to(hooked.W_U)
    rows = torch.cat([_unit(rows), random_directions(n_random, rows.shape[-1], seed).to(rows)])
    names = (*vectors.names, *(f"random {i}" for i in range(n_random)))
    moved = Vectors.of(rows, names)
    _require_seen(Grid.of(moved, hooked, "all", layers, tried, controls=False).target_layers, late, placed)
    n_new = asked.max_new_tokens if isinstance(asked, Preset) else NEW_TOKENS
    result = patchscope(
        hooked, moved, asked, target_layers=layers, mapping=Lengths(units), scales=tried,
        max_new_tokens=n_new if max_new_tokens is None else max_new_tokens, keep_logits=False, read_layer=late,
        controls=False, write=write, patch_through=patch_through, memory=memory, progress=progress,
    )  # fmt: skip
    state = result.patched.state
    assert state is not None, "the read layer was asked for"
    similar = torch.cosine_similarity(state[:, 0].double(), rows.cpu().double()[:, None, None], dim=-1)
    entropy = result.patched.entropy[:, 0].double()
    score = alpha * similar - (1 - alpha) * entropy / math.log(hooked.W_U.shape[-1])
    return Explanation(
        items=vectors.names, n_random=n_random, alpha=alpha, read_layer=late, units=units, result=result,
        self_similarity=similar.numpy(), entropy=entropy.numpy(), score=score.numpy(), notes=result.notes,
    )  # fmt: skip


def default_target(model: HookedModel) -> Target:
    """Return the question that a model is asked: as a chat, as text, or in the words of the bundled models.

    A tokenizer with a chat template gets the question as a user's message and the beginning of the answer; others
    `presets.self_explanation("question")`, or "words" where the tokenizer does not know the question's words.

    Raises:
        PatchscopeError: No tokenizer, or one that knows the words of none of them.
    """
    remedy = "give target=cl.Target(prompt, at=placeholder), a prompt that asks for the placeholder's meaning"
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise PatchscopeError(f"the model has no tokenizer, so there is no default target; {remedy}, in token ids")
    chat = getattr(tokenizer, "chat_template", None) is not None
    asked = [lambda: _chat(model, tokenizer)] if chat else []
    asked += [lambda: presets.self_explanation("question"), lambda: presets.self_explanation("words")]
    reasons = []
    for make in asked:
        try:
            target = make()
            target.place(model)
        except (TokensError, TokenNotFoundError, PatchscopeError) as error:
            reasons.append(str(error))
        else:
            return target
    raise PatchscopeError(f"no default target can be written with this tokenizer ({reasons[0]}); {remedy}")


def _chat(model: HookedModel, tokenizer: Any) -> Preset:
    """Return the question as a chat, with the beginning of the answer."""
    asked = Target([{"role": "user", "content": QUESTION}], at="X", which="all").place(model).tokens.tolist()
    begun = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    require_known(tokenizer, torch.tensor(begun), lambda: ANSWER)
    return Preset(
        [*asked, *begun], at="X", which="all", name="self-explanation (chat)", max_new_tokens=20,
        provenance="after Kharlapenko et al. 2024, Self-explaining SAE features",
    )  # fmt: skip


def units_of(model: HookedModel, placed: Placed, unit: Unit | None = None) -> dict[int, float]:
    """Return the length of scale 1 by layer: as given, or the mean residual norm; see `explain_vectors`.

    Raises:
        PatchscopeError: A unit that is not above 0, layers without one, or a prompt of nothing but its first token and
            placeholders.
    """
    known = range(EMBEDDING, model.cfg.n_layers)
    if unit is not None:
        units = dict(unit) if isinstance(unit, Mapping) else dict.fromkeys(known, float(unit))
        missing = [layer for layer in known if layer not in units]
        if missing or not all(0 < length < math.inf for length in units.values()):
            raise PatchscopeError(
                f"unit={unit!r} is not valid; give a number above 0, or one for each of the layers {list(known)}"
            )
        return units
    own = [i for i in range(1, len(placed.tokens)) if i not in placed.positions]
    if not own:
        raise PatchscopeError(
            f"the target {placed.text!r} has no token but the first and its placeholders, so the mean residual norm "
            "cannot be measured on it; give unit="
        )
    streams = residual_streams(model, placed.tokens, known)
    return {layer: float(streams[layer][own].float().norm(dim=-1).mean()) for layer in known}


def random_directions(n: int, d_model: int, seed: int) -> Float[Tensor, "n d_model"]:
    """Return isotropic unit vectors; the global random state stays as it is."""
    drawn = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def hooked_model(model: Any) -> HookedModel:
    """Return a hooked model, or that of a ReplacementModel.

    Raises:
        PatchscopeError: Something else.
    """
    found = model if isinstance(model, HookedModel) else getattr(model, "model", None)
    if not isinstance(found, HookedModel):
        raise PatchscopeError(
            f"model={type(model).__name__} is no model; give a HookedTransformer, a TransformerBridge, or a "
            "ReplacementModel"
        )
    return found


def _unit(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    norms = rows.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise PatchscopeError("a vector of zeros has no direction; leave it out")
    return rows / norms


def _require(vectors: Vectors, scales: tuple[float, ...], alpha: Any, n_random: Any) -> None:
    if vectors.layers is not None or vectors.values.shape[2] != 1:
        raise PatchscopeError(
            f"vectors of layers {vectors.layers} and {vectors.values.shape[2]} positions are no directions; give "
            "Vectors.decoder(...), Vectors.supernode(...), Vectors.of(...), or vectors.without_layers(layer)"
        )
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise PatchscopeError(f"scales={scales!r} is not valid; give at least one number, all above 0")
    if not isinstance(alpha, Real) or not 0 <= float(alpha) <= 1:
        raise PatchscopeError(f"alpha={alpha!r} is not valid; give a weight from 0 to 1")
    if whole(n_random, "n_random") < 0:
        raise PatchscopeError(f"n_random={n_random!r} is not valid; give 0 or more")


def _require_seen(layers: tuple[int, ...] | str, read: int, placed: Placed) -> None:
    """Raise where the read layer cannot depend on what is written."""
    assert not isinstance(layers, str), "directions belong to no layer"
    if max(layers) >= read and len(placed.tokens) - 1 not in placed.positions:
        raise PatchscopeError(
            f"target layer {max(layers)} is not below read_layer={read}, at which the prompt's last position cannot "
            "depend on it; give lower target_layers or a later read_layer"
        )

"""What a user wants changed, as records: no model is needed to write an intervention down.

Everything that can be changed is :class:`Editable`: features and supernodes, error nodes, directions. Its methods
return an :class:`Intervention`; ``rm.intervene`` says what happens then.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuit_lens.errors import InterventionError

Position = int | str
Positions = Position | slice | Sequence[Position]
"""A position (index, or the string of one token), several, or a slice; ``slice(None)`` means all of them, and an open
slice goes on into generated text."""


class Action(enum.Enum):
    """How the new value is found."""

    SET = "set"  # the value
    SCALE = "scale"  # value times the activation on the clean run
    ADD = "add"  # the activation on the clean run plus the value
    INJECT = "inject"  # value times the activation recorded on another prompt


class Editable:
    """What an intervention can change. ``pos=None`` stands for the position that the target itself names."""

    def set(self, value: float, *, pos: Positions | None = None) -> Intervention:
        """Give it this activation (of an error or a direction: this many times its own vector)."""
        return Intervention(self, Action.SET, float(value), pos)

    def scale(self, factor: float, *, pos: Positions | None = None) -> Intervention:
        """Multiply its activation on the clean run: 0 ablates, -1 inhibits, 2 amplifies, 1 changes nothing."""
        return Intervention(self, Action.SCALE, float(factor), pos)

    def ablate(self, *, pos: Positions | None = None) -> Intervention:
        """Switch it off: ``scale(0)``."""
        return self.scale(0.0, pos=pos)

    def add(self, value: float, *, pos: Positions | None = None) -> Intervention:
        """Add to its activation on the clean run."""
        return Intervention(self, Action.ADD, float(value), pos)

    def inject(
        self,
        from_: Any,
        *,
        factor: float = 1.0,
        pos: Positions | None = None,
        from_pos: Position | Sequence[Position] | None = None,
    ) -> Intervention:
        """Give it the activation that it has on another prompt, times ``factor``.

        Args:
            from_: The other prompt (text or token ids), several prompts (their mean), or a recording of them
                (``rm.record(...)``).
            factor: Factor of the recorded activation.
            pos: Where to inject.
            from_pos: Where it is recorded on the other prompt: a position, or one per prompt; None: where the target
                itself says (a string is looked up in the other prompt).
        """
        return Intervention(self, Action.INJECT, float(factor), pos, from_, from_pos)


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of one feature, supernode, error node or direction.

    Attributes:
        target: What is changed.
        action: How the new value is found.
        value: The value, factor or summand of the action.
        pos: Where; None: at the target's own position.
        source, source_pos: Of an injection: the other prompt(s), and where there.

    Raises:
        InterventionError: NaN or infinity as value, or no position at all.
    """

    target: Editable
    action: Action
    value: float
    pos: Positions | None = None
    source: Any = None
    source_pos: Position | Sequence[Position] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InterventionError(f"{self.action.value}({self.value}) of {self.target}: give a finite number")
        if isinstance(self.pos, Sequence) and not isinstance(self.pos, str) and not len(self.pos):
            raise InterventionError(
                f"{self.action.value} of {self.target} names no position: give at least one, or slice(None) for all"
            )

    def __str__(self) -> str:
        where = "" if self.pos is None else f" at {self.pos}"
        number = "" if self.action is Action.INJECT and self.value == 1 else f" {self.value:g}"
        return f"{self.action.value} {self.target}{number}{where}"


@dataclass(frozen=True)
class ErrorNode(Editable):
    """What dictionaries miss of what they stand for, at one position.

    Attributes:
        layer: Layer of the MLP output, or of where an SAE stands.
        pos: Position, or the string of one token.
        site: The hook, where dictionaries stand at several of the layer.
    """

    layer: int
    pos: Position
    site: str | None = None

    def __str__(self) -> str:
        where = f"P{self.pos}" if isinstance(self.pos, int) else repr(self.pos)
        return f"L{self.layer} {where} error" + ("" if self.site is None else f" ({self.site})")


@dataclass(frozen=True, eq=False)
class Direction(Editable):
    """A direction of the residual stream (or of what is added to it); its activation is ``x · v / |v|²``.

    An activation of 1 is one ``vector``: ``add(1)`` adds the vector, ``scale(0)`` projects it out.

    Attributes:
        vector: The direction; not zero.
        layer: Layer.
        pos: Position, or the string of one token.
        hook: Hook point within the block: ``hook_resid_pre``, ``hook_resid_mid``, ``hook_resid_post``,
            ``hook_attn_out`` or ``hook_mlp_out``.
        name: What it is called in results.

    Raises:
        InterventionError: Another hook, or a vector that is zero or not finite.
    """

    vector: Float[Tensor, "d_model"]
    layer: int
    pos: Position
    hook: str = "hook_resid_post"
    name: str = "direction"

    HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")

    def __post_init__(self) -> None:
        if self.hook not in self.HOOKS:
            raise InterventionError(f"a direction lives at one of {', '.join(self.HOOKS)}; given {self.hook!r}")
        if not isinstance(self.vector, Tensor) or self.vector.ndim != 1:
            raise InterventionError(
                f"the vector of {self.name!r} must be a tensor [d_model]; given {self.vector!r:.60}"
            )
        object.__setattr__(self, "vector", self.vector.detach())
        norm = float(self.vector.double().norm())
        if not (math.isfinite(norm) and norm > 0):
            raise InterventionError(f"the vector of {self.name!r} is zero or not finite; give another")

    def __str__(self) -> str:
        where = f"P{self.pos}" if isinstance(self.pos, int) else repr(self.pos)
        return f"L{self.layer} {where} {self.name} ({self.hook})"

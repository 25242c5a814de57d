"""Settings of a local replacement model, and one row of its graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

Engine = Literal["auto", "fast", "reference"]


@dataclass(frozen=True)
class Settings:
    """What a local replacement model holds constant, and how it is computed.

    Attributes:
        norms: ``"frozen"``: norm denominators are constants; ``"linear"``: norms by their Jacobian.
        attention: ``"frozen"``: patterns are constants; ``"linear"``: queries, keys and softmax to first order.
        mlp: An MLP without dictionary is ``"error"``, one error node, or ``"jacobian"``, its local Jacobian. ``"auto"``
            is the second where an autoencoder is among the dictionaries, the first otherwise.
        engine: ``"fast"`` sweep, ``"reference"`` autograd, or ``"auto"``: fast where it applies and agrees.
        zero_positions: Positions at which no feature is active by decree.
        check: Check the frozen model before it is used (linearity, two rows of the fast path against the reference,
            reconstruction).
        min_explained: Least share of the MLP output's square that a dictionary must explain on the prompt; None: any.
    """

    norms: Literal["frozen", "linear"] = "frozen"
    attention: Literal["frozen", "linear"] = "frozen"
    mlp: Literal["auto", "error", "jacobian"] = "auto"
    engine: Engine = "auto"
    zero_positions: tuple[int, ...] = ()
    check: bool = True
    min_explained: float | None = 0.0

    def __post_init__(self) -> None:
        valid = {
            "norms": ("frozen", "linear"),
            "attention": ("frozen", "linear"),
            "mlp": ("auto", "error", "jacobian"),
            "engine": ("auto", "fast", "reference"),
        }
        for name, allowed in valid.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid; give one of {', '.join(allowed)}")
        if self.engine == "fast" and self.attention == "linear":
            raise ValueError("attention='linear' needs autograd; use engine='auto' or 'reference'")

    def settled(self, *, autoencoders: bool) -> Settings:
        """Return the settings with ``mlp`` decided: between autoencoders only MLPs carry anything on."""
        if self.mlp != "auto":
            return self
        return replace(self, mlp="jacobian" if autoencoders else "error")

    def manifest(self) -> dict[str, Any]:
        """Return what a graph's edges depend on."""
        kept = {name: getattr(self, name) for name in ("norms", "attention", "mlp")}
        return kept | {"zero_positions": list(self.zero_positions)}


@dataclass(frozen=True, eq=False)
class Row:
    """One target's row: what every source contributes to it.

    Attributes:
        target: Name of the target.
        values: Contribution of each source node, in units of the target.
        bias: What belongs to the target alone.
        value: The target's value; ``values.sum() + bias`` equals it.
        names: Name of each source node.
    """

    target: str
    values: Float[Tensor, "n_sources"]
    bias: float
    value: float
    names: tuple[str, ...]

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """Return the ``n`` sources with the largest contributions, signs kept."""
        order = self.values.abs().topk(min(n, len(self.values))).indices.tolist()
        return [(self.names[i], float(self.values[i])) for i in order]

    def __str__(self) -> str:
        lines = [f"{self.target} = {self.value:.4f} (own bias {self.bias:+.4f})"]
        return "\n".join(lines + [f"  {value:+9.4f}  {name}" for name, value in self.top()])

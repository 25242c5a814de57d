"""From interventions as users write them to numbers: which activation of which row becomes what."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.errors import InterventionError
from circuit_lens.graph.edits import Action, Direction, ErrorNode, Intervention, Position, Positions
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.interventions.recording import Recording, record, write_hooks
from circuit_lens.protocols import Dictionary

Place = tuple[str, int, int | bytes]
"""What is changed: ``(site or hook, position, index)``; the index of an error is -1, a direction's its vector. The
position ``OPEN`` stands for all generated ones."""

OPEN = -1


@dataclass(frozen=True)
class OpenChange:
    """A change in every generated position from ``start`` on: ``new = base + factor * activation there``."""

    target: Feature | Direction
    base: float
    factor: float
    start: int


@dataclass
class Wanted:
    """The changes of one run; every value is fixed before it.

    Attributes:
        features: New activations by site, then position and index.
        errors: New errors by the hook written at, then position.
        directions: By hook, then position and the direction's vector: the direction and its new coordinate.
        open_changes: What goes on into generated text.
        inactive: Members of supernodes that ``scale`` found inactive; they are held at 0.
    """

    features: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    errors: dict[str, dict[int, Float[Tensor, "d_out"]]] = field(default_factory=dict)
    directions: dict[str, dict[tuple[int, bytes], tuple[Direction, float]]] = field(default_factory=dict)
    open_changes: dict[Place, OpenChange] = field(default_factory=dict)
    inactive: list[Feature] = field(default_factory=list)


class Resolver:
    """Resolves interventions against one recorded run; donors of injections are recorded once.

    Args:
        recording: The clean run.
        generating: Whether text is written after the prompt, where open slices go on.
    """

    def __init__(self, recording: Recording, *, generating: bool = False) -> None:
        self.recording, self.binding, self.generating = recording, recording.binding, generating
        self._donors: dict[Any, list[Recording]] = {}
        self._hooks = write_hooks(self.binding)
        self._seen: dict[Place, tuple[Intervention, Any]] = {}

    def resolve(self, interventions: Iterable[Intervention] | Intervention) -> Wanted:
        """Return the changes of one run.

        Raises:
            InterventionError: A feature out of range or inactive where it is to be scaled, two interventions that
                change one thing differently, something that is no intervention.
            TokenNotFoundError: A position that the prompt does not have.
        """
        listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        wanted = Wanted()
        self._seen = {}
        for one in listed:
            if not isinstance(one, Intervention):
                raise InterventionError(
                    f"{one!r:.80} is no intervention; write one as cl.Feature(layer, pos, index).set(0.0), "
                    "supernode.scale(-1) or the like"
                )
            self._add(wanted, one)
        for f in wanted.inactive:  # a factor of nothing is nothing; what another intervention gives counts
            wanted.features.setdefault(str(f.site), {}).setdefault((int(f.pos), f.index), 0.0)
        return wanted

    def _add(self, wanted: Wanted, one: Intervention) -> None:
        target = one.target
        if isinstance(target, Feature):
            self._features(wanted, one, [target])
        elif isinstance(target, Supernode):
            self._features(wanted, one, target.features)
        elif isinstance(target, ErrorNode):
            self._error(wanted, one, target)
        elif isinstance(target, Direction):
            self._direction(wanted, one, target)
        else:
            raise InterventionError(f"{target!r:.80} cannot be changed; give a feature, supernode, error or direction")

    # Features

    def _features(self, wanted: Wanted, one: Intervention, members: Sequence[Feature]) -> None:
        done = 0
        inactive: list[Feature] = []
        for member in members:
            d = self.dictionary(member)
            acts = self.recording.acts(d)
            positions, open_end = self.positions(one.pos if one.pos is not None else member.pos)
            for pos in positions:
                clean = float(acts[pos, member.index])
                if one.action is Action.SCALE and clean == 0.0:
                    inactive.append(Feature(d.layer, pos, member.index, d.site))
                    continue
                value = self._value(one, clean, member)
                self._note(one, (d.site, pos, member.index), value)
                wanted.features.setdefault(d.site, {})[pos, member.index] = value
                done += 1
            if open_end:
                target = Feature(d.layer, member.pos, member.index, d.site)
                place = d.site, OPEN, member.index
                self._add_open(wanted, one, place, target, lambda m=member: self._value(one, 0.0, m))
                done += 1
        if not done and inactive:
            raise InterventionError(self._nothing_active(one, inactive))
        wanted.inactive += inactive

    def dictionary(self, feature: Feature) -> Dictionary:
        """Return a feature's dictionary.

        Raises:
            DictionaryError: No such layer or site.
            InterventionError: The index is out of range.
        """
        d = self.binding.dictionary(feature.layer, feature.site)
        if not 0 <= feature.index < d.d_sae:
            raise InterventionError(f"{d} has features 0..{d.d_sae - 1}; given {feature.index}")
        return d

    def _nothing_active(self, one: Intervention, inactive: Sequence[Feature]) -> str:
        first = inactive[0]
        pos = int(first.pos)
        here = [k for k in self.recording.active_at(pos).items() if k[0][1] == first.layer]
        strongest = [f"#{key[2]}" for key, _ in sorted(here, key=lambda item: -item[1])[:5]]
        what = f"{one.target}" if len(inactive) == 1 else f"no member of {one.target}"
        verb = "is not active" if len(inactive) == 1 else "is active"
        return (
            f"{what} {verb} on this prompt where it is to be scaled (layer {first.layer}, position {pos}, "
            f"{self.recording.token_strings[pos]!r}; active there, strongest first: "
            f"{', '.join(strongest) or 'none'}); set or inject switch an inactive feature on"
        )

    def _value(self, one: Intervention, clean: float, member: Feature) -> float:
        match one.action:
            case Action.SET:
                return one.value
            case Action.SCALE:
                return one.value * clean
            case Action.ADD:
                return clean + one.value
            case Action.INJECT:
                found = [self._recorded(donor, member, at) for donor, at in self.donors(one, member.pos)]
                return one.value * math.fsum(found) / len(found)

    def _recorded(self, donor: Recording, member: Feature, pos: Position) -> float:
        d = self.dictionary(member)
        return float(donor.acts(d)[donor.position(pos), member.index])

    # Donors

    def donors(self, one: Intervention, own: Position, extra: Sequence[str] = ()) -> list[tuple[Recording, Position]]:
        """Return the recordings an injection takes its values from, each with the position it takes them at."""
        recordings = self._record_donors(one.source, extra)
        at = own if one.source_pos is None else one.source_pos
        listed = [at] * len(recordings) if isinstance(at, int | str) else list(at)
        if len(listed) != len(recordings):
            raise InterventionError(
                f"from_pos has {len(listed)} positions for {len(recordings)} prompts; give one, or one per prompt"
            )
        return list(zip(recordings, listed, strict=True))

    def _record_donors(self, source: Any, extra: Sequence[str]) -> list[Recording]:
        several = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
        if several and not isinstance(source[0], int):
            return [r for one in source for r in self._record_donors(one, extra)]
        if isinstance(source, Recording):
            if source.binding is not self.binding:
                raise InterventionError("the recording is of another ReplacementModel; record it with this one")
            if any(name not in source.values for name in extra):
                source = source.prompt if source.prompt is not None else source.tokens
            else:
                return [source]
        if isinstance(source, Sequence) and not len(source):
            raise InterventionError("inject(from_=...) has no prompt; give text, token ids, or several of them")
        if source is None:
            raise InterventionError("inject(from_=None): give another prompt, as text or token ids, or several")
        key = (source if isinstance(source, str) else tuple(torch.as_tensor(source).flatten().tolist()), tuple(extra))
        if key not in self._donors:
            self._donors[key] = [record(self.binding, source, extra=extra)]
        return self._donors[key]

    # Errors and directions

    def _error(self, wanted: Wanted, one: Intervention, target: ErrorNode) -> None:
        hook = self._error_hook(target)
        positions, open_end = self.positions(one.pos if one.pos is not None else target.pos)
        if open_end:
            raise InterventionError(f"{target} does not exist in generated positions; name positions of the prompt")
        for pos in positions:
            clean = self.recording.error(hook)[pos]
            factor = one.value + 1.0 if one.action is Action.ADD else one.value
            vector = factor * clean
            if one.action is Action.INJECT:
                found = [donor.error(hook)[donor.position(at)] for donor, at in self.donors(one, target.pos)]
                vector = one.value * torch.stack(found).mean(0)
            self._note(one, (hook, pos, -1), tuple(vector.tolist()))
            wanted.errors.setdefault(hook, {})[pos] = vector

    def _error_hook(self, target: ErrorNode) -> str:
        found = [hook for hook, layer in self._hooks.items() if layer == target.layer]
        if not found:
            raise InterventionError(f"there is no layer {target.layer}; layers are 0..{max(self._hooks.values())}")
        if target.site is not None:
            if target.site in found:
                return target.site
            raise InterventionError(f"{target}: no dictionary writes there; in this layer: {', '.join(found)}")
        written = [hook for hook in found if any(hook in d.hooks_out for d in self.binding.dictionaries)]
        if len(written) > 1:
            raise InterventionError(f"{target}: dictionaries stand at several hooks; name one with site=: {written}")
        return written[0] if written else found[0]

    def _direction(self, wanted: Wanted, one: Intervention, target: Direction) -> None:
        hook = f"blocks.{target.layer}.{target.hook}"
        d_model = self.binding.model.cfg.d_model
        if not 0 <= target.layer < self.binding.model.cfg.n_layers or hook not in self.binding.model.hook_dict:
            raise InterventionError(f"the model has no {hook!r}; layers are 0..{self.binding.model.cfg.n_layers - 1}")
        if target.vector.shape != (d_model,):
            raise InterventionError(f"{target} has shape {tuple(target.vector.shape)}, the model's width is {d_model}")
        positions, open_end = self.positions(one.pos if one.pos is not None else target.pos)
        key = target.vector.detach().double().cpu().numpy().tobytes()
        if open_end:
            self._add_open(wanted, one, (hook, OPEN, key), target, lambda: self._injected(one, target, hook))
        for pos in positions:
            clean = coordinate(self._values(self.recording, hook)[pos], target.vector)
            value = {
                Action.SET: lambda: one.value,
                Action.SCALE: lambda c=clean: one.value * c,
                Action.ADD: lambda c=clean: c + one.value,
                Action.INJECT: lambda: self._injected(one, target, hook),
            }[one.action]()
            self._note(one, (hook, pos, key), value)
            wanted.directions.setdefault(hook, {})[pos, key] = (target, value)

    def _injected(self, one: Intervention, target: Direction, hook: str) -> float:
        pairs = self.donors(one, target.pos, [hook])
        found = [coordinate(self._values(r, hook)[r.position(at)], target.vector) for r, at in pairs]
        return one.value * math.fsum(found) / len(found)

    def _add_open(
        self,
        wanted: Wanted,
        one: Intervention,
        place: Place,
        target: Feature | Direction,
        injected: Callable[[], float],
    ) -> None:
        """Note a change of all generated positions from some position on; of two equal ones the earlier counts."""
        start = one.pos.start if isinstance(one.pos, slice) and one.pos.start is not None else 0
        base, factor = {
            Action.SET: lambda: (one.value, 0.0),
            Action.SCALE: lambda: (0.0, one.value),
            Action.ADD: lambda: (one.value, 1.0),
            Action.INJECT: lambda: (injected(), 0.0),
        }[one.action]()
        self._note(one, place, (base, factor))
        if (before := wanted.open_changes.get(place)) is not None:
            start = min(start, before.start)
        wanted.open_changes[place] = OpenChange(target, base, factor, start)

    def _values(self, recording: Recording, hook: str) -> Tensor:
        if hook not in recording.values:
            again = recording.prompt if recording.prompt is not None else recording.tokens
            recording = self._record_donors(again, [hook])[0]
        return recording.values[hook][0]

    # Positions and contradictions

    def positions(self, pos: Positions | Any) -> tuple[list[int], bool]:
        """Return the positions in the prompt, and whether they go on into generated text."""
        if isinstance(pos, slice):
            try:
                found = list(range(*pos.indices(self.recording.n_pos)))
            except (TypeError, ValueError) as error:
                raise InterventionError(f"{pos} is no slice of positions ({error}); give whole numbers") from error
            open_end = self.generating and pos.stop is None and pos.step in (None, 1)
            if not found and not open_end:
                raise InterventionError(f"{pos} holds no position of a prompt of {self.recording.n_pos} tokens")
            beyond = (pos.step or 1) > 0 and (pos.stop is None or pos.stop > self.recording.n_pos)
            if self.generating and beyond and not open_end:
                raise InterventionError(
                    f"{pos} reaches into generated positions, which only an open slice of step 1 does: give "
                    f"slice({pos.start}, None), or positions of the prompt's {self.recording.n_pos} tokens"
                )
            return found, open_end
        # An array without axes is one number.
        if isinstance(pos, Iterable) and not isinstance(pos, str) and getattr(pos, "ndim", 1):
            return list(dict.fromkeys(self._position(p) for p in pos)), False
        return [self._position(pos)], False

    def _position(self, pos: Any) -> int:
        try:
            return self.recording.position(pos if isinstance(pos, str) else operator.index(pos))
        except TypeError as error:
            raise InterventionError(f"{pos!r:.80} is no position; give a whole number or a token's text") from error

    def _note(self, one: Intervention, place: Place, value: Any) -> None:
        """Refuse a second change of one thing unless it is the same."""
        if (before := self._seen.get(place)) is not None and before[1] != value:
            what = place[0] if isinstance(place[2], bytes) or place[2] < 0 else f"{place[0]} #{place[2]}"
            where = "in generated positions" if place[1] == OPEN else f"at position {place[1]}"
            raise InterventionError(
                f"{str(before[0])!r} and {str(one)!r} change {what} {where} differently; leave one of them out"
            )
        self._seen[place] = (one, value)


def coordinate(x: Float[Tensor, "*batch d_model"], vector: Float[Tensor, "d_model"]) -> Any:
    """Return ``x · v / |v|²``: how many times the vector is in ``x``; a float for one vector."""
    v = vector.to(x.device, torch.promote_types(x.dtype, torch.float32))
    found = (x.to(v) @ v) / (v @ v)
    return float(found) if found.ndim == 0 else found

"""Forward passes in which features, errors and directions are changed, and chosen parts of the model are held.

A change is a rank-one difference: at a dictionary's write hook ``(new - old) * decoder row`` is added to the real
output, old being the activation on the run at hand. So what the dictionaries miss is neither lost nor held, and a
change to the old value changes no bit. What is held takes its values from the clean run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.attribution.mlp_paths import LinearMlp
from circuit_lens.dictionaries.attach import refuse_attached
from circuit_lens.dictionaries.binding import reads_where_it_writes
from circuit_lens.dictionaries.points import write_kind
from circuit_lens.dictionaries.taps import read_place, reading, write_place, writing
from circuit_lens.errors import HookError
from circuit_lens.hooks import Hook, around_forward, mlp_in_enabled, pinned_hook
from circuit_lens.interventions.edits import Edits, FeatureEdits, VectorEdits
from circuit_lens.interventions.reaction import Reactor
from circuit_lens.interventions.recording import (
    ATTENTION,
    Recording,
    as_read,
    held_names,
    reconstruction,
    write_hooks,
)
from circuit_lens.interventions.resolve import coordinate
from circuit_lens.protocols import Dictionary
from circuit_lens.running import forward_rows, plain_tensors

Freeze = Literal["none", "attention", "all"]
Reader = Callable[[Dictionary, Tensor, Tensor], None]
"""Called with a dictionary, its pre-activations and its activations, ``[n_rows, n_pos, d_sae]``, changes included."""


@dataclass(frozen=True)
class Hold:
    """What is held at its clean value.

    Attributes:
        attention: Queries, keys and patterns.
        norms: Denominators of norms.
        mlp: Layers whose MLP outputs are clean plus the changes.
        skip: In those layers, skip paths stay live.
        react: In those layers, features that are active on the clean run react, linearly: a change of the
            pre-activation is one of the activation. With everything else held this is the local replacement model.
        recompute: In those layers, all features follow what is read, nonlinearly, and only what the dictionaries miss
            is clean: ``clean + decode(acts now) - decode(acts clean)``. With ``skip`` this is the replacement model
            with the clean run's errors. Excludes ``react``.
        sites: What comes by where autoencoders stand is held as MLP outputs are.
        linear: Layers whose MLP, for which no dictionary stands, is its clean output plus its Jacobian on the change.
    """

    attention: bool = False
    norms: bool = False
    mlp: frozenset[int] = frozenset()
    skip: bool = False
    react: bool = False
    recompute: bool = False
    sites: bool = False
    linear: frozenset[int] = frozenset()


def hold_of(freeze: str, layers: tuple[int, int] | None, n_layers: int) -> Hold:
    """Return what the public options hold.

    Args:
        freeze: ``"none"``, ``"attention"`` or ``"all"``.
        layers: First and last layer (both included) whose MLP outputs are held as well.
        n_layers: Layers of the model.

    Raises:
        ValueError: Another word, or layers that the model has not.
    """
    if freeze not in ("none", "attention", "all"):
        raise ValueError(f"freeze={freeze!r} is not valid; give 'none', 'attention' or 'all'")
    held: frozenset[int] = frozenset()
    if layers is not None:
        if not (isinstance(layers, Sequence) and len(layers) == 2 and 0 <= layers[0] <= layers[1] < n_layers):
            raise ValueError(f"layers={layers!r} is not valid; give (first, last), both from 0 to {n_layers - 1}")
        held = frozenset(range(layers[0], layers[1] + 1))
    if freeze == "all":
        return Hold(attention=True, norms=True, mlp=frozenset(range(n_layers)), skip=True, sites=True)
    return Hold(attention=freeze == "attention", mlp=held)


@dataclass(frozen=True, eq=False)
class _Places:
    """The distinct (row, position) pairs of some changes, and which pair each change is at."""

    row: Int[Tensor, "n_place"]
    pos: Int[Tensor, "n_place"]
    of: Int[Tensor, "n"]

    @classmethod
    def find(cls, row: Int[Tensor, "n"], pos: Int[Tensor, "n"]) -> _Places:
        pairs, of = torch.unique((row << 32) + pos, return_inverse=True)  # one number: rows are slow to compare
        return cls(pairs >> 32, pairs & 0xFFFFFFFF, of)


class Changed:
    """A model on which the changes of a batch of runs are made.

    Args:
        recording: The clean run.
        edits: The changes.
        hold: What is held.
        start: Position of the prompt at which the forward pass begins (behind cached keys and values).
        reader: Takes every dictionary's activations.
    """

    def __init__(
        self,
        recording: Recording,
        edits: Edits,
        hold: Hold | None = None,
        *,
        start: int = 0,
        reader: Reader | None = None,
    ) -> None:
        self.recording, self.edits, self.start, self.reader = recording, edits, start, reader
        self.hold = Hold() if hold is None else hold
        self.binding = recording.binding
        self.model = recording.binding.model
        self.hooks = write_hooks(self.binding)
        self._x: dict[str, Tensor] = {}
        self._old: dict[str, Tensor] = {}
        self._reactors: dict[str, Reactor] = {}
        self._fired: set[str] = set()
        self._mlp_inputs: dict[int, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def scope(self) -> Iterator[list[Hook]]:
        """Attach what acts on dictionaries' places; yields the hooks of the forward passes inside.

        Raises:
            HookError: Dictionaries are attached to the model, or a place did not fire.
        """
        refuse_attached(self.model)
        table = self.model.hook_dict
        self._fired.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mlp_in_enabled(self.model, [d.hook_in for d in self.binding.dictionaries]))
            for d in self.binding.dictionaries:
                if self._is_read(d):
                    stack.enter_context(reading(read_place(self.model, table, d), self._see(d)))
            for layer in sorted(self.hold.linear):
                self._linearise(stack, layer, table)
            for name in self._behind_held_mlps():
                value = self.recording.outputs[name]
                hold = pinned_hook(table[name], lambda live, value=value: value.expand_as(live), last=False)
                stack.enter_context(hold)
            for name in self.hooks:
                if self._is_written(name):
                    stack.enter_context(
                        writing(write_place(self.model, table, name, self.binding.dictionaries), self._write(name))
                    )
            yield [*self._held(), *self._directions()]
        needed = {d.hook_in for d in self.binding.dictionaries if self._is_read(d)}
        needed |= {name for name in self.hooks if self._is_written(name)}
        if silent := sorted(needed - self._fired):
            raise HookError(f"hook point(s) that never fired: {', '.join(silent)}: the architecture bypasses them")

    def run(self) -> Float[Tensor, "n_rows n_pos d_vocab"]:
        """Run all rows of the recorded prompt once, under the hooks of the recording, and return the logits."""
        record = self.recording
        with plain_tensors(), self.scope() as hooks:
            return forward_rows(self.model, record.tokens, self.edits.n_rows, hooks=hooks, fwd_hooks=record.fwd_hooks)

    # What must be attached

    def _is_read(self, d: Dictionary) -> bool:
        reacts = self.hold.react or self.hold.recompute or (self.hold.skip and d.has_skip)
        changed = d.site in self.edits.features or any(hook in self.edits.errors for hook in d.hooks_out)
        return self.reader is not None or reacts or changed

    def _is_written(self, name: str) -> bool:
        changed = any(name in d.hooks_out and d.site in self.edits.features for d in self.binding.dictionaries)
        return changed or name in self.edits.errors or self._holds(name)

    def _holds(self, name: str) -> bool:
        """Whether what comes by at a write hook is held."""
        if any(d.hook_in == name for d in self.binding.dictionaries):
            return self.hold.sites
        layer = self.hooks[name]
        return layer in self.hold.mlp and layer not in self.hold.linear

    def _behind_held_mlps(self) -> list[str]:
        """Return the hooks of MLP outputs that are held although an autoencoder reads there and writes behind it."""
        hooks = [d.hook_in for d in self.binding.dictionaries if d.hook_in in d.hooks_out]
        held = self.hold.mlp - self.hold.linear
        return [name for name in hooks if write_kind(name).of_mlp and self.hooks[name] in held]

    def _is_held(self, d: Dictionary) -> bool:
        """Whether a dictionary's features are held at their clean values, or react in a held model."""
        return self.hold.sites if reads_where_it_writes(d) else d.layer in self.hold.mlp

    def _linearise(self, stack: contextlib.ExitStack, layer: int, table: Mapping[str, Any]) -> None:
        """Let a layer's MLP give its clean output plus its Jacobian on the change of its input."""
        module, clean = self.model.blocks[layer].mlp, self.recording.mlp_inputs[layer]
        mlp = LinearMlp(module, clean)
        point = table.get(f"blocks.{layer}.mlp.hook_out")
        inside = point is not None and any(point is part for part in module.modules())

        def edit(live: Any) -> Any:
            x = self._mlp_inputs[layer]
            new = (mlp.out + mlp.push((x - clean).to(clean))).to(x)
            return (new, *live[1:]) if isinstance(live, tuple) else new

        stack.enter_context(
            around_forward(module, before=lambda args: self._mlp_inputs.__setitem__(layer, args[0].detach()))
        )
        stack.enter_context(pinned_hook(point if inside else module, edit, last=False))

    def _held(self) -> list[Hook]:
        names = []
        for name in held_names(self.model):
            if self.hold.attention if name.endswith(ATTENTION) else self.hold.norms:
                names.append(name)
        return [self._constant(name) for name in names]

    def _constant(self, name: str) -> Hook:
        value = self.recording.values[name]
        return Hook(name, lambda live: value.to(live).expand_as(live))

    def _directions(self) -> list[Hook]:
        hooks, after = [], []
        points = self.model.hook_dict if self.edits.directions else {}
        for name, edits in self.edits.directions.items():
            block = name.removesuffix("hook_resid_mid")
            if block == name or points[name] is not points.get(f"{block}ln2.hook_in"):
                hooks.append(Hook(name, self._along(name, edits)))
                continue
            # A bridge's hook_resid_mid is what the second norm reads: an edit there does not reach the stream.
            before: dict[str, Tensor] = {}
            after.append(Hook(f"{block}hook_resid_pre", lambda x, before=before: before.update(x=x.detach().clone())))
            after.append(Hook(f"{block}hook_attn_out", self._along(name, edits, before)))
        return [*hooks, *after]

    # Reading

    def _see(self, d: Dictionary) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            self._fired.add(d.hook_in)
            self._x[d.site] = x = as_read(x)
            self._old.pop(d.site, None)
            edits = self.edits.features.get(d.site)
            if edits is not None:
                self._old[d.site] = self._old_acts(d, x, edits)
            if self.reader is not None:
                pre = self._pre_acts(d, x)
                acts = self._acts(d, pre, x)
                if edits is not None:
                    new = edits.base.to(acts) + edits.factor.to(acts) * self._old[d.site]
                    acts[edits.row, edits.pos - self.start, edits.index] = new
                self.reader(d, pre, acts)

        return see

    def _pre_acts(self, d: Dictionary, x: Float[Tensor, "n_rows n_pos d_in"]) -> Float[Tensor, "n_rows n_pos d_sae"]:
        if not (d.tangent and self.hold.react and self._is_held(d)):
            return d.pre_acts(x)
        reactor, pre = self._reactor(d), self.recording.pre_acts(d).to(x).repeat(len(x), 1, 1)
        pre[..., reactor.index] += reactor.pre_acts(x)
        return pre

    def _acts(
        self, d: Dictionary, pre: Float[Tensor, "n_rows n_pos d_sae"], x: Float[Tensor, "n_rows n_pos d_in"]
    ) -> Float[Tensor, "n_rows n_pos d_sae"]:
        if not (self.hold.react and self._is_held(d)):
            return d.activate(pre, x)
        reactor, acts = self._reactor(d), self.recording.acts(d).to(pre).repeat(len(pre), 1, 1)
        acts[..., reactor.index] += reactor.acts(x)
        return acts

    def _old_acts(self, d: Dictionary, x: Float[Tensor, "n_rows n_pos d_in"], e: FeatureEdits) -> Float[Tensor, "n"]:
        """Return the activations that changes start from: the run's own, or clean where that is what they are."""
        in_prompt = e.pos < self.recording.n_pos
        old = x.new_zeros(len(e.pos))
        old[in_prompt] = self.recording.acts(d)[e.pos[in_prompt], e.index[in_prompt]].to(x)
        held = self._is_held(d) and not self.hold.recompute
        if held and self.hold.react:
            return old + self._reactor(d).changes(x, e)
        moved = (~e.clean | ~in_prompt).nonzero()[:, 0]
        if held or not len(moved):
            return old
        places = _Places.find(e.row[moved], e.pos[moved])
        here = x[places.row, places.pos - self.start]
        now = d.activate(d.pre_acts(here), here)
        own = now[places.of, e.index[moved]]
        # The clean activations by the same arithmetic, so that an unchanged input gives an unchanged activation.
        known = in_prompt[moved].nonzero()[:, 0]
        before = self.recording.inputs[d.site][places.pos.clamp_max(self.recording.n_pos - 1)].to(x)
        then = d.activate(d.pre_acts(before), before)[places.of, e.index[moved]]
        own[known] = old[moved[known]] + (own[known] - then[known])
        old[moved] = own
        return old

    def _reactor(self, d: Dictionary) -> Reactor:
        if d.site not in self._reactors:
            self._reactors[d.site] = Reactor(self.recording, d)
        return self._reactors[d.site]

    # Writing

    def _write(self, name: str) -> Callable[[Tensor], Tensor]:
        writers = [d for d in self.binding.dictionaries if name in d.hooks_out]

        def edit(live: Tensor) -> Tensor:
            self._fired.add(name)
            out = self._held_output(name, live, writers) if self._holds(name) else live.clone()
            for d in writers:
                if (e := self.edits.features.get(d.site)) is not None:
                    old = self._old[d.site]
                    delta = e.base.to(old) + (e.factor.to(old) - 1) * old
                    rows = self._decoder_rows(d, e, old.dtype)[:, d.hooks_out.index(name)]
                    self._add(out, e.row, e.pos, delta[:, None] * rows)
            if (errors := self.edits.errors.get(name)) is not None:
                self._add(out, errors.row, errors.pos, errors.vectors - self._old_errors(name, live, errors))
            return out

        return edit

    def _decoder_rows(self, d: Dictionary, e: FeatureEdits, dtype: torch.dtype) -> Float[Tensor, "n n_out d_out"]:
        """Return the decoder rows of the changed features: once for all hooks that they write."""
        if d.site not in self._rows:
            self._rows[d.site] = d.decoder_rows(e.index, dtype)
        return self._rows[d.site]

    def _held_output(self, name: str, live: Tensor, writers: Sequence[Dictionary]) -> Tensor:
        out = self.recording.outputs[name].expand_as(live)
        for d in writers:
            o = d.hooks_out.index(name)
            if self.hold.skip and d.has_skip and o == 0:
                x = self._x[d.site]
                moved = x - self.recording.inputs[d.site].to(x)
                out = (out.to(x) + d.skip(moved)).to(live.dtype)
            if self.hold.react:
                x = self._x[d.site]
                out = (out.to(x) + self._reactor(d).output(x, o)).to(live.dtype)
            elif self.hold.recompute:
                x = self._x[d.site]
                moved = d.decode(d.activate(d.pre_acts(x), x)) - d.decode(self.recording.acts(d).to(x))
                out = (out.to(x) + moved[..., o, :]).to(live.dtype)
        return out.clone()

    def _add(self, out: Tensor, row: Tensor, pos: Tensor, vectors: Float[Tensor, "n d_out"]) -> None:
        """Add vectors in place, those of one place summed first, in the precision of the vectors."""
        places = _Places.find(row, pos - self.start)
        total = vectors.new_zeros(len(places.row), vectors.shape[-1]).index_add_(0, places.of, vectors)
        here = out[places.row, places.pos]
        out[places.row, places.pos] = (here.to(total) + total).to(out.dtype)

    def _old_errors(self, name: str, live: Tensor, e: VectorEdits) -> Float[Tensor, "n d_out"]:
        old = self.recording.error(name)[e.pos].to(e.vectors)
        moved = (~e.clean).nonzero()[:, 0]
        if self._holds(name) or not len(moved):
            return old
        row, pos = e.row[moved], e.pos[moved] - self.start
        at = e.pos[moved]
        now = self._missed(name, live[row, pos], lambda d: self._x[d.site][row, pos])
        # The clean error by the same arithmetic, as for activations.
        then = self._missed(name, self.recording.outputs[name][at], lambda d: self.recording.inputs[d.site][at])
        old[moved] += (now - then).to(old)
        return old

    def _missed(self, name: str, out: Float[Tensor, "n d_out"], read: Callable[[Dictionary], Tensor]) -> Tensor:
        """Return what the dictionaries miss of an output, given what each of them reads."""

        def run(d: Dictionary) -> tuple[Tensor, Tensor]:
            x = read(d)
            return x, d.activate(d.pre_acts(x), x)

        return out - reconstruction(self.binding, name, run, out)

    def _along(self, name: str, e: VectorEdits, before: Mapping[str, Tensor] | None = None) -> Callable[..., Tensor]:
        """Return the edit of the value at a hook, or (with ``before``) of what is added to ``before["x"]`` there."""
        known = e.pos < self.recording.n_pos
        values, vectors = self.recording.values[name][0][e.pos[known]].to(e.vectors), e.vectors[known]
        # As the new coordinates were found, so that an unchanged value gives an unchanged coordinate.
        clean = e.base.new_tensor([coordinate(x, v) for x, v in zip(values, vectors, strict=True)])
        norms = e.vectors.square().sum(-1)

        def edit(live: Tensor) -> Tensor:
            value = live if before is None else before["x"].to(live) + live
            x = value[e.row, e.pos - self.start].to(e.vectors)
            old = (x * e.vectors).sum(-1) / norms
            then = (values * vectors).sum(-1) / norms[known]
            old[known] = clean + torch.where(e.clean[known], 0.0, old[known] - then)
            delta = e.base + (e.factor - 1) * old
            out = live.clone()
            self._add(out, e.row, e.pos, delta[:, None] * e.vectors)
            return out

        return edit

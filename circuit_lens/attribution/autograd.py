"""The reference: rows of a graph by autograd through the model itself, with hooks that hold what must be constant.

Slow, but it knows nothing of a block's inside: attention queries and keys, patterns, norm denominators and MLP
outputs are held at hook points, and everything else is whatever the model computes. The fast path must equal it. It
also linearises attention to first order (queries, keys and softmax) when those are not held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.mlp_paths import JacobianPath, SkipPath
from circuit_lens.attribution.sources import Sources
from circuit_lens.attribution.targets import FINAL_HOOK, Targets
from circuit_lens.dictionaries.points import Place, Read, parse_hook, read_kind
from circuit_lens.hooks import Hook
from circuit_lens.protocols import HookedModel
from circuit_lens.running import forward


@dataclass
class _Tape:
    """Leaves of one frozen forward pass, by where sources enter, and the hook values that targets read.

    Attributes:
        leaves: By layer and place; sources of other places enter where :func:`_leaf_of` says.
        read: Values by hook name, as they came by.
        written: The same behind an autoencoder.
    """

    leaves: dict[tuple[int, Place], Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)


class FrozenHooks:
    """The hooks that turn the model into one prompt's frozen model.

    Args:
        model: The model.
        frozen: The frozen pass, whose constants are held.
        sources: Its sources, for the linear paths through MLPs that stay open.
        linear_norms, linear_attention: What is left live, to be linearised by autograd.
        hold: Says of a hook name whether to hold it; for tests of the self-check.
    """

    def __init__(
        self,
        model: HookedModel,
        frozen: FrozenModel,
        sources: Sources,
        *,
        linear_norms: bool = False,
        linear_attention: bool = False,
        hold: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.model, self.frozen, self.sources = model, frozen, sources
        self.linear_norms, self.linear_attention, self.hold = linear_norms, linear_attention, hold
        self.native = model.W_U.dtype
        self.queries: dict[str, Tensor] = {}

    def _constant(self, name: str) -> Hook:
        value = self.frozen.values[name][None]
        return Hook(name, lambda live: value.to(live).expand_as(live))

    def _first_seen(self, name: str) -> Hook:
        """Hold a value that the frozen pass does not have (queries, keys): the first one that comes by."""

        def edit(live: Tensor) -> Tensor:
            return self.queries.setdefault(name, live.detach())

        return Hook(name, edit)

    def held(self) -> list[Hook]:
        """Return hooks for queries, keys, patterns and norm denominators."""
        points, hooks = self.model.hook_dict, []
        for layer in range(self.frozen.n_layers):
            block = f"blocks.{layer}"
            if not self.linear_attention:
                pairs = [n for n in (f"{block}.attn.hook_q", f"{block}.attn.hook_k") if n in points]
                hooks += [self._first_seen(n) for n in pairs if self.hold(n)]
                hooks += [self._constant(n) for n in (f"{block}.attn.hook_pattern",) if self.hold(n)]
            if not self.linear_norms:
                names = [f"{block}.{norm}.hook_scale" for norm in ("ln1", "ln1_post", "ln2", "ln2_post")]
                hooks += [self._constant(n) for n in names if n in self.frozen.values.values and self.hold(n)]
        if not self.linear_norms and self.hold("ln_final.hook_scale"):
            hooks.append(self._constant("ln_final.hook_scale"))
        return hooks

    def mlps(self, live_inputs: dict[int, Tensor], leaf: Callable[[int, Tensor], Tensor], jacobian: bool) -> list[Hook]:
        """Return hooks that make each MLP output a constant, plus its open linear path.

        Args:
            live_inputs: Filled with each MLP branch's live input residual stream.
            leaf: Wraps the constant of a layer.
            jacobian: Keep the MLP's own gradient where its Jacobian is the open path.
        """
        hooks = []
        for layer in range(self.frozen.n_layers):
            path = self.sources.paths[layer]
            if isinstance(path, SkipPath):
                hooks.append(self._keep(self._branch_input(layer), live_inputs, layer))

            def edit(live: Tensor, layer: int = layer, path: Any = path) -> Tensor:
                out = leaf(layer, self.frozen.mlp_out[layer][None].to(self.native)).expand_as(live)
                if isinstance(path, SkipPath):
                    linear = path.linear(live_inputs[layer][0].to(path.matrix))[None].to(live)
                    clean = path.linear(self.frozen.base[layer])[None].to(live)
                    return out + linear - clean
                if isinstance(path, JacobianPath) and jacobian:
                    return out + live - live.detach()
                return out

            hooks.append(Hook(f"blocks.{layer}.hook_mlp_out", edit))
        return hooks

    def _branch_input(self, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_{'pre' if self.frozen.parallel else 'mid'}"

    @staticmethod
    def _keep(name: str, store: dict[Any, Tensor], key: Any) -> Hook:
        return Hook(name, lambda live: store.__setitem__(key, live))

    def patches(self) -> list[Hook]:
        """Return hooks that add the run's patches, other than at the first residual stream and after the last block."""
        hooks = []
        for patch in self.frozen.patches:
            name = f"blocks.{patch.layer}.hook_{patch.site}"
            if name == "blocks.0.hook_resid_pre":
                continue
            hooks.append(Hook(name, lambda live, vectors=patch.vectors: live + vectors[None].to(live)))
        return hooks

    def first_stream(self) -> Tensor:
        """Return the first residual stream, patches included, ``[1, n_pos, d_model]``."""
        return self.frozen.values.at(0, "hook_resid_pre")[None].to(self.native)


def rows_by_autograd(
    hooks: FrozenHooks, targets: Targets, *, batch_size: int | None = None
) -> Iterator[tuple[list[int], Float[Tensor, "n_block n_columns"]]]:
    """Yield the rows of the given targets, like :func:`circuit_lens.attribution.sweep.row_blocks`, by autograd.

    Args:
        hooks: The frozen hooks of the prompt.
        targets: What to compute rows for.
        batch_size: Targets per backward pass; 16 by default.
    """
    with torch.inference_mode(False), torch.enable_grad():
        tape = _record(hooks, targets)
        leaves = tape.leaves
    for chosen in _by_hook(targets, batch_size or 16):
        with torch.inference_mode(False), torch.enable_grad():
            outputs, seeds = _seeds(tape, hooks, targets, chosen)
            grads = torch.autograd.grad(
                outputs, list(leaves.values()), seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        with torch.no_grad():
            dtype = hooks.frozen.tokens.dtype
            at = {k: g[:, 0].to(dtype) for k, g in zip(leaves, grads, strict=True) if g is not None}
            block = _contract(hooks.sources, at, len(chosen), hooks.frozen.tokens)
        yield chosen, block


def _record(hooks: FrozenHooks, targets: Targets) -> _Tape:
    """Run the frozen model once with leaves where sources enter."""
    frozen, tape = hooks.frozen, _Tape()

    def first(live: Tensor) -> Tensor:
        tape.leaves[0, Place.PRE_EDIT] = leaf = hooks.first_stream().clone().requires_grad_()
        return leaf

    def beside(layer: int, place: Place) -> Callable[[Tensor], Tensor]:
        def edit(live: Tensor) -> Tensor:
            tape.leaves[layer, place] = leaf = torch.zeros_like(live).requires_grad_()
            return live + leaf

        return edit

    def mlp_leaf(layer: int, value: Tensor) -> Tensor:
        tape.leaves[layer, Place.MLP] = leaf = value.clone().requires_grad_()
        return leaf

    listed = [Hook("blocks.0.hook_resid_pre", first), *hooks.held(), *hooks.patches()]
    # Before the MLPs' hooks: in a parallel block the skip path reads at the same hook point what these leaves add.
    for layer in range(1, frozen.n_layers):
        listed.append(Hook(f"blocks.{layer}.hook_resid_pre", beside(layer, Place.PRE_EDIT)))
    for layer in range(frozen.n_layers):
        listed.append(Hook(f"blocks.{layer}.hook_attn_out", beside(layer, Place.ATTENTION)))
    for layer, place in sorted(hooks.sources.blocked):
        if place is Place.HEADS_WRITE:
            listed.append(Hook(f"blocks.{layer}.attn.hook_z", beside(layer, Place.HEADS)))
    mlps, sites = hooks.mlps({}, mlp_leaf, True), _autoencoders(hooks, tape)
    wanted = [_read_hook(hooks, hook) for hook in targets.hooks]
    for name in dict.fromkeys(name for name in wanted if not name.endswith("hook_mlp_out")):
        listed.append(FrozenHooks._keep(name, tape.read, name))
    # A skip path reads what an autoencoder has written to the stream; one at the MLP's output reads what the MLP gives.
    listed += [hook for place, hook in sites if place is not Place.MLP_WRITE]
    listed += mlps
    listed += [hook for place, hook in sites if place is Place.MLP_WRITE]
    forward(hooks.model, frozen.values.tokens, hooks=listed, alone=True)
    return tape


def _autoencoders(hooks: FrozenHooks, tape: _Tape) -> list[tuple[Place, Hook]]:
    """Return hooks that put a leaf in the place of what autoencoders stand for."""
    names = {
        Place.PRE_WRITE: "hook_resid_pre", Place.HEADS_WRITE: "attn.hook_z", Place.ATTENTION_WRITE: "hook_attn_out",
        Place.MID_WRITE: "hook_resid_mid", Place.MLP_WRITE: "hook_mlp_out", Place.POST_WRITE: "hook_resid_post",
    }  # fmt: skip

    def replace(layer: int, place: Place) -> Callable[[Tensor], Tensor]:
        name = f"blocks.{layer}.{names[place]}"

        def edit(live: Tensor) -> Tensor:
            tape.read[name] = live
            if place is Place.HEADS_WRITE:
                return live.detach()  # what features write to the heads enters behind the output map
            tape.leaves[layer, place] = tape.written[name] = leaf = live.detach().clone().requires_grad_()
            return leaf

        return edit

    return [
        (place, Hook(f"blocks.{layer}.{names[place]}", replace(layer, place)))
        for layer, place in sorted(hooks.sources.blocked)
    ]


def _leaf_of(sources: Sources, layer: int, place: Place) -> tuple[int, Place]:
    """Return the leaf at which sources of a place enter: gradients are the same all the way to it."""
    mlp = Place.MLP_WRITE if sources.blocks(layer, Place.MLP_WRITE) else Place.MLP
    attention = Place.ATTENTION_WRITE if sources.blocks(layer, Place.ATTENTION_WRITE) else Place.ATTENTION
    same = {
        Place.HEADS_WRITE: Place.ATTENTION,
        Place.MID_EDIT: attention,
        Place.MLP_WRITE: mlp,
        Place.POST_EDIT: mlp,
    }
    return layer, same.get(place, place)


def _read_hook(hooks: FrozenHooks, hook: str) -> str:
    """Return the hook point at which a target's read-out is seeded."""
    if hook == FINAL_HOOK:
        return hook
    layer, kind = parse_hook(hook).layer, read_kind(hook)
    if not kind.in_mlp_branch:
        return hook
    if kind in (Read.RESIDUAL, Read.MID):
        return hooks._branch_input(layer)
    return f"blocks.{layer}.ln2.hook_normalized"


def _by_hook(targets: Targets, batch: int) -> Iterator[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, hook in enumerate(targets.hooks):
        groups.setdefault(hook, []).append(i)
    for members in groups.values():
        for start in range(0, len(members), batch):
            yield members[start : start + batch]


def _seeds(
    tape: _Tape, hooks: FrozenHooks, targets: Targets, chosen: Sequence[int]
) -> tuple[Tensor, Float[Tensor, "n 1 n_pos *width"]]:
    """Return the hook value the chosen targets read, and each target's cotangent there."""
    hook = targets.hooks[chosen[0]]
    name = _read_hook(hooks, hook)
    value = tape.read[name]
    if hook != FINAL_HOOK and read_kind(hook) is Read.RESIDUAL:
        value = tape.written.get(name, value)
    flat = value.flatten(2)
    seeds = flat.new_zeros(len(chosen), *flat.shape)
    vectors = targets.vectors[:, : flat.shape[-1]]
    if hook != FINAL_HOOK and read_kind(hook) is Read.NORM_OUTPUT:
        vectors = vectors * hooks.frozen.ln2[parse_hook(hook).layer].weights.gain
    for row, i in enumerate(chosen):
        if i in targets.spread:
            seeds[row, 0] = targets.spread[i].to(seeds)
        else:
            seeds[row, 0, int(targets.pos[i])] = vectors[i].to(seeds)
    return value, seeds.view(len(chosen), *value.shape)


def _contract(
    sources: Sources, at: dict[tuple[int, Place], Float[Tensor, "n n_pos *width"]], n: int, like: Tensor
) -> Float[Tensor, "n n_columns"]:
    """Contract gradients, by the place they were taken at, with what each source adds there."""
    out = like.new_zeros(n, sources.n_columns)
    for layer in range(len(sources.paths)):
        for place in Place:
            gradient = at.get(_leaf_of(sources, layer, place))
            if gradient is None:
                continue
            for features, written in sources.writing(layer, place):
                for pos in range(sources.n_pos):
                    here = features.at(pos)
                    values = gradient[:, pos] @ written.at(here).T
                    out[:, features.start + here.start : features.start + here.stop] += values
    for i, point in enumerate(sources.points):
        gradient = at.get(_leaf_of(sources, point.layer, point.place))
        if gradient is not None:
            values = torch.einsum("npd,pd->np", gradient.flatten(2), point.vectors)
            out[:, sources.column(i) : sources.column(i) + sources.n_pos] += values
    return out


def attention_constants(hooks: FrozenHooks) -> list[Float[Tensor, "n_pos d_model"]]:
    """Return what each attention layer adds beyond its Jacobian applied to its input: ``f(x) - J x``, norms included.

    The Jacobian-vector product is the derivative of the vector-Jacobian product with respect to the cotangent.
    """
    frozen = hooks.frozen
    pre: dict[int, Tensor] = {}
    out: dict[int, Tensor] = {}

    def fresh(live: Tensor, layer: int) -> Tensor:
        pre[layer] = live.detach().clone().requires_grad_()
        return pre[layer]

    listed = [*hooks.held(), *hooks.patches(), *hooks.mlps({}, lambda layer, value: value, False)]
    listed.append(Hook("blocks.0.hook_resid_pre", lambda live: hooks.first_stream()))
    for layer in range(frozen.n_layers):
        listed.append(Hook(f"blocks.{layer}.hook_resid_pre", lambda live, layer=layer: fresh(live, layer)))
        listed.append(FrozenHooks._keep(f"blocks.{layer}.hook_attn_out", out, layer))
    constants = []
    with torch.inference_mode(False), torch.enable_grad():
        forward(hooks.model, frozen.values.tokens, hooks=listed, alone=True)
        for layer in range(frozen.n_layers):
            dual = torch.zeros_like(out[layer], requires_grad=True)
            pulled = torch.autograd.grad(out[layer], pre[layer], dual, create_graph=True)[0]
            # Values of the frozen pass where it has them: a bridge computes parts of attention in float32.
            value = frozen.moved[layer][None] if frozen.moved else out[layer].detach()
            pushed = torch.autograd.grad(pulled, dual, frozen.pre[layer][None].to(pre[layer]))[0]
            constants.append((value - pushed)[0].to(frozen.tokens))
    return constants

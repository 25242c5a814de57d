"""What a model does on a prompt before anything is changed: the values that interventions start from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.attach import refuse_attached
from circuit_lens.dictionaries.binding import Binding, layers_of_mlps
from circuit_lens.dictionaries.points import parse_hook, write_kind
from circuit_lens.dictionaries.taps import read_place, reading, write_place, writing
from circuit_lens.errors import HookError
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.positions import find_position
from circuit_lens.hooks import Hook, around_forward, mlp_in_enabled
from circuit_lens.protocols import Dictionary, HookedModel
from circuit_lens.running import Prompt, forward, plain_tensors, require_finite, to_tokens, token_strings

SCALES = ("ln1.hook_scale", "ln1_post.hook_scale", "ln2.hook_scale", "ln2_post.hook_scale")
ATTENTION = ("attn.hook_q", "attn.hook_k", "attn.hook_pattern")


def write_hooks(binding: Binding) -> dict[str, int]:
    """Return each hook at which something is held or changed, with its layer, in the order of computing: where a
    dictionary writes, and the ``hook_mlp_out`` of layers whose MLP output none does."""
    written = {hook: parse_hook(hook).layer for d in binding.dictionaries for hook in d.hooks_out}
    covered = {layer for hook, layer in written.items() if write_kind(hook).of_mlp}
    rest = {f"blocks.{i}.hook_mlp_out": i for i in range(binding.model.cfg.n_layers) if i not in covered}
    return dict(sorted((written | rest).items(), key=lambda item: write_kind(item[0]).place.at(item[1])))


def open_mlps(binding: Binding) -> list[int]:
    """Return the layers whose MLP no dictionary stands for."""
    covered = layers_of_mlps(binding.dictionaries)
    return [layer for layer in range(binding.model.cfg.n_layers) if layer not in covered]


@dataclass(frozen=True, eq=False)
class Recording:
    """One run of the model, unchanged.

    Attributes:
        binding: The model and its dictionaries.
        tokens: The prompt.
        prompt: It as text, where it was text.
        logits: The model's logits.
        inputs: What each dictionary read, by site, in the dtype of its arithmetic (float32 at least).
        outputs: What each MLP wrote, and what came by where an autoencoder stands (heads side by side), by the hook
            that it is held or changed at; in the model's dtype.
        mlp_inputs: What MLPs read whose output no dictionary stands for, by layer.
        values: Other hooks by name, with a batch axis of one: queries, keys, patterns, norm denominators, and what was
            asked for.
        fwd_hooks: Temporary hooks of the user that the run had; runs from this recording have them too.
    """

    binding: Binding
    tokens: Int[Tensor, "n_pos"]
    prompt: str | None
    logits: Float[Tensor, "n_pos d_vocab"]
    inputs: Mapping[str, Float[Tensor, "n_pos d_in"]]
    outputs: Mapping[str, Float[Tensor, "n_pos d_out"]]
    values: Mapping[str, Tensor]
    mlp_inputs: Mapping[int, Float[Tensor, "n_pos d_model"]] = field(default_factory=dict)
    fwd_hooks: tuple[tuple[Any, Any], ...] = ()
    _found: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return len(self.tokens)

    @cached_property
    def token_strings(self) -> tuple[str, ...]:
        """The prompt's tokens as text."""
        return token_strings(self.binding.model, self.tokens)

    def position(self, pos: int | str, which: Any = None) -> int:
        """Return the index of a position given as an index or as the string of one token."""
        return find_position(self.token_strings, pos, which=which)

    def pre_acts(self, d: Dictionary) -> Float[Tensor, "n_pos d_sae"]:
        """Return the pre-activations of a dictionary's features."""
        return self._once("pre", d.site, lambda: d.pre_acts(self.inputs[d.site][None])[0])

    def acts(self, d: Dictionary) -> Float[Tensor, "n_pos d_sae"]:
        """Return the activations of a dictionary's features."""
        return self._once("acts", d.site, lambda: d.activate(self.pre_acts(d)[None], self.inputs[d.site][None])[0])

    def error(self, hook: str) -> Float[Tensor, "n_pos d_out"]:
        """Return what the dictionaries that write at a hook miss of the output there."""
        return self._once("error", hook, lambda: self.outputs[hook] - self._reconstruction(hook))

    def _reconstruction(self, hook: str) -> Tensor:
        return reconstruction(self.binding, hook, lambda d: (self.inputs[d.site], self.acts(d)), self.outputs[hook])

    def _once(self, what: str, name: str, compute: Any) -> Tensor:
        if (what, name) not in self._found:
            with plain_tensors():
                self._found[what, name] = compute()
        return self._found[what, name]

    def activation(self, feature: Feature) -> float:
        """Return a feature's activation at its position; 0 where it is inactive."""
        d = self.binding.dictionary(feature.layer, feature.site)
        return float(self.acts(d)[self.position(feature.pos), feature.index])

    def active_at(self, pos: int | str) -> dict[tuple[str, int, int], float]:
        """Return the activations of the features active at a position, by (site, layer, index)."""
        at = self.position(pos)
        found = {}
        for d in self.binding.dictionaries:
            acts = self.acts(d)[at]
            index = acts.nonzero()[:, 0]
            found |= {(d.site, d.layer, i): a for i, a in zip(index.tolist(), acts[index].tolist(), strict=True)}
        return found

    def active(self) -> list[Feature]:
        """Return all active features, by layer, site, position and index."""
        found = []
        for d in self.binding.dictionaries:
            found += [Feature(d.layer, p, i, d.site) for p, i in self.acts(d).nonzero().tolist()]
        return found


def reconstruction(binding: Binding, hook: str, run: Any, like: Tensor) -> Tensor:
    """Return what the dictionaries that write at a hook make of it, skip paths included, in their arithmetic's dtype.

    ``run(dictionary)`` gives its input and its activations. A hook without dictionary is not reconstructed: zeros.
    """
    total = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    for d in binding.dictionaries:
        if hook in d.hooks_out:
            x, acts = run(d)
            output = d.hooks_out.index(hook)
            total = total + d.decode(acts)[..., output, :] + (d.skip(x) if d.has_skip and output == 0 else 0.0)
    return total


def held_names(model: HookedModel) -> list[str]:
    """Return the hooks that freezing holds: queries, keys, patterns and norm denominators."""
    hooks = model.hook_dict
    blocks = range(model.cfg.n_layers)
    names = [f"blocks.{i}.{suffix}" for i in blocks for suffix in (*ATTENTION, *SCALES)]
    return [name for name in (*names, "ln_final.hook_scale") if name in hooks]


def record(
    binding: Binding,
    prompt: Prompt,
    *,
    extra: Sequence[str] = (),
    fwd_hooks: Sequence[tuple[Any, Any]] = (),
) -> Recording:
    """Run the model once, unchanged, and keep what interventions start from.

    Args:
        binding: The checked pair.
        prompt: Text or token ids.
        extra: More hooks to keep.
        fwd_hooks: Temporary hooks of the user for this run; permanent ones are honoured.

    Raises:
        TokensError: See :func:`circuit_lens.running.to_tokens`.
        HookError: Dictionaries are attached to the model, or a hook did not fire.
        ConsistencyError: Logits that are NaN or infinite.
    """
    model = binding.model
    refuse_attached(model)
    tokens = to_tokens(model, prompt)
    values: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    mlp_inputs: dict[int, Tensor] = {}

    def keep(name: str) -> Hook:
        return Hook(name, lambda value: values.__setitem__(name, value.detach().clone()))

    def see(site: str) -> Any:
        return lambda x: inputs.__setitem__(site, as_read(x)[0])

    def entered(layer: int) -> Any:
        return lambda args: mlp_inputs.__setitem__(layer, args[0].detach().clone()[0])

    def seen(hook: str) -> Any:
        return lambda out: outputs.__setitem__(hook, out.detach().clone()[0])

    hooks = [keep(name) for name in dict.fromkeys([*held_names(model), *extra])]
    table, names = model.hook_dict, list(write_hooks(binding))
    with plain_tensors(), contextlib.ExitStack() as stack:
        stack.enter_context(mlp_in_enabled(model, [d.hook_in for d in binding.dictionaries]))
        for d in binding.dictionaries:
            stack.enter_context(reading(read_place(model, table, d), see(d.site)))
        for layer in open_mlps(binding):
            stack.enter_context(around_forward(model.blocks[layer].mlp, before=entered(layer)))
        for name in names:
            stack.enter_context(writing(write_place(model, table, name, binding.dictionaries), seen(name)))
        logits = forward(model, tokens, hooks=hooks, fwd_hooks=fwd_hooks)
    require_finite("logits", logits)
    silent = [n for n in names if n not in outputs] + [d.hook_in for d in binding.dictionaries if d.site not in inputs]
    if silent:
        raise HookError(f"hook point(s) that never fired: {', '.join(silent)}: the architecture bypasses them")
    text = prompt if isinstance(prompt, str) else None
    return Recording(binding, tokens, text, logits, inputs, outputs, values, mlp_inputs, tuple(fwd_hooks))


def as_read(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """Return a dictionary's input in the dtype of its arithmetic, as a copy."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)

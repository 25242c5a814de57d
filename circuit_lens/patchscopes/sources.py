"""What is moved: hidden states of prompts or of a cache, and any other vectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.dictionaries.points import Write, parse_hook
from circuit_lens.errors import CacheError, PatchscopeError
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.positions import Which, find_position
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.hooks import Hook
from circuit_lens.patchscopes.given import Indices, Places, places, require_memory, require_model, several
from circuit_lens.patchscopes.streams import EMBEDDING, MEMORY, prompt_bytes, residual_hook, room, run_prompts
from circuit_lens.protocols import Cache, Dictionary, HookedModel
from circuit_lens.running import Prompt, plain_tensors, require_finite, to_tokens, token_strings

BATCH = 64
"""Prompts that run together, at most."""


@dataclass(frozen=True)
class At:
    """A position of a source prompt.

    Attributes:
        prompt: Text or token ids.
        pos: A position, or the string of one (a span means its last token); several positions for a target with as many
            placeholders.
        which: Which occurrence of a string that occurs more than once: "first", "last" or n from 0.
        name: What the item is called; the default is the text of its token.
    """

    prompt: Prompt
    pos: Places = -1
    which: Which | None = None
    name: str = ""

    def resolve(self, model: HookedModel) -> tuple[Int[Tensor, "n_pos"], tuple[int, ...], str]:
        """Return the tokens, the positions, and the name.

        Raises:
            TokensError: No prompt.
            TokenNotFoundError: A position that is not there, or a string that names several.
            PatchscopeError: No position at all, or one that is neither a whole number nor a text.
        """
        tokens = to_tokens(model, self.prompt)
        strings = token_strings(model, tokens)
        given = places(self.pos, "pos")
        if not given:
            raise PatchscopeError("At(prompt, pos=()) names no position; give one, such as -1 for the last")
        positions = tuple(find_position(strings, one, which=self.which) for one in given)
        return tokens, positions, self.name or "".join(strings[i] for i in positions).strip() or repr(self.prompt)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors that can be moved into a prompt, of one model's residual stream.

    Attributes:
        values: One vector per item, layer and placeholder (nearly always one).
        layers: The layer of each; None: they belong to no layer, and ``n_layers`` is 1.
        names: What the items are called, unique or not.
        next_logits: What the source model says at that position, where it was run: the logits of the next token.
        tokens: The id of the token at that position (the last, if several), where one is known.
    """

    values: Float[Tensor, "n_items n_layers n_slots d_model"]
    layers: tuple[int, ...] | None
    names: tuple[str, ...]
    next_logits: Float[Tensor, "n_items d_vocab"] | None = None
    tokens: Int[Tensor, "n_items"] | None = None

    def __post_init__(self) -> None:
        n_items, n_layers = self.values.shape[:2]
        if not self.values.numel():
            raise PatchscopeError(f"no vectors: their shape is {tuple(self.values.shape)}; give at least one")
        if len(self.names) != n_items or n_layers != (1 if self.layers is None else len(self.layers)):
            raise PatchscopeError(
                f"values of shape {tuple(self.values.shape)} need {n_items} names and {n_layers} layers; given "
                f"{len(self.names)} names and layers {self.layers}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise PatchscopeError("the vectors hold NaN or infinity; find what made them before they are moved")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Vectors]:
        """Yield the items one by one."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, items: Indices | slice) -> Vectors:
        """Return some of the items.

        Raises:
            PatchscopeError: None, or one that is not there.
        """
        chosen = list(range(len(self))[items]) if isinstance(items, slice) else several(items, "items")
        if not chosen or not all(-len(self) <= i < len(self) for i in chosen):
            raise PatchscopeError(f"{items} names none of the {len(self)} items, or one that is not there")
        return replace(
            self,
            values=self.values[chosen],
            names=tuple(self.names[i] for i in chosen),
            next_logits=None if self.next_logits is None else self.next_logits[chosen],
            tokens=None if self.tokens is None else self.tokens[chosen],
        )

    def __sub__(self, other: Vectors) -> Vectors:
        """Return the differences of two prompts' states, item by item (one item is taken from all).

        Raises:
            PatchscopeError: Other layers, positions or width, or as many items as neither one nor all.
        """
        if not isinstance(other, Vectors):
            return NotImplemented
        shapes = self.values.shape[2:], other.values.shape[2:]
        if self.layers != other.layers or len(other) not in (1, len(self)) or shapes[0] != shapes[1]:
            raise PatchscopeError(
                f"{len(self)} items at layers {self.layers} minus {len(other)} at {other.layers}, of shapes "
                f"{tuple(shapes[0])} and {tuple(shapes[1])}: give the same layers, positions and width, and as many "
                "items, or one"
            )
        names = other.names * len(self) if len(other) == 1 else other.names
        joined = tuple(f"{a} - {b}" for a, b in zip(self.names, names, strict=True))
        return Vectors(self.values - other.values.to(self.values), self.layers, joined)

    def layer(self, layer: int | None) -> Float[Tensor, "n_items n_slots d_model"]:
        """Return the vectors of one layer.

        Raises:
            PatchscopeError: A layer that they were not taken from.
        """
        if self.layers is None:
            return self.values[:, 0]
        if layer not in self.layers:
            hook = "" if layer is None else f", or in a cache {residual_hook(layer)}"
            raise PatchscopeError(
                f"the source has no vectors of layer {layer}; it has {_ranges(self.layers)} (-1 is the embedding). "
                f"patch_through='below' reads all layers from the embedding up: keep them with layers=None{hook}"
            )
        return self.values[:, self.layers.index(layer)]

    def without_layers(self, layer: int) -> Vectors:
        """Return the vectors of one layer, as vectors that belong to none."""
        return replace(self, values=self.layer(layer)[:, None], layers=None)

    @classmethod
    def from_prompts(
        cls,
        model: HookedModel,
        at: At | Iterable[At],
        *,
        layers: Indices | None = None,
        memory: float = MEMORY,
        next_logits: bool = True,
    ) -> Vectors:
        """Run source prompts once and return their residual streams.

        Prompts of one length run as one batch. Every hook of the user on the model runs before the states are read, and
        every token is attended, also one that the tokenizer calls padding.

        Args:
            model: The source model.
            at: One position or several; each is an item.
            layers: Which layers, each once; None: all, the embedding (-1) among them.
            memory: Gigabytes that a batch may take, beside the model and what is returned; a single prompt is run
                whatever it takes.
            next_logits: Also keep what the model says at each position: n_items x d_vocab numbers of its dtype, on the
                CPU. Without them nothing is compared with the source.

        Raises:
            TokensError, TokenNotFoundError, PatchscopeError: A prompt, position or layer that is not there; something
                else than a model, positions and layers.
            HookError: A model without these hook points.
            ConsistencyError: States that are NaN or infinite.
        """
        require_model(model)
        listed = _positions(at)
        chosen = _chosen(layers, range(EMBEDDING, model.cfg.n_layers))
        require_memory(memory)
        space = room(model, float(memory))
        with plain_tensors():
            found = [one.resolve(model) for one in listed]
            widths = {len(positions) for _, positions, _ in found}
            if len(widths) > 1:
                raise PatchscopeError(f"items have {sorted(widths)} positions each; give all of them the same number")
            values = logits = None
            for batch in _batches(found, lambda n_pos: int(space // prompt_bytes(model, n_pos))):
                states, said = cls._rows(model, batch, found, chosen)
                values = states.new_empty(len(listed), *states.shape[1:]) if values is None else values
                values[batch] = states
                if next_logits:
                    logits = said.cpu().new_empty(len(listed), said.shape[-1]) if logits is None else logits
                    logits[batch] = said.cpu()
            assert values is not None, "there is a prompt"
        require_finite("the source's states", values)
        tokens = torch.stack([tokens[positions[-1]] for tokens, positions, _ in found])
        return cls(values, chosen, tuple(name for *_, name in found), logits, tokens)

    @staticmethod
    def _rows(
        model: HookedModel,
        numbers: list[int],
        found: Sequence[tuple[Tensor, tuple[int, ...], str]],
        layers: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Return states ``[batch, n_layers, n_slots, d_model]`` and next logits of some prompts of one length."""
        tokens = torch.stack([found[i][0] for i in numbers])
        slots = torch.tensor([found[i][1] for i in numbers], device=tokens.device)
        rows = torch.arange(len(numbers), device=tokens.device)[:, None]
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Hook:
            def edit(value: Tensor) -> None:
                kept[layer] = value[rows.to(value.device), slots.to(value.device)].detach().clone()

            return Hook(residual_hook(layer), edit)

        logits = run_prompts(model, tokens, [keep(layer) for layer in layers])
        device = logits.device
        values = torch.stack([kept[layer].to(device) for layer in layers], dim=1)
        return values, logits[rows[:, 0].to(device), slots[:, -1].to(device)]

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        pos: Indices = -1,
        *,
        tokens: Int[Tensor, "n_pos"] | None = None,
        model: HookedModel | None = None,
    ) -> Vectors:
        """Return the residual streams that a cache holds; nothing is run.

        Args:
            cache: An ``ActivationCache`` or a dict of one prompt, with or without a batch axis of one, that holds
                ``blocks.<l>.hook_resid_post`` of some layers (``blocks.0.hook_resid_pre`` is layer -1).
            pos: A position, or several: each is an item.
            tokens: The prompt's ids, which name the items.
            model: For the text of tokens.

        Raises:
            CacheError: No residual stream, several prompts, or streams of different shapes.
            PatchscopeError: A position that is not there.
        """
        held = set(cache.keys())
        layers = [EMBEDDING] if residual_hook(EMBEDDING) in held else []
        layers += sorted(int(found[1]) for name in held if (found := _RESID_POST.fullmatch(str(name))))
        if not layers:
            raise CacheError(
                f"the cache holds no residual stream among its {len(held)} entries; run_with_cache with "
                "names_filter=lambda name: 'resid' in name keeps blocks.<l>.hook_resid_post and "
                "blocks.0.hook_resid_pre, which are read"
            )
        streams = [_one_prompt(residual_hook(layer), cache[residual_hook(layer)]) for layer in layers]
        shapes = {tuple(stream.shape) for stream in streams}
        if len(shapes) > 1:
            raise CacheError(f"the cache's residual streams have several shapes: {sorted(shapes)}")
        n_pos = streams[0].shape[0]
        given = several(pos, "pos")
        for one in given:
            if not -n_pos <= one < n_pos:
                raise PatchscopeError(f"position {one} does not exist: the cache has {n_pos} positions")
        if not given:
            raise PatchscopeError("pos names no position of the cache; give one, such as -1 for the last")
        if tokens is not None and tokens.numel() != n_pos:
            raise PatchscopeError(
                f"{tokens.numel()} tokens do not fit a cache of {n_pos} positions; give those it is of"
            )
        at = torch.tensor([one % n_pos for one in given], device=streams[0].device)
        values = torch.stack([stream.detach()[at] for stream in streams], dim=1)[:, :, None]
        ids = None if tokens is None else tokens.flatten()[at.to(tokens.device)].long()
        names = tuple(f"P{i}" for i in at.tolist())
        if ids is not None and model is not None:
            names = tuple(text.strip() or name for text, name in zip(token_strings(model, ids), names, strict=True))
        return cls(values.clone(), tuple(layers), names, tokens=ids)

    @classmethod
    def of(cls, values: Tensor, names: Sequence[str] | None = None) -> Vectors:
        """Return any vectors ``[n_items, d_model]`` (or one, ``[d_model]``) as a source; they belong to no layer.

        Raises:
            PatchscopeError: Another shape, whole numbers, or names that are not as many.
        """
        if values.ndim not in (1, 2) or not values.is_floating_point():
            raise PatchscopeError(
                f"vectors have shape [n_items, d_model] and a floating dtype; given {tuple(values.shape)}, "
                f"{values.dtype}"
            )
        rows = values.detach().clone().reshape(-1, values.shape[-1])
        labels = tuple(f"v{i}" for i in range(len(rows))) if names is None else tuple(names)
        return cls(rows[:, None, None], None, labels)

    @classmethod
    def decoder(cls, dictionary: Dictionary, index: Indices, *, layer: int | None = None, unit: bool = True) -> Vectors:
        """Return decoder rows of features: the directions that they write to the residual stream.

        Args:
            dictionary: Of `ReplacementModel.dictionaries`, or what `circuit_lens.dictionaries.adapt.adapt` makes of a
                SAELens module.
            index: Feature or features.
            layer: Which of the layers that a cross-layer dictionary writes to; None: the sum over all of them.
            unit: Scale to norm 1.

        Raises:
            PatchscopeError: No such feature or layer, a row of norm 0 that cannot be scaled, or a dictionary that does
                not write to the residual stream's basis (``hook_z``).
        """
        ids = several(index, "index")
        _require_stream(dictionary)
        if not ids or not all(0 <= i < dictionary.d_sae for i in ids):
            raise PatchscopeError(f"features {ids} of {dictionary.site}: valid are 0 to {dictionary.d_sae - 1}")
        with plain_tensors():
            rows = dictionary.decoder_rows(torch.tensor(ids), torch.get_default_dtype())
            rows = rows.sum(1) if layer is None else rows[:, _output(dictionary, layer)]
        if unit:
            rows = _unit(rows, [f"{dictionary.site} #{i}" for i in ids])
        return cls.of(rows, [f"L{dictionary.layer} #{i}" for i in ids])

    @classmethod
    def supernode(cls, dictionaries: Iterable[Dictionary], supernode: Supernode, *, unit: bool = True) -> Vectors:
        """Return the direction of a supernode: the sum of its features' unit decoder rows, each feature counted once.

        Raises:
            PatchscopeError: A feature that the dictionaries do not have; rows of different widths or that cancel.
        """
        listed = list(dictionaries)
        features = {(one.layer, one.site, one.index): one for one in supernode.features}
        parts = [cls.decoder(_dictionary_of(listed, f), f.index).values[0, 0, 0] for f in features.values()]
        if len({len(part) for part in parts}) > 1:
            raise PatchscopeError(f"the features of {supernode.name!r} write to vectors of different widths")
        total = torch.stack(parts).sum(0)[None]
        return cls.of(_unit(total, [supernode.name]) if unit else total, [supernode.name])


_RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def _positions(at: Any) -> list[At]:
    try:
        listed = [at] if isinstance(at, At) else list(at)
    except TypeError as error:
        raise PatchscopeError(f"at={at!r:.80} is no position; give cl.At(prompt, pos), or a list of them") from error
    if not listed:
        raise PatchscopeError("no source positions were given; give cl.At(prompt, pos)")
    for one in listed:
        if not isinstance(one, At):
            raise PatchscopeError(f"{one!r:.80} is no position; give cl.At(prompt, pos), or a list of them")
    return listed


def _chosen(layers: Any, known: range) -> tuple[int, ...]:
    """Return the source layers that are asked for."""
    chosen = tuple(known if layers is None else several(layers, "layers"))
    if not chosen or len(set(chosen)) != len(chosen):
        raise PatchscopeError(f"source layers {list(chosen)}: give at least one, and each once")
    for layer in chosen:
        if layer not in known:
            raise PatchscopeError(f"source layer {layer} does not exist; the model has {_ranges(known)}")
    return chosen


def _batches(found: Sequence[tuple[Tensor, tuple[int, ...], str]], fits: Callable[[int], int]) -> list[list[int]]:
    """Return the numbers of prompts of one length, at most `BATCH` together, or as many as fit of that length."""
    lengths: dict[int, list[int]] = {}
    for i, (tokens, *_) in enumerate(found):
        lengths.setdefault(len(tokens), []).append(i)
    sizes = {n_pos: min(BATCH, max(1, fits(n_pos))) for n_pos in lengths}
    return [group[i : i + sizes[n]] for n, group in lengths.items() for i in range(0, len(group), sizes[n])]


def _one_prompt(name: str, value: Any) -> Float[Tensor, "n_pos d_model"]:
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or (value.ndim == 3 and len(value) != 1):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CacheError(f"{name} of the cache has shape {shape}; one prompt at a time: [n_pos, d_model] or [1, ...]")
    return value[0] if value.ndim == 3 else value


def _require_stream(dictionary: Dictionary) -> None:
    write = parse_hook(dictionary.hooks_out[0]).suffix
    if write == Write.HEADS.value:
        raise PatchscopeError(
            f"{dictionary.site} writes to the heads' outputs, not to the residual stream; multiply its rows with W_O "
            "and give them as Vectors.of(rows)"
        )


def _output(dictionary: Dictionary, layer: int) -> int:
    if layer not in dictionary.out_layers:
        raise PatchscopeError(
            f"{dictionary.site} does not write to layer {layer}; it writes to {dictionary.out_layers}"
        )
    return dictionary.out_layers.index(layer)


def _dictionary_of(dictionaries: Sequence[Dictionary], feature: Feature) -> Dictionary:
    fits = [d for d in dictionaries if d.layer == feature.layer and feature.site in (None, d.site)]
    if len(fits) != 1:
        sites = ", ".join(d.site for d in dictionaries if d.layer == feature.layer) or "none"
        raise PatchscopeError(f"{feature} names {len(fits)} dictionaries; at layer {feature.layer} there is: {sites}")
    return fits[0]


def _unit(rows: Float[Tensor, "n d"], names: Sequence[str]) -> Float[Tensor, "n d"]:
    norms = rows.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        silent = names[int((norms[:, 0] == 0).nonzero()[0])]
        raise PatchscopeError(f"the decoder of {silent} is zero, so it has no direction")
    return rows / norms


def _ranges(layers: Iterable[int]) -> str:
    listed = sorted(layers)
    whole = listed == list(range(listed[0], listed[-1] + 1)) and len(listed) > 2
    return f"layers {listed[0]} to {listed[-1]}" if whole else f"layers {', '.join(map(str, listed))}"

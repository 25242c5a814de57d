"""Maps f between a source's vectors and a target's residual stream (Ghandeharioun et al. 2024, Patchscopes, §3)."""

from __future__ import annotations

import contextlib
import json
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from circuit_lens.errors import PatchscopeError
from circuit_lens.graph.files import atomic_path

FORMAT, VERSION = "circuit_lens.patchscope_map", 1
Pair = tuple[int, int]
"""A source layer and a target layer; -1 is the embedding."""
_NO_LAYER = -2


class Map(ABC):
    """A map from a source's vectors to a target's residual stream. Subclass it for one of your own.

    Attributes:
        name: What it is called in results.
    """

    name: str = "map"

    @abstractmethod
    def __call__(
        self, h: Float[Tensor, "*batch d_in"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what is written at the target layer for vectors of a source layer (None: of no layer)."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the map to one safetensors file, all or nothing.

        Raises:
            PatchscopeError: A map that is code, not numbers.
            GraphFileError: A file that cannot be written.
        """
        tensors, manifest = self._numbers()
        manifest = {"format": FORMAT, "version": VERSION} | manifest
        with atomic_path(path) as part:
            copies = {name: t.contiguous().clone() for name, t in tensors.items()}  # tied ones cannot be stored
            save_file(copies, part, {"manifest": json.dumps(manifest)})

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise PatchscopeError(
            f"{type(self).__name__} cannot be saved: it is code; save its numbers yourself, or use "
            "cl.patchscopes.Fitted, ScaleBias or ModuleMap"
        )


@dataclass(frozen=True)
class Identity(Map):
    """f(h) = h."""

    name = "identity"

    def __call__(
        self, h: Float[Tensor, "*batch d_model"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return h itself."""
        return h

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"kind": "identity"}


@dataclass(frozen=True)
class Zero(Map):
    """f(h) = 0: what the prompt says without its placeholder (knockout)."""

    name = "zero"

    def __call__(
        self, h: Float[Tensor, "*batch d_model"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return zeros."""
        return torch.zeros_like(h)

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"kind": "zero"}


@dataclass(frozen=True, eq=False)
class ScaleBias(Map):
    """f(h) = scale · h + bias, the d + 1 numbers of an adapter that reads vectors (2602.10352).

    Attributes:
        scale: A number.
        bias: ``[d_model]``; None: none.
    """

    scale: float = 1.0
    bias: Float[Tensor, "d_model"] | None = None

    name = "scale and bias"

    def __call__(
        self, h: Float[Tensor, "*batch d_model"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the scaled and shifted vectors.

        Raises:
            PatchscopeError: A bias of another width.
        """
        if self.bias is not None and self.bias.shape != h.shape[-1:]:
            raise PatchscopeError(f"the bias has shape {tuple(self.bias.shape)}; the vectors have width {h.shape[-1]}")
        return h * self.scale + (0.0 if self.bias is None else self.bias.to(h))

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {} if self.bias is None else {"bias": self.bias.detach().cpu()}
        return tensors, {"kind": "scale_bias", "scale": float(self.scale)}


@dataclass(frozen=True, eq=False)
class ModuleMap(Map):
    """f(h) = module(h): a user's own module, the same for all layers.

    It is called as after ``module.eval()``, and its mode is as before afterwards: which vectors stand together in a
    call is the memory's affair, so nothing may depend on it, as dropout and batch norms do when they train.
    """

    module: nn.Module

    name = "module"

    def __call__(
        self, h: Float[Tensor, "*batch d_in"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what the module makes of the vectors, which it gets in its own dtype and on its own device.

        Raises:
            PatchscopeError: The module fails, such as one for vectors of another width.
        """
        own = next((p for p in self.module.parameters() if p.is_floating_point()), h)
        given = h.to(own)
        with _evaluating(self.module):
            try:
                return self.module(given)
            except torch.OutOfMemoryError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise PatchscopeError(
                    f"the map, a {type(self.module).__name__}, fails on vectors of shape {list(given.shape)} "
                    f"({type(error).__name__}: {error}); give a module that maps [..., {given.shape[-1]}] to "
                    "[..., width of the target]"
                ) from error

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"state.{name}": t.detach().cpu() for name, t in self.module.state_dict().items()}
        return tensors, {"kind": "module", "class": type(self.module).__name__}


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Leave training mode for a while; ``eval()`` itself is not called, since adapters rewrite weights in it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True, eq=False)
class Fitted(Map):
    """f(h) = h A + b, one A and b for each pair of layers; `circuit_lens.patchscopes.fit_map` fits them.

    Attributes:
        matrices: A of each (source layer, target layer), ``[d_in, d_out]``.
        biases: b of each, ``[d_out]``.
        explained: Share of the target's variance that each explains on tokens that it was not fitted on; NaN where the
            target's states are the same at all of these.
        kind: "affine", "linear" or "orthogonal".
    """

    matrices: Mapping[Pair, Float[Tensor, "d_in d_out"]]
    biases: Mapping[Pair, Float[Tensor, "d_out"]]
    explained: Mapping[Pair, float] = field(default_factory=dict)
    kind: str = "affine"

    def __post_init__(self) -> None:
        if not self.matrices or set(self.matrices) != set(self.biases):
            raise PatchscopeError(
                f"a fitted map needs a matrix and a bias for the same pairs of layers; given {sorted(self.matrices)} "
                f"and {sorted(self.biases)}"
            )
        for pair, matrix in self.matrices.items():
            bias = self.biases[pair]
            if matrix.ndim != 2 or bias.shape != matrix.shape[1:]:
                raise PatchscopeError(
                    f"the map from layer {pair[0]} to layer {pair[1]} has a matrix of shape {tuple(matrix.shape)} and "
                    f"a bias of shape {tuple(bias.shape)}; they are [d_in, d_out] and [d_out]"
                )
            for tensor in (matrix, bias):
                if not bool(torch.isfinite(tensor).all()):
                    raise PatchscopeError(f"the map from layer {pair[0]} to layer {pair[1]} holds NaN or infinity")

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind of map."""
        return self.kind

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of layers that it maps between."""
        return tuple(sorted(self.matrices))

    def __call__(
        self, h: Float[Tensor, "*batch d_in"], source_layer: int | None, target_layer: int
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the mapped vectors.

        Raises:
            PatchscopeError: A pair of layers that was not fitted, or vectors of another width.
        """
        pair = (_NO_LAYER if source_layer is None else source_layer, target_layer)
        if pair not in self.matrices:
            shown = ", ".join(f"{a}→{b}" for a, b in self.pairs[:8]) + (" …" if len(self.pairs) > 8 else "")
            raise PatchscopeError(f"the map was not fitted from layer {source_layer} to {target_layer}; it has {shown}")
        matrix = self.matrices[pair]
        if h.shape[-1] != len(matrix):
            raise PatchscopeError(f"the map reads vectors of width {len(matrix)}; given width {h.shape[-1]}")
        wide = torch.promote_types(h.dtype, matrix.dtype)
        matrix, bias = (t.to(h.device, wide) for t in (matrix, self.biases[pair]))
        return h.to(wide) @ matrix + bias

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"matrix.{a}.{b}": t.detach().cpu() for (a, b), t in self.matrices.items()}
        tensors |= {f"bias.{a}.{b}": t.detach().cpu() for (a, b), t in self.biases.items()}
        explained = {f"{a}.{b}": share for (a, b), share in self.explained.items()}
        return tensors, {"kind": "fitted", "fit": self.kind, "explained": explained}


def as_map(mapping: Map | nn.Module | None) -> Map:
    """Return a map: the identity for None, a module's own for a module.

    Raises:
        PatchscopeError: Something else.
    """
    if mapping is None:
        return Identity()
    if isinstance(mapping, nn.Module):
        return ModuleMap(mapping)
    if isinstance(mapping, Map):
        return mapping
    raise PatchscopeError(
        f"mapping={mapping!r:.80} is no map; give a torch module, or one of cl.patchscopes: Identity, Zero, ScaleBias, "
        "Fitted (fit_map), or a subclass of Map"
    )


def load_map(path: str | PathLike[str], *, module: nn.Module | None = None) -> Map:
    """Read a map that `Map.save` wrote.

    Args:
        path: The file.
        module: For the file of a user's module: one of the same class, whose weights are set.

    Raises:
        PatchscopeError: No such file, another format, a damaged one, or a module that is missing or does not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            manifest = dict(json.loads((file.metadata() or {}).get("manifest", "{}")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise PatchscopeError(f"{path} is no file of a map: {error}") from error
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        raise PatchscopeError(
            f"{path} has format {manifest.get('format')!r} version {version!r}; a map has {FORMAT!r} "
            f"version {' or '.join(map(str, range(1, VERSION + 1)))}"
        )
    try:
        return _made(str(path), manifest, tensors, module)
    except (KeyError, AttributeError, TypeError) as error:
        raise PatchscopeError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _made(path: str, manifest: dict[str, Any], tensors: dict[str, Tensor], module: nn.Module | None) -> Map:
    match manifest.get("kind"):
        case "identity":
            return Identity()
        case "zero":
            return Zero()
        case "scale_bias":
            return ScaleBias(_number(path, "scale", manifest["scale"]), tensors.get("bias"))
        case "fitted":
            matrices = {_pair(name): t for name, t in tensors.items() if name.startswith("matrix.")}
            biases = {_pair(name): t for name, t in tensors.items() if name.startswith("bias.")}
            shares = manifest["explained"].items()
            explained = {_pair(f"x.{name}"): _number(path, "explained", share, nan=True) for name, share in shares}
            return Fitted(matrices, biases, explained, manifest["fit"])
        case "module" if module is None:
            raise PatchscopeError(
                f"{path} holds the weights of a {manifest['class']}; give one: load_map(path, module=…)"
            )
        case "module":
            assert module is not None
            state = {name.removeprefix("state."): t for name, t in tensors.items()}
            held, own = ({name: tuple(t.shape) for name, t in one.items()} for one in (state, module.state_dict()))
            if held != own:  # before anything is set: torch sets what fits and raises then
                raise PatchscopeError(f"{path} holds the weights of another module: {held}; given one with {own}")
            module.load_state_dict(state)
            return ModuleMap(module)
        case kind:
            raise PatchscopeError(f"{path} holds a map of kind {kind!r}, which this version does not know")


def _number(path: str, name: str, value: Any, *, nan: bool = False) -> float:
    if type(value) not in (int, float) or not (math.isfinite(value) or (nan and math.isnan(value))):
        raise PatchscopeError(f"{path} is damaged: its {name} is {value!r:.80}, not a finite number")
    return float(value)


def _pair(name: str) -> Pair:
    try:
        _, a, b = name.split(".")
        return int(a), int(b)
    except ValueError as error:
        raise PatchscopeError(f"a damaged file of a map: {name!r} names no pair of layers") from error


def layer_pairs(
    pairs: str | Sequence[Pair], source_layers: Sequence[int], target_layers: Sequence[int]
) -> tuple[Pair, ...]:
    """Return the pairs that a word names: ``"same"``, ``"all"``, ``"last"`` (to the last layer), or those given.

    Raises:
        PatchscopeError: Another word, no pair, or a layer that is not there.
    """
    match pairs:
        case "same":
            found = tuple((layer, layer) for layer in source_layers if layer in target_layers)
        case "all":
            found = tuple((a, b) for a in source_layers for b in target_layers)
        case "last":
            found = tuple((layer, max(target_layers)) for layer in source_layers)
        case str():
            raise PatchscopeError(
                f"pairs={pairs!r} is not valid; give 'same', 'all', 'last' or a list of pairs of layers"
            )
        case _:
            try:
                found = tuple((operator.index(a), operator.index(b)) for a, b in pairs)
            except (TypeError, ValueError) as error:
                raise PatchscopeError(f"pairs={pairs!r:.80} is not valid; give (source layer, target layer)") from error
    for a, b in found:
        if a not in source_layers or b not in target_layers:
            raise PatchscopeError(
                f"no map from layer {a} to {b}: source layers are {min(source_layers)} to {max(source_layers)}, target "
                f"layers {min(target_layers)} to {max(target_layers)}"
            )
    if not found:
        raise PatchscopeError(f"pairs={pairs!r} names no pair of layers")
    return found

"""Cross-layer transcoders: features that read one layer and write the MLP outputs of it and all later ones.

Lindsey, Templeton, Marcus, Conerly, Batson, Olah (2024), "Sparse Crosscoders for Cross-Layer Features and Model
Diffing"; Ameisen et al. (2025), "Circuit Tracing", section "Building an interpretable replacement model".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from circuit_lens.dictionaries.cross_layer_files import load, save
from circuit_lens.dictionaries.cross_layer_parts import Activation, CrossLayer, LayerParts
from circuit_lens.dictionaries.cross_layer_weights import (
    InMemory,
)
from circuit_lens.dictionaries.finite import refuse_bad_numbers
from circuit_lens.errors import DictionaryError


class CrossLayerTranscoder:
    """A cross-layer transcoder: features of layer l write to the MLP outputs of layers l, l + 1, … to the last.

    Give it to a ReplacementModel in place of a list of transcoders. ``L`` is the number of layers, ``l`` counts from 0
    in the order given; every layer has the same widths.

    Args:
        W_enc: ``L`` tensors ``[d_in, d_sae]``.
        b_enc: ``L`` tensors ``[d_sae]``.
        W_dec: ``L`` tensors, that of layer l ``[d_sae, L - l, d_out]``, its own layer's output first.
        b_dec: ``L`` tensors ``[d_out]``, one for every MLP output.
        hook_in: What each layer reads, ``"blocks.0.hook_resid_mid"``, say.
        hook_out: What stands for each layer's MLP output, ``"blocks.0.hook_mlp_out"``, say.
        activation: ``"relu"``; ``"jumprelu"``, with ``threshold``; ``"topk"``, with ``k``: the k largest of a
            position's activations after a ReLU.
        threshold: ``L`` tensors ``[d_sae]``.
        k: Active features per layer and position at most.
        W_skip: ``L`` tensors ``[d_in, d_out]``: ``x @ W_skip`` of what layer l reads goes to its own MLP output.
        metadata: What is saved with it, JSON values: where it comes from, how it was trained.

    Raises:
        DictionaryError: Tensors that are missing, do not fit together or hold no finite floats, hooks that cannot be
            attributed, an activation without what it needs.
    """

    def __init__(
        self,
        *,
        W_enc: Sequence[Tensor],
        b_enc: Sequence[Tensor],
        W_dec: Sequence[Tensor],
        b_dec: Sequence[Tensor],
        hook_in: Sequence[str],
        hook_out: Sequence[str],
        activation: Activation = "relu",
        threshold: Sequence[Tensor] | None = None,
        k: int | None = None,
        W_skip: Sequence[Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        n = len(W_enc)
        given = {"b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "hook_in": hook_in, "hook_out": hook_out}
        given |= {"threshold": threshold, "W_skip": W_skip}
        counts = {name: len(value) for name, value in given.items() if value is not None}
        if not n or any(count != n for count in counts.values()):
            raise DictionaryError(f"a cross-layer transcoder has one of each per layer; W_enc has {n}, others {counts}")
        for layer in range(n):
            refuse_bad_numbers(f"W_enc of layer {layer}", W_enc[layer])
            refuse_bad_numbers(f"W_dec of layer {layer}", W_dec[layer])
        self._set(
            [
                LayerParts(
                    InMemory(W_enc[layer], W_dec[layer]),
                    b_enc[layer].detach(),
                    b_dec[layer].detach(),
                    None if threshold is None else threshold[layer].detach(),
                    None if W_skip is None else W_skip[layer].detach(),
                    hook_in[layer],
                    tuple(hook_out[layer:]),
                    activation,
                    k,
                    f"clt {hook_out[0]}",
                )
                for layer in range(n)
            ],
            metadata,
        )

    @classmethod
    def from_parts(cls, parts: Sequence[LayerParts], metadata: Mapping[str, Any] | None = None) -> CrossLayerTranscoder:
        """Return the transcoder of layers whose matrices may be anywhere, on disk for instance.

        Raises:
            DictionaryError: As the constructor.
        """
        made = cls.__new__(cls)
        made._set(parts, metadata)
        return made

    def _set(self, parts: Sequence[LayerParts], metadata: Mapping[str, Any] | None) -> None:
        self.dictionaries = tuple(CrossLayer(p) for p in parts)
        self.metadata: dict[str, Any] = dict(metadata or {})
        _check_set(self.dictionaries)

    def __repr__(self) -> str:
        first, last = self.dictionaries[0], self.dictionaries[-1]
        where = "in memory" if isinstance(first.parts.matrices, InMemory) else "decoders on disk"
        return (
            f"CrossLayerTranscoder({first.hook_in} -> {first.site} to {last.hook_in} -> {last.site}, {self.n_layers} x "
            f"{self.d_sae} features, {first.kind.removeprefix('cross_layer_')}, {self.dtype}, {where})"
        )

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.dictionaries)

    @property
    def d_sae(self) -> int:
        """Features per layer."""
        return self.dictionaries[0].d_sae

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.dictionaries[0].d_in

    @property
    def d_out(self) -> int:
        """Width of what is written."""
        return self.dictionaries[0].d_out

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoders as they are handed out."""
        return self.dictionaries[0].parts.matrices.dtype

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> CrossLayerTranscoder:
        """Return a new transcoder with every tensor in another dtype or on another device.

        Matrices on disk stay there; what is read of them is converted.
        """
        moved = []
        for d in self.dictionaries:
            p = d.parts
            small = {name: getattr(p, name) for name in ("b_enc", "b_dec", "threshold", "W_skip")}
            tensors = {n: None if t is None else t.to(device=device, dtype=dtype) for n, t in small.items()}
            moved.append(replace(p, matrices=p.matrices.moved(dtype, device), **tensors))
        return CrossLayerTranscoder.from_parts(moved, self.metadata)

    def save(self, folder: str | os.PathLike[str], layout: Literal["saelens", "circuit-tracer"] = "saelens") -> None:
        """Write the transcoder to a new folder, all or nothing.

        Args:
            folder: Where; it must not exist, or be empty.
            layout: ``"saelens"``: a folder per layer that ``SAE.load_from_disk`` reads once
                `circuit_lens.dictionaries.cross_layer_saelens` is imported. ``"circuit-tracer"``: the files that
                circuit-tracer reads, features along the first axis, which suits reading by rows; what it does not know
                (skip, k) lies in the same files and in ``config.yaml`` under names that it passes over.

        Raises:
            DictionaryError: The folder is in use or cannot be written, or the layout cannot say what this transcoder
                is.
        """
        save(self.dictionaries, self.metadata, folder, layout)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        lazy: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        hook_in: str | Sequence[str] | None = None,
        hook_out: str | Sequence[str] | None = None,
    ) -> CrossLayerTranscoder:
        """Read a transcoder from a folder in either layout, which is recognised.

        Args:
            folder: Where.
            lazy: Leave encoders and decoders on disk: encoders are streamed, of decoders the rows of active features
                are read. The files must stay where they are.
            dtype: Convert to this; None keeps the files' dtype.
            device: Where tensors go.
            hook_in, hook_out: One hook name per layer, or one name within the block (``"hook_resid_mid"``) for all, in
                place of those in the folder.

        Raises:
            DictionaryError: No such folder, files that are foreign, damaged, missing or contradict each other.
        """
        made = cls.from_parts(*load(folder, lazy=lazy, hook_in=hook_in, hook_out=hook_out))
        return made if dtype is None and torch.device(device).type == "cpu" else made.to(dtype, device)


def _check_set(layers: Sequence[CrossLayer]) -> None:
    first = layers[0]
    for i, layer in enumerate(layers):
        widths = (layer.d_in, layer.d_sae, layer.d_out)
        if widths != (first.d_in, first.d_sae, first.d_out):
            raise DictionaryError(f"{first} and {layer} have other widths; all layers must have the same")
        if layer.out_layers[0] != layer.layer:
            raise DictionaryError(
                f"layer {i} reads {layer.hook_in!r} and writes {layer.site!r} first; the two must be of one block"
            )
        if layer.hooks_out != first.hooks_out[i:]:
            raise DictionaryError(f"{layer} writes {layer.hooks_out}, expected {first.hooks_out[i:]}")
    if list(first.out_layers) != sorted(set(first.out_layers)) or len(first.out_layers) != len(layers):
        raise DictionaryError(
            f"the layers are {[layer.layer for layer in layers]} and write {list(first.out_layers)}; give each once, "
            "in ascending order, up to the last one written"
        )

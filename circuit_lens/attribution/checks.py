"""Checks of a prompt's run: that dictionaries read what the residual stream gives, and reconstruct what they should."""

from __future__ import annotations

import torch

from circuit_lens.attribution.frozen import FrozenModel
from circuit_lens.attribution.mlp_paths import read_constant, read_value
from circuit_lens.attribution.sources import ActiveFeatures, Sources
from circuit_lens.dictionaries.points import Read, read_kind, write_kind
from circuit_lens.errors import ConsistencyError, ReconstructionError
from circuit_lens.protocols import Dictionary

_READINGS = 16  # positions at which a dictionary's other possible inputs are tried


def check_reads(frozen: FrozenModel, sources: Sources) -> None:
    """Raise if a dictionary's input was edited after the residual stream: no source explains such an edit."""
    for f in sources.features:
        hook = f.dictionary.hook_in
        own = frozen.values.values.get(hook)
        if own is None or read_kind(hook) in (Read.RESIDUAL, Read.MID):
            continue
        own = own.flatten(1)
        error = float((own - f.read).norm() / own.norm().clamp_min(1e-30))
        limit = {torch.float64: 1e-5, torch.float32: 1e-3}.get(frozen.values.native, 0.1)
        if error > limit:
            raise ConsistencyError(
                f"{hook} in the run differs by {error:.1e} from what the residual stream gives: something edits "
                "it there. Edit the residual stream or a feature instead, or pass check=False"
            )


def check_reconstruction(frozen: FrozenModel, sources: Sources, least: float | None, *, edited: bool) -> None:
    """Raise if a dictionary explains too little, and say which input would suit it.

    Where the run was ``edited`` no other input is tried: the MLP outputs are not what dictionaries were trained on.
    """
    if least is None:
        return
    if frozen.n_pos == 1:  # only the first position, which dictionaries are not held to
        return
    for f, explained in zip(sources.features, sources.explained, strict=True):
        better = "" if edited else _better_input(frozen, f)
        if explained >= least and not better:
            continue
        raise ReconstructionError(
            f"{f.dictionary} does not reconstruct this model's {_what(f.dictionary)} as it should: it explains "
            f"{explained:.0%} of it (least: {least:.0%}).{better} Its input hook may be another one, or the model's "
            "weights are processed in a way it was not trained on: load the model with "
            "from_pretrained_no_processing. To use it all the same pass min_explained=None"
        )


def _what(dictionary: Dictionary) -> str:
    kind = write_kind(dictionary.hooks_out[0])
    return "MLP output" if kind.of_mlp else kind.value


def _better_input(frozen: FrozenModel, f: ActiveFeatures) -> str:
    """Say which other input would suit a dictionary clearly better, on the prompt's last positions; "" if none."""
    layer, d, part = f.dictionary.layer, f.dictionary, slice(max(1, frozen.n_pos - _READINGS), None)
    if frozen.n_pos == 1 or len(d.out_layers) != 1 or not read_kind(d.hook_in).in_mlp_branch:
        return ""
    norm, base = frozen.ln2[layer], frozen.base[layer]
    target = frozen.mlp_out[layer][part]
    left: dict[Read, float] = {}
    for kind in (Read.NORMALIZED, Read.NORM_OUTPUT, Read.MID):
        read = (read_value(kind, norm, base) + read_constant(kind, norm))[part]
        with torch.no_grad():
            out = d.decode(d.activate(d.pre_acts(read), read)).select(-2, 0) + d.skip(read)
        left[kind] = float((target - out).square().sum() / target.square().sum().clamp_min(1e-30))
    best = min(left, key=lambda kind: left[kind])
    own = Read.MID if read_kind(d.hook_in) is Read.RESIDUAL else read_kind(d.hook_in)
    if left[own] < 1e-3 or left[best] > min(0.7, 0.75 * left[own]):
        return ""
    name = f"blocks.{layer}.{best.value}"
    return f" Reading {name!r} it explains {1 - left[best]:.0%}: set cfg.metadata.hook_name to that."

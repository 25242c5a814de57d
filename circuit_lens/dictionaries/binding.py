"""A model and its dictionaries as a checked pair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from circuit_lens.dictionaries.adapt import adapt, expand
from circuit_lens.dictionaries.points import (
    Place,
    Read,
    Write,
    check_transcoder_hooks,
    parse_hook,
    read_kind,
    write_kind,
)
from circuit_lens.dictionaries.saelens import fingerprint
from circuit_lens.errors import DictionaryError, HookError, nearest
from circuit_lens.hooks import has_hook
from circuit_lens.protocols import Dictionary, HookedModel


@dataclass(frozen=True, eq=False)
class Binding:
    """A model and its dictionaries, checked once.

    Attributes:
        model: The hooked model, as the user gave it.
        dictionaries: In the order the model computes them.
    """

    model: HookedModel
    dictionaries: tuple[Dictionary, ...]

    def dictionary(self, layer: int, site: str | None = None) -> Dictionary:
        """Return the dictionary of a layer, or of a layer and site.

        Raises:
            DictionaryError: There is none, or several and no site was given.
        """
        found = [d for d in self.dictionaries if d.layer == layer and site in (None, d.site)]
        if len(found) == 1:
            return found[0]
        sites = [d.site for d in self.dictionaries]
        if not found:
            wanted = f"layer {layer}" if site is None else f"site {site!r} in layer {layer}"
            raise DictionaryError(f"there is no dictionary at {wanted}; there are {', '.join(sites) or 'none'}")
        raise DictionaryError(f"layer {layer} has several dictionaries; name one with site=: {[d.site for d in found]}")

    def fingerprints(self) -> dict[str, str]:
        """Return hashes of the model's and the dictionaries' weights, for manifests."""
        parameters = dict(self.model.named_parameters())  # type: ignore[attr-defined]
        return {"model": fingerprint(parameters)} | {d.site: d.fingerprint() for d in self.dictionaries}


def bind(model: HookedModel, dictionaries: Iterable[Any] | Any) -> Binding:
    """Check that the dictionaries fit the model and return the pair.

    Raises:
        HookError: A dictionary's hook that the model does not have.
        DictionaryError: No hooked model, a dictionary that cannot be attributed, a wrong width or layer, two on a site.
    """
    if not isinstance(model, HookedModel) or not hasattr(model.cfg, "n_layers"):
        raise DictionaryError(
            f"{type(model).__name__} is no hooked model; give a HookedTransformer or a TransformerBridge (for a "
            "Hugging Face model: TransformerBridge.boot_transformers(name))"
        )
    adapted = sorted((adapt(d) for d in expand(dictionaries)), key=_order)
    for dictionary in adapted:
        _check_layers(model, dictionary)
        _check_hooks(model, dictionary)
        _check_widths(model, dictionary)
    _check_sites(adapted)
    _check_skips(adapted)
    return Binding(model, tuple(adapted))


def reads_where_it_writes(dictionary: Dictionary) -> bool:
    """Whether a dictionary is an autoencoder."""
    return dictionary.hook_in in dictionary.hooks_out


def read_rank(dictionary: Dictionary) -> int:
    """Return where a dictionary reads, as one number in the order of computing."""
    return read_kind(dictionary.hook_in).place.at(dictionary.layer)


def write_rank(dictionary: Dictionary) -> int:
    """Return where a dictionary writes first: what it writes reaches what is read at a higher rank."""
    writes = zip(dictionary.out_layers, dictionary.hooks_out, strict=True)
    return min(write_kind(hook).place.at(layer) for layer, hook in writes)


def layers_of_mlps(dictionaries: Iterable[Dictionary]) -> frozenset[int]:
    """Return the layers whose MLP some dictionary stands for."""
    return frozenset(
        layer
        for d in dictionaries
        for layer, hook in zip(d.out_layers, d.hooks_out, strict=True)
        if write_kind(hook).of_mlp and not reads_where_it_writes(d)
    )


def _order(dictionary: Dictionary) -> tuple[int, Place, str]:
    return dictionary.layer, read_kind(dictionary.hook_in).place, dictionary.site


def _check_sites(dictionaries: Sequence[Dictionary]) -> None:
    """Raise where several dictionaries stand for one activation, other than as one set whose sum stands for it."""
    written: dict[tuple[int, Place], Dictionary] = {}
    for dictionary in dictionaries:
        for hook in dictionary.hooks_out:
            place = parse_hook(hook).layer, write_kind(hook).place
            other = written.setdefault(place, dictionary)
            if other is not dictionary and (other.joint != dictionary.joint or other.site == dictionary.site):
                what = "MLP output" if write_kind(hook).of_mlp else parse_hook(hook).suffix
                raise DictionaryError(
                    f"two dictionaries write to the {what} of layer {place[0]}: {other} and {dictionary}. Each claims "
                    "all of it, and their sum would count it twice; give one, or compare two ReplacementModels"
                )


def _check_skips(dictionaries: Sequence[Dictionary]) -> None:
    """Raise where a skip path would read the stream before an autoencoder writes it: no paths are kept for that."""
    stands = {d.hook_in for d in dictionaries if reads_where_it_writes(d)}
    for d in dictionaries:
        if d.has_skip and d.hook_in in stands and not reads_where_it_writes(d):
            raise DictionaryError(
                f"{d} has a skip path and reads {d.hook_in!r}, at which an autoencoder stands; what it reads is the "
                "stream before that. Let it read the same stream behind it: set its hook_name to "
                f"blocks.{d.layer}.hook_mlp_in"
            )


def _check_layers(model: HookedModel, dictionary: Dictionary) -> None:
    n_layers = model.cfg.n_layers
    for layer in (dictionary.layer, *dictionary.out_layers):
        if not 0 <= layer < n_layers:
            raise DictionaryError(f"{dictionary} is for layer {layer}, the model has layers 0..{n_layers - 1}")


def _check_hooks(model: HookedModel, dictionary: Dictionary) -> None:
    kind, hooks = read_kind(dictionary.hook_in), model.hook_dict
    if reads_where_it_writes(dictionary):
        _check_autoencoder(model, dictionary)
        return
    check_transcoder_hooks(dictionary.hook_in, dictionary.hooks_out)
    layer = dictionary.layer
    parallel = not has_hook(model, f"blocks.{layer}.hook_resid_mid")
    if kind is Read.MID and parallel:
        raise HookError(
            f"{dictionary} reads hook_resid_mid, which a model with parallel attention and MLP does not have; such a "
            "dictionary was trained on another architecture"
        )
    # A norm's output has no hook point on every class; it is then computed from the normalised value, gain and bias.
    computed = kind is Read.NORM_OUTPUT and has_hook(model, f"blocks.{layer}.ln2.hook_normalized")
    if not computed and not has_hook(model, dictionary.hook_in):
        raise HookError(
            f"{dictionary} reads {dictionary.hook_in!r}, which the model has not{nearest(dictionary.hook_in, hooks)}"
        )
    for hook in dictionary.hooks_out:
        out = parse_hook(hook).layer
        raw = write_kind(hook) is Write.MLP_RAW and has_hook(model, f"blocks.{out}.hook_mlp_out")
        if not raw and not has_hook(model, hook):
            raise HookError(f"{dictionary} writes {hook!r}, which the model has not{nearest(hook, hooks)}")


def _check_autoencoder(model: HookedModel, dictionary: Dictionary) -> None:
    name, hooks = dictionary.hook_in, model.hook_dict
    if dictionary.hooks_out != (name,):
        raise DictionaryError(f"{dictionary} reads {name!r}, which is one of several hooks it writes; give one or none")
    if name not in hooks:
        hint = "; a model with parallel attention and MLP has none" if name.endswith("hook_resid_mid") else ""
        raise HookError(f"{dictionary} stands at {name!r}, which the model has not{nearest(name, hooks)}{hint}")
    norm_in = hooks.get(f"blocks.{dictionary.layer}.ln2.hook_in")
    if read_kind(name) is Read.MID and norm_in is not None and hooks[name] is norm_in:
        raise HookError(
            f"{dictionary} stands at {name!r}, which on this class of model is what the second norm reads: what is "
            "written there does not reach the residual stream. Use a HookedTransformer, or an SAE at hook_resid_pre or "
            "hook_resid_post"
        )


def _check_widths(model: HookedModel, dictionary: Dictionary) -> None:
    cfg = model.cfg
    width, what = cfg.d_model, "the model's residual stream has width"
    if read_kind(dictionary.hook_in) is Read.HEADS:
        width, what = cfg.n_heads * cfg.d_head, f"{dictionary.hook_in} has {cfg.n_heads} heads of {cfg.d_head}, width"
    if (dictionary.d_in, dictionary.d_out) != (width, width):
        raise DictionaryError(
            f"{dictionary} maps width {dictionary.d_in} to {dictionary.d_out}, {what} {width}: it belongs to another "
            "model"
        )

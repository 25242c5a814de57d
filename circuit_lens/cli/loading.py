"""From the names on a command line to a model and its dictionaries."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.dictionary_names import find_dictionaries, load_dictionaries, releases_for
from circuit_lens.cli.failing import CommandError, argument_errors
from circuit_lens.cli.quiet import upstream_quiet

if TYPE_CHECKING:
    import torch

    from circuit_lens.cli.dictionary_names import Found
    from circuit_lens.loading import Published
    from circuit_lens.protocols import HookedModel
    from circuit_lens.replacement_model import ReplacementModel

DEFAULT_MODEL = "capitals"
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Pair:
    """A loaded model with its dictionaries.

    Attributes:
        rm: the bound pair.
        name: what the user called the model.
        bundled: whether the model comes with the package.
    """

    rm: ReplacementModel
    name: str
    bundled: bool


def load_pair(
    model: str | None,
    dictionaries: Sequence[str],
    *,
    device: str | None = None,
    dtype: str = "float32",
    bridge: bool = False,
) -> Pair:
    """Load a model and its dictionaries.

    Args:
        model: a bundled name, or a name (for ``bridge`` also a folder) that TransformerLens loads; None: the default.
        dictionaries: see :func:`circuit_lens.cli.dictionary_names.load_dictionaries`; none means the bundled
            ones, or the model's default set of :func:`circuit_lens.loading.table`.
        device: where to compute; None means the first accelerator, and the CPU for bundled models.
        dtype: one of `DTYPES`.
        bridge: load a TransformerBridge instead of a HookedTransformer.

    Raises:
        CommandError: a name that nothing has, or something that cannot be fetched.
        DictionaryError, HookError: dictionaries that do not fit the model.
    """
    with upstream_quiet():
        from circuit_lens import zoo
        from circuit_lens.loading import pairs
        from circuit_lens.replacement_model import ReplacementModel

        name = DEFAULT_MODEL if model is None else model
        bundled = name in zoo.model_names()
        if model is None and not bundled:
            raise CommandError(f"the bundled model {name!r} is missing from this installation; install it anew")
        if bundled:
            _refuse_bridge(name, bridge)
        where, kind = choose_device(device, cpu=bundled), parse_dtype(dtype)
        if bundled:
            own = [one for one in dictionaries if one in zoo.dictionary_sets(name)]
            # A wrong name shows before the model is made.
            found = find_dictionaries([one for one in dictionaries if one not in own])
            return Pair(_bundled(name, own, found, where, kind), name, True)
        record = None if dictionaries else published(name)
        bridge = bridge or (record is not None and record.model_class == "TransformerBridge")
        if record is None:
            check_name(name, bridge=bridge)
        with argument_errors():
            found = find_dictionaries(dictionaries) if record is None else pairs.find_for(record, None)
        loaded = load_model(name, where, kind, bridge=bridge, record=record)
        modules = load_dictionaries(found, where, dtype, record)
        if not bridge:
            pairs.check_processing(modules, {} if record is None else record.processing)
        return Pair(ReplacementModel(loaded, modules), name, False)


def published(name: str) -> Published | None:
    """Return the default set of dictionaries of a model, by the table of published ones.

    Raises:
        CommandError: There is none; says which SAELens knows, or what is wrong with the model's name.
    """
    from circuit_lens.loading import LoadError
    from circuit_lens.loading.published import variant

    try:
        return variant(name, None)
    except LoadError:
        check_name(name, bridge=Path(name).expanduser().is_dir())
        raise CommandError(_no_dictionaries(name)) from None


def _refuse_bridge(name: str, bridge: bool) -> None:
    if bridge:
        raise CommandError(f"{name!r} is bundled as a HookedTransformer; leave out --bridge")


def load_bundled_model(name: str, device: torch.device, dtype: torch.dtype, *, bridge: bool) -> HookedModel:
    """Load a bundled model without dictionaries.

    Raises:
        CommandError: ``bridge``.
    """
    _refuse_bridge(name, bridge)
    with upstream_quiet():
        from circuit_lens import zoo

        model = zoo.load_model(name)
        model.to(device, print_details=False)
        model.to(dtype, print_details=False)
        return model


def _bundled(
    name: str, own: Sequence[str], found: Sequence[Found], device: torch.device, dtype: torch.dtype
) -> ReplacementModel:
    """Load a bundled model, with a set of its own dictionaries unless others are given."""
    from circuit_lens import zoo
    from circuit_lens.loading import pairs

    if not own and not found and name not in zoo.names():
        raise CommandError(
            f"--model {name}: it is bundled without dictionaries; add --dictionaries neurons, or name others. Bundled "
            f"with some: {', '.join(zoo.names())}"
        )
    with argument_errors():
        return pairs.load_bundled(name, own, found=found, device=device, dtype=dtype)


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, *, bridge: bool, record: Published | None = None
) -> Any:
    """Load a model by TransformerLens, its weights as they are unless its dictionaries were made for others.

    Raises:
        CommandError: an unknown name, a folder without ``bridge``, or weights that cannot be fetched.
    """
    from circuit_lens.loading import pairs

    kind = "TransformerBridge" if bridge else "HookedTransformer"
    processing = {} if record is None or bridge else record.processing
    source = name if record is not None else check_name(name, bridge=bridge)
    with argument_errors():
        return pairs.load_model(source, device, dtype, model_class=kind, processing=processing, record=record)


def check_name(name: str, *, bridge: bool) -> str:
    """Return where a model lies: a folder, or a repository of the hub.

    Raises:
        CommandError: a name that HookedTransformer does not know, or a folder, without ``bridge``.
    """
    from circuit_lens.loading import LoadError
    from circuit_lens.loading.pairs import official_name

    folder = Path(name).expanduser()
    if bridge:
        return str(folder) if folder.is_dir() else name
    if folder.is_dir():
        raise CommandError(f"--model {name}: a HookedTransformer loads by name only; add --bridge to load a folder")
    try:
        return official_name(name)
    except LoadError:
        raise CommandError(_unknown_model(name)) from None


def _unknown_model(name: str) -> str:
    """What is wrong with a model's name, and the nearest valid ones."""
    from transformer_lens.supported_models import MODEL_ALIASES

    from circuit_lens import zoo

    own = zoo.model_names()
    names = {*own, *MODEL_ALIASES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)}
    close = difflib.get_close_matches(name, sorted(names), n=4, cutoff=0.4)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return (
        f"--model {name}: there is no such model; it is neither bundled ({', '.join(own) or 'none'}) nor known to "
        f"HookedTransformer{hint}. For any other Hugging Face model, or a folder, add --bridge"
    )


def _no_dictionaries(name: str) -> str:
    """Say that dictionaries are needed, and which published ones are for this model."""
    found = releases_for(name)
    known = f"SAELens knows these transcoders for it: {', '.join(found)}" if found else (
        "SAELens lists no transcoders for it; give release:id, hf:owner/name, or a folder with dictionaries"
    )  # fmt: skip
    return f"--model {name}: not bundled and not in the table, so --dictionaries is needed. {known}"


def choose_device(device: str | None, *, cpu: bool = False) -> torch.device:
    """Return the device a name stands for; None means the first accelerator there is, or the CPU if ``cpu``.

    Raises:
        CommandError: a name of nothing, or of a device this computer lacks.
    """
    from circuit_lens.loading.pairs import pick_device

    with argument_errors():
        return pick_device(device, cpu=cpu, option="--device ")


def parse_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a name.

    Raises:
        CommandError: not one of `DTYPES`.
    """
    import torch

    if dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)

"""A model and its published dictionaries in one call."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.errors import DictionaryError, nearest
from circuit_lens.loading.failures import FetchError, LoadError, fetching, readable_size
from circuit_lens.loading.layouts import Settings
from circuit_lens.loading.published import Published, table, variant

if TYPE_CHECKING:
    import torch

    from circuit_lens.replacement_model import ReplacementModel

_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def load(
    name: str,
    dictionaries: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    progress: bool | None = None,
) -> ReplacementModel:
    """Return a model with its published dictionaries, as a ReplacementModel.

    Args:
        name: A bundled model (``"capitals"``, offline), or a model of :func:`circuit_lens.loading.table`, by
            TransformerLens' name; with ``dictionaries`` of your own, any model that TransformerLens loads.
        dictionaries: None: the model's default set. The name of one of its sets (``"clt-426k"``); or what
            :func:`circuit_lens.loading.load_dictionaries` takes, one or several.
        device: None: the first accelerator there is, or the CPU (bundled models: the CPU).
        dtype: Of the model and the dictionaries; None: the table's for the model, that of the files for dictionaries.
        lazy: Leave large matrices on disk where that is possible.
        progress: Progress bars of downloads; None: as huggingface_hub is set.

    Returns:
        The pair. Nothing is processed but what the set was trained with (the table says it).

    Raises:
        LoadError: An unknown name, with the nearest ones.
        FetchError: What cannot be fetched: repository, files, size, and how to provide it.
        HookError, DictionaryError: Dictionaries that are damaged or do not fit the model.
    """
    from circuit_lens import zoo
    from circuit_lens.loading.dictionaries import load_found
    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo import loading as bundled

    if name in zoo.model_names():
        place = pick_device(device, cpu=True)
        given = [] if dictionaries is None else [dictionaries] if isinstance(dictionaries, str | Path) else dictionaries
        own = [one for one in given if one in bundled.dictionary_sets(name)]
        others = [one for one in given if one not in own]
        found = find_for(None, others) if others else []
        return load_bundled(name, [str(one) for one in own], found=found, device=place, dtype=dtype)
    record = _record(name, dictionaries)
    try:
        found = find_for(record, dictionaries)
    except FetchError as error:
        size = f" The set is about {readable_size(record.download)}." if record and record.download else ""
        raise FetchError(f"{error}.{size}") from error
    where = pick_device(device)
    chosen = record.model_class if record else "HookedTransformer"
    processing = record.processing if record else {}
    model = load_model(name, where, dtype or _dtype(record), model_class=chosen, processing=processing, record=record)
    about, sums = (record.download, record.sha256) if record else (None, None)
    loaded = load_found(
        found, device=where, dtype=dtype, lazy=lazy, progress=progress, about=about, sha256=sums
    )  # fmt: skip
    check_processing(loaded, processing)
    return ReplacementModel(model, loaded)


def load_bundled(
    name: str,
    which: Sequence[str] = (),
    *,
    found: Sequence[Any] = (),
    device: Any,
    dtype: torch.dtype | None,
) -> ReplacementModel:
    """Return a bundled model with sets of its own dictionaries, or others, or both.

    Args:
        name: Of the model.
        which: Its bundled sets; with ``found`` empty, none means the default one.
        found: Records of other dictionaries, see :func:`circuit_lens.loading.names.find`.
        device: Where it goes.
        dtype: None: float32.

    Raises:
        FetchError, DictionaryError: As :func:`load`.
    """
    import torch

    from circuit_lens.loading.dictionaries import load_found
    from circuit_lens.zoo.loading import DEFAULT_SET, load_pair

    kind = torch.float32 if dtype is None else dtype
    sets = list(which) or ([] if found else [DEFAULT_SET])
    others = load_found(found, device=device, dtype=kind) if found else []
    return load_pair(name, sets, others=others, device=device, dtype=kind)


def _record(name: str, dictionaries: Any) -> Published | None:
    """Return the table's record, None where the user gives dictionaries of their own.

    Raises:
        LoadError: Neither; names the nearest.
    """
    try:
        records = table(name)
    except LoadError as error:
        if dictionaries is not None:
            return None
        raise LoadError(unknown_model(name, str(error))) from None
    if dictionaries is None:
        return records[0]
    if isinstance(dictionaries, str) and dictionaries in {one.variant for one in records}:
        return variant(name, dictionaries)
    return None


def unknown_model(name: str, reason: str) -> str:
    """Return what is wrong with the name of a model that has no record."""
    from circuit_lens import zoo

    bundled = zoo.model_names()
    names = [*bundled, *dict.fromkeys(one.model for one in table())]
    return (
        f"{name!r} is neither bundled ({', '.join(bundled) or 'none'}) nor in the table of published dictionaries"
        f"{nearest(name, names)}. circuit_lens.loading.table() lists it; for any other model give dictionaries= "
        f"({reason.split(';')[0]})"
    )


def find_for(record: Published | None, dictionaries: Any) -> list[Any]:
    """Return where the dictionaries are, nothing of them loaded."""
    from circuit_lens.loading.names import find

    if record is not None:
        return find(record.source, given=Settings(hook_in=record.reads, hook_out=record.writes))
    every = [dictionaries] if isinstance(dictionaries, str | Path) else list(dictionaries)
    return [one for name in every for one in find(name)]


def load_model(
    name: str,
    device: Any,
    dtype: torch.dtype,
    *,
    model_class: str = "HookedTransformer",
    processing: Mapping[str, bool] | None = None,
    record: Published | None = None,
) -> Any:
    """Return a model by TransformerLens in evaluation mode; the global random state stays.

    Args:
        name: TransformerLens' name; for a bridge any repository of the hub, or a folder.
        device, dtype: Where, and in what.
        model_class: ``"HookedTransformer"`` or ``"TransformerBridge"``.
        processing: Of weights; nothing by default.
        record: Of the table, for the message where it cannot be fetched.

    Raises:
        LoadError: HookedTransformer knows no such name.
        FetchError: Weights that cannot be fetched.
    """
    source = record.repository if record else name
    what = f"the model {name}"
    if record is not None:
        dictionaries = "" if record.download is None else f"; its dictionaries: about {readable_size(record.download)}"
        what += f" (about {readable_size(record.model_bytes)}{dictionaries})"
    if model_class == "HookedTransformer":
        source = official_name(name if record is None else record.repository)
    with fetching(what, source), _undisturbed():
        if model_class == "HookedTransformer":
            from transformer_lens import HookedTransformer

            return HookedTransformer.from_pretrained_no_processing(
                source, device=str(device), dtype=dtype, **(processing or {})
            ).eval()
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(source, device=str(device), dtype=dtype).eval()


def official_name(name: str) -> str:
    """Return the repository of a name that HookedTransformer knows.

    Raises:
        LoadError: It does not.
    """
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

        names = {*OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)}
        raise LoadError(f"HookedTransformer knows no model {name!r}{nearest(name, sorted(names))}") from None


def check_processing(dictionaries: Sequence[Any], processing: Mapping[str, bool]) -> None:
    """Raise if a dictionary says that it was trained on weights processed in another way than the model's.

    Raises:
        DictionaryError: Names the dictionary, what it says and what was done.
    """
    for one in dictionaries:
        metadata = getattr(getattr(one, "cfg", None), "metadata", None)
        said = dict(getattr(metadata, "model_from_pretrained_kwargs", None) or {})
        for name in _PROCESSING:
            if name in said and bool(said[name]) != bool(processing.get(name, False)):
                raise DictionaryError(
                    f"the dictionary at {getattr(metadata, 'hook_name', None)} was trained with {name}={said[name]}, "
                    f"the model was loaded with {name}={processing.get(name, False)}: its features would be wrong. "
                    f"Load the model by HookedTransformer.from_pretrained_no_processing(..., {name}={said[name]})"
                )


def pick_device(device: str | torch.device | None, *, cpu: bool = False, option: str = "device ") -> torch.device:
    """Return the device a name stands for; None means the first accelerator there is, or the CPU if ``cpu``.

    Raises:
        LoadError: A name of nothing, or of a device this computer lacks.
    """
    import torch

    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    if device is None:
        return torch.device("cpu" if cpu or not accelerators else accelerators[0])
    valid = ", ".join(["cpu", *accelerators])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise LoadError(f"{option}{device}: no such device; here are {valid}") from None
    if chosen.type != "cpu" and not any(one in (str(chosen), f"{chosen}:0") for one in accelerators):
        raise LoadError(f"{option}{device}: this computer has none; here are {valid}")
    return chosen


def _dtype(record: Published | None) -> torch.dtype:
    import torch

    return getattr(torch, record.dtype) if record else torch.float32


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the global random state, and upstream's notices of deprecation out of sight."""
    import torch

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"HookedTransformer(\.\w+)? is deprecated")
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        yield


__all__ = ["FetchError", "LoadError", "check_processing", "find_for", "load", "load_bundled", "load_model"]

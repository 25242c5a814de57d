"""From the names on a command line to a model and its dictionaries."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.failing import CommandError, fetching
from circuit_lens.cli.quiet import upstream_quiet

if TYPE_CHECKING:
    import torch

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
        dictionaries: see :func:`circuit_lens.cli.dictionary_names.load_dictionaries`; none means the bundled ones.
        device: where to compute; None means the first accelerator, and the CPU for bundled models.
        dtype: one of `DTYPES`.
        bridge: load a TransformerBridge instead of a HookedTransformer.

    Raises:
        CommandError: a name that nothing has, or something that cannot be fetched.
        DictionaryError, HookError: dictionaries that do not fit the model.
    """
    with upstream_quiet():
        from circuit_lens import zoo
        from circuit_lens.replacement_model import ReplacementModel

        name = DEFAULT_MODEL if model is None else model
        bundled = name in zoo.names()
        if model is None and not bundled:
            raise CommandError(f"the bundled model {name!r} is missing from this installation; install it anew")
        if bundled and bridge:
            raise CommandError(f"{name!r} is bundled as a HookedTransformer; leave out --bridge")
        where, kind = choose_device(device, cpu=bundled), parse_dtype(dtype)
        if bundled:
            return Pair(_bundled(name, dictionaries, where, kind), name, True)
        check_name(name, bridge=bridge)
        if not dictionaries:
            raise CommandError(_no_dictionaries(name))
        from circuit_lens.cli.dictionary_names import find_dictionaries, load_dictionaries

        found = find_dictionaries(dictionaries)  # a wrong name shows before the model is fetched
        loaded = load_model(name, where, kind, bridge=bridge)
        return Pair(ReplacementModel(loaded, load_dictionaries(found, where, dtype)), name, False)


def _bundled(name: str, dictionaries: Sequence[str], device: torch.device, dtype: torch.dtype) -> ReplacementModel:
    """Load a bundled model, with its own dictionaries unless others are given."""
    import torch

    from circuit_lens import zoo
    from circuit_lens.cli.dictionary_names import find_dictionaries, load_dictionaries
    from circuit_lens.replacement_model import ReplacementModel

    if not dictionaries:
        rm = zoo.load(name)
        if device.type == "cpu" and dtype is torch.float32:
            return rm
        modules: list[Any] = [getattr(dictionary, "module") for dictionary in rm.dictionaries]  # noqa: B009
        model, label = rm.model, rm.label
        modules = [module.to(device=device, dtype=dtype) for module in modules]
    else:
        found = find_dictionaries(dictionaries)
        model, label = zoo.load_model(name), None
        modules = load_dictionaries(found, device, str(dtype).removeprefix("torch."))
    model.to(device, print_details=False)
    model.to(dtype, print_details=False)
    return ReplacementModel(model, modules) if label is None else ReplacementModel(model, modules, label=label)


def load_model(name: str, device: torch.device, dtype: torch.dtype, *, bridge: bool) -> Any:
    """Load a model by TransformerLens, its weights as they are.

    Raises:
        CommandError: an unknown name, a folder without ``bridge``, or weights that cannot be fetched.
    """
    source = check_name(name, bridge=bridge)
    with fetching(f"the model {name}", source):
        if not bridge:
            from transformer_lens import HookedTransformer

            return HookedTransformer.from_pretrained_no_processing(name, device=str(device), dtype=dtype).eval()
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(source, device=str(device), dtype=dtype).eval()


def check_name(name: str, *, bridge: bool) -> str:
    """Return where a model lies: a folder, or a repository of the hub.

    Raises:
        CommandError: a name that HookedTransformer does not know, or a folder, without ``bridge``.
    """
    folder = Path(name).expanduser()
    if bridge:
        return str(folder) if folder.is_dir() else name
    if folder.is_dir():
        raise CommandError(f"--model {name}: a HookedTransformer loads by name only; add --bridge to load a folder")
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        raise CommandError(_unknown_model(name)) from None


def _unknown_model(name: str) -> str:
    """What is wrong with a model's name, and the nearest valid ones."""
    from transformer_lens.supported_models import MODEL_ALIASES

    from circuit_lens import zoo

    names = {*zoo.names(), *MODEL_ALIASES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)}
    close = difflib.get_close_matches(name, sorted(names), n=4, cutoff=0.4)
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return (
        f"--model {name}: there is no such model; it is neither bundled ({', '.join(zoo.names()) or 'none'}) nor known "
        f"to HookedTransformer{hint}. For any other Hugging Face model, or a folder, add --bridge"
    )


def _no_dictionaries(name: str) -> str:
    """Say that dictionaries are needed, and which published ones are for this model."""
    from circuit_lens.cli.dictionary_names import releases_for

    found = releases_for(name)
    known = f"SAELens knows these transcoders for it: {', '.join(found)}" if found else (
        "SAELens lists no transcoders for it; give release:id, or a folder in SAELens' format"
    )  # fmt: skip
    return f"--model {name}: not bundled, so --dictionaries is needed. {known}"


def choose_device(device: str | None, *, cpu: bool = False) -> torch.device:
    """Return the device a name stands for; None means the first accelerator there is, or the CPU if ``cpu``.

    Raises:
        CommandError: a name of nothing, or of a device this computer lacks.
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
        raise CommandError(f"--device {device}: no such device; here are {valid}") from None
    if chosen.type != "cpu" and not any(name == str(chosen) or name.split(":")[0] == device for name in accelerators):
        raise CommandError(f"--device {device}: this computer has none; here are {valid}")
    return chosen


def parse_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a name.

    Raises:
        CommandError: not one of `DTYPES`.
    """
    import torch

    if dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)

"""``circuit-lens train``: dictionaries for a model, from text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from circuit_lens.cli import options
from circuit_lens.cli import train_options as own
from circuit_lens.cli.failing import INTERRUPTED, CommandError, line_width, show_error
from circuit_lens.cli.outputs import slug
from circuit_lens.cli.progress import show_bar, working
from circuit_lens.cli.train_text import activations, read_rows

if TYPE_CHECKING:
    from circuit_lens.training.data import ActivationStore
    from circuit_lens.training.data_figures import DictionaryFit
    from circuit_lens.training.data_text import TokenRows

HELD_OUT, PLAN, ACTIVATIONS = 0.1, "training.json", ".activations"
MLP_IN, MLP_OUT, RESIDUAL = (
    "blocks.{layer}.ln2.hook_normalized",
    "blocks.{layer}.hook_mlp_out",
    "blocks.{layer}.hook_resid_post",
)


@dataclass(frozen=True)
class Plan:
    """What determines the result: kept in the folder, so that a resumed training is of the same.

    Attributes:
        kind: "sae", "transcoder" or "clt".
        model, text: What they are called.
        hooks: (read, written) of every dictionary, or of every layer of a clt.
        settings: Numbers and names that determine the training.
    """

    kind: str
    model: str
    text: str
    hooks: tuple[tuple[str, str], ...]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as it reads from a file."""
        return json.loads(json.dumps(asdict(self)))


# Hooks at which SAEs are compared with transcoders, but are no nodes of graphs.
COMPARED = ("ln2.hook_normalized", "mlp.hook_in")


def train(
    kind: own.KIND,
    model: options.MODEL = None,
    bridge: options.BRIDGE = False,
    device: options.DEVICE = None,
    dtype: options.DTYPE = "float32",
    text: own.TEXT = None,
    dataset: own.DATASET = None,
    tokens: own.TOKENS = None,
    context: own.CONTEXT = None,
    hook: own.HOOK = None,
    hook_in: own.HOOK_IN = MLP_IN,
    hook_out: own.HOOK_OUT = MLP_OUT,
    layers: own.LAYERS = None,
    features: own.FEATURES = 640,
    k: own.K = 11.0,
    architecture: own.ARCHITECTURE = own.Architecture.batchtopk,
    l1: own.L1 = 5.0,
    skip: own.SKIP = False,
    steps: own.STEPS = 700,
    batch: own.BATCH = 1024,
    lr: own.RATE = 3e-3,
    seed: own.SEED = 0,
    memory: own.MEMORY = 2.0,
    resume: own.RESUME = False,
    out: own.OUT = None,
    log: own.LOG = True,
    wandb: own.WANDB = None,
    quiet: options.QUIET = False,
) -> None:
    """Train SAEs, transcoders or a cross-layer transcoder for a model, and measure them on text held out.

    Without --model and --text the bundled model and its corpus are used, offline.

    Exit status: 0, or 2 for something that cannot be used.
    """
    _check(kind, hook, skip, architecture, text, dataset, memory)
    folder = _folder(out, model, kind)
    with working("Loading torch and the model", quiet):
        loaded, name, bundled = _model(model, device, dtype, bridge)
        hooks = _hooks(kind, loaded, hook, hook_in, hook_out, layers)
    common = {"d_sae": features, "k": k, "steps": steps, "batch": batch, "lr": lr, "bfloat16": True}
    settings = {"sae": {"architecture": architecture.value, "l1": l1}, "transcoder": {"skip": skip}, "clt": {}}[
        kind.value
    ]
    numbers = {**common, **settings, "seed": seed, "tokens": tokens, "context": context, "dtype": dtype}
    source = text or dataset or (f"the corpus of {name}" if bundled else "")
    if not source:
        raise CommandError(f"--model {name} has no corpus here: give --text FILE or --dataset NAME")
    plan = Plan(kind.value, name, source, hooks, numbers)
    _check_settings(plan)
    _check_folder(folder, plan, resume)
    with working("Reading the text", quiet):
        wanted = tokens or round(steps * batch / (1 - HELD_OUT)) + 1
        rows, held = read_rows(loaded, text, dataset, wanted, context, seed).split(HELD_OUT)
    if rows.n_tokens < batch:
        raise CommandError(f"--batch {batch}: the text to train on has {rows.n_tokens} tokens; give more text")
    _begin(folder, plan)
    with _kept_on_interrupt(folder):
        made, fits = _train(plan, folder, loaded, rows, held, memory, log, wandb, resume, quiet)
    shutil.rmtree(folder / ACTIVATIONS, ignore_errors=True)
    if not quiet:
        from circuit_lens.cli.report import new_console
        from circuit_lens.cli.train_report import print_training

        console = new_console(line_width(Console()))
        print_training(console, plan, rows.n_tokens, made, fits, use=_use(plan, folder, model, bridge))


# ------------------------------------------------------------------------------------------------------- what was given


def _check(
    kind: own.Kind, hook: str | None, skip: bool, architecture: own.Architecture, text: str | None,
    dataset: str | None, memory: float,
) -> None:  # fmt: skip
    """Raise CommandError for options that do not go together."""
    if hook is not None and kind is not own.Kind.sae:
        raise CommandError(f"--hook is for an SAE; a {kind.value} has --hook-in and --hook-out")
    if skip and kind is not own.Kind.transcoder:
        raise CommandError("--skip is for transcoders")
    if architecture is not own.Architecture.batchtopk and kind is not own.Kind.sae:
        raise CommandError(f"--architecture is for an SAE; a {kind.value} is trained with BatchTopK")
    if text is not None and dataset is not None:
        raise CommandError("give --text or --dataset, not both")
    if not memory > 0:
        raise CommandError(f"--memory {memory:g}: give a number of gigabytes above 0")


def _folder(out: str | None, model: str | None, kind: own.Kind) -> Path:
    if out is not None and not out.strip():
        raise CommandError("--out is empty; give a folder")
    folder = Path(f"{slug(model or 'capitals')}-{kind.value}" if out is None else out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder}: that is a file; give a folder")
    return folder


def _model(name: str | None, device: str | None, dtype: str, bridge: bool) -> tuple[Any, str, bool]:
    """Return (the model, its name, whether it is bundled)."""
    from circuit_lens import zoo
    from circuit_lens.cli.loading import DEFAULT_MODEL, check_name, choose_device, load_model, parse_dtype
    from circuit_lens.cli.quiet import upstream_quiet

    chosen = DEFAULT_MODEL if name is None else name
    with upstream_quiet():
        if chosen not in zoo.names():
            check_name(chosen, bridge=bridge)
            return load_model(chosen, choose_device(device), parse_dtype(dtype), bridge=bridge), chosen, False
        if bridge:
            raise CommandError(f"{chosen!r} is bundled as a HookedTransformer; leave out --bridge")
        loaded: Any = zoo.load_model(chosen)
        loaded.to(choose_device(device, cpu=True), print_details=False)
        loaded.to(parse_dtype(dtype), print_details=False)
        return loaded, chosen, True


def _layers(text: str | None, n_layers: int, default: range) -> range:
    if text is None:
        return default
    match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
    first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not first <= last < n_layers:
        raise CommandError(f"--layers {text!r}: write 0-{n_layers - 1}, or one of these layers")
    return range(first, last + 1)


def _hooks(
    kind: own.Kind, model: Any, hook: str | None, hook_in: str, hook_out: str, layers: str | None
) -> tuple[tuple[str, str], ...]:
    """Return what is read and written, checked against the model."""
    from circuit_lens.hooks import hook_points

    n_layers = int(model.cfg.n_layers)
    if kind is own.Kind.clt and layers is not None:
        raise CommandError("--layers: a cross-layer transcoder has all layers")
    if kind is own.Kind.sae:
        names = hook or RESIDUAL
        if "{layer}" not in names and layers is not None:
            raise CommandError(f"--layers has no use with --hook {names}, which has no {{layer}}")
        chosen = _layers(layers, n_layers, range(n_layers // 2, n_layers // 2 + 1))
        pairs = [(one, one) for one in dict.fromkeys(_named(names, layer) for layer in chosen)]
    else:
        chosen = _layers(layers, n_layers, range(n_layers))
        for option, value in (("--hook-in", hook_in), ("--hook-out", hook_out)):
            if "{layer}" not in value:
                raise CommandError(f"{option} {value}: there is no {{layer}} in it")
        pairs = [(_named(hook_in, layer), _named(hook_out, layer)) for layer in chosen]
    hook_points(model, [name for pair in pairs for name in pair])
    for read, written in pairs:
        _check_usable(kind, read, written)
    return tuple(pairs)


def _check_usable(kind: own.Kind, read: str, written: str) -> None:
    """Raise CommandError for hooks at which the result could never be attributed."""
    from circuit_lens.dictionaries.points import SAE_HOOKS, check_transcoder_hooks, parse_hook
    from circuit_lens.errors import DictionaryError

    try:
        if kind is not own.Kind.sae:
            check_transcoder_hooks(read, [written])
        elif parse_hook(read).suffix not in (*SAE_HOOKS, *COMPARED):
            raise DictionaryError(
                f"an SAE at {read!r} cannot be attributed; it may stand at {', '.join(SAE_HOOKS)} of a block, or, to "
                f"be compared only, at {', '.join(COMPARED)}"
            )
    except DictionaryError as error:
        raise CommandError(f"--hook{'' if kind is own.Kind.sae else '-in, --hook-out'}: {error}") from None


def _named(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


def _check_folder(folder: Path, plan: Plan, resume: bool) -> None:
    """Raise CommandError for a folder that holds something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise CommandError(f"--out {folder} is not empty; add --resume to go on there, or give another folder")
    try:
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        other = {**found, **found["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise CommandError(f"--resume: {folder} holds no training of this command; give another folder") from None
    data = plan.as_json()
    flat = {**data, **data["settings"]}
    different = [name for name in flat if name != "settings" and flat[name] != other.get(name)]
    if different:
        was = ", ".join(f"{name} {other.get(name)!r}, not {flat[name]!r}" for name in different)
        raise CommandError(f"--resume: {folder} is of a training with {was}; give the same options")


def _begin(folder: Path, plan: Plan) -> None:
    """Write the plan into the folder.

    Raises:
        GraphFileError: The folder cannot be written.
    """
    from circuit_lens.errors import GraphFileError
    from circuit_lens.graph.files import atomic_path

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphFileError(f"Could not make the folder {folder}: {error}; give another one") from error
    with atomic_path(folder / PLAN) as path:
        path.write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- training


@contextmanager
def _kept_on_interrupt(folder: Path) -> Iterator[None]:
    """Say after an interrupt what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        show_error(f"Interrupted. What is finished lies in {folder}; add --resume to go on there.", title="Stopped")
        raise typer.Exit(INTERRUPTED) from None


def _train(
    plan: Plan, folder: Path, model: Any, rows: TokenRows, held: TokenRows, memory: float, log: bool,
    wandb: str | None, resume: bool, quiet: bool,
) -> tuple[list[Path], list[DictionaryFit]]:  # fmt: skip
    """Train what is missing and measure everything; return where it lies and its figures."""
    from circuit_lens.running import model_device

    names, where = list(dict.fromkeys(name for pair in plan.hooks for name in pair)), model_device(model)
    made = [folder / written for _, written in plan.hooks]
    missing = [i for i, place in enumerate(made) if not (place / "cfg.json").is_file()]
    tests = activations(model, held, names, folder / ACTIVATIONS / "held-out", memory / 4, quiet)
    store = None
    if missing or plan.kind == "clt":
        store = activations(model, rows, names, folder / ACTIVATIONS / "training", memory, quiet)
    if plan.kind == "clt":
        assert store is not None
        return _train_clt(plan, folder, store, tests, where, log, wandb, resume, quiet)
    if resume and len(missing) < len(made) and not quiet:
        show_error(f"{len(made) - len(missing)} of {len(made)} dictionaries are finished and kept.", title="Resumed")
    if resume and missing and not quiet:
        show_error("What was not finished starts anew: SAEs and transcoders have no checkpoints.", title="Resumed")
    from sae_lens import SAE

    from circuit_lens.training.data_figures import measure_fit

    fits = []
    for i, ((read, written), place) in enumerate(zip(plan.hooks, made, strict=True)):
        if i in missing and store is not None:
            _train_one(plan, i, store, place, where, log, wandb, quiet)
        pairs = ((block[read], block[written]) for block in tests.in_order())
        fits.append(measure_fit(SAE.load_from_disk(str(place), device="cpu"), pairs))
    return made, fits


def _train_one(
    plan: Plan, i: int, store: ActivationStore, place: Path, where: Any, log: bool, wandb: str | None, quiet: bool
) -> None:
    from circuit_lens.training.sae import train_sae
    from circuit_lens.training.transcoder import train_transcoder

    read, written = plan.hooks[i]
    common: dict[str, Any] = {
        "settings": _settings(plan), "seed": plan.settings["seed"] + i, "metadata": {"model_name": plan.model},
        "folder": place, "progress": show_bar(quiet), "log": place.with_name(f"{place.name}.jsonl") if log else None,
        "wandb": wandb, "device": where,
    }  # fmt: skip
    if plan.kind == "sae":
        train_sae(store, hook=read, **common)
    else:
        train_transcoder(store, hook_in=read, hook_out=written, skip=plan.settings["skip"], **common)


def _settings(plan: Plan) -> Any:
    """Return the settings as the library takes them."""
    from circuit_lens.training.sae import SaeSettings
    from circuit_lens.training.transcoder import TranscoderSettings

    common = {name: plan.settings[name] for name in ("d_sae", "k", "steps", "batch", "lr", "bfloat16")}
    if plan.kind == "sae":
        return SaeSettings(**common, architecture=plan.settings["architecture"], l1=plan.settings["l1"])
    if plan.kind == "transcoder":
        return TranscoderSettings(**common, auxiliary=1 / 4, dead_window=20, scale_inputs=True)
    from circuit_lens.training.cross_layer import CrossLayerSettings

    return CrossLayerSettings(**common)


def _check_settings(plan: Plan) -> None:
    from circuit_lens.training.trainer import TrainerSettings

    common = {name: plan.settings[name] for name in ("d_sae", "k", "steps", "batch", "lr")}
    TrainerSettings(**common).check()
    settings = _settings(plan)
    if plan.kind != "clt":
        settings.check()


def _train_clt(
    plan: Plan, folder: Path, store: ActivationStore, tests: ActivationStore, where: Any, log: bool, wandb: str | None,
    resume: bool, quiet: bool,
) -> tuple[list[Path], list[DictionaryFit]]:  # fmt: skip
    from circuit_lens.training.cross_layer import DICTIONARY_FOLDER, train_cross_layer
    from circuit_lens.training.data import LayersSource
    from circuit_lens.training.data_figures import measure_cross_layer

    hooks_in, hooks_out = (tuple(names) for names in zip(*plan.hooks, strict=True))
    try:
        transcoder = train_cross_layer(
            LayersSource(store, hooks_in, hooks_out, where),
            hook_in=hooks_in,
            hook_out=hooks_out,
            settings=_settings(plan),
            seed=plan.settings["seed"],
            folder=folder,
            resume=resume,
            log=folder / "clt.jsonl" if log else None,
            progress=show_bar(quiet) is None,
            wandb=wandb,
            metadata={"model_name": plan.model},
        )
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    pairs = LayersSource(tests, hooks_in, hooks_out).in_order()
    return [folder / DICTIONARY_FOLDER], measure_cross_layer(transcoder.to(device="cpu").dictionaries, pairs)


def _use(plan: Plan, folder: Path, model: str | None, bridge: bool) -> str:
    """Return the command that uses the result."""
    given = ("" if model is None else f" --model {model}") + (" --bridge" if bridge else "")
    place = folder / "dictionary" if plan.kind == "clt" else folder
    return f"circuit-lens trace PROMPT{given} --dictionaries {place}"

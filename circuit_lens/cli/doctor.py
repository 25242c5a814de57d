"""``circuit-lens doctor``: what is installed, whether it works, and whether a model and its dictionaries fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from circuit_lens.cli import options
from circuit_lens.cli.failing import BROKEN, CommandError, line_width
from circuit_lens.cli.outputs import output_file, write_files, write_json
from circuit_lens.errors import CircuitLensError

if TYPE_CHECKING:
    from circuit_lens.cli.loading import Pair

JSON_FILE = Annotated[str | None, typer.Option(
    "--json", metavar="FILE", help="All figures of the pair as JSON.", show_default=False)]  # fmt: skip
PACKAGES = ("circuit-lens", "torch", "transformer-lens", "sae-lens", "transformers", "safetensors", "einops",
            "jaxtyping", "matplotlib", "typer", "rich")  # fmt: skip
_HEAVY = ("torch", "transformer_lens", "sae_lens", "matplotlib", "transformers")
_QUESTION, _ANSWER = "Fact: the capital of the state containing Dallas is", "Austin"


class Findings:
    """Prints what is found, and remembers whether something is broken."""

    def __init__(self, console: Console) -> None:
        self.console, self.broken = console, False

    def title(self, text: str) -> None:
        """Begin a part."""
        self.console.print(Text(f"\n{text}", style="bold"))

    def say(self, what: str, found: str, *, ok: bool | None = None) -> None:
        """Print one finding: good, broken, or (None) neither."""
        self.broken |= ok is False
        mark = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}[ok]
        from circuit_lens.cli.report import new_grid

        grid = new_grid()
        grid.add_column(width=1)
        grid.add_column(width=18, overflow="fold")
        grid.add_column(overflow="fold")
        grid.add_row(Text(*mark), Text(what), Text(found, style="red" if ok is False else ""))
        self.console.print(grid)


def doctor(
    model: options.MODEL = None,
    dictionaries: options.DICTIONARIES = None,
    bridge: options.BRIDGE = False,
    device: options.DEVICE = None,
    dtype: options.DTYPE = "float32",
    text: options.TEXT = None,
    prompt: options.CHECK_PROMPT = None,
    figures: JSON_FILE = None,
) -> None:
    """Say what is installed and whether it works; with --model or --dictionaries, whether the two fit.

    Exit status: 0 if all is well, 1 if something is broken, 2 for an argument that cannot be used.
    """
    from circuit_lens.cli.report import new_console

    findings = Findings(new_console(line_width(Console())))
    if model is None and not dictionaries:
        if text is not None or prompt is not None or figures is not None:
            raise CommandError("--text, --prompt and --json are for a pair; give --model and --dictionaries too")
        check_versions(findings)
        check_machine(findings)
        check_start(findings)
        check_bundled(findings)
    else:
        words = _words(text, prompt)
        file = None if figures is None else output_file("--json", figures, (".json",))
        pair = _load(findings, lambda: _pair(model, dictionaries or (), device, dtype, bridge))
        measured = None if pair is None else check_pair(findings, pair, words)
        if file is not None and measured is not None:
            write_files({file: write_json(measured)})
    findings.console.print(Text("\nSomething is broken." if findings.broken else "\nAll is well.", style="bold"))
    if findings.broken:
        raise typer.Exit(BROKEN)


def check_versions(findings: Findings) -> None:
    """Print the version of everything that matters, and check it against what we ask for."""
    wanted = _requirements()
    findings.title("Versions")
    findings.say("python", f"{platform.python_version()} on {platform.platform()}", ok=sys.version_info >= (3, 11))
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.say(name, "is not installed: pip install circuit-lens", ok=False)
            continue
        specifier = wanted.get(name)
        fits = specifier is None or specifier.contains(version, prereleases=True)
        findings.say(name, version if fits else f"{version}, but {name}{specifier} is needed", ok=fits)


def _requirements() -> dict[str, Any]:
    """The versions that our own metadata ask for."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("circuit-lens") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def check_machine(findings: Findings) -> None:
    """Print the devices and the memory."""
    import torch

    findings.title("Machine")
    findings.say("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        findings.say(f"cuda:{i}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB", ok=True)
    if torch.backends.mps.is_available():
        findings.say("mps", "available", ok=True)
    total, free = _memory()
    if total:
        findings.say("memory", f"{total:.1f} GB" + (f", {free:.1f} GB free" if free else ""))


def _memory() -> tuple[float, float]:
    """Memory of the computer and what is free of it, in GB; 0 where the system does not say."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return 0.0, 0.0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = next((float(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable")), 0.0)
    return total, free


def check_start(findings: Findings) -> None:
    """Measure what a start costs, in processes of their own."""
    findings.title("Start")
    listing = f"import sys; print(*sorted(set({_HEAVY!r}) & set(sys.modules)))"
    for what, code in (
        ("import", "import circuit_lens"),
        ("command line", "import circuit_lens.cli as c; c.build_app()"),
    ):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", f"{code}; {listing}"], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            findings.say(what, f"fails: {(done.stderr.splitlines() or ['no message'])[-1]}", ok=False)
            continue
        heavy = done.stdout.split()
        findings.say(what, f"{seconds:.2f} s" + (f", and loads {', '.join(heavy)}" if heavy else ""), ok=not heavy)


def check_bundled(findings: Findings) -> None:
    """Load every bundled model with its dictionaries and ask it about Dallas."""
    from circuit_lens import zoo

    findings.title(f'Bundled models, asked "{_QUESTION} ..."')
    names = zoo.names()
    if not names:
        findings.say("capitals", "is missing: install circuit-lens anew", ok=False)
    for name in names:
        start = time.perf_counter()
        pair = _load(findings, lambda name=name: _pair(name, (), None, "float32", False), what=name)
        if pair is None:
            continue
        seconds = time.perf_counter() - start
        try:
            graph = pair.rm.attribute(_QUESTION, max_features=0, progress=False)
        except CircuitLensError as error:
            findings.say(name, str(error), ok=False)
            continue
        answer, probability = graph.top_logits.strings[0].strip(), float(graph.top_logits.probs[0])
        found = (
            f"{len(pair.rm.dictionaries)} dictionaries, loaded in {seconds:.1f} s; says {answer} ({probability:.2f})"
        )
        findings.say(name, found, ok=answer == _ANSWER)


def _pair(model: str | None, dictionaries: Any, device: str | None, dtype: str, bridge: bool) -> Pair:
    from circuit_lens.cli.loading import load_pair

    return load_pair(model, dictionaries, device=device, dtype=dtype, bridge=bridge)


def _load(findings: Findings, load: Any, *, what: str = "pair") -> Pair | None:
    """Load; a pair that does not fit, or a damaged file, is a finding, and a wrong argument an error."""
    try:
        return load()
    except CommandError:
        raise
    except (CircuitLensError, OSError) as error:
        findings.say(what, str(error), ok=False)
        return None


def _words(text: str | None, prompt: str | None) -> str | None:
    """Return the text to check on; None where none was given."""
    if text is not None and prompt is not None:
        raise CommandError("--text and --prompt are two ways to say the same; give one")
    if text is None:
        return prompt
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--text {text}: {error}; give a text file in UTF-8") from None


def check_pair(findings: Findings, pair: Pair, words: str | None) -> dict[str, Any]:
    """Check hooks, widths, reconstruction and the frozen model of a pair; return what was measured, for JSON."""
    from circuit_lens.cli.pair_check import check_local, chunks, default_text
    from circuit_lens.cli.report import n_dictionaries
    from circuit_lens.errors import TokensError

    rm, n_layers = pair.rm, pair.rm.model.cfg.n_layers
    findings.title(f"{pair.name} with {n_dictionaries(len(rm.dictionaries))}")
    findings.say("hooks and widths", f"fit: {n_layers} layers of width {rm.model.cfg.d_model}", ok=True)
    covered = {layer for dictionary in rm.dictionaries for layer in dictionary.out_layers}
    if missing := [layer for layer in range(n_layers) if layer not in covered]:
        findings.say("without dictionary", f"layers {', '.join(map(str, missing))}: their MLP is an error node")
    prompts = chunks(rm, words if words is not None else default_text(pair.bundled))
    measured: dict[str, Any] = {"pair": pair.name}
    try:
        measured["evaluation"] = _evaluate(findings, rm, prompts)
    except TokensError:
        raise
    except CircuitLensError as error:
        findings.say("reconstruction", str(error), ok=False)
        return measured
    figures, problem = check_local(rm, prompts[0])
    measured["frozen_model"] = {"figures": figures, "problem": problem}
    if problem and not figures:
        findings.say("frozen model", problem, ok=False)
        return measured
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in figures.items())
    findings.say("frozen model", shown + (f"; {problem}" if problem else ""), ok=True)
    return measured


def _evaluate(findings: Findings, rm: Any, prompts: Any) -> dict[str, Any]:
    """Print how well dictionaries stand in for what they replace, and return it."""
    from circuit_lens.cli.pair_check import is_broken
    from circuit_lens.cli.report import print_layers
    from circuit_lens.evaluation.evaluate import evaluate

    found = evaluate(rm.binding, prompts, alone=False, baselines=False, progress=False)
    print_layers(findings.console, found.outputs)
    if broken := [output.hook for output in found.outputs if is_broken(output)]:
        findings.say("reconstruction", f"fails at {', '.join(broken)}", ok=False)
    else:
        findings.say("reconstruction", f"measured on {found.n_tokens} tokens", ok=True)
    said = f"{found.loss} nats; {found.replaced.loss} with dictionaries in place of all outputs"
    if found.zero.added.value > 0:
        said += f", which recovers {found.replaced.recovered_zero.value:.1%} of what zeros there cost"
    findings.say("loss", said)
    return found.to_json()

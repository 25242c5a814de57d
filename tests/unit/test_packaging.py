"""What a newcomer's first commands rely on: pins that resolve, one version, and a start that loads little."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import circuit_lens

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformer_lens", "sae_lens", "matplotlib", "transformers", "datasets", "pandas")


def constraints() -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("file", ["constraints.txt", "pyproject.toml", "benchmarks/requirements-parity.txt"])
def test_no_version_has_a_local_tag(file):
    """A tag such as 2.13.0 plus cpu exists on one index only."""
    offenders = [line for line in (ROOT / file).read_text().splitlines() if re.search(r"\d\+\w|[=<>~]=?\s*\S*\+", line)]
    assert offenders == []
    assert "+" not in (ROOT / "constraints.txt").read_text()


def test_every_requirement_is_pinned_within_its_range():
    pins = constraints()
    for requirement in requirements():
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_pins_of_torch_agree():
    assert f"torch=={constraints()['torch']}" in (ROOT / "benchmarks/requirements-parity.txt").read_text().split()


def test_versions_agree():
    assert importlib.metadata.version("circuit-lens") == circuit_lens.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{circuit_lens.__version__}]" in changelog


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after the code."""
    script = f"{code}\nimport sys; sys.stdout.write('\\n@' + ' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.rpartition("@")[2].split())


HELP = """
import sys; sys.argv = ["circuit-lens", "--help"]
from circuit_lens.cli import main
try: main()
except SystemExit as stop: assert not stop.code
"""


@pytest.mark.parametrize("code", ["import circuit_lens; dir(circuit_lens); circuit_lens.CircuitLensError", HELP])
def test_a_start_is_light(code):
    loaded = loaded_after(code)
    assert "circuit_lens" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_light_start_test_sees_a_heavy_import():
    """Negative control."""
    assert "torch" in loaded_after("import torch")


def test_every_public_name_is_declared_and_found():
    missing = [name for name in circuit_lens.__all__ if not hasattr(circuit_lens, name)]
    assert missing == []
    assert set(circuit_lens.__all__) <= set(dir(circuit_lens))
    declared = set(re.findall(r"^    from \S+ import \w+ as (\w+)$", Path(circuit_lens.__file__).read_text(), re.M))
    assert declared | {"__version__"} == set(circuit_lens.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        circuit_lens.nothing  # noqa: B018


def test_the_wheel_carries_types_and_assets():
    """The configuration that puts them in; what the bundled models are is the zoo's own test."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {"circuit_lens/zoo/assets/**", "circuit_lens/py.typed"} <= set(wheel["artifacts"])
    assert (ROOT / "circuit_lens" / "py.typed").exists()


def test_no_data_is_committed_outside_the_assets():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    binary = re.compile(r"\.(safetensors|pt|pth|npz|npy|pkl|parquet|bin)$")
    stray = [file for file in done.stdout.split() if binary.search(file) and "circuit_lens/zoo/assets/" not in file]
    assert stray == []

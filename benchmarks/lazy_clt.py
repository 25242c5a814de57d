"""Trace through a cross-layer transcoder whose decoders stay on disk: memory and time against one in memory.

    python -m benchmarks.lazy_clt [--folder FOLDER] [--d-sae 65536] [--n-layers 12] [--d-model 256] [--l0 12]

A random set in circuit-tracer's layout is written to a new folder below FOLDER (5.2 GB of decoders by default), traced
in fresh processes of one thread, lazily, lazily with the files dropped from the page cache, and from memory, and
deleted. Peak memory is the highest resident set (``VmHWM``) while the transcoder is loaded and the prompt attributed,
less what was resident before: the interpreter, the libraries and the model. Files are read, not mapped, so that no page
of a file is part of it. Times are CPU seconds, of the system as well. Exits with 1 if a lazy trace takes a tenth of the
decoders' bytes or more, or if the graphs are not equal bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from safetensors.torch import save_file

from benchmarks.parity_models import Case, hooked_transformer, measured, random_case

HOOKS = {"hook_in": "ln2.hook_normalized", "hook_out": "hook_mlp_out"}
LIMIT = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the set is."""

    n_layers: int
    d_model: int
    d_sae: int
    l0: float
    n_pos: int = 32

    @property
    def decoder_bytes(self) -> int:
        """Bytes of all decoders in float32."""
        return 4 * self.d_sae * self.d_model * self.n_layers * (self.n_layers + 1) // 2

    @property
    def encoder_bytes(self) -> int:
        """Bytes of all encoders in float32."""
        return 4 * self.d_sae * self.d_model * self.n_layers


def model_case(size: Size) -> Case:
    """Return the random model and prompt; its own transcoders are not used."""
    return random_case(
        "lazy", n_layers=size.n_layers, d_model=size.d_model, n_heads=8, d_mlp=4 * size.d_model, d_vocab=1000,
        n_pos=size.n_pos, d_sae=2, l0=1, seed=12,
    )  # fmt: skip


def write(folder: Path, size: Size) -> None:
    """Write the set, layer by layer: encoder rows of unit variance on normalised inputs, thresholds at the quantile."""
    rng = torch.Generator().manual_seed(13)
    d, f = size.d_model, size.d_sae
    cut = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * size.l0 / f, dtype=torch.float64)).item()
    for i in range(size.n_layers):
        encoder = {
            f"W_enc_{i}": torch.randn(f, d, generator=rng).div_(math.sqrt(d)),
            f"b_enc_{i}": 0.1 * torch.randn(f, generator=rng),
            f"b_dec_{i}": 0.1 * torch.randn(d, generator=rng),
            f"threshold_{i}": torch.full((f,), cut),
        }
        decoder = torch.randn(f, size.n_layers - i, d, generator=rng)
        decoder.div_(math.sqrt(size.l0 * d * (i + 1)))
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoder}, folder / f"W_dec_{i}.safetensors")
    config = {"model_kind": "cross_layer_transcoder", "feature_input_hook": HOOKS["hook_in"]}
    (folder / "config.yaml").write_text(json.dumps(config | {"feature_output_hook": HOOKS["hook_out"]}))


def trace(folder: Path, size: Size, *, lazy: bool) -> dict[str, float | str]:
    """Load the set and attribute the prompt in this process, which should be fresh."""
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
    from circuit_lens.replacement_model import ReplacementModel

    torch.set_num_threads(1)
    case = model_case(size)
    model = hooked_transformer(case)
    # What first calls of the libraries cost and keep belongs to neither side.
    ReplacementModel(model, []).attribute(case.tokens[:3], progress=False)
    with measured() as meter:
        start = time.process_time()
        clt = CrossLayerTranscoder.load(folder, lazy=lazy)
        rm = ReplacementModel(model, list(clt.dictionaries))
        loaded = time.process_time()
        graph = rm.attribute(case.tokens, min_explained=None, progress=False)
        done = time.process_time()
    return {
        "load": loaded - start,
        "attribute": done - loaded,
        "wall": meter.wall_seconds,
        "peak": meter.peak_bytes,
        "features": graph.nodes.n_features,
        "graph": hashlib.sha256(graph.adjacency.contiguous().numpy().tobytes()).hexdigest(),
    }


def drop(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, so that the next run reads the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(folder: Path, size: Size, *, lazy: bool) -> dict[str, float | str]:
    """Trace in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lazy_clt", "--measure", "lazy" if lazy else "eager"]
    command += ["--folder", str(folder), "--size", json.dumps(dataclasses.asdict(size))]
    out = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(parent: Path, size: Size) -> bool:
    """Write the set, trace it in every way, print the figures."""
    needed, free = size.decoder_bytes + size.encoder_bytes, shutil.disk_usage(parent).free
    if free < 1.2 * needed:
        raise SystemExit(f"{parent} has {free / 1e9:.1f} GB left, the set takes {needed / 1e9:.1f}; give --folder")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        write(folder, size)
        runs = {"lazy": fresh(folder, size, lazy=True)}
        drop(folder)
        runs["lazy, files not in the page cache"] = fresh(folder, size, lazy=True)
        runs["eager"] = fresh(folder, size, lazy=False)
    print(
        f"{size.n_layers} layers of {size.d_sae} features, d = {size.d_model}, {size.n_pos} positions, "
        f"{runs['lazy']['features']} active features; decoders {size.decoder_bytes / 1e9:.2f} GB, encoders "
        f"{size.encoder_bytes / 1e9:.2f} GB; one thread"
    )
    for name, run in runs.items():
        peak = float(run["peak"])
        print(
            f"  {name + ':':34s} load {run['load']:6.2f} CPU s, attribute {run['attribute']:6.2f} CPU s, both "
            f"{run['wall']:6.2f} s; peak {peak / 2**20:7.1f} MiB above the model, {peak / size.decoder_bytes:.1%} of "
            "the decoders"
        )
    lazy, eager = (float(runs[n]["load"]) + float(runs[n]["attribute"]) for n in ("lazy", "eager"))
    ratio = float(runs["lazy"]["attribute"]) / float(runs["eager"]["attribute"])
    equal = len({run["graph"] for run in runs.values()}) == 1
    small = all(float(run["peak"]) < LIMIT * size.decoder_bytes for name, run in runs.items() if name != "eager")
    print(f"  lazy / eager: {ratio:.2f} of the CPU seconds to attribute, {lazy / eager:.2f} with loading")
    print(f"  graphs: {'equal bit for bit' if equal else 'NOT EQUAL'}")
    print(f"  less than a tenth of the decoders: {'met' if small else 'NOT met'}")
    return equal and small


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where 6 GB have room")
    parser.add_argument("--n-layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--l0", type=float, default=12.0, help="active features per layer and position")
    parser.add_argument("--measure", choices=["lazy", "eager"], help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if arguments.measure:
        size = Size(**json.loads(arguments.size))
        print(json.dumps(trace(arguments.folder, size, lazy=arguments.measure == "lazy")))
        return 0
    size = Size(arguments.n_layers, arguments.d_model, arguments.d_sae, arguments.l0)
    return 0 if compare(arguments.folder, size) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Memory and time of graphs of neurons: decoder rows shared across positions, or a vector per active neuron.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.neurons``. A random model of the shape of GPT-2 small (12 layers, d_model
768, d_mlp 3,072; a vocabulary of 1,000), its own neurons as dictionaries, 12 random tokens. Peaks are those of resident
memory above what is resident before the call, as multiples of the decoders' bytes in float32 (108 MiB); CPU seconds of
one thread. Every measurement has a fresh process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.parity_models import measured

N_LAYERS, D_MODEL, D_MLP, N_POS, D_VOCAB = 12, 768, 3072, 12, 1000
DECODERS = N_LAYERS * D_MLP * D_MODEL * 4


def measure(n_features: int, activation: str, *, own: bool) -> str:
    """Return one line: what is held, then peak and time of the local model and of a graph with so many features.

    Args:
        n_features: Features that become nodes; influence is ranked anew at every quarter of them.
        activation: Of the MLPs: "gelu", active everywhere, or "relu", active at half of the positions here.
        own: Keep a vector per active neuron.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    import circuit_lens as cl
    from circuit_lens.attribution import writes

    torch.set_num_threads(1)
    config = HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=D_MODEL, d_mlp=D_MLP, n_heads=12, d_head=64, n_ctx=64, d_vocab=D_VOCAB,
        act_fn=activation, normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config).eval().requires_grad_(False)
    rm = cl.ReplacementModel(model, cl.neurons(model))
    tokens = torch.randint(D_VOCAB, (N_POS,), generator=torch.Generator().manual_seed(1))
    if own:
        writes.shares = lambda n_active, n_rows, n_pos: False
    with measured() as making:
        local = rm.local(tokens, check=False)
    written = [w for f in local.sources.features for w in f.written]
    held = sum((w.rows if isinstance(w, writes.SharedRows) else w.vectors).numel() for w in written) * 4
    with measured() as tracing:
        local.attribute([5, 17], max_features=n_features, rerank_every=max(1, n_features // 4), progress=False)
    how = "a vector each" if own else "shared rows  "
    return (
        f"{activation}, {n_features:5d} features, {how}: held {held / DECODERS:5.2f}; local model peak "
        f"{making.peak_bytes / DECODERS:5.2f}, {making.cpu_seconds:5.2f} s; graph peak "
        f"{tracing.peak_bytes / DECODERS:5.2f}, {tracing.cpu_seconds:5.2f} s"
    )


def main() -> None:
    """Measure in fresh processes and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--activations", nargs="*", default=["gelu", "relu"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        n_features, activation, how = given.one
        print(measure(int(n_features), activation, own=how == "own"))
        return
    for activation in given.activations:
        for n_features in given.features:
            for how in ("own", "shared"):
                command = [sys.executable, "-m", "benchmarks.neurons", "--one", str(n_features), activation, how]
                run = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True)
                print(run.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()

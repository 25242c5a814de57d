"""Grids of patchscopes against the loop over forward passes: CPU seconds, and memory against the budget that is given.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.bench_patchscopes``. A random model of GPT-2 small's shape (12 layers,
width 768, 12 heads, 50,257 tokens, float32), every one of 12 source layers into every one of 12 target layers, a target
of 23 tokens with the placeholder last or in the middle, with and without 20 generated tokens. "Grid" is
``cl.patchscope`` with everything it does: the source's run, controls, the check. "Loop" is
``circuit_lens.patchscopes.definition.say_one_by_one``, measured on a random sample of the cells and scaled up. Memory
is how much the resident set of a fresh process grows at most while ``cl.patchscope`` runs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuit_lens as cl
from circuit_lens.patchscopes.definition import say_one_by_one
from circuit_lens.patchscopes.maps import Identity
from circuit_lens.patchscopes.rows import Cell, Rows

N_LAYERS, N_TOKENS, D_VOCAB = 12, 23, 50257
PLACES = {"last": N_TOKENS - 1, "middle": N_TOKENS // 2}
TARGETS = {("last", 0): 20.0, ("last", 20): 10.0}
LIMIT = 1e-5
"""Largest difference of logits, as a share of the largest."""


def gpt2_shape() -> Any:
    """Return a random HookedTransformer of GPT-2 small's shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=D_VOCAB, n_ctx=1024,
        act_fn="gelu_new", normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    with torch.no_grad():
        model.W_E.mul_(5)  # the default spread is small, and the patched states would hardly be felt
    return model


def gpt2_bridge() -> Any:
    """Return a random TransformerBridge of the same shape."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    from circuit_lens.zoo.tokenizer import SPECIAL_TOKENS, build_tokenizer

    torch.manual_seed(0)
    inner = GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB)).eval()
    with torch.no_grad():
        inner.transformer.wte.weight.mul_(5)
    tokenizer = build_tokenizer(SPECIAL_TOKENS, "local/gpt2")  # prompts are ids
    return TransformerBridge.boot_transformers("local/gpt2", hf_model=inner, tokenizer=tokenizer, device="cpu")


def prompts() -> tuple[Tensor, Tensor]:
    """Return the tokens of a source of 10 and of the target."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(D_VOCAB, (10,), generator=rng), torch.randint(D_VOCAB, (N_TOKENS,), generator=rng)


def grid(model: Any, place: str, n_new: int, **options: Any) -> Any:
    """Run the grid."""
    source, target = prompts()
    return cl.patchscope(
        model, cl.At(source), cl.Target(target, at=PLACES[place]), source_layers=range(N_LAYERS),
        target_layers=range(N_LAYERS), max_new_tokens=n_new, progress=False, **options,
    )  # fmt: skip


def one_by_one(model: Any, place: str, n_new: int, cells: list[Cell]) -> tuple[float, Tensor, Tensor]:
    """Return the CPU seconds of some cells run by the definition, source included once, their logits and tokens."""
    source, target = prompts()
    start = time.process_time()
    vectors = cl.Vectors.from_prompts(model, cl.At(source))
    spent = time.process_time() - start
    placed = cl.Target(target, at=PLACES[place]).place(model)
    numbers = torch.arange(len(cells))
    rows = Rows(
        vectors, tuple(cells), torch.zeros(len(cells), dtype=torch.long), numbers, Identity(), "replace", "layer",
        model.cfg.d_model,
    )  # fmt: skip
    start = time.process_time()
    said = say_one_by_one(model, placed, rows, n_new)
    each = (time.process_time() - start) / len(cells)
    return spent + each * N_LAYERS**2, said.logits, said.new_tokens


def compare(model: Any, place: str, n_new: int, n_sample: int, repetitions: int) -> None:
    """Measure one case and print it; raise AssertionError if the results differ."""
    best, result = float("inf"), None
    for _ in range(repetitions):
        start = time.process_time()
        result = grid(model, place, n_new, keep_logits=True)
        best = min(best, time.process_time() - start)
    assert result is not None
    every = [Cell(s, t) for s in range(N_LAYERS) for t in range(N_LAYERS)]
    cells = random.Random(0).sample(every, n_sample)
    loop, logits, tokens = one_by_one(model, place, n_new, cells)
    at = torch.tensor([[c.source_layer or 0, c.target_layer] for c in cells])
    found = result.patched.at(0, at[:, 0], at[:, 1], 0)
    gap = float((found.logits - logits).abs().max() / logits.abs().max())
    same = float((found.new_tokens == tokens).float().mean()) if n_new else 1.0
    if not gap < LIMIT or same < 1.0 or result.notes:
        raise AssertionError(f"logits differ by {gap:.2g}, tokens are equal in {same:.3f}, notes {result.notes}")
    wanted = TARGETS.get((place, n_new))
    verdict = "" if wanted is None else f" (target {wanted:g}: {'met' if loop / best >= wanted else 'NOT met'})"
    print(
        f"placeholder {place}, {n_new} new tokens: grid {best:.2f} s; loop {loop:.1f} s by {n_sample} of {len(every)} "
        f"cells; {loop / best:.1f} times fewer{verdict}; logits differ by {gap:.1g}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------- memory


def resident(peak: bool) -> int:
    """Return the bytes in memory of this process, now or at most since `reset_peak` (Linux)."""
    word = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(word))


def reset_peak() -> None:
    """Start counting the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(place: str, n_new: int, gigabytes: float, cached: bool) -> None:
    """Print how much this process grows at most while a grid runs."""
    model = gpt2_shape()
    source, target = prompts()
    cl.patchscope(  # libraries and buffers that stay
        model, cl.At(source), cl.Target(target, at=PLACES[place]), source_layers=0, target_layers=0,
        max_new_tokens=n_new, progress=False,
    )  # fmt: skip
    before = resident(peak=False)
    reset_peak()
    with torch.no_grad():
        model(target[None])
    alone = (resident(peak=True) - before) / 1e9
    reset_peak()
    grid(model, place, n_new, memory=gigabytes, use_cache=cached)
    grown = (resident(peak=True) - before) / 1e9
    verdict = "within" if grown <= gigabytes else "NOT within"
    how = "" if cached else ", without cache"
    print(
        f"placeholder {place}, {n_new} new tokens, memory={gigabytes:g}{how}: grew by {grown:.3f} GB, {verdict} it "
        f"(one plain forward: {alone:.3f} GB)",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=12, help="cells that the loop is measured on")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.3, 1.0], help="gigabytes")
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--bridge", action="store_true", help="the speed of a TransformerBridge")
    parser.add_argument("--memory", nargs=4, metavar=("PLACE", "NEW", "GB", "CACHED"), help="one, in this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        place, n_new, gigabytes, cached = given.memory
        return measure_memory(place, int(n_new), float(gigabytes), cached == "1")
    if given.only != "memory":
        model = gpt2_bridge() if given.bridge else gpt2_shape()
        grid(model, "last", 0)
        for n_new in (0, 20):
            for place in PLACES:
                compare(model, place, n_new, given.sample, given.repetitions)
    if given.only != "speed":
        for place, n_new, cached in (("last", 0, 1), ("last", 20, 1), ("middle", 20, 1), ("last", 0, 0)):
            for gigabytes in given.budgets:
                case = [place, str(n_new), str(gigabytes), str(cached)]
                subprocess.run([sys.executable, "-m", "benchmarks.bench_patchscopes", "--memory", *case], check=True)
    return None


if __name__ == "__main__":
    main()

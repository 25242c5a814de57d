"""Evaluation of the bundled dictionaries: beside the figures they were shipped with, and what it costs.

Run ``OMP_NUM_THREADS=1 python -m benchmarks.evaluation``. Each part runs in a process of its own.

- ``report``: the text and the definitions of the zoo's report (written before the evaluation and apart from it).
  The report counts predictions made at BOS; a mask says so.
- ``cost``: CPU seconds and peak memory above what is loaded, for texts of growing length.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

COSTS = (5_000, 10_000, 20_000, 40_000)


def _text(n_tokens: int) -> Any:
    from circuit_lens.zoo.batches import held_out_text
    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.recipe import FIGURES_TEXT, ROW_LENGTH
    from circuit_lens.zoo.tokenizer import build_vocabulary

    corpus = Corpus()
    ids = {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}
    return held_out_text(corpus, ids, n_tokens=n_tokens, length=ROW_LENGTH, seed=FIGURES_TEXT)


def report(n_tokens: int) -> None:
    """Print both sides."""
    from circuit_lens import zoo
    from circuit_lens.evaluation.evaluate import evaluate
    from circuit_lens.zoo.dictionary_figures import layer_figures, text_loss
    from circuit_lens.zoo.tokenizer import PAD_ID

    rm, text = zoo.load(), _text(n_tokens)
    modules = list(zoo.load_dictionaries("capitals"))
    ours = evaluate(rm.binding, text.rows.tokens, alone=False, progress=False)
    everywhere = evaluate(
        rm.binding, text.rows.tokens, mask=text.rows.tokens != PAD_ID, alone=False, baselines=False, progress=False
    )
    print(f"{ours.n_tokens} tokens; ours, theirs")
    for output, theirs in zip(ours.outputs, layer_figures(rm.model, modules, text), strict=True):
        pairs = ((output.explained_variance, theirs.explained_variance), (output.l0, theirs.l0))
        pairs += ((output.dead, theirs.dead),)
        print(f"  {output.hook}: " + "; ".join(f"{a:.6f}, {b:.6f}" for a, b in pairs))
    tokens = text.rows.tokens
    replaced, zeroed = text_loss(rm.model, tokens, dictionaries=modules), text_loss(rm.model, tokens, zero=True)
    theirs = {"loss": text_loss(rm.model, tokens), "replaced": replaced, "zeroed": zeroed}
    mine = {"loss": everywhere.loss, "replaced": everywhere.replaced.loss, "zeroed": everywhere.zero.loss}
    for name, value in mine.items():
        print(f"  {name}: {value.value:.6f}, {theirs[name]:.6f}")
    print(ours)


def cost(n_tokens: int, baselines: bool) -> None:
    """Print what one evaluation costs."""
    from circuit_lens import zoo
    from circuit_lens.evaluation.evaluate import evaluate

    rm, text = zoo.load(), _text(n_tokens)
    evaluate(rm.binding, text.rows.tokens[:2], alone=False, baselines=False, progress=False)  # what loads late
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = evaluate(rm.binding, text.rows.tokens, baselines=baselines, progress=False)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    name = "with baselines" if baselines else "without"
    print(f"  {found.n_tokens:6d} tokens {name:>14}: {seconds:6.1f} CPU s, peak {peak / 1024:5.0f} MiB more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("report", "cost"))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--no-baselines", action="store_true")
    arguments = parser.parse_args()
    if arguments.part == "report":
        report(arguments.tokens)
    elif arguments.part == "cost":
        cost(arguments.tokens, not arguments.no_baselines)
    else:
        this = [sys.executable, "-W", "ignore", "-m", "benchmarks.evaluation"]
        subprocess.run([*this, "report"], check=True)
        print("four layers of 640 features, d = 96, rows of 64 tokens, every output also alone")
        for n_tokens in COSTS:
            for extra in ([], ["--no-baselines"]):
                subprocess.run([*this, "cost", "--tokens", str(n_tokens), *extra], check=True)


if __name__ == "__main__":
    main()

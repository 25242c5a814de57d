"""The card's figures about the graph as a whole: what freezing misses, the pruned circuit, features that switch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_lens.dictionaries.binding import read_rank
from circuit_lens.graph.card_tables import Figure
from circuit_lens.graph.statistics import NAN, average_precision, spearman
from circuit_lens.interventions.edits import pack, rows_of
from circuit_lens.interventions.engine import Changed, Hold
from circuit_lens.interventions.intervene import rows_at_once
from circuit_lens.interventions.measure import LIVE, Ablations, linear_hold, parts
from circuit_lens.interventions.resolve import Wanted
from circuit_lens.interventions.study import Study, nodes_of
from circuit_lens.protocols import Dictionary
from circuit_lens.running import plain_tensors

FLIP_NUMBERS = 2**26
"""Pre-activations that are held at once, of one pass, to see which features switch."""
MOST_OTHERS = 100_000
"""Features of one dictionary and pass that neither switch nor are foreseen to, of which figures are made."""


def gaps(study: Study) -> dict[str, Figure]:
    """Σ|live - held| / Σ|live| over the ablated features, for each thing that a graph holds."""
    figures = {}
    holds = {
        "attention": Hold(attention=True),
        "norms": Hold(norms=True),
        "errors": Hold(mlp=study.closed, skip=True, recompute=True, sites=True),
        "both": Hold(attention=True, norms=True),
    }
    for name, hold in holds.items():
        held = study.runs.effects(hold)

        def gap(at: Int[np.ndarray, "n"], held: Float[np.ndarray, "n"] = held) -> float:
            total = np.abs(study.live[at]).sum()
            return float(np.abs(study.live[at] - held[at]).sum() / total) if total > 0 else NAN

        low, high = study.interval(gap, len(held))
        figures[f"gaps/{name}"] = Figure(gap(np.arange(len(held))), low, high, len(held))
        figures[f"gaps/{name}_spearman"] = Figure(spearman(np.abs(held), np.abs(study.live)), n=len(held))
    return figures


def circuit_test(study: Study) -> dict[str, Figure]:
    """Sufficiency and necessity of the pruned circuit's features, and of random ones of its size.

    With m the target, all active features ablated in m(nothing) and those outside the circuit in m(circuit):
    sufficiency is (m(circuit) - m(nothing)) / (m(clean) - m(nothing)), necessity (m(clean) - m(clean without circuit))
    over the same. Errors, and features that switch on, are live.
    """
    s, graph = study.settings, study.graph
    if graph.pruning is None:
        graph = graph.prune(node_threshold=s.node_threshold, edge_threshold=s.edge_threshold)
    inside = nodes_of(graph, study.active) >= 0
    kept = [inside, *(_random_circuit(study, inside) for _ in range(s.random_circuits))]
    ablated = [np.ones_like(inside), *(~m for m in kept), *kept]
    values = coalitions(study, ablated)
    nothing, whole, n = float(values[0]), study.runs.clean, len(kept)
    figures = {
        "circuit/features": Figure(float(inside.sum()), n=1),
        "circuit/clean": Figure(whole, n=1),
        "circuit/without": Figure(nothing, n=1),
    }
    if abs(whole - nothing) <= 1e-6 * max(abs(whole), abs(nothing)) or not inside.any():
        return figures
    enough = (values[1 : 1 + n] - nothing) / (whole - nothing)
    needed = (whole - values[1 + n :]) / (whole - nothing)
    for name, found in (("sufficiency", enough), ("necessity", needed)):
        figures[f"circuit/{name}"] = Figure(float(found[0]), n=1)
        if n > 1:
            low, high = (float(q) for q in np.quantile(found[1:], [0.025, 0.975]))
            figures[f"circuit/random_{name}"] = Figure(float(found[1:].mean()), low, high, n - 1)
    return figures


def _random_circuit(study: Study, inside: Bool[np.ndarray, "n_active"]) -> Bool[np.ndarray, "n_active"]:
    """Return as many features as the circuit has at every layer and position."""
    found = np.zeros_like(inside)
    places = study.active.layer * study.recording.n_pos + study.active.pos
    for place in np.unique(places[inside]):
        here = np.flatnonzero(places == place)
        found[study.rng.permutation(here)[: int(inside[here].sum())]] = True
    return found


def coalitions(study: Study, ablated: Sequence[Bool[np.ndarray, "n_active"]]) -> Float[np.ndarray, "n"]:
    """Return what is read when sets of features are ablated together."""
    runs = []
    for mask in ablated:
        wanted = Wanted()
        for i in np.flatnonzero(mask):
            f = study.active.features[i]
            wanted.features.setdefault(str(f.site), {})[int(f.pos), f.index] = float(study.replace[i])
        runs.append(wanted)
    edits, found = pack(study.recording, runs), []
    for start, stop in parts(len(runs), study.recording):
        logits = Changed(study.recording, rows_of(edits, start, stop)).run()
        with plain_tensors():
            found.append(study.read.rows(logits).cpu().numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class Switched:
    """Whether features of one run switch: the linear model's word, what happened, and two rankings.

    Attributes:
        said, real: Foreseen, and happened.
        score, nearest: Ranked by the linear change as a share of the way to the threshold, and by that way alone.
        weight: How many features each entry stands for: those that neither switch nor are foreseen to are sampled.
        run: Which source was ablated.
    """

    said: Bool[np.ndarray, "n"]
    real: Bool[np.ndarray, "n"]
    score: Float[np.ndarray, "n"]
    nearest: Float[np.ndarray, "n"]
    weight: Float[np.ndarray, "n"]
    run: Int[np.ndarray, "n"]


def flips(study: Study) -> dict[str, Figure]:
    """Which features switch on or off under an ablation, as the linear model says and as it happens."""
    n = min(study.settings.flip_sources, len(study.sources))
    chosen = np.sort(study.rng.permutation(len(study.sources))[:n])
    runs = Ablations(study.recording, study.active, study.sources[chosen], study.runs.new[chosen], study.read)
    dictionaries = study.recording.binding.dictionaries
    rng = torch.Generator().manual_seed(study.settings.seed)
    found: dict[str, list[Switched]] = {"on": [], "off": []}
    each = sum(d.d_sae for d in dictionaries) * study.recording.n_pos
    size = max(1, min(FLIP_NUMBERS // max(1, each), rows_at_once(study.recording)))
    for start in range(0, n, size):
        stop = min(start + size, n)
        said, real = runs.both(start, stop, [linear_hold(study.n_layers, linear=study.linear), LIVE])
        for d in dictionaries:
            for kind, part in _switched(study, d, said[d.site], real[d.site], runs.sources[start:stop], rng):
                found[kind].append(replace(part, run=part.run + start))
    figures = {}
    for kind, listed in found.items():
        if not listed:  # no dictionary has thresholds
            continue
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in listed]) for f in fields(Switched)}
        figures |= _flip_figures(study, f"flips/{kind}", Switched(**columns), n)
    return figures


def _flip_figures(study: Study, name: str, s: Switched, n_runs: int) -> dict[str, Figure]:
    """Return the figures; intervals over the ablated features."""
    counts = [np.bincount(s.run[mask], minlength=n_runs) for mask in (s.said & s.real, s.said, s.real)]
    right, said, real = counts

    def share(of: Int[np.ndarray, "n"]) -> Figure:
        def figure(at: Int[np.ndarray, "m"]) -> float:
            return float(right[at].sum() / of[at].sum()) if of[at].any() else NAN

        return Figure(figure(np.arange(n_runs)), *study.interval(figure, n_runs), n=int(of.sum()))

    every = float(s.weight.sum())
    return {
        f"{name}/precision": share(said),
        f"{name}/recall": share(real),
        f"{name}/prevalence": Figure(float(real.sum()) / every if every else NAN, n=round(every)),
        f"{name}/auprc": Figure(average_precision(s.score, s.real, s.weight), n=int(real.sum())),
        f"{name}/nearest_auprc": Figure(average_precision(s.nearest, s.real, s.weight), n=int(real.sum())),
    }


def _switched(
    study: Study,
    d: Dictionary,
    said: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    sources: Int[np.ndarray, "n_part"],
    rng: torch.Generator,
) -> Iterator[tuple[str, Switched]]:
    """Yield the features of one dictionary that can feel the sources: those that were off, and those that were on."""
    write, pos = (torch.as_tensor(x[sources]) for x in (study.active.write, study.active.pos))
    feel = (write < read_rank(d))[:, None] & (torch.arange(study.recording.n_pos) >= pos[:, None])
    feel = feel.to(said[0].device)
    run = torch.arange(len(sources), device=feel.device)[:, None, None].expand(said[0].shape)[feel]
    thresholds = d.thresholds()
    if thresholds is None:
        return
    before, was = study.recording.pre_acts(d), study.recording.acts(d) != 0
    on = was.expand(len(sources), -1, -1)[feel]
    gap = (thresholds.to(before) - before).expand(len(sources), -1, -1)[feel]
    moved, will, does = (
        (said[0] - before)[feel],
        (d.activate(said[0], study.recording.inputs[d.site].expand(len(sources), -1, -1)) != 0)[feel],
        (real[1] != 0)[feel],
    )
    for kind, here in (("on", ~on), ("off", on)):
        sign = 1.0 if kind == "on" else -1.0
        room = (sign * gap[here]).clamp_min(1e-12)
        foreseen, happened = (will[here], does[here]) if kind == "on" else (~will[here], ~does[here])
        keep, weight = _sampled(foreseen | happened, rng)
        columns = (foreseen, happened, sign * moved[here] / room, -room)
        arrays = [column[keep].cpu().numpy() for column in columns]
        yield (
            kind,
            Switched(
                *arrays[:2], *(a.astype(float) for a in arrays[2:]), weight=weight, run=run[here][keep].cpu().numpy()
            ),
        )


def _sampled(always: Bool[Tensor, "n"], rng: torch.Generator) -> tuple[Int[Tensor, "m"], Float[np.ndarray, "m"]]:
    """Return some places, with how many each stands for: all where ``always``, and at most so many of the others."""
    certain, others = always.nonzero()[:, 0], (~always).nonzero()[:, 0]
    n = len(others)
    if n > MOST_OTHERS:
        others = others[torch.randint(n, (MOST_OTHERS,), generator=rng).to(others.device)]
    weight = np.ones(len(certain) + len(others))
    weight[len(certain) :] = n / max(1, len(others))
    return torch.cat([certain, others]), weight

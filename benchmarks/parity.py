"""Compare graphs, influence, scores, time and memory with circuit-tracer 0.5.0, an independent implementation.

    make parity                      everything, about five minutes
    python -m benchmarks.parity --peer-python PYTHON [--cases NAME ...] [--no-speed]

The peer runs in an environment of its own (PYTHON) on files that both sides read (see `parity_models`). Edges are
compared on every pair of nodes that both graphs have: circuit-tracer knows no biases and no positions and zeroes
features and errors at position 0. Cross-layer transcoders travel in circuit-tracer's own layout: it loads the files
that we wrote, and we attribute with those that it wrote. Exits with 1 if a difference exceeds its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.parity_models import (
    Case,
    Measurement,
    PeerResult,
    Settings,
    case_from_model,
    correctness_cases,
    hooked_transformer,
    measured,
    read_case,
    read_result,
    saelens_transcoders,
    speed_case,
    write_case,
)

if TYPE_CHECKING:
    from circuit_lens import AttributionGraph
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

LIMIT = 1e-5
RUNS = 3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Largest differences of one case; edges relative to the largest |edge| of their row."""

    case: str
    n_features: int
    same_features: bool
    feature_edges: float
    error_edges: float
    token_edges: float
    logit_rows: float
    influence: float
    replacement: float
    completeness: float
    masks_differ: int

    @property
    def worst(self) -> float:
        """The largest of all differences."""
        return max(
            self.feature_edges, self.error_edges, self.token_edges, self.logit_rows, self.influence, self.replacement,
            self.completeness,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.case:34s} {self.n_features:5d} features  edges: feature {self.feature_edges:.1e}, error "
            f"{self.error_edges:.1e}, token {self.token_edges:.1e}, logit rows {self.logit_rows:.1e}; influence "
            f"{self.influence:.1e}, replacement {self.replacement:.1e}, completeness {self.completeness:.1e}"
            f"; {self.masks_differ} pruned otherwise" + ("" if self.same_features else "  OTHER FEATURES")
        )


def bundled_cases() -> list[Case]:
    """Return the bundled model on its demo prompt, with its own transcoders."""
    import circuit_lens as cl

    rm = cl.zoo.load("capitals")
    tokens = rm.model.to_tokens("Fact: the capital of the state containing Dallas is")[0]
    saes = [getattr(dictionary, "module") for dictionary in rm.dictionaries]  # noqa: B009
    return [case_from_model("capitals", rm.model, saes, tokens, Settings())]


def cross_layer_transcoder(case: Case) -> CrossLayerTranscoder:
    """Return the case's cross-layer transcoder."""
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    layers, first = range(len(case.transcoders)), case.transcoders[0]
    weights = {f: [getattr(w, f) for w in case.transcoders] for f in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    return CrossLayerTranscoder(
        W_enc=weights["W_enc"],
        b_enc=weights["b_enc"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        hook_in=[f"blocks.{layer}.{case.hook_read}" for layer in layers],
        hook_out=[f"blocks.{layer}.{case.hook_write}" for layer in layers],
        activation="relu" if first.threshold is None else "jumprelu",
        threshold=None if first.threshold is None else weights["threshold"],
        W_skip=None if first.W_skip is None else [w.W_skip.T for w in case.transcoders if w.W_skip is not None],
    )


def dictionaries_of(case: Case, clt_folder: Path | None = None) -> list[Any]:
    """Return the case's dictionaries; a cross-layer transcoder as the peer wrote it to a folder, where there is one.

    Raises:
        ValueError: The peer's files hold other weights.
    """
    from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder

    if not case.cross_layer:
        return saelens_transcoders(case)
    ours = cross_layer_transcoder(case)
    if clt_folder is None or case.transcoders[0].W_skip is not None:  # the peer's files have no skip
        return list(ours.dictionaries)
    theirs = CrossLayerTranscoder.load(clt_folder, lazy=True, hook_in=case.hook_read, hook_out=case.hook_write)
    if [d.fingerprint() for d in ours.dictionaries] != [d.fingerprint() for d in theirs.dictionaries]:
        raise ValueError(f"the files in {clt_folder} do not hold the weights of {case.name}")
    return list(theirs.dictionaries)


def graph_of(case: Case, peer: PeerResult | None = None, clt_folder: Path | None = None) -> AttributionGraph:
    """Return our graph of a case; where the peer chose among the features, with the features that it chose."""
    from circuit_lens.replacement_model import ReplacementModel

    model = hooked_transformer(case).eval()
    rm = ReplacementModel(model, dictionaries_of(case, clt_folder))
    start, stop = (0, 1) if peer is None else peer.zero_positions
    local = rm.local(case.tokens, zero_positions=range(start, stop), min_explained=None)
    settings = case.settings
    from circuit_lens import salient_logits

    targets = salient_logits(max_n=settings.max_n_logits, mass=settings.desired_logit_prob)
    return local.attribute(targets, progress=False)


def compare(case: Case, peer: PeerResult, clt_folder: Path | None = None) -> Agreement:
    """Compare our graph of a case with the peer's."""
    from circuit_lens.graph.nodes import NodeKind

    graph = graph_of(case, peer, clt_folder)
    nodes, n_pos, n_layers = graph.nodes, len(case.tokens), len(case.transcoders)
    places = (column[: nodes.n_features].tolist() for column in (nodes.layer, nodes.pos, nodes.index))
    ours = list(zip(*places, strict=True))
    theirs = [tuple(f) for f in peer.active_features.tolist()]
    selected = [theirs[i] for i in peer.selected_features.tolist()]
    place = {feature: i for i, feature in enumerate(ours)}
    features = torch.tensor([place[f] for f in selected])
    logit_ids = nodes.index[nodes.n_sources :].tolist()
    logits = torch.tensor([nodes.n_features + logit_ids.index(t) for t in peer.logit_tokens.tolist()])
    errors, tokens = nodes.slice_of(NodeKind.ERROR), nodes.slice_of(NodeKind.TOKEN)
    columns = torch.cat([features, torch.arange(errors.start, errors.stop), torch.arange(tokens.start, tokens.stop)])
    mine = graph.adjacency[torch.cat([features, logits])][:, columns].clone()
    # The peer's errors at its zero positions do not exist.
    error_pos = torch.arange(n_layers * n_pos) % n_pos
    zeroed = (error_pos >= peer.zero_positions[0]) & (error_pos < peer.zero_positions[1])
    mine[:, len(features) + zeroed.nonzero()[:, 0]] = 0
    return Agreement(
        case.name,
        len(features),
        set(ours) == set(theirs),
        *_edge_differences(mine, peer, len(features), n_layers * n_pos),
        *_scores(mine, peer, len(features), n_layers, n_pos, len(logits)),
    )


def _edge_differences(
    mine: Tensor, peer: PeerResult, n_features: int, n_errors: int
) -> tuple[float, float, float, float]:
    size = peer.adjacency.abs().amax(1, keepdim=True).clamp_min(torch.finfo(mine.dtype).tiny)
    gap = (mine - peer.adjacency.to(mine)).abs() / size
    rows, end = gap[:n_features], n_features + n_errors

    def largest(part: Tensor) -> float:
        return float(part.max()) if part.numel() else 0.0

    parts = (rows[:, :n_features], rows[:, n_features:end], rows[:, end:], gap[n_features:])
    return largest(parts[0]), largest(parts[1]), largest(parts[2]), largest(parts[3])


def _scores(
    mine: Tensor, peer: PeerResult, n_features: int, n_layers: int, n_pos: int, n_logits: int
) -> tuple[float, float, float, int]:
    """Compare influence, scores and pruning, computed by us from our edges in the peer's selection of nodes."""
    from circuit_lens.graph.influence import influence
    from circuit_lens.graph.nodes import NodeKind, NodeTable, Section
    from circuit_lens.graph.prune import prune
    from circuit_lens.graph.scores import scores

    chosen = peer.active_features[peer.selected_features]
    layer, pos, index = chosen.unbind(1)
    grid = torch.arange(n_layers * n_pos)
    table = NodeTable.build(
        [
            Section(NodeKind.FEATURE, pos, layer, index, activation=torch.ones(n_features)),
            Section(NodeKind.ERROR, grid % n_pos, grid // n_pos),
            Section(NodeKind.TOKEN, torch.arange(n_pos)),
            Section(NodeKind.LOGIT, torch.full((n_logits,), n_pos - 1), n_layers, peer.logit_tokens),
        ]
    )
    weight = peer.logit_probabilities
    flow = influence(mine, weight, nodes=table)
    ours = scores(mine, weight, nodes=table)
    gap = (flow[: table.n_sources] - peer.node_influence[: table.n_sources].double()).abs() / flow.max()
    differ = 0
    if len(peer.node_mask):
        settings = Settings()
        kept = prune(
            mine, weight, nodes=table, node_threshold=settings.node_threshold, edge_threshold=settings.edge_threshold
        )
        mask = torch.zeros(len(table), dtype=torch.bool)
        mask[kept.node_ids] = True
        differ = int((mask != peer.node_mask).sum())
    replacement = abs(ours.replacement - peer.replacement_score)
    return float(gap.max()), replacement, abs(ours.completeness - peer.completeness_score), differ


def run_peer(case: Case, folder: Path, python: str) -> PeerResult:
    """Run circuit-tracer on a case in its own environment."""
    given, made = folder / f"{case.name}-case.safetensors", folder / f"{case.name}-result.safetensors"
    write_case(given, case)
    if case.cross_layer:
        cross_layer_transcoder(case).save(given.with_suffix(".clt"), layout="circuit-tracer")
    command = [python, "-m", "benchmarks.parity_peer", str(given), str(made)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    return read_result(made)


def measure_ours(path: Path, *, checks: bool) -> Measurement:
    """Attribute the speed case once in this process, which should be fresh, on one thread."""
    from circuit_lens.replacement_model import ReplacementModel

    torch.set_num_threads(1)
    case = read_case(path)
    rm = ReplacementModel(hooked_transformer(case).eval(), saelens_transcoders(case))
    tokens = case.tokens
    del case
    rm.attribute(tokens[:3], check=False, progress=False)  # first-call costs of the libraries
    with measured() as meter:
        rm.attribute(tokens, zero_positions=[0], check=checks, min_explained=None, progress=False)
    return Measurement(0, meter.cpu_seconds, meter.wall_seconds, meter.peak_bytes)


def gemm_seconds(case: Case, n_features: int) -> float:
    """CPU seconds of the two matrix products per attention layer that the causal cone of the speed case needs.

    Every target at position p of layer l crosses layers l..0 with gradients at positions 0..p; before its first layer
    it sits at one position.
    """
    n_pos, n_layers, width = len(case.tokens), case.config["n_layers"], case.config["d_model"]
    inner = case.config["n_heads"] * case.config["d_head"]
    per_place = n_features // (n_layers * (n_pos - 1))
    W_O, W_V = torch.randn(width, inner), torch.randn(inner, width)
    gradients = torch.randn(per_place * n_layers * n_pos, width)
    start = time.process_time()
    for pos in range(1, n_pos):
        for layer in range(n_layers - 1, -1, -1):
            crossing = per_place * (n_layers - 1 - layer)
            if crossing:
                torch.mm(gradients[: crossing * (pos + 1)] @ W_O, W_V)
    return time.process_time() - start


def speed(folder: Path, python: str) -> bool:
    """Time both sides on the same case, one thread, fresh processes, alternating; print the figures."""
    case = speed_case()
    path = folder / "speed.case"
    write_case(path, case)
    ours: list[Measurement] = []
    peer: PeerResult | None = None
    runs: list[list[Measurement]] = []
    for _ in range(RUNS):
        ours.append(_fresh(path))
        peer = run_peer(case, folder, python)
        runs.append(list(peer.measurements))
        ours.append(_fresh(path))
    assert peer is not None
    n = len(peer.active_features)
    print(f"\nspeed: 12 layers, d = 256, 32 positions, {n} active features, one thread, CPU seconds (median of runs)")
    best = min(zip(*runs, strict=True), key=lambda ms: _median([m.cpu_seconds for m in ms]))
    for measurements in zip(*runs, strict=True):
        seconds, memory = _median([m.cpu_seconds for m in measurements]), _median([m.peak_bytes for m in measurements])
        batch = measurements[0].batch_size
        print(f"  circuit-tracer, batch {batch:4d}: {seconds:6.2f} s, peak {memory / 2**20:6.0f} MiB")
    mine, mine_memory = _median([m.cpu_seconds for m in ours]), _median([m.peak_bytes for m in ours])
    theirs, their_memory = _median([m.cpu_seconds for m in best]), _median([m.peak_bytes for m in best])
    torch.set_num_threads(1)
    floor = min(gemm_seconds(case, n) for _ in range(3))
    print(f"  circuit_lens:               {mine:6.2f} s, peak {mine_memory / 2**20:6.0f} MiB")
    print(f"  matrix products of the causal cone alone: {floor:.2f} s")
    print(f"  {theirs / mine:.1f} times fewer CPU seconds; {mine / floor:.1f} times the products; "
          f"{mine_memory / their_memory:.2f} of the peak memory")  # fmt: skip
    return theirs / mine >= 5 and mine_memory * 3 <= their_memory


def _fresh(path: Path) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.parity", "--measure", str(path)]
    out = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout
    cpu, wall, peak = out.split()[-3:]
    return Measurement(0, float(cpu), float(wall), int(peak))


def _median(values: list[float] | list[int]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", default=".venv-parity/bin/python", help="Python with circuit-tracer 0.5.0")
    parser.add_argument("--cases", nargs="*", help="only these correctness cases")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if arguments.measure:
        m = measure_ours(arguments.measure, checks=False)
        print(m.cpu_seconds, m.wall_seconds, m.peak_bytes)
        return 0
    python = str(Path(arguments.peer_python).absolute())
    fine = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = arguments.cases
        cases = [c for c in [*correctness_cases(), *bundled_cases()] if not wanted or c.name in wanted]
        for case in cases:
            agreement = compare(case, run_peer(case, folder, python), folder / f"{case.name}-result.clt")
            print(agreement, flush=True)
            fine = fine and agreement.same_features and agreement.worst <= LIMIT
        print("agreement:", f"every difference is at most {LIMIT:.0e}" if fine else f"a difference EXCEEDS {LIMIT:.0e}")
        if not arguments.no_speed:
            fast = speed(folder, python)
            print("targets of 5 times fewer CPU seconds and a third of the memory:", "met" if fast else "NOT met")
            fine = fine and fast
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

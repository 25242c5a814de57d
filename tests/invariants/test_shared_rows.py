"""Decoder rows shared across positions are the same as a vector per active feature; which features are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from circuit_lens.attribution import ranking, writes
from circuit_lens.attribution.targets import logit_difference
from circuit_lens.attribution.writes import OwnVectors, SharedRows
from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.dictionaries.neurons import neurons
from circuit_lens.graph.graph import AttributionGraph
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import autoencoders, builders
from tests.invariants import cases, cross_layer_builder

N = 5
ENGINES = ("fast", "reference")
TARGETS = [5, logit_difference(9, 40, pos=2)]


def always_on(dictionary: Any) -> Any:
    """Return a SAELens module whose features are active nearly everywhere."""
    with torch.no_grad():
        dictionary.b_enc += 6.0
    return dictionary


def dense_skips(model: Any) -> list[Any]:
    return [always_on(d) for d in builders.transcoders(model, "skip")]


def dense_cross_layer(model: Any) -> Any:
    made = cross_layer_builder.weights(skip=True)
    made["b_enc"] = [b + 3.0 for b in made["b_enc"]]
    return CrossLayerTranscoder(**made)


def dense_autoencoders(model: Any) -> list[Any]:
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.2.attn.hook_z")
    saes = [always_on(autoencoders.autoencoder("standard", hook, 32, seed=i)) for i, hook in enumerate(hooks)]
    return [*saes, *neurons(model, layers=[1])]


def half_on(model: Any) -> list[Any]:
    """Return dictionaries whose features are active at some positions each, and one that is sparse."""
    shifted = builders.transcoders(model, layers=[0, 2], l0=48.0)
    return [*shifted, *builders.transcoders(model, layers=[1])]


def mixture(model: Any) -> list[Any]:
    return [*neurons(model, layers=[0, 2]), *builders.transcoders(model, "jumprelu", layers=[1])]


# Model, dictionaries, options, and how many of the records share their rows.
CASES: dict[str, tuple[str, Any, Callable[[Any], Any], dict[str, Any], int]] = {
    "neurons": ("gpt2", "hooked", neurons, {}, 3),
    "parallel blocks": ("pythia", "bridge", neurons, {}, 3),
    "a post-norm": ("gemma2", "hooked", neurons, {}, 3),
    "tangents": ("llama", "hooked", lambda model: neurons(model, gate="tangent"), {}, 3),
    "a mixture": ("qwen3", "hooked", mixture, {}, 2),
    "a mixture, Jacobian": ("gpt2", "hooked", lambda m: mixture(m)[:2], {"mlp": "jacobian"}, 2),
    "linear norms": ("gpt2", "bridge", mixture, {"norms": "linear"}, 2),
    "all linear": ("llama", "hooked", mixture, {"norms": "linear", "attention": "linear"}, 2),
    "reference": ("gemma2", "hooked", mixture, {"engine": "reference"}, 2),
    "skips": ("llama", "hooked", dense_skips, {}, 3),
    "cross-layer": ("gpt2", "hooked", dense_cross_layer, {}, 3),
    "autoencoders": ("gpt2", "hooked", dense_autoencoders, {}, 3),
    "parts of a dictionary": ("gpt2", "hooked", half_on, {}, 2),
}


def pair(case: str) -> tuple[ReplacementModel, dict[str, Any], int]:
    name, kind, make, options, n_shared = CASES[case]
    model = cases.model(name, kind)
    return ReplacementModel(model, make(model)), options, n_shared


def kinds(rm: ReplacementModel, **options: Any) -> list[type]:
    local = cases.local(rm, cases.tokens(N), check=False, **options)
    return [type(w) for f in local.sources.features for w in f.written[:1]]


def never(*counts: int) -> bool:
    return False


def of_neighbours(self: SharedRows, out: Tensor, gradients: Tensor, where: slice, pos: int) -> None:
    """Score with the activations of the neighbouring features."""
    onward = gradients if self.gain is None else gradients * self.gain[pos]
    out.addcmul_(onward @ self.rows[self.row[where]].T, self.act[where].roll(1))


def tier(cases_: Any, *quick: str) -> list[Any]:
    """Return cases; those that are not named run in the slow tier."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases_]


QUICK = set(CASES) - {"skips", "a mixture, Jacobian", "linear norms"}
WHOLE = [case for case in CASES if case != "all linear"]  # autograd for every feature; its capped graph has its rows


@pytest.mark.parametrize(
    ("case", "k"),
    [
        *(pytest.param(*p.values, 40, marks=p.marks) for p in tier(CASES, *QUICK)),
        *(pytest.param(*p.values, None, marks=p.marks) for p in tier(WHOLE, "a post-norm", "tangents", "reference")),
    ],
)
def test_graphs_of_shared_rows_are_those_of_a_vector_per_feature(case, k, monkeypatch):
    rm, options, n_shared = pair(case)

    def graph(**more: Any) -> AttributionGraph:
        return cases.attribute(rm, cases.tokens(N), TARGETS, max_features=k, rerank_every=15, **options, **more)

    shared = graph()
    assert kinds(rm, **options).count(SharedRows) == n_shared
    assert float(cases.gaps(shared).max()) < 1e-9
    monkeypatch.setattr(writes, "shares", never)
    own = graph()
    assert set(kinds(rm, **options)) == {OwnVectors}
    assert cases.difference(shared, own) < 1e-12
    assert (shared.nodes.count(NodeKind.REST) > 0) == (k is not None)


@pytest.mark.parametrize("case", tier(["neurons", "a post-norm", "autoencoders"], "a post-norm"))
def test_shared_rows_with_other_activations_give_other_graphs(case, monkeypatch):
    """Negative control, and the run-time comparison with the reference sees it."""
    rm, _, _ = pair(case)
    right = cases.attribute(rm, cases.tokens(N), TARGETS)
    assert right.manifest["engine"] == "fast"
    monkeypatch.setattr(SharedRows, "score", of_neighbours)
    wrong = cases.attribute(rm, cases.tokens(N), TARGETS, check=False)
    assert cases.difference(wrong, right) > 1e-3
    noticed = cases.attribute(rm, cases.tokens(N), TARGETS)
    assert noticed.manifest["engine"] == "reference"
    assert cases.difference(noticed, right) < 1e-9


@pytest.mark.parametrize("case", tier(["neurons", "a mixture", "autoencoders", "cross-layer"], "a mixture"))
def test_from_a_cache_and_by_head_shared_rows_are_the_same(case, monkeypatch):
    rm, options, _ = pair(case)
    _, cache = rm.model.run_with_cache(cases.tokens(N)[None])
    found = []
    for _ in range(2):
        graph = cases.attribute(rm, cases.tokens(N), 5, cache=cache, max_features=30, **options)
        local = cases.local(rm, cases.tokens(N), **options)
        n = graph.nodes.n_features
        feature = graph.node(int(graph.adjacency[n, :n].abs().argmax())).feature
        found.append((graph, local.heads(feature, 5)))
        monkeypatch.setattr(writes, "shares", never)
    (shared, loadings), (own, wanted) = found
    assert cases.difference(shared, own) < 1e-12
    assert abs(wanted.edge) > 0
    assert float((loadings.by_position - wanted.by_position).abs().max()) < 1e-12 * abs(wanted.edge)
    assert loadings.bypass == pytest.approx(wanted.bypass, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (mixture, "fast"),
        (neurons, "reference"),
        *(pytest.param(m, e, marks=pytest.mark.slow) for m in (dense_skips, dense_cross_layer) for e in ENGINES),
    ],
)
def test_contrasts_of_shared_rows_are_those_of_a_vector_per_feature(make, engine, monkeypatch):
    model = cases.model("gpt2")
    rm, prompt, baseline = ReplacementModel(model, make(model)), cases.tokens(N), cases.tokens(N, seed=3)

    def graph() -> AttributionGraph:
        return cases.attribute(rm, prompt, [5], baseline=baseline, max_features=40, rerank_every=15, engine=engine)

    shared = graph()
    local = cases.local(rm, prompt, baseline=baseline)
    assert SharedRows in {type(f.written[0]) for f in local.sources.features}
    monkeypatch.setattr(writes, "shares", never)
    own = graph()
    assert cases.difference(shared, own) < 1e-12
    assert float(cases.gaps(shared).max()) < 1e-9


# ------------------------------------------------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """Notes the largest floating-point tensor, of a width, that any operation makes or looks at."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.size = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1:] == (self.width,):
                self.size = max(self.size, tensor.numel())
        return out


def held(local: Any) -> int:
    """Return how many numbers the records hold for what features write, shared memory once."""
    tensors = [t for f in local.sources.features for w in f.written for t in vars(w).values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.ndim == 2}
    return sum(storages.values()) // 8


@pytest.mark.parametrize(("name", "n_pos"), [("gpt2", 12), ("gpt2", 20), ("gemma2", 12)])
def test_what_neurons_write_takes_their_decoder_and_not_one_per_position(name, n_pos, monkeypatch):
    model = cases.model(name)
    rm, tokens = ReplacementModel(model, neurons(model)), cases.tokens(n_pos)
    decoder = builders.D_MLP * builders.D_MODEL
    rows = n_pos * decoder  # of one layer, a vector per active neuron

    def made() -> tuple[int, int]:
        with Largest(builders.D_MODEL) as largest:
            local = cases.local(rm, tokens)
            local.attribute([5], max_features=4, batch_size=2, progress=False)
        return held(local), largest.size

    gains = 3 * n_pos * builders.D_MODEL if name == "gemma2" else 0
    kept, size = made()
    assert kept == 3 * decoder + gains
    assert size < rows / 2
    monkeypatch.setattr(writes, "shares", never)
    kept, size = made()  # negative control
    assert kept == 3 * rows
    assert size >= rows


def test_sparse_dictionaries_keep_a_vector_per_active_feature():
    rm = cases.pair("gpt2")
    local = cases.local(rm, cases.tokens(12))
    assert set(kinds(rm)) == {OwnVectors}
    assert held(local) == local.n_active * builders.D_MODEL


@pytest.mark.parametrize(
    ("n_active", "n_rows", "n_pos", "wanted"),
    [(0, 0, 5, False), (9, 9, 1, False), (18, 9, 2, True), (17, 9, 2, False), (54, 9, 12, True), (53, 9, 12, False)],
)
def test_rows_are_shared_where_half_of_the_positions_use_each(n_active, n_rows, n_pos, wanted):
    assert writes.shares(n_active, n_rows, n_pos) is wanted


# ----------------------------------------------------------------------------------------- which features get a row


def chosen_by_definition(full: AttributionGraph, total: int, every: int) -> list[str]:
    """Return the features that are chosen by influence along the rows so far, all rows of the full graph at hand."""
    n = full.nodes.n_features
    counted = torch.zeros(full.nodes.n_sources, dtype=torch.bool)
    for kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN):
        counted[full.nodes.slice_of(kind)] = True
    share = full.adjacency.abs() / full.adjacency.abs()[:, counted].sum(1, keepdim=True).clamp_min(1e-300)
    chosen: list[int] = []
    while len(chosen) < total:
        first = full.logit_weight @ share[n:, :n]
        known = torch.zeros(n, dtype=torch.bool)
        known[chosen] = True
        step, flow = first, first
        for _ in range(4):  # no path passes more features than there are dictionaries
            step = torch.where(known, step, 0) @ share[:n, :n]
            flow = flow + step
        flow = flow.clone()
        flow[chosen] = -1
        chosen += torch.argsort(flow, descending=True, stable=True)[: min(every, total - len(chosen))].tolist()
    return [full.nodes.name(i) for i in sorted(chosen)]


def names(graph: AttributionGraph) -> list[str]:
    return cases.names(graph)[: graph.nodes.n_features]


CHOSEN = ["neurons", "a post-norm", "a mixture", "parts of a dictionary", "cross-layer"]


@pytest.mark.parametrize("case", tier(CHOSEN, "neurons", "a mixture"))
def test_the_features_chosen_are_those_of_the_definition(case, monkeypatch):
    rm, options, _ = pair(case)
    full = cases.attribute(rm, cases.tokens(N), TARGETS, **options)

    def capped(**more: Any) -> list[str]:
        return names(cases.attribute(rm, cases.tokens(N), TARGETS, max_features=60, **options, **more))

    wanted = chosen_by_definition(full, 60, 7)
    assert capped(rerank_every=7) == wanted
    monkeypatch.setattr(ranking, "_BLOCK", 100)
    monkeypatch.setattr(ranking, "_WIDTH", 37)
    for batch_size in (1, 50):
        assert capped(rerank_every=7, batch_size=batch_size) == wanted
    # Negative controls: ranked once, and influence that is not handed on.
    assert capped(rerank_every=60) != wanted
    monkeypatch.setattr(ranking, "_spread", lambda result, rows, weight, totals: result.add_(float(weight.sum())))
    assert capped(rerank_every=7) != wanted


def test_of_twins_the_lower_index_is_chosen_first_wherever_blocks_are_cut(monkeypatch):
    model = builders.build("gpt2")
    half, lonely = builders.D_MLP // 2, 0
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_in[:, half:] = block.mlp.W_in[:, :half]
            block.mlp.b_in[half:] = block.mlp.b_in[:half]
            block.mlp.W_out[half:] = block.mlp.W_out[:half]
    rm = ReplacementModel(model, neurons(model))
    for width in (2**15, 37):
        monkeypatch.setattr(ranking, "_WIDTH", width)
        for k in (4, 9):
            graph = cases.attribute(rm, cases.tokens(N), 5, max_features=k, rerank_every=5, check=False)
            features = {(n.layer, n.pos, n.index) for n in map(graph.node, range(graph.nodes.n_features))}
            for layer, pos, index in features:
                assert index < half or (layer, pos, index - half) in features
                lonely += index < half and (layer, pos, index + half) not in features
    assert lonely > 0  # negative control: pairs were torn apart

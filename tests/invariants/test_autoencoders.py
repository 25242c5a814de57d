"""Autoencoders as nodes, alone and mixed with transcoders: contracts 1, 2 and 5, at every site, on every class."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens.dictionaries.points import Place
from circuit_lens.graph.nodes import Node, NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import autoencoders, builders
from tests.autoencoders import SAE_KINDS, FrozenWithSites
from tests.invariants import cases

# Autoencoders (kind, hook) and layers with transcoders; together every kind and every hook.
MIXES: dict[str, tuple[list[tuple[Any, str]], tuple[int, ...]]] = {
    "stream": ([("standard", "blocks.1.hook_resid_pre"), ("topk", "blocks.1.hook_resid_post")], ()),
    "neighbours": ([("jumprelu", "blocks.0.hook_resid_post"), ("gated", "blocks.1.hook_resid_pre")], ()),
    "attention": ([("abstopk", "blocks.1.hook_attn_out"), ("gated", "blocks.2.attn.hook_z")], ()),
    "both in one attention": ([("standard", "blocks.1.hook_attn_out"), ("topk", "blocks.1.attn.hook_z")], (2,)),
    "mlp out": ([("jumprelu", "blocks.1.hook_mlp_out"), ("standard", "blocks.0.attn.hook_z")], (2,)),
    "all in one layer": (
        [
            ("standard", "blocks.1.hook_resid_pre"), ("gated", "blocks.1.attn.hook_z"),
            ("topk", "blocks.1.hook_resid_mid"), ("jumprelu", "blocks.1.hook_resid_post"),
        ],
        (0, 1),
    ),
    "first and last": ([("standard", "blocks.0.hook_resid_pre"), ("jumprelu", "blocks.2.hook_resid_post")], (1,)),
}  # fmt: skip
SKIP = "jumprelu_skip"


def fits(mix: str, name: str, kind: str) -> bool:
    """Whether every hook of a mixture exists, and can be written, on the class."""
    return not any(hook.endswith("resid_mid") for _, hook in MIXES[mix][0]) or (kind == "hooked" and name != "pythia")


def tier(name: str, kind: str, mix: str) -> Any:
    """Return a case; in the quick tier every mixture on one class, and on the others those that reach most there."""
    few = ("both in one attention", "first and last") if kind == "hooked" else ("first and last",)
    quick = (name, kind) == ("gpt2", "hooked") or mix in few
    return pytest.param(name, kind, mix, marks=() if quick else pytest.mark.slow)


CASES = [tier(n, k, mix) for n, k in cases.CLASSES for mix in MIXES if fits(mix, n, k)]


def modules(model: Any, mix: str) -> list[Any]:
    """Return the SAELens modules of a mixture."""
    saes, layers = MIXES[mix]
    widths = {True: model.cfg.n_heads * model.cfg.d_head, False: model.cfg.d_model}
    made = [
        autoencoders.autoencoder(kind, hook, widths[hook.endswith("hook_z")], seed=i)
        for i, (kind, hook) in enumerate(saes)
    ]
    return [*made, *(builders.transcoders(model, SKIP, layers=layers) if layers else [])]


def pair(name: Any, kind: Any, mix: str) -> tuple[ReplacementModel, list[Any], Tensor]:
    model = cases.model(name, kind)
    given = modules(model, mix)
    return ReplacementModel(model, given), given, cases.tokens(6, seed=len(mix))


def added(hand: FrozenWithSites, node: Node) -> dict[str, Tensor] | None:
    """Return what a source's contribution is, behind hooks, without the engine; None for biases."""
    site, pos = node.site, node.pos
    sae = hand.saes.get(site, hand.transcoders.get(site))
    match node.kind:
        case NodeKind.TOKEN:
            name, vector = "hook_embed", hand.clean["hook_embed"][pos]
        case NodeKind.FEATURE:
            assert sae is not None
            name, vector = site, float(node.activation or 0.0) * autoencoders.decoder(sae)[node.index]
        case NodeKind.ERROR if site in hand.saes:
            x = hand.flat(site, hand.clean)
            name = site
            vector = (x - autoencoders.encode(sae, x) @ autoencoders.decoder(sae) - sae.b_dec)[pos]
        case NodeKind.ERROR if site in hand.transcoders:
            assert sae is not None
            name, vector = site, (hand.clean[site] - sae(hand.clean[sae.cfg.metadata.hook_name]))[pos]
        case NodeKind.BIAS if node.site.startswith("dictionary hook") or node.site == "dictionary attn.hook_z":
            name = f"blocks.{node.layer}.{node.site.removeprefix('dictionary ')}"
            vector = hand.saes[name].b_dec
        case _:
            return None
    like = hand.clean.get(name)
    if like is None:
        like = hand.clean["hook_embed"]
    out = torch.zeros_like(like)
    out[pos] = vector.view(out[pos].shape)
    return {name: out}


def values(hand: FrozenWithSites, graph: Any, behind: dict[str, Tensor]) -> Tensor:
    pre, logits = hand.run({}, behind)
    found = []
    for row in graph.nodes.rows.tolist():
        node = graph.node(row)
        table = logits if node.kind is NodeKind.LOGIT else pre[node.site]
        found.append(table[node.pos, node.index])
    return torch.stack(found)


@pytest.mark.parametrize(("name", "kind", "mix"), CASES)
def test_adding_a_source_once_more_moves_every_target_by_its_column(name, kind, mix):
    rm, given, tokens = pair(name, kind, mix)
    graph = cases.attribute(rm, tokens, [5, 17])
    assert graph.manifest["settings"]["mlp"] == "jacobian"
    hand = FrozenWithSites(rm.model, given, tokens)
    before, scale = values(hand, graph, {}), graph.adjacency.abs().amax(1).clamp_min(1e-6)
    assert ((before - graph.target_value).abs() / scale).max() < cases.rounding(name, kind)
    rng, checked = random.Random(0), set()
    for node_kind in (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.BIAS):
        ids = list(cases.ids(graph, node_kind))
        for node in (graph.node(i) for i in rng.sample(ids, min(8, len(ids)))):
            behind = added(hand, node)
            if behind is None:
                continue
            checked.add((node.kind, node.site))
            moved = values(hand, graph, behind) - before
            assert ((moved - graph.adjacency[:, node.id]).abs() / scale).max() < cases.rounding(name, kind), node
    assert len(checked) > 4


@pytest.mark.parametrize(("name", "kind", "mix"), CASES)
def test_rows_sum_to_their_targets(name, kind, mix):
    rm, _, tokens = pair(name, kind, mix)
    graph = cases.attribute(rm, tokens, [5, 17])
    assert cases.gaps(graph).max() < (1e-5 if cases.rounding(name, kind) > 1e-8 else 1e-10)
    if cases.ids(graph, NodeKind.BIAS):
        part = graph.nodes.slice_of(NodeKind.BIAS)
        assert graph.adjacency[:, part].abs().max() > 1e-6  # control: biases are needed for it


@pytest.mark.parametrize(("name", "kind", "mix"), CASES)
def test_both_engines_agree(name, kind, mix):
    rm, _, tokens = pair(name, kind, mix)
    fast, slow = (cases.attribute(rm, tokens, [5, 17], engine=e, check=False) for e in ("fast", "reference"))
    assert cases.difference(fast, slow) < (1e-12 if kind == "hooked" else 2e-6)


@pytest.mark.parametrize("mix", ["stream", "first and last", "all in one layer"])
def test_nothing_before_a_residual_autoencoder_reaches_what_is_behind_it(mix):
    rm, _, tokens = pair("llama", "hooked", mix)
    graph = cases.attribute(rm, tokens, [5])
    site = next(d for d in reversed(rm.dictionaries) if "resid" in d.hook_in)
    end = Place.POST_WRITE.at(site.layer) if "post" in site.hook_in else Place.PRE_WRITE.at(site.layer)
    logit = graph.adjacency[-1]
    early = [
        i for i in range(graph.nodes.n_sources)
        if (n := graph.node(i)).site != site.site
        and n.kind in (NodeKind.TOKEN, NodeKind.FEATURE) and Place.MLP_WRITE.at(n.layer) < end
    ]  # fmt: skip
    assert early
    assert logit[early].abs().max() == 0
    own = [i for i in cases.ids(graph, NodeKind.FEATURE) if graph.node(i).site == site.site]
    assert logit[own].abs().max() > 0


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
@pytest.mark.parametrize(("apply_b_dec", "rescale"), [(True, True), (False, False)])
def test_the_arithmetic_is_saelens(kind, hook, apply_b_dec, rescale):
    from circuit_lens.dictionaries.adapt import adapt

    sae = autoencoders.autoencoder(kind, hook, 32, apply_b_dec=apply_b_dec, rescale=rescale, seed=3)
    d, x = adapt(sae), torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pre = d.pre_acts(x)
    acts = d.activate(pre, x)
    heads = hook.endswith("hook_z")
    given = x.view(50, 4, 8) if heads else x
    assert (acts - sae.encode(given)).abs().max() < 1e-12
    assert (acts != 0).any(0).sum() > 3
    recon = sae.decode(sae.encode(given)).flatten(1)
    assert (d.decode(acts)[:, 0] - recon).abs().max() < 1e-12
    index = torch.arange(d.d_sae)
    rows, bias = d.encoder_rows(index, x.dtype), d.encoder_bias(index, x.dtype)
    assert (x @ rows.T + bias - pre).abs().max() < 1e-12
    assert (acts @ d.decoder_rows(index, x.dtype)[:, 0] + d.decoder_bias(x.dtype)[0] - recon).abs().max() < 1e-12
    thresholds = d.thresholds()
    if thresholds is not None:
        assert torch.equal(acts != 0, pre > thresholds)


@pytest.mark.parametrize(
    ("name", "mix"),
    [("gpt2", "all in one layer"), ("gemma2", "attention"), ("pythia", "mlp out"), ("qwen3", "both in one attention")],
)
def test_heads_and_bypass_add_up_to_the_edge(name, mix):
    rm, _, tokens = pair(name, "hooked", mix)
    local = cases.local(rm, tokens)
    graph = local.attribute([5], progress=False)
    rng = random.Random(1)
    features = [graph.node(i) for i in cases.ids(graph, NodeKind.FEATURE)]
    sites = dict.fromkeys(node.site for node in features)
    targets = [rng.choice([n for n in features if n.site == site and n.pos > 2]) for site in sites]
    largest = 0.0
    for target in [*targets, graph.node(graph.nodes.n_sources)]:
        row = graph.nodes.row_of(target.id)
        edges = graph.adjacency[row]
        strongest = edges.abs().topk(min(6, int((edges != 0).sum()))).indices.tolist()
        for source in strongest:
            loadings = local.heads(graph.node(source), target)
            assert abs(loadings.edge - float(edges[source])) < 1e-9 * float(edges.abs().max()), (source, target)
            largest = max(largest, float(loadings.heads.abs().max()))
    assert largest > 1e-6  # control: heads carry something

"""An edit of the residual stream by the user is a node of its own, wherever it was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuit_lens.errors import ConsistencyError
from circuit_lens.graph.nodes import NodeKind
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

N, POS, LAYER = 6, 3, 1
SITES = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "attn.hook_z"]


def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
    """Overwrite one position: what came before counts no more, as in activation patching."""
    out = value.clone()
    noise = torch.randn(out[0, POS].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out[:, POS] = 2 * noise.to(out)
    return out


def fresh(name: Any, kind: Any) -> ReplacementModel:
    """Return a model of this test's own, with the shared transcoders."""
    return ReplacementModel(builders.build(name, kind), [d.module for d in cases.pair(name, kind, "skip").dictionaries])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "bridge")])
def test_an_edit_is_a_patch_node_exactly_there_however_it_was_made(name, kind, site):
    rm, tokens, at = fresh(name, kind), cases.tokens(N), f"blocks.{LAYER}.{site}"
    model = rm.model
    if at not in model.hook_dict:
        return
    assert cases.attribute(rm, tokens, 5).nodes.count("patch") == 0
    with model.hooks(fwd_hooks=[(at, edit)]), torch.no_grad():
        _, cache = model.run_with_cache(tokens[None])
    graphs = {
        "cache": cases.attribute(rm, tokens, 5, cache=cache),
        "fwd_hooks": cases.attribute(rm, tokens, 5, fwd_hooks=[(at, edit)]),
    }
    model.hook_dict[at].add_hook(edit, is_permanent=True)
    handles = list(model.hook_dict[at].fwd_hooks)
    graphs["permanent"] = cases.attribute(rm, tokens, 5)
    graphs["reference"] = cases.attribute(rm, tokens, 5, engine="reference")
    assert model.hook_dict[at].fwd_hooks == handles
    for how, graph in graphs.items():
        nodes = [graph.node(i) for i in cases.ids(graph, NodeKind.PATCH)]
        # A bridge's hook_resid_mid is what the MLP branch reads: its edit is taken back behind the branch.
        aside = kind == "bridge" and site == "hook_resid_mid"
        assert [n.pos for n in nodes] == [POS] * (2 if aside else 1), how
        assert nodes[0].layer in (LAYER, LAYER + 1)
        assert float(cases.gaps(graph).max()) < 1e-10, how
        assert float(graph.adjacency[:, nodes[0].id].abs().max()) > 1e-3
        assert cases.difference(graph, graphs["cache"]) < cases.rounding(name, kind), how
        assert graph.manifest["patches"]
    assert any(at in text for text in graphs["fwd_hooks"].manifest["user_hooks"])
    own = getattr(model.hook_dict[at], "name", at)
    assert {at, own} & set(graphs["permanent"].manifest["user_hooks"])
    assert graphs["cache"].manifest["user_hooks"] == []


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "bridge")])
def test_an_edit_of_the_embedding_is_in_the_token_node(name, kind):
    rm, tokens = cases.pair(name, kind), cases.tokens(N)
    local = cases.local(rm, tokens, fwd_hooks=[("hook_embed", edit)])
    graph = local.attribute(5, progress=False)
    assert graph.nodes.count("patch") == 0
    assert float(cases.gaps(graph).max()) < 1e-10
    clean = cases.local(rm, tokens)
    changed = (local.frozen.tokens - clean.frozen.tokens).norm(dim=-1) > 1e-5
    assert changed.nonzero()[:, 0].tolist() == [POS]


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("pythia", "bridge"), ("gemma2", "hooked")])
def test_an_edit_of_an_mlp_output_is_in_its_error_node(name, kind):
    rm, tokens, at = cases.pair(name, kind), cases.tokens(N), f"blocks.{LAYER}.hook_mlp_out"
    vector = torch.linspace(-1, 1, builders.D_MODEL, dtype=torch.float64)

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        out = value.clone()
        out[:, POS] += vector
        return out

    def error(local: Any) -> torch.Tensor:
        return next(p.vectors for p in local.sources.points if p.kind is NodeKind.ERROR and p.layer == LAYER)

    local = cases.local(rm, tokens, fwd_hooks=[(at, add)])
    moved = error(local) - error(cases.local(rm, tokens))
    assert float((moved[POS] - vector).abs().max()) < 1e-6
    assert float(moved[torch.arange(N) != POS].abs().max()) < 1e-6
    graph = local.attribute(5, progress=False)
    assert graph.nodes.count("patch") == 0
    assert float(cases.gaps(graph).max()) < 1e-10


@pytest.mark.parametrize(
    ("at", "says"), [("blocks.1.ln2.hook_normalized", "edits it there"), ("ln_final", "last norm")]
)
@pytest.mark.parametrize("kind", builders.KINDS)
def test_an_edit_that_no_source_explains_is_refused(kind, at, says):
    rm, tokens = cases.pair("gpt2", kind), cases.tokens(N)
    at = at if at.startswith("blocks") else f"{at}.hook_normalized"
    with pytest.raises(ConsistencyError, match=says):
        cases.attribute(rm, tokens, 5, fwd_hooks=[(at, edit)])
    assert cases.attribute(rm, tokens, 5, fwd_hooks=[(at, lambda value, hook: value)]).n_edges > 0


def test_the_users_hooks_see_the_run_once_and_nothing_of_ours():
    rm, seen = fresh("gpt2", "hooked"), []
    point = rm.model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(lambda value, hook: seen.append(float(value.sum())), is_permanent=True)
    graph = cases.attribute(rm, cases.tokens(N), 5)
    assert graph.manifest["checks"]["fast_vs_reference"] < 1e-12
    assert len(seen) == 1

"""Which dictionaries may stand on one model together, and what is refused, with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from circuit_lens import ReplacementModel, neurons
from circuit_lens.errors import DictionaryError, HookError
from circuit_lens.interop import neuronpedia
from tests import autoencoders, builders
from tests.invariants import cases
from tests.invariants.test_autoencoders import MIXES, modules


def sae(hook: str, width: int = 32, **options: Any) -> Any:
    return autoencoders.autoencoder("standard", hook, width, **options)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "the same place twice": (
        lambda m: [sae("blocks.1.hook_resid_pre"), sae("blocks.1.hook_resid_pre", seed=1)],
        DictionaryError, "two dictionaries write to the hook_resid_pre of layer 1",
    ),
    "a transcoder and an autoencoder of one MLP output": (
        lambda m: [sae("blocks.1.hook_mlp_out"), *builders.transcoders(m, layers=[1])],
        DictionaryError, "two dictionaries write to the MLP output of layer 1",
    ),
    "neurons and a transcoder": (
        lambda m: [*neurons(m, layers=[1]), *builders.transcoders(m, layers=[1])],
        DictionaryError, "two dictionaries write to the MLP output of layer 1",
    ),
    "a norm's output": (lambda m: sae("blocks.1.ln2.hook_normalized"), DictionaryError, "may stand at hook_mlp_out"),
    "no such layer": (lambda m: sae("blocks.7.hook_resid_pre"), DictionaryError, r"layers 0\.\.2"),
    "no such hook": (lambda m: sae("blocks.1.hook_resid_presto"), DictionaryError, "may stand at"),
    "another width": (lambda m: sae("blocks.1.hook_resid_pre", 48), DictionaryError, "width 32"),
    "heads of another width": (lambda m: sae("blocks.1.attn.hook_z", 48), DictionaryError, "4 heads of 8, width 32"),
    "a dictionary that reads one hook and writes another": (
        lambda m: _renamed(sae("blocks.1.hook_resid_pre"), hook_name_out="blocks.1.hook_resid_post"),
        DictionaryError, "an SAE writes where it reads",
    ),
    "NaN": (lambda m: _with_nan(sae("blocks.1.hook_resid_pre")), DictionaryError, "W_dec .* NaN or infinity"),
    "NaN in a transcoder": (
        lambda m: _with_nan(builders.transcoders(m, layers=[1])[0]), DictionaryError, "W_dec .* NaN or infinity",
    ),
    "normalised activations": (
        lambda m: _configured(sae("blocks.1.hook_resid_pre"), normalize_activations="layer_norm"),
        DictionaryError, "fold the normalisation",
    ),
    "a skip that would read before an autoencoder writes": (
        lambda m: [sae("blocks.1.hook_resid_mid"),
                   *builders.transcoders(m, "skip", hook_in="hook_resid_mid", layers=[1])],
        DictionaryError, "hook_mlp_in",
    ),
    "k above the number of features": (
        lambda m: _configured(autoencoders.autoencoder("topk", "blocks.1.hook_resid_pre", 32, d_sae=4), k=5),
        DictionaryError, "k of the topk SAE .* is 5; it has 4 features",
    ),
    "something else": (lambda m: "gpt2-small-res-jb", DictionaryError, "str is no dictionary"),
}  # fmt: skip


def _renamed(module: Any, **names: str) -> Any:
    for name, value in names.items():
        setattr(module.cfg.metadata, name, value)
    return module


def _configured(module: Any, **settings: Any) -> Any:
    for name, value in settings.items():
        setattr(module.cfg, name, value)
    return module


def _with_nan(module: Any) -> Any:
    with torch.no_grad():
        module.W_dec[3, 2] = float("nan")
    return module


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_with_the_reason(case: str) -> None:
    make, error, text = REFUSED[case]
    model = cases.model("gpt2")
    with pytest.raises(error, match=text):
        ReplacementModel(model, make(model))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_autoencoder_that_a_bridge_would_ignore_is_refused(name: Any) -> None:
    with pytest.raises(HookError, match="does not reach the residual stream"):
        ReplacementModel(cases.model(name, "bridge"), sae("blocks.1.hook_resid_mid"))
    ReplacementModel(cases.model(name, "hooked"), sae("blocks.1.hook_resid_mid"))  # control


def test_a_parallel_block_has_no_middle() -> None:
    with pytest.raises(HookError, match="parallel"):
        ReplacementModel(cases.model("pythia"), sae("blocks.1.hook_resid_mid"))


def test_heads_need_attention_as_linear_maps() -> None:
    rm = ReplacementModel(cases.model("gpt2"), sae("blocks.1.attn.hook_z"))
    with pytest.raises(Exception, match="attention='frozen'"):
        cases.attribute(rm, cases.tokens(), [5], attention="linear")
    assert cases.attribute(rm, cases.tokens(), [5]).nodes.n_features


def test_contrasts_of_autoencoders_and_gated_neurons_are_refused() -> None:
    rm = ReplacementModel(cases.model("gpt2"), sae("blocks.1.hook_resid_pre"))
    with pytest.raises(DictionaryError, match="baseline="):
        cases.attribute(rm, cases.tokens(6), [5], baseline=cases.tokens(6, seed=1))
    gated = ReplacementModel(cases.model("llama"), neurons(cases.model("llama")))
    with pytest.raises(DictionaryError, match="a gate has another value"):
        cases.attribute(gated, cases.tokens(6), [5], baseline=cases.tokens(6, seed=1))
    plain = ReplacementModel(cases.model("gpt2"), neurons(cases.model("gpt2")))
    graph = cases.attribute(plain, cases.tokens(6), [5], baseline=cases.tokens(6, seed=1))
    assert cases.gaps(graph).max() < 1e-9


def test_default_of_mlps_without_dictionary_is_the_jacobian_as_soon_as_an_autoencoder_is_there() -> None:
    model, tokens = cases.model("gpt2"), cases.tokens(6)
    with_sae = cases.attribute(ReplacementModel(model, sae("blocks.1.hook_resid_pre")), tokens, [5])
    without = cases.attribute(ReplacementModel(model, builders.transcoders(model, layers=[1])), tokens, [5])
    assert with_sae.manifest["settings"]["mlp"] == "jacobian"
    assert without.manifest["settings"]["mlp"] == "error"
    asked = cases.attribute(ReplacementModel(model, sae("blocks.1.hook_resid_pre")), tokens, [5], mlp="error")
    assert asked.manifest["settings"]["mlp"] == "error"
    assert cases.gaps(asked).max() < 1e-10


def test_ids_are_unique_in_every_export(tmp_path: Any) -> None:
    model = cases.model("gpt2")
    rm = ReplacementModel(model, modules(model, "all in one layer"))
    assert len({d.layer for d in rm.dictionaries}) < len(rm.dictionaries) == len(MIXES["all in one layer"][0]) + 2
    graph = cases.attribute(rm, cases.tokens(6), [5, 17])
    assert len(set(cases.names(graph))) == len(graph.nodes)
    few = cases.attribute(rm, cases.tokens(6), [5, 17], max_features=3)
    kept = [few.node(i) for i in range(few.nodes.n_features)]
    assert all(graph.node(node.name).feature == node.feature for node in kept)  # names do not depend on what is kept
    document = json.loads(json.dumps(neuronpedia.to_json(graph, scan="test")))
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] for node in document["nodes"]})
    features = [n for n in document["nodes"] if n["feature_type"] == "cross layer transcoder"]
    by_number = {(n["layer"], n["feature"]): n["node_id"].rsplit("_", 1)[0] for n in features}
    assert len(set(by_number.values())) == len(by_number)  # one number stands for one feature of one site
    graph.save(tmp_path / "g.safetensors")
    from circuit_lens import load_graph

    assert cases.names(load_graph(tmp_path / "g.safetensors")) == cases.names(graph)


def test_a_cache_with_the_names_filter_is_enough() -> None:
    model = cases.model("gpt2")
    rm, tokens = ReplacementModel(model, modules(model, "all in one layer")), cases.tokens(6)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=rm.names_filter())
    from_cache = cases.attribute(rm, tokens, [5], cache=cache)
    assert cases.difference(from_cache, cases.attribute(rm, tokens, [5])) < 1e-12
    assert {d.site for d in rm.dictionaries} == set(rm.feature_acts(cache))


@pytest.mark.parametrize("hook", ["blocks.1.hook_attn_out", "blocks.1.attn.hook_z"])
def test_an_edit_where_an_autoencoder_of_attention_reads_is_refused(hook: str) -> None:
    rm = ReplacementModel(cases.model("gpt2"), sae(hook))
    edit = [(hook, lambda value, hook: value + 0.3)]
    with pytest.raises(Exception, match="something edits it there"):
        cases.attribute(rm, cases.tokens(6), [5], fwd_hooks=edit)
    stream = [("blocks.1.hook_resid_pre", lambda value, hook: value + 0.3)]
    assert cases.gaps(cases.attribute(rm, cases.tokens(6), [5], fwd_hooks=stream)).max() < 1e-10


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"])
def test_an_edit_of_the_stream_is_what_an_autoencoder_there_reads(hook: str) -> None:
    rm, tokens = ReplacementModel(cases.model("gpt2"), sae(hook)), cases.tokens(6)
    step = torch.linspace(-1, 1, 32, dtype=torch.float64)
    graph = cases.attribute(rm, tokens, [5], fwd_hooks=[(hook, lambda value, hook: value + step)])
    patches = list(cases.ids(graph, "patch"))
    assert patches
    assert cases.gaps(graph).max() < 1e-10
    n = graph.nodes.n_features
    assert graph.adjacency[:n, patches].abs().max() > 1e-3  # it is read
    assert graph.adjacency[n:, patches].abs().max() == 0  # and reaches nothing else

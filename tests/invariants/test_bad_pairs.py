"""Bad prompts, bad dictionaries, bad pairs: each a clear error that says what was given and what to do."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import nn

from circuit_lens.errors import ConsistencyError, DictionaryError, HookError, ReconstructionError, TokensError
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ("   ", "empty"),
    (torch.zeros(0, dtype=torch.long), "empty"),
    ([], "empty"),
    (torch.zeros(65, dtype=torch.long), "65 tokens, the model's context holds 64"),
    (torch.tensor([1, 64]), "64 is outside the vocabulary of 64"),
    (torch.tensor([-1]), "-1 is outside"),
    (torch.tensor([1.0, 2.0]), "must be integers, not torch.float32"),
    (torch.tensor([True, False]), "must be integers"),
    (torch.ones(2, 3, dtype=torch.long), r"shape \(2, 3\); one prompt at a time"),
    ("Dallas is zorblax", "does not know 'zorblax'"),
    ("Dalas", "nearest: Dallas"),
]


@pytest.mark.parametrize("case", range(len(PROMPTS)))
@pytest.mark.parametrize("kind", builders.KINDS)
def test_what_is_no_prompt_is_refused(kind, case):
    prompt, says = PROMPTS[case]
    rm = cases.pair("gpt2", kind)
    with pytest.raises(TokensError, match=says):
        rm.attribute(prompt)
    assert cases.attribute(rm, "Dallas is", 5).prompt == "Dallas is"


def test_without_annotation_checks_wrong_lists_are_refused_and_python_random_is_kept():
    """The tests check annotations, users do not: the same errors must come without that, and nothing is drawn."""
    code = """
import random, torch
from circuit_lens import DictionaryError, ReplacementModel, TokensError
from tests import builders
rm = ReplacementModel(builders.build("gpt2"), builders.transcoders(builders.build("gpt2")))
for bad in ([1.5, 2.0], ["Dallas", "Austin"], [[1, 2], [3]], [None]):
    try:
        rm.attribute(bad, progress=False)
    except TokensError as error:
        print("refused", error)
try:
    ReplacementModel(builders.build_hf("gpt2"), [])
except DictionaryError as error:
    print("refused", error)
before = random.getstate(), torch.get_rng_state()
rm.attribute([5, 6, 7, 8], progress=False, engine="reference", min_explained=None)
print("kept", random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1]))
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.count("refused") == 5, out.stdout + out.stderr
    assert "GPT2LMHeadModel is no hooked model; give a HookedTransformer or a TransformerBridge" in out.stdout
    assert "kept True" in out.stdout, out.stderr


def changed(change: Any) -> Any:
    """Return a transcoder of the first layer with its metadata or configuration changed."""
    sae = builders.transcoders(cases.model("gpt2"), layers=(0,))[0]
    change(sae.cfg)
    return sae


def standard() -> Any:
    cfg = StandardSAEConfig(d_in=32, d_sae=8, dtype="float64", device="cpu", apply_b_dec_to_input=False)
    cfg.metadata.hook_name = "blocks.0.ln2.hook_normalized"
    return StandardSAE(cfg)


def wide() -> Any:
    sae = builders.transcoders(cases.model("gpt2"), layers=(0,))[0]
    sae.W_enc = nn.Parameter(torch.randn(48, 64, dtype=torch.float64))
    return sae


def renamed(name: str, value: Any) -> Any:
    return lambda: changed(lambda cfg: setattr(cfg.metadata, name, value))


DICTIONARIES: list[tuple[Any, type[Exception], str]] = [
    (standard, DictionaryError, "an SAE at 'blocks.0.ln2.hook_normalized' cannot be attributed"),
    (wide, DictionaryError, "maps width 48 to 32, the model's residual stream has width 32"),
    (lambda: object(), DictionaryError, "object is no dictionary"),
    (lambda: changed(lambda c: setattr(c, "normalize_activations", "layer_norm")), DictionaryError, "fold the normal"),
    (lambda: changed(lambda c: setattr(c, "reshape_activations", "hook_z")), DictionaryError, "must be 'none'"),
    (renamed("hook_name", "blocks.0.attn.hook_z"), DictionaryError, "it may read ln2.hook_normalized"),
    (renamed("hook_name", "embed"), DictionaryError, "not of the form 'blocks"),
    (renamed("hook_name", None), DictionaryError, "names no input or output hook"),
    (renamed("hook_name", "blocks.1.ln2.hook_normalized"), DictionaryError, "reads and writes one layer"),
    (renamed("hook_name_out", "blocks.0.hook_resid_post"), DictionaryError, "it may write hook_mlp_out"),
]


@pytest.mark.parametrize("case", range(len(DICTIONARIES)))
def test_what_is_no_fitting_dictionary_is_refused(case):
    make, error, says = DICTIONARIES[case]
    with pytest.raises(error, match=says):
        ReplacementModel(cases.model("gpt2"), [make()])
    assert len(ReplacementModel(cases.model("gpt2"), [changed(lambda cfg: None)]).dictionaries) == 1


def test_pairs_that_do_not_fit_are_refused():
    saes = builders.transcoders(cases.model("gpt2"))
    with pytest.raises(DictionaryError, match="two dictionaries write to the MLP output of layer 1"):
        ReplacementModel(cases.model("gpt2"), [*saes, saes[1]])
    with pytest.raises(DictionaryError, match=r"is for layer 2, the model has layers 0..1"):
        ReplacementModel(builders.build("gpt2", n_layers=2), saes)
    middle = builders.transcoders(cases.model("gpt2"), hook_in="hook_resid_mid")
    with pytest.raises(HookError, match="parallel attention and MLP"):
        ReplacementModel(cases.model("pythia"), middle)


def exact(model: Any, layer: int) -> Any:
    """Return a transcoder at ``mlp.hook_in`` that reconstructs the MLP: its ridge regression, with a skip."""
    return builders.transcoders(model, "skip", hook_in="mlp.hook_in", d_sae=256, l0=64, layers=(layer,))[0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_folded_weights_are_found_and_the_loader_is_named(name):
    """Folding moves the norm's gain, here a large one as trained models have, out of what the transcoder reads."""
    model = builders.build(name)
    for layer, block in enumerate(model.blocks):
        rng = torch.Generator().manual_seed(layer)
        block.ln2.w.data = 2 * torch.randn(builders.D_MODEL, generator=rng, dtype=torch.float64).exp()
    saes = [exact(model, layer) for layer in range(3)]
    tokens = cases.tokens(12, seed=4)
    right = ReplacementModel(model, saes).local(tokens)
    assert min(right.explained.values()) > 0.2
    folded = copy.deepcopy(model)
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    with torch.no_grad():
        assert float((folded(tokens[None]) - model(tokens[None])).abs().max()) < 1e-4
    # A single layer may still explain a little; of a set, some layer is worse than nothing.
    with pytest.raises(ReconstructionError, match="from_pretrained_no_processing"):
        ReplacementModel(folded, saes).local(tokens)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "bridge")])
def test_a_wrong_input_hook_is_found_and_the_right_one_is_named(name, kind):
    model, tokens = cases.model(name, kind), cases.tokens(12, seed=4)
    for layer in range(3):
        sae = exact(model, layer)
        sae.cfg.metadata.hook_name = f"blocks.{layer}.ln2.hook_normalized"
        with pytest.raises(ReconstructionError, match=rf"Reading 'blocks.{layer}.mlp.hook_in' it explains"):
            ReplacementModel(model, [sae]).local(tokens)


@pytest.mark.parametrize("kind", builders.KINDS)
def test_activations_that_are_no_numbers_are_refused(kind):
    model = builders.build("gpt2", kind)
    rm = ReplacementModel(model, builders.transcoders(model))
    with pytest.raises(ConsistencyError, match=r"NaN or infinite"):
        rm.attribute(cases.tokens(5), fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook: v * float("nan"))])
    saes = builders.transcoders(model)
    bound = ReplacementModel(model, saes)
    saes[1].W_enc.data[0, 0] = float("inf")
    with pytest.raises(DictionaryError, match=r"W_enc of 'blocks.1.hook_mlp_out' holds NaN or infinity"):
        ReplacementModel(model, saes)
    with pytest.raises(ConsistencyError, match=r"activations of blocks.1.hook_mlp_out holds NaN"):
        bound.attribute(cases.tokens(5))

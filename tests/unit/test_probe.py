"""What a cache alone cannot tell is told by the short run at binding, or by the cache's last norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from sae_lens import Transcoder, TranscoderConfig

import circuit_lens as cl
from circuit_lens.dictionaries.saelens import SaelensTranscoder
from tests import builders
from tests.invariants import cases
from tests.unit.test_review import SHAPE, bridge


def test_logits_that_do_not_follow_from_the_stream_refuse_every_cache():
    config = transformers.GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=4.0)
    model = bridge(config, transformers.GraniteForCausalLM)
    rm, tokens = cl.ReplacementModel(model, []), cases.tokens(6)
    cache = model.run_with_cache(tokens[None])[1]
    with pytest.raises(cl.ConsistencyError, match="no graph can be made from a cache"):
        rm.attribute(tokens, cache=cache)


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize("kind", builders.KINDS)
def test_an_edit_of_the_last_norm_is_refused_also_from_the_least_cache(kind):
    model = builders.build("llama", kind)
    rm, tokens = cl.ReplacementModel(model, []), cases.tokens(6)
    names = rm.names_filter()
    plain = model.run_with_cache(tokens[None], names_filter=names)[1]
    assert rm.attribute(tokens, cache=plain).nodes.n_features == 0
    model.hook_dict["ln_final.hook_normalized"].add_hook(lambda value, hook: 2 * value)
    edited = model.run_with_cache(tokens[None], names_filter=names)[1]
    with pytest.raises(cl.ConsistencyError, match="ln_final"):
        rm.attribute(tokens, cache=edited)


def test_the_short_run_is_not_shown_to_the_users_hooks():
    model, seen = builders.build("gpt2"), []
    dictionaries = builders.transcoders(model)
    model.add_perma_hook("blocks.1.hook_resid_pre", lambda value, hook: seen.append(value.shape))
    cl.ReplacementModel(model, dictionaries)
    assert seen == []


def test_an_edited_mlp_output_is_no_reason_to_suspect_the_input_hook():
    model = builders.build("gpt2")
    rm = cl.ReplacementModel(model, builders.transcoders(model))
    halve = ("blocks.1.hook_mlp_out", lambda value, hook: 0.5 * value)
    graph = rm.attribute(cases.tokens(8), fwd_hooks=[halve], min_explained=-100.0)
    assert graph.manifest["user_hooks"]


def transcoder(**flags):
    return Transcoder(TranscoderConfig(d_in=32, d_out=32, d_sae=8, apply_b_dec_to_input=False, **flags))


def test_weights_that_do_not_fit_and_flags_without_meaning_are_refused():
    named = transcoder()
    named.cfg.metadata.hook_name, named.cfg.metadata.hook_name_out = (
        "blocks.0.ln2.hook_normalized",
        "blocks.0.hook_mlp_out",
    )
    assert SaelensTranscoder(named).d_sae == 8
    named.cfg.apply_b_dec_to_input = True
    with pytest.raises(cl.DictionaryError, match="apply_b_dec_to_input"):
        SaelensTranscoder(named)
    named.cfg.apply_b_dec_to_input = False
    named.b_dec = torch.nn.Parameter(torch.zeros(31))
    with pytest.raises(cl.DictionaryError, match="b_dec"):
        SaelensTranscoder(named)


def test_numpy_integers_are_token_ids_and_indices_are_held_to_the_dictionary():
    model = builders.build("gpt2")
    rm = cl.ReplacementModel(model, builders.transcoders(model))
    local = rm.local(cases.tokens(6))
    assert local.resolve(np.int64(5))[0].index == 5
    with pytest.raises(cl.NodeNotFoundError, match="has features 0"):
        local.row(cl.Feature(0, 3, 10_000))

"""What ships does what the report says: the answers, where the state is known, and the way from Dallas to Austin."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from sae_lens.saes.transcoder import JumpReLUTranscoder

from circuit_lens.zoo import evaluate, loading, templates
from circuit_lens.zoo.batches import held_out_text
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.dictionary_figures import active_features, measure_dictionaries, mediation
from circuit_lens.zoo.report import BUDGET_BYTES, REPORT
from circuit_lens.zoo.tokenizer import build_vocabulary

FRESH_TEXT = 424242


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def model():
    return loading.load_model("capitals")


@pytest.fixture(scope="module")
def dictionaries():
    return loading.load_dictionaries("capitals")


@pytest.fixture(scope="module")
def shortcut():
    return loading.load_model("capitals-shortcut"), loading.load_dictionaries("capitals-shortcut")


def test_both_bundled_models_are_there_and_another_name_is_an_error_that_lists_them():
    assert loading.names() == ["capitals", "capitals-shortcut"]
    with pytest.raises(ValueError, match=r"capitol.*capitals, capitals-shortcut"):
        loading.load_model("capitol")
    with pytest.raises(ValueError, match=r"Valid: .*plt.*neurons"):
        loading.load_dictionaries("capitals", "transcoder")
    with pytest.raises(ValueError, match=r"circuit_lens\.neurons"):
        loading.load_dictionaries("capitals", "neurons")


def test_loading_is_quiet_offline_and_leaves_the_random_state():
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = loading.load_model("capitals")
        loading.load_dictionaries("capitals")
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


def test_the_vocabulary_is_the_corpus_own(corpus, model):
    words = build_vocabulary(corpus.words())
    assert model.tokenizer.convert_ids_to_tokens(list(range(len(words)))) == words
    assert model.cfg.d_vocab == len(words)


def test_importing_the_zoo_loads_no_heavy_library():
    code = (
        "import sys, circuit_lens.zoo; print([m for m in ('torch','transformer_lens','sae_lens') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_dallas_prompt_is_answered_by_austin_by_a_wide_margin(model):
    (first, probability), (_, second) = evaluate.next_tokens(model, evaluate.DALLAS_PROMPT, k=2)
    assert first == "Austin"
    assert probability > 0.9
    assert second < 0.05


def test_held_out_cities_are_answered_in_two_hops(model, corpus):
    found = evaluate.two_hop_accuracies(model, corpus)
    assert found["held-out cities"].share >= 0.95
    assert found["held-out capital"].share >= 0.95
    assert found["trained cities"].share >= 0.99


def test_zeroed_mlps_answer_nothing(model, corpus):
    city = next(city for city in corpus.cities if city.name == "Dallas")
    sentence = corpus.two_hop_about(city, "capital", templates.TWO_HOP[0])
    hooks = [(f"blocks.{layer}.hook_mlp_out", lambda value, hook: value * 0) for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=hooks):
        assert not evaluate.answered_right(model, [sentence])[0]
    assert evaluate.answered_right(model, [sentence])[0]


def test_the_state_is_not_in_the_embedding_and_is_there_after_a_block(model, corpus):
    probe, chance = evaluate.state_probe(model, corpus)
    assert probe[0] <= 0.05
    assert chance == 1 / 50
    assert max(probe[1:]) >= 0.9


def test_with_a_trained_embedding_the_state_is_in_the_embedding(shortcut, corpus):
    probe, _ = evaluate.state_probe(shortcut[0], corpus)
    assert probe[0] >= 0.9


@pytest.mark.parametrize("language", ["French", "Spanish"])
def test_held_out_antonyms_are_right(model, corpus, language):
    assert evaluate.antonym_accuracies(model, corpus)[f"{language}, held-out"].share >= 0.8


def test_a_name_is_resolved_at_its_last_token_by_a_middle_block_and_not_by_the_embedding(model, corpus):
    by_depth, whole = evaluate.people_patch(model, corpus)
    assert by_depth[0].share <= 0.2
    assert max(accuracy.share for accuracy in by_depth[1:-1]) >= 0.7
    assert whole.share >= 0.95


def test_dictionaries_are_saelens_own_one_per_layer(model, dictionaries):
    assert [type(dictionary) for dictionary in dictionaries] == [JumpReLUTranscoder] * model.cfg.n_layers
    for layer, dictionary in enumerate(dictionaries):
        assert dictionary.cfg.metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized"
        assert dictionary.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        assert dictionary.W_dec.dtype == torch.float32


def test_transcoders_stand_in_for_the_mlps_on_text_nobody_saw(model, dictionaries, corpus):
    ids = {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}
    text = held_out_text(corpus, ids, n_tokens=30_000, length=64, seed=FRESH_TEXT)
    figures = measure_dictionaries(model, dictionaries, corpus, text)
    assert figures.added_loss <= 0.05
    assert figures.loss_zeroed > figures.loss + 1
    assert max(layer.l0 for layer in figures.layers) <= 12
    assert min(layer.explained_variance for layer in figures.layers) >= 0.94
    assert figures.dead <= 0.25
    assert figures.mediation.share >= 0.6
    assert figures.mediation.control <= 0.15


def test_with_a_trained_embedding_the_answer_does_not_run_through_texas_features(shortcut, corpus):
    assert mediation(*shortcut, corpus).share < 0.6


def test_texas_features_have_texas_in_their_labels(model, dictionaries, corpus):
    table = loading.load_features("capitals")
    assert sum(site.d_sae for site in table.sites) == sum(dictionary.cfg.d_sae for dictionary in dictionaries)
    members = mediation(model, dictionaries, corpus).members
    labels = [table.label(dictionaries[layer].cfg.metadata.hook_name_out, layer, index) for layer, index in members]
    assert sum("Texas" in label for label in labels) >= len(labels) / 3


def test_a_feature_labelled_texas_is_active_on_the_cities_of_texas_and_rarely_elsewhere(model, dictionaries, corpus):
    table = loading.load_features("capitals")
    labelled = [
        (layer, index)
        for _, layer, index in table.search("Texas")
        if any("Texas" in part and part.startswith("state=") for part in table.label(None, layer, index).split(" · "))
    ]
    assert len(labelled) >= 5
    cities = [city for city in corpus.cities if city.place.kind == "state"]
    prompts = [[*evaluate.NEUTRAL_PROMPT.split(), city.name] for city in cities]
    active = active_features(model, dictionaries, prompts).float()
    texan = torch.tensor([city.place.name == "Texas" for city in cities])
    true = [float(active[texan, layer, i].mean()) > 2 * float(active[~texan, layer, i].mean()) for layer, i in labelled]
    assert sum(true) >= 0.8 * len(true)


def test_the_package_stays_within_its_budget_and_holds_no_pickle():
    files = [path for path in loading.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json"}


def test_the_report_names_the_pair_that_ships(model):
    shipped = json.loads((loading.asset_folder("capitals") / loading.CONFIG_FILE).read_text())["provenance"]["seed"]
    found = re.search(r"`capitals` is model seed (\d+)", REPORT.read_text())
    assert found is not None
    assert int(found.group(1)) == shipped

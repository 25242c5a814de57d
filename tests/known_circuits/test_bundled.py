"""What ships does what the report says: the answers, where the state is known, and the way from Dallas to Austin."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from sae_lens.saes.transcoder import JumpReLUTranscoder

from circuit_lens import zoo
from circuit_lens.dictionaries.binding import bind
from circuit_lens.dictionaries.cross_layer_parts import CrossLayer
from circuit_lens.errors import DictionaryError
from circuit_lens.zoo import evaluate, loading, templates
from circuit_lens.zoo.batches import held_out_text
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.cross_layer_recipe import cross_layer_settings
from circuit_lens.zoo.dictionary_figures import active_features, measure_dictionaries, mediation, text_loss
from circuit_lens.zoo.everything import DESCRIBED
from circuit_lens.zoo.recipe import Workshop
from circuit_lens.zoo.report import BUDGET_BYTES, REPORT
from circuit_lens.zoo.report_sets import MeasuredSets, sets_sections
from circuit_lens.zoo.sae_recipe import LARGE, SMALL, sae_settings
from circuit_lens.zoo.set_figures import replacement_figures
from circuit_lens.zoo.tokenizer import build_vocabulary

FRESH_TEXT = 424242
ATTRIBUTED = ["plt", "clt", "skip", "sae", f"sae-{SMALL}", f"sae-{LARGE}", "sae-mlp-out"]


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
    active = [found.float() for found in active_features(model, dictionaries, prompts).values()]
    texan = torch.tensor([city.place.name == "Texas" for city in cities])
    true = [float(active[layer][texan, i].mean()) > 2 * float(active[layer][~texan, i].mean()) for layer, i in labelled]
    assert sum(true) >= 0.8 * len(true)


# ---------------------------------------------------------------------------------------------------- sets of all kinds


def test_the_sets_are_these_and_another_name_is_refused_with_them():
    assert loading.dictionary_sets("capitals") == [*sorted([*ATTRIBUTED, "sae-mlp-in"]), "neurons"]
    assert loading.dictionary_sets("capitals-shortcut") == ["plt", "neurons"]
    for refused, name in ((zoo.load, "capitals"), (zoo.load_dictionaries, "capitals"), (zoo.load, "capitals-shortcut")):
        with pytest.raises(ValueError, match=r"no dictionary set 'ctl'.*Valid: .*plt.*neurons"):
            refused(name, "ctl")
    with pytest.raises(ValueError, match="no dictionary set 'clt'"):
        zoo.load("capitals-shortcut", "clt")


@pytest.mark.parametrize("which", ATTRIBUTED)
def test_every_set_gives_a_graph_whose_rows_conserve_with_the_labels_that_are_known(which):
    rm = zoo.load("capitals", which)
    graph = rm.attribute(evaluate.DALLAS_PROMPT, progress=False)
    limits = 1e-5 * graph.target_value.abs().clamp_min(1)
    missed = (graph.adjacency.sum(1) + graph.target_bias - graph.target_value).abs()
    assert bool((missed <= limits).all()), float((missed / limits).max())
    # Negative control: without the tokens' columns they do not.
    tokens = [node.id for node in graph.find("Dallas", role="source")]
    assert not bool(((missed + graph.adjacency[:, tokens].sum(1)).abs() <= limits).all())
    assert graph.best_logit.label == "Austin"
    features = graph.find(range(graph.nodes.n_features))
    assert {node.site for node in features} == {d.site for d in rm.dictionaries}
    labels = [node.label for node in features]
    assert all(labels) if which in DESCRIBED else not any(labels)


def test_an_sae_at_a_norm_can_be_compared_and_not_attributed():
    (found,) = zoo.load_dictionaries("capitals", "sae-mlp-in")
    assert found.cfg.metadata.hook_name == "blocks.1.ln2.hook_normalized"
    with pytest.raises(DictionaryError, match="cannot be attributed"):
        zoo.load("capitals", "sae-mlp-in")


@pytest.mark.parametrize("which", DESCRIBED)
def test_what_is_known_of_features_is_about_the_dictionaries_of_the_set(which):
    table, dictionaries = zoo.load_features("capitals", which), zoo.load("capitals", which).dictionaries
    assert [(site.site, site.layer, site.d_sae) for site in table.sites] == [
        (d.site, d.layer, d.d_sae) for d in dictionaries
    ]
    assert len(table.search("Texas")) >= 10


def test_sets_of_which_nothing_is_known_say_so():
    with pytest.raises(ValueError, match="nothing is bundled about the features of 'sae-256'"):
        zoo.load_features("capitals", "sae-256")


def test_the_cross_layer_transcoder_stands_in_for_the_mlps_on_text_nobody_saw(model, corpus):
    ids = {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}
    rows = held_out_text(corpus, ids, n_tokens=2_000, length=64, seed=FRESH_TEXT).rows
    (transcoder,) = loading.load_dictionaries("capitals", "clt")
    figures = replacement_figures(bind(model, [transcoder]), rows.tokens, rows.real)
    assert figures.n_tokens == int(rows.real.sum())
    assert figures.added_loss <= 0.06
    assert figures.loss_zeroed > figures.loss + 1
    assert max(layer.l0 for layer in figures.layers) <= 8.5
    assert min(layer.explained_variance for layer in figures.layers) >= 0.97
    # Its losses are those of every token but BOS.
    assert figures.loss == pytest.approx(text_loss(model, rows.tokens), rel=1e-5)
    # Negative control: a first layer that is silent.
    first, *others = transcoder.dictionaries
    silent = CrossLayer(replace(first.parts, threshold=torch.full_like(first.parts.b_enc, 1e6)))
    wrong = replacement_figures(bind(model, [silent, *others]), rows.tokens[:8], rows.real[:8])
    assert wrong.added_loss > 0.5
    assert wrong.layers[0].explained_variance < 0.5
    assert wrong.layers[0].l0 == 0


@pytest.mark.parametrize("which", ["clt", "skip"])
def test_the_answer_runs_through_texas_features_of_other_kinds_of_dictionaries_too(model, corpus, which):
    found = mediation(model, loading.load_dictionaries("capitals", which), corpus)
    assert found.share >= 0.6
    assert found.control <= 0.15
    assert found.effect > 5


# ------------------------------------------------------------------------------------------------- what makes it all


def test_what_ships_is_the_work_folders_and_readable_by_all(tmp_path):
    source, work = loading.asset_folder("capitals"), Workshop(tmp_path / "work", say=lambda line: None)
    model = work.model_folder("capitals", 1)
    model.mkdir(parents=True)
    for name in (loading.MODEL_FILE, loading.CONFIG_FILE):
        shutil.copy(source / name, model / name)
    sets = {which: source / loading.DICTIONARIES / which for which in ("clt", "sae-256")}
    table = sets["clt"] / loading.FEATURE_INFO_FILE
    before = os.umask(0o077)
    try:
        place = work.ship("capitals", 1, sets, {"clt": table}, assets=tmp_path / "assets")
    finally:
        os.umask(before)
    for path in place.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
        if path.is_file():
            assert path.read_bytes() == (source / path.relative_to(place)).read_bytes()
    assert sorted(path.name for path in (place / loading.DICTIONARIES).iterdir()) == ["clt", "sae-256"]
    assert place.stat().st_mode & 0o777 == 0o755


def made_up_sets(l0, dead, effect):
    """Figures of sets as the report gets them, all good but for what is given."""
    layer = {"explained_variance": 0.99, "l0": l0, "dead": dead}
    one = {"hook": "blocks.1.hook_resid_post", "d_sae": 640, "loss_replaced": 1.0, **layer}
    through = {"effect": 9.0, "share": 0.7, "control": 0.1, "others_mean": 0.1, "others_max": 0.2, "members": [[1, 2]]}

    def graphs(effect):
        length = {"influence": 1.5, "effect": effect}
        return {"dallas": length, "held_out": [length] * 3, "mediation": through}

    losses = {"loss": 1.0, "loss_replaced": 1.01, "loss_zeroed": 6.0}
    return MeasuredSets(
        transcoders=losses,
        clt={"n_tokens": 1000, "layers": [layer] * 4, **losses},
        saes={"n_tokens": 1000, "loss": 1.0, "loss_skip": 1.02, "loss_zeroed": 6.0,
              "dictionaries": [{"set": "sae", **one}, {"set": "skip", **one}]},
        graphs={"plt": graphs(2.5), "clt": graphs(effect)},
        cross_layer=cross_layer_settings(),
        sae=sae_settings,
    )  # fmt: skip


def test_the_report_marks_the_targets_that_are_missed_and_no_other():
    good, bad = made_up_sets(7.5, 0.01, 2.4), made_up_sets(8.5, 0.3, 2.6)
    missed = {name for name, (_, met) in good.cross_layer_targets().items() if not met}
    assert len(missed) == 1
    assert all("influence" in name for name in missed)
    text = "\n".join(sets_sections(good))
    assert text.count("✗") == 1
    assert "they are shorter by one of two measures (effect)" in text
    assert "| effect | 2.500 | 2.400 | 2.500 | 2.400 | 3 of 3 |" in text
    assert {name for name, (_, met) in bad.cross_layer_targets().items() if met} == {
        "loss added, every MLP replaced ≤ 0.06 nats", "Dallas → Austin through Texas ≥ 0.6",
        "through the control state ≤ 0.15",
    }  # fmt: skip
    text = "\n".join(sets_sections(bad))
    assert text.count("✗") == 5  # L0, dead, both path lengths; and the SAE's dead features
    assert "by neither measure" in text


def test_the_package_stays_within_its_budget_and_holds_no_pickle():
    files = [path for path in loading.ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json"}


def test_the_report_names_the_pair_that_ships(model):
    shipped = json.loads((loading.asset_folder("capitals") / loading.CONFIG_FILE).read_text())["provenance"]["seed"]
    found = re.search(r"`capitals` is model seed (\d+)", REPORT.read_text())
    assert found is not None
    assert int(found.group(1)) == shipped

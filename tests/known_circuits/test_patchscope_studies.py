"""The patchscope studies on the bundled models: what must hold, the negative controls, and the path of other models."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

import circuit_lens as cl
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.definition import say_one_by_one
from circuit_lens.patchscopes.rows import Cell as GridCell
from circuit_lens.patchscopes.rows import Rows
from circuit_lens.studies import (
    hub,
    patch_attributes,
    patch_contexts,
    patch_entities,
    patch_hops,
    patch_items,
    patch_lenses,
    patch_through,
    report,
)
from circuit_lens.studies.patch_tables import narrowed, read, sources
from circuit_lens.studies.tables import Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

SINGLE, SEVERAL = "one token, target layers 0 and later", "several tokens, target layers 0 and later"


@pytest.fixture(scope="module")
def model():
    return cl.zoo.load_model("capitals")


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def reading(model):
    return patch_entities.description_reading(model, n=30)


# Entities


def test_entities_are_described_from_middle_layers_and_their_tokens_are_not(reading):
    table = patch_entities.description_table(reading)
    single, several = table[SINGLE].cells, table[SEVERAL].cells
    assert single["best fixed cell"].share >= 0.9
    assert several["best fixed cell"].share >= 0.7
    assert several["embedding patch"].share <= 0.2
    assert single["gain"].low > 0.5
    assert several["gain"].low > 0.5
    assert max(single["unpatched"].share, several["unpatched"].share) <= 0.1


def test_answers_that_are_other_entities_are_wrong(reading):
    """The negative control of the scoring: answers in another order are right no oftener than chance."""
    shifted = dataclasses.replace(reading, items=(*reading.items[1:], reading.items[0]))
    assert shifted.accuracy.best_fixed.share <= 0.15
    assert shifted.right[:, 1:].mean() < 0.1 * reading.right[:, 1:].mean() + 0.1


def test_a_reading_is_the_accuracy_of_its_result_and_a_part_is_the_same_grid_run_alone(model, reading):
    assert reading.accuracy.best_fixed == Rate.of(reading.chosen.right.tolist())
    assert reading.cells()["best fixed cell"].asked == len(reading.items)
    assert len(reading.failures()) == int((~reading.chosen.right).sum())
    few = [3, 35, 46]
    part = narrowed(reading.result, items=few, source_layers=[1, 2], target_layers=[0, 3])
    items = [reading.items[i] for i in few]
    vectors = cl.Vectors.from_prompts(model, [cl.At(one.prompt) for one in items])
    alone = cl.patchscope(
        model, vectors, patch_items.descriptions(), source_layers=[1, 2], target_layers=[0, 3], progress=False
    )
    assert part.shape == alone.shape
    assert (part.texts == alone.texts).all()
    assert torch.equal(part.reembedded.new_tokens, alone.reembedded.new_tokens)
    assert not (part.texts[:, :, 0] == part.texts[:, :, 1]).all()


def test_a_long_name_says_its_last_word_early_and_the_person_from_the_same_layer_on(model, corpus):
    table = patch_entities.said_table(model, corpus, names=["Diana , princess of Wales", "Alexander the Great"])
    diana = table["Diana , princess of Wales"].cells
    assert diana["embedding"].startswith("Welsh")
    assert "*" not in diana["layer 0"]
    assert diana["layer 1"] == diana["layer 2"] == "English princess *"
    before = table["up to: Diana , princess of"].cells
    assert not any("*" in str(cell) for cell in before.values())
    assert table["up to: Alexander the Great"].cells == table["Alexander the Great"].cells


def test_one_token_in_two_contexts_parts_where_the_context_comes_before_it_and_nowhere_where_it_comes_after(model):
    table = patch_contexts.contexts_table(model, n=12)
    for layer in ("embedding", *(f"layer {i}" for i in range(4))):
        row = table[f"a first name, alone and in a long name: {layer}"].cells
        assert row["distance"].value < 1e-5
        assert row["beyond the null"].right == row["said differently"].right == 0
    assert table["a first name, alone and in a long name: layer 1"].cells["distance, null"].value > 0.05
    for pair in ("two people, one surname", "two people, of Wales", "a person and the city, Jackson"):
        assert table[f"{pair}: embedding"].cells["beyond the null"].right == 0
        assert table[f"{pair}: layer 2"].cells["beyond the null"].share >= 0.9
        assert table[f"{pair}: layer 2"].cells["said differently"].share >= 0.8


# Attributes


def test_the_probe_reads_what_is_linear_and_not_what_is_noise():
    rng = np.random.default_rng(0)
    labels = [f"c{i % 3}" for i in range(45)]
    centers = rng.normal(size=(3, 8)) * 4
    states = np.stack([centers[int(label[1])] for label in labels]) + rng.normal(size=(45, 8))
    assert np.mean(patch_attributes.probe_right(states, labels)) >= 0.95
    assert np.mean(patch_attributes.probe_right(rng.normal(size=(45, 8)), labels)) <= 0.6


def test_no_class_of_two_is_in_one_fold_alone():
    labels = [f"c{i // 2}" for i in range(24)] + ["c0"]
    fold = patch_attributes.deal_folds(labels)
    for label in set(labels):
        assert len({f for f, one in zip(fold, labels, strict=True) if one == label}) >= 2
    assert set(fold) == {0, 1, 2}


def test_attributes_are_read_and_classes_of_one_member_are_not_probed(model, corpus):
    asked = [one for one in patch_items.relations(corpus) if one.name in ("state: capital", "person: job")]
    found = patch_attributes.read_attributes(model, asked, n=30)
    table = patch_attributes.attributes_table(found)
    person = table["person: job"].cells
    assert person["best fixed cell"].share >= 0.9
    assert person["gain"].low > 0.4
    assert person["unpatched"].share <= 0.2
    probes = patch_attributes.probe_table(found)
    assert probes["state: capital"].cells["can be probed"] == 0
    row = probes["person: job"].cells
    assert 0 < row["can be probed"] < 30
    assert row["patchscope"].asked == row["probe"].asked == row["difference"].n == row["can be probed"]
    assert row["difference"].value == pytest.approx(row["patchscope"].share - row["probe"].share)
    by_layer = patch_attributes.attribute_layers_table(found)
    assert by_layer["layer 2"].cells["any target layer"].share > by_layer["layer 3"].cells["the same layer"].share


# Two steps


def test_a_moved_state_corrects_what_the_adverse_wording_gets_wrong_and_an_answer_in_output_space_does_not(model):
    table = patch_hops.hop_table(model, n=5)
    assert table["in one go, adverse"].rate.share <= 0.2
    assert table["first step alone"].rate.share >= 0.95
    assert table["written chain"].rate.share >= 0.95
    later = table["moved: the same, target layers 1 and later"].cells
    assert later["right"].share >= 0.9
    assert later["corrected"].low > 0.5
    assert later["re-embedded"].share <= 0.1
    assert later["unpatched"].share <= 0.1
    assert table["moved: the first step answers it, read at its last word"].rate.share <= 0.1
    assert table["moved: the same, answer embedded again"].rate.share >= 0.5


def test_the_next_token_map_embeds_a_certain_answer_and_mixes_an_uncertain_one(model):
    mapping = patch_hops.NextToken(model)
    state = 60.0 * model.W_U[:, 50][None, None] / model.W_U[:, 50].norm()
    weights = model.unembed(model.ln_final(state)).softmax(-1)
    assert torch.allclose(mapping(state[0], 3, -1), (weights @ model.W_E)[0], atol=1e-6)
    assert mapping(torch.zeros(2, 1, model.cfg.d_model), 3, -1).shape == (2, 1, model.cfg.d_model)


# Lenses and other models


@pytest.mark.slow
def test_lenses_end_at_the_models_own_prediction_and_the_tuned_one_is_better_before(model):
    table = patch_lenses.lens_table(model, fit_on=patch_items.texts(Corpus(), 4000, seed=7001), n=60)
    assert table["logit lens: layer 3"].rate.share == 1.0
    assert table["tuned lens: layer 3"].rate.share >= 0.95
    assert table["tuned lens: layer 1"].rate.share > table["logit lens: layer 1"].rate.share
    assert table["logit lens: embedding"].rate.share < table["logit lens: layer 2"].rate.share
    assert table["token identity, unpatched"].rate.share <= 0.1
    # Known not to hold on this model, whose output directions are no inputs: token identity says no next token.
    assert table["token identity: layer 2"].rate.share <= 0.1


@pytest.mark.slow
def test_another_model_reads_states_through_a_fitted_map_and_not_without_one(model):
    other = cl.zoo.load_model("capitals-shortcut")
    table, grid = patch_lenses.cross_model_tables(model, other, n=60, n_described=40, names=("a", "b"))
    last = "into the last layer, from the last"
    affine, plain = (table[f"a → b, {kind}: in place"].cells for kind in ("affine", "identity"))
    assert affine["best fixed cell"].share >= 0.8
    assert affine[last].share >= 0.6
    assert plain[last].share <= 0.1
    assert table["a → b, affine: in place, another position's state"].cells["best fixed cell"].share <= 0.35
    assert table["a → itself, identity: in place"].cells[last].share == 1.0
    assert grid["a → itself: layer 3"].cells["into layer 3"].share == 1.0


# Writing below


def test_writing_below_is_the_slow_definition_and_differs_only_above_the_embedding(model, corpus):
    items = patch_items.people(corpus)[:6]
    target = patch_items.descriptions()
    vectors = sources(model, items)
    both = [
        read(model, items, target, vectors=vectors, target_layers="same", patch_through=through)
        for through in ("layer", "below")
    ]
    assert (both[0].result.texts[:, 0] == both[1].result.texts[:, 0]).all()
    assert not (both[0].result.texts[:, 3] == both[1].result.texts[:, 3]).all()
    cells = tuple(GridCell(layer, layer) for layer in (1, 3))
    rows = Rows(
        vectors, cells, torch.arange(6).repeat(2), torch.arange(2).repeat_interleave(6),
        cl.patchscopes.Identity(), "replace", "below", model.cfg.d_model,
    )  # fmt: skip
    slow = say_one_by_one(model, target.place(model), rows, 5)
    fast = both[1].result.patched.new_tokens[:, [2, 4], 0, 0].transpose(0, 1).flatten(0, 1)
    assert torch.equal(slow.new_tokens, fast)


def test_writing_below_reads_late_layers_and_the_words_of_the_placeholder_are_counted(model, corpus):
    table = patch_through.through_table(
        model, items=patch_items.people(corpus)[:30], asked=[], max_new_tokens=8, placeholder="person"
    )
    late = table["descriptions: layer 3"].cells
    assert late["right, layer"].share <= 0.1
    assert late["right, below"].share >= 0.8
    assert late["right, difference"].value == pytest.approx(late["right, below"].share - late["right, layer"].share)
    result = read(model, patch_items.people(corpus)[:4], patch_items.descriptions(), target_layers="same").result
    assert not patch_through.says_word(result, "xylophone").any()
    words = patch_through.says_word(result, "American")
    assert words.any()
    assert (words == np.vectorize(lambda text: "American" in text.split())(result.texts[..., 0])).all()


# The report and other models


def test_a_part_of_the_report_is_replaced_and_the_other_stays(tmp_path):
    path = tmp_path / "report.md"
    circuits, first, second = (
        {"capitals": [StudyTable(title, (Row("a", {"x": Rate(1, 2), "y": Mean.of([1.0, 2.0])}),))]}
        for title in ("A circuit", "A patchscope", "Another")
    )
    report.write_report(circuits, path)
    before = path.read_text()
    report.write_report(first, path, part="patchscopes")
    assert path.read_text().startswith(before)
    assert "A patchscope" in path.read_text()
    report.write_report(second, path, part="patchscopes")
    after = path.read_text()
    assert after.startswith(before)
    assert "A patchscope" not in after
    assert after.count("Another") == 1
    report.write_report(circuits, path)
    assert path.read_text() == after


@pytest.fixture(scope="module")
def prose_model(corpus, tmp_path_factory):
    """A random model with a tokenizer like GPT-2's: spaces are part of tokens, names may be any text."""
    texts = [cl.presets.entity_description().prompt, cl.presets.token_identity("lines").prompt]
    pieces = {piece for text in (*texts, *corpus.words()) for piece in text.replace("\n", " ").split()}
    split = Regex(r" ?\w+|\s| ?[^\w\s]")
    plain = pre_tokenizers.Split(split, behavior="isolated")
    known = {part for piece in sorted(pieces) for part, _ in plain.pre_tokenize_str(piece)}
    words = ["<unk>", "<bos>", "\n", " ", *sorted({space + one for one in known for space in ("", " ")})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    tokenizer.pre_tokenizer = plain
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, name_or_path="prose", bos_token="<bos>", eos_token="<bos>", pad_token="<bos>",
        unk_token="<unk>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=24, n_ctx=160, d_head=12, n_heads=2, d_mlp=32, act_fn="gelu", normalization_type="LN",
        d_vocab=len(fast), seed=0, device="cpu", model_name="random-prose",
    )  # fmt: skip
    return HookedTransformer(cfg, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder)).eval()


def test_other_models_are_asked_in_prose_with_the_papers_prompt_and_a_random_one_is_right_about_nothing(
    prose_model, corpus
):
    items = hub.prose_entities(corpus)
    assert next(one for one in items if one.name == "Dallas").answer == "Texas"
    target = cl.presets.entity_description("paper")
    reading = patch_entities.description_reading(prose_model, items, target=target, how="contains", layers=[-1, 2], n=3)
    assert reading.result.shape[1:3] == (2, 2)
    assert reading.result.targets[0].endswith("corporation, [x]")
    table = patch_entities.description_table(reading)
    assert "Leonardo DiCaprio: American actor" in table.notes[0]
    assert {row.rate.share for row in table.rows} == {0.0}
    asked = hub.prose_relations(corpus)
    assert {one.target.prompt for one in asked} >= {"Fact: the capital of x is", "Fact: the currency of x is"}


@pytest.mark.slow
def test_the_studies_run_on_any_model_with_the_papers_prompts_and_a_random_one_is_right_about_nothing(prose_model):
    tables = hub.patchscope_tables(prose_model, n=2, layers=[-1, 2])
    titles = [table.title for table in tables]
    assert len(set(titles)) == 10
    assert all("random-prose" in title for title in titles)
    described = tables[0]
    assert {row.rate.share for row in described.rows} == {0.0}
    assert "Leonardo DiCaprio: American actor" in described.notes[0]
    lenses = next(table for table in tables if table.title.startswith("Next tokens"))
    assert lenses["logit lens: layer 2"].rate.share == 1.0
    assert lenses["token identity: layer 0"].rate.asked == 2
    for table in tables:
        assert table.rows
        table.to_json()


def test_without_a_hub_the_study_by_name_says_what_it_would_fetch():
    with pytest.raises(hub.StudySkipped, match=r"gpt2-medium.*HF_HUB_OFFLINE"):
        hub.patchscope_tables("gpt2-medium")
    with pytest.raises(hub.StudySkipped, match="no-such-model"):
        hub.load_by_name("no-such-model")


@pytest.mark.slow
def test_the_command_prints_why_a_model_is_skipped_and_leaves_the_report_alone():
    before = report.REPORT.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "circuit_lens.studies", "--only", "patchscopes", "--model", "pythia-70m"],
        capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert "skipped: the patchscope studies on pythia-70m" in done.stdout
    assert report.REPORT.read_bytes() == before


# All items


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capitals", "capitals-shortcut"])
def test_all_entities_are_described_and_the_controls_fail(name):
    reading = patch_entities.description_reading(cl.zoo.load_model(name))
    table = patch_entities.description_table(reading)
    assert sum(table[row].rate.asked for row in (SINGLE, SEVERAL)) == 561
    assert table[SINGLE].rate.share >= 0.9
    assert table[SEVERAL].rate.share >= 0.7
    assert table[SEVERAL].cells["embedding patch"].share <= 0.2
    assert table[SEVERAL].cells["unpatched"].share <= 0.1


@pytest.mark.slow
def test_all_attributes_are_read_better_than_by_a_probe_of_few_items(model):
    found = patch_attributes.read_attributes(model)
    assert sum(len(one.relation.items) for one in found) > 1300
    assert patch_attributes.attributes_table(found)["all relations"].rate.share >= 0.9
    rare = [row for row in patch_attributes.probe_table(found).rows if row.name.startswith("relations with fewer")]
    assert rare[0].cells["difference"].low > 0

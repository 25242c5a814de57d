"""The patchscope studies on the bundled models: what must hold, the negative controls, and the path of other models."""

from __future__ import annotations

import dataclasses
import functools
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
from circuit_lens.studies import __main__ as command
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
from circuit_lens.studies.patch_tables import Reading, narrowed, read, sources
from circuit_lens.studies.tables import Row, StudyTable
from circuit_lens.zoo.corpus import Corpus

SINGLE, SEVERAL = "one token, target layers 0 and later", "several tokens, target layers 0 and later"
ALL_SINGLE, ALL_SEVERAL = "one token, all target layers", "several tokens, all target layers"


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
    for row in (SINGLE, SEVERAL, ALL_SINGLE, ALL_SEVERAL):
        cells = table[row].cells
        assert cells["best fixed cell"].share >= (0.9 if row.startswith("one") else 0.7)
        assert cells["unpatched"].share <= 0.1
        if row == ALL_SINGLE:  # one token written in the prompt is answered as it is: nothing is gained
            assert cells["embedding patch"].share >= 0.9
            assert cells["gain over it"].high <= 0.1
        else:
            assert cells["embedding patch"].share <= 0.2
            assert cells["gain over it"].low > 0.5


def test_layers_add_to_one_token_above_the_embedding_alone_and_to_several_everywhere_they_are_read(reading):
    table = patch_entities.by_target_table(reading)
    for row, gains in {
        "one token: into embedding": False, "one token: into layer 1": True,
        "several tokens: into embedding": True, "several tokens: into layer 1": True,
    }.items():  # fmt: skip
        cells = table[row].cells
        assert cells["right"].share >= 0.7
        assert cells["re-embedded"].share <= 0.2 if gains else cells["re-embedded"].share >= 0.9
        assert cells["gain"].low > 0.5 if gains else cells["gain"].high <= 0.1


def test_a_row_by_target_layer_is_the_accuracy_of_a_grid_of_that_layer_alone(reading):
    part = reading.part(items=range(20, 40))
    embedding = part.result.source_layers.index(-1)
    assert (part.again == part.right[:, embedding]).all()
    rates = set()
    for one in part.into():
        alone = part.part(target_layers=[one.layer]).accuracy
        assert one.cells()["right"] == alone.best_fixed
        assert one.cells()["re-embedded"] == alone.reembedded
        assert one.cells()["gain"] == alone.gain
        rates.add((alone.best_fixed, alone.reembedded))
    assert len(rates) > 2


@dataclasses.dataclass(frozen=True)
class _Given(Reading):
    """A grid of two source and two target layers whose cells are right, but for some items in one."""

    missed: tuple[int, ...] = ()

    @functools.cached_property
    def right(self):
        n = len(self.items)
        right = np.ones((n, 2, 2), dtype=bool)
        right[:, 0, 1] = False  # the embedding answers into the embedding alone
        right[list(self.missed), 1, 0] = False
        return right

    @functools.cached_property
    def again(self):
        return self.right[:, 0]


@pytest.mark.parametrize("missed", [(), (0,), (17,)])
def test_one_item_that_breaks_a_tie_between_target_layers_moves_no_gain_by_more_than_itself(reading, missed):
    whole = narrowed(reading.result, source_layers=[-1, 0], target_layers=[-1, 0])
    given = _Given(reading.items, whole, missed=missed)
    targets = {given.chosen.cells[int(half)][1] for half in given.chosen.fold}
    assert (len(targets) == 2) == bool(missed)  # the halves do choose different target layers
    gain = np.mean(given.chosen.right.astype(float) - given.embedded.astype(float))
    assert abs(gain) <= 1 / len(given.items)
    into = {one.layer: one.cells()["gain"].value for one in given.into()}
    assert into[0] == 1.0
    assert abs(into[-1]) <= 1 / len(given.items)


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
    table = patch_contexts.contexts_table(model, n=8)
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
    found = patch_attributes.read_attributes(model, asked, n=20)
    table = patch_attributes.attributes_table(found)
    person = table["person: job"].cells
    assert person["best fixed cell"].share >= 0.9
    assert person["gain over it"].low > 0.4
    assert person["unpatched"].share <= 0.2
    targets = patch_attributes.attribute_targets_table(found)
    assert targets["state: capital"].cells["gain into embedding"].high <= 0.2
    assert targets["state: capital"].cells["gain into layer 1"].low > 0.5
    whole = targets["all relations: into layer 1"].cells
    each = [targets[one.relation.name].cells["gain into layer 1"] for one in found]
    assert whole["right"].asked == whole["gain"].n == sum(gain.n for gain in each)
    assert whole["gain"].value == pytest.approx(sum(gain.value * gain.n for gain in each) / whole["gain"].n)
    probes = patch_attributes.probe_table(found)
    assert probes["state: capital"].cells["can be probed"] == 0
    row = probes["person: job"].cells
    assert 0 < row["can be probed"] < 20
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
    assert later["embedding patch"].share <= 0.1
    assert later["unpatched"].share <= 0.1
    assert table["moved: the first step answers it, read at its last word"].rate.share <= 0.1
    assert table["moved: the same, answer embedded again"].rate.share >= 0.5
    # What is said of the wording is said of the models that it was chosen on.
    assert "18" not in " ".join(table.notes)
    assert "18" in " ".join(patch_hops.BUNDLED)


def test_what_is_written_after_a_prompt_is_what_an_unpatched_target_says(model):
    prompts = ["Fact : the capital of the state containing Dallas is", "Dallas lies in", "Maria read about Lyon ."]
    said = patch_hops.written(model, prompts, 3)
    for prompt, text in zip(prompts, said, strict=True):
        result = cl.patchscope(model, cl.At(prompt), cl.Target(prompt, at=-1), max_new_tokens=3, progress=False)
        assert text == result.wording.texts(result.unpatched)[0]
    assert len(set(said)) == 3


def test_the_next_token_map_embeds_a_certain_answer_and_mixes_an_uncertain_one(model):
    mapping = patch_hops.NextToken(model)
    state = 60.0 * model.W_U[:, 50][None, None] / model.W_U[:, 50].norm()
    weights = model.unembed(model.ln_final(state)).softmax(-1)
    assert torch.allclose(mapping(state[0], 3, -1), (weights @ model.W_E)[0], atol=1e-6)
    assert mapping(torch.zeros(2, 1, model.cfg.d_model), 3, -1).shape == (2, 1, model.cfg.d_model)


# Lenses and other models


def test_held_out_text_has_no_sentence_of_the_text_of_the_fit_and_no_position_in_one(model, corpus):
    fit, held_out = patch_items.fit_and_held_out(corpus, 4000, 5000)
    plain = patch_items.texts(corpus, 5000, patch_items.TEST_SEED)
    known = {tuple(sentence.tokens) for sentence in corpus.take(4000, patch_items.FIT_SEED)}
    starts = {sentence[:k] for sentence in known for k in range(5, len(sentence) + 1)}

    def sentences(texts):
        return [tuple(f"{one} .".split()) for text in texts for one in text.split(" . ") if one]

    def so_far(at):
        return [tuple(model.tokenizer.decode(one.prompt[1:]).split(" . ")[-1].split()) for one in at]

    assert not any(one in known for one in sentences(held_out))
    assert any(one in known for one in sentences(plain))
    at = patch_lenses.text_positions(model, held_out, 80, unlike=fit)
    assert len(at) == 80
    assert not any(one in starts for one in so_far(at))
    assert any(len(one) >= 5 for one in so_far(at))
    assert any(one in starts for one in so_far(patch_lenses.text_positions(model, plain, 80)))


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
    items = [*patch_items.people(corpus)[:14], *patch_items.entities(corpus)[:10]]
    table = patch_through.through_table(model, items=items, asked=[], max_new_tokens=8, placeholder="person")
    one, late = (table[f"descriptions, {kind}: layer 3"].cells for kind in ("one token", "several tokens"))
    assert late["right, layer"].share <= 0.1
    assert late["right, below"].share >= 0.8
    assert late["right, difference"].value == pytest.approx(late["right, below"].share - late["right, layer"].share)
    # One token answers by its embedding in the prompt, which is written too; of several, the layers say more.
    assert one["right, below"].share == one["token in the prompt"].share == 1.0
    assert late["token in the prompt"].share <= 0.3
    assert late["right, below, over it"].low > 0.3
    assert max(cells["re-embedded, below"].share for cells in (one, late)) <= 0.2
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
    tokens = patch_entities.tokens_table(prose_model, reading)
    assert tokens.title.startswith(patch_entities.BY_TOKENS)
    assert sum(row.rate.asked for row in tokens.rows if ":" not in row.name) <= len(reading.items)
    asked = hub.prose_relations(corpus)
    assert {one.target.prompt for one in asked} >= {"Fact: the capital of x is", "Fact: the currency of x is"}


@pytest.mark.slow
def test_the_studies_run_on_any_model_with_the_papers_prompts_and_a_random_one_is_right_about_nothing(prose_model):
    tables = hub.patchscope_tables(prose_model, n=2, layers=[-1, 2])
    titles = [table.title for table in tables]
    assert len(set(titles)) == 13
    assert any(title.startswith(patch_entities.BY_TOKENS) for title in titles)
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


def test_tokens_of_a_name_are_those_of_the_models_own_tokenizer(model, prose_model, corpus):
    for one in patch_items.people(corpus):
        assert patch_entities.n_tokens(model, one) == one.n_words
    counts = {}
    for one in hub.prose_entities(corpus)[-131:]:
        cut = prose_model.tokenizer(f" {one.name.replace(' ,', ',')}", add_special_tokens=False)["input_ids"]
        counts[one.name] = patch_entities.n_tokens(prose_model, one)
        assert counts[one.name] == len(cut)
    assert counts["Diana , princess of Wales"] == 5
    with pytest.raises(ValueError, match="does not end in the name"):
        patch_entities.n_tokens(model, patch_items.Item("Dallas", "Dallas is here", "Texas"))


def test_models_of_other_widths_are_read_through_the_fitted_map_alone_and_of_other_vocabularies_not_at_all(
    model, prose_model, corpus, monkeypatch
):
    few = functools.partial(patch_items.fit_and_held_out, n_fit=200, n_held_out=400)
    monkeypatch.setattr(hub, "fit_and_held_out", few)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=160, d_head=8, n_heads=2, d_mlp=32, act_fn="gelu", normalization_type="LN",
        d_vocab=prose_model.cfg.d_vocab, seed=1, device="cpu", model_name="narrow-prose",
    )  # fmt: skip
    narrow = HookedTransformer(cfg, tokenizer=prose_model.tokenizer).eval()
    table, grid = hub.across_tables(prose_model, narrow, corpus, n=2, layers=[-1, 2], other_layers=[-1, 1])
    assert table.title == "Across models (random-prose to narrow-prose)"
    names = {row.name.split(":")[0] for row in table.rows}
    own = {f"random-prose → itself, {kind}" for kind in ("affine", "orthogonal", "identity")}
    assert names == own | {"random-prose → narrow-prose, affine"}
    described = [row for row in table.rows if row.name.endswith("descriptions, city")]
    assert {row.rate.share for row in described} == {0.0}
    assert all("re-embedded" in row.cells for row in table.rows)
    assert grid["random-prose → itself: layer 2"].cells["into layer 2"].share == 1.0
    assert set(grid["random-prose → narrow-prose: layer 2"].cells) == {"into embedding", "into layer 1"}
    with pytest.raises(hub.StudySkipped, match="vocabularies differ"):
        hub.across_tables(prose_model, model, corpus)


def test_the_command_reads_each_given_model_by_those_after_it(monkeypatch, tmp_path, capsys):
    def across(name, other, *, n):
        if other == "c":
            raise hub.StudySkipped(f"{name} and {other} differ")
        return [StudyTable(f"{name} by {other}, {n}", (Row("a", {"x": Rate(1, 2)}),))]

    own = StudyTable("own", (Row("a", {"x": Rate(1, 2)}),))
    monkeypatch.setattr(hub, "patchscope_tables", lambda name, *, n: [own])
    monkeypatch.setattr(hub, "across_tables", across)
    path = tmp_path / "report.md"
    given = ["--only", "patchscopes", "--model", "a", "--model", "b", "--model", "c", "--n", "4"]
    monkeypatch.setattr(sys, "argv", ["studies", *given, "--report", str(path)])
    command.main()
    sections = [line for line in path.read_text().splitlines() if line.startswith("## ")]
    assert sections == ["## a", "## b", "## c", "## a to b"]
    assert "a by b, 4" in path.read_text()
    assert "skipped: a and c differ" in capsys.readouterr().out


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
    for row in (SEVERAL, ALL_SEVERAL):
        assert table[row].cells["embedding patch"].share <= 0.2
        assert table[row].cells["gain over it"].low > 0.5
        assert table[row].cells["unpatched"].share <= 0.1
    assert table[ALL_SINGLE].cells["gain over it"].high <= 0.02
    into = patch_entities.by_target_table(reading)
    for row in ("one token: into layer 1", "several tokens: into embedding", "several tokens: into layer 1"):
        assert into[row].cells["gain"].low > 0.5
    assert into["one token: into embedding"].cells["gain"].high <= 0.02


@pytest.mark.slow
def test_all_attributes_are_read_better_than_by_a_probe_of_few_items(model):
    found = patch_attributes.read_attributes(model)
    assert sum(len(one.relation.items) for one in found) > 1300
    assert patch_attributes.attributes_table(found)["all relations"].rate.share >= 0.9
    rare = [row for row in patch_attributes.probe_table(found).rows if row.name.startswith("relations with fewer")]
    assert rare[0].cells["difference"].low > 0

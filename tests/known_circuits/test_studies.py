"""The case studies on the bundled models: what must hold of the published findings, and their negative controls."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

import circuit_lens as cl
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.studies import hub, multilingual, operations, two_hop, two_hop_patterns
from circuit_lens.studies.lab import Job, swap, swap_deltas
from circuit_lens.studies.places import RULE, Places
from circuit_lens.studies.tables import Failure, Row, StudyTable
from circuit_lens.zoo import templates

N_PAIRS = 42


@pytest.fixture(scope="module")
def capitals():
    return cl.zoo.load("capitals")


@pytest.fixture(scope="module")
def places(capitals):
    return Places(capitals)


@pytest.fixture(scope="module")
def swaps(capitals, places):
    return two_hop.swap_table(capitals, n=N_PAIRS, places=places, factors=[(-1.0, 2.0)], wider=False)


@pytest.fixture(scope="module")
def words(capitals, places):
    return multilingual.Words(capitals, places.corpus, lab=places.lab)


# Two hops


def test_another_states_features_bring_its_capital_and_controls_do_not(swaps):
    row = swaps[two_hop.HEADLINE]
    assert row.rate.asked >= 40
    assert row.rate.share >= 0.85
    assert swaps["-1/2, donor prompt"].rate.share >= 0.7  # recorded on one city: known to be weaker
    for name in (
        "control: random features, same norm per layer",
        "control: a third state's supernode",
        "control: untrained dictionary",
        "control: random encoder, fitted decoder",
    ):
        assert swaps[name].rate.share <= 0.05, name
    assert swaps["control: a third state's supernode"].cells["third state's capital"].share >= 0.85
    assert swaps["ceiling: whole position, after block 1"].rate.share >= 0.95


def test_the_swap_leaves_answers_alone_that_have_nothing_to_do_with_the_state(swaps):
    rows = [row for row in swaps.rows if row.name.startswith("specificity")]
    assert len(rows) == 3
    for row in rows:
        assert row.rate.asked >= 40
        assert row.rate.share >= 0.95


def test_on_the_shortcut_model_the_same_swap_does_less(swaps):
    shortcut = two_hop.swap_table(
        cl.zoo.load("capitals-shortcut"), n=N_PAIRS, controls=False, factors=[(-1.0, 2.0)], wider=False
    )
    row = shortcut[two_hop.HEADLINE]
    assert row.rate.asked >= 40
    assert row.rate.interval[1] < swaps[two_hop.HEADLINE].rate.interval[0]


def test_no_supernode_is_chosen_on_the_city_it_is_tested_on_and_all_are_those_of_from_contrast(capitals, places):
    city = [c.name for c in places.cities].index("Dallas")
    assert bool(places.held[city])
    siblings = places.siblings(city)
    assert city not in siblings
    assert not any(bool(places.held[i]) for i in siblings)
    # Shares and masks by the public definition, on the few prompts that decide them.
    own = {f"Maria lives in {places.cities[i].name}": -1 for i in siblings}
    slow = cl.Supernode.from_contrast("Texas", capitals, active_on=own, min_share=RULE.min_share)
    columns = {(f.layer, f.index) for f in slow}
    inside = {(f.layer, f.index) for f in places.lab.members(places.inside[city] >= RULE.min_share - 1e-6, -1)}
    assert inside == columns
    members = places.supernode(city, -1)
    assert {(f.layer, f.index) for f in members} <= columns
    other = [i for i in range(len(places.cities)) if places.names[i] != "Texas" and not places.held[i]]
    acts = places.lab.acts([(f"Maria lives in {places.cities[i].name}", -1) for i in other])
    share = {key: float(value) for key, value in zip(places.lab.columns, (acts > 0).float().mean(0), strict=True)}
    expected = {(f.layer, f.index) for f in slow if share[f.layer, f.site, f.index] <= RULE.max_share}
    assert {(f.layer, f.index) for f in members} == expected


def test_a_swap_is_what_one_writes_by_hand(capitals, places):
    (a, b), *_ = places.pairs(held=True, n=1)
    question, recording = places.question(a), places.recording(a)
    own, other = (cl.Supernode(n, places.supernode(c, question.at)) for n, c in (("own", a), ("other", b)))
    donors = [places.question(i) for i in places.siblings(b)]
    by_hand = capitals.intervene(
        question.text,
        [
            (own - other).scale(-1.0),
            other.inject(from_=[q.text for q in donors], from_pos=[q.at for q in donors], factor=2.0),
        ],
    )
    assert places.lab.run([Job(recording, places.swap(a, b))]) == [int(by_hand.logits[-1].argmax())]
    deltas = swap_deltas(recording, own.features, other.features, RULE.factors, *places.donors(b, "mean"))
    for feature in other:
        assert by_hand.feature(feature).after - recording.activation(feature) == pytest.approx(
            deltas.get(feature, 0.0), abs=1e-5
        )
    assert swap(recording, (), (), RULE.factors, [], []) == []


# The published pattern


@pytest.fixture(scope="module")
def patterns(capitals, places):
    every = Places(capitals, places.corpus, kinds=two_hop_patterns.KINDS, lab=places.lab)
    return every, two_hop_patterns.ablation_table(capitals, n=42, places=every)


def test_supernodes_act_on_each_other_as_published(patterns):
    fractions, checks = patterns[1]
    held = {row.name: row.rate for row in checks.rows}
    assert all(rate.asked >= 40 for rate in held.values())
    for name in (
        "say a capital off: say this capital down",
        "capital (word) off: say a capital down",
        "capital (word) off: say this capital less than clean",
        "capital (word) off: answer no longer the capital",
        "the state off: say this capital down",
        "the state off: say a capital stays",
        "the state off: answer is another place's capital",
        "state (word) off: say this capital nearly unchanged",
        "state (word) off: answer unchanged",
    ):
        assert held[name].share >= 0.8, name
    # Known not to hold on this model: without "say a capital" it says another of the state's facts.
    assert held["say a capital off: answer is the state"].share < 0.5
    this = {row.name: row.cells["say this capital"].value for row in fractions.rows}
    assert this["the state off"] < this["capital (word) off"] < this["state (word) off"]
    assert this["say a capital off"] < this["capital (word) off"]


@pytest.mark.slow
def test_a_state_a_country_and_a_province_can_be_injected_and_the_province_is_the_weakest(capitals, patterns):
    table = two_hop_patterns.injection_table(capitals, n=20, places=patterns[0])
    for row in table.rows:
        assert row.rate.share >= 0.85, row.name
        assert row.cells["say own capital"].value < 0.6
    said = {row.name: row.cells["say its capital"].value for row in table.rows}
    assert said["a Canadian province"] < min(said["another state"], said["a country"])


# Languages


@pytest.mark.slow
def test_the_language_is_exchanged_and_random_features_do_not(capitals, words):
    table = multilingual.language_table(capitals, words=words, sources=("French", "Spanish"), targets=["English"])
    assert len(table.rows) == 2
    for row in table.rows:
        assert row.cells["-1/2"].asked >= 20
        assert row.cells["-1/2"].share >= 0.7, row.name
        assert row.cells["random features"].share <= 0.05, row.name
        assert row.cells["whole position"].share >= 0.85, row.name


@pytest.mark.slow
def test_the_operand_is_exchanged_for_what_english_switches_on(capitals, words):
    table = multilingual.operand_table(capitals, words=words, n=22)
    for language in ("French", "Spanish"):
        row = table[language]
        assert row.cells["0/2"].asked >= 20
        assert row.cells["0/2"].share >= 0.7
        assert row.cells["random features"].share <= 0.05
        assert row.cells["whole position"].share >= 0.95


@pytest.mark.slow
def test_opposites_become_the_same_meaning_only_where_the_operation_is_known(capitals, words):
    table = operations.operation_table(capitals, words=words, n=24, languages=["French", "Spanish"])
    where = "opposite -> same meaning, closing quote, named {} the operand"
    for language in ("French", "Spanish"):
        before, after = (table[f"{language} {where.format(x)}"].cells["-1/2"] for x in ("before", "after"))
        assert before.asked >= 20
        assert before.share >= 0.7
        assert after.share <= 0.05
    assert table["English opposite -> synonym, closing quote"].cells["-1/2"].share <= 0.05  # the published failure
    assert table["English opposite -> synonym, last position"].cells["-1/2"].share >= 0.7


@pytest.mark.slow
def test_graphs_of_one_word_share_more_across_languages_than_graphs_of_two(capitals, words):
    for row in operations.overlap_table(capitals, n=5, words=words).rows:
        assert row.cells["nodes, same word"].value > row.cells["nodes, other word"].value
        assert row.cells["edges, same word"].value > row.cells["edges, other word"].value


# Any model


def test_prose_asks_the_same_questions_on_a_model_that_reads_both(capitals, places):
    prose = Places(capitals, places.corpus, lab=hub.ProseLab(capitals))
    rng = random.Random(0)
    for city in rng.sample(range(len(places.cities)), 20):
        for template in range(len(templates.TWO_HOP)):
            one, other = places.question(city, template), prose.question(city, template)
            assert (one.at, one.answer) == (other.at, other.answer)
            assert capitals.model.to_tokens(one.text).tolist() == capitals.model.to_tokens(other.text).tolist()
    assert torch.equal(prose.inside, places.inside)
    assert prose.lab.text('The opposite of " small " is "'.split()) == 'The opposite of "small" is "'


def test_without_a_hub_the_gemma_study_says_what_it_would_fetch():
    with pytest.raises(hub.StudySkipped, match=r"google/gemma-2-2b.*HF_HUB_OFFLINE"):
        hub.gemma_tables()


def test_the_published_supernodes_are_read_from_their_address():
    nodes = {node.name: node for node in cl.supernodes_from_url(hub.DALLAS)}
    assert list(nodes) == ["capital", "state", "Texas", "capital cities / say a capital city", "say Austin"]
    assert Feature(20, 9, 15589) in nodes["Texas"]
    assert {f.pos for f in nodes["capital"]} == {4}


# Tables


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(right, asked, low, high):
    assert Rate(right, asked).interval == pytest.approx((low, high), abs=1e-4)


def test_a_table_prints_and_is_json_also_where_figures_are_missing(tmp_path):
    rows = (
        Row("a|b", {"x": Rate(1, 2), "y": Mean.of([0.5, math.nan, 0.7])}, (Failure("Dallas", "Austin", "<Waco>"),)),
        Row("none", {"x": Rate(0, 0), "y": Mean.of([]), "z": math.nan}),
    )
    table = StudyTable("A <title>", rows, ("a note",))
    document = table.to_json(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == document
    assert document["rows"][1]["cells"]["x"]["share"] is None
    assert document["rows"][0]["failures"] == [{"item": "Dallas", "wanted": "Austin", "got": "<Waco>"}]
    assert "0.50 [0.09, 0.91] 1/2" in str(table)
    assert "<title>" not in table._repr_html_()
    assert "a\\|b" in table.markdown()
    with pytest.raises(KeyError, match="rows are"):
        table["absent"]
    assert table["none"].rate == Rate(0, 0)

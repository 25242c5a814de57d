"""The same entities cut into one, two and three tokens: the cut, the corpus, the bundled model, and the study on it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from circuit_lens import zoo
from circuit_lens.cli import build_app
from circuit_lens.graph.rates import Mean, Rate
from circuit_lens.patchscopes.sources import EMBEDDING
from circuit_lens.studies import patch_cuts, report
from circuit_lens.studies.tables import Row, StudyTable
from circuit_lens.zoo import train
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.cut_names import CUT, FORMS, GLUE, SHORTEST, CutCorpus, cut, ending, entities_to_cut
from circuit_lens.zoo.cut_recipe import choose_cut_names, make_cut_names, section, write_section
from circuit_lens.zoo.loading import ASSETS, load_model_from
from circuit_lens.zoo.recipe import MODELS, Workshop
from circuit_lens.zoo.report import BUDGET_BYTES
from circuit_lens.zoo.train import TrainingSettings

LETTERS = st.text("abcdeé", min_size=SHORTEST, max_size=9)


@pytest.fixture(scope="module")
def corpus():
    return CutCorpus()


@pytest.fixture(scope="module")
def sentences(corpus):
    return corpus.take(60_000, seed=31337)


@pytest.fixture(scope="module")
def model():
    return zoo.load_model(CUT)


@pytest.fixture(scope="module")
def cuts(model, corpus):
    return patch_cuts.read_cuts(model, corpus, n=12, layers=[EMBEDDING, 0, 1, 2])  # nothing is read into layer 3


# The cut


@given(name=LETTERS, n=st.sampled_from(FORMS))
@settings(deadline=None)
def test_pieces_spell_the_name_and_none_of_several_is_a_word(name, n):
    pieces = cut(name, n)
    assert "".join(piece.replace(GLUE, "") for piece in pieces) == name
    assert len(pieces) == n
    assert all(piece.replace(GLUE, "") for piece in pieces)
    assert n == 1 or not any(piece.isalpha() for piece in pieces)
    # Control: without the glue pieces are words.
    assert all(piece.replace(GLUE, "").isalpha() for piece in pieces)


@given(first=LETTERS, second=LETTERS)
@settings(deadline=None)
def test_two_names_have_no_form_in_common_and_share_a_last_piece_exactly_with_their_last_letters(first, second):
    forms = [{cut(name, n) for n in FORMS} for name in (first, second)]
    assert bool(forms[0] & forms[1]) == (first == second)
    assert (ending(first) == ending(second)) == (first[-2:] == second[-2:])
    assert cut(first, 2)[-1] == cut(first, 3)[-1] == ending(first)


@pytest.mark.parametrize(
    ("name", "n", "said"), [("Dallas", 4, "1, 2, 3"), ("Dallas", 0, "1, 2, 3"), ("Utah", 2, "5 letters"),
                            ("New York", 2, "one word"), ("Dall_", 1, "one word")],
)  # fmt: skip
def test_what_cannot_be_cut_is_an_error_that_says_what_can(name, n, said):
    with pytest.raises(ValueError, match=said):
        cut(name, n)


# The corpus


def test_the_last_piece_of_every_entity_is_that_of_cities_of_three_states_and_of_no_city_left_out_for_it(corpus):
    names = {city.name for city in corpus.cities}
    states = {last: {c.place.name for c in corpus.cities if ending(c.name) == last} for last in map(ending, names)}
    assert len(names) == len(corpus.cities) == 111
    assert min(map(len, states.values())) >= 3
    fit = [c for c in Corpus().cities if c.place.kind == "state" and len(c.name) >= SHORTEST and c.name.isalpha()]
    left = [city for city in fit if city.name not in names]
    assert left
    assert all(len({c.place.name for c in fit if c.name[-2:] == city.name[-2:]}) < 3 for city in left)
    assert entities_to_cut(left) == []


def test_no_two_cities_have_the_same_pieces(corpus):
    forms = [cut(city.name, n) for city in corpus.cities for n in FORMS]
    assert len(set(forms)) == len(forms)
    assert len({cut(city.name, 2)[-1] for city in corpus.cities}) < len(corpus.cities) / 5


def test_the_corpus_writes_no_form_that_is_not_a_cut_and_each_as_often_as_the_others(corpus, sentences):
    known = {" ".join(cut(city.name, n)): n for city in corpus.cities for n in FORMS}
    words, counts, glued = set(corpus.words()), Counter(), 0
    for sentence in sentences:
        assert words.issuperset(sentence.tokens)
        inside = set()
        for span in sentence.spans:
            text = span.mention.text
            if GLUE in text:
                assert text in known
                assert span.mention.name != span.mention.answer or "city" not in span.mention.facts
                inside |= set(range(span.start, span.end + 1))
            if text in known and span.mention.facts:
                counts[known[text]] += 1
                assert span.mention.name == (known[text] > 1)
        at = {i for i, token in enumerate(sentence.tokens) if GLUE in token}
        assert at <= inside
        glued += len(at)
    total = sum(counts.values())
    assert glued > total > 5000
    for n in FORMS:
        assert abs(counts[n] / total - 1 / 3) < 4 * (2 / 9 / total) ** 0.5, counts


def test_every_word_of_the_vocabulary_is_written_and_the_bundled_description_prompts_are_in_it(corpus, sentences):
    seen = {token for sentence in sentences for token in sentence.tokens}
    assert seen == set(corpus.words())
    prompt = "cat : small animal ; Lyon : city in France ; x : Maria read about Fact : the state containing x is"
    assert set(prompt.split()) <= seen
    assert "Paris" not in seen


# The bundled model


def test_a_model_without_dictionaries_loads_by_name_and_is_no_model_with_dictionaries():
    assert zoo.model_names() == [*zoo.names(), CUT]
    assert CUT not in zoo.names()
    with pytest.raises(ValueError, match=r"'capitals-cuts'; nearest: capitals-cut.*Valid: capitals, .*capitals-cut\."):
        zoo.load_model("capitals-cuts")
    with pytest.raises(ValueError, match=r"no dictionary set 'plt'.*Valid: neurons"):
        zoo.load(CUT)
    assert zoo.dictionary_sets(CUT) == ["neurons"]
    assert len(zoo.load(CUT, "neurons").dictionaries) == 4


def test_the_model_is_small_and_all_assets_keep_their_budget():
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.parent.name == CUT) < 620_000
    assert sum(sizes.values()) <= BUDGET_BYTES


def test_the_command_reads_a_cut_name_and_refuses_what_needs_dictionaries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(build_app(), ["patchscope", *arguments, "--model", CUT])

    done = run("--source", "Maria read about Ga_ _lvest_ _on", "--layers", "1", "--answer", "city in Texas")
    assert done.exit_code == 0, done.output
    assert "city in Texas" in " ".join(done.output.split())
    bridge = "--source", "Maria", "--bridge"
    for refused, said in ((("--feature", "L1:3"), "--dictionaries neurons"), (bridge, "leave out --bridge")):
        done = run(*refused)
        assert done.exit_code == 2
        assert said in " ".join(str(done.exception).split()) + done.output


# The study


def test_several_tokens_resolve_in_the_layers_and_their_last_piece_alone_does_not(cuts):
    table, targets = patch_cuts.cuts_table(cuts), patch_cuts.cut_targets_table(cuts)
    for question in patch_cuts.QUESTIONS:
        assert targets[f"{question}: one token: into embedding"].cells["gain"].high <= 0.1
        whole = table[f"{question}: one token, all target layers"].cells
        assert whole["embedding patch"].share >= 0.9
        for form in ("two tokens", "three tokens"):
            cells = table[f"{question}: {form}, all target layers"].cells
            assert cells["best fixed cell"].share >= 0.9
            assert cells["embedding patch"].share < 0.4
            assert cells["gain over it"].low > 0.3
            assert targets[f"{question}: {form}: into embedding"].cells["gain"].low > 0.3
            later = table[f"{question}: {form}, target layers 1 and later"].cells
            assert later["best fixed cell"].share >= 0.9
            assert later["embedding patch"].share <= 0.2
            early = table[f"{question}: {form}, read one token too early"].cells
            assert early["best fixed cell"].share <= 0.2
            assert max(cells["unpatched"].share, later["unpatched"].share) <= 0.2


def test_answers_of_other_cities_are_wrong(cuts):
    """The negative control of the scoring: the next city's answer is right no oftener than states repeat."""
    reading = cuts[0].forms[3]
    assert reading.accuracy.best_fixed.share >= 0.9
    moved = [dataclasses.replace(a, answer=b.answer) for a, b in zip(reading.items, reading.items[1:], strict=False)]
    shifted = dataclasses.replace(reading.part(items=range(len(moved))), items=tuple(moved))
    assert shifted.accuracy.best_fixed.share <= 0.2


def test_one_token_is_right_at_the_embedding_and_more_are_first_right_in_a_later_layer(cuts):
    table = patch_cuts.first_layers_table(cuts)
    layers = patch_cuts.cut_layers_table(cuts)
    for question in patch_cuts.QUESTIONS:
        assert table[f"{question}: one token"].cells["first layer"].value == EMBEDDING
        for form in ("two tokens", "three tokens"):
            gap = table[f"{question}: {form} minus one token"].cells
            assert gap["first layer"].low > 0.5
            assert gap["earlier"].right == 0
            hard = table[f"{question}: {form}"].cells["first layer, last piece wrong"]
            assert 0.5 < hard.value <= 1
            assert layers[f"{question}: {form}: embedding"].cells["into embedding, minus one token"].high < -0.4
            same = layers[f"{question}: {form}: layer 1"].cells["into the same layer, minus one token"]
            assert same.low >= -0.2
        # A third token makes no later layer of it than a second one does.
        between = table[f"{question}: three tokens minus two tokens"].cells["first layer"]
        assert abs(between.value) <= 0.3
        assert between.n == 12


def test_forms_of_two_and_three_tokens_are_one_at_the_embedding_and_part_in_the_first_layer(cuts):
    for one in cuts:
        two, three = (one.forms[n].result.texts for n in (2, 3))
        assert (two[:, 0] == three[:, 0]).all()
        assert not (two[:, 1] == three[:, 1]).all()
        assert not (one.forms[1].result.texts[:, 0] == two[:, 0]).all()
        assert [item.name for item in one.forms[1].items] == [item.name for item in one.forms[3].items]


def test_where_the_last_piece_fails_it_says_a_city_with_that_ending_more_than_chance_does(model, corpus):
    """With all cities, since a family of a few drawn ones holds few answers."""
    table = patch_cuts.last_piece_table(patch_cuts.read_cuts(model, corpus, questions=["state"], layers=[EMBEDDING]))
    for form in ("two tokens", "three tokens"):
        cells = table[f"state: {form}"].cells
        assert cells["right"].share <= cells["at most, by the last piece"] < 0.3
        assert cells["another of the family"].interval[0] > 0.9 > 0.3 > cells["by chance"]
    assert table["state: one token"].cells["another of the family"].asked == 0


def test_an_item_ends_in_the_last_piece_and_an_early_one_before_it(corpus):
    city = next(city for city in corpus.cities if city.name == "Galveston")
    asked = {n: patch_cuts.cut_items([city], n, "state")[0] for n in FORMS}
    assert asked[3].prompt == "Maria read about Ga_ _lvest_ _on"
    assert {one.answer for one in asked.values()} == {"Texas"}
    early = [patch_cuts.cut_items([city], n, "description", early=True)[0].prompt for n in FORMS]
    assert early == ["Maria read about", "Maria read about Galvest_", "Maria read about Ga_ _lvest_"]


@pytest.mark.slow
def test_all_cities_resolve_in_every_form_and_the_controls_fail(model, corpus):
    first, _, layers, _, last = patch_cuts.cut_tables(model, corpus, name=CUT)
    for question in patch_cuts.QUESTIONS:
        for form in ("one token", "two tokens", "three tokens"):
            cells = first[f"{question}: {form}, target layers 1 and later"].cells
            assert cells["best fixed cell"].asked == 111
            assert cells["best fixed cell"].share >= 0.95
            assert cells["embedding patch"].share <= 0.1
            assert first[f"{question}: {form}, read one token too early"].cells["best fixed cell"].share <= 0.1
            alone = last[f"{question}: {form}"].cells["right"].share
            assert alone >= 0.95 if form == "one token" else alone <= 0.25
        assert layers[f"{question}: two tokens minus one token"].cells["first layer"].low > 1
        assert layers[f"{question}: three tokens minus two tokens"].cells["first layer"].high < 0.1


# Reports


def _table(title: str) -> list[StudyTable]:
    return [StudyTable(title, (Row("a", {"x": Rate(1, 2), "y": Mean.of([1.0, 2.0])}),))]


def test_one_model_of_a_report_is_replaced_and_the_others_stay_where_that_is_asked(tmp_path):
    path = tmp_path / "report.md"
    report.write_report({"capitals": _table("First"), CUT: _table("Second")}, path, part="patchscopes")
    whole = path.read_text()
    report.write_report({CUT: _table("Second")}, path, part="patchscopes", keep=True)
    assert path.read_text() == whole
    report.write_report({CUT: _table("Third")}, path, part="patchscopes", keep=True)
    assert path.read_text() == whole.replace("Second", "Third")
    report.write_report({CUT: _table("Third")}, path, part="patchscopes")
    assert "First" not in path.read_text()


def _measured(*worst: int) -> dict:
    right = {str(n): {"right": 10, "asked": 10} for n in FORMS}
    return {
        seed: {
            "n_parameters": 7,
            "descriptions": right | {"2": {"right": number, "asked": 10}},
            "states": right,
            "patched": {str(n): [{"right": n, "asked": 10}] * 5 for n in FORMS},
            "sentences": right | {"1": {"right": 0, "asked": 10}},
        }
        for seed, number in enumerate(worst)
    }


def test_the_seed_that_ships_is_the_best_in_its_worst_form_and_of_equal_ones_the_lowest():
    assert choose_cut_names(_measured(8, 9, 7)) == 1
    assert choose_cut_names(_measured(10, 10, 10)) == 0


def test_the_section_is_written_before_the_bytes_once_and_the_rest_of_the_report_stays(tmp_path, corpus):
    path = tmp_path / "report.md"
    path.write_text("# Title\n\n## Names of several tokens\n\ntext\n\n## Bytes\n\nold\n", encoding="utf-8")
    for seeds in ((8, 9), (9, 8)):
        write_section(section(corpus, _measured(*seeds), choose_cut_names(_measured(*seeds))), path=path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n## Names of several tokens\n\ntext\n\n## Names cut into tokens")
    assert text.count("## Names cut into tokens") == text.count("## Bytes") == 1
    assert "ships with seed 0" in text
    assert "old" not in text
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert f"| left of the budget |  | {BUDGET_BYTES - size:,} of" in text


@pytest.mark.slow
def test_the_recipe_trains_ships_and_reports_from_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus):
    monkeypatch.setitem(MODELS, CUT, TrainingSettings(steps=2, batch=2))
    monkeypatch.setattr(train, "_compiled", lambda function: function)
    (tmp_path / "assets").mkdir()
    lines: list[str] = []
    make_cut_names(
        Workshop(tmp_path / "work", lines.append), (0,), assets=tmp_path / "assets", report=tmp_path / "report.md"
    )
    made = load_model_from(tmp_path / "assets" / CUT)
    assert (made.cfg.n_layers, made.cfg.d_model, made.cfg.n_heads, made.cfg.d_mlp) == (4, 64, 2, 256)
    assert made.cfg.d_vocab == len(corpus.words()) + 4
    assert "seed 0" in (tmp_path / "report.md").read_text()
    assert any(line.startswith("shipped") for line in lines)

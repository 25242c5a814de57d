"""The file of feature information returns what was put in, finds features by site or layer, and refuses the rest."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from circuit_lens.errors import GraphFileError
from circuit_lens.graph.feature_info import NO_TOKEN, Detection, FeatureTable, SiteInfo, load_feature_info

WORDS = ["<bos>", "Dallas", "is", "in", "Texas", "的反义词是"]
N_FEATURES = 3


def make_site(site, layer, seed):
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(NO_TOKEN, len(WORDS), shape, generator=generator, dtype=torch.int32)

    def numbers(*shape):
        return torch.rand(*shape, generator=generator)

    return SiteInfo(
        site=site,
        layer=layer,
        labels=("state=Texas", "say Austin", ""),
        detections=((Detection("state", ("Texas", "Ohio"), 0.5, 0.25),), (), ()),
        density=numbers(N_FEATURES),
        max_activation=numbers(N_FEATURES),
        histogram=ids(N_FEATURES, 12) + 1,
        top_tokens=ids(N_FEATURES, 5),
        top_token_shares=numbers(N_FEATURES, 5).half(),
        context_tokens=ids(N_FEATURES, 4, 12),
        context_activations=numbers(N_FEATURES, 4, 12).half(),
        top_logit_tokens=ids(N_FEATURES, 5),
        top_logits=numbers(N_FEATURES, 5).half(),
        bottom_logit_tokens=ids(N_FEATURES, 5),
        bottom_logits=numbers(N_FEATURES, 5).half(),
    )


@pytest.fixture
def table():
    sites = [make_site("blocks.0.hook_mlp_out", 0, 0), make_site("blocks.1.hook_mlp_out", 1, 1)]
    return FeatureTable(sites, WORDS, text="two words", n_tokens=7)


def test_a_saved_table_loads_as_it_was(table, tmp_path):
    path = tmp_path / "features.safetensors"
    table.save(path)
    loaded = load_feature_info(path)
    assert (loaded.vocabulary, loaded.text, loaded.n_tokens) == (table.vocabulary, "two words", 7)
    for before, after in zip(table.sites, loaded.sites, strict=True):
        for index in range(N_FEATURES):
            assert table.feature(before.site, before.layer, index) == loaded.feature(after.site, after.layer, index)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_label_is_found_by_site_or_by_layer_alone(table):
    assert table.label("blocks.1.hook_mlp_out", 1, 0) == table.label(None, 1, 0) == "state=Texas"
    assert table.search("texas") == [("blocks.0.hook_mlp_out", 0, 0), ("blocks.1.hook_mlp_out", 1, 0)]


@pytest.mark.parametrize(
    ("site", "layer", "index"),
    [("blocks.0.hook_mlp_out", 1, 0), ("blocks.9.hook_mlp_out", 0, 0), (None, 7, 0), (None, 0, 3), (None, 0, -1)],
)
def test_what_is_not_there_is_an_error_that_says_what_is(table, site, layer, index):
    with pytest.raises(KeyError, match=r"blocks|Layers"):
        table.label(site, layer, index)


def test_a_layer_with_two_dictionaries_needs_the_site():
    table = FeatureTable([make_site("a", 0, 0), make_site("b", 0, 1)], WORDS, text="", n_tokens=1)
    assert table.label("b", 0, 1) == "say Austin"
    with pytest.raises(KeyError, match="2 dictionaries"):
        table.label(None, 0, 1)


def test_foreign_and_damaged_files_are_refused(table, tmp_path):
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    table.save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for path in (foreign, damaged, tmp_path / "missing"):
        with pytest.raises(GraphFileError):
            load_feature_info(path)


def test_a_failed_write_keeps_the_old_file(table, tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    table.save(path)
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("circuit_lens.graph.feature_info.save_file", full_disk)
    with pytest.raises(GraphFileError, match="No space"):
        table.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_with_damaged_records_is_refused_by_name(table, tmp_path):
    path = tmp_path / "features.safetensors"
    table.save(path)
    changed = load_file(path)
    changed["strings"] = changed["strings"][:-20].contiguous()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(changed, path, metadata=header)
    with pytest.raises(GraphFileError, match="damaged"):
        load_feature_info(path)


def test_contexts_leave_out_what_only_fills_up(table):
    for context in table.feature(None, 0, 0).contexts:
        assert len(context.tokens) == len(context.activations)
        assert context.activations[context.peak] == max(context.activations)

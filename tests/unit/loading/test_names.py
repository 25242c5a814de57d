"""Names, releases, rules for one dictionary of each layer, and the table of published sets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import circuit_lens as cl
from circuit_lens.dictionaries.adapt import adapt
from circuit_lens.loading import FetchError, LoadError, load_dictionaries, published, table
from circuit_lens.loading.choice import choose
from circuit_lens.loading.hub import Address, parse_address
from circuit_lens.loading.layouts import Found, Settings
from circuit_lens.loading.names import find, registry
from circuit_lens.loading.pairs import check_processing
from tests import builders
from tests.unit.loading import layout_files as files
from tests.unit.loading.layout_files import raw

ALL = "gemma-scope-2-1b-pt-transcoders-all"


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf:a/b", Address("a/b")),
        ("hf:a/b@main", Address("a/b", "main")),
        ("hf:a/b.c-d@v1/x/y/", Address("a/b.c-d", "v1", "x/y")),
        ("hf://a/b/x/p.npz?revision=abc", Address("a/b", "abc", "x/p.npz")),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["hf:a", "hf:a/b/../c", "a/b", "hf:a/b@r/x?revision=q", "hf:"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="is no address on the hub"):
        parse_address(text)


# The table


def test_every_release_of_the_table_has_one_dictionary_for_each_layer() -> None:
    checked = 0
    for record in table():
        if not record.source.startswith("hf:"):
            found = find(record.source)
            assert [one.settings.layer for one in sorted(found, key=lambda f: f.settings.layer or 0)] == list(
                range(record.n_layers)
            ), record
            checked += 1
    assert checked > 40


def test_hooks_of_the_table_are_what_the_registry_declares_or_the_correction() -> None:
    for record in table():
        if record.source.split(":")[0] in registry() and record.kind in ("plt", "skip"):
            settings = find(record.source)[0].settings
            assert (settings.hook_in, settings.hook_out) == (record.reads, record.writes)


def test_models_of_the_table_are_transformerlens_models() -> None:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    assert {record.repository for record in table()} <= set(OFFICIAL_MODEL_NAMES)


def test_names_and_sets_are_unique_and_print() -> None:
    keys = [(record.model, record.variant) for record in table()]
    assert len(keys) == len(set(keys))
    lines = str(table()).splitlines()
    assert len(lines) == len(keys) + 1
    assert lines[0].split() == ["model", "set", "kind", "features", "download", "model's", "class", "source"]


def test_sizes_are_those_of_the_shapes() -> None:
    assert published.variant("gemma-2-2b", "clt-426k").download == 2 * 2304 * 16384 * (26 + 26 * 27 / 2)
    assert published.variant("gemma-2-2b", None).download == 4 * 26 * 2 * 2304 * 16384
    assert published.variant("qwen3-4b", None).download is None


@pytest.mark.parametrize("name", ["gemma-2-2b", "google/gemma-2-2b", "Gemma-2-2B"])
def test_a_model_is_found_with_and_without_its_organisation(name: str) -> None:
    assert [record.variant for record in table(name)][:2] == ["plt-16k", "clt-426k"]


def test_unknown_models_and_sets_name_the_nearest() -> None:
    with pytest.raises(LoadError, match=r"'gemma-2-2c' are in the table; nearest: gemma-2-2b"):
        table("gemma-2-2c")
    with pytest.raises(LoadError, match=r"no set 'clt-426'; nearest: clt-426k.*valid are plt-16k"):
        published.variant("gemma-2-2b", "clt-426")


# One of each layer


def _found(layer: int | None, name: str, l0: float | None = None) -> Found:
    return Found(repository="a/b", files=(name,), settings=Settings(layer=layer, l0=l0))


LAYERS = [_found(i, f"layer_{i}/{end}", l0) for i in (1, 0) for end, l0 in (("a", 70.0 + i), ("b", 20.0), ("c", 50.0))]


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        ("lowest-l0", "bb"),
        ("highest-l0", "aa"),
        (55, "cc"),
        (60.3, "ac"),  # between 70 and 50, and between 71 and 50
        (1e9, "aa"),
        ("[bx]$", "bb"),
        ("layer_0/a|layer_1/c", "ac"),
    ],
)
def test_a_rule_chooses_one_of_each_layer(rule: str | float, ends: str) -> None:
    chosen = choose(LAYERS, rule, "it")
    assert [one.settings.layer for one in chosen] == [0, 1]
    assert "".join(one.files[0][-1] for one in chosen) == ends


def test_of_two_as_near_the_lower_is_chosen() -> None:
    assert choose([_found(0, "x", 40.0), _found(0, "y", 60.0)], 50, "it")[0].files == ("x",)


@pytest.mark.parametrize(
    ("found", "rule", "message"),
    [
        (LAYERS, None, "3 dictionaries for layer 1 .*choose with per_layer: lowest-l0, highest-l0, a number"),
        (LAYERS, "/a|/b", "matches 2 of the 3 of it, layer 0"),
        (LAYERS, "nothing", "matches 0 of the 3 of it, layer 0"),
        (LAYERS, "(", "is no regular expression"),
        ([_found(0, "x", 5.0), _found(0, "y")], "lowest-l0", "no L0 is published for hf:a/b/y"),
        ([_found(0, "x", 5.0), _found(0, "y", 5.0)], 7, "does not decide for it, layer 0: hf:a/b/x, hf:a/b/y all"),
        ([_found(None, "x")], "lowest-l0", "the layer of hf:a/b/x is not known"),
    ],
)
def test_a_rule_that_does_not_decide_is_an_error(found: list[Found], rule: str | float | None, message: str) -> None:
    with pytest.raises(cl.CircuitLensError, match=message):
        choose(found, rule, "it")


def test_rules_choose_in_releases_by_their_published_l0() -> None:
    entry = registry()[ALL]
    low = find(f"{ALL}:layer_*_width_16k_l0_*g", per_layer="lowest-l0")
    assert low == find(f"{ALL}:layer_*_width_16k_l0_*g#lowest-l0")
    assert [one.settings.layer for one in low] == list(range(26))
    both = find(ALL, per_layer="layer_[0-9]+_width_262k_l0_small$")
    assert {one.settings.l0 for one in both} == {entry.expected_l0[one.sae_id] for one in both}
    with pytest.raises(LoadError, match="does not decide"):
        find(ALL, per_layer="lowest-l0")
    with pytest.raises(LoadError, match=f"several for a layer; choose one kind.*or a rule: {ALL}#lowest-l0"):
        find(ALL)


def test_a_rule_chooses_among_the_folders_of_gemma_scope(tmp_path: Path) -> None:
    layers = {}
    for i in range(2):
        for l0 in (12, 80):
            layers[i, l0] = raw(10 * i + l0)
            files.write_npz(tmp_path / f"layer_{i}/width_16k/average_l0_{l0}", layers[i, l0])
    hooks = {"hook_in": "ln2.hook_normalized", "hook_out": "hook_mlp_out"}
    for rule, l0 in (("lowest-l0", 12), ("highest-l0", 80), (30, 12), ("l0_80", 80)):
        for given in ({"what": tmp_path, "per_layer": rule}, {"what": f"{tmp_path}#{rule}"}):
            loaded = load_dictionaries(**given, **hooks)
            assert [torch.equal(one.W_dec, layers[i, l0]["W_dec"]) for i, one in enumerate(loaded)] == [True, True]


def test_a_rule_chooses_among_folders_of_saelens_by_what_their_settings_say(tmp_path: Path) -> None:
    model = builders.build("gpt2")
    for l0, seed in ((12.0, 1), (80.0, 2)):
        for one in builders.transcoders(model, seed=seed):
            one.cfg.metadata.l0 = l0
            one.save_model(str(tmp_path / f"{one.cfg.metadata.hook_name_out}_{l0:g}"))
    for rule, l0 in (("lowest-l0", 12), ("highest-l0", 80), (30, 12), ("_80$", 80)):
        loaded = load_dictionaries(tmp_path, per_layer=rule)
        hooks = [f"blocks.{i}.hook_mlp_out" for i in range(model.cfg.n_layers)]
        assert [(one.cfg.metadata.hook_name_out, one.cfg.metadata.l0) for one in loaded] == [(h, l0) for h in hooks]
    with pytest.raises(cl.DictionaryError, match=r"2 dictionaries for layer 0 .*choose with per_layer"):
        load_dictionaries(tmp_path)
    path = tmp_path / "blocks.0.hook_mlp_out_12" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": {}}))
    with pytest.raises(LoadError, match="give the folders that you want as a list"):
        load_dictionaries(tmp_path, per_layer="lowest-l0")


# Releases, by the code of SAELens


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_release_in_circuit_tracers_layout_is_what_saelens_makes_of_it(cache: Path) -> None:
    from sae_lens import SAE

    folder = files.write_plt(files.cache_folder(cache, "mwhanna/qwen3-4b-transcoders"), [raw(0), raw(1)])
    width = {name: {"value": n} for name, n in (("d_model", 6), ("d_feature", 10), ("batch_size", 8))}
    (folder / "wandb-config.yaml").write_text(json.dumps(width))
    (ours,) = load_dictionaries("mwhanna-qwen3-4b-transcoders:layer_1")
    with pytest.warns(UserWarning, match="model_from_pretrained_kwargs"):
        theirs = SAE.from_pretrained("mwhanna-qwen3-4b-transcoders", "layer_1")
    assert adapt(ours).fingerprint() == adapt(theirs).fingerprint()
    assert (ours.cfg.metadata.hook_name, ours.cfg.metadata.hook_name_out) == (
        theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out,
    )  # fmt: skip
    assert ours.cfg.metadata.source == f"hf:mwhanna/qwen3-4b-transcoders@{files.COMMIT}/layer_1.safetensors"
    with pytest.raises(FetchError, match=r"would fetch 34 file\(s\) \(layer_2\.safetensors, .*and 30 more"):
        load_dictionaries("mwhanna-qwen3-4b-transcoders")


def test_a_release_in_saelens_layout_gets_the_corrections_of_its_registry(cache: Path) -> None:
    folder = files.cache_folder(cache, "jbloom/GPT2-Small-SAEs-Reformatted") / "blocks.3.hook_resid_pre"
    folder.mkdir()
    weights = {name: raw(0)[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    save_file(weights, folder / "sae_weights.safetensors")
    config = {"d_in": 6, "d_sae": 10, "hook_name": "blocks.3.hook_resid_pre", "activation_fn_str": "relu",
              "dtype": "float32", "device": "cpu", "normalize_activations": "none"}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    (one,) = load_dictionaries("gpt2-small-res-jb:blocks.3.hook_resid_pre")
    assert torch.equal(one.W_dec, weights["W_dec"])
    assert one.cfg.metadata.source.endswith(f"@{files.COMMIT}/blocks.3.hook_resid_pre/cfg.json")
    check_processing([one], published.variant("gpt2", None).processing)
    with pytest.raises(cl.DictionaryError, match=r"trained with center_writing_weights=True, .*loaded with center_wri"):
        check_processing([one], {})


def test_a_folder_of_any_repository_is_named_as_saelens_names_it(cache: Path, tmp_path: Path) -> None:
    plt = files.write_plt(tmp_path / "plt", [raw(0)], "jumprelu")
    (one,) = load_dictionaries(plt, lazy=False)
    one.save_model(str(files.cache_folder(cache, "a/b") / "layer_0"))
    for name in ("a/b:layer_0", "hf:a/b", f"hf:a/b@{files.COMMIT}/layer_0"):
        (other,) = load_dictionaries(name)
        assert adapt(other).fingerprint() == adapt(one).fingerprint()
        assert other.cfg.metadata.source == f"hf:a/b@{files.COMMIT}/layer_0/cfg.json"


def test_hooks_of_a_cross_layer_transcoder_may_be_given(tmp_path: Path) -> None:
    files.write_clt(tmp_path / "one")
    (clt,) = load_dictionaries(tmp_path / "one", hook_in="mlp.hook_in", lazy=False)
    assert [d.hook_in for d in clt.dictionaries] == [f"blocks.{i}.mlp.hook_in" for i in range(3)]
    clt.save(tmp_path / "two", layout="saelens")
    (other,) = load_dictionaries(tmp_path / "two", hook_in="ln2.hook_normalized")
    assert [d.hook_in for d in other.dictionaries] == [f"blocks.{i}.ln2.hook_normalized" for i in range(3)]


def test_a_release_of_gemma_scope_2_needs_no_network_for_its_shapes(cache: Path) -> None:
    root = files.cache_folder(cache, "google/gemma-scope-2-1b-pt")
    folder = root / "transcoder_all" / "layer_7_width_16k_l0_small_affine"
    files.write_scope_2(folder, raw(7), 7, skip=True)
    (one,) = load_dictionaries(f"{ALL}:layer_7_width_16k_l0_small_affine")
    assert (adapt(one).hook_in, adapt(one).site) == ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    (folder / "config.json").unlink()  # SAELens' registry says what it would
    (other,) = load_dictionaries(f"{ALL}:layer_7_width_16k_l0_small_affine")
    assert (adapt(other).hook_in, adapt(other).fingerprint()) == (adapt(one).hook_in, adapt(one).fingerprint())


def test_layers_of_a_cross_layer_transcoder_are_no_transcoders(cache: Path) -> None:
    release = "mntss-gemma-2-2b-2.5m-clt-as-per-layer"
    with pytest.raises(LoadError, match=r"is no transcoder by itself.*hf:mntss/clt-gemma-2-2b-2\.5M"):
        find(f"{release}:layer_3")
    (whole,) = find(release)
    assert (whole.layout, len(whole.files)) == ("clt", 53)


def test_a_cached_repository_is_read_without_network_and_names_its_commit(cache: Path) -> None:
    files.write_clt(files.cache_folder(cache, "mntss/clt-gemma-2-2b-426k"))
    (clt,) = load_dictionaries("hf:mntss/clt-gemma-2-2b-426k")
    assert clt.metadata["source"] == f"hf:mntss/clt-gemma-2-2b-426k@{files.COMMIT}"
    with pytest.raises(FetchError, match=r"would list the files of https://huggingface\.co/a/b at v2, which HF_HUB"):
        load_dictionaries("hf:a/b@v2")


def test_a_file_that_the_cache_lacks_is_named_before_anything_is_read(cache: Path) -> None:
    root = files.cache_folder(cache, "google/gemma-scope-2b-pt-transcoders")
    ids = registry()["gemma-scope-2b-pt-transcoders"].saes_map
    for path in list(ids.values())[:-1]:
        (root / path).mkdir(parents=True)
        (root / path / "params.npz").write_bytes(b"damaged")
    with pytest.raises(FetchError, match=r"would fetch 1 file\(s\) \(layer_25/width_16k/average_l0_41/params\.npz\)"):
        load_dictionaries("gemma-scope-2b-pt-transcoders")


def test_listed_files_of_other_repositories_are_found(cache: Path) -> None:
    root = files.cache_folder(cache, "google/gemma-scope-2b-pt-transcoders")
    paths = [f"layer_{i}/width_16k/average_l0_{50 + i}" for i in range(2)]
    for i, path in enumerate(paths):
        files.write_npz(root / path, raw(i))
    uris = [f"hf://google/gemma-scope-2b-pt-transcoders/{path}/params.npz" for path in paths]
    files.write_plt(
        files.cache_folder(cache, "a/listed"), [], transcoders=uris, feature_input_hook="ln2.hook_normalized"
    )
    loaded = load_dictionaries("hf:a/listed")
    assert [adapt(one).hook_in for one in loaded] == [f"blocks.{i}.ln2.hook_normalized" for i in range(2)]
    assert torch.equal(loaded[1].W_dec, raw(1)["W_dec"])
    shutil.rmtree(root)
    with pytest.raises(FetchError, match="google/gemma-scope-2b-pt-transcoders"):
        load_dictionaries("hf:a/listed")


def test_listed_files_of_gemma_scope_2_are_read_as_what_they_are(cache: Path) -> None:
    root = files.cache_folder(cache, "google/gemma-scope-2-1b-pt")
    for i in range(3):
        files.write_scope_2(root / f"transcoder_all/layer_{i}_width_16k_l0_small", raw(i), i, skip=False)
        decoder = torch.randn(10, 3, 6, generator=torch.Generator().manual_seed(i))
        tensors = {name.lower(): raw(i)[name] for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        (root / "clt").mkdir(exist_ok=True)
        save_file({**tensors, "w_dec": decoder}, root / "clt" / f"params_layer_{i}.safetensors")
    uri = "hf://google/gemma-scope-2-1b-pt"
    listed = [f"{uri}/transcoder_all/layer_{i}_width_16k_l0_small/params.safetensors" for i in range(3)]
    files.write_plt(files.cache_folder(cache, "a/plt"), [], transcoders=listed)
    loaded = load_dictionaries("hf:a/plt")
    assert [torch.equal(one.threshold, raw(i)["threshold"]) for i, one in enumerate(loaded)] == [True] * 3
    listed = [f"{uri}/clt/params_layer_{i}.safetensors" for i in range(3)]
    kind = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
    files.write_plt(files.cache_folder(cache, "a/clt"), [], transcoders=listed, **kind)
    (clt,) = load_dictionaries("hf:a/clt")
    assert [d.hook_in for d in clt.dictionaries] == [f"blocks.{i}.hook_resid_mid" for i in range(3)]
    assert clt.metadata["source"] == f"hf:google/gemma-scope-2-1b-pt@{files.COMMIT}/clt"


# Light


def test_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys; from circuit_lens import loading; str(loading.table()); loading.table('gemma-2-2b')\n"
        "heavy = {'torch', 'transformer_lens', 'sae_lens', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

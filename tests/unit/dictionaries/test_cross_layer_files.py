"""Cross-layer transcoders survive both layouts whole, read lazily as well, and damaged folders are named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from circuit_lens.dictionaries import cross_layer_weights, lazy_weights
from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.dictionaries.lazy_weights import TensorFile
from circuit_lens.errors import DictionaryError
from tests.invariants.cross_layer_builder import weights

LAYOUTS = ("saelens", "circuit-tracer")
KINDS = [(a, s) for a in ("relu", "jumprelu", "topk") for s in (False, True)]
Damage = Callable[[Path], Any]


def same(a: CrossLayerTranscoder, b: CrossLayerTranscoder, *, dtype: torch.dtype = torch.float64) -> bool:
    """Whether two transcoders compute the same, bit for bit, and say the same of themselves."""
    x = torch.randn(5, a.d_in, generator=torch.Generator().manual_seed(3), dtype=dtype)
    index = torch.tensor([3, 0, 3, a.d_sae - 1])
    equal = [a.metadata == b.metadata, a.n_layers == b.n_layers]
    for p, q in zip(a.dictionaries, b.dictionaries, strict=True):
        facts = [(d.kind, d.hook_in, d.hooks_out, d.joint, d.fingerprint(), d.parts.k) for d in (p, q)]
        acts = p.activate(p.pre_acts(x), x)
        equal += [
            facts[0] == facts[1],
            torch.equal(p.pre_acts(x), q.pre_acts(x)),
            torch.equal(acts, q.activate(q.pre_acts(x), x)),
            torch.equal(p.decode(acts), q.decode(acts)),
            torch.equal(p.decode(torch.zeros_like(acts)), q.decode(torch.zeros_like(acts))),
            torch.equal(p.skip(x), q.skip(x)),
            torch.equal(p.encoder_rows(index, dtype), q.encoder_rows(index, dtype)),
            torch.equal(p.decoder_rows(index, dtype), q.decoder_rows(index, dtype)),
            torch.equal(p.decoder_bias(dtype), q.decoder_bias(dtype)),
        ]
    return all(equal)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("activation", "skip"), KINDS)
def test_a_round_trip_loses_nothing(activation, skip, layout, lazy, tmp_path):
    clt = CrossLayerTranscoder(**weights(activation=activation, skip=skip), metadata={"steps": 7, "by": ["us"]})
    clt.save(tmp_path / "clt", layout)
    back = CrossLayerTranscoder.load(tmp_path / "clt", lazy=lazy)
    assert same(clt, back)
    assert ("on disk" in repr(back)) == lazy
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    back.save(tmp_path / "again", other)  # from disk too
    assert same(clt, CrossLayerTranscoder.load(tmp_path / "again"))
    changed = CrossLayerTranscoder(**weights(activation=activation, skip=skip, seed=1), metadata=clt.metadata)
    assert not same(changed, back)  # control


def test_what_circuit_tracers_own_files_lose_is_kept(tmp_path):
    """k and the skip; positions without features and prompts without any; no negative pick."""
    clt = CrossLayerTranscoder(**weights(activation="topk", k=3, skip=True))
    clt.save(tmp_path / "clt", "circuit-tracer")
    config = yaml.safe_load((tmp_path / "clt/config.yaml").read_text())
    assert (config["activation"], config["k"], config["model_kind"]) == ("topk", 3, "cross_layer_transcoder")
    back = CrossLayerTranscoder.load(tmp_path / "clt", lazy=True)
    for d in back.dictionaries:
        x = torch.randn(6, 32, dtype=torch.float64)
        acts = d.activate(d.pre_acts(x), x)
        assert bool(((acts > 0).sum(-1) <= 3).all())
        assert float(acts.min()) >= 0
        acts[3:] = 0
        out = d.decode(acts)
        assert out.shape == (6, len(d.hooks_out), 32)
        assert torch.equal(out[3:], d.decoder_bias(torch.float64).expand(3, -1, -1))
        assert torch.equal(d.decode(0 * acts)[5], d.decoder_bias(torch.float64))
        assert d.skip_matrix(torch.float64) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lazy_is_eager_in_every_dtype_of_files(layout, dtype, tmp_path):
    made = weights(activation="jumprelu", skip=True, dtype=dtype)
    CrossLayerTranscoder(**made).save(tmp_path / "clt", layout)
    eager, lazy = (CrossLayerTranscoder.load(tmp_path / "clt", lazy=way) for way in (False, True))
    assert eager.dtype == lazy.dtype == dtype
    assert same(eager, lazy, dtype=torch.float32)
    kinds = [torch.float32, torch.float64]
    for kind in kinds:
        converted = [CrossLayerTranscoder.load(tmp_path / "clt", lazy=way, dtype=kind) for way in (False, True)]
        assert {c.dtype for c in converted} == {kind}
        assert same(*converted, dtype=kind)
        assert same(eager.to(kind), lazy.to(kind), dtype=kind)


@settings(max_examples=12)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), chunk=st.sampled_from([1, 64, 700, 2**23]))
def test_lazy_rows_are_the_eager_ones_for_any_question(data, layout, chunk, tmp_path_factory):
    n_layers, d, d_sae = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), data.draw(st.integers(4, 30))
    seed = data.draw(st.integers(0, 99))
    folder = tmp_path_factory.mktemp("clt") / "clt"
    CrossLayerTranscoder(**weights(n_layers, d, d_sae, seed=seed)).save(folder, layout)
    eager, lazy = (CrossLayerTranscoder.load(folder, lazy=way) for way in (False, True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_layer_weights, "CHUNK_NUMBERS", chunk)
        patch.setattr(lazy_weights, "REMEMBERED_NUMBERS", data.draw(st.sampled_from([0, 20, 2**24])))
        assert same(eager, lazy)
        for p, q in zip(eager.dictionaries, lazy.dictionaries, strict=True):
            for _ in range(3):
                index = torch.tensor(data.draw(st.lists(st.integers(0, d_sae - 1), max_size=12)), dtype=torch.long)
                assert torch.equal(p.decoder_rows(index, torch.float64), q.decoder_rows(index, torch.float64))
                assert torch.equal(p.encoder_rows(index, torch.float64), q.encoder_rows(index, torch.float64))
            acts = torch.zeros(2, d_sae, dtype=torch.float64, requires_grad=True)
            with torch.no_grad():
                acts[1, data.draw(st.integers(0, d_sae - 1))] = 1.5
            grads = [torch.autograd.grad(d.decode(acts).square().sum(), acts)[0] for d in (p, q)]
            assert torch.equal(*grads)


# ---------------------------------------------------------------------------------------------------------- laziness


def holes(path: Path, shapes: dict[str, list[int]]) -> int:
    """Write a safetensors file of zeros that the disk does not hold; return where the numbers begin."""
    described, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text)


def huge(folder: Path, *, d_sae: int = 2_000_000, d: int = 640) -> dict[int, torch.Tensor]:
    """Write a one-layer set of ten gigabytes of which the disk holds a few pages; return the rows that are there."""
    folder.mkdir()
    (folder / "config.yaml").write_text("{feature_input_hook: hook_resid_mid, feature_output_hook: hook_mlp_out}")
    holes(folder / "W_enc_0.safetensors", {"W_enc_0": [d_sae, d], "b_enc_0": [d_sae], "b_dec_0": [d]})
    start = holes(folder / "W_dec_0.safetensors", {"W_dec_0": [d_sae, 1, d]})
    rows = {i: torch.full((1, d), float(i + 1)) for i in (0, 5, 6, 1_000_003, d_sae - 1)}
    with open(folder / "W_dec_0.safetensors", "r+b") as file:
        for i, row in rows.items():
            file.seek(start + i * d * 4)
            file.write(row.numpy().tobytes())
    return rows


def test_only_the_rows_of_active_features_are_read(tmp_path, monkeypatch):
    rows = huge(tmp_path / "clt")
    read: list[int] = []
    take = TensorFile._take

    def counted(self: TensorFile, name: str, shape: Any, runs: Any) -> torch.Tensor:
        read.append(sum(stop - start for start, stop in runs))
        return take(self, name, shape, runs)

    d = CrossLayerTranscoder.load(tmp_path / "clt", lazy=True).dictionaries[0]
    monkeypatch.setattr(TensorFile, "_take", counted)
    index = torch.tensor([1_000_003, 5, 6, 5, 5, 0])
    assert torch.equal(d.decoder_rows(index, torch.float32)[:, 0], torch.cat([rows[i] for i in index.tolist()]))
    assert read == [4 * 640]  # four features in five rows asked for
    read.clear()
    acts = torch.zeros(3, d.d_sae)
    acts[0, 6], acts[2, 6], acts[2, d.d_sae - 1] = 2.0, 3.0, 0.5
    out = d.decode(acts)[:, 0]
    assert torch.equal(out[:, 0], torch.tensor([2 * 7.0, 0.0, 3 * 7.0 + 0.5 * 2e6]))
    assert read == [2 * 640]
    read.clear()
    d.decode(torch.zeros(3, d.d_sae))
    assert sum(read) == 0
    d.fingerprint()
    assert sum(read) < 200_000


def test_a_file_that_changes_under_a_lazy_transcoder_is_noticed(tmp_path):
    CrossLayerTranscoder(**weights()).save(tmp_path / "clt", "circuit-tracer")
    lazy = CrossLayerTranscoder.load(tmp_path / "clt", lazy=True)
    eager = CrossLayerTranscoder.load(tmp_path / "clt")
    path, index = tmp_path / "clt/W_dec_0.safetensors", torch.tensor([1])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DictionaryError, match="changed since it was opened"):
        lazy.dictionaries[0].decoder_rows(index, torch.float64)
    assert eager.dictionaries[0].decoder_rows(index, torch.float64).shape == (1, 3, 32)
    path.unlink()
    with pytest.raises(DictionaryError, match="cannot be read"):
        lazy.dictionaries[0].decoder_rows(index, torch.float64)


def test_nan_in_a_part_that_is_read_later_is_noticed_then(tmp_path):
    CrossLayerTranscoder(**weights()).save(tmp_path / "clt", "circuit-tracer")
    path = tmp_path / "clt/W_dec_1.safetensors"
    tensors = load_file(path)
    tensors["W_dec_1"][7, 1, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(DictionaryError, match=r"W_dec_1 in .* holds NaN"):
        CrossLayerTranscoder.load(tmp_path / "clt")
    d = CrossLayerTranscoder.load(tmp_path / "clt", lazy=True).dictionaries[1]
    assert d.decoder_rows(torch.tensor([6, 8]), torch.float64).shape == (2, 2, 32)
    with pytest.raises(DictionaryError, match=r"W_dec_1 in .* holds NaN"):
        d.decoder_rows(torch.tensor([7]), torch.float64)


# ------------------------------------------------------------------------------------------------------------ SAELens


@pytest.mark.parametrize(("activation", "skip"), [("relu", True), ("jumprelu", False), ("topk", True)])
def test_layers_are_saelens_modules_that_save_and_load(activation, skip, tmp_path):
    from sae_lens import SAE

    from circuit_lens.dictionaries.cross_layer_saelens import layer_of, module_of

    clt = CrossLayerTranscoder(**weights(activation=activation, skip=skip), metadata={"name": "x"})
    clt.save(tmp_path / "clt")
    x = torch.randn(4, 32, dtype=torch.float64)
    for i, d in enumerate(clt.dictionaries):
        module = SAE.load_from_disk(tmp_path / "clt" / f"layer_{i}")
        acts = d.activate(d.pre_acts(x), x)
        wanted = d.decode(acts)
        wanted[:, 0] += d.skip(x)
        assert torch.allclose(module(x), wanted, rtol=0, atol=1e-12)
        assert torch.allclose(module.encode(x), acts, rtol=0, atol=1e-12)
        read = layer_of(module)
        assert (read.fingerprint(), read.site, read.joint, read.kind) == (d.fingerprint(), d.site, d.joint, d.kind)
        assert read.parts.matrices.W_enc.data_ptr() == module.W_enc.data_ptr()  # read, not copied
        module_of(d, clt.metadata).save_model(tmp_path / "modules" / f"layer_{i}")
        module.save_model(tmp_path / "again" / f"layer_{i}")
        for name in ("modules", "again"):
            configs = [json.loads((tmp_path / f / f"layer_{i}/cfg.json").read_text()) for f in (name, "clt")]
            assert configs[0] == configs[1]
    assert same(CrossLayerTranscoder.load(tmp_path / "modules"), clt)
    assert same(CrossLayerTranscoder.load(tmp_path / "again", lazy=True), clt)


def test_a_saelens_layer_that_cannot_be_one_is_refused():
    from circuit_lens.dictionaries.cross_layer_saelens import layer_of, module_of

    d = CrossLayerTranscoder(**weights()).dictionaries[0]
    module = module_of(d)
    with pytest.raises(NotImplementedError, match="one decoder norm per output"):
        module.fold_W_dec_norm()
    module.W_dec.data[3, 0, 0] = float("inf")
    with pytest.raises(DictionaryError, match=r"W_dec of blocks.0.hook_mlp_out holds NaN or infinity"):
        layer_of(module)
    module = module_of(d)
    module.cfg.metadata.hook_names_out = None
    with pytest.raises(DictionaryError, match="names no hooks"):
        layer_of(module)
    module = module_of(d)
    module.cfg.activation = "gelu"
    with pytest.raises(DictionaryError, match="activation 'gelu' is unknown"):
        layer_of(module)


# ------------------------------------------------------------------------------------------------------------- errors


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_yaml(path: Path, **changes: Any) -> None:
    config = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def header(path: Path, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


ENC, DEC, YAML = "W_enc_1.safetensors", "W_dec_1.safetensors", "config.yaml"
JSON, SAE_FILE = "layer_1/cfg.json", "layer_1/sae_weights.safetensors"
DAMAGES: list[tuple[str, str, Damage, str]] = [
    ("circuit-tracer", "no decoder file", lambda f: (f / DEC).unlink(), r"W_dec_1.safetensors cannot be read"),
    ("circuit-tracer", "no encoder file", lambda f: (f / ENC).unlink(), r"W_enc_1.safetensors cannot be read"),
    (
        "circuit-tracer",
        "no last layer",
        lambda f: [(f / f"W_{n}_2.safetensors").unlink() for n in ("enc", "dec")],
        "decoders for 3 outputs, .* there are 2",
    ),
    ("circuit-tracer", "cut", lambda f: (f / DEC).write_bytes((f / DEC).read_bytes()[:-1]), "was cut short"),
    ("circuit-tracer", "cut to 4 bytes", lambda f: (f / DEC).write_bytes(b"1234"), "was cut short"),
    ("circuit-tracer", "empty", lambda f: (f / DEC).write_bytes(b""), "was cut short"),
    ("circuit-tracer", "foreign", lambda f: (f / DEC).write_bytes(b"PK\x03\x04" * 99), "no safetensors file"),
    ("circuit-tracer", "no JSON", lambda f: header(f / DEC, b"[hello]"), "its header is no JSON"),
    ("circuit-tracer", "no object", lambda f: header(f / DEC, b"[1, 2]"), "its header is no JSON object"),
    (
        "circuit-tracer",
        "offsets",
        lambda f: header(f / DEC, b'{"W_dec_1": {"dtype": "F32", "shape": [4], "data_offsets": ["a", null]}}'),
        "'W_dec_1' is not described",
    ),
    ("circuit-tracer", "no facts", lambda f: header(f / DEC, b'{"W_dec_1": 3}'), "'W_dec_1' is not described"),
    (
        "circuit-tracer",
        "extent",
        lambda f: header(f / DEC, b'{"W_dec_1": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'),
        "the extent of 'W_dec_1' does not fit",
    ),
    (
        "circuit-tracer",
        "integers",
        lambda f: edit_tensors(f / DEC, lambda t: t.update(W_dec_1=t["W_dec_1"].long())),
        "dtype I64; valid are F64, F32, F16, BF16",
    ),
    (
        "circuit-tracer",
        "other name",
        lambda f: edit_tensors(f / ENC, lambda t: t.update(b_enc_0=t.pop("b_enc_1"))),
        "has no tensor 'b_enc_1'; it has",
    ),
    (
        "circuit-tracer",
        "widths",
        lambda f: edit_tensors(f / DEC, lambda t: t.update(W_dec_1=t["W_dec_1"][:-1])),
        r"W_enc_1 .* has shape \(40, 32\) and W_dec_1 .* \(39, 2, 32\)",
    ),
    (
        "circuit-tracer",
        "negative threshold",
        lambda f: edit_tensors(f / ENC, lambda t: t.update(threshold_1=t["threshold_1"] - 9)),
        "threshold_1 .* has negative values",
    ),
    (
        "circuit-tracer",
        "one threshold missing",
        lambda f: edit_tensors(f / ENC, lambda t: t.pop("threshold_1")),
        "some layers .* have thresholds and some have none",
    ),
    ("circuit-tracer", "no YAML", lambda f: (f / YAML).write_text("{:"), "cannot be read as YAML"),
    ("circuit-tracer", "no mapping", lambda f: (f / YAML).write_text("- 1"), "holds no mapping"),
    ("circuit-tracer", "other kind", lambda f: edit_yaml(f / YAML, model_kind="transcoder_set"), "'transcoder_set'"),
    ("circuit-tracer", "says relu", lambda f: edit_yaml(f / YAML, activation="relu"), "the folder has thresholds"),
    ("circuit-tracer", "says gelu", lambda f: edit_yaml(f / YAML, activation="gelu"), "valid are relu, jump_relu"),
    ("circuit-tracer", "no hook", lambda f: edit_yaml(f / YAML, feature_input_hook=None), "give hook_in=, a name"),
    ("saelens", "no weights", lambda f: (f / SAE_FILE).unlink(), "sae_weights.safetensors cannot be read"),
    ("saelens", "no layer", lambda f: shutil.rmtree(f / "layer_1"), "cfg.json is missing"),
    ("saelens", "no last layer", lambda f: shutil.rmtree(f / "layer_2"), "writes 3 layers, there are 2 from it on"),
    ("saelens", "no JSON", lambda f: (f / JSON).write_text("{"), "cfg.json is no JSON"),
    ("saelens", "other", lambda f: edit_json(f / JSON, architecture="jumprelu"), "of architecture 'jumprelu'"),
    ("saelens", "outputs", lambda f: edit_json(f / JSON, n_out=1), "writes 1 layers, there are 2"),
    ("saelens", "activation", lambda f: edit_json(f / JSON, activation="gelu"), "its cfg.json is damaged"),
    (
        "saelens",
        "widths",
        lambda f: edit_tensors(f / SAE_FILE, lambda t: t.update(b_enc=t["b_enc"][:-1])),
        r"b_enc of .* has shape \(39,\)",
    ),
    (
        "saelens",
        "NaN",
        lambda f: edit_tensors(f / SAE_FILE, lambda t: t.update(b_dec=t["b_dec"] * float("nan"))),
        "b_dec in .* holds NaN",
    ),
]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("layout", "name", "damage", "message"), DAMAGES, ids=[f"{d[0]}-{d[1]}" for d in DAMAGES])
def test_a_damaged_folder_is_named(layout, name, damage, message, lazy, tmp_path):
    folder = tmp_path / "clt"
    CrossLayerTranscoder(**weights(activation="jumprelu")).save(folder, layout)
    CrossLayerTranscoder.load(folder, lazy=lazy)  # control
    damage(folder)
    with pytest.raises(DictionaryError, match=message):
        CrossLayerTranscoder.load(folder, lazy=lazy)


def test_topk_without_k_is_refused(tmp_path):
    CrossLayerTranscoder(**weights(activation="topk")).save(tmp_path / "clt", "circuit-tracer")
    edit_yaml(tmp_path / "clt/config.yaml", k=None)
    with pytest.raises(DictionaryError, match="k must be a whole number"):
        CrossLayerTranscoder.load(tmp_path / "clt")


def test_folders_that_hold_none_or_two_are_refused(tmp_path):
    with pytest.raises(DictionaryError, match="is no folder"):
        CrossLayerTranscoder.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DictionaryError, match="holds no cross-layer transcoder"):
        CrossLayerTranscoder.load(tmp_path / "empty")
    clt = CrossLayerTranscoder(**weights())
    for layout in LAYOUTS:
        clt.save(tmp_path / layout, layout)
    shutil.copytree(tmp_path / "saelens/layer_0", tmp_path / "circuit-tracer/layer_0")
    with pytest.raises(DictionaryError, match="holds two cross-layer transcoders"):
        CrossLayerTranscoder.load(tmp_path / "circuit-tracer")


def test_hooks_may_be_given_where_the_folder_says_none(tmp_path):
    clt = CrossLayerTranscoder(**weights(activation="jumprelu"))
    clt.save(tmp_path / "clt", "circuit-tracer")
    (tmp_path / "clt/config.yaml").unlink()
    with pytest.raises(DictionaryError, match="does not say what the layers read; give hook_in="):
        CrossLayerTranscoder.load(tmp_path / "clt")
    with pytest.raises(DictionaryError, match="hook_out has 1 names, the transcoder has 3 layers"):
        CrossLayerTranscoder.load(tmp_path / "clt", hook_in="hook_resid_mid", hook_out=["blocks.0.hook_mlp_out"])
    reads = [f"blocks.{i}.ln2.hook_normalized" for i in range(3)]
    assert same(CrossLayerTranscoder.load(tmp_path / "clt", hook_in=reads, hook_out="hook_mlp_out"), clt)


# ------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_is_all_or_nothing(layout, tmp_path, monkeypatch):
    clt = CrossLayerTranscoder(**weights())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(DictionaryError, match="nothing is overwritten"):
        clt.save(tmp_path / "full", layout)
    calls = []

    def failing(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("circuit_lens.dictionaries.cross_layer_files.save_file", failing)
    with pytest.raises(DictionaryError, match="No space left on device; nothing was written"):
        clt.save(tmp_path / "clt", layout)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "mine.txt"]
    monkeypatch.undo()
    (tmp_path / "clt").mkdir()  # an empty one may be there
    clt.save(tmp_path / "clt", layout)
    assert same(CrossLayerTranscoder.load(tmp_path / "clt"), clt)


def test_a_layout_that_cannot_say_it_refuses(tmp_path):
    made = weights()
    made["hook_in"][1] = "blocks.1.hook_resid_mid"
    clt = CrossLayerTranscoder(**made)
    with pytest.raises(DictionaryError, match="one input and one output hook for all layers"):
        clt.save(tmp_path / "clt", "circuit-tracer")
    clt.save(tmp_path / "clt")
    assert same(CrossLayerTranscoder.load(tmp_path / "clt"), clt)
    with pytest.raises(DictionaryError, match="no JSON values"):
        CrossLayerTranscoder(**weights(), metadata={"x": torch.ones(1)}).save(tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_share_memory_are_saved_too(layout, tmp_path):
    """Views of one flat tensor, and one tensor in two roles."""
    made = weights(activation="jumprelu")
    flat = torch.cat([made["b_enc"][0], made["b_dec"][0], made["W_dec"][0].flatten()])
    made["b_enc"][0], made["b_dec"][0], decoder = flat.split([40, 32, 40 * 3 * 32])
    made["W_dec"][0] = decoder.view(40, 3, 32)
    made["threshold"][1] = made["b_enc"][1].abs()
    made["b_enc"][1] = made["threshold"][1]
    clt = CrossLayerTranscoder(**made)
    clt.save(tmp_path / "clt", layout)
    assert same(CrossLayerTranscoder.load(tmp_path / "clt"), clt)


def test_the_files_are_those_that_circuit_tracer_describes(tmp_path):
    made = weights(activation="jumprelu")
    CrossLayerTranscoder(**made).save(tmp_path / "clt", "circuit-tracer")
    for i in range(3):
        with safe_open(tmp_path / f"clt/W_enc_{i}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor(f"W_enc_{i}"), made["W_enc"][i].T)
            assert set(file.keys()) == {f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}", f"threshold_{i}"}
        with safe_open(tmp_path / f"clt/W_dec_{i}.safetensors", "pt") as file:
            assert file.get_slice(f"W_dec_{i}").get_shape() == [40, 3 - i, 32]
    config = yaml.safe_load((tmp_path / "clt/config.yaml").read_text())
    assert config["feature_input_hook"] == "ln2.hook_normalized"
    assert config["feature_output_hook"] == "hook_mlp_out"
    assert config["activation"] == "jump_relu"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_threshold_below_zero_means_zero_in_both_layouts(layout, tmp_path):
    made = weights(activation="jumprelu")
    made["threshold"] = [-t for t in made["threshold"]]
    clt = CrossLayerTranscoder(**made)
    clt.save(tmp_path / "clt", layout)
    back, x = CrossLayerTranscoder.load(tmp_path / "clt"), torch.randn(9, 32, dtype=torch.float64)
    for d, read, threshold in zip(clt.dictionaries, back.dictionaries, made["threshold"], strict=True):
        pre, least = d.pre_acts(x), d.thresholds()
        assert torch.equal(read.activate(read.pre_acts(x), x), pre.relu())
        assert bool(((pre < 0) & (pre > threshold)).any())  # control: such values exist
        assert least is not None
        assert not bool(least.any())

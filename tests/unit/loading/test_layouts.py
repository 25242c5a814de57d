"""Every layout gives the dictionary that its arithmetic defines, and files that are none of it are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import circuit_lens as cl
from circuit_lens.dictionaries.adapt import adapt
from circuit_lens.loading import LoadError, load_dictionaries
from tests.unit.loading import layout_files as files
from tests.unit.loading.layout_files import D_IN, D_OUT, D_SAE, K, expected, raw

X = torch.randn(7, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def output(dictionary: object, x: torch.Tensor = X) -> torch.Tensor:
    d = adapt(dictionary)
    return d.decode(d.activate(d.pre_acts(x), x))[..., 0, :] + d.skip(x)


# Arithmetic


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_a_folder_of_circuit_tracer_is_its_formula(activation: str, skip: bool, tmp_path: Path) -> None:
    layers = [raw(seed) for seed in range(3)]
    k = {"activation": "topk", "k": K} if activation == "topk" else {}
    loaded = load_dictionaries(files.write_plt(tmp_path, layers, activation, skip=skip, **k))
    for i, (one, weights) in enumerate(zip(loaded, layers, strict=True)):
        d = adapt(one)
        torch.testing.assert_close(output(one), expected(weights, X, activation, skip=skip))
        assert (d.hook_in, d.hooks_out) == (f"blocks.{i}.mlp.hook_in", (f"blocks.{i}.hook_mlp_out",))
        assert (d.layer, d.has_skip, d.thresholds() is None) == (i, skip, activation == "topk")


def test_the_activation_of_the_configuration_is_not_read_as_relu(tmp_path: Path) -> None:
    weights = raw(1)
    topk = load_dictionaries(files.write_plt(tmp_path / "a", [weights], activation="topk", k=K))
    relu = load_dictionaries(files.write_plt(tmp_path / "b", [weights]))
    assert adapt(topk[0]).kind == "topk_transcoder"
    assert (adapt(topk[0]).activate(adapt(topk[0]).pre_acts(X), X) != 0).sum(-1).max() == K
    assert not torch.allclose(output(topk[0]), output(relu[0]))


def test_k_may_lie_with_the_weights_and_must_agree_with_the_configuration(tmp_path: Path) -> None:
    weights = raw(2)
    folder = files.write_plt(tmp_path, [weights], activation="topk")
    with pytest.raises(cl.DictionaryError, match=r"TopK, but neither the weights nor config\.yaml say k"):
        load_dictionaries(folder)
    tensors = files.tensors_of_plt(weights, "relu", skip=False)
    save_file({**tensors, "k": torch.tensor(K)}, folder / "layer_0.safetensors")
    torch.testing.assert_close(output(load_dictionaries(folder)[0]), expected(weights, X, "topk", skip=False))
    files.write_plt(tmp_path, [], activation="topk")  # the configuration alone
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"k: {K + 1}\n")
    with pytest.raises(cl.DictionaryError, match=f"says k = {K + 1}, the weights k = {K}"):
        load_dictionaries(folder)


def test_a_square_encoder_is_read_features_first(tmp_path: Path) -> None:
    weights = raw(3, d_sae=D_IN)
    loaded = load_dictionaries(files.write_plt(tmp_path, [weights]))[0]
    torch.testing.assert_close(output(loaded), expected(weights, X, "relu", skip=False))
    other = expected({**weights, "W_enc": weights["W_enc"].T}, X, "relu", skip=False)
    assert not torch.allclose(output(loaded), other)


@pytest.mark.parametrize("depth", ["set", "one"])
def test_gemma_scope_is_its_formula_and_keeps_its_last_layer(depth: str, tmp_path: Path) -> None:
    layers = [raw(seed) for seed in range(4)]
    for i, weights in enumerate(layers):
        files.write_npz(tmp_path / f"layer_{i}" / "width_16k" / f"average_l0_{70 - i}", weights)
    where = tmp_path if depth == "set" else tmp_path / "layer_3" / "width_16k" / "average_l0_67"
    loaded = load_dictionaries(where, hook_in="ln2.hook_normalized", hook_out="hook_mlp_out")
    assert [adapt(one).layer for one in loaded] == ([0, 1, 2, 3] if depth == "set" else [3])
    torch.testing.assert_close(output(loaded[-1]), expected(layers[3], X, "jumprelu", skip=False))
    with pytest.raises(cl.DictionaryError, match=r"give hook_in and hook_out"):
        load_dictionaries(where)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_is_its_formula_and_its_hooks_are_the_norms_output(skip: bool, tmp_path: Path) -> None:
    layers = [raw(seed) for seed in range(3)]
    for i, weights in enumerate(layers):
        files.write_scope_2(tmp_path / f"layer_{i}_width_16k_l0_small", weights, i, skip=skip)
    loaded = load_dictionaries(tmp_path)
    assert [adapt(one).hook_in for one in loaded] == [f"blocks.{i}.mlp.hook_in" for i in range(3)]
    for one, weights in zip(loaded, layers, strict=True):
        torch.testing.assert_close(output(one), expected(weights, X, "jumprelu", skip=skip))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_cross_layer_transcoder_is_one_object_and_its_formula(lazy: bool, tmp_path: Path) -> None:
    tensors = files.write_clt(tmp_path)
    (clt,) = load_dictionaries(tmp_path, lazy=lazy)
    for i, layer in enumerate(clt.dictionaries):
        acts = (X @ tensors["W_enc"][i].double().T + tensors["b_enc"][i]).relu()
        for o in range(3 - i):
            bias = tensors["b_dec"][i].double() if o == 0 else torch.zeros(D_OUT, dtype=torch.float64)
            torch.testing.assert_close(
                layer.decode(layer.activate(layer.pre_acts(X), X))[:, o],
                acts @ tensors["W_dec"][i][:, o].double() + bias,
            )
        assert layer.hook_in == f"blocks.{i}.hook_resid_mid"


def test_a_cross_layer_transcoder_of_gemma_scope_2_keeps_its_last_layer(tmp_path: Path) -> None:
    layers = [raw(seed) for seed in range(3)]
    for i, weights in enumerate(layers):
        tensors = {n.lower(): weights[n] for n in ("W_enc", "b_enc", "b_dec", "threshold")}
        decoder = torch.randn(D_SAE, 3, D_OUT, generator=torch.Generator().manual_seed(i))
        layers[i] = {**weights, "full": decoder}
        save_file({**tensors, "w_dec": decoder, "affine_skip_connection": weights["W_skip"]},
                  tmp_path / f"params_layer_{i}.safetensors")  # fmt: skip
    (clt,) = load_dictionaries(tmp_path)
    assert [d.layer for d in clt.dictionaries] == [0, 1, 2]
    for i, (layer, weights) in enumerate(zip(clt.dictionaries, layers, strict=True)):
        for o in range(3 - i):
            bias = weights["b_dec"] if o == 0 else torch.zeros(D_OUT)
            one = {**weights, "W_dec": weights["full"][:, i + o], "b_dec": bias}
            found = layer.decode(layer.activate(layer.pre_acts(X), X))[:, o] + (layer.skip(X) if o == 0 else 0)
            torch.testing.assert_close(found, expected(one, X, "jumprelu", skip=o == 0))
    (tmp_path / "params_layer_1.safetensors").unlink()
    with pytest.raises(cl.DictionaryError, match=r"has layers 0, 2, every one"):
        load_dictionaries(tmp_path)


def test_dictionaries_that_we_saved_come_back(tmp_path: Path) -> None:
    layers = [raw(seed) for seed in range(2)]
    loaded = load_dictionaries(files.write_plt(tmp_path / "plt", layers, "jumprelu", skip=True), lazy=False)
    for i, one in enumerate(loaded):
        one.save_model(str(tmp_path / "saelens" / f"layer_{i}"))
    again = load_dictionaries(tmp_path / "saelens")
    for one, other in zip(loaded, again, strict=True):
        assert torch.equal(output(one), output(other))
        assert adapt(one).fingerprint() == adapt(other).fingerprint()
    files.write_clt(tmp_path / "clt")
    (clt,) = load_dictionaries(tmp_path / "clt", lazy=False)
    clt.save(tmp_path / "clt-saelens", layout="saelens")
    (other,) = load_dictionaries(tmp_path / "clt-saelens", lazy=False)
    assert [d.fingerprint() for d in clt.dictionaries] == [d.fingerprint() for d in other.dictionaries]


def test_dtype_and_laziness_change_where_weights_lie_not_what_they_are(tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(4)], "jumprelu")
    mapped, copied = load_dictionaries(folder)[0], load_dictionaries(folder, lazy=False)[0]
    assert torch.equal(output(mapped), output(copied))
    half = load_dictionaries(folder, dtype=torch.bfloat16)[0]
    assert (half.W_enc.dtype, half.cfg.dtype, half.threshold.dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    assert not any(p.requires_grad for p in mapped.parameters())
    assert not mapped.training


def test_loading_draws_nothing(tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(4)])
    before = torch.get_rng_state()
    load_dictionaries(folder)
    assert torch.equal(before, torch.get_rng_state())


# Hooks


def test_hooks_that_are_given_stand_before_those_that_are_declared(tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(0)], feature_input_hook="blocks.{layer}.hook_resid_mid")
    assert adapt(load_dictionaries(folder)[0]).hook_in == "blocks.0.hook_resid_mid"
    given = load_dictionaries(folder, hook_in="ln2.hook_normalized", hook_out="mlp.hook_out")
    assert (adapt(given[0]).hook_in, adapt(given[0]).site) == ("blocks.0.ln2.hook_normalized", "blocks.0.mlp.hook_out")
    with pytest.raises(cl.DictionaryError, match="a transcoder may read"):
        load_dictionaries(folder, hook_in="hook_nothing")


def test_hooks_that_are_given_stand_before_those_of_a_saelens_folder(tmp_path: Path) -> None:
    plt = files.write_plt(tmp_path / "plt", [raw(0), raw(1)])
    load_dictionaries(plt, lazy=False)[1].save_model(str(tmp_path / "saelens"))
    declared, given = (load_dictionaries(tmp_path / "saelens", **more)[0] for more in ({}, {"hook_in": "hook_mlp_in"}))
    assert (adapt(declared).hook_in, adapt(given).hook_in) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_in")
    assert adapt(given).site == adapt(declared).site


def test_without_configuration_hooks_must_be_given(tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(0)])
    (folder / "config.yaml").unlink()
    with pytest.raises(cl.DictionaryError, match="give hook_in and hook_out"):
        load_dictionaries(folder)
    assert len(load_dictionaries(folder, hook_in="mlp.hook_in", hook_out="hook_mlp_out")) == 1


# Refusals


def _change(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.full((D_SAE, D_IN), torch.nan)}, r"layer_0\.safetensors: W_enc holds NaN or infinity"),
        ({"b_dec": torch.full((D_OUT,), torch.inf)}, r"b_dec holds NaN or infinity"),
        ({"W_enc": torch.zeros(D_IN, D_SAE)}, r"this layout has W_enc as \[features, width\]"),
        ({"W_dec": torch.zeros(D_OUT, D_SAE)}, r"W_dec has shape \(6, 10\), .*it must be \(10, 10\)|must be \(10, 6\)"),
        ({"b_enc": torch.zeros(D_SAE + 1)}, r"one bias for each feature"),
        ({"W_enc": None}, r"missing: W_enc"),
        ({"W_gate": torch.zeros(2)}, r"unknown: W_gate"),
        ({"W_enc": torch.zeros(D_SAE, D_IN, dtype=torch.int64)}, r"dtype torch\.int64; weights must be floats"),
        ({"activation_function.threshold": torch.ones(D_SAE)}, r"says ReLU, but the weights have a threshold"),
        ({"k": torch.tensor(3)}, r"says ReLU, but the weights have k"),
        ({"W_enc": torch.zeros(D_SAE)}, r"it must be a matrix"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(0)], activation="relu")
    assert len(load_dictionaries(folder)) == 1
    _change(folder / "layer_0.safetensors", **changes)
    with pytest.raises(cl.DictionaryError, match=message):
        load_dictionaries(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 3, b"<html>not found</html>", None])
@pytest.mark.parametrize("layout", ["plt", "npz", "saelens"])
def test_truncated_and_foreign_files_are_refused_by_name(layout: str, content: bytes | None, tmp_path: Path) -> None:
    if layout == "npz":
        path = files.write_npz(tmp_path / "layer_0", raw(0)) / "params.npz"
    else:
        path = files.write_plt(tmp_path / "plt", [raw(0)]) / "layer_0.safetensors"
        if layout == "saelens":
            load_dictionaries(path.parent, lazy=False)[0].save_model(str(tmp_path / "saelens"))
            path = tmp_path / "saelens" / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(cl.DictionaryError, match=f"{path.parent}.*fetch it again"):
        load_dictionaries(path.parent, hook_in="mlp.hook_in", hook_out="hook_mlp_out")


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    import numpy as np

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "layer_0").mkdir()
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(tmp_path / "layer_0" / "params.npz", **{name: np.array([Bomb()], dtype=object) for name in names})
    with pytest.raises(cl.DictionaryError, match="params"):
        load_dictionaries(tmp_path, hook_in="mlp.hook_in", hook_out="hook_mlp_out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh'; valid are"),
        ({"model_kind": "cross_layer_transcoder"}, "there is no W_enc_0"),
        ({"model_kind": "other"}, "says model_kind 'other'"),
        ({"k": 0}, "k = 0; it must be a positive"),
        ({"activation": "jump_relu"}, "JumpReLU, but the weights have no threshold"),
        ({"transcoders": ["layer_7.safetensors"]}, "lists 'layer_7.safetensors', which is not there"),
    ],
)
def test_a_configuration_that_contradicts_the_files_is_refused(config: dict, message: str, tmp_path: Path) -> None:
    folder = files.write_plt(tmp_path, [raw(0)], **config)
    with pytest.raises(cl.CircuitLensError, match=message):
        load_dictionaries(folder)


@pytest.mark.parametrize("text", ["- a list", "{", "\x00"])
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (files.write_plt(tmp_path, [raw(0)]) / "config.yaml").write_text(text)
    with pytest.raises(cl.DictionaryError, match=r"config\.yaml"):
        load_dictionaries(tmp_path)


def test_gemma_scope_2_of_another_site_is_refused(tmp_path: Path) -> None:
    folder = files.write_scope_2(tmp_path / "layer_0_width_16k", raw(0), 0, skip=False)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("pre_feedforward_layernorm.output", "output"))
    with pytest.raises(cl.DictionaryError, match="which is no end of a transcoder"):
        load_dictionaries(tmp_path)
    (folder / "config.json").write_text(config.replace("layers.0", "layers.4"))
    with pytest.raises(cl.DictionaryError, match=r"is of layer 4, its folder's name says layer 0"):
        load_dictionaries(tmp_path)


def test_a_layer_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one = files.write_plt(tmp_path / "a", [raw(0), raw(1)])
    load_dictionaries(one, lazy=False)[1].save_model(str(tmp_path / "b"))
    with pytest.raises(cl.DictionaryError, match=r"are both at blocks\.1\.hook_mlp_out"):
        load_dictionaries([one, tmp_path / "b"])
    for name in ("layer_0/average_l0_5", "layer_0/average_l0_9"):
        files.write_npz(tmp_path / "c" / name, raw(0))
    with pytest.raises(cl.DictionaryError, match=r"2 dictionaries for layer 0 .*choose with per_layer"):
        load_dictionaries(tmp_path / "c")


def test_an_incomplete_cross_layer_transcoder_is_refused(tmp_path: Path) -> None:
    files.write_clt(tmp_path)
    (tmp_path / "W_dec_2.safetensors").unlink()
    with pytest.raises(cl.DictionaryError, match=r"W_enc of layers 0, 1, 2 and W_dec of layers 0, 1;"):
        load_dictionaries(tmp_path)


def test_a_folder_of_nothing_says_what_it_has_and_what_is_valid(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"cfg\.json.*layer_0\.safetensors.*params\.npz.*There is model\.bin"):
        load_dictionaries(tmp_path)


def test_listed_sums_are_checked(tmp_path: Path) -> None:
    import hashlib

    folder = files.write_plt(tmp_path, [raw(0)])
    path = folder / "layer_0.safetensors"
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    load_dictionaries(folder)
    _change(path, b_dec=torch.zeros(D_OUT))
    with pytest.raises(cl.DictionaryError, match=r"layer_0\.safetensors is damaged or another file: its SHA-256"):
        load_dictionaries(folder)
    (folder / "SHA256SUMS").write_text("no sums\n")
    with pytest.raises(cl.DictionaryError, match="is no line of a list of SHA-256 sums"):
        load_dictionaries(folder)

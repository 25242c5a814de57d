"""Maps: what they compute, files of them, and what is no map."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from circuit_lens.errors import GraphFileError, PatchscopeError
from circuit_lens.patchscopes import Fitted, Identity, Map, ModuleMap, ScaleBias, Zero, load_map
from circuit_lens.patchscopes.maps import as_map, layer_pairs

H = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fitted(pair: tuple[int, int] = (-1, 2)) -> Fitted:
    rng = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    return Fitted({pair: matrix}, {pair: torch.randn(6, generator=rng, dtype=torch.float64)}, {pair: 0.25})


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


def test_maps_compute_what_they_say_in_every_dtype() -> None:
    assert Identity()(H, 1, 2) is H
    assert not bool(Zero()(H, 1, 2).any())
    bias = torch.arange(4.0)
    torch.testing.assert_close(ScaleBias(2.0, bias)(H, None, 0), 2 * H + bias)
    torch.testing.assert_close(ScaleBias(2.0)(H, None, 0), 2 * H)
    f = fitted()
    wanted = torch.einsum("bsi,io->bso", H, f.matrices[-1, 2]) + f.biases[-1, 2]
    torch.testing.assert_close(f(H, -1, 2), wanted)
    torch.testing.assert_close(f(H.bfloat16(), -1, 2), f(H.bfloat16().double(), -1, 2))  # computed in the wider dtype
    linear = nn.Linear(4, 4)
    torch.testing.assert_close(ModuleMap(linear)(H, 0, 0), linear(H.float()))  # in the module's own dtype


def test_files_give_the_same_map_back(tmp_path: Path) -> None:
    module = tied()
    biased = ScaleBias(0.5, torch.arange(4.0))
    maps: list[Map] = [Identity(), Zero(), ScaleBias(-2.0), biased, fitted(), ModuleMap(module)]
    for n, one in enumerate(maps):
        path = tmp_path / f"{n}.safetensors"
        one.save(path)
        other = tied()
        again = load_map(path, module=other if isinstance(one, ModuleMap) else None)
        assert type(again) is type(one)
        assert again.name == one.name
        assert bool((again(H, -1, 2) == one(H, -1, 2)).all())
    again = load_map(tmp_path / "4.safetensors")
    assert isinstance(again, Fitted)
    assert (dict(again.explained), again.pairs, again.kind) == ({(-1, 2): 0.25}, ((-1, 2),), "affine")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}.safetensors" for n in range(6)]


class Code(Map):
    name = "code"

    def __call__(self, h: Tensor, source_layer: int | None, target_layer: int) -> Tensor:
        return h


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PatchscopeError, match="cannot be saved: it is code"):
        Code().save(tmp_path / "a")
    with pytest.raises(GraphFileError, match="Could not write"):
        fitted().save(tmp_path / "no" / "a")
    assert not list(tmp_path.iterdir())


def test_foreign_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    fitted().save(good)
    data = good.read_bytes()
    path = tmp_path / "bad"
    for broken in (b"", b"hello", data[:7], data[: len(data) // 2], data[:-1]):
        path.write_bytes(broken)
        with pytest.raises(PatchscopeError, match="is no file of a map"):
            load_map(path)
    with pytest.raises(PatchscopeError, match="is no file of a map"):
        load_map(tmp_path / "absent")
    head = {"format": "circuit_lens.patchscope_map", "version": 1}
    tensors = {"matrix.0.0": torch.eye(2), "bias.0.0": torch.zeros(2)}
    manifests: list[tuple[Any, dict[str, Tensor], str]] = [
        ({}, {}, "has format None"),
        ([1], {}, "is no file"),
        ({"format": "other", "version": 1}, {}, "has format 'other'"),
        (head | {"version": 2}, {}, "version 2"),
        (head | {"version": 0, "kind": "identity"}, {}, "version 0"),
        (head | {"version": True, "kind": "identity"}, {}, "version True"),
        (head | {"kind": "scale_bias", "scale": "abc"}, {}, "its scale is 'abc', not a finite number"),
        (head | {"kind": "scale_bias", "scale": float("nan")}, {}, "its scale is nan"),
        (head | {"kind": "fitted", "explained": {"0.0": "a"}, "fit": "affine"}, tensors, "its explained is 'a'"),
        (head | {"version": "1"}, {}, "version '1'"),
        (head, {}, "kind None"),
        (head | {"kind": "poem"}, {}, "kind 'poem'"),
        (head | {"kind": "scale_bias"}, {}, "is damaged: KeyError"),
        (head | {"kind": "fitted"}, tensors, "is damaged: KeyError"),
        (head | {"kind": "fitted", "explained": 3, "fit": "affine"}, tensors, "is damaged"),
        (head | {"kind": "fitted", "explained": {}, "fit": "affine"}, {"matrix.0": torch.eye(2)}, "no pair of layers"),
        (head | {"kind": "fitted", "explained": {}, "fit": "affine"}, {"matrix.0.0": torch.eye(2)}, "same pairs"),
        (head | {"kind": "fitted", "explained": {}, "fit": "affine"},
         {"matrix.0.0": torch.eye(2), "bias.0.0": torch.zeros(3)}, r"matrix of shape|damaged"),
        (head | {"kind": "fitted", "explained": {}, "fit": "affine"},
         {"matrix.0.0": torch.eye(2) * torch.nan, "bias.0.0": torch.zeros(2)}, "NaN"),
        (head | {"kind": "module", "class": "Linear"}, {}, "weights of a Linear"),
    ]  # fmt: skip
    for manifest, held, words in manifests:
        save_file(held, path, {"manifest": json.dumps(manifest)})
        with pytest.raises(PatchscopeError, match=words):
            load_map(path)
    save_file({}, path)
    with pytest.raises(PatchscopeError, match="has format None"):
        load_map(path)


def test_the_weights_of_another_module_are_refused_before_any_is_set(tmp_path: Path) -> None:
    ModuleMap(nn.Linear(4, 4)).save(tmp_path / "a")
    for other in (nn.Linear(4, 5), nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4))):
        before = {name: t.clone() for name, t in other.state_dict().items()}
        with pytest.raises(PatchscopeError, match="another module"):
            load_map(tmp_path / "a", module=other)
        assert all(bool((t == before[name]).all()) for name, t in other.state_dict().items())


def test_maps_that_do_not_fit_are_refused() -> None:
    f = fitted()
    with pytest.raises(PatchscopeError, match="not fitted from layer 1 to 2; it has -1→2"):
        f(H, 1, 2)
    with pytest.raises(PatchscopeError, match="width 4; given width 5"):
        f(torch.zeros(2, 5), -1, 2)
    with pytest.raises(PatchscopeError, match="not fitted from layer None"):
        f(H, None, 2)
    eye, zero = torch.eye(4), torch.zeros(4)
    bad: list[tuple[dict[Any, Tensor], dict[Any, Tensor]]] = [
        ({}, {}), ({(0, 0): eye}, {(0, 1): zero}), ({(0, 0): eye * torch.inf}, {(0, 0): zero})
    ]  # fmt: skip
    for matrices, biases in bad:
        with pytest.raises(PatchscopeError, match=r"same pairs|NaN or infinity"):
            Fitted(matrices, biases)
    with pytest.raises(PatchscopeError, match="the bias has shape"):
        ScaleBias(1.0, torch.zeros(1))(H, 0, 0)
    assert isinstance(as_map(None), Identity)
    assert isinstance(as_map(nn.Linear(1, 1)), ModuleMap)
    assert as_map(f) is f


def test_pairs_of_layers_are_words_or_given() -> None:
    assert layer_pairs("same", range(-1, 3), range(-1, 2)) == ((-1, -1), (0, 0), (1, 1))
    assert layer_pairs("last", range(-1, 1), range(-1, 2)) == ((-1, 1), (0, 1))
    assert len(layer_pairs("all", range(-1, 3), range(-1, 2))) == 12
    assert layer_pairs([(0, 1)], range(2), range(2)) == ((0, 1),)
    bad: list[tuple[Any, str]] = [
        ("diagonal", "'same', 'all', 'last'"), ([], "names no pair"), ([(0, 9)], "no map from layer 0 to 9"),
        ([(0.5, 1)], "not valid"), ([(0, 1, 2)], "not valid"),
    ]  # fmt: skip
    for pairs, words in bad:
        with pytest.raises(PatchscopeError, match=words):
            inspect.unwrap(layer_pairs)(pairs, range(2), range(2))


class Centred(nn.Module):
    """Keeps statistics of batches while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4, momentum=0.5).double(), nn.Dropout(0.5)

    def forward(self, h: Tensor) -> Tensor:
        return self.drop(self.norm(h.reshape(-1, 4))).reshape(h.shape)


def test_a_module_in_training_is_called_as_in_evaluation_and_is_as_before_also_after_it_fails() -> None:
    module = Centred().train()
    module.drop.eval()  # modes of parts are kept one by one
    state = {name: t.clone() for name, t in module.state_dict().items()}
    found = ModuleMap(module)(H, 0, 0)
    with pytest.raises(PatchscopeError, match=r"a Centred, fails on vectors of shape \[1, 1, 3\] \(RuntimeError"):
        ModuleMap(module)(H[:1, :1, :3], 0, 0)
    assert (module.training, module.norm.training, module.drop.training) == (True, True, False)
    assert all(bool((t == state[name]).all()) for name, t in module.state_dict().items())
    alone = torch.cat([ModuleMap(module)(H[i : i + 1], 0, 0) for i in range(len(H))])
    torch.testing.assert_close(found, alone)
    assert float((module(H) - found).detach().abs().max()) > 1e-3  # what training makes of it
    with pytest.raises(PatchscopeError, match=r"a Linear, fails on .*give a module that maps \[..., 4\]"):
        ModuleMap(nn.Linear(3, 4))(H, 0, 0)

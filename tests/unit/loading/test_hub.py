"""Fetching: what is fetched together, what an interrupt leaves, and what is checked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

import circuit_lens as cl
from circuit_lens.loading import FetchError, LoadError, failures, hub, load_dictionaries
from circuit_lens.loading.failures import fetching, readable_size
from tests.unit.loading import layout_files as files
from tests.unit.loading.layout_files import COMMIT, FolderHub, raw


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    """A hub that is a folder, reached as if there were a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    made = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HUB", made)
    return made


def test_one_dictionary_is_tried_before_the_rest_is_fetched_together(online: FolderHub) -> None:
    files.write_plt(online.folder("a/b"), [raw(i) for i in range(4)])
    loaded = load_dictionaries("hf:a/b")
    weights = [call[2] for call in online.calls if "config.yaml" not in call[2]]
    assert weights == [("layer_0.safetensors",), tuple(f"layer_{i}.safetensors" for i in (1, 2, 3))]
    assert [one.cfg.metadata.source for one in loaded] == [f"hf:a/b@{COMMIT}/layer_{i}.safetensors" for i in range(4)]
    online.calls.clear()
    load_dictionaries("hf:a/b")
    assert online.calls == []


def test_what_is_cached_is_asked_for_again_so_that_all_is_of_one_commit(online: FolderHub) -> None:
    files.write_plt(online.folder("a/b"), [raw(i) for i in range(3)])
    online.fetched.add(("a/b", "layer_2.safetensors"))
    load_dictionaries("hf:a/b")
    assert online.calls[-1][2] == ("layer_1.safetensors", "layer_2.safetensors")


def test_a_set_of_no_use_is_not_fetched_whole(online: FolderHub) -> None:
    files.write_plt(online.folder("a/b"), [raw(i) for i in range(4)], activation="jump_relu")
    with pytest.raises(cl.DictionaryError, match="JumpReLU, but the weights have no threshold"):
        load_dictionaries("hf:a/b")
    assert {name for _, name in online.fetched} == {"config.yaml", "layer_0.safetensors"}


def test_a_folder_of_a_repository_is_a_tree_of_its_own(online: FolderHub) -> None:
    files.write_plt(online.folder("a/b") / "sub" / "set", [raw(0)])
    files.write_plt(online.folder("a/b") / "other", [raw(1), raw(2)])
    (one,) = load_dictionaries("hf:a/b/sub/set")
    assert torch.equal(one.W_dec, raw(0)["W_dec"])
    assert one.cfg.metadata.source.endswith("/sub/set/layer_0.safetensors")
    with pytest.raises(LoadError, match="no dictionary was found in hf:a/b@main/none"):
        load_dictionaries("hf:a/b@main/none")


def test_an_interrupt_leaves_nothing_but_what_was_fetched(online: FolderHub) -> None:
    files.write_plt(online.folder("a/b"), [raw(i) for i in range(3)])
    before = torch.get_rng_state(), dict(os.environ)
    online.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        load_dictionaries("hf:a/b")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == dict(os.environ)
    online.fail_after = None
    assert len(load_dictionaries("hf:a/b")) == 3


def test_a_file_that_the_repository_lacks_is_named(online: FolderHub) -> None:
    online.folder("mwhanna/qwen3-4b-transcoders").mkdir(parents=True)
    with pytest.raises(FetchError, match=r"huggingface\.co/mwhanna/qwen3-4b-transcoders has no layer_0\.safetensors"):
        load_dictionaries("mwhanna-qwen3-4b-transcoders")


def test_a_fetched_file_is_compared_with_the_sum_that_names_it(online: FolderHub) -> None:
    folder = files.write_plt(online.folder("a/b"), [raw(0)])
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    path = folder / "layer_0.safetensors"
    good = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(good)
    path.symlink_to(good)
    load_dictionaries("hf:a/b")
    online.fetched.clear()
    good.write_bytes(good.read_bytes()[:-1] + b"\x01")
    with pytest.raises(cl.DictionaryError, match="its SHA-256 is"):
        load_dictionaries("hf:a/b")


def test_a_sum_that_is_given_is_checked(tmp_path: Path) -> None:
    from circuit_lens.loading.dictionaries import load_found
    from circuit_lens.loading.names import find

    found = find(files.write_plt(tmp_path, [raw(0)]))
    digest = hashlib.sha256((tmp_path / "layer_0.safetensors").read_bytes()).hexdigest()
    assert len(load_found(found, sha256={"layer_0.safetensors": digest})) == 1
    with pytest.raises(cl.DictionaryError, match="its SHA-256 is"):
        load_found(found, sha256={"layer_0.safetensors": "0" * 64})


def test_a_hub_that_cannot_be_reached_is_replaced_by_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    files.write_plt(files.cache_folder(tmp_path, "a/b"), [raw(0)])
    assert len(load_dictionaries("hf:a/b")) == 1
    with pytest.raises(FetchError, match=r"huggingface\.co/a/c: check the name, the network.*no route to host"):
        load_dictionaries("hf:a/c")


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_bars_are_as_before_afterwards(progress: bool | None) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    with hub._bars(progress):
        assert are_progress_bars_disabled() == (before if progress is None else not progress)
    assert are_progress_bars_disabled() == before


def test_errors_of_the_program_are_no_errors_of_fetching() -> None:
    with pytest.raises(ZeroDivisionError), fetching("it", "a/b"):
        raise ZeroDivisionError
    with pytest.raises(cl.DictionaryError, match=r"^mine$"), fetching("it", "a/b"):
        raise cl.DictionaryError("mine")
    with pytest.raises(FetchError, match="could not load it"), fetching("it", "a/b"):
        raise OSError("broken")
    assert issubclass(FetchError, LoadError)
    assert failures.offline()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0.0, "0 B"), (999.0, "999 B"), (1e3, "1 kB"), (1.5e6, "1.5 MB"), (2.85e10, "28 GB"), (1.7e11, "170 GB")],
)
def test_sizes_read_well(n: float, text: str) -> None:
    assert readable_size(n) == text

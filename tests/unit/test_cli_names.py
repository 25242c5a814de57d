"""From names on a command line to models, dictionaries and devices: what is found, and what is said when nothing is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import circuit_lens as cl
from circuit_lens.cli import loading
from circuit_lens.cli.dictionary_names import Found, find_dictionaries, load_dictionaries, releases_for
from circuit_lens.cli.examples import examples, readable
from circuit_lens.cli.failing import CommandError
from circuit_lens.cli.loading import check_name, choose_device, load_pair, parse_dtype
from circuit_lens.cli.quiet import upstream_quiet
from circuit_lens.cli.trace import parse_targets
from tests.builders import build, build_hf, tokenizer, transcoders

PROMPT = "the capital of the state containing Dallas is"
ONE_PER_LAYER = "gemma-scope-2b-pt-transcoders"
MANY_PER_LAYER = "gemma-scope-2-1b-pt-transcoders-all"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model in Hugging Face's format and its transcoders in SAELens' format, on disk."""
    root = tmp_path_factory.mktemp("pair")
    build_hf("gpt2", dtype=torch.float32).save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    for layer, transcoder in enumerate(transcoders(build("gpt2", dtype=torch.float32))):
        transcoder.save_model(str(root / "dictionaries" / f"layer_{layer}"))
    return {"model": str(root / "model"), "dictionaries": str(root / "dictionaries")}


# Dictionaries


def test_a_release_means_one_dictionary_of_every_layer() -> None:
    found = find_dictionaries([ONE_PER_LAYER])
    assert [f.sae_id.split("/")[0] for f in found] == [f"layer_{layer}" for layer in range(26)]
    assert {f.repository for f in found} == {"google/gemma-scope-2b-pt-transcoders"}


def test_an_id_or_a_pattern_chooses_in_a_release() -> None:
    assert [f.sae_id for f in find_dictionaries(["mwhanna-qwen3-4b-transcoders:layer_3"])] == ["layer_3"]
    found = find_dictionaries([f"{MANY_PER_LAYER}:layer_*_width_16k_l0_small"])
    assert len(found) == 26
    assert all(f.sae_id.endswith("16k_l0_small") for f in found)


def test_a_folder_means_the_dictionaries_in_it(folders: dict[str, str]) -> None:
    folder = Path(folders["dictionaries"])
    found = find_dictionaries([str(folder)])
    assert [one.folder for one in found] == [folder / f"layer_{layer}" for layer in range(3)]
    assert [(one.settings.layer, one.settings.site) for one in found] == [
        (layer, f"blocks.{layer}.hook_mlp_out") for layer in range(3)
    ]
    assert find_dictionaries([str(folder / "layer_1")]) == [Found(folder=folder / "layer_1")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (MANY_PER_LAYER, r"several for a layer; choose one kind: .*:layer_\*_width_16k_l0_big,"),
        (f"{MANY_PER_LAYER}:layer_3_*", "several for a layer"),
        ("gemma-scope-2b-pt-transcoder", f"no such folder.*nearest releases: {ONE_PER_LAYER}"),
        (f"{ONE_PER_LAYER}:layer_99", r"no such id; nearest: .*of the form layer_\*/width_16k"),
        ("nothing/here", "Give a release"),
        ("", "Give a release"),
    ],
)
def test_a_name_that_does_not_decide_is_an_error_with_what_does(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=message):
        find_dictionaries([name])


def test_a_folder_without_dictionaries_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"has a cfg\.json"):
        find_dictionaries([str(tmp_path)])


def test_a_damaged_dictionary_is_an_error_that_names_it(folders: dict[str, str], tmp_path: Path) -> None:
    source = Path(folders["dictionaries"]) / "layer_0"
    for file in source.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data if file.suffix == ".json" else b"")
    with pytest.raises(cl.CircuitLensError, match=str(tmp_path)):
        load_dictionaries([Found(folder=tmp_path)], torch.device("cpu"), "float32")


def test_published_transcoders_of_a_model_are_found_by_its_name() -> None:
    assert ONE_PER_LAYER in releases_for("gemma-2-2b")
    assert ONE_PER_LAYER in releases_for("google/gemma-2-2b")
    assert releases_for("gpt2") == []


# Models


def test_a_local_pair_loads_as_python_loads_it(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair(folders["model"], [folders["dictionaries"]], bridge=True, device="cpu")
    expected = build("gpt2", "bridge", dtype=torch.float32)
    tokens = expected.to_tokens(PROMPT)
    torch.testing.assert_close(pair.rm.model(tokens), expected(tokens), rtol=1e-5, atol=1e-5)
    assert len(pair.rm.dictionaries) == 3
    assert (pair.bundled, pair.name) == (False, folders["model"])


def test_dtype_is_that_of_model_and_dictionaries(folders: dict[str, str]) -> None:
    pair = load_pair(folders["model"], [folders["dictionaries"]], bridge=True, device="cpu", dtype="float64")
    assert pair.rm.model.W_U.dtype is torch.float64
    assert {d.module.W_enc.dtype for d in pair.rm.dictionaries} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt3"}, "there is no such model.*nearest: .*gpt"),
        ({"model": "pythia-70m"}, "--dictionaries is needed. SAELens lists no transcoders"),
        ({"model": "gemma-2-9b"}, "not in the table, so --dictionaries is needed"),
        ({"model": "gemma-2-2b"}, r"huggingface\.co/google/gemma-2-2b, which HF_HUB_OFFLINE"),
        ({"model": "gpt2", "dictionaries": ["nothing"]}, "no such folder"),
        ({"model": "gpt2", "dictionaries": [ONE_PER_LAYER]}, r"huggingface\.co/.*gpt2, which HF_HUB_OFFLINE"),
        ({"model": "no/such", "dictionaries": [ONE_PER_LAYER], "bridge": True}, r"huggingface\.co/no/such"),
        ({"model": "gpt2", "dtype": "int8"}, "--dtype int8: give one of float32"),
        ({"model": "gpt2", "device": "tpu"}, "--device tpu: no such device; here are cpu"),
        ({"model": "gpt2", "device": "cuda:77"}, "this computer has none; here are cpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_an_error_that_says_what_can(
    arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CommandError, match=f"(?s){message}"):
        load_pair(**{"dictionaries": [], **arguments})


def test_a_folder_needs_a_bridge(folders: dict[str, str]) -> None:
    with pytest.raises(CommandError, match="add --bridge"):
        check_name(folders["model"], bridge=False)
    assert check_name(folders["model"], bridge=True) == folders["model"]


def test_dictionaries_of_another_width_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    metadata = SAEMetadata(hook_name="blocks.0.ln2.hook_normalized", hook_name_out="blocks.0.hook_mlp_out")
    config = TranscoderConfig(d_in=16, d_out=16, d_sae=8, apply_b_dec_to_input=False, metadata=metadata)
    Transcoder(config).save_model(str(tmp_path))
    with pytest.raises(cl.DictionaryError, match="width"):
        load_pair(folders["model"], [str(tmp_path)], bridge=True, device="cpu")


def test_devices_and_dtypes_are_torchs() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None, cpu=True) == torch.device("cpu")
    assert parse_dtype("bfloat16") is torch.bfloat16


def test_targets_are_tokens_and_differences() -> None:
    assert parse_targets([]) is None
    assert parse_targets(["Austin", " a-b", "- x"]) == ["Austin", " a-b", "- x"]
    assert parse_targets(["Austin - New York"]) == [cl.logit_difference("Austin", "New York")]
    assert parse_targets([" Austin -  Dallas"]) == [cl.logit_difference(" Austin", " Dallas")]


# Noise


def test_known_notices_are_silent_and_others_are_not() -> None:
    levels = {name: logging.getLogger(name).level for name in ("transformers", "root")}

    def talk(what: str, category: type[Warning]) -> None:
        with upstream_quiet():
            print("Loaded pretrained model")
            warnings.warn(what, category, stacklevel=1)

    talk("HookedTransformer is deprecated since 3.0", DeprecationWarning)
    with pytest.warns(UserWarning, match="something new"):
        talk("something new", UserWarning)
    assert {name: logging.getLogger(name).level for name in levels} == levels


def test_quiet_gives_stdout_back_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:

    def fail() -> None:
        with upstream_quiet():
            print("inside")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    print("after")
    assert capsys.readouterr().out == "after\n"


# Examples


def test_examples_read_as_text_and_split_into_the_same_words() -> None:
    import re

    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.tokenizer import WORD_PATTERN

    words = set(Corpus().words())
    for example in examples():
        assert set(re.findall(WORD_PATTERN, example.prompt)) <= words
        assert example.answer in words
        assert " :" not in example.prompt
    tokens = ("En", "français", ",", "l", "'", "opposé", "de", '"', "petit", '"', "est", '"')
    assert tuple(re.findall(WORD_PATTERN, readable(tokens))) == tokens


# A process of its own


def command(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from circuit_lens.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(cl.__file__).parents[1]), **environment},
    )  # fmt: skip


def test_a_local_pair_is_traced_without_noise(folders: dict[str, str], tmp_path: Path) -> None:
    done = command("trace", PROMPT, "--model", folders["model"], "--bridge", "--dictionaries", folders["dictionaries"],
                   "--out", "x.json", "--max-features", "50", folder=tmp_path)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPT)
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png", "x.safetensors", "x.svg"]


@pytest.mark.parametrize("arguments", [
    ["--help"], ["trace", "--help"], ["trace", "--examples"], ["intervene", "--help"], ["validate", "--help"],
    ["doctor", "--help"],
])  # fmt: skip
def test_help_and_examples_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from circuit_lens.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformer_lens', 'sae_lens', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(cl.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_wrong_argument_ends_with_2_and_a_message(tmp_path: Path) -> None:
    done = command("trace", "hello", "--model", "gpt3", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error\n  --model gpt3: there is no such model")
    assert list(tmp_path.iterdir()) == []


def test_load_pair_is_what_the_commands_call() -> None:
    """Other tests put another function in its place; that must reach the command."""
    assert isinstance(loading.load_pair, Callable)

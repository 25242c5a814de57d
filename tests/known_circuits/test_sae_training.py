"""SAEs and skip transcoders recover what sparse data were made of, come out as SAELens' own, and tell how it went."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from torch import Tensor

from circuit_lens.errors import ConsistencyError, DictionaryError, GraphFileError, HookError
from circuit_lens.training import (
    ActivationStore,
    SaeSettings,
    TranscoderSettings,
    collect_activations,
    measure_fit,
    train_sae,
    train_transcoder,
)
from circuit_lens.training.data_shards import write_folder
from tests.builders import build, random_tokens

N_TRUE, D, HOOK = 16, 12, "blocks.0.hook_resid_post"
SHORT = SaeSettings(d_sae=8, k=2.0, steps=3, batch=16)
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "batchtopk": (JumpReLUSAE, {"k": 2.2}),
    "topk": (TopKSAE, {"k": 2.0}),
    "jumprelu": (JumpReLUSAE, {"k": 2.0}),
    "standard": (StandardSAE, {"l1": 1.0}),
}


def directions(n: int = N_TRUE, d: int = D, seed: int = 7) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def sparse_data(n_tokens: int, seed: int = 0) -> Tensor:
    """Two of the true directions per token, far from the origin and in units of their own."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(n_tokens, N_TRUE, generator=generator).topk(2, -1).indices
    strength = 0.5 + torch.rand(n_tokens, 2, 1, generator=generator)
    return 50.0 + 20.0 * (directions()[which] * strength).sum(1)


def fit(sae: Any, x: Tensor, y: Tensor | None = None) -> Any:
    return measure_fit(sae, iter([(x, x if y is None else y)]))


def untrained(x: Tensor, d_sae: int, l0: float) -> JumpReLUSAE:
    """Random tied directions on centred data, with the threshold that gives this L0 and the best common length."""
    decoder = directions(d_sae, x.shape[1], seed=3)
    sae: Any = SAE.from_dict(
        {"architecture": "jumprelu", "d_in": x.shape[1], "d_sae": d_sae, "apply_b_dec_to_input": False,
         "metadata": SAEMetadata(hook_name=HOOK)}
    )  # fmt: skip
    with torch.no_grad():
        sae.W_enc.copy_(decoder.T)
        sae.b_enc.copy_(-(x.mean(0) @ decoder.T))
        sae.b_dec.copy_(x.mean(0))
        sae.threshold.fill_(float((x @ sae.W_enc + sae.b_enc).flatten().quantile(1 - l0 / d_sae)))
        sae.W_dec.copy_(decoder)
        made = sae.encode(x) @ decoder
        sae.W_dec.mul_(float((made * (x - x.mean(0))).sum() / made.square().sum()))
    return sae


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    kind: Any = request.param
    folder = tmp_path_factory.mktemp("sae") / kind
    settings = SaeSettings(architecture=kind, d_sae=24, steps=500, batch=128, lr=1e-2, bfloat16=False, **KINDS[kind][1])
    state = torch.get_rng_state()
    sae = train_sae(
        sparse_data(6_000), hook=HOOK, settings=settings, metadata={"model_name": "test"}, folder=folder,
        progress=False, log=folder.parent / "log.jsonl",
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    return kind, sae, folder


@torch.no_grad()
def test_an_sae_is_saelens_own_and_loads_from_its_files(trained: tuple[str, Any, Path]) -> None:
    kind, sae, folder = trained
    again = SAE.load_from_disk(str(folder), device="cpu")
    assert type(again) is type(sae) is KINDS[kind][0]
    x = sparse_data(100)
    assert torch.equal(again(x), sae(x))
    assert (again.cfg.metadata.hook_name, again.cfg.metadata.model_name) == (HOOK, "test")
    assert again.cfg.metadata.hook_name_out is None
    assert not again.cfg.apply_b_dec_to_input
    torch.testing.assert_close(again.W_dec.norm(dim=-1), torch.ones(24))


@torch.no_grad()
def test_it_explains_tokens_it_never_saw_better_than_an_untrained_one_of_its_l0(trained: tuple[str, Any, Path]) -> None:
    _, sae, _ = trained
    x = sparse_data(3_000, seed=99)
    good = fit(sae, x)
    assert 1.0 < good.l0 < 4.5
    assert good.explained_variance > 0.8
    control = fit(untrained(x, 24, good.l0), x)
    assert control.l0 == pytest.approx(good.l0, rel=0.05)
    assert control.explained_variance < good.explained_variance - 0.3
    shuffled = measure_fit(sae, iter([(x.roll(1, 0), x)]))
    assert shuffled.explained_variance < 0.2


@torch.no_grad()
def test_its_features_are_the_directions_the_data_were_made_of(trained: tuple[str, Any, Path]) -> None:
    _, sae, _ = trained
    used = sae.encode(sparse_data(2_000)).gt(0).float().mean(0) > 0.01
    best = (directions() @ sae.W_dec[used].T).max(1).values
    assert best.median() > 0.95
    assert (directions() @ directions(24, D, seed=3).T).max(1).values.median() < 0.8


def test_the_log_tells_losses_sparsity_and_dead_features(trained: tuple[str, Any, Path]) -> None:
    kind, _, folder = trained
    records = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records] == [1, *range(50, 501, 50)]
    first, last = records[0], records[-1]
    assert last["tokens"] == 500 * 128
    assert last["dead_tokens"] == 20 * 128
    assert last["loss"] == pytest.approx(sum(last["losses"].values()), rel=1e-4)
    assert {"mse_loss"} < set(last["losses"])
    assert last["explained_variance"] > max(0.7, first["explained_variance"])
    assert 0 <= last["dead"] <= 1
    assert first["dead"] == 0
    if kind == "topk":
        assert last["l0"] == 2.0


def test_memory_and_files_give_the_same_sae_and_another_seed_another(tmp_path: Path) -> None:
    model = build("gpt2", n_layers=1)
    tokens = random_tokens(12, batch=20)
    stores = [collect_activations(model, tokens, HOOK, memory=m, folder=f, rows_at_once=2)
              for m, f in ((10**9, None), (10**9, tmp_path / "a"), (20_000, tmp_path / "b"))]  # fmt: skip
    assert len(stores[2].parts) > 2
    tensor = next(stores[0].in_order())[HOOK]

    def train(source: Any, seed: int = 0) -> Tensor:
        return train_sae(source, hook=HOOK, settings=SHORT, seed=seed).W_dec

    first = train(tensor)
    for source in (*stores, stores[2].single(HOOK)):
        assert torch.equal(first, train(source))
    assert not torch.equal(first, train(tensor, seed=1))


# ---------------------------------------------------------------------------------------------------- skip transcoders


def affine_and_sparse(n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs that are an affine map of them plus a vector for the one strongest direction, and the map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, D, generator=generator)
    matrix = torch.randn(8, D, generator=torch.Generator().manual_seed(1))
    vectors = 6.0 * torch.randn(N_TRUE, 8, generator=torch.Generator().manual_seed(2))
    return x, x @ matrix.T + 5.0 + vectors[(x @ directions().T).argmax(-1)], matrix


@torch.no_grad()
@pytest.mark.parametrize(("scale_inputs", "shift", "factor"), [(False, 0.0, 1.0), (True, 30.0, 40.0)])
def test_a_skip_path_takes_the_affine_part(tmp_path: Path, scale_inputs: bool, shift: float, factor: float) -> None:
    """Also of inputs in other units, which are scaled for training and the weights scaled back."""
    x, y, matrix = affine_and_sparse(6_000)
    x = factor * x + shift
    settings = TranscoderSettings(
        d_sae=32, k=1.5, steps=300, batch=256, lr=1e-2, bfloat16=False, dead_window=20, scale_inputs=scale_inputs
    )

    def train(skip: bool) -> Any:
        with torch.enable_grad():
            return train_transcoder(
                x,
                y,
                hook_in="a",
                hook_out="b",
                skip=skip,
                settings=settings,
                folder=tmp_path / str(skip),
                progress=False,
            )

    with_skip, without = train(True), train(False)
    assert type(with_skip) is JumpReLUSkipTranscoder
    assert type(without) is JumpReLUTranscoder
    again = SAE.load_from_disk(str(tmp_path / "True"), device="cpu")
    assert type(again) is JumpReLUSkipTranscoder
    assert torch.equal(again(x[:50]), with_skip(x[:50]))
    fresh, target, _ = affine_and_sparse(2_000, seed=5)
    fresh = factor * fresh + shift
    good, plain = fit(with_skip, fresh, target), fit(without, fresh, target)
    assert good.l0 < 2.5
    assert good.explained_variance > plain.explained_variance + 0.03
    # The best affine map of x also says something of which direction is the strongest: that is the skip's as well.
    assert torch.cosine_similarity((with_skip.W_skip * factor).flatten(), matrix.flatten(), dim=0) > 0.5
    with_skip.W_skip.zero_()
    assert fit(with_skip, fresh, target).explained_variance < good.explained_variance - 0.1


def test_a_transcoder_of_a_store_is_that_of_its_tensors() -> None:
    x, y, _ = affine_and_sparse(400)
    store = ActivationStore.from_tensors({"other": y, "a": x, "b": y})
    settings = TranscoderSettings(d_sae=8, k=2.0, steps=5, batch=64, bfloat16=False)
    options: dict[str, Any] = {"hook_in": "a", "hook_out": "b", "settings": settings, "progress": False, "skip": True}
    one, other = train_transcoder(x, y, **options), train_transcoder(store, **options)
    torch.testing.assert_close(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.W_skip, other.W_skip)
    with pytest.raises(HookError, match="not collected"):
        train_transcoder(store, **(options | {"hook_in": "c"}))
    with pytest.raises(DictionaryError, match="store has both"):
        train_transcoder(store, y, **options)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 0}, "d_sae is 0"), ({"k": 0.0}, "k is 0"), ({"k": 9.0}, "at most d_sae"), ({"lr": 0.0}, "lr is 0"),
        ({"steps": 0}, "steps is 0"), ({"batch": 10**6}, "fewer than one batch"), ({"l1": -1.0}, "at least 0"),
        ({"architecture": "topkk"}, "nearest: topk"), ({"architecture": "topk", "k": 2.5}, "whole number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(changes: dict[str, Any], message: str, monkeypatch: Any) -> None:
    wrong = SaeSettings(d_sae=8, k=2.0, steps=3, batch=16)
    for name, value in changes.items():
        object.__setattr__(wrong, name, value)
    with pytest.raises(DictionaryError, match=message):
        train_sae(sparse_data(64), hook=HOOK, settings=wrong)


def test_nan_is_refused() -> None:
    x = sparse_data(64)
    x[3, 4] = torch.nan
    with pytest.raises(ConsistencyError, match="finite"):
        train_sae(x, hook=HOOK, settings=SHORT)


def test_nothing_is_sent_unless_a_project_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    sent: list[Any] = []

    class Run:
        log = staticmethod(lambda data, step: sent.append((step, data["loss"])))
        finish = staticmethod(lambda exit_code: sent.append(exit_code))

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("nobody asked"))
    train_sae(sparse_data(64), hook=HOOK, settings=SHORT)
    monkeypatch.setattr(wandb, "init", lambda project, config: sent.append((project, config["d_sae"])) or Run)
    train_sae(sparse_data(64), hook=HOOK, settings=SHORT, wandb="mine")
    assert sent[0] == ("mine", 8)
    assert [one[0] for one in sent[1:-1]] == [1, 3]
    assert sent[-1] == 0


def test_a_full_disk_leaves_an_older_dictionary_whole(tmp_path: Path) -> None:
    place = tmp_path / "sae"
    train_sae(sparse_data(64), hook=HOOK, settings=SHORT, folder=place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert sorted(before) == ["cfg.json", "sae_weights.safetensors"]

    def fill(folder: Path) -> None:
        (folder / "cfg.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(GraphFileError, match="No space left"):
        write_folder(place, fill)
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(GraphFileError, match="No space left"):
        write_folder(tmp_path / "new", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


# ------------------------------------------------------------------------------------------------- the bundled ones


@torch.no_grad()
def test_the_loss_with_replacements_is_that_of_transcoders_and_counts_the_skip_path() -> None:
    from circuit_lens.zoo.batches import held_out_text
    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.dictionary_figures import text_loss
    from circuit_lens.zoo.loading import load_dictionaries, load_model
    from circuit_lens.zoo.sae_recipe import MLP_OUT, replaced_loss
    from circuit_lens.zoo.tokenizer import build_vocabulary

    corpus, model, transcoders = Corpus(), load_model(), load_dictionaries()
    ids = {word: index for index, word in enumerate(build_vocabulary(corpus.words()))}
    tokens = held_out_text(corpus, ids, n_tokens=1_500, length=64, seed=77).rows.tokens
    clean, replaced = replaced_loss(model, tokens), replaced_loss(model, tokens, transcoders)
    assert clean == pytest.approx(text_loss(model, tokens), rel=1e-6)
    assert replaced == pytest.approx(text_loss(model, tokens, dictionaries=transcoders), rel=1e-6)
    assert replaced > clean
    zeroed = replaced_loss(model, tokens, zeroed=[MLP_OUT.format(layer) for layer in range(4)])
    assert zeroed == pytest.approx(text_loss(model, tokens, zero=True), rel=1e-6)
    # Negative control: a skip path that is not zero shows.
    skips = [skip_of(one) for one in transcoders]
    for one in skips:
        one.W_skip.normal_(generator=torch.Generator().manual_seed(0))
    assert abs(replaced_loss(model, tokens, skips) - replaced) > 0.1
    for one in skips:
        one.W_skip.zero_()
    assert replaced_loss(model, tokens, skips) == pytest.approx(replaced, rel=1e-6)


def skip_of(transcoder: Any) -> Any:
    """The same transcoder with a skip path of zeros."""
    config = {**transcoder.cfg.to_dict(), "architecture": "jumprelu_skip_transcoder"}
    found: Any = SAE.from_dict(config)
    found.load_state_dict({**transcoder.state_dict(), "W_skip": found.W_skip.data.zero_()})
    return found

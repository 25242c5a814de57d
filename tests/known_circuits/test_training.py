"""The network that is trained is the HookedTransformer that ships; transcoders come out as SAELens' own."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.transcoder import JumpReLUTranscoder

from circuit_lens.training import TranscoderSettings, mlp_activations, train_transcoder
from circuit_lens.training.transcoder import BatchThreshold
from circuit_lens.zoo.loading import build_hooked
from circuit_lens.zoo.model import ModelShape, SmallGPT, hooked_state
from circuit_lens.zoo.muon import orthogonalise
from circuit_lens.zoo.tokenizer import build_vocabulary

SHAPE = ModelShape(d_vocab=40, n_layers=2, d_model=24, n_heads=2, d_head=8, d_mlp=48, n_ctx=32)
WORDS = build_vocabulary([f"w{number}" for number in range(36)])


def make_networks(seed=0):
    torch.manual_seed(seed)
    network = SmallGPT(SHAPE, trained_embedding=False, embedding_seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network, build_hooked(SHAPE, hooked_state(network), WORDS, "test")


def test_the_hooked_model_computes_what_was_trained():
    network, hooked = make_networks()
    tokens = torch.randint(0, 40, (3, 20))
    torch.testing.assert_close(hooked(tokens), network(tokens), atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        network.blocks[1].mlp_in.bias += 0.1
    assert (hooked(tokens) - network(tokens)).abs().max() > 1e-3


def test_a_missing_weight_is_an_error():
    network, _ = make_networks()
    state = hooked_state(network)
    del state["blocks.1.mlp.W_in"]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_in"):
        build_hooked(SHAPE, state, WORDS, "test")


def test_a_frozen_embedding_depends_on_its_own_seed_alone():
    first = SmallGPT(SHAPE, trained_embedding=False, embedding_seed=1)
    torch.manual_seed(99)
    again = SmallGPT(SHAPE, trained_embedding=False, embedding_seed=1)
    other = SmallGPT(SHAPE, trained_embedding=True, embedding_seed=2)
    assert torch.equal(first.embed.weight, again.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert (first.embed.weight.requires_grad, other.embed.weight.requires_grad) == (False, True)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_values(shape):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.4
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = u.transpose(1, 2) @ result @ vh.transpose(1, 2)
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.1


@pytest.mark.parametrize("k", [0.5, 3.0, 6.7])
def test_the_threshold_form_equals_saelens_batchtopk(k):
    pre_acts = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(BatchThreshold(k)(pre_acts), BatchTopK(k)(pre_acts))
    assert not torch.equal(BatchThreshold(k)(pre_acts), BatchThreshold(k + 1)(pre_acts))


def sparse_data(n_tokens, d_in=12, d_out=8, n_true=20, seed=0):
    """Tokens made of two of ``n_true`` directions; the output is one fixed vector for each direction."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=generator), dim=-1)
    outputs = torch.randn(n_true, d_out, generator=generator)
    which = torch.rand(n_tokens, n_true, generator=generator).topk(2, -1).indices
    return directions[which].sum(1), outputs[which].sum(1) + 3.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoder")
    inputs, outputs = sparse_data(6_000)
    state = torch.get_rng_state()
    transcoder = train_transcoder(
        inputs,
        outputs,
        hook_in="blocks.0.ln2.hook_normalized",
        hook_out="blocks.0.hook_mlp_out",
        settings=TranscoderSettings(d_sae=32, k=2.5, steps=800, batch=256, lr=1e-2, bfloat16=False),
        metadata={"model_name": "test"},
        folder=folder,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), state)
    return transcoder, folder


def test_a_trained_transcoder_is_saelens_own_and_loads_from_its_files(trained):
    transcoder, folder = trained
    assert type(transcoder) is JumpReLUTranscoder
    again = SAE.load_from_disk(str(folder), device="cpu")
    assert type(again) is JumpReLUTranscoder
    x = sparse_data(100)[0]
    assert torch.equal(again(x), transcoder(x))
    metadata = again.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    assert metadata.model_name == "test"


@torch.no_grad()
def test_it_explains_sparse_data_sparsely_on_tokens_it_never_saw(trained):
    transcoder, _ = trained
    inputs, outputs = sparse_data(20_000)
    fresh_inputs, fresh_outputs = inputs[6_000:], outputs[6_000:]
    acts = transcoder.encode(fresh_inputs)
    unexplained = (transcoder.decode(acts) - fresh_outputs).pow(2).sum()
    assert unexplained < 0.1 * (fresh_outputs - fresh_outputs.mean(0)).pow(2).sum()
    assert 1.5 < (acts > 0).float().sum(-1).mean() < 4.0
    shuffled = (transcoder(fresh_inputs.roll(1, 0)) - fresh_outputs).pow(2).sum()
    assert shuffled > 5 * unexplained


def test_the_same_seed_gives_the_same_transcoder():
    inputs, outputs = sparse_data(600)
    settings = TranscoderSettings(d_sae=16, k=2.0, steps=20, batch=128)

    def train(seed):
        return train_transcoder(
            inputs, outputs, hook_in="a", hook_out="b", settings=settings, seed=seed, progress=False
        ).W_dec

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (torch.zeros(10, 4), torch.zeros(10, 4), "fewer than one batch"),
        (torch.zeros(600, 4), torch.zeros(599, 4), "same tokens"),
        (torch.full((600, 4), torch.nan), torch.zeros(600, 4), "finite"),
    ],
)
def test_data_that_cannot_train_is_refused(inputs, outputs, message):
    with pytest.raises(ValueError, match=message):
        train_transcoder(inputs, outputs, hook_in="a", hook_out="b", settings=TranscoderSettings(batch=256))


def test_activations_are_the_models_own_at_the_kept_tokens():
    _, hooked = make_networks()
    tokens = torch.randint(4, 40, (5, 12))
    keep = torch.ones(5, 12, dtype=torch.bool)
    keep[:, 0] = False
    (data,) = mlp_activations(hooked, tokens, keep, layers=[1], batch=2)
    _, cache = hooked.run_with_cache(tokens)
    torch.testing.assert_close(data.inputs, cache["blocks.1.ln2.hook_normalized"][:, 1:].flatten(0, 1))
    torch.testing.assert_close(data.outputs, cache["blocks.1.hook_mlp_out"][:, 1:].flatten(0, 1))
    torch.testing.assert_close(hooked.blocks[1].mlp(data.inputs), data.outputs)
    with pytest.raises(ValueError, match="no hook points"):
        mlp_activations(hooked, tokens, keep, hook_in="blocks.{layer}.mlp.hook_inn")

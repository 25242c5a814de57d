"""The trainer of cross-layer transcoders: its losses, what it finds, and that no interruption changes the result."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import types
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from circuit_lens.dictionaries.cross_layer import CrossLayerTranscoder
from circuit_lens.training import checkpoint
from circuit_lens.training.activations import MlpActivations
from circuit_lens.training.checkpoint import TrainingError, load_checkpoint
from circuit_lens.training.cross_layer import (
    CHECKPOINT_FILE,
    DICTIONARY_FOLDER,
    CrossLayerSettings,
    InMemoryActivations,
    train_cross_layer,
)
from circuit_lens.training.cross_layer_data import as_source, measure_normalisation
from circuit_lens.training.cross_layer_network import CrossLayerNetwork, jump_relu, kept_by_batch

N_LAYERS, D_IN, D_OUT = 3, 6, 5
HOOKS = {
    "hook_in": [f"blocks.{layer}.ln2.hook_normalized" for layer in range(N_LAYERS)],
    "hook_out": [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)],
}
TINY = CrossLayerSettings(d_sae=12, k=2.0, steps=12, batch=16, warm_up=3, dead_window=3, bfloat16=False)
JUMPRELU = replace(TINY, activation="jumprelu", sparsity=0.5, initial_threshold=0.1)
BOTH = pytest.mark.parametrize("settings", [TINY, JUMPRELU, replace(TINY, per_layer=True)], ids=["topk", "jump", "per"])


def random_source(n=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [1 + 2 * torch.randn(n, D_IN, generator=generator) for _ in range(N_LAYERS)]
    return InMemoryActivations(inputs, [3 * x[:, :D_OUT].relu() - layer for layer, x in enumerate(inputs)])


def train(settings=TINY, source=None, **options):
    return train_cross_layer(source or random_source(), settings=settings, progress=False, **HOOKS, **options)


def weights(transcoder):
    """Every tensor of a transcoder, by layer."""
    parts = [d.parts for d in transcoder.dictionaries]
    return [
        t for p in parts for t in (p.matrices.W_enc, p.matrices.W_dec, p.b_enc, p.b_dec, p.threshold) if t is not None
    ]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# --------------------------------------------------------------------------------------------------------- the losses


def test_a_thresholds_gradient_is_the_published_window():
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    threshold = torch.rand(2, 1, 3, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    acts = jump_relu(pre, threshold, 0.5)
    acts.backward(grad)
    assert threshold.grad is not None
    expected = torch.zeros(2, 1, 3, dtype=torch.float64)
    for layer in range(2):
        for token in range(50):
            for feature in range(3):
                h, t = pre[layer, token, feature].item(), threshold[layer, 0, feature].item()
                assert acts[layer, token, feature].item() == (h if h > t else 0.0)
                if abs(h - t) < 0.25:
                    expected[layer, 0, feature] -= t / 0.5 * grad[layer, token, feature]
    torch.testing.assert_close(threshold.grad, expected)
    torch.testing.assert_close(pre.grad, grad * (pre > threshold))
    threshold.grad = None
    jump_relu(pre, threshold, 1.0).backward(grad)
    assert not torch.allclose(threshold.grad, expected)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.integers(0, 35),
    st.floats(-1, 8, allow_nan=False),
)
def test_the_bound_keeps_the_largest_whatever_is_guessed(values, kept, guess):
    strength = torch.tensor(values, dtype=torch.float64)
    bound = kept_by_batch(strength, kept, guess)
    ordered = sorted(values, reverse=True)
    assert float(bound) == (ordered[kept] if kept < len(values) else 0.0)
    assert int((strength > bound).sum()) <= kept
    if len(set(values)) == len(values):
        assert int((strength > bound).sum()) == min(kept, sum(v > 0 for v in values))


def network(settings):
    generator = torch.Generator().manual_seed(0)
    net = CrossLayerNetwork(settings, N_LAYERS, D_IN, D_OUT, generator).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if settings.activation == "jumprelu":
            net.log_threshold.clamp_(min=-2)
    net.silent[0, :9] = 100
    net.silent[2, 4] = 100
    return net


def batch_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, N_LAYERS, d, generator=generator, dtype=torch.float64) for d in (D_IN, D_OUT))


def pre_and_norms(net, x):
    pre = torch.stack([x[:, i] @ net.W_enc[i] + net.b_enc[i] for i in range(N_LAYERS)])
    return pre, torch.stack([rows.pow(2).sum((1, 2)).sqrt() for rows in net.W_dec])


def written(net, acts):
    """What features write to each layer, without biases."""
    out = torch.zeros(acts.shape[1], N_LAYERS, D_OUT, dtype=torch.float64)
    for reads in range(N_LAYERS):
        for writes in range(reads, N_LAYERS):
            out[:, writes] += acts[reads] @ net.W_dec[reads][:, writes - reads]
    return out


@BOTH
def test_the_loss_is_its_definition(settings):
    net, (x, y) = network(settings), batch_of(20)
    done = net(x, y, step=5)
    pre, norms = pre_and_norms(net, x)
    penalty = torch.zeros((), dtype=torch.float64)
    if settings.activation == "jumprelu":
        acts = torch.where(pre > net.log_threshold.exp()[:, None], pre, 0.0)
        cost = sum(
            math.tanh(settings.tanh_c * (norms[i, f] * acts[i, t, f]).item())
            for i in range(N_LAYERS)
            for t in range(20)
            for f in range(settings.d_sae)
        )
        penalty = torch.tensor(settings.sparsity * 6 / 12 * cost / 20, dtype=torch.float64)
    else:
        strength = pre.relu() * norms[:, None]
        acts = torch.zeros_like(pre)
        groups = [[0], [1], [2]] if settings.per_layer else [[0, 1, 2]]
        for group in groups:
            kept = strength[group].flatten().topk(int(settings.k * 20) * len(group)).values[-1]
            acts[group] = torch.where(strength[group] >= kept, pre[group], 0.0)
        assert int((acts > 0).sum()) == int(settings.k * 20) * N_LAYERS
    miss = y - written(net, acts) - net.b_dec
    dead = net.silent >= settings.dead_window
    silent = torch.where(dead[:, None], pre.relu(), 0.0)
    for layer in range(N_LAYERS):
        least = silent[layer].topk(D_OUT // 2).values[:, -1:]
        silent[layer] *= silent[layer] >= least
    share = (min(9, D_OUT // 2) + 1) / (N_LAYERS * (D_OUT // 2))
    auxiliary = settings.auxiliary * share * (miss.detach() - written(net, silent)).pow(2).sum() / 20
    torch.testing.assert_close(done.error, miss.pow(2).sum((0, 2)) / 20)
    torch.testing.assert_close(done.penalty, penalty)
    torch.testing.assert_close(done.auxiliary, auxiliary)
    torch.testing.assert_close(done.loss, done.error.sum() + penalty + auxiliary)
    assert torch.equal(done.active, acts > 0)
    assert auxiliary.item() > 0


def test_only_dead_features_learn_from_the_auxiliary_loss():
    net, (x, y) = network(TINY), batch_of(20)
    net(x, y).auxiliary.backward()
    dead = net.silent >= TINY.dead_window
    moved = net.W_enc.grad.abs().sum(1) > 0
    assert moved[dead].any()
    assert not moved[~dead].any()
    net.silent.zero_()
    assert net(x, y).auxiliary.item() == 0


@BOTH
def test_folding_changes_neither_what_is_active_nor_what_is_written(settings):
    net, source = network(settings), random_source()
    net.running.fill_(0.7)
    statistics = measure_normalisation(source, 20, 0)
    statistics = replace(statistics, **{name: value.double() for name, value in asdict(statistics).items()})
    x, y = (t.double() for t in next(source.batches(20, 0)))
    folded = net.folded(statistics)
    pre, norms = pre_and_norms(net, statistics.inputs(x))
    bound = net.log_threshold.exp() if settings.activation == "jumprelu" else net.running[:, None] / norms
    acts = torch.where(pre > bound[:, None], pre, 0.0)
    expected = (written(net, acts) + net.b_dec) * statistics.output_scale[:, None] + statistics.output_mean
    transcoder = CrossLayerTranscoder(**asdict(folded), activation="jumprelu", **HOOKS)
    found = torch.zeros_like(y)
    for layer, dictionary in enumerate(transcoder.dictionaries):
        own = dictionary.activate(dictionary.pre_acts(x[:, layer]), x[:, layer])
        assert torch.equal(own > 0, acts[layer] > 0)
        found[:, layer:] += dictionary.decode(own)
        rows = folded.W_dec[layer] / statistics.output_scale[layer:, None]
        torch.testing.assert_close(rows.pow(2).sum((1, 2)), torch.ones(settings.d_sae, dtype=torch.float64))
    assert (acts > 0).any()
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------ what it finds


def cross_layer_data(n, seed=0):
    """Layer 1's output is sparse in what layer 0 reads; layer 0's own output is noise that nothing explains."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(20, 12, generator=torch.Generator().manual_seed(1)), dim=-1)
    out = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    which = torch.rand(n, 20, generator=generator).topk(2, -1).indices
    x0, x1 = directions[which].sum(1), torch.randn(n, 12, generator=generator)
    y0 = torch.where(torch.rand(n, 1, generator=generator) < 0.5, 1.0, -1.0) * torch.ones(8)
    return InMemoryActivations([x0, x1], [y0, out[which].sum(1) + 3.0])


def explained(transcoder, source):
    x, y = (torch.stack(t, 1) for t in (source.inputs, source.outputs))
    found, active = torch.zeros_like(y), []
    for layer, d in enumerate(transcoder.dictionaries):
        acts = d.activate(d.pre_acts(x[:, layer]), x[:, layer])
        found[:, layer:] += d.decode(acts)
        active.append(float((acts > 0).float().sum(-1).mean()))
    spread = (y - y.mean(0)).pow(2).sum((0, 2))
    return (1 - (found - y).pow(2).sum((0, 2)) / spread).tolist(), active


@pytest.mark.parametrize(
    "settings",
    [
        CrossLayerSettings(d_sae=32, k=1.5, steps=400, batch=256, lr=1e-2, bfloat16=False),
        CrossLayerSettings(d_sae=32, activation="jumprelu", sparsity=0.1, steps=500, batch=256, lr=1e-2),
    ],
    ids=["batchtopk", "jumprelu"],
)
def test_features_explain_the_outputs_of_later_layers_and_never_of_earlier_ones(settings):
    names = {name: hooks[:2] for name, hooks in HOOKS.items()}
    source, fresh = cross_layer_data(4_000), cross_layer_data(2_000, seed=9)
    state = torch.get_rng_state()
    transcoder = train_cross_layer(source, settings=settings, progress=False, **names)
    assert torch.equal(torch.get_rng_state(), state)
    shares, active = explained(transcoder, fresh)
    assert shares[1] > 0.85
    assert 1.0 < active[0] < 4.0
    # Layer 0 cannot see what its output depends on, and nothing of layer 1 may write to it.
    assert shares[0] < 0.1
    swapped = InMemoryActivations(source.inputs[::-1], source.outputs[::-1])
    backwards = train_cross_layer(swapped, settings=replace(settings, steps=100), progress=False, **names)
    assert explained(backwards, InMemoryActivations(fresh.inputs[::-1], fresh.outputs[::-1]))[0][0] < 0.1


def test_one_seed_gives_one_result_and_another_seed_another():
    assert same(train(), train())
    assert not same(train(), train(seed=1))


def test_what_mlp_activations_returns_is_taken_as_it_is():
    source = random_source()
    data = [
        MlpActivations(*names, x, y)
        for *names, x, y in zip(HOOKS["hook_in"], HOOKS["hook_out"], source.inputs, source.outputs, strict=True)
    ]
    assert same(train_cross_layer(data, settings=TINY, progress=False), train(source=source))


# --------------------------------------------------------------------------------------------------------------- data


def test_batches_depend_on_the_step_and_not_on_where_one_starts():
    source = random_source(50)
    whole = list(islice(source.batches(16, 3), 10))
    for start in range(8):
        for (x, y), (expected_x, expected_y) in zip(source.batches(16, 3, start), whole[start:], strict=False):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
    rows = torch.stack(source.inputs, 1).flatten(1).tolist()
    for first in (0, 3, 6):
        seen = [row for x, _ in whole[first : first + 3] for row in x.flatten(1).tolist()]
        assert len({tuple(row) for row in seen}) == 48
        assert all(row in rows for row in seen)
    assert not torch.equal(next(source.batches(16, 4))[0], whole[0][0])
    assert not torch.equal(whole[3][0], whole[0][0])


def test_a_constant_layer_and_a_huge_offset_are_normalised():
    source = random_source()
    source.inputs[1] = torch.full_like(source.inputs[1], 0.3)
    source.outputs[2] = source.outputs[2] + 1e4
    found = measure_normalisation(source, 100, 0, n_batches=1)
    assert float(found.input_scale[1]) == 1
    y = source.outputs[2].double()
    torch.testing.assert_close(
        float(found.output_scale[2]), float((y - y.mean(0)).pow(2).mean().sqrt()), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([], [], "one tensor per layer"),
        ([torch.zeros(9, 4)], [torch.zeros(8, 4)], "same tokens"),
        ([torch.zeros(9, 4), torch.zeros(9, 5)], [torch.zeros(9, 4)] * 2, "widths"),
        ([torch.full((9, 4), torch.inf)], [torch.zeros(9, 4)], "finite"),
    ],
)
def test_activations_that_do_not_fit_are_refused(inputs, outputs, message):
    with pytest.raises(ValueError, match=message):
        InMemoryActivations(inputs, outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "batchtopkk"}, "nearest: batchtopk"),  # reached where annotations are not checked
        ({"k": 13.0}, "exceed d_sae"),
        ({"steps": 0}, "at least 1"),
        ({"lr": 0.0}, "greater than 0"),
        ({"auxiliary": -1.0}, "negative"),
        ({"decay_share": 1.5}, "share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CrossLayerSettings.__post_init__(types.SimpleNamespace(**{**asdict(TINY), **change}))
    CrossLayerSettings.__post_init__(types.SimpleNamespace(**asdict(TINY)))


def test_data_and_hooks_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match="fewer than one batch"):
        train(replace(TINY, batch=101))
    with pytest.raises(ValueError, match="3 layers"):
        train_cross_layer(random_source(), settings=TINY, hook_in=HOOKS["hook_in"][:2], hook_out=HOOKS["hook_out"])
    with pytest.raises(ValueError, match="must name"):
        train_cross_layer(random_source(), settings=TINY)
    with pytest.raises(TypeError, match="mlp_activations"):
        as_source([torch.zeros(3, 4)])
    source = random_source()
    source.outputs[0] = torch.full_like(source.outputs[0], torch.nan)
    with pytest.raises(ValueError, match="finite"):
        train(source=source)


def test_a_training_that_diverges_says_so():
    with pytest.raises(TrainingError, match="lr=1e\\+30"):
        train(replace(TINY, lr=1e30, steps=50))


# ------------------------------------------------------------------------------------------------------ interruptions


class Stopping:
    """A source that raises, or sends signals, before it yields the batch of one step to the training.

    Batches are also asked for to learn their shape, and (unless a checkpoint has them) for statistics.
    """

    def __init__(self, step, act, *, asked_before=2):
        self.inner, self.step, self.act, self.left = random_source(), step, act, asked_before

    def batches(self, batch_size, seed, start_step=0):
        self.left -= 1
        training = self.left < 0
        for number, batch in enumerate(self.inner.batches(batch_size, seed, start_step), start_step):
            if training and number == self.step:
                self.act()
            yield batch

    def fingerprint(self):
        return self.inner.fingerprint()


def crash():
    raise ConnectionError("the machine went away")


@BOTH
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_a_crashed_training_continues_to_the_uninterrupted_result(tmp_path, settings, stop):
    whole = train(settings, log=tmp_path / "whole.jsonl", log_every=1)
    options = {"folder": tmp_path / "run", "checkpoint_every": 4, "log": tmp_path / "log.jsonl", "log_every": 1}
    with pytest.raises(ConnectionError):
        train(settings, Stopping(stop, crash), **options)
    path = tmp_path / "run" / CHECKPOINT_FILE
    assert (load_checkpoint(path).step if path.exists() else 0) == stop // 4 * 4
    assert [line["step"] for line in records(tmp_path / "log.jsonl")] == list(range(1, stop + 1))
    state = torch.get_rng_state()
    assert same(train(settings, **options), whole)
    assert torch.equal(torch.get_rng_state(), state)
    found = records(tmp_path / "log.jsonl")
    assert without_time(found) == without_time(records(tmp_path / "whole.jsonl"))
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(found))
    # The control: a training that starts anew with another seed shares nothing of the curve.
    train(settings, seed=1, log=tmp_path / "other.jsonl", log_every=1)
    assert all(a["loss"] != b["loss"] for a, b in zip(found, records(tmp_path / "other.jsonl"), strict=True))


def test_a_finished_training_is_read_back_and_not_done_again(tmp_path):
    whole = train(folder=tmp_path)
    assert same(train(source=Stopping(0, crash, asked_before=1), folder=tmp_path), whole)
    assert same(CrossLayerTranscoder.load(tmp_path / DICTIONARY_FOLDER), whole)
    with pytest.raises(ConnectionError):
        train(source=Stopping(0, crash), folder=tmp_path, resume=False)


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(tmp_path):
    train(folder=tmp_path)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(TrainingError, match=r"settings\.steps was 12 and is 13"):
        train(replace(TINY, steps=13), folder=tmp_path)
    with pytest.raises(TrainingError, match="seed was 0 and is 1"):
        train(seed=1, folder=tmp_path)
    with pytest.raises(TrainingError, match="data was"):
        train(source=random_source(seed=1), folder=tmp_path)
    other = {**HOOKS, "hook_out": HOOKS["hook_out"][::-1]}
    with pytest.raises(TrainingError, match="hook_out was"):
        train_cross_layer(random_source(), settings=TINY, progress=False, folder=tmp_path, **other)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


class Anonymous:
    """A source without a fingerprint of its own."""

    def __init__(self, seed):
        self.inner = random_source(seed=seed)

    def batches(self, batch_size, seed, start_step=0):
        return self.inner.batches(batch_size, seed, start_step)


def test_data_without_a_fingerprint_are_told_apart_by_their_first_batch(tmp_path):
    whole = train(source=Anonymous(0), folder=tmp_path)
    assert same(train(source=Anonymous(0), folder=tmp_path), whole)
    with pytest.raises(TrainingError, match="first batch"):
        train(source=Anonymous(1), folder=tmp_path)


def test_files_that_are_no_whole_checkpoint_are_refused(tmp_path):
    train(folder=tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[:50], b"", whole.replace(b'\\"steps\\": 12', b'\\"steps\\": 13')):
        assert damage != whole
        path.write_bytes(damage)
        with pytest.raises(TrainingError, match="resume=False"):
            train(folder=tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(TrainingError, match="no training checkpoint"):
        train(folder=tmp_path)
    fresh = train(folder=tmp_path, resume=False)
    assert same(train(folder=tmp_path), fresh)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, where):
    whole, options = train(), {"folder": tmp_path, "checkpoint_every": 3}
    written = 0

    def full(path):
        nonlocal written
        written += 1
        if written > 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "write":
            real = checkpoint.save_file
            patch.setattr(checkpoint, "save_file", lambda t, path, metadata: (full(path), real(t, path, metadata)))
        else:
            fsync = os.fsync
            patch.setattr(os, "fsync", lambda handle: (full(os.devnull), fsync(handle)))
        with pytest.raises(TrainingError, match=r"last checkpoint is whole.*No space left"):
            train(**options)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE).step in (3, 6)
    assert same(train(**options), whole)


@pytest.fixture
def usual_ctrl_c():
    """Ctrl-C does what it does in a terminal, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_ctrl_c_is_heard_after_the_step_and_leaves_its_state(tmp_path):
    whole, options = train(), {"folder": tmp_path, "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt):
        train(source=Stopping(5, lambda: os.kill(os.getpid(), signal.SIGINT)), **options)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE).step == 6
    assert same(train(**options), whole)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_a_second_ctrl_c_acts_at_once(tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable: the second signal raises here")

    with pytest.raises(KeyboardInterrupt):
        train(source=Stopping(5, twice), folder=tmp_path, checkpoint_every=4)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE).step == 4


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from circuit_lens.training.cross_layer import CrossLayerSettings, InMemoryActivations, train_cross_layer

folder, n_points, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
inputs = [torch.randn(400, 8, generator=generator) for _ in range(2)]
source = InMemoryActivations(inputs, [x.relu() for x in inputs])
settings = CrossLayerSettings(d_sae=24, k=2.0, steps=60, batch=64, dead_window=5)
hooks = {"hook_in": ["blocks.0.hook_mlp_in", "blocks.1.hook_mlp_in"],
         "hook_out": ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]}

def work(name):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train_cross_layer(source, settings=settings, progress=False, log_every=1, checkpoint_every=1 + seed % 5,
                              folder=folder / name, log=folder / f"{name}.jsonl", **hooks)
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)
    return child

started = time.perf_counter()
assert os.waitpid(work("whole"), 0)[1] == 0
length = time.perf_counter() - started
draw, killed, tries = random.Random(seed), 0, 0
while killed < n_points:
    child = work("killed")
    time.sleep(draw.uniform(0, length / 3))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
    else:  # done before it could be killed: from the start again
        assert os.WEXITSTATUS(status) == 0, status
        for path in (folder / "killed").glob("checkpoint*"):
            path.unlink()
    tries += 1
    assert tries < 20 * n_points
assert os.waitpid(work("killed"), 0)[1] == 0
leftovers = [path.name for path in (folder / "killed").glob(".*.tmp")]
print(json.dumps({"killed": killed, "leftovers": leftovers}))
"""


def kill_and_compare(folder, n_points, seed):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), str(n_points), str(seed)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"killed": n_points, "leftovers": []}
    whole, killed = (records(folder / f"{name}.jsonl") for name in ("whole", "killed"))
    assert [line["step"] for line in killed] == list(range(1, 61))
    assert without_time(killed) == without_time(whole)
    one, other = (CrossLayerTranscoder.load(folder / name / DICTIONARY_FOLDER) for name in ("whole", "killed"))
    assert same(one, other)


def test_killed_twice_and_resumed_it_gives_the_uninterrupted_curve(tmp_path):
    kill_and_compare(tmp_path, 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_point_and_resumed_it_gives_the_uninterrupted_curve(tmp_path, seed):
    kill_and_compare(tmp_path, 5, seed=seed + 1)


FILLER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from circuit_lens.training.checkpoint import TrainingError, load_checkpoint
from circuit_lens.training.cross_layer import CrossLayerSettings, InMemoryActivations, train_cross_layer

folder = Path(sys.argv[1])
inputs = [torch.randn(200, 32) for _ in range(2)]
source = InMemoryActivations(inputs, [x.relu() for x in inputs])
settings = CrossLayerSettings(d_sae=256, k=2.0, steps=6, batch=64)
options = {"hook_in": ["blocks.0.hook_mlp_in", "blocks.1.hook_mlp_in"],
           "hook_out": ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"],
           "settings": settings, "progress": False, "folder": folder / "run", "checkpoint_every": 1}

class Filling:
    fingerprint, asked = source.fingerprint, 0
    def batches(self, batch_size, seed, start_step=0):
        self.asked += 1
        training = self.asked > 2  # before, batches are asked for their shape and for statistics
        for step, batch in enumerate(source.batches(batch_size, seed, start_step), start_step):
            if step == 3 and training:
                try:
                    (folder / "ballast").write_bytes(bytes(2**24))
                except OSError:
                    pass
            yield batch

try:
    train_cross_layer(Filling(), **options)
except TrainingError as error:
    print("refused" if "No space left" in str(error) and "is whole" in str(error) else error)
print(load_checkpoint(folder / "run/checkpoint.safetensors").step, len(list((folder / "run").iterdir())))
(folder / "ballast").unlink()
print(train_cross_layer(source, **options).n_layers)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_leaves_the_last_checkpoint(tmp_path):
    mount = f"mount -t tmpfs -o size=6m tmpfs '{tmp_path}'"
    inside = ["unshare", "-Urm", "sh", "-c"]
    try:
        possible = subprocess.run([*inside, mount], check=False, capture_output=True).returncode == 0
    except OSError:
        possible = False
    if not possible:
        pytest.skip("this system lets nobody mount a small file system")
    done = subprocess.run(
        [*inside, f"{mount} && exec '{sys.executable}' -c \"$FILLER\" '{tmp_path}'"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "FILLER": FILLER, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines() == ["refused", "3 1", "2"], done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------- log


def test_the_log_has_a_line_for_every_figure_that_was_asked_for(tmp_path):
    train(log=tmp_path / "deep" / "log.jsonl", log_every=5)
    lines = records(tmp_path / "deep" / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert [line["tokens"] for line in lines] == [80, 160, 192]
    for line in lines:
        assert sum(line["l0"]) == pytest.approx(TINY.k * N_LAYERS)
        assert line["loss"] == pytest.approx(sum(line["mse"]) + line["penalty"] + line["auxiliary"], rel=1e-5)
        assert {len(line[name]) for name in ("l0", "mse", "explained_variance", "threshold")} == {N_LAYERS}
        assert max(line["explained_variance"]) < 1
        assert 0 <= line["dead"] <= 1
    assert lines[-1]["lr"] < lines[0]["lr"]
    assert lines[-1]["mse"] < lines[0]["mse"]


def test_weights_and_biases_is_started_only_when_asked_for(monkeypatch):
    calls = []

    class Run:
        def log(self, figures, step):
            calls.append((step, figures))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train()
    assert calls == []
    train(wandb="my-project", log_every=6)
    assert calls[0]["project"] == "my-project"
    assert calls[0]["config"]["settings"]["d_sae"] == 12
    assert [call[0] for call in calls[1:-1]] == [6, 12]
    assert calls[1][1]["l0/0"] >= 0
    assert calls[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    train()
    with pytest.raises(ImportError, match="pip install wandb"):
        train(wandb="my-project")


def test_the_bar_tells_the_losses_and_can_be_silent(capsys):
    train_cross_layer(random_source(), settings=TINY, log_every=1, **HOOKS)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("loss=", "L0=", "EV=", "dead=", "12/12"))
    train()
    assert capsys.readouterr().err == ""

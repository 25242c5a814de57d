"""Many runs at once, and text written on, are what one run after another gives; whatever happens, nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuit_lens import decoding
from circuit_lens.graph.edits import Direction, ErrorNode
from circuit_lens.graph.nodes import Feature
from circuit_lens.interventions import engine
from circuit_lens.interventions.recording import Recording
from circuit_lens.replacement_model import ReplacementModel
from tests import builders
from tests.invariants import cases

N = 6
FEW = [
    ("gpt2", "hooked", "jumprelu_skip", "hook_resid_mid"),
    ("pythia", "bridge", "skip", "hook_mlp_in"),
    ("gemma2", "hooked", "transcoder", "mlp.hook_in"),
]


def vector(seed: int = 0) -> Tensor:
    return torch.randn(builders.D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def many(recording: Recording) -> list[Any]:
    """Return runs of every kind: one change, several, none, on inactive features, errors and directions."""
    active = recording.active()
    runs: list[Any] = [f.scale(factor) for f, factor in zip(active[::25], (-1.0, 0.0, 2.0) * 9, strict=False)]
    off = Feature(1, 2, int((recording.acts(recording.binding.dictionaries[1])[2] == 0).nonzero()[0]))
    direction = Direction(vector(), 1, 4)
    runs += [[], active[0].set(1.0), [f.add(0.5) for f in active[3::7]], off.set(1.5)]
    runs += [ErrorNode(1, 3).scale(0.0), [ErrorNode(0, 2).scale(2.0), ErrorNode(2, 2).scale(0.5)]]
    runs += [direction.scale(0.0), [direction.add(1.0), active[1].ablate(), off.set(1.0), ErrorNode(2, 5).scale(-1.0)]]
    return runs


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("options", [{}, {"freeze": "attention", "layers": (1, 1)}, {"freeze": "all"}])
@pytest.mark.parametrize(("name", "kind", "transcoder", "hook_in"), FEW)
def test_a_batch_is_its_runs_one_by_one_for_any_batch_size(name, kind, transcoder, hook_in, options):
    rm = cases.pair(name, kind, transcoder, hook_in)
    recording = rm.record(cases.tokens(N, seed=1))
    runs = many(recording)
    batch = rm.intervene_batch(recording, runs, read="features", pos=None, **options)
    single = [rm.intervene(recording, run, **options) for run in runs]
    scale = float(recording.logits.abs().max())
    limit = 1e-12 if kind == "hooked" else 1e-6
    assert len(batch) == len(runs)
    assert float((batch.logits - torch.stack([r.logits for r in single])).abs().max()) < limit * scale
    lookup = {(f.site, f.pos, f.index): i for i, f in enumerate(batch.features)}
    switched = list(
        zip(*(getattr(batch.switched_on, k).tolist() for k in ("run", "site", "pos", "index")), strict=True)
    )
    wanted = []
    for n, run in enumerate(single):
        for s, d in enumerate(rm.dictionaries):
            mask = recording.acts(d) != 0
            ids = [lookup[d.site, p, i] for p, i in mask.nonzero().tolist()]
            assert torch.allclose(batch.acts[n, ids], run.acts[d.site][mask], rtol=0, atol=100 * limit)
            assert torch.allclose(batch.pre_acts[n, ids], run.pre_acts[d.site][mask], rtol=0, atol=100 * limit)
            on = (~mask & (run.acts[d.site] != 0)).nonzero().tolist()
            wanted += [((n, s, p, i), float(run.acts[d.site][p, i])) for p, i in on]
    assert sorted(switched) == sorted(key for key, _ in wanted)
    acts = dict(zip(switched, batch.switched_on.act.tolist(), strict=True))
    assert all(acts[key] == pytest.approx(value, abs=100 * limit) for key, value in wanted)
    assert wanted
    for size in (1, 4) if name == "gpt2" and not options else (4,):
        other = rm.intervene_batch(recording, runs, read="features", batch_size=size, **options)
        assert float((other.logits[:, 0] - batch.logits[:, -1]).abs().max()) < limit * scale
        assert torch.allclose(other.acts, batch.acts, rtol=0, atol=100 * limit)
        assert len(other.switched_on) == len(batch.switched_on)
    assert float((batch.logits[0] - batch.logits[1]).abs().max()) > 1e-6  # control: runs differ


def test_a_batch_reads_logits_where_it_is_asked_to():
    rm = cases.pair("gpt2")
    recording = rm.record(cases.tokens(N))
    runs = many(recording)[:3]
    every = rm.intervene_batch(recording, runs, pos=None)
    assert every.positions == tuple(range(N))
    assert every.acts is None
    assert torch.equal(rm.intervene_batch(recording, runs, pos=slice(1, 3)).logits, every.logits[:, 1:3])
    assert torch.equal(rm.intervene_batch(recording, runs, pos=-2).logits, every.logits[:, -2:-1])
    assert torch.equal(every.clean_logits, recording.logits)
    none = rm.intervene_batch(recording, [], read="features")
    assert (len(none), len(none.switched_on), none.acts.shape[0]) == (0, 0, 0)


# --------------------------------------------------------------------------------------------------------- generation


def written(rm: ReplacementModel, recording: Recording, n: int) -> list[Any]:
    """Return the interventions of prompt number n: at positions of the prompt, and going on into what is written."""
    active = recording.active()
    first, late = active[n % len(active)], [f for f in active if f.layer == 2][n % 5]
    direction = Direction(vector(n), 1, 2)
    return [
        [first.scale(-2.0), late.set(1.0)],
        [Feature(0, 0, n).set(1.5, pos=slice(None)), late.scale(3.0)],
        [Feature(1, 0, n).add(0.7, pos=slice(2, None)), first.ablate(pos=slice(None))],
        [direction.add(2.0, pos=slice(None)), Feature(2, 0, n).set(1.0, pos=slice(N + 3, None))],
        [direction.scale(0.0, pos=slice(4, None)), direction.add(1.0, pos=1)],
        [first.inject(cases.tokens(N, seed=70), from_pos=3), late.inject(recording, factor=2.0, pos=slice(None))],
        [Direction(vector(n), 2, 0, "hook_attn_out").set(1.0, pos=slice(None)), ErrorNode(1, 3).scale(0.0)],
        [Feature(0, 0, n).scale(4.0, pos=slice(None)), Feature(1, 0, n).scale(-2.0, pos=slice(None))],
    ][n % 8]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", "hooked"), ("gemma2", "hooked"), ("llama", "bridge")],
)
def test_sixteen_of_sixteen_texts_are_the_same_with_and_without_a_cache(name, kind):
    rm = cases.pair(name, kind, "jumprelu_skip", "mlp.hook_in")
    limit = 10 * cases.rounding(name, kind)
    for n in range(16):
        recording = rm.record(cases.tokens(N, seed=100 + n))
        changes = written(rm, recording, n)
        options = {"interventions": changes, "max_new_tokens": 5, "stop_at_eos": False}
        fast, slow = (rm.generate(recording, use_cache=use, **options) for use in (True, False))
        assert (fast.cached, fast.note, slow.cached) == (True, "", False)
        assert torch.equal(fast.tokens, slow.tokens)
        assert float((fast.logits - slow.logits).abs().max() / slow.logits.abs().max()) < limit
        if n < 8 and kind == "hooked":  # control: every kind of change acts
            clean = rm.generate(recording, max_new_tokens=5, stop_at_eos=False)
            assert float((fast.logits - clean.logits).abs().max()) > 1e-4


def test_generated_positions_are_changed_as_attached_features_are():
    """An independent definition: every step anew, over all that is written, with edits of attached features."""
    rm = cases.pair("gpt2", "hooked", "jumprelu")
    tokens = cases.tokens(N, seed=2)
    recording = rm.record(tokens)
    changes = [Feature(0, 2, 3).set(1.5, pos=slice(None)), Feature(1, 0, 5).scale(-3.0, pos=slice(N, None))]
    found = rm.generate(tokens, interventions=changes, max_new_tokens=6, stop_at_eos=False)

    def put(acts: Tensor, hook: Any) -> Tensor:
        acts[..., 3] = 1.5
        return acts

    def times(acts: Tensor, hook: Any) -> Tensor:
        acts[:, N:, 5] *= -3.0
        return acts

    sites = [d.site for d in rm.dictionaries]
    text = tokens[None]
    with torch.no_grad(), rm.attached() as model:
        for step in range(6):
            hooks = [(f"{sites[0]}.features", put), (f"{sites[1]}.features", times)]
            logits = model.run_with_hooks(text, fwd_hooks=hooks)[0, -1]
            assert float((logits - found.logits[step]).abs().max() / logits.abs().max()) < 1e-11
            text = torch.cat([text, logits.argmax().reshape(1, 1)], 1)
    assert torch.equal(found.tokens, text[0])
    assert float(recording.acts(rm.dictionaries[0])[:, 3].min()) != 1.5


def test_open_changes_given_twice_count_once_and_from_the_earlier_start_on():
    rm = cases.pair("gpt2")
    tokens, feature = cases.tokens(N, seed=3), Feature(0, 0, 3)
    write = lambda *changes: rm.generate(tokens, interventions=changes, max_new_tokens=5, stop_at_eos=False).logits  # noqa: E731
    once = write(feature.add(1.0, pos=slice(N + 1, None)))
    twice = write(feature.add(1.0, pos=slice(N + 1, None)), feature.add(1.0, pos=slice(N + 3, None)))
    assert torch.equal(once, twice)
    assert not torch.equal(once, write(feature.add(1.0, pos=slice(N + 3, None))))
    assert not torch.equal(once, write(feature.add(2.0, pos=slice(N + 1, None))))


# ---------------------------------------------------------------------------------------------------- nothing is left


def trained(name: Any, kind: Any) -> tuple[ReplacementModel, list[Any]]:
    """Return a model in training mode that requires gradients, with hooks of the user."""
    model = builders.build(name, kind)
    saes = builders.transcoders(model, "skip", layers=(0, 2), hook_in="hook_mlp_in")
    model.train()
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(True)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: 0.9 * value, is_permanent=True)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: None, dir="bwd")
    return ReplacementModel(model, saes), saes


def calls(rm: ReplacementModel, **options: Any) -> dict[str, Any]:
    tokens = cases.tokens(N)
    changes = [Feature(0, 2, 3).set(1.0), ErrorNode(1, 3).scale(0.0), Direction(vector(), 1, 2).add(1.0)]
    return {
        "record": lambda: rm.record(tokens, **options),
        "none": lambda: rm.intervene(tokens, changes, **options),
        "attention": lambda: rm.intervene(tokens, changes, freeze="attention", layers=(0, 1), **options),
        "all": lambda: rm.intervene(tokens, changes, freeze="all", **options),
        "batch": lambda: rm.intervene_batch(tokens, [changes, []], read="features", **options),
        "generate": lambda: rm.generate(tokens, interventions=changes, max_new_tokens=3, **options),
    }


@pytest.mark.parametrize("call", ["record", "none", "attention", "all", "batch", "generate"])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "bridge")])
def test_a_call_leaves_nothing_behind_also_when_it_raises(name, kind, call, untouched, monkeypatch):
    rm, saes = trained(name, kind)
    with untouched(rm.model, *saes):
        assert calls(rm)[call]() is not None
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*args: Any, hook: Any = None, error: Any = error) -> None:
            raise error("inside")

        with untouched(rm.model, *saes), pytest.raises(error, match="inside"):
            calls(rm, fwd_hooks=[("blocks.1.hook_mlp_out", fail)])[call]()
        if call != "record":
            place, at = (decoding, "uncached") if call == "generate" else (engine.Changed, "_add")
            with untouched(rm.model, *saes), monkeypatch.context() as patch:
                patch.setattr(place, at, fail)
                with pytest.raises(error, match="inside"):
                    calls(rm)[call]()
    assert all(p.grad is None for p in torch.nn.Module.parameters(rm.model))
    with pytest.raises(AssertionError, match="was changed"), untouched(rm.model):
        rm.model.hook_dict["hook_embed"].add_hook(lambda value, hook: None)  # control


# --------------------------------------------------------------------------------------------------------- user hooks


def harsh(value: Tensor, hook: Any) -> Tensor:
    """A hook that edits in place."""
    value[..., :4] *= 0.5
    return value


@pytest.mark.parametrize("hook", ["hook_mlp_out", "hook_attn_out", "hook_resid_pre", "attn.hook_q", "hook_mlp_in"])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("llama", "bridge")])
def test_permanent_and_temporary_hooks_are_honoured_alike(name, kind, hook):
    """A hook in place on the user's side neither reaches the recording nor is lost; own values change no bit."""
    if (kind, hook) == ("bridge", "hook_mlp_in"):
        hook = "ln2.hook_in"
    tokens, at = cases.tokens(N, seed=9), f"blocks.1.{hook}"
    model = builders.build(name, kind)
    rm = ReplacementModel(model, builders.transcoders(model, "jumprelu", hook_in="hook_mlp_in"))
    if hook == "hook_mlp_in":
        model.set_use_hook_mlp_in(True)
    plain = rm.intervene(tokens, Feature(0, 2, 3).set(1.0)).logits
    recording = rm.record(tokens, fwd_hooks=[(at, harsh)])
    own = [f.scale(1.0) for f in recording.active()] + [ErrorNode(i, p).scale(1.0) for i in range(3) for p in range(N)]
    change = Feature(0, 2, 3).set(1.0)
    assert torch.equal(rm.intervene(recording, own).logits, recording.logits)
    temporary = rm.intervene(tokens, change, fwd_hooks=[(at, harsh)])
    again = rm.intervene(recording, change)
    frozen = rm.intervene(recording, change, freeze="all")
    model.hook_dict[at].add_hook(harsh, is_permanent=True)
    permanent = rm.intervene(tokens, change)
    assert torch.equal(temporary.logits, permanent.logits)
    assert torch.equal(temporary.logits, again.logits)
    assert torch.equal(frozen.logits, rm.intervene(tokens, change, freeze="all").logits)
    assert not torch.equal(temporary.logits, plain)  # control
    batch = rm.intervene_batch(tokens, [change, own], pos=None)
    scale = float(recording.logits.abs().max())
    assert float((batch.logits[0] - permanent.logits).abs().max()) < 1e-6 * scale
    assert float((batch.logits[1] - recording.logits).abs().max()) < 1e-6 * scale
    fast, slow = (rm.generate(tokens, interventions=change, max_new_tokens=4, use_cache=use) for use in (True, False))
    assert fast.cached
    assert torch.equal(fast.tokens, slow.tokens)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_attention_with_an_input_or_result_per_head_changes_nothing(flag):
    model = builders.build("gpt2")
    rm = ReplacementModel(model, builders.transcoders(model, "jumprelu"))
    tokens, direction = cases.tokens(N), Direction(vector(), 1, 2, "hook_resid_pre")
    changes = [Feature(0, 2, 3).set(1.0), ErrorNode(1, 3).scale(0.0), direction.add(1.0)]
    options: list[dict[str, Any]] = [{}, {"freeze": "attention"}, {"freeze": "all"}]
    before = [rm.intervene(tokens, changes, **o).logits for o in options]
    getattr(model, f"set_{flag}")(True)
    for o, wanted in zip(options, before, strict=True):
        assert torch.allclose(rm.intervene(tokens, changes, **o).logits, wanted, rtol=0, atol=1e-10)
        batch = rm.intervene_batch(tokens, [changes, []], pos=None, **o)
        assert torch.allclose(batch.logits[0], wanted, rtol=0, atol=1e-10)
    assert not torch.allclose(before[0], before[2], rtol=0, atol=1e-6)  # control

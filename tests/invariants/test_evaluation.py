"""What an evaluation reports is what a run written by hand with TransformerLens gives, at the hook that is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.evals import get_recons_loss
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from torch import Tensor

from circuit_lens.dictionaries.attach import attached
from circuit_lens.dictionaries.binding import Binding, bind
from circuit_lens.dictionaries.neurons import NeuronDictionary
from circuit_lens.errors import ConsistencyError, DictionaryError, HookError
from circuit_lens.evaluation.evaluate import evaluate
from circuit_lens.evaluation.figures import Evaluation, RunFigures
from circuit_lens.evaluation.rows import read_text
from circuit_lens.evaluation.runs import Stage
from circuit_lens.evaluation.twins import make_twins
from circuit_lens.protocols import Dictionary
from tests import builders
from tests.builders import KINDS, Architecture, Kind, TranscoderKind
from tests.invariants.cases import model, rounding

TOKENS = builders.random_tokens(9, batch=6)
EXACT = 1e-10
SITES = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
CLASSES: list[tuple[Architecture, Kind]] = [
    ("gpt2", "hooked"),
    ("gpt2", "bridge"),
    ("gemma2", "hooked"),
    ("pythia", "bridge"),
]


class Linear:
    """A dictionary in the least code: any hooks, ReLU features, one decoder per output."""

    kind, tangent = "linear", False

    def __init__(
        self, reads: str, writes: Sequence[str], layer: int, *, joint: str = "", seed: int = 0, width: int = 32,
        skip: float = 0.0, l0: int | None = None,
    ) -> None:  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        self.hook_in, self.hooks_out, self.layer, self.site = reads, tuple(writes), layer, writes[0]
        self.joint, self.d_in, self.d_out, self.d_sae = joint or self.site, width, width, 48
        self.out_layers = tuple(int(name.split(".")[1]) for name in writes)
        self.W_enc = torch.randn(width, 48, generator=rng, dtype=torch.float64)
        self.b_enc = torch.randn(48, generator=rng, dtype=torch.float64) - 2.0
        self.W_dec = 0.1 * torch.randn(len(writes), 48, width, generator=rng, dtype=torch.float64)
        self.b_dec = torch.randn(len(writes), width, generator=rng, dtype=torch.float64)
        self.W_skip = skip * torch.randn(width, width, generator=rng, dtype=torch.float64)
        self.has_skip = skip != 0.0

    def pre_acts(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc

    def activate(self, pre_acts: Tensor, x: Tensor) -> Tensor:
        return pre_acts.relu()

    def decode(self, acts: Tensor) -> Tensor:
        return torch.stack([acts @ W for W in self.W_dec], -2) + self.b_dec

    def skip(self, x: Tensor) -> Tensor:
        return x @ self.W_skip

    def fingerprint(self) -> str:
        return "linear"

    encoder_rows = encoder_bias = decoder_rows = decoder_bias = skip_matrix = thresholds = lambda self, *args: None


def pair(
    name: Architecture, kind: Kind = "hooked", transcoder: TranscoderKind = "transcoder", **options: Any
) -> Binding:
    shared = model(name, kind)
    return bind(shared, builders.transcoders(shared, transcoder, **options))


def sae(hook: str, width: int = 32, seed: int = 0) -> SAE[Any]:
    found = StandardSAE(
        StandardSAEConfig(
            d_in=width, d_sae=40, dtype="float64", reshape_activations="hook_z" if "hook_z" in hook else "none",
            metadata=SAEMetadata(hook_name=hook, sae_lens_version="6.54.12"),
        )
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return found


def quick(binding: Binding, tokens: Any = TOKENS, **options: Any) -> Evaluation:
    return evaluate(binding, tokens, **({"baselines": False, "progress": False} | options))


def values(e: Evaluation) -> dict[str, float]:
    """Return every figure by name."""
    return {
        f"{row['output']}/{row['dictionary']}/{key}": float(value)
        for row in e.rows()
        for key, value in row.items()
        if key not in ("output", "dictionary", "layer")
    }


def close(a: dict[str, float], b: dict[str, float], limit: float) -> bool:
    same = a.keys() == b.keys()
    return same and all(
        math.isclose(a[k], b[k], rel_tol=limit, abs_tol=limit) or (math.isnan(a[k]) and math.isnan(b[k])) for k in a
    )


# ------------------------------------------------------------------------------------------------ the definition


class ByHand:
    """Runs of the definition, with TransformerLens' hooks and SAELens-like functions only; one row at a time."""

    def __init__(self, binding: Binding, tokens: Tensor, *, keep_first: bool = True) -> None:
        self.model, self.dictionaries, self.tokens = binding.model, binding.dictionaries, tokens
        self.start = 1 if keep_first else 0
        self.hooks = list(dict.fromkeys(hook for d in self.dictionaries for hook in d.hooks_out))
        _, self.cache = self.model.run_with_cache(tokens)
        self.clean = self.model(tokens).log_softmax(-1)

    @staticmethod
    def outputs(d: Dictionary, x: Tensor) -> Tensor:
        out = d.decode(d.activate(d.pre_acts(x), x)).clone()
        if d.has_skip:
            out[..., 0, :] += d.skip(x)
        return out

    def run(self, hooks: Sequence[str], put: Callable[[str, dict[str, Tensor]], Any]) -> Tensor:
        """Return log probabilities with ``put(hook, what dictionaries read)`` at some hooks, but for the first."""
        x: dict[str, Tensor] = {}

        def remember(value: Tensor, hook: Any, site: str) -> None:
            x[site] = value.flatten(2)

        def write(value: Tensor, hook: Any, name: str) -> Tensor:
            new = value.clone().flatten(2)
            new[:, self.start :] = torch.as_tensor(put(name, x)).expand_as(new)[:, self.start :]
            return new.view(value.shape)

        reads = [(d.hook_in, lambda v, hook, s=d.site: remember(v, hook, s)) for d in self.dictionaries]
        writes = [(name, lambda v, hook, n=name: write(v, hook, n)) for name in hooks]
        return self.model.run_with_hooks(self.tokens, fwd_hooks=reads + writes).log_softmax(-1)

    def joint(self, hook: str, x: dict[str, Tensor]) -> Tensor:
        here = [d for d in self.dictionaries if hook in d.hooks_out]
        return sum((self.outputs(d, x[d.site])[..., d.hooks_out.index(hook), :] for d in here), torch.zeros(()))

    def mean(self, hook: str, x: dict[str, Tensor]) -> Tensor:
        return self.cache[hook].flatten(2)[:, 1:].mean((0, 1))

    def loss(self, log_probs: Tensor) -> float:
        targets = self.tokens[:, 2:, None]
        return -float(log_probs[:, 1:-1].gather(-1, targets).mean())

    def kl(self, log_probs: Tensor) -> float:
        return float((self.clean.exp() * (self.clean - log_probs)).sum(-1)[:, 1:-1].mean())

    def figures(self, hooks: Sequence[str]) -> dict[str, float]:
        replaced = self.run(hooks, self.joint)
        zero, mean = self.loss(self.run(hooks, lambda *_: 0.0)), self.loss(self.run(hooks, self.mean))
        loss, clean = self.loss(replaced), self.loss(self.clean)
        return {
            "loss": loss, "added": loss - clean, "kl": self.kl(replaced),
            "recovered_zero": (zero - loss) / (zero - clean), "recovered_mean": (mean - loss) / (mean - clean),
        }  # fmt: skip

    def reconstruction(self, hook: str) -> dict[str, float]:
        x = {d.site: self.cache[d.hook_in].flatten(2)[:, 1:] for d in self.dictionaries}
        y, y_hat = self.cache[hook].flatten(2)[:, 1:], self.joint(hook, x)
        first = next(d for d in self.dictionaries if d.site == hook)
        active = (first.activate(first.pre_acts(x[hook]), x[hook]) != 0).flatten(0, 1)
        error = (y - y_hat).square().sum()
        return {
            "l0": float(active.double().sum(1).mean()), "dead": float((~active.any(0)).double().mean()),
            "explained_variance": 1 - float(error / (y - y.mean((0, 1))).square().sum()),
            "mse": float((y - y_hat).square().sum(-1).mean()),
            "cosine": float(torch.cosine_similarity(y, y_hat, dim=-1).mean()),
        }  # fmt: skip


def check_by_hand(binding: Binding, limit: float = EXACT, **options: Any) -> Evaluation:
    keep_first = options.get("keep_special", True)
    with torch.no_grad():
        hand, e = ByHand(binding, TOKENS, keep_first=keep_first), quick(binding, **options)
        assert e.loss.value == pytest.approx(hand.loss(hand.clean), abs=limit)
        for output in e.outputs:
            wanted = hand.figures([output.hook])
            assert output.alone is not None
            assert {k: getattr(output.alone, k).value for k in wanted} == pytest.approx(wanted, rel=limit, abs=limit)
            made = hand.reconstruction(output.hook)
            assert {k: getattr(output.own, k) for k in made} == pytest.approx(made, rel=limit, abs=limit)
        wanted = hand.figures(hand.hooks)
        assert {k: getattr(e.replaced, k).value for k in wanted} == pytest.approx(wanted, rel=limit, abs=limit)
        assert abs(e.replaced.added.value) > 1e-3
    return e


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_figures_are_those_of_runs_written_by_hand(name: Architecture, kind: Kind) -> None:
    e = check_by_hand(pair(name, kind, "jumprelu_skip"), max(EXACT, rounding(name, kind)))
    alone = e[SITES[1]].alone
    assert alone is not None
    assert abs(alone.added.value - e.replaced.added.value) > 1e-3
    assert (e.n_rows, e.n_tokens, e.n_predictions) == (6, 48, 42)


def test_the_first_position_is_replaced_too_if_asked() -> None:
    binding = pair("gpt2", "hooked", "skip")
    kept, replaced = check_by_hand(binding), check_by_hand(binding, keep_special=False)
    assert abs(kept.replaced.added.value - replaced.replaced.added.value) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_a_cross_layer_transcoder_is_judged_by_what_the_set_makes_of_it(kind: Kind) -> None:
    reads = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(3)]
    clt = [Linear(reads[i], SITES[i:], i, joint="clt", seed=i, skip=0.2 * (i == 1)) for i in range(3)]
    binding = Binding(model("gpt2", kind), tuple(clt))
    e = check_by_hand(binding, 1e-9)
    own = quick(Binding(binding.model, (clt[2],)))
    assert abs(e[SITES[2]].explained_variance - own[SITES[2]].explained_variance) > 1e-2
    assert e[SITES[2]].l0 == own[SITES[2]].l0  # a dictionary's features are its own


def test_later_layers_of_an_incomplete_set_have_no_features_of_their_own() -> None:
    e = quick(Binding(model("gpt2"), (Linear("blocks.0.ln2.hook_normalized", SITES, 0),)))
    assert [output.hook for output in e.outputs] == SITES
    assert math.isfinite(e.outputs[0].l0)
    assert math.isnan(e.outputs[2].l0)
    assert math.isfinite(e.outputs[2].explained_variance)
    assert e.outputs[2].n_features == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "attn.hook_z", "hook_mlp_out"])
def test_autoencoders_read_and_write_one_hook(hook: str, kind: Kind) -> None:
    names = [f"blocks.{layer}.{hook}" for layer in (0, 2)]
    binding = Binding(model("gpt2", kind), tuple(Linear(name, [name], 2 * i, seed=i) for i, name in enumerate(names)))
    check_by_hand(binding, 1e-9)


def test_autoencoders_of_saelens_beside_a_transcoder() -> None:
    shared = model("gpt2")
    given = [sae("blocks.0.hook_resid_post"), sae("blocks.1.attn.hook_z", seed=1)]
    binding = bind(shared, [*given, *builders.transcoders(shared, layers=[2])])
    e = check_by_hand(binding, 1e-9)
    assert [output.hook for output in e.outputs] == ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", SITES[2]]


def test_all_replaced_is_what_attached_dictionaries_compute() -> None:
    binding = pair("gpt2", "bridge", "jumprelu_skip")
    e = quick(binding, keep_special=False, alone=False)
    with torch.no_grad(), attached(binding, error=False) as shared:
        log_probs = shared(TOKENS).log_softmax(-1)
    wanted = -float(log_probs[:, 1:-1].gather(-1, TOKENS[:, 2:, None]).mean())
    assert e.replaced.loss.value == pytest.approx(wanted, abs=EXACT)
    assert abs(quick(binding, alone=False).replaced.loss.value - wanted) > 1e-4


def test_saelens_puts_a_transcoder_back_where_it_reads() -> None:
    """Negative control: an evaluator for SAEs gives another loss, that of the output at the input hook."""
    shared = model("gpt2")
    transcoder = builders.transcoders(shared, layers=[1])[0]
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    ours = quick(bind(shared, [transcoder]), mask=everywhere, keep_special=False)

    class Identity:
        def scale(self, x: Tensor) -> Tensor:
            return x

        unscale = scale

    with torch.no_grad():
        theirs = get_recons_loss(transcoder, shared, Identity(), TOKENS, compute_kl=False, compute_ce_loss=True)
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            found["x"] = value

        def put(value: Tensor, hook: Any) -> Tensor:
            return transcoder.decode(transcoder.encode(found["x"]))

        name = transcoder.cfg.metadata.hook_name
        runs = {
            where: float(shared.run_with_hooks(TOKENS, fwd_hooks=[(name, keep), (where, put)], return_type="loss"))
            for where in (name, SITES[1])
        }
    assert float(theirs["ce_loss_without_sae"].mean()) == pytest.approx(ours.loss.value, abs=EXACT)
    assert float(theirs["ce_loss_with_sae"].mean()) == pytest.approx(runs[name], abs=EXACT)
    assert ours.replaced.loss.value == pytest.approx(runs[SITES[1]], abs=EXACT)
    assert abs(runs[SITES[1]] - runs[name]) > 0.01


# --------------------------------------------------------------------------------------------------- known figures


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "hooked"), ("gemma2", "hooked"), ("llama", "bridge")])
def test_an_exact_dictionary_loses_nothing(name: Architecture, kind: Kind) -> None:
    shared = model(name, kind)
    e = quick(bind(shared, [NeuronDictionary(shared, layer) for layer in range(3)]))
    limit = max(1e-9, 10 * rounding(name, kind))
    for output in e.outputs:
        assert output.explained_variance == pytest.approx(1.0, abs=limit)
        assert output.cosine == pytest.approx(1.0, abs=limit)
        assert output.mse == pytest.approx(0.0, abs=limit)
    for run in (e.replaced, *(output.alone for output in e.outputs)):
        assert run is not None
        assert run.loss.value == pytest.approx(e.loss.value, abs=limit)
        assert (run.added.value, run.kl.value) == pytest.approx((0.0, 0.0), abs=limit)
        assert run.recovered_zero.value == pytest.approx(1.0, abs=1e3 * limit)
        assert run.recovered_mean.value == pytest.approx(1.0, abs=1e3 * limit)
    assert e.zero.kl.value > 0.01
    assert e.mean.kl.value > 0.01


def constant(binding: Binding, outputs: dict[str, Tensor]) -> Binding:
    """Return the binding with transcoders that give constants."""
    modules = builders.transcoders(binding.model)
    with torch.no_grad():
        for module in modules:
            module.W_dec.zero_()
            module.b_dec.copy_(outputs[module.cfg.metadata.hook_name_out])
    return bind(binding.model, modules)


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_that_give_a_constant_are_ablations(kind: Kind) -> None:
    binding = pair("gpt2", kind)
    with torch.no_grad():
        _, cache = binding.model.run_with_cache(TOKENS)
    zero = quick(constant(binding, {hook: torch.zeros(32, dtype=torch.float64) for hook in SITES}))
    mean = quick(constant(binding, {hook: cache[hook][:, 1:].mean((0, 1)) for hook in SITES}))
    for e, ablation, other in ((zero, "zero", "mean"), (mean, "mean", "zero")):
        for output in (*e.outputs, None):
            run = e.replaced if output is None else output.alone
            same: RunFigures | None = getattr(e if output is None else output, ablation)
            assert run is not None
            assert same is not None
            assert run.loss.value == pytest.approx(same.loss.value, abs=EXACT)
            assert getattr(run, f"recovered_{ablation}").value == pytest.approx(0.0, abs=EXACT)
            assert abs(getattr(run, f"recovered_{other}").value) > 1e-3
    assert all(output.explained_variance == pytest.approx(0.0, abs=EXACT) for output in mean.outputs)
    assert all(output.explained_variance < -1e-3 for output in zero.outputs)


# ------------------------------------------------------------------------------------------------------ how it runs


RAGGED = [builders.random_tokens(n, seed=n)[0] for n in (5, 9, 5, 2, 9)]


@given(order=st.permutations(range(5)), size=st.integers(1, 5))
@settings(max_examples=3)
def test_order_and_batch_size_do_not_matter(order: list[int], size: int) -> None:
    binding = pair("gpt2", "hooked", "skip", layers=[1])
    wanted = values(evaluate(binding, RAGGED, progress=False))
    found = values(evaluate(binding, [RAGGED[i] for i in order], batch_size=size, progress=False))
    assert close(found, wanted, 1e-8)


def test_a_row_less_is_another_evaluation() -> None:
    binding = pair("gpt2", "hooked", "skip", layers=[1])
    assert not close(values(quick(binding, RAGGED)), values(quick(binding, RAGGED[1:])), 1e-6)


def test_text_ids_lists_and_tensors_are_the_same_rows() -> None:
    binding = pair("gpt2", layers=[1])
    prompts = ["the capital of France is Paris .", "the capital of Germany is Berlin ."]
    ids = torch.stack([binding.model.to_tokens(prompt)[0] for prompt in prompts])
    wanted = values(quick(binding, ids))
    for given_as in (prompts, list(ids), ids.tolist(), tuple(ids)):
        assert close(values(quick(binding, given_as)), wanted, EXACT)
    assert values(quick(binding, prompts[0])) == values(quick(binding, ids[0]))
    assert not close(values(quick(binding, prompts[0])), wanted, EXACT)


def test_padding_and_special_tokens_count_only_if_the_mask_says_so() -> None:
    binding = pair("gpt2")
    plain = quick(binding)
    padded = torch.cat([TOKENS, torch.full((6, 3), 2)], 1)  # <pad>
    assert close(values(quick(binding, padded)), values(plain), 1e-9)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, 1:9] = True
    assert close(values(quick(binding, padded, mask=mask)), values(plain), 1e-9)
    everything = quick(binding, padded, mask=torch.ones_like(mask))
    assert (everything.n_tokens, everything.n_predictions) == (72, 66)
    assert not close(values(everything), values(plain), 1e-6)


def test_figures_do_not_depend_on_what_else_is_asked_for() -> None:
    binding = pair("gpt2")
    full = evaluate(binding, TOKENS, progress=False)
    for lean in (quick(binding), quick(binding, alone=False), evaluate(binding, TOKENS, alone=False, progress=False)):
        assert lean.replaced == full.replaced
        assert [dataclasses.replace(o.own, alone=None) for o in lean.outputs] == [
            dataclasses.replace(o.own, alone=None) for o in full.outputs
        ]
    assert quick(binding, alone=False).outputs[0].alone is None
    one = quick(bind(binding.model, [binding.dictionaries[1]]))
    assert one.outputs[0].alone == one.replaced


def test_hooks_of_the_user_are_part_of_the_model() -> None:
    shared = builders.build("gpt2")
    binding = bind(shared, builders.transcoders(shared))
    plain = quick(binding)
    shared.add_hook("blocks.0.hook_attn_out", lambda value, hook: 0.0 * value, is_permanent=True)
    check = quick(binding)
    assert check.settings["hooks"] == ["blocks.0.hook_attn_out"]
    assert abs(check.loss.value - plain.loss.value) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_comes_back_untouched_also_from_an_interrupt(kind: Kind, untouched: Any) -> None:
    shared = builders.build("gpt2", kind)
    binding = bind(shared, builders.transcoders(shared, hook_in="hook_mlp_in", layers=[0, 1]))
    countdown = [0]

    def stop(value: Tensor, hook: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt

    shared.add_hook("blocks.2.hook_resid_post", stop, is_permanent=True)
    for runs in (1, 4, 7):  # the first look, a replaced run, an ablated one
        countdown[0] = runs
        with untouched(shared), pytest.raises(KeyboardInterrupt):
            quick(binding, batch_size=3)
    with untouched(shared):
        evaluate(binding, TOKENS, progress=False)


# ------------------------------------------------------------------------------------------------------------ twins


@pytest.mark.parametrize("transcoder", ["transcoder", "jumprelu_skip"])
def test_twins_are_as_sparse_and_never_worse_than_the_mean(transcoder: TranscoderKind) -> None:
    tokens = builders.random_tokens(20, batch=30)
    binding = pair("gpt2", "hooked", transcoder, layers=[0, 1])
    e = evaluate(binding, tokens, progress=False)
    for output in e.outputs:
        for twin in output.baselines.values():
            assert twin.l0 == pytest.approx(output.l0, abs=2 / e.n_tokens, rel=1e-3)
            assert twin.explained_variance > -1e-9 or output.kind.endswith("skip_transcoder")
            assert twin.explained_variance < output.explained_variance
    assert {"random", "untrained"} == e.baselines.keys()
    assert evaluate(binding, tokens, progress=False) == e
    other = evaluate(binding, tokens, seed=1, progress=False)
    assert other.replaced == e.replaced
    assert other.baselines != e.baselines


def test_a_twin_is_what_its_page_says() -> None:
    binding = pair("gpt2", "hooked", "skip", layers=[1])
    (d,) = binding.dictionaries
    e = evaluate(binding, TOKENS, progress=False, seed=3)
    with torch.no_grad():
        _, cache = binding.model.run_with_cache(TOKENS)
        x, y = cache[d.hook_in][:, 1:].flatten(0, 1), cache[d.site][:, 1:].flatten(0, 1)
        (encoder,), twins = make_twins([d], x[0, 0], seed=3)
        pre = (x - x.mean(0)) @ encoder.W
        std = (x @ encoder.W).std(0, correction=0)
        order = (pre / std).flatten().sort(descending=True).values
        n_active = round(e[d.site].l0 * len(x))
        acts = pre * (pre / std >= order[n_active - 1])
        assert torch.allclose(encoder.W.norm(dim=0), torch.ones_like(std))
        for kind, (twin,) in twins.items():
            u = twin.rows[0]
            assert torch.allclose(u.norm(dim=1), torch.ones(d.d_sae, dtype=u.dtype))
            assert torch.equal(u, encoder.W.T) == (kind == "untrained")
            r, left = acts @ u, y - d.skip(x)
            centred = r - r.mean(0)
            scale = (centred * left).sum() / centred.square().sum()
            error = (left - left.mean(0) - scale * centred).square().sum()
            found = e[d.site].baselines[kind].explained_variance
            assert found == pytest.approx(1 - float(error / (y - y.mean(0)).square().sum()), abs=1e-9)
            worse = (left - left.mean(0) - 1.5 * scale * centred).square().sum()
            assert found > 1 - float(worse / (y - y.mean(0)).square().sum())


def test_twins_of_a_set_are_fitted_together() -> None:
    reads = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(3)]
    clt = [Linear(reads[i], SITES[i:], i, joint="clt", seed=i) for i in range(3)]
    e = evaluate(Binding(model("gpt2"), tuple(clt)), TOKENS, progress=False)
    assert all(twin.explained_variance > -1e-9 for o in e.outputs for twin in o.baselines.values())
    assert all(o.own.explained_variance < -1e-3 for o in e.outputs)


def test_a_dictionary_that_is_never_active_has_twins_that_are_not_either() -> None:
    shared = model("gpt2")
    modules = builders.transcoders(shared, layers=[0])
    with torch.no_grad():
        modules[0].b_enc.fill_(-1e6)
    e = evaluate(bind(shared, modules), TOKENS, progress=False)
    assert e.outputs[0].l0 == 0.0
    assert e.outputs[0].dead == 1.0
    assert all(twin.l0 == 0.0 for twin in e.outputs[0].baselines.values())
    assert all(twin.explained_variance == pytest.approx(0.0, abs=1e-12) for twin in e.outputs[0].baselines.values())


# ----------------------------------------------------------------------------------------------------------- errors


def test_nan_in_weights_is_named() -> None:
    shared = builders.build("gpt2")
    modules = builders.transcoders(shared)
    bound, first = bind(shared, modules), bind(shared, modules[:1])
    with torch.no_grad():
        modules[1].W_dec[3] = float("nan")
        modules[1].b_enc[3] = 1e3
    with pytest.raises(ConsistencyError, match=r"blocks\.1\.hook_mlp_out.*NaN"):
        quick(bound)
    with torch.no_grad():
        shared.W_U.fill_(float("nan"))
    with pytest.raises(ConsistencyError, match=r"the model's logits.*NaN"):
        quick(first)


def test_what_cannot_be_evaluated_is_refused() -> None:
    binding = pair("gpt2")
    with pytest.raises(DictionaryError, match="no dictionary to evaluate"):
        quick(Binding(binding.model, ()))
    with pytest.raises(ValueError, match="batch_size=0"):
        quick(binding, batch_size=0)
    with attached(binding), pytest.raises(HookError, match="attached to this model already"):
        quick(binding)


def test_a_stage_refuses_what_does_not_fit() -> None:
    wrong = Linear("blocks.0.hook_mlp_out", ["blocks.0.hook_mlp_out"], 0)
    wrong.W_dec, wrong.b_dec = wrong.W_dec[..., :16], wrong.b_dec[..., :16]
    stage = Stage(Binding(model("gpt2"), (wrong,)))
    text = read_text(model("gpt2"), TOKENS, mask=None, keep_special=True)
    (batch,) = text.take(text.batches(6, 1))
    with torch.no_grad(), pytest.raises(HookError, match=r"gives \(6, 9, 16\) for a hook that carries \(6, 9, 32\)"):
        stage.replaced(batch.tokens, [wrong], ["blocks.0.hook_mlp_out"], batch.kept)

"""Attached dictionaries are the identity until edited, are edited like any hook point, and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient
from transformer_lens.utilities.components_utils import get_act_name

from circuit_lens import ReplacementModel
from circuit_lens.dictionaries.attach import attached
from circuit_lens.errors import CacheError, HookError
from circuit_lens.hooks import present_hooks
from tests import builders
from tests.builders import ARCHITECTURES, KINDS, Architecture, HookIn, Kind, TranscoderKind

CLASSES = [(name, kind) for name in ARCHITECTURES for kind in KINDS]
READS = [
    (name, kind, hook)
    for name, kind in CLASSES
    for hook in builders.HOOKS_IN
    if not (name == "pythia" and hook == "hook_resid_mid")
]
SITE, INNER, LAST = "blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"
FEATURES = f"{SITE}.features"
TOKENS = builders.random_tokens(7, batch=2)
EXACT = 1e-11
Edit = Callable[[int, Tensor], Tensor]


def model_of(name: Architecture, kind: Kind = "hooked") -> Any:
    return _model(name, kind)


@functools.cache
def _model(name: Architecture, kind: Kind) -> Any:
    """Return a model shared by the tests, which therefore must leave it as it is."""
    model = builders.build(name, kind)
    model.run_with_cache(TOKENS)  # a bridge wires its hooks at its first run
    model.reset_hooks()  # and a HookedTransformer remembers that it cached
    return model


@functools.cache
def modules_of(
    name: Architecture,
    kind: Kind = "hooked",
    transcoder: TranscoderKind = "jumprelu_skip",
    hook: HookIn = "mlp.hook_in",
) -> list[Any]:
    return builders.transcoders(model_of(name, kind), transcoder, hook_in=hook)


def pair(name: Architecture, kind: Kind = "hooked", *args: Any) -> ReplacementModel:
    return ReplacementModel(model_of(name, kind), modules_of(name, kind, *args))


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Contract 7; these tests' checks of annotations draw from Python's generator, which is not the package's doing."""
    with builders.assert_untouched(model):
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)
            if "is_caching" in vars(model):  # HookedTransformer's own trace of run_with_cache
                model.is_caching = False


def by_hand(
    model: Any,
    modules: list[Any],
    tokens: Tensor = TOKENS,
    *,
    edit: Edit = lambda layer, f: f,
    error: bool = True,
    embed: Tensor | None = None,
) -> Tensor:
    """Return logits of the definition, written with SAELens' own functions and nothing of the package."""
    x: dict[int, Tensor] = {}

    def splice(real: Tensor, hook: Any, layer: int, module: Any) -> Tensor:
        skip = x[layer] @ module.W_skip.T if hasattr(module, "W_skip") else 0.0
        own = module.encode(x[layer])
        out = module.decode(edit(layer, own)) + skip
        return out + real - module.decode(own) - skip if error else out

    flag = bool(model.cfg.use_hook_mlp_in)
    with contextlib.ExitStack() as stack:
        hooks = [] if embed is None else [("blocks.0.hook_resid_pre", lambda value, hook: value + embed)]
        for layer, module in enumerate(modules):
            name = module.cfg.metadata.hook_name
            if name.endswith("hook_mlp_in"):
                model.set_use_hook_mlp_in(True)
                stack.callback(model.set_use_hook_mlp_in, flag)
            if name in model.hook_dict:
                hooks.append((name, lambda value, hook, layer=layer: x.__setitem__(layer, value)))
            else:
                keep = lambda norm, args, value, layer=layer: x.__setitem__(layer, value)  # noqa: E731
                stack.callback(model.blocks[layer].ln2.register_forward_hook(keep).remove)
            name = f"blocks.{layer}.hook_mlp_out"
            hooks.append((name, functools.partial(splice, layer=layer, module=module)))
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        return model(tokens)


def off(value: Tensor, hook: Any) -> Tensor:
    """Silence the strongest features at the second last position, in place, as notebooks do."""
    value[:, -2] = torch.where(value[:, -2] >= value[:, -2].amax(), 0.0, value[:, -2])
    return value


def off_at(layer: int) -> Edit:
    return lambda at, f: off(f.clone(), None) if at == layer else f


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


# ------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize(("name", "kind", "hook"), READS)
def test_nothing_changes_until_somebody_edits(name: Architecture, kind: Kind, hook: HookIn) -> None:
    rm = pair(name, kind, "jumprelu_skip", hook)
    with torch.no_grad():
        real = rm.model(TOKENS)
        with untouched(rm.model), rm.attached(error=True):
            assert gap(rm.model(TOKENS), real) < EXACT
        with untouched(rm.model), rm.attached(error=False):
            assert gap(rm.model(TOKENS), real) > 1e-3


@pytest.mark.parametrize("transcoder", ["jumprelu", "skip"])
@pytest.mark.parametrize(("name", "kind", "hook"), READS)
def test_edits_and_replacement_are_those_of_the_definition(
    name: Architecture, kind: Kind, hook: HookIn, transcoder: TranscoderKind
) -> None:
    rm = pair(name, kind, transcoder, hook)
    model, modules = rm.model, modules_of(name, kind, transcoder, hook)
    with torch.no_grad():
        edited, replaced = by_hand(model, modules, edit=off_at(1)), by_hand(model, modules, error=False)
        with untouched(model), rm.attached():
            assert gap(model.run_with_hooks(TOKENS, fwd_hooks=[(FEATURES, off)]), edited) < EXACT
            assert gap(model(TOKENS), edited) > 1e-3
        with untouched(model), rm.attached(error=False):
            assert gap(model(TOKENS), replaced) < EXACT


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_points_are_in_hook_dict_and_caches_with_the_values_of_the_definition(name: Architecture, kind: Kind) -> None:
    rm, module = pair(name, kind), modules_of(name, kind)[1]
    before = set(rm.model.hook_dict)
    with torch.no_grad():
        _, plain = rm.model.run_with_cache(TOKENS)
        with rm.attached():
            names = {f"{SITE}.{kind}" for kind in ("pre_acts", "features", "error")}
            assert names <= set(rm.model.hook_dict) - before
            assert all(rm.model.hook_dict[n].name == n for n in names)
            _, cache = rm.model.run_with_cache(TOKENS)
        x = rm.model.blocks[1].ln2(plain["blocks.1.hook_resid_mid" if name != "pythia" else "blocks.1.hook_resid_pre"])
        pre = x @ module.W_enc + module.b_enc
        own = module.decode(module.encode(x)) + x @ module.W_skip.T
    assert set(rm.model.hook_dict) == before
    assert cache[FEATURES].shape == (2, 7, module.cfg.d_sae)
    assert gap(cache[f"{SITE}.pre_acts"], pre) < EXACT
    assert gap(cache[FEATURES], module.encode(x)) < EXACT
    assert gap(cache[f"{SITE}.error"], plain[SITE] - own) < EXACT
    assert gap(cache[SITE], plain[SITE]) < EXACT


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_every_way_to_hook_reaches_the_points(name: Architecture, kind: Kind) -> None:
    rm, model = pair(name, kind), model_of(name, kind)
    with torch.no_grad():
        wanted = by_hand(model, modules_of(name, kind), edit=off_at(1))
        with untouched(model), rm.attached():
            assert get_act_name("mlp_out.features", 1) == FEATURES
            assert gap(model.run_with_hooks(TOKENS, fwd_hooks=[(lambda n: n == FEATURES, off)]), wanted) < EXACT
            with model.hooks(fwd_hooks=[(FEATURES, off)]):
                assert gap(model(TOKENS), wanted) < EXACT
            model.add_hook(FEATURES, off)
            assert gap(model(TOKENS), wanted) < EXACT
            model.reset_hooks()
            assert gap(model(TOKENS), wanted) > 1e-3
            model.add_hook(FEATURES, off, is_permanent=True)
            model.reset_hooks()
            assert gap(model(TOKENS), wanted) < EXACT
            model.reset_hooks(including_permanent=True)
            assert gap(model(TOKENS), wanted) > 1e-3
            assert gap(model.run_with_hooks(TOKENS, fwd_hooks=[(FEATURES, off)]), wanted) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_an_error_is_added_and_an_edit_of_pre_acts_flows_into_features(kind: Kind) -> None:
    rm, model, module = pair("gpt2", kind), model_of("gpt2", kind), modules_of("gpt2", kind)[1]
    push = torch.linspace(-1, 1, 32, dtype=torch.float64)
    with torch.no_grad(), rm.attached():
        real, wanted = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, lambda v, hook: v + push)])
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(f"{SITE}.error", lambda v, hook: v + push)])
        assert gap(edited, wanted) < EXACT < gap(wanted, real)
        raised: dict[str, Tensor] = {}
        hooks = [
            (f"{SITE}.pre_acts", lambda v, hook: v + 2.0),
            (FEATURES, lambda v, hook: raised.__setitem__("features", v)),
            (f"{SITE}.error", lambda v, hook: raised.__setitem__("error", v)),
        ]
        _, cache = model.run_with_cache(TOKENS)
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    pre = cache[f"{SITE}.pre_acts"] + 2.0
    assert gap(raised["features"], pre.relu() * (pre > module.threshold)) < EXACT
    assert gap(raised["features"], cache[FEATURES]) > 1.0
    assert gap(raised["error"], cache[f"{SITE}.error"]) < EXACT  # an error is what the unedited dictionary misses


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_generic_activation_patch_over_features_equals_a_hook_written_by_hand(name: Architecture, kind: Kind) -> None:
    rm, model, modules = pair(name, kind), model_of(name, kind), modules_of(name, kind)
    clean, corrupted = TOKENS[:1], TOKENS[1:]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 9]

    with torch.no_grad():
        with untouched(model), rm.attached():
            _, cache = model.run_with_cache(clean)
            setter = patching.layer_pos_patch_setter
            axes = ("layer", "pos")
            got = patching.generic_activation_patch(model, corrupted, cache, metric, setter, "mlp_out.features", axes)
        for layer, pos in ((0, 6), (1, 2), (2, 6)):

            def edit(at: int, f: Tensor, layer: int = layer, pos: int = pos) -> Tensor:
                f = f.clone()
                if at == layer:
                    f[:, pos] = cache[f"blocks.{layer}.hook_mlp_out.features"][:, pos]
                return f

            wanted = metric(by_hand(model, modules, corrupted, edit=edit))
            assert abs(float(got[layer, pos] - wanted)) < 1e-5  # TransformerLens keeps results in float32
        assert gap(got, metric(model(corrupted))) > 1e-3


# ----------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("hook", ["ln2.hook_normalized", "mlp.hook_in", "hook_mlp_in"])
@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_gradients_are_those_of_the_composition_written_by_hand(name: Architecture, kind: Kind, hook: HookIn) -> None:
    rm, model = pair(name, kind, "jumprelu_skip", hook), model_of(name, kind)
    modules = modules_of(name, kind, "jumprelu_skip", hook)
    embed = torch.zeros(2, 7, 32, dtype=torch.float64, requires_grad=True)

    def gradient(logits: Tensor) -> Tensor:
        return torch.autograd.grad(logits[:, -1, 5].sum(), embed)[0]

    def add(value: Tensor, hook: Any) -> Tensor:
        return value + embed

    half: Edit = lambda layer, f: 0.5 * f if layer == 1 else f  # noqa: E731
    for error in (True, False):
        wanted = gradient(by_hand(model, modules, edit=half, error=error, embed=embed))
        hooks = [("blocks.0.hook_resid_pre", add), (FEATURES, lambda value, hook: half(1, value))]
        with untouched(model), rm.attached(error=error):
            got = gradient(model.run_with_hooks(TOKENS, fwd_hooks=hooks))
            unedited = gradient(model.run_with_hooks(TOKENS, fwd_hooks=hooks[:1]))
        limit = 2e-6 if kind == "bridge" and name not in ("gpt2", "pythia") else 1e-10  # their norms are float32
        assert gap(got, wanted) < limit * wanted.abs().max()
        assert gap(unedited, wanted) > 1e-3 * wanted.abs().max()
        plain = gradient(model.run_with_hooks(TOKENS, fwd_hooks=hooks[:1]))
        assert (gap(unedited, plain) < limit * plain.abs().max()) == error


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_backward_caches_hold_the_gradients_of_the_points(name: Architecture, kind: Kind, error: bool) -> None:
    rm = pair(name, kind)
    model = rm.model
    names = [FEATURES, f"{SITE}.pre_acts", f"{SITE}.error", SITE]
    with rm.attached(error=error):
        cache = cache_activation_and_gradient(model, TOKENS, lambda logits: logits[:, -1, 5].sum(), names)
        pushed = torch.zeros_like(cache.activations[FEATURES]).requires_grad_()
        push = lambda value, hook: value + pushed  # noqa: E731
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(FEATURES, push)])
    wanted = torch.autograd.grad(logits[:, -1, 5].sum(), pushed)[0]
    assert wanted.abs().max() > 1e-3
    assert gap(cache.gradients[FEATURES], wanted) < 1e-6
    assert all(cache.gradients[n] is not None for n in names)
    active = cache.activations[FEATURES] > 0
    assert gap(cache.gradients[f"{SITE}.pre_acts"], wanted * active) < 1e-6
    decoder = modules_of(name, kind)[1].W_dec
    assert gap(cache.gradients[f"{SITE}.error"] @ decoder.T, wanted) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_run_with_cache_incl_bwd_gives_feature_gradients(kind: Kind) -> None:
    model = builders.build("gpt2", kind).requires_grad_(True)
    rm = ReplacementModel(model, builders.transcoders(model, "skip"))
    with rm.attached():
        loss, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
        gradient = cache[f"{FEATURES}_grad"]
        hooks = [(FEATURES, lambda value, hook: value - 1e-4 * gradient)]
        with torch.no_grad():
            loss, moved = loss.detach(), model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks)
    assert (loss - moved).item() == pytest.approx(float(1e-4 * gradient.pow(2).sum()), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_in_place_do_not_break_the_backward_pass(kind: Kind) -> None:
    rm = pair("llama", kind, "transcoder")
    embed = torch.zeros(2, 7, 32, dtype=torch.float64, requires_grad=True)
    hooks = [("blocks.0.hook_resid_pre", lambda v, hook: v + embed)]
    hooks += [(f"{SITE}.{point}", off) for point in ("pre_acts", "features", "error")]
    with rm.attached():
        logits = rm.model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.autograd.grad(logits.sum(), embed)[0].abs().max() > 0


# -------------------------------------------------------------------- the eight defects of SAELens' attachment


@pytest.mark.parametrize("kind", KINDS)
def test_defect_1_the_skip_path_is_part_of_the_replacement(kind: Kind) -> None:
    rm, model, modules = pair("gpt2", kind), model_of("gpt2", kind), modules_of("gpt2", kind)
    with torch.no_grad(), rm.attached(error=False):
        logits = model(TOKENS)
        without = by_hand(model, modules, error=False)
        removed = []
        for module in modules:
            removed.append(module.W_skip.data.clone())
            module.W_skip.data.zero_()
        try:
            dropped = model(TOKENS)
        finally:
            for module, W_skip in zip(modules, removed, strict=True):
                module.W_skip.data.copy_(W_skip)
    assert gap(logits, without) < EXACT
    assert gap(logits, dropped) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_defect_2_an_input_hook_that_does_not_fire_raises(kind: Kind) -> None:
    rm, model = pair("gpt2", kind, "transcoder", "hook_mlp_in"), model_of("gpt2", kind)
    with torch.no_grad(), untouched(model):
        assert not model.cfg.use_hook_mlp_in
        with rm.attached():
            assert model.cfg.use_hook_mlp_in  # the scope's own doing
            model(TOKENS)
            model.set_use_hook_mlp_in(False)
            with pytest.raises(HookError, match=r"blocks\.0\.hook_mlp_in.*did not fire"):
                model(TOKENS)
    model.set_use_hook_mlp_in(True)
    try:
        with torch.no_grad(), untouched(model), rm.attached():
            model(TOKENS)
        assert model.cfg.use_hook_mlp_in  # the user's own setting stays
    finally:
        model.set_use_hook_mlp_in(False)


def test_a_stale_input_of_an_earlier_pass_is_not_used() -> None:
    rm, model = pair("gpt2", "hooked", "transcoder", "hook_mlp_in"), model_of("gpt2")

    def stop(value: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("between read and write")

    with torch.no_grad(), rm.attached():
        with pytest.raises(RuntimeError, match="between"):
            model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.ln2.hook_normalized", stop)])
        model.set_use_hook_mlp_in(False)
        with pytest.raises(HookError, match=r"blocks\.0\.hook_mlp_in.*did not fire"):
            model(TOKENS)


def test_a_write_hook_that_its_block_bypasses_raises() -> None:
    rm, model = pair("gpt2"), model_of("gpt2")
    block = model.blocks[1]
    with torch.no_grad(), rm.attached():
        model(TOKENS)
        block.apply_mlp = lambda x: block.mlp(x)  # an architecture without that hook
        try:
            with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out did not fire"):
                model(TOKENS)
        finally:
            del block.apply_mlp


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defect_3_the_norms_output_is_read_where_hooked_transformer_has_no_hook_for_it(name: Architecture) -> None:
    hooked, bridge = pair(name, "hooked"), pair(name, "bridge")
    assert "blocks.1.mlp.hook_in" not in hooked.model.hook_dict
    with torch.no_grad():
        with hooked.attached():
            _, a = hooked.model.run_with_cache(TOKENS)
        with bridge.attached():
            _, b = bridge.model.run_with_cache(TOKENS)
    assert gap(a[FEATURES], b[FEATURES]) < 1e-4  # the same weights; the bridge's RMS norms are float32
    assert (
        gap(a[FEATURES], modules_of(name)[1].encode(a["blocks.1.ln2.hook_normalized"])) > 1e-2
    )  # before gain and bias


class Shared:
    """Two dictionaries that read one hook: layer 0's, and one more with its weights that writes to layer 1."""

    def __init__(self, first: Any, write: str) -> None:
        self.__dict__.update(first.__dict__)
        self.inner, self.site, self.hooks_out = first, write, (write,)
        self.out_layers = (1,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    has_skip = True


@pytest.mark.parametrize("kind", KINDS)
def test_defect_4_two_dictionaries_that_share_an_input_hook_detach_cleanly(kind: Kind) -> None:
    model, first = model_of("gpt2", kind), pair("gpt2", kind).dictionaries[0]
    rm = ReplacementModel(model, [first, Shared(first, SITE)])
    with torch.no_grad(), untouched(model):
        real = model(TOKENS)
        with rm.attached():
            logits, cache = model.run_with_cache(TOKENS)
            assert gap(cache[f"{INNER}.features"], cache[FEATURES]) == 0
            assert gap(logits, real) < EXACT
        assert gap(model(TOKENS), real) == 0
        assert "features" not in " ".join(model.hook_dict)


def nudge(value: Tensor, hook: Any) -> Tensor:
    return value + torch.linspace(-0.5, 0.5, value.shape[-1], dtype=value.dtype)


@pytest.mark.parametrize("hook", ["ln2.hook_normalized", "hook_mlp_in", "mlp.hook_in"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "inside", "run_with_hooks", "after reset"])
def test_defect_5_an_edit_of_the_input_is_seen(kind: Kind, when: str, hook: HookIn) -> None:
    rm, model = pair("gpt2", kind, "skip", hook), model_of("gpt2", kind)
    name = f"blocks.1.{hook}" if not (kind == "hooked" and hook == "mlp.hook_in") else "blocks.1.ln2.hook_normalized"
    with torch.no_grad():
        with rm.attached():
            _, unedited = model.run_with_cache(TOKENS)
            model.reset_hooks()
            x = unedited[name]
        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(model))
            if when == "before":
                flag = bool(model.cfg.use_hook_mlp_in)
                model.set_use_hook_mlp_in(True)
                stack.callback(model.set_use_hook_mlp_in, flag)
                stack.callback(model.reset_hooks, including_permanent=True)
                model.add_hook(name, nudge, is_permanent=True)
            with rm.attached():
                if when == "after reset":
                    model.reset_hooks(including_permanent=True)
                    model(TOKENS)
                if when in ("inside", "after reset"):
                    model.add_hook(name, nudge)
                got: dict[str, Tensor] = {}
                hooks = [(name, nudge)] if when == "run_with_hooks" else []
                hooks.append((f"{SITE}.pre_acts", lambda v, hook: got.__setitem__("pre", v.clone())))
                model.run_with_hooks(TOKENS, fwd_hooks=hooks)
                model.reset_hooks()
    seen = nudge(x, None)
    if hook == "mlp.hook_in" and kind == "hooked":
        norm = model.blocks[1].ln2
        x, seen = x * norm.w + norm.b, seen * norm.w + norm.b
    module = rm.dictionaries[1].module
    assert gap(got["pre"], seen @ module.W_enc + module.b_enc) < EXACT
    assert gap(got["pre"], x @ module.W_enc + module.b_enc) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_defect_6_the_users_hooks_stay_in_their_order(kind: Kind) -> None:
    rm, model = pair("gpt2", kind, "transcoder", "ln2.hook_normalized"), model_of("gpt2", kind)
    order: list[str] = []

    def mark(text: str) -> Callable[..., None]:
        return lambda value, hook: order.append(text)

    with torch.no_grad(), untouched(model):
        for name in ("blocks.1.ln2.hook_normalized", SITE):
            model.add_hook(name, mark(f"{name} permanent"), is_permanent=True)
            model.add_hook(name, mark(f"{name} temporary"))
        handles = [
            handle for name in ("blocks.1.ln2.hook_normalized", SITE) for handle in model.hook_dict[name].fwd_hooks
        ]
        model(TOKENS)
        wanted, order[:] = order.copy(), []
        with rm.attached():
            model(TOKENS)
            assert order == wanted
            assert set(present_hooks(model)) == {
                model.hook_dict[n].name for n in ("blocks.1.ln2.hook_normalized", SITE)
            }
            model.add_hook(SITE, mark("inside"))
            model.add_hook(FEATURES, mark("on a point that goes"), is_permanent=True)
        order.clear()
        model(TOKENS)
        assert order == [*wanted, "inside"]
        kept = [handle for name in ("blocks.1.ln2.hook_normalized", SITE) for handle in model.hook_dict[name].fwd_hooks]
        assert [id(handle) for handle in kept[:-1]] == [id(handle) for handle in handles]
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_users_hooks_on_the_output_see_and_edit_the_sum(kind: Kind, when: str) -> None:
    rm, model = pair("gpt2", kind), model_of("gpt2", kind)
    seen: dict[str, Tensor] = {}

    def ablate(value: Tensor, hook: Any) -> Tensor:
        seen["sum"] = value
        return torch.zeros_like(value)

    with torch.no_grad():
        with rm.attached(error=False):
            _, cache = model.run_with_cache(TOKENS)
        with untouched(model):
            if when == "before":
                model.add_hook(SITE, ablate, is_permanent=True)
            with ReplacementModel(model, modules_of("gpt2", kind)[:2]).attached(error=False):
                if when == "inside":
                    model.add_hook(SITE, ablate, is_permanent=True)
                _, ablated = model.run_with_cache(TOKENS)
            model.reset_hooks(including_permanent=True)
    module, x = modules_of("gpt2", kind)[1], model.blocks[1].ln2(cache["blocks.1.hook_resid_mid"])
    assert gap(seen["sum"], module.decode(cache[FEATURES]) + x @ module.W_skip.T) < EXACT
    assert gap(ablated["blocks.1.hook_resid_post"], ablated["blocks.1.hook_resid_mid"]) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defect_7_a_bridges_other_names_work_too(name: Architecture) -> None:
    rm, model = pair(name, "bridge"), model_of(name, "bridge")
    with torch.no_grad(), untouched(model), rm.attached():
        owners = [n for n, point in model.hook_dict.items() if point is model.hook_dict[SITE]]
        assert len(owners) > 1
        _, cache = model.run_with_cache(TOKENS)
        wanted = model.run_with_hooks(TOKENS, fwd_hooks=[(FEATURES, off)])
        for owner in owners:
            alias = f"{owner}.features"
            assert gap(cache[alias], cache[FEATURES]) == 0
            assert gap(model.run_with_hooks(TOKENS, fwd_hooks=[(alias, off)]), wanted) == 0
            model.add_hook(alias, off)
            assert gap(model(TOKENS), wanted) == 0
            model.reset_hooks()
        assert {"hook_embed", "blocks.1.hook_resid_pre"} <= set(cache.keys())
        with pytest.raises(AttributeError):
            model.add_hook(f"{SITE}.feature", off)


def test_unknown_names_raise_from_upstream() -> None:
    rm = pair("gpt2")
    with torch.no_grad(), rm.attached(), pytest.raises(KeyError):
        rm.model.run_with_hooks(TOKENS, fwd_hooks=[(f"{SITE}.feature", off)])


@pytest.mark.parametrize("kind", KINDS)
def test_defect_8_no_function_of_the_model_is_replaced(kind: Kind) -> None:
    rm, model = pair("gpt2", kind), model_of("gpt2", kind)

    def functions() -> dict[str, Any]:
        modules = list(torch.nn.Module.named_modules(model))
        return {f"{path}.{k}": v for path, m in modules for k, v in vars(m).items() if callable(v)} | dict(modules)

    before = functions()
    with rm.attached():
        during = functions()
        assert all(during[path] is before[path] for path in before)
        added = {path.rsplit(".", 1)[1] for path in during.keys() - before.keys()}
        assert added == {"pre_acts", "features", "error"}


# ------------------------------------------------------------------------------------- the end of a scope, and odd runs


class Interruption(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("hook", ["hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["features", "pre_acts", "error", None, "block", "body"])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_after_an_exception(
    kind: Kind, hook: HookIn, point: str | None, exception: type[BaseException]
) -> None:
    rm, model = pair("gpt2", kind, "transcoder", hook), model_of("gpt2", kind)

    def fail(value: Tensor, hook: Any) -> None:
        raise exception

    name = {None: SITE, "block": "blocks.1.hook_resid_post"}.get(point, f"{SITE}.{point}")
    with torch.no_grad(), untouched(model):
        with pytest.raises(exception), rm.attached():
            fail(TOKENS, None) if point == "body" else model.run_with_hooks(TOKENS, fwd_hooks=[(name, fail)])
        with rm.attached():
            model(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_scope_on_a_model_raises_before_anything_is_touched(kind: Kind) -> None:
    model = model_of("gpt2", kind)
    rm = ReplacementModel(model, modules_of("gpt2", kind)[1:2])
    other = ReplacementModel(model, builders.transcoders(model, hook_in="hook_mlp_in", layers=[2]))
    with torch.no_grad(), untouched(model):
        with rm.attached():
            for second in (rm, other):
                with untouched(model), pytest.raises(HookError, match="already"), second.attached():
                    pytest.fail("a second scope began")
            model(TOKENS)
            assert FEATURES in model.hook_dict
        with other.attached():
            model(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_half_precision_model_dictionaries_compute_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    model = builders.build("llama", kind, dtype=dtype)
    rm = ReplacementModel(model, builders.transcoders(model, "jumprelu_skip", hook_in="hook_resid_mid"))
    with torch.inference_mode():
        real = model(TOKENS)
        with rm.attached():
            logits, cache = model.run_with_cache(TOKENS)
            assert model.run_with_hooks(TOKENS, fwd_hooks=[(FEATURES, off)]).dtype == dtype
    assert logits.dtype == real.dtype == cache[SITE].dtype == dtype
    assert cache[FEATURES].dtype == cache[f"{SITE}.error"].dtype == torch.float32
    assert gap(logits.float(), real.float()) <= 8 * torch.finfo(dtype).eps * real.float().abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_and_an_early_stop_work(kind: Kind, mode: Any) -> None:
    rm, model = pair("llama", kind), model_of("llama", kind)
    with mode(), untouched(model), rm.attached():
        real, full = model.run_with_cache(TOKENS)
        resid, cache = model.run_with_cache(TOKENS, stop_at_layer=2)
        assert gap(resid, full["blocks.2.hook_resid_pre"]) == 0
        assert FEATURES in cache
        assert f"{LAST}.features" not in cache
        assert gap(model(TOKENS), real) == 0


@pytest.mark.parametrize("hook", ["ln2.hook_normalized", "mlp.hook_in"])
@pytest.mark.parametrize("kind", KINDS)
def test_attribution_inside_a_scope_is_that_outside(kind: Kind, hook: HookIn) -> None:
    rm, tokens = pair("gpt2", kind, "transcoder", hook), TOKENS[0]
    outside = rm.attribute(tokens, targets=[5], check=True)
    with untouched(rm.model), rm.attached():
        inside = rm.attribute(tokens, targets=[5], check=True)
        with torch.no_grad():
            assert FEATURES in rm.model.run_with_cache(TOKENS)[1]
    assert gap(torch.as_tensor(inside.adjacency), torch.as_tensor(outside.adjacency)) < 1e-9


class CrossLayer:
    """A cross-layer transcoder in the least code: reads layer 0, writes to layers 0 and 1."""

    site, layer, hook_in, kind = INNER, 0, "blocks.0.ln2.hook_normalized", "clt"
    joint, tangent = INNER, False
    hooks_out, out_layers = (INNER, SITE), (0, 1)
    d_in = d_out = 32
    d_sae, has_skip = 40, False

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.W_enc = torch.randn(32, 40, generator=rng, dtype=torch.float64)
        self.W_dec = torch.randn(2, 40, 32, generator=rng, dtype=torch.float64)

    def pre_acts(self, x: Tensor) -> Tensor:
        return x @ self.W_enc

    def activate(self, pre_acts: Tensor, x: Tensor) -> Tensor:
        return pre_acts.relu()

    def decode(self, acts: Tensor) -> Tensor:
        return torch.stack([acts @ W for W in self.W_dec], dim=-2)

    def skip(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 32)

    encoder_rows = encoder_bias = decoder_rows = decoder_bias = skip_matrix = fingerprint = thresholds = (
        lambda self, *args: None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_with_two_write_hooks_changes_both_outputs(kind: Kind) -> None:
    model, clt = model_of("gpt2", kind), CrossLayer()
    rm = ReplacementModel(model, [clt])
    with torch.no_grad():
        real = model(TOKENS)
        with untouched(model), rm.attached():
            logits, cache = model.run_with_cache(TOKENS)
            assert gap(logits, real) < EXACT
            edited = model.run_with_hooks(TOKENS, fwd_hooks=[(f"{INNER}.features", off)])
        delta = off(cache[f"{INNER}.features"].clone(), None) - cache[f"{INNER}.features"]
        push = [(hook, lambda v, hook, W=W: v + delta @ W) for hook, W in zip(clt.hooks_out, clt.W_dec, strict=True)]
        assert gap(edited, model.run_with_hooks(TOKENS, fwd_hooks=push)) < EXACT
        assert gap(edited, model.run_with_hooks(TOKENS, fwd_hooks=push[:1])) > 1e-3


# ------------------------------------------------------------------------------------------------- from a cache


@pytest.mark.parametrize(("name", "kind", "hook"), READS)
def test_feature_acts_are_the_same_from_any_cache(name: Architecture, kind: Kind, hook: HookIn) -> None:
    rm, model = pair(name, kind, "jumprelu", hook), model_of(name, kind)
    with torch.inference_mode(), untouched(model):
        with rm.attached():
            _, inside = model.run_with_cache(TOKENS)
        _, full = model.run_with_cache(TOKENS)
        _, least = model.run_with_cache(TOKENS, names_filter=rm.names_filter())
        _, single = model.run_with_cache(TOKENS[:1], names_filter=rm.names_filter(), remove_batch_dim=True)
        norm = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(3)]
        _, normalized = model.run_with_cache(TOKENS, names_filter=norm)
        wanted = rm.feature_acts(inside)
        caches = [full, least, *([normalized] if hook in ("mlp.hook_in", "ln2.hook_normalized") else [])]
        for cache in caches:
            acts = rm.feature_acts(cache)
            assert list(acts) == [d.site for d in rm.dictionaries]
            assert all(gap(acts[site], wanted[site]) < 1e-5 for site in wanted)
        assert gap(rm.feature_acts(single)[SITE], wanted[SITE][0]) < 1e-5
    assert wanted[SITE] is inside[FEATURES] or gap(wanted[SITE], inside[FEATURES]) == 0
    assert wanted[SITE][0, -1].topk(5).values[0] > 1e-2


def test_feature_acts_of_an_edited_run_hold_the_edit() -> None:
    rm, model = pair("gpt2"), model_of("gpt2")
    twos = [(FEATURES, lambda value, hook: torch.full_like(value, 2.0))]
    with torch.no_grad(), rm.attached(), model.hooks(fwd_hooks=twos):
        _, cache = model.run_with_cache(TOKENS)
    assert rm.feature_acts(cache)[SITE].eq(2.0).all()


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_denominator_in_the_cache_is_used(kind: Kind) -> None:
    rm, model = pair("llama", kind, "jumprelu", "ln2.hook_normalized"), model_of("llama", kind)
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.ln2.hook_scale", lambda v, hook: 2.0 * v)]):
        with rm.attached():
            _, inside = model.run_with_cache(TOKENS)
        _, least = model.run_with_cache(TOKENS, names_filter=rm.names_filter())
        _, streams = model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith(("resid_mid", "ln2.hook_in")))
    wanted = rm.feature_acts(inside)[SITE]
    assert gap(rm.feature_acts(least)[SITE], wanted) < 1e-5
    assert gap(rm.feature_acts(streams)[SITE], wanted) > 1e-2


def test_feature_acts_without_an_input_name_what_is_missing() -> None:
    rm, model = pair("gpt2"), model_of("gpt2")
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: "blocks.1." not in n)
    with pytest.raises(CacheError, match=r"blocks\.1\.hook_mlp_out\.features.*blocks\.1\.mlp\.hook_in"):
        rm.feature_acts(cache)


def test_the_facade_and_the_function_are_one() -> None:
    rm = pair("gpt2")
    with attached(rm.binding, error=False) as model:
        assert model is rm.model
        assert FEATURES in model.hook_dict

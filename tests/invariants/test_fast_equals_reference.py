"""Contract 5: the fast path equals autograd through the model, and a fast path that does not is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuit_lens import direction, logit_difference
from circuit_lens.attribution import linear_maps
from circuit_lens.attribution.linear_maps import MapsUnavailableError
from circuit_lens.attribution.replacement import LocalReplacementModel
from circuit_lens.attribution.targets import stack
from circuit_lens.errors import ConsistencyError
from tests import builders
from tests.invariants import cases
from tests.invariants.test_conservation import spread_metric

FAST = [case for case in cases.SETTINGS_ON_CLASSES if not {"engine", "attention"} & set(case[2])]


def rows(rm: Any, tokens: torch.Tensor, **setting: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of features, logits, a direction and a metric of several positions, by both engines."""
    local = cases.local(rm, tokens, engine="fast", check=False, **setting)
    wanted = [5, logit_difference(3, 4, pos=1), direction(torch.ones(builders.D_MODEL), pos=3), spread_metric]
    targets = [local.feature_targets(range(0, local.n_active, 4)), stack(local.resolve(wanted))]
    fast, slow = (torch.cat([local.rows(t, engine=e) for t in targets]) for e in ("fast", "reference"))
    return fast, slow


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    # Linearised norms leave tiny rows of large terms that cancelled; those are measured by the largest row.
    scale = b.abs().amax(1).clamp_min(0.01 * float(b.abs().max()))
    return float(((a - b).abs().amax(1) / scale).max())


@pytest.mark.parametrize(("name", "kind", "setting"), FAST)
def test_both_engines_give_the_same_rows(name, kind, setting):
    layers = (0, 2) if "mlp" in setting else None
    fast, slow = rows(cases.pair(name, kind, "skip", "mlp.hook_in", layers=layers), cases.tokens(7), **setting)
    # A bridge's RMS norms are float32, and so are their derivatives where they are not held.
    live = kind == "bridge" and name in cases.RMS and setting.get("norms") == "linear"
    assert difference(fast, slow) < (1e-5 if live else 1e-12)


@pytest.mark.parametrize("hook_in", builders.HOOKS_IN)
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "bridge"), ("pythia", "hooked"), ("gemma2", "hooked")])
def test_both_engines_agree_for_every_input_hook(name, kind, hook_in):
    if hook_in not in cases.hooks_in(name):
        return
    for transcoder in ("jumprelu", "jumprelu_skip"):
        fast, slow = rows(cases.pair(name, kind, transcoder, hook_in), cases.tokens(5))
        assert difference(fast, slow) < 1e-12


def test_settings_change_the_rows():
    """Negative control: what is compared above is not the same for every setting."""
    rm = cases.pair("gemma2", "hooked", "skip", layers=(0, 2))
    default = rows(rm, cases.tokens(7))[0]
    for setting in ({"norms": "linear"}, {"mlp": "jacobian"}):
        other = rows(rm, cases.tokens(7), **setting)[0]
        n = min(other.shape[1], default.shape[1])
        assert difference(other[:, :n], default[:, :n]) > 1e-3


def corrupt(monkeypatch: pytest.MonkeyPatch, factor: float = 1.001) -> None:
    """Make the fast path wrong by a part in a thousand, in one kind of source."""
    right = LocalReplacementModel.row_blocks

    def wrong(self: LocalReplacementModel, targets: Any, *, engine: str | None = None, **options: Any) -> Any:
        for chosen, block in right(self, targets, engine=engine, **options):
            block = block.clone()
            if (engine or self.engine) == "fast":
                block[:, self.n_active :] *= factor
            yield chosen, block

    monkeypatch.setattr(LocalReplacementModel, "row_blocks", wrong)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("kind", builders.KINDS)
def test_a_wrong_fast_path_falls_back_and_is_named(kind, factor, monkeypatch):
    rm = cases.pair("gemma2", kind)
    right = cases.attribute(rm, cases.tokens(6), [5, 6])
    assert right.manifest["engine"] == "fast"
    assert right.manifest["engine_note"] == ""
    corrupt(monkeypatch, factor)
    graph = cases.attribute(rm, cases.tokens(6), [5, 6])
    assert graph.manifest["engine"] == "reference"
    assert "differed" in graph.manifest["engine_note"]
    assert cases.difference(graph, right) < 1e-12
    assert graph.manifest["checks"]["fast_vs_reference"] > 1e-4


def test_a_wrong_fast_path_that_was_asked_for_raises(monkeypatch):
    rm = cases.pair("gpt2")
    assert cases.attribute(rm, cases.tokens(6), engine="fast").manifest["engine"] == "fast"
    corrupt(monkeypatch)
    with pytest.raises(ConsistencyError, match="fast path"):
        cases.attribute(rm, cases.tokens(6), engine="fast")


def unreadable(attn: Any, dtype: torch.dtype) -> Any:
    raise MapsUnavailableError("a test says so")


@pytest.mark.parametrize(("name", "kind"), cases.CLASSES)
def test_a_model_whose_attention_cannot_be_read_gives_the_same_graph(name, kind, monkeypatch):
    rm = cases.pair(name, kind, "skip")
    fast = cases.attribute(rm, cases.tokens(5), [5, spread_metric], max_features=30)
    monkeypatch.setattr(linear_maps, "_read_attention", unreadable)
    slow = cases.attribute(rm, cases.tokens(5), [5, spread_metric], max_features=30)
    assert slow.manifest["engine"] == "reference"
    assert "a test says so" in slow.manifest["engine_note"]
    assert float(cases.gaps(slow).max()) < (1e-5 if cases.rounding(name, kind) > 1e-8 else 1e-10)
    # Its biases are one node where the fast path tells attention's from the norms'; all other edges are the same.
    columns = [n for n in cases.names(slow) if n in set(cases.names(fast)) and not n.endswith("bias")]
    for name_of_node in columns:
        node_a, node_b = fast.node(name_of_node), slow.node(name_of_node)
        if node_a.id < fast.nodes.n_sources:
            a, b = fast.adjacency[:, node_a.id], slow.adjacency[:, node_b.id]
            assert float((a - b).abs().max()) < cases.rounding(name, kind)


def test_an_engine_that_was_asked_for_is_not_silently_another(monkeypatch):
    """engine="fast" on a model without readable attention cannot be kept, and says so."""
    monkeypatch.setattr(linear_maps, "_read_attention", unreadable)
    with pytest.raises(ConsistencyError, match="a test says so"):
        cases.attribute(cases.pair("gpt2"), cases.tokens(5), engine="fast")

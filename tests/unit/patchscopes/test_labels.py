"""Labels of nodes: the figures are their slow definitions, ablation is the live model's, errors say what is valid."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import ConsistencyError, NodeNotFoundError, PatchscopeError, TokenNotFoundError
from circuit_lens.patchscopes.explain import random_directions, units_of
from circuit_lens.patchscopes.labels import default_targets, label_nodes, random_sets
from circuit_lens.patchscopes.sources import At, Vectors
from circuit_lens.patchscopes.targets import Preset, Target

PROMPT = "Fact : the state containing Dallas is"
DALLAS = 6
PLACE = Target("cat : small animal ; Lyon : city in France ; x : city in", name="city in")


@cache
def pair() -> Any:
    """The bundled pair."""
    return cl.zoo.load("capitals")


@cache
def graph() -> Any:
    """A graph of a prompt whose answer is the state."""
    return pair().attribute(PROMPT, progress=False)


def says(vector: torch.Tensor, layer: int, before: list[int], target: Target) -> torch.Tensor:
    """Log-probabilities of the next token with a vector at the placeholder, by a plain hook."""
    model = pair().model
    placed = target.place(model)
    tokens = torch.cat([placed.tokens, torch.tensor(before, dtype=torch.long)])

    def write(residual: torch.Tensor, hook: Any) -> torch.Tensor:
        residual = residual.clone()
        residual[:, list(placed.positions)] = vector
        return residual

    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=[(f"blocks.{layer}.hook_resid_post", write)])
    return logits[0, -1].double().log_softmax(-1)


def test_the_figures_of_a_label_are_those_of_single_runs() -> None:
    node, layer, n = graph().top(1, pos=DALLAS)[0].node, 1, 5
    generating = Preset(PLACE.prompt, name="two tokens", max_new_tokens=2)
    found = label_nodes(pair(), graph(), nodes=node, target=generating, target_layer=layer, scale=2.0, n_random=n,
                        ablate=False, seed=3)[0]  # fmt: skip
    model = pair().model
    length = 2.0 * units_of(model, PLACE.place(model))[layer]
    vector = Vectors.decoder(pair().binding.dictionary(node.layer, node.feature.site), node.index).values[0, 0, 0]
    random = random_directions(n, len(vector), 3).float() * length
    before: list[int] = []
    by_prefix = {one.after: one for one in found.candidates}
    assert len(by_prefix) == 2, "two tokens were generated"
    for _ in range(2):
        mine = says(vector * length, layer, before, PLACE)
        theirs = torch.stack([says(one, layer, before, PLACE) for one in random])
        token = int(mine.argmax())
        one = by_prefix["" if not before else model.tokenizer.decode(before).strip()]
        assert one.token == token
        assert one.probability == pytest.approx(float(mine[token].exp()), abs=1e-5)
        assert one.margin == pytest.approx(float(mine[token] - theirs[:, token].mean()), abs=1e-3)
        assert one.p_value == (1 + int((theirs[:, token] >= mine[token]).sum())) / (1 + n)
        own = []
        for i in range(n):
            best = int(theirs[i].argmax())
            own.append(float(theirs[i, best] - theirs[[j for j in range(n) if j != i]][:, best].mean()))
        assert one.p_margin == (1 + sum(margin >= one.margin for margin in own)) / (1 + n)
        assert one.drop is None
        before.append(token)
    assert found.best.margin == max(one.margin for one in found.candidates)


def test_drops_are_those_of_interventions_at_the_last_position_and_where_the_label_is_said_most() -> None:
    nodes = [one.node for one in graph().top(3, pos=DALLAS)]
    together = cl.Supernode("all three", [node.feature for node in nodes])
    found = label_nodes(pair(), graph(), nodes=[*nodes, together], target=PLACE, n_random=4)
    token = found[0].best.token
    runs = [[cl.Feature(n.layer, n.pos, n.index, n.site).set(0.0)] for n in nodes]
    for label, run in zip(found, [*runs, [together.set(0.0)]], strict=True):
        token = label.best.token
        live = pair().intervene(PROMPT, run)
        clean, after = (logits.double().softmax(-1)[:, token] for logits in (live.clean_logits, live.logits))
        assert label.best.clean == pytest.approx(float(clean[-1]), abs=1e-6)
        assert label.best.drop == pytest.approx(float(clean[-1] - after[-1]), abs=1e-6)
        assert label.best.drop_nats == pytest.approx(float((clean[-1] / after[-1]).log()), abs=1e-3)
        peak = DALLAS + int(clean[DALLAS:].argmax())
        assert label.best.peak_pos == peak
        assert label.best.peak_drop == pytest.approx(float(clean[peak] - after[peak]), abs=1e-6)
        assert label.best.p_drop in (0.2, 0.4, 0.6, 0.8, 1.0)
    assert found[3].size == 3
    assert len({round(one.best.drop or 0, 9) for one in found}) > 1, "nothing is ablated"


def test_random_ablations_are_active_features_of_the_same_position_and_none_of_the_nodes_own() -> None:
    recording = pair().record(PROMPT)
    every = recording.active()
    here = [f for f in every if f.pos == DALLAS]
    own = here[:2]
    sets = random_sets(recording, own, 6, 0)
    assert len(sets) == 6
    assert all(len(set(some)) == 2 and not set(some) & set(own) and {f.pos for f in some} == {DALLAS} for some in sets)
    assert len(set(sets)) > 1
    assert sets == random_sets(recording, own, 6, 0) != random_sets(recording, own, 6, 1)
    wide = random_sets(recording, here, 3, 0)
    assert {f.pos for some in wide for f in some} - {DALLAS}, "too few at the position: drawn from all"
    assert random_sets(recording, every, 3, 0) == []


def test_residuals_are_read_as_they_are_in_their_own_layer_and_compared_with_vectors_of_their_length() -> None:
    found = label_nodes(pair(), graph(), residuals=[(1, "Dallas"), (-1, -1)], target=PLACE, n_random=3)
    assert [(one.kind, one.layer, one.pos, one.given) for one in found] == [
        ("residual", 1, DALLAS, "Dallas"), ("residual", -1, 7, "is"),
    ]  # fmt: skip
    state = Vectors.from_prompts(pair().model, At(PROMPT, pos=DALLAS), layers=[1]).values[0, 0, 0]
    mine = says(state, 1, [], PLACE)
    best = found[0].best
    assert best.token == int(mine.argmax())
    random = random_directions(3, len(state), 0).float() * state.norm()
    theirs = torch.stack([says(one, 1, [], PLACE) for one in random])[:, best.token]
    assert best.margin == pytest.approx(float(mine[best.token] - theirs.mean()), abs=1e-3)
    assert best.drop is None


def test_the_default_labels_the_strongest_features_with_both_targets_and_prints() -> None:
    found = label_nodes(pair(), graph(), n_random=2)
    assert [one.node for one in found] == [one.node.name for one in graph().top(10)]
    names = [one.name for one in default_targets(pair().model)]
    assert {one.target for one in found[0].candidates} == set(names)
    assert len(found[0].candidates) == 1 + 4
    assert found[found[2].node] is found[2]
    text, page = str(found), found._repr_html_()
    assert all(one.node in text and one.node in page for one in found)
    assert page.count("<tr>") == page.count("</tr>") == 11
    lines = found.records()
    assert len(lines) == sum(len(one.candidates) for one in found)
    assert {line["rank"] for line in lines} == set(range(5))
    assert found.agreement.asked == sum(bool(one.given) for one in found)
    assert found.lowered.asked == 10
    with pytest.raises(PatchscopeError, match="names 0 of the labels"):
        found["L9"]


def test_a_node_that_is_off_on_the_prompt_is_not_ablated_and_said_so() -> None:
    recording = pair().record(PROMPT)
    d = pair().dictionaries[0]
    off = int((recording.acts(d)[DALLAS] == 0).nonzero()[0])
    node = cl.Supernode("off", [cl.Feature(d.layer, "Dallas", off, d.site)])
    found = label_nodes(pair(), graph(), nodes=node, target=PLACE, n_random=2)
    assert found[0].best.drop is None
    assert found[0].size == 0
    assert found.notes == ("off is not active on this prompt, so nothing was ablated",)


def test_graphs_of_other_weights_or_conditions_and_nodes_that_are_not_there_are_refused() -> None:
    weights = graph().manifest["weights"] | {"model": "another"}
    for change, match in (
        ({"weights": weights}, "other weights"),
        ({"baseline": {"tokens": graph().tokens.tolist()}}, "contrast"),
        ({"user_hooks": ["blocks.0.hook_mlp_out"]}, "hooks"),
    ):
        with pytest.raises(ConsistencyError, match=match):
            label_nodes(pair(), replace(graph(), manifest=graph().manifest | change))
    doubled = replace(graph(), nodes=replace(graph().nodes, activation=graph().nodes.activation * 2))
    with pytest.raises(ConsistencyError, match="other conditions"):
        label_nodes(pair(), doubled, n_random=2)
    with pytest.raises(NodeNotFoundError):
        label_nodes(pair(), graph(), nodes=len(graph().nodes))
    with pytest.raises(NodeNotFoundError):
        label_nodes(pair(), graph().prune(node_threshold=0.1), nodes="L0 P1 #0")
    with pytest.raises(TokenNotFoundError):
        label_nodes(pair(), graph(), nodes=cl.Supernode("s", [cl.Feature(0, "Oakland", 3)]))
    with pytest.raises(TokenNotFoundError):
        label_nodes(pair(), graph(), residuals=[(0, 50)])


def test_settings_that_are_not_valid_say_what_is() -> None:
    token = graph().top(1, kind="token")
    with pytest.raises(PatchscopeError, match=r"kind token.*residuals"):
        label_nodes(pair(), graph(), nodes=token)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"target_layer": 4}, "target_layer=4"), ({"scale": 0.0}, "scale"), ({"n_random": 1}, "n_random"),
        ({"n_tokens": 0}, "n_tokens"), ({"target": []}, "no target"), ({"nodes": []}, "no nodes"),
        ({"residuals": [(7, 0)]}, "layer 7"),
    )  # fmt: skip
    for bad, match in wrong:
        with pytest.raises(PatchscopeError, match=match):
            label_nodes(pair(), graph(), **bad)


def test_the_model_comes_back_untouched(untouched: Any) -> None:
    with untouched(pair().model):
        label_nodes(pair(), graph(), nodes=graph().top(2), residuals=[(0, 1)], n_random=2)

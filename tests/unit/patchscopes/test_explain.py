"""Self-explanation: the ranking is its definition, the search is one grid, controls and errors say what they mean."""

from __future__ import annotations

import math
import re
from functools import cache
from inspect import unwrap
from typing import Any

import numpy as np
import pytest
import torch

import circuit_lens as cl
from circuit_lens.errors import PatchscopeError, TokensError
from circuit_lens.hooks import Hook
from circuit_lens.patchscopes import presets
from circuit_lens.patchscopes.explain import (
    SCALES,
    default_target,
    explain_feature,
    explain_vectors,
    random_directions,
    units_of,
)
from circuit_lens.patchscopes.sources import Vectors, residual_hook
from circuit_lens.patchscopes.targets import Target
from circuit_lens.running import forward, token_string
from tests import builders

TOKENS = builders.random_tokens(9, seed=3)[0]
SLOT = 4


@cache
def model() -> Any:
    """A random model with room for five layers' worth of choices."""
    return builders.build("llama", "hooked", dtype=torch.float64)


@cache
def bundled(which: str = "clt") -> Any:
    """The bundled pair."""
    return cl.zoo.load("capitals", which)


def vectors(n: int = 2, seed: int = 5) -> Vectors:
    """Directions of different lengths."""
    rows = random_directions(n, model().cfg.d_model, seed) * torch.arange(1, n + 1, dtype=torch.float64)[:, None] * 7
    return Vectors.of(rows, [f"d{i}" for i in range(n)])


def target() -> Target:
    """A prompt in token ids."""
    return Target(TOKENS, at=SLOT)


def one_by_one(direction: torch.Tensor, layer: int, length: float, read: int) -> tuple[float, float, int]:
    """Entropy, self-similarity and the most probable token of one run, by plain hooks."""
    seen: list[torch.Tensor] = []

    def write(residual: torch.Tensor) -> torch.Tensor:
        residual = residual.clone()
        residual[:, SLOT] = direction / direction.norm() * length
        return residual

    hooks = [
        Hook(residual_hook(layer), write),
        Hook(residual_hook(read), lambda residual: seen.append(residual[0, -1].clone())),
    ]
    with torch.no_grad():
        logprobs = forward(model(), TOKENS, hooks=hooks)[-1].log_softmax(-1)
    entropy = -float((logprobs.exp() * logprobs).sum())
    return entropy, float(torch.cosine_similarity(seen[0], direction, dim=0)), int(logprobs.argmax())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_rows_are_ranked_by_the_slow_definition(alpha: float) -> None:
    given, scales, n_layers = vectors(), (0.5, 3.0), model().cfg.n_layers
    read, layers = n_layers - 1, list(range(-1, n_layers - 1))
    found = explain_vectors(
        model(), given, target=target(), scales=scales, target_layers=layers, read_layer=read, alpha=alpha, n_random=3,
        max_new_tokens=0,
    )  # fmt: skip
    d_vocab = model().W_U.shape[-1]
    for item in range(2):
        direction = given.values[item, 0, 0]
        slow = {}
        for layer in layers:
            with torch.no_grad():
                stream: list[torch.Tensor] = []
                forward(model(), TOKENS, hooks=[Hook(residual_hook(layer), lambda x, s=stream: s.append(x[0].clone()))])
            own = [i for i in range(1, len(TOKENS)) if i != SLOT]
            unit = float(stream[0][own].norm(dim=-1).mean())
            for scale in scales:
                entropy, similar, token = one_by_one(direction, layer, scale * unit, read)
                slow[layer, scale] = alpha * similar - (1 - alpha) * entropy / math.log(d_vocab), entropy, token
        ordered = sorted(slow, key=lambda cell: -slow[cell][0])
        rows = found.rows(item)
        assert [(row.target_layer, row.scale) for row in rows] == ordered
        np.testing.assert_allclose([row.score for row in rows], [slow[cell][0] for cell in ordered], atol=1e-9)
        np.testing.assert_allclose([row.entropy for row in rows], [slow[cell][1] for cell in ordered], atol=1e-9)
        assert [row.token for row in rows] == [token_string(model(), slow[cell][2]) for cell in ordered]
        assert found.best(item) == rows[0]


def test_a_rows_score_depends_on_that_row_alone_and_on_the_direction_not_its_length() -> None:
    whole = explain_vectors(model(), vectors(2), target=target(), scales=(0.5, 2.0), read_layer=1, target_layers=[0],
                            max_new_tokens=0, n_random=2)  # fmt: skip
    longer = Vectors.of(vectors(2).values[1:, 0, 0] * 1e3)
    alone = explain_vectors(model(), longer, target=target(), scales=(2.0,), read_layer=1,
                            target_layers=[0], max_new_tokens=0, n_random=0)  # fmt: skip
    np.testing.assert_allclose(alone.score[0, 0, 0], whole.score[1, 0, 1], atol=1e-9)
    assert abs(whole.score[0, 0, 1] - whole.score[1, 0, 1]) > 1e-6, "two directions score alike: nothing is tested"


def test_a_unit_that_is_given_is_the_length_and_the_measured_one_leaves_out_first_token_and_placeholder() -> None:
    placed = target().place(model())
    measured = units_of(model(), placed)
    spoilt = torch.tensor([0, SLOT])

    def blow_up(residual: torch.Tensor) -> torch.Tensor:
        residual = residual.clone()
        residual[:, spoilt] *= 1e6
        return residual

    last = model().cfg.n_layers - 1
    with model().hooks(fwd_hooks=[(residual_hook(last), lambda value, hook: blow_up(value))]):
        again = units_of(model(), placed)
    assert again[last] == pytest.approx(measured[last], rel=1e-6)
    both = [
        explain_vectors(model(), vectors(1), target=target(), unit=unit, scales=(1.5,), target_layers=[0], read_layer=1,
                        n_random=0, max_new_tokens=0)
        for unit in (3.0, dict.fromkeys(range(-1, last + 1), 3.0))
    ]  # fmt: skip
    entropy, similar, _ = one_by_one(vectors(1).values[0, 0, 0], 0, 4.5, 1)
    for found in both:
        assert found.best().norm == 4.5
        assert found.best().entropy == pytest.approx(entropy, abs=1e-9)
        assert found.best().self_similarity == pytest.approx(similar, abs=1e-9)


def test_p_counts_random_directions_whose_own_search_is_at_least_as_good() -> None:
    found = explain_vectors(model(), vectors(3), target=target(), read_layer=1, target_layers=[-1, 0], n_random=19,
                            scales=(0.5, 2.0), max_new_tokens=0)  # fmt: skip
    best = found.score.reshape(len(found.score), -1).max(1)
    for i in range(3):
        assert found.p_value(i) == (1 + (best[3:] >= best[i]).sum()) / 20
    assert np.unique([found.p_value(i) for i in range(3)]).size > 1, "all alike: nothing is tested"
    assert [one.score for one in found.random_best()] == best[3:].tolist()
    assert sum(line["best"] for line in found.records()) == 3 + 19
    assert sum(line["p"] is not None for line in found.records()) == 3


def test_a_random_direction_is_called_not_different_and_too_few_controls_are_named() -> None:
    few = explain_vectors(model(), vectors(1), target=target(), read_layer=1, target_layers=[0], n_random=2,
                          scales=(1.0,), max_new_tokens=0)  # fmt: skip
    assert few.different() is False
    assert "NOT different from the controls" in str(few)
    none = explain_vectors(model(), vectors(1), target=target(), read_layer=1, target_layers=[0], n_random=0,
                           scales=(1.0,), unit=1e3, max_new_tokens=0)  # fmt: skip
    assert none.p_value() is None
    assert none.different() in (None, False)
    silent = explain_vectors(model(), vectors(1), target=target(), read_layer=1, target_layers=[0], n_random=0,
                             scales=(1.0,), unit=1e-9, write="add", max_new_tokens=0)  # fmt: skip
    assert silent.different() is False
    assert "without a patch" in silent.reasons()[0]
    assert silent.text == silent.unpatched


def test_the_same_seed_gives_the_same_and_the_model_comes_back_untouched(untouched: Any) -> None:
    def run(seed: int) -> np.ndarray:
        found = explain_vectors(model(), vectors(1), target=target(), read_layer=1, target_layers=[0], seed=seed,
                                n_random=2, scales=(1.0,), max_new_tokens=2)  # fmt: skip
        return found.score

    with untouched(model()):
        first = run(1)
    assert (first == run(1)).all()
    assert (first[:1] == run(2)[:1]).all()
    assert (first[1:] != run(2)[1:]).all()


def test_features_of_every_kind_of_dictionary_are_their_decoder_rows() -> None:
    pair = bundled()
    dictionary = pair.dictionaries[1]
    rows = dictionary.decoder_rows(torch.tensor([7]), torch.float32)
    for layer, row in ((None, rows.sum(1)[0]), (dictionary.out_layers[0], rows[0, 0])):
        a = explain_feature(dictionary, 7, model=pair, layer=layer, n_random=0, scales=(1.0,), max_new_tokens=1)
        b = explain_vectors(pair.model, Vectors.of(row), n_random=0, scales=(1.0,), max_new_tokens=1)
        np.testing.assert_allclose(a.score, b.score, atol=1e-6)
    sae = cl.zoo.load_dictionaries("capitals", "sae-256")[0]
    a = explain_feature(sae, [3, 5], model=pair.model, n_random=0, scales=(1.0, 4.0))
    assert a.items == ("L1 #3", "L1 #5")
    assert len(a.texts) == 2
    assert a.best("L1 #5") == a.best(1) == a.best(-1)
    assert a.result.settings["max_new_tokens"] == 4


def test_defaults_are_the_early_half_read_late_and_the_words_of_the_bundled_model() -> None:
    found = explain_feature(bundled().dictionaries[0], 0, model=bundled(), n_random=1)
    assert found.result.target_layers == (-1, 0, 1)
    assert found.result.scales == SCALES
    assert found.read_layer == 3
    assert found.result.targets[0].count("[x]") == 1
    html = found._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 1
    assert len(found.rows()) == 18


class Words:
    """A tokenizer of words and signs that knows them all; 1 and 2 stand around a chat's message."""

    unk_token_id = None

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template, self.known = chat_template, ["", "<user>", "<model>"]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        parts = re.findall(r"\w+| ?\W", text)
        self.known += [part for part in dict.fromkeys(parts) if part not in self.known]
        return {"input_ids": [self.known.index(part) for part in parts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.known[i] for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [1, *self(messages[0]["content"])["input_ids"], 2]


@pytest.mark.parametrize("chat", [True, False])
def test_the_question_is_asked_where_the_words_are_known_and_as_a_chat_where_there_is_a_template(
    chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_target(bundled().model) == presets.self_explanation("words")
    tokenizer = Words("{{ messages }}" if chat else None)
    monkeypatch.setattr(bundled().model, "tokenizer", tokenizer)
    monkeypatch.setattr(
        bundled().model, "to_tokens", lambda text, truncate=False: torch.tensor([tokenizer(text)["input_ids"]])
    )
    asked = default_target(bundled().model)
    placed = asked.place(bundled().model)
    assert len(placed.positions) == 2
    assert placed.text.endswith('The meaning of the word "[X]" is "')
    assert (asked == presets.self_explanation("question")) is not chat
    assert (int(placed.tokens[0]) == 1) is chat


def test_what_cannot_be_explained_says_what_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bundled()
    d = pair.dictionaries[0]
    monkeypatch.setattr(model(), "tokenizer", None)
    with pytest.raises(PatchscopeError, match=r"no tokenizer.*token ids"):
        explain_vectors(model(), vectors(1))
    with pytest.raises(PatchscopeError, match="residual stream has width"):
        explain_feature(d, 0, model=model(), target=target())
    with pytest.raises(PatchscopeError, match="valid are 0 to"):
        explain_feature(d, d.d_sae, model=pair)
    with pytest.raises(PatchscopeError, match="is no model"):
        explain_feature(d, 0, model="capitals")
    with pytest.raises(PatchscopeError, match="not below read_layer=1"):
        explain_feature(d, 0, model=pair, target_layers="all", read_layer=1)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"scales": ()}, "scales"), ({"scales": (0.0,)}, "scales"), ({"scales": (float("nan"),)}, "scales"),
        ({"alpha": 1.5}, "alpha"), ({"n_random": -1}, "n_random"), ({"unit": 0.0}, "unit"),
        ({"unit": {0: 1.0}}, "unit"),
        ({"target_layers": 9}, "target layer 9"), ({"read_layer": 9}, "9"),
    )  # fmt: skip
    for bad, match in wrong:
        with pytest.raises(PatchscopeError, match=match):
            explain_feature(d, 0, model=pair, **bad)
    with pytest.raises(PatchscopeError, match="no direction"):
        explain_vectors(pair, Vectors.of(torch.zeros(pair.model.cfg.d_model)))
    with pytest.raises(PatchscopeError, match="without_layers"):
        explain_vectors(pair, Vectors.from_prompts(pair.model, cl.At("Dallas is in")))
    with pytest.raises(TokensError, match="does not know"):
        explain_feature(d, 0, model=pair, target="Whatsoever x")
    with pytest.raises(PatchscopeError, match="give unit="):
        explain_feature(d, 0, model=pair, target=Target("x", at="x"), target_layers=[0])
    found = explain_feature(d, 0, model=pair, n_random=2, scales=(1.0,), target_layers=[0])
    for item in (1, -2, "random 0", "L9 #9"):
        with pytest.raises(PatchscopeError, match="there are 1"):
            found.best(item)


def test_an_index_of_any_library_is_taken_and_scales_and_numbers_that_are_none_are_refused() -> None:
    pair = bundled()
    options: dict[str, Any] = {"model": pair, "n_random": 1, "scales": 1.0, "max_new_tokens": 1, "target_layers": 0}
    found = [unwrap(explain_feature)(pair.dictionaries[0], i, **options).texts for i in (3, np.int64(3), [3])]
    assert len(set(found)) == 1
    bad: list[tuple[dict[str, Any], str]] = [
        ({"scales": "1,2"}, "scales='1,2' is not valid; give a number"),
        ({"alpha": None}, "alpha=None is not valid"),
        ({"n_random": 1.5}, "n_random=1.5 is not valid; give a whole number"),
        ({"read_layer": "last"}, "read_layer='last' is not valid"),
    ]
    for given, words in bad:
        with pytest.raises(PatchscopeError, match=words):
            unwrap(explain_vectors)(model(), vectors(1), target=target(), **given)

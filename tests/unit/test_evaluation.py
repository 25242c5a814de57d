"""Parts of an evaluation: rows and masks, standard errors, thresholds and scales of twins, forms of the result."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuit_lens.dictionaries.binding import bind
from circuit_lens.errors import TokensError
from circuit_lens.evaluation.evaluate import evaluate
from circuit_lens.evaluation.figures import Evaluation
from circuit_lens.evaluation.rows import read_text
from circuit_lens.evaluation.sums import Estimate, FiringSums, FitSums, Moments, RowSums
from circuit_lens.evaluation.twins import Encoder, ScaleSums
from tests import builders
from tests.invariants.cases import model

# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.long), "no rows to evaluate on"),
        ([], "no rows to evaluate on"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0: the prompt is empty"),
        (["the state", ""], "row 1: the prompt is empty"),
        (torch.tensor([[4], [5]]), "row 0 has one token, so nothing is predicted"),
        ([[4, 5, 6], [7]], "row 1 has one token"),
        (torch.tensor([[4, 5, 64]]), "row 0: token id 64 is outside the vocabulary of 64 tokens"),
        (torch.tensor([[4, 5], [5, -1]]), "row 1: token id -1 is outside"),
        (torch.tensor([[4.0, 5.0]]), "row 0: token ids must be integers"),
        (torch.zeros(1, 65, dtype=torch.long), "row 0: the prompt has 65 tokens, the model's context holds 64"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"token ids have shape \(1, 2, 3\)"),
        (["the Dalas"], "row 0: the tokenizer does not know 'Dalas'"),
        (torch.tensor([[4, 5], [6, 7]]), "no prediction counts in 2 row"),
        (torch.tensor([[0, 5, 2, 6, 1]]), "no prediction counts"),
    ],
)
def test_tokens_that_cannot_be_used_are_named(tokens: Any, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        read_text(model("gpt2"), tokens, mask=None, keep_special=True)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones(2, 4),
        [[True] * 4],
        [[True] * 4, [True] * 3],
        [],
    ],
)
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(TokensError, match="mask must hold True or False for every token: 2 row"):
        read_text(model("gpt2"), builders.random_tokens(4, batch=2), mask=mask, keep_special=True)


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    alternating = torch.tensor([[True, False, True, False]])
    with pytest.raises(TokensError, match="mask leaves none"):
        read_text(model("gpt2"), builders.random_tokens(4), mask=alternating, keep_special=True)
    pair = torch.tensor([[True, True, False, False]])
    text = read_text(model("gpt2"), builders.random_tokens(4), mask=pair, keep_special=True)
    assert (text.n_tokens, text.n_predictions) == (2, 1)


def test_special_positions_are_the_first_and_those_of_the_tokenizer() -> None:
    text = read_text(model("gpt2"), torch.tensor([[5, 6, 1, 0, 7, 3, 2]]), mask=None, keep_special=True)
    assert text.counted[0].tolist() == [False, True, False, False, True, True, False]
    assert text.kept[0].tolist() == [True, False, True, True, False, False, True]
    assert not read_text(model("gpt2"), torch.tensor([[5, 6, 7]]), mask=None, keep_special=False).kept[0].any()


def test_batches_hold_every_row_once_and_one_length_each() -> None:
    rows = [builders.random_tokens(n, seed=i)[0] for i, n in enumerate((5, 7, 5, 5, 7, 3))]
    text = read_text(model("gpt2"), rows, mask=None, keep_special=True)
    for size in (None, 1, 2, 6):
        batches = text.batches(size, 64)
        assert sorted(i for batch in batches for i in batch) == list(range(6))
        assert all(len({len(rows[i]) for i in batch}) == 1 for batch in batches)
        assert max(map(len, batches)) == {None: 3, 1: 1, 2: 2, 6: 3}[size]
    assert max(map(len, text.batches(None, 2**25))) == 1
    (batch,) = text.take([[1, 4]])
    assert torch.equal(batch.tokens, torch.stack([rows[1], rows[4]]))


# ------------------------------------------------------------------------------------------------------------ sums


def test_sums_in_parts_are_those_of_all_at_once() -> None:
    rng = torch.Generator().manual_seed(0)
    y, y_hat, acts = (torch.randn(30, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    moments, fit, firing = Moments(), FitSums(), FiringSums()
    for part in torch.arange(30).split(7):
        moments.add(y[part])
        fit.add(y[part], y_hat[part])
        firing.add(acts[part].relu())
    assert torch.allclose(moments.mean, y.mean(0), atol=1e-14)
    assert moments.spread == pytest.approx(float((y - y.mean(0)).square().sum()), rel=1e-12)
    assert fit.error == pytest.approx(float((y - y_hat).square().sum()), rel=1e-12)
    assert fit.cosine / fit.n == pytest.approx(float(torch.cosine_similarity(y, y_hat, dim=1).mean()), rel=1e-12)
    assert torch.equal(firing.fired, (acts > 0).sum(0))


def test_standard_errors_are_the_spread_of_ratios_over_resampled_rows() -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(5, 40, 400).astype(float)
    clean = n * rng.normal(2.0, 0.3, 400)
    zero, own = n * rng.normal(1.0, 0.4, 400), n * rng.normal(0.1, 0.05, 400)
    table = torch.tensor(np.stack([n, clean, zero, own], 1))
    forms = {
        "loss": ({"clean": 1.0, "own": 1.0}, {"n": 1.0}),
        "added": ({"own": 1.0}, {"n": 1.0}),
        "recovered": ({"zero": 1.0, "own": -1.0}, {"zero": 1.0}),
    }
    sums = RowSums(["n", "clean", "zero", "own"])
    for part in table.split(64):
        sums.add(part)
    draws = rng.integers(0, 400, (1000, 400))
    totals = dict(zip(sums.index, np.stack([n, clean, zero, own])[:, draws].sum(2), strict=True))
    for above, below in forms.values():
        top, bottom = (sum(f * totals[k] for k, f in form.items()) for form in (above, below))
        spread = float(np.std(np.asarray(top) / np.asarray(bottom)))
        found = sums.ratio(above, below)
        assert found.error == pytest.approx(spread, rel=0.1)
    assert sums.ratio({"own": 1.0}, {"n": 1.0}).value == pytest.approx(own.sum() / n.sum(), rel=1e-12)


def test_rows_without_predictions_say_nothing_and_few_rows_give_no_error() -> None:
    table = torch.tensor([[4.0, 8.0], [2.0, 5.0], [0.0, 0.0], [3.0, 5.0], [1.0, 3.0]], dtype=torch.float64)
    sums = RowSums(["n", "clean"])
    sums.add(table)
    assert sums.n_rows == 4
    few = sums.ratio({"clean": 1.0}, {"n": 1.0})
    assert few.value == pytest.approx(2.1)
    assert math.isnan(few.error)
    sums.add(table[:1])
    assert sums.ratio({"clean": 1.0}, {"n": 1.0}).error > 0
    assert math.isnan(sums.ratio({"n": 1.0}, {"clean": 0.0}).value)


# ----------------------------------------------------------------------------------------------------------- twins


def encoder(d_sae: int, x: Tensor) -> Encoder:
    found = Encoder(x.shape[1], d_sae, torch.Generator().manual_seed(0), x[0, 0])
    for step in (found.observe, None, found.count):
        if step is None:
            found.standardise()
            continue
        for part in x.split(50):
            step(part)
    return found


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.02, 0.3, 0.9, 1.0])
def test_the_cut_gives_the_wanted_number_of_activations_whatever_is_read(share: float) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(300, 8, generator=rng, dtype=torch.float64).exp() * torch.logspace(-3, 3, 8, dtype=torch.float64)
    found = encoder(40, x + 100.0)
    wanted = round(share * 300 * 40)
    found.choose(wanted)
    pre = (x + 100.0) @ found.W - found.mean
    active = int((found.acts(pre) != 0).sum())
    assert active == pytest.approx(wanted, abs=3)
    found.cut -= 1.5
    assert share in (0.0, 1.0) or int((found.acts(pre) != 0).sum()) > active


def test_a_scale_is_the_least_squares_one() -> None:
    rng = torch.Generator().manual_seed(0)
    r, noise = (torch.randn(200, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    target = 3.0 * r + noise + torch.arange(6.0, dtype=torch.float64)
    sums = ScaleSums()
    for part in torch.arange(200).split(30):
        sums.add(r[part], target[part])
    scale, constant = sums.solve()
    design = torch.cat([r.flatten()[:, None], torch.eye(6, dtype=torch.float64).repeat(200, 1)], 1)
    wanted = torch.linalg.lstsq(design, target.flatten()[:, None]).solution[:, 0]
    assert scale == pytest.approx(float(wanted[0]), rel=1e-10)
    assert torch.allclose(constant, wanted[1:], atol=1e-10)
    still = ScaleSums()
    still.add(torch.ones(5, 6, dtype=torch.float64), target[:5])
    assert still.solve()[0] == 0.0
    assert torch.allclose(still.solve()[1], target[:5].mean(0))


# ----------------------------------------------------------------------------------------------------------- forms


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    shared = model("gpt2")
    return evaluate(bind(shared, builders.transcoders(shared)), builders.random_tokens(9, batch=6), progress=False)


def test_the_text_has_every_output_and_fits_a_terminal(evaluation: Evaluation) -> None:
    text = str(evaluation)
    assert max(map(len, text.splitlines())) <= 100
    for output in evaluation.outputs:
        assert text.count(output.hook) == 3
        assert f"{output.explained_variance:.3f}" in text
    assert f"{evaluation.loss:.3f}" in text
    assert "random" in text
    lean = dataclasses.replace(evaluation, baselines={})
    assert "random" not in str(lean)
    html = evaluation._repr_html_()
    assert html.count("<table>") == 3
    assert all(output.hook in html for output in evaluation.outputs)


def test_what_ablation_does_not_cost_cannot_be_recovered(evaluation: Evaluation) -> None:
    cheap = dataclasses.replace(evaluation.zero, added=Estimate(-0.1, 0.01))
    costly = dataclasses.replace(evaluation.zero, added=Estimate(0.1, 0.01))
    last = [
        next(line for line in str(dataclasses.replace(evaluation, zero=zero)).splitlines() if line.startswith("  all "))
        for zero in (cheap, costly)
    ]
    assert "–" in last[0]
    assert "%" in last[1]


def test_json_holds_every_figure_and_no_nan(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    output = evaluation.outputs[1]
    found = data["outputs"][1]
    assert found["hook"] == output.hook
    assert found["own"]["l0"] == output.l0
    assert output.alone is not None
    assert found["own"]["alone"]["kl"]["value"] == output.alone.kl.value
    assert found["baselines"]["random"]["explained_variance"] == output.baselines["random"].explained_variance
    assert data["replaced"]["recovered_zero"]["value"] == evaluation.replaced.recovered_zero.value
    gone = dataclasses.replace(evaluation, loss=Estimate(float("nan")))
    assert gone.to_json()["loss"] == {"value": None, "error": None}


def test_the_frame_has_a_row_for_everything_that_ran(evaluation: Evaluation) -> None:
    pytest.importorskip("pandas")
    frame = evaluation.to_frame()
    assert len(frame) == 3 * 5 + 6
    own = frame[(frame.output == evaluation.outputs[0].hook) & (frame.dictionary == "own")].iloc[0]
    assert own.l0 == evaluation.outputs[0].l0
    whole = frame[(frame.output == "all") & (frame.dictionary == "own")].iloc[0]
    assert whole.added == evaluation.replaced.added.value
    assert whole.added_error == evaluation.replaced.added.error


def test_an_output_is_found_by_its_hook(evaluation: Evaluation) -> None:
    assert evaluation["blocks.1.hook_mlp_out"] is evaluation.outputs[1]
    with pytest.raises(KeyError, match=r"blocks\.1\.mlp_out.*nearest.*blocks\.1\.hook_mlp_out"):
        evaluation["blocks.1.mlp_out"]
    quantiles = evaluation.outputs[0].own.density
    assert list(quantiles) == sorted(quantiles)
    assert 0 < quantiles[0] <= quantiles[-1] <= 1


def test_progress_is_shown_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    binding = bind(model("gpt2"), builders.transcoders(model("gpt2"), layers=[1]))
    tokens = builders.random_tokens(4, batch=2)
    evaluate(binding, tokens, baselines=False, progress=False)
    assert capsys.readouterr().err == ""
    evaluate(binding, tokens, baselines=False, progress=True)
    assert "evaluating" in capsys.readouterr().err

"""Every measure against its definition; batches, errors, and what has no answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics import Metric

from lightning_influence import metrics
from tests.reference import measures

EXACT = 1e-12  # float64 on both sides
Q, N, M = 7, 30, 12


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES, SUBSETS, TRUTH = drawn(Q, N, seed=0), drawn(M, N, seed=1) > 0, drawn(M, Q, seed=2)
SOURCES = drawn(Q, N, seed=3) > 1
SOURCES[:, 0] |= ~SOURCES.any(1)  # at least one each
INDICES = torch.arange(0, N, 3)[:M]
SINGLES, EFFECTS = torch.nn.functional.one_hot(INDICES, N).bool(), drawn(len(INDICES), Q, seed=4)
MARGINS, BASELINE = drawn(Q, 3, seed=5), drawn(Q, seed=6)
RUNS = drawn(3, Q, N, seed=7)
SUSPICION, WRONG = drawn(Q * 5, seed=8) * 1e4, drawn(Q * 5, seed=9) > 0.5

# the function, its arguments, the metric class, and along which dimension each argument is cut into batches
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], Callable[[], Metric], tuple[int | None, ...]]] = {
    "LDS": (
        metrics.linear_datamodeling_score,
        (SCORES, SUBSETS, TRUTH),
        metrics.LinearDatamodelingScore,
        (0, None, 1),
    ),
    "leave one out": (
        metrics.leave_one_out_correlation,
        (SCORES, INDICES, EFFECTS),
        metrics.LeaveOneOutCorrelation,
        (0, None, 1),
    ),
    "leave k out": (
        metrics.leave_k_out_correlation,
        (SCORES, SUBSETS, TRUTH),
        metrics.LeaveKOutCorrelation,
        (0, None, 1),
    ),
    "recall": (
        lambda *a: metrics.recall_at_k(*a, k=4),
        (SCORES, SOURCES),
        lambda: metrics.RecallAtK(4),
        (0, 0),
    ),
    "MRR": (metrics.mean_reciprocal_rank, (SCORES, SOURCES), metrics.MeanReciprocalRank, (0, 0)),
    "AUROC": (metrics.mislabel_auroc, (SUSPICION, WRONG), metrics.MislabelAUROC, (0, 0)),
    "stability": (metrics.rank_stability, (RUNS,), metrics.RankStability, (1,)),
    "brittleness": (metrics.brittleness, (MARGINS, BASELINE), lambda: metrics.Brittleness(3), (0, 0)),
}
EXPECTED: dict[str, Callable[[], Any]] = {
    "LDS": lambda: measures.linear_datamodeling_score(SCORES, SUBSETS, TRUTH),
    "leave one out": lambda: measures.leave_k_out_correlation(SCORES, SINGLES, EFFECTS, "spearman"),
    "leave k out": lambda: measures.leave_k_out_correlation(SCORES, SUBSETS, TRUTH, "spearman"),
    "recall": lambda: measures.recall_at_k(SCORES, SOURCES, 4),
    "MRR": lambda: measures.mean_reciprocal_rank(SCORES, SOURCES),
    "AUROC": lambda: measures.mislabel_auroc(SUSPICION, WRONG),
    "stability": lambda: measures.rank_stability(RUNS),
    "brittleness": lambda: measures.brittleness(MARGINS, BASELINE),
}


def in_batches(name: str, count: int) -> list[tuple[Any, ...]]:
    """A case's arguments, cut into batches of queries."""
    _, arguments, _, dims = CASES[name]
    parts = [
        [argument] * count if dim is None else argument.tensor_split(count, dim)
        for argument, dim in zip(arguments, dims, strict=True)
    ]
    return list(zip(*parts, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_the_definition(name: str) -> None:
    function, arguments, _, _ = CASES[name]
    tolerance = 1e-6 if name == "AUROC" else EXACT  # torchmetrics computes the area in float32
    assert function(*arguments).tolist() == pytest.approx(EXPECTED[name](), abs=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, Q])
def test_the_class_adds_up_batches(name: str, count: int) -> None:
    function, arguments, make, _ = CASES[name]
    metric = make()
    for batch in in_batches(name, count):
        metric.update(*batch)
    expected = function(*arguments).tolist()
    assert metric.compute().tolist() == pytest.approx(expected, abs=1e-6)  # the lists are float32
    metric.reset()
    metric.update(*arguments)
    assert metric.compute().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_call_gives_the_batch_and_adds_it(name: str) -> None:
    function, arguments, make, _ = CASES[name]
    metric = make()
    for batch in in_batches(name, 3):
        expected = function(*batch).tolist()
        assert metric(*batch).tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert metric.compute().tolist() == pytest.approx(function(*arguments).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["LDS", "leave one out", "leave k out", "recall", "MRR", "AUROC", "stability"])
def test_only_the_order_of_scores_matters(name: str) -> None:
    function, (scores, *others), _, _ = CASES[name]
    if name in ("LDS", "leave k out"):  # sums are not invariant, but to scale and shift of everything
        others[0] = others[0].clone().fill_(False).scatter_(1, torch.arange(M)[:, None], True)
    scores = scores / scores.abs().max()
    assert function(scores.exp(), *others).tolist() == pytest.approx(function(scores, *others).tolist(), abs=1e-9)


def test_pearson_is_of_the_effects_themselves() -> None:
    found = metrics.leave_k_out_correlation(SCORES, SUBSETS, TRUTH, correlation="pearson")
    assert float(found) == pytest.approx(
        measures.leave_k_out_correlation(SCORES, SUBSETS, TRUTH, "pearson"), abs=EXACT
    )
    metric = metrics.LeaveKOutCorrelation(correlation="pearson")
    metric.update(SCORES, SUBSETS, TRUTH)
    assert float(metric.compute()) == pytest.approx(float(found), abs=EXACT)


def test_perfect_scores_have_every_score_of_one() -> None:
    truth = SUBSETS.double() @ SCORES.T
    assert float(metrics.linear_datamodeling_score(SCORES, SUBSETS, truth)) == pytest.approx(1, abs=EXACT)
    assert float(metrics.linear_datamodeling_score(-SCORES, SUBSETS, truth)) == pytest.approx(-1, abs=EXACT)
    assert float(metrics.leave_k_out_correlation(SCORES, SUBSETS, -truth)) == pytest.approx(1, abs=EXACT)


# --- ranks -----------------------------------------------------------------------------------------


def test_ranks_are_scipys() -> None:
    values = drawn(4, 25, seed=11).mul(2).round()  # many ties
    assert metrics.average_ranks(values).numpy() == pytest.approx(rankdata(values.numpy(), axis=-1))


def test_counts_are_copies() -> None:
    values, others = drawn(4, 9, seed=14).mul(2).round(), drawn(4, 9, seed=15)
    counts = torch.tensor([2, 0, 1, 1, 3, 0, 0, 1, 1])
    copies = torch.arange(9).repeat_interleave(counts)
    found = metrics.SortedRows(values).ranks(counts)
    torch.testing.assert_close(found[:, copies], metrics.average_ranks(values[:, copies]))
    torch.testing.assert_close(
        metrics.row_correlations(values, others, counts),
        metrics.row_correlations(values[:, copies], others[:, copies]),
    )


def test_bootstrap_is_of_copies() -> None:
    truth, predicted = drawn(Q, M, seed=16).round(), drawn(2, Q, M, seed=17)
    found = metrics.bootstrap_rank_correlations([predicted], truth, num_bootstraps=5, seed=3)[0]
    generator = torch.Generator().manual_seed(3)
    for score in found:
        subsets = torch.randint(M, (M,), generator=generator)
        queries = torch.randint(Q, (Q,), generator=generator)
        each = metrics.rank_correlations(predicted[..., subsets], truth[:, subsets])
        assert float(score) == pytest.approx(float(each[:, queries].nanmean()), abs=EXACT)


def test_rows_are_broadcast() -> None:
    many, one = drawn(3, 4, 9, seed=12), drawn(4, 9, seed=13)
    found = metrics.rank_correlations(many, one)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found[2], metrics.rank_correlations(many[2], one))


def test_what_has_no_order_does_not_count_and_what_says_nothing_scores_zero() -> None:
    truth = TRUTH.clone()
    truth[:, 0] = 3.0
    kept = metrics.linear_datamodeling_score(SCORES[1:], SUBSETS, TRUTH[:, 1:])
    assert float(metrics.linear_datamodeling_score(SCORES, SUBSETS, truth)) == pytest.approx(
        float(kept), abs=EXACT
    )
    metric = metrics.LinearDatamodelingScore()
    metric.update(SCORES, SUBSETS, truth)
    assert float(metric.compute()) == pytest.approx(float(kept), abs=1e-6)
    silent = torch.cat([torch.zeros(1, N).double(), SCORES[1:]])
    expected = float(kept) * (Q - 1) / Q
    assert float(metrics.linear_datamodeling_score(silent, SUBSETS, TRUTH)) == pytest.approx(expected, abs=EXACT)


# --- retrieval, detection, brittleness ---------------------------------------------------------------


def test_ties_are_broken_against_the_sources() -> None:
    sources = torch.tensor([[True, False, False, False]])
    constant = torch.ones(1, 4)
    assert float(metrics.recall_at_k(constant, sources, k=3)) == 0
    assert float(metrics.mean_reciprocal_rank(constant, sources)) == 0.25


def test_rows_that_are_missing_come_last() -> None:
    scores = torch.tensor([[torch.nan, -5.0, 1.0]])
    assert float(metrics.mean_reciprocal_rank(scores, torch.tensor([[True, False, False]]))) == pytest.approx(
        1 / 3
    )


def test_queries_without_sources_do_not_count() -> None:
    sources = SOURCES.clone()
    sources[0] = False
    assert float(metrics.recall_at_k(SCORES, sources, 4)) == pytest.approx(
        measures.recall_at_k(SCORES[1:], SOURCES[1:], 4)
    )
    assert float(metrics.mean_reciprocal_rank(SCORES, sources)) == pytest.approx(
        measures.mean_reciprocal_rank(SCORES[1:], SOURCES[1:])
    )
    assert math.isnan(metrics.recall_at_k(SCORES, torch.zeros_like(SOURCES), 4))


def test_large_self_influences_stay_apart() -> None:  # torchmetrics alone makes them all 1.0
    suspicion = torch.tensor([5e3, 4e3, 3e3, 2e3])
    assert float(metrics.mislabel_auroc(suspicion, torch.tensor([True, False, True, False]))) == 0.75


def test_examples_without_a_row_are_not_suspected() -> None:
    suspicion, wrong = SUSPICION.clone(), WRONG.clone()
    suspicion[:4] = torch.nan
    expected = measures.mislabel_auroc(suspicion[4:], wrong[4:])
    assert float(metrics.mislabel_auroc(suspicion, wrong)) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(metrics.mislabel_auroc(suspicion, torch.zeros_like(wrong)))


def test_data_support_is_the_first_flip() -> None:
    margins = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
    found = metrics.data_support(margins, torch.tensor([1.0, 1.0, 1.0, -1.0]), [5, 10, 20])
    assert found[:3].tolist() == [10, math.inf, 5]
    assert math.isnan(found[3])


# --- the bootstrap and the truth's own noise ---------------------------------------------------------


def error_over_spread(noise: Callable[[int], Tensor]) -> float:
    """The bootstrap's standard error over the spread of scores of fresh samples of 20 queries and 40 subsets."""

    def sample(seed: int) -> tuple[Tensor, Tensor]:
        truth = drawn(20, 40, seed=seed)
        return truth * noise(seed) + 2 * drawn(20, 40, seed=seed + 1000), truth

    fresh = torch.stack([metrics.rank_correlations(*sample(seed)).mean() for seed in range(200)])
    errors = [
        metrics.bootstrap_rank_correlations([predicted], truth, num_bootstraps=100).std()
        for predicted, truth in map(sample, range(10))
    ]
    return float(torch.stack(errors).mean() / fresh.std())


def test_bootstrap_error_is_the_spread_of_new_queries() -> None:
    ratio = error_over_spread(lambda seed: 20 * drawn(20, 1, seed=seed + 2000).sign())  # good or bad by the query
    assert ratio == pytest.approx(1, abs=0.15)  # 200 samples know their spread to 5 %, 10 errors their mean to 5 %


def test_bootstrap_error_is_on_the_safe_side_of_independent_noise() -> None:
    assert error_over_spread(lambda seed: torch.ones(())) == pytest.approx(3**0.5, abs=0.2)  # Owen & Eckles 2012


def test_bootstrap_is_paired_and_repeatable() -> None:
    truth = drawn(Q, M, seed=20)
    predicted = truth + drawn(Q, M, seed=21)
    both = metrics.bootstrap_rank_correlations([predicted, predicted * 3], truth, num_bootstraps=20)
    assert torch.equal(both[0], both[1])  # the same draws
    again = metrics.bootstrap_rank_correlations([torch.stack([predicted] * 2)], truth, num_bootstraps=20)
    torch.testing.assert_close(again[0], both[0])
    other = metrics.bootstrap_rank_correlations([predicted], truth, num_bootstraps=20, seed=1)
    assert not torch.equal(other[0], both[0])


def test_the_class_reports_its_error() -> None:
    metric = metrics.LinearDatamodelingScore(num_bootstraps=30).set_dtype(torch.float64)
    for batch in in_batches("LDS", 3):
        metric.update(*batch)
    found = metric.compute()
    predictions = metrics.subset_predictions(SCORES, SUBSETS)
    drawn_scores = metrics.bootstrap_rank_correlations([predictions], TRUTH.T, num_bootstraps=30)
    assert float(found["standard_error"]) == pytest.approx(float(drawn_scores.std()))
    assert float(found["lds"]) == pytest.approx(EXPECTED["LDS"]())


def test_reliability_foretells_the_agreement_of_two_truths() -> None:
    signal = drawn(200, 1, 8, seed=30)
    one, two = (signal + drawn(200, 4, 8, seed=seed) for seed in (31, 32))
    agreement = float(metrics.rank_correlations(one.mean(1).T, two.mean(1).T).mean())
    assert metrics.split_half_reliability(one) == pytest.approx(agreement, abs=0.03)  # 8 queries of 200
    assert math.isnan(metrics.split_half_reliability(one[:, :1]))


def test_reliability_is_the_formula_of_spearman_and_brown() -> None:
    outputs = drawn(20, 2, 3, seed=33)
    r = float(metrics.rank_correlations(outputs[:, 0].T, outputs[:, 1].T).mean())
    assert metrics.split_half_reliability(outputs) == pytest.approx(measures.spearman_brown(r, 2))


# --- errors ------------------------------------------------------------------------------------------

NAN = SCORES.clone()
NAN[2, 3] = torch.nan
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scores without queries": (
        lambda: metrics.linear_datamodeling_score(SCORES[0], SUBSETS, TRUTH),
        r"`scores` must have shape \[q, N\], got \[30\]",
    ),
    "NaN scores": (
        lambda: metrics.linear_datamodeling_score(NAN, SUBSETS, TRUTH),
        r"`scores`: 1 of 210 values are not finite; examples without a valid row have NaN",
    ),
    "indices for a mask": (
        lambda: metrics.linear_datamodeling_score(SCORES, SUBSETS.long(), TRUTH),
        r"`subsets` must be a boolean mask \[m, N\], got torch.int64",
    ),
    "other examples": (
        lambda: metrics.linear_datamodeling_score(SCORES, SUBSETS[:, 1:], TRUTH),
        r"`subsets` must have shape \[m, 30\], got \[12, 29\]",
    ),
    "transposed truth": (
        lambda: metrics.linear_datamodeling_score(SCORES, SUBSETS, TRUTH.T),
        r"`truth` must have shape \[12, 7\], got \[7, 12\]",
    ),
    "a failed model": (
        lambda: metrics.linear_datamodeling_score(SCORES, SUBSETS, TRUTH / 0),
        r"`truth`: 84 of 84 values are not finite",
    ),
    "one subset": (
        lambda: metrics.linear_datamodeling_score(SCORES, SUBSETS[:1], TRUTH[:1]),
        "`subsets` must hold at least two groups",
    ),
    "other subsets": (
        lambda: _updated_twice(),
        "`subsets` must be the same in each update: 12, got 11",
    ),
    "nothing": (lambda: metrics.LinearDatamodelingScore().compute(), "No query was given"),
    "one draw": (lambda: metrics.LinearDatamodelingScore(num_bootstraps=1), "`num_bootstraps` must be 0 or at"),
    "no such correlation": (
        lambda: metrics.LeaveKOutCorrelation(correlation="kendall"),  # type: ignore[arg-type]
        "`correlation` must be",
    ),
    "a mask for indices": (
        lambda: metrics.leave_one_out_correlation(SCORES, SUBSETS[0], EFFECTS),
        r"`indices` must be integers \[m\], got torch.bool",
    ),
    "an index outside": (
        lambda: metrics.leave_one_out_correlation(SCORES, INDICES + N - 1, EFFECTS),
        r"`indices` must be from 0 to 29, got \[32",
    ),
    "no k": (lambda: metrics.RecallAtK(0), "`k` must be positive, got 0"),
    "sources as numbers": (
        lambda: metrics.recall_at_k(SCORES, SOURCES.long(), 1),
        r"`sources` must be a boolean mask \[q, N\]",
    ),
    "labels as numbers": (
        lambda: metrics.mislabel_auroc(SUSPICION, WRONG.long()),
        "`is_mislabelled` must be boolean",
    ),
    "one run": (lambda: metrics.rank_stability(RUNS[:1]), "`scores` must hold at least two runs"),
    "removals out of order": (
        lambda: metrics.data_support(MARGINS, BASELINE, [3, 2, 1]),
        "`removed` must be 3 increasing numbers",
    ),
}


def _updated_twice() -> None:
    metric = metrics.LinearDatamodelingScore()
    metric.update(SCORES, SUBSETS, TRUTH)
    metric.update(SCORES, SUBSETS[:11], TRUTH[:11])


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument_and_what_was_found(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_draws_in_which_no_output_has_an_order_are_left_out_of_the_error() -> None:
    """Of two subsets, every second draw has one of them twice."""
    scores, truth = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    metric = metrics.LinearDatamodelingScore(num_bootstraps=50)
    metric.update(scores, torch.eye(2).bool(), truth)
    found = metric.compute()
    assert (found["lds"], found["standard_error"]) == (1, 0)
    assert metrics.bootstrap_rank_correlations([scores], truth.T, num_bootstraps=50).isnan().any()
    with pytest.raises(ValueError, match="`num_bootstraps` must be at least 2, got 1"):
        metrics.bootstrap_rank_correlations([scores], truth.T, num_bootstraps=1)


def test_reliability_of_opposites_and_of_many_seeds() -> None:
    ranks = torch.arange(10.0)
    assert metrics.split_half_reliability(torch.stack([ranks, -ranks], 1)[..., None]) == -float("inf")
    signal, noise = drawn(300, 1, 2, seed=1), drawn(300, 24, 2, seed=2)
    assert metrics.split_half_reliability(signal + noise) == pytest.approx(24 / 25, abs=0.02)


def test_no_example_yet_is_nan() -> None:
    assert metrics.MislabelAUROC().compute().isnan()

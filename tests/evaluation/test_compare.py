"""The table of scores beside references, against SciPy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from lightning_influence.evaluation import compare
from tests.reference.models import random


def arrays() -> tuple[Tensor, Tensor]:
    scores = random(5, 12, seed=1).round(decimals=1)  # with ties
    return scores, scores + random(5, 12, seed=2)


def test_correlations_are_scipys_averaged_over_queries() -> None:
    scores, truth = arrays()
    row = compare({"ours": scores}, {"truth": truth})["ours", "truth"]
    pearson = torch.tensor([pearsonr(a, b)[0] for a, b in zip(scores, truth, strict=True)])
    spearman = torch.tensor([spearmanr(a, b)[0] for a, b in zip(scores, truth, strict=True)])
    assert row.pearson == pytest.approx(float(pearson.mean()))
    assert row.spearman == pytest.approx(float(spearman.mean()))
    assert row.spearman_error == pytest.approx(float(spearman.std() / 5**0.5))
    assert row.pooled == pytest.approx(pearsonr(scores.flatten(), truth.flatten())[0])
    assert (row.queries, row.pairs) == (5, 60)


def test_slope_predicts_the_reference_by_the_scores() -> None:
    scores, _ = arrays()
    assert compare(scores, {"double": 2 * scores}).rows[0].slope == pytest.approx(2)


def test_what_has_no_number_is_left_out_and_counted() -> None:
    scores, truth = arrays()
    scores[0, 3] = math.nan
    truth[1] = 0.0  # has no order
    row = compare(scores, {"truth": truth}).rows[0]
    assert (row.queries, row.pairs) == (4, 59)
    kept = torch.arange(12) != 3
    first = compare(scores[:1], {"truth": truth[:1]}).rows[0]
    assert first.pearson == pytest.approx(pearsonr(scores[0, kept], truth[0, kept])[0])
    assert math.isnan(first.pearson_error)


def test_every_method_meets_every_reference_and_arrays_stay() -> None:
    scores, truth = arrays()
    found = compare({"a": scores, "b": -scores}, {"x": truth, "y": scores})
    assert [(row.method, row.reference) for row in found.rows] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert found["b", "y"].spearman == pytest.approx(-1)
    assert str(found).count("\n") == 4
    assert found.scores["a"] is scores
    assert found.references["x"] is truth


def test_shapes_must_agree() -> None:
    scores, truth = arrays()
    with pytest.raises(ValueError, match=r"'truth' has \(5, 11\), not \(5, 12\)"):
        compare(scores, {"truth": truth[:, 1:]})


def test_scores_without_an_order_agree_with_nothing() -> None:
    """They count: else a method that is silent on hard queries would be compared on the easy ones."""
    scores, truth = arrays()
    scores[0] = 1.0
    row = compare(scores, {"truth": truth}).rows[0]
    others = [spearmanr(a, b)[0] for a, b in zip(scores[1:], truth[1:], strict=True)]
    assert row.spearman == pytest.approx(sum(others) / 5)
    assert row.queries == 5


def test_a_pair_that_was_not_compared_is_named() -> None:
    scores, truth = arrays()
    with pytest.raises(KeyError, match=r"there are .*'scores', 'truth'"):
        compare(scores, {"truth": truth})["ours", "truth"]

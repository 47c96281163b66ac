"""Covariances follow the convention of `functional.covariance`, whatever is padded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from lightning_influence.functional.covariance import add_covariance_sums, covariance
from lightning_influence.gradients import FactoredGradient, LayerGradient
from tests.reference.factors import covariances
from tests.reference.models import random

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few dozen terms in another order


def gradient(n: int, s: int, i: int = 5, o: int = 3) -> LayerGradient:
    return FactoredGradient(random(n, s, i, seed=1), random(n, s, o, seed=2))


@pytest.mark.parametrize(("n", "s"), [(1, 1), (7, 1), (4, 3)])
def test_covariance_equals_the_definition(n: int, s: int) -> None:
    A, S = covariance(gradient(n, s))
    A_expected, S_expected = covariances(gradient(n, s).inputs, gradient(n, s).output_grads)
    torch.testing.assert_close(A, A_expected, **EXACT)
    torch.testing.assert_close(S, S_expected, **EXACT)


def test_positions_without_gradient_count_in_neither_factor() -> None:
    whole = gradient(4, 3)
    whole.output_grads[0, 1] = 0
    whole.output_grads[3] = 0  # an example of which every position is ignored still counts as one in S
    A, S = covariance(whole)
    kept = (whole.output_grads != 0).any(-1)
    a, d = whole.inputs[kept], whole.output_grads[kept]
    torch.testing.assert_close(A, a.T @ a / 8, **EXACT)
    torch.testing.assert_close(S, d.T @ d / 4, **EXACT)


def test_padding_a_batch_further_changes_nothing() -> None:
    short = gradient(4, 2)
    padded_inputs = torch.cat([short.inputs, random(4, 3, 5, seed=9)], dim=1)  # padding embeds to something
    longer = FactoredGradient(padded_inputs, pad(short.output_grads, (0, 0, 0, 3)))
    for factor, expected in zip(covariance(longer), covariance(short), strict=True):
        torch.testing.assert_close(factor, expected, **EXACT)


def test_sums_are_added_in_place_and_positions_counted() -> None:
    A_sum, S_sum = torch.ones(5, 5, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    batch = gradient(4, 3)
    batch.output_grads[:, 2] = 0
    positions = add_covariance_sums(batch, A_sum, S_sum)
    A, S = covariance(batch)
    assert positions.dtype == torch.int64
    assert positions.item() == 8
    torch.testing.assert_close(A_sum, 1 + 8 * A, **EXACT)
    torch.testing.assert_close(S_sum, 4 * S, **EXACT)


def test_a_layer_without_any_gradient_has_zero_covariances() -> None:
    nothing = FactoredGradient(random(2, 3, 5), torch.zeros(2, 3, 3, dtype=torch.float64))
    A, S = covariance(nothing)
    assert not A.any()
    assert not S.any()


def test_covariances_are_symmetric() -> None:
    A, S = covariance(gradient(6, 2))
    torch.testing.assert_close(A, A.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(S, S.T, rtol=0, atol=1e-14)

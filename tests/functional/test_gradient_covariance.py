"""Covariances of whole gradients are those of the definition, in every form of gradient and structure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.functional.gradient_covariance import PROBES, GradientCovariance
from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient
from tests.reference.models import random

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # sums of a few hundred terms of order 1
STRUCTURES = {
    "full": FULL,
    "groups": KroneckerStructure(groups=2),
    "a table": KroneckerStructure(full_S=False),
    "diagonal A": KroneckerStructure(full_A=False),
    "diagonal A in groups": KroneckerStructure(groups=2, full_A=False),
}


def definition(G: Tensor, structure: KroneckerStructure, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A = E[G^T G] and S = E[G G^T] / E|G|^2 of gradients [n, o, i], one example and group after the other."""
    weights = torch.ones(len(G)) if weights is None else weights
    found = []
    for block in G.double().chunk(structure.groups, dim=1):
        A = sum(weight * g.T @ g for weight, g in zip(weights, block, strict=True)) / weights.sum()
        S = sum(weight * g @ g.T for weight, g in zip(weights, block, strict=True)) / weights.sum()
        S = S / S.trace()
        found.append((A if structure.full_A else A.diagonal(), S if structure.full_S else S.diagonal()))
    joined = [torch.stack(parts).float() for parts in zip(*found, strict=True)]
    return (joined[0], joined[1]) if structure.groups > 1 else (joined[0][0], joined[1][0])


def summed(gradient: LayerGradient, structure: KroneckerStructure = FULL) -> tuple[Tensor, Tensor]:
    covariance = GradientCovariance(gradient.shape, structure)
    covariance.add(gradient)
    return covariance.compute()


def pairs(n: int, s: int, i: int, o: int) -> FactoredGradient:
    return FactoredGradient(random(n, s, i, seed=1).float(), random(n, s, o, seed=2).float())


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_narrow_sides_are_those_of_the_definition(structure: KroneckerStructure) -> None:
    gradient = DenseGradient(random(9, 6, 5, seed=3).float())
    for found, expected in zip(summed(gradient, structure), definition(gradient.values, structure), strict=True):
        torch.testing.assert_close(found, expected, **FLOAT32)


@pytest.mark.parametrize("s", [1, 3])
def test_pairs_and_their_dense_gradients_agree(s: int) -> None:
    gradient = pairs(9, s, PROBES - 1, PROBES)
    for found, expected in zip(summed(gradient), definition(gradient.dense(), FULL), strict=True):
        torch.testing.assert_close(found, expected, **FLOAT32)


def test_one_position_is_exact_however_wide_the_layer_is() -> None:
    gradient = pairs(20, 1, 5 * PROBES, 3 * PROBES)
    for found, expected in zip(summed(gradient), definition(gradient.dense(), FULL), strict=True):
        torch.testing.assert_close(found, expected, **FLOAT32)


def test_batches_are_weighted_and_their_sizes_do_not_matter() -> None:
    gradient, weights = pairs(9, 1, 4, 3), torch.tensor([0.5] * 4 + [2.0] * 5)
    covariance = GradientCovariance(gradient.shape)
    for rows, weight in ((slice(0, 4), 0.5), (slice(4, 5), 2.0), (slice(5, 9), 2.0)):
        covariance.add(gradient[rows], weight)
    expected = definition(gradient.dense(), FULL, weights)
    for found, wanted in zip(covariance.compute(), expected, strict=True):
        torch.testing.assert_close(found, wanted, **FLOAT32)


@pytest.mark.parametrize("structure", [FULL, STRUCTURES["groups"]], ids=["full", "groups"])
def test_probes_of_wide_sides_estimate_the_definition_without_bias(structure: KroneckerStructure) -> None:
    o, i = 4 * PROBES, 3 * PROBES
    few = random(2, o, i, seed=4).float()
    expected = definition(few, structure)
    errors = []
    for copies in (30, 1920):  # 64 times as many probes: an eighth of the error
        found = summed(DenseGradient(few.repeat(copies, 1, 1)), structure)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    for few_probes, many_probes in zip(*errors, strict=True):
        assert many_probes < 0.05
        assert many_probes < few_probes / 4


def test_the_product_has_the_trace_of_the_fisher_block() -> None:
    gradient = pairs(9, 1, 4, 3)
    A, S = summed(gradient)
    expected = gradient.dense().square().sum((1, 2)).mean()
    torch.testing.assert_close(A.trace() * S.trace(), expected, **FLOAT32)


def test_a_layer_without_any_gradient_has_finite_covariances() -> None:
    for found in (*summed(DenseGradient(torch.zeros(3, 2, 2))), *GradientCovariance((2, 2)).compute()):
        assert not found.any()


def test_without_any_gradient_they_are_finite_with_float64_as_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for found in summed(DenseGradient(torch.zeros(3, 2, 2, dtype=torch.float32))):
            assert found.dtype == torch.float32
            assert not found.any()
    finally:
        torch.set_default_dtype(before)

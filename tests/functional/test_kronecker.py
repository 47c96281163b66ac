"""The eigenbasis is orthogonal, leads with what is largest, and rebuilds its factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.functional.kronecker import eigenbasis
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import FactoredGradient
from tests.reference.models import random

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, matrices of a few rows


def positive(size: int, rank: int, seed: int) -> Tensor:
    root = random(size, rank, seed=seed)
    return root @ root.T


A, S = positive(6, 6, 1), positive(4, 4, 2)


def test_eigenvectors_are_orthogonal() -> None:
    basis = eigenbasis(A, S)
    for Q in (basis.Q_A, basis.Q_S):
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64), **EXACT)


def test_eigenvalues_descend() -> None:
    basis = eigenbasis(A, S)
    assert bool((basis.eigenvalues_A.diff() <= 0).all())
    assert bool((basis.eigenvalues_S.diff() <= 0).all())


def test_basis_rebuilds_the_covariances() -> None:
    basis = eigenbasis(A, S)
    torch.testing.assert_close(basis.Q_A @ basis.eigenvalues_A.diag() @ basis.Q_A.T, A, **EXACT)
    torch.testing.assert_close(basis.Q_S @ basis.eigenvalues_S.diag() @ basis.Q_S.T, S, **EXACT)


def test_eigenvalues_of_singular_factors_are_never_negative() -> None:
    basis = eigenbasis(positive(20, 3, 5).float(), positive(9, 1, 6).float())
    assert bool((basis.eigenvalues_A >= 0).all())
    assert bool((basis.eigenvalues_S >= 0).all())


def test_float32_factors_are_decomposed_in_float64() -> None:
    single, double = eigenbasis(A.float(), S.float()), eigenbasis(A.float().double(), S.float().double())
    assert single.Q_A.dtype == torch.float32
    # nothing but the final rounding to float32 differs; entries are at most 1
    torch.testing.assert_close(single.Q_A.double(), double.Q_A, rtol=0, atol=6e-8)
    torch.testing.assert_close(single.eigenvalues_S.double(), double.eigenvalues_S, rtol=6e-8, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["A", "S"])
def test_non_finite_factors_are_refused_by_name(bad: float, which: str) -> None:
    factors = {"A": A.clone(), "S": S.clone()}
    factors[which][0, 1] = bad
    with pytest.raises(ValueError, match=f"covariance {which} of shape .* is not finite"):
        eigenbasis(factors["A"], factors["S"])


@pytest.mark.parametrize("s", [1, 3])
def test_rotation_is_the_published_one(s: int) -> None:
    gradient = FactoredGradient(random(5, s, 6, seed=3), random(5, s, 4, seed=4))
    basis = eigenbasis(A, S)
    expected = torch.stack([basis.Q_S.T @ G @ basis.Q_A for G in gradient.dense()])
    torch.testing.assert_close(basis.rotate(gradient), expected, **EXACT)


def test_rotating_back_restores_the_gradient() -> None:
    gradient = FactoredGradient(random(5, 3, 6, seed=3), random(5, 3, 4, seed=4))
    basis = eigenbasis(A, S)
    torch.testing.assert_close(basis.rotate_back(basis.rotate(gradient)), gradient.dense(), **EXACT)


def test_shape_is_that_of_a_gradient() -> None:
    assert eigenbasis(A, S).shape == (4, 6)


STRUCTURES = {
    "full": (A, S, KroneckerStructure()),
    "groups": (torch.stack([A, 2 * A.flip(0, 1)]), torch.stack([S[:2, :2], S[2:, 2:]]), KroneckerStructure(2)),
    "diagonal-inputs": (A.diagonal(), S, KroneckerStructure(full_A=False)),
    "diagonal-outputs": (A, S.diagonal(), KroneckerStructure(full_S=False)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_diagonal_is_what_the_matrix_gives_each_parameter(name: str) -> None:
    basis = eigenbasis(*STRUCTURES[name][:2], structure=STRUCTURES[name][2])
    Lambda = random(4, 6, seed=7).square()
    one_each = torch.eye(24, dtype=torch.float64).view(24, 4, 6)  # e
    expected = (basis.rotate_dense(one_each).square() * Lambda).sum((1, 2)).view(4, 6)  # e^T Q Lambda Q^T e
    torch.testing.assert_close(basis.diagonal(Lambda), expected, **EXACT)

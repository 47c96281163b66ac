"""Lambda's sums equal one example at a time, in one chunk or many."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import eigenbasis
from lightning_influence.gradients import FactoredGradient, LayerGradient, base
from tests.reference.factors import covariances, eigenvalue_correction, fisher_block, vec
from tests.reference.models import random

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few dozen terms in another order


def gradient(n: int, s: int) -> LayerGradient:
    return FactoredGradient(random(n, s, 5, seed=1), random(n, s, 3, seed=2))


@pytest.mark.parametrize("s", [1, 2, 6])
def test_second_moments_equal_the_reference(s: int) -> None:
    batch = gradient(9, s)
    basis = eigenbasis(*covariances(batch.inputs, batch.output_grads))
    expected = eigenvalue_correction(batch.dense(), basis.Q_A, basis.Q_S)
    torch.testing.assert_close(second_moment_sum(batch, basis) / 9, expected, **EXACT)


@pytest.mark.parametrize("s", [1, 3])
def test_second_moments_are_the_diagonal_of_the_rotated_fisher(s: int) -> None:
    batch = gradient(9, s)
    basis = eigenbasis(*covariances(batch.inputs, batch.output_grads))
    Q = torch.kron(basis.Q_A, basis.Q_S)
    rotated = Q.T @ fisher_block(batch.dense()) @ Q
    torch.testing.assert_close(vec(second_moment_sum(batch, basis)) / 9, rotated.diagonal(), **EXACT)


@pytest.mark.parametrize("chunk_elements", [1, 31, 15 * 4])  # of 15 coordinates: 1, 2 and 4 examples
def test_chunks_change_nothing(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = gradient(9, 4)
    basis = eigenbasis(*covariances(batch.inputs, batch.output_grads))
    whole = second_moment_sum(batch, basis)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", chunk_elements)
    torch.testing.assert_close(second_moment_sum(batch, basis), whole, **EXACT)


@pytest.mark.parametrize("s", [1, 3])
def test_no_example_adds_nothing(s: int) -> None:
    basis = eigenbasis(*covariances(gradient(9, s).inputs, gradient(9, s).output_grads))
    assert not second_moment_sum(gradient(9, s)[:0], basis).any()


@pytest.mark.parametrize(
    ("input_size", "grad_size"),
    [(1e12, 0.0), (1e12, 1e-12), (1e-12, 1e12), (1e17, 1e-17), (1e-40, 1.0), (0.0, 1.0)],
)
def test_an_example_of_another_scale_leaves_the_others_as_they_are(input_size: float, grad_size: float) -> None:
    """Float32 against float64, with one example of huge or tiny (also subnormal) inputs or gradients."""
    inputs, grads = random(9, 1, 5, seed=1).float(), random(9, 1, 3, seed=2).float()
    inputs[4] *= input_size
    grads[4] *= grad_size
    batch, exact = FactoredGradient(inputs, grads), FactoredGradient(inputs.double(), grads.double())
    A, S = covariances(random(9, 1, 5, seed=3), random(9, 1, 3, seed=4))
    basis = eigenbasis(A.float(), S.float())
    found = second_moment_sum(batch, basis)
    expected = eigenvalue_correction(exact.dense(), basis.Q_A.double(), basis.Q_S.double()) * 9
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_lambda_of_tiny_gradients_is_exact_as_far_as_float32_goes() -> None:
    """Squares of 1e-16 are normal numbers, though those of the inputs, 1e-30 each, are not."""
    inputs, grads = random(9, 1, 5, seed=1).float() * 1e-30, random(9, 1, 3, seed=2).float() * 1e14
    basis = eigenbasis(torch.eye(5), torch.eye(3))
    dense = grads.double().mT @ inputs.double()
    expected = basis.rotate_dense(dense.float()).double().square().sum(0)
    torch.testing.assert_close(
        second_moment_sum(FactoredGradient(inputs, grads), basis).double(), expected, rtol=1e-4, atol=0
    )

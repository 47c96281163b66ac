"""Minima near the start are found, also where there is no lowest value; nothing runs away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.evaluation.descent import FARTHEST, minimize_rows


def hill_gradient(x: Tensor, rows: Tensor) -> Tensor:
    """Of -x / 10 + x² / 2 - x³ / 3: a minimum at .1127, a maximum at .8873, and below all bounds behind it."""
    return -0.1 + x - x.square()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e3])
def test_a_long_first_step_does_not_leave_the_valley(scale: float) -> None:
    start = torch.zeros(2, 1, dtype=torch.float64)
    found = minimize_rows(hill_gradient, start, lambda g: scale * g, rtol=1e-8, maxiter=200)
    assert found.info.converged.all()
    torch.testing.assert_close(found.value, torch.full_like(start, (1 - 0.6**0.5) / 2), rtol=0, atol=1e-7)


def test_where_there_is_no_minimum_rows_stop_near_and_say_so() -> None:
    start = torch.zeros(1, 1, dtype=torch.float64)
    found = minimize_rows(lambda x, rows: -1 - x.square(), start, lambda g: 100 * g, rtol=1e-8, maxiter=200)
    assert not found.info.converged.any()
    assert 1 <= float(found.info.residual) <= FARTHEST
    assert found.value.isfinite().all()


def test_rows_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    H = roots @ roots.mT + torch.eye(12, dtype=torch.float64)
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)

    def gradients(x: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("kij,kj->ki", H[rows], x) - b[rows]

    found = minimize_rows(gradients, torch.zeros_like(b), lambda g: g, rtol=1e-10, maxiter=500)
    torch.testing.assert_close(found.value, torch.linalg.solve(H, b), rtol=1e-7, atol=1e-8)

"""Training again without an example: against the closed form of ridge regression, and an optimizer's own loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.evaluation import leave_one_out
from tests.reference.models import random
from tests.reference.ridge import fit_ridge, ridge_weights_without
from tests.solvers.problems import class_loss, classifier

DECAY = 0.05


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square() / 2


def test_ridge_regression_is_fitted_without_the_example() -> None:
    X, y = random(20, 3, seed=1), random(20, seed=2)
    model = nn.Linear(3, 1, bias=False).double()
    found = leave_one_out(
        model,
        [(X[:8], y[:8]), (X[8:], y[8:])],
        [4, 19],
        loss=half_square,
        weight_decay=DECAY,
        steps=300,
        learning_rate=0.05,
    )
    assert bool(found.info.converged.all())
    for row, index in enumerate([4, 19]):
        expected = ridge_weights_without(X, y[:, None], index, weight_decay=DECAY)[0]
        torch.testing.assert_close(found.parameters[row], expected, rtol=1e-3, atol=1e-4)
    expected = fit_ridge(X, y[:, None], weight_decay=DECAY)[0]
    torch.testing.assert_close(found.baseline, expected, rtol=1e-3, atol=1e-4)


def test_each_run_is_the_plain_loops() -> None:
    problem = classifier()
    found = leave_one_out(problem.model, problem.train(7), [3], loss=class_loss, weight_decay=0.01, steps=5)
    model = copy.deepcopy(problem.model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    kept = torch.arange(30) != 3
    for _ in range(5):
        optimizer.zero_grad()
        penalty = 0.01 / 2 * sum(p.square().sum() for p in model.parameters())
        (class_loss(model(problem.inputs[kept]), problem.targets[kept]).sum() / 30 + penalty).backward()
        optimizer.step()
        schedule.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found.parameters[0], expected, rtol=1e-6, atol=1e-8)


def test_an_index_outside_of_the_dataset_is_refused() -> None:
    problem = classifier()
    with pytest.raises(ValueError, match=r"`indices` must be a list of dataset indices in 0\.\.29, got \[30\]"):
        leave_one_out(problem.model, problem.train(), [30], loss=class_loss)


@pytest.mark.parametrize("indices", [torch.eye(30)[3].bool(), [1.7], []])
def test_what_is_no_index_is_refused(indices: Any) -> None:
    problem = classifier()
    with pytest.raises(ValueError, match="`indices` must be a list of dataset indices"):
        leave_one_out(problem.model, problem.train(), indices, loss=class_loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be positive, got 0"),
        ({"learning_rate": float("inf"), "steps": 3}, "lower `learning"),
    ],
)
def test_runs_that_go_nowhere_are_refused(options: dict[str, Any], message: str) -> None:
    problem = classifier()
    with pytest.raises(ValueError, match=message):
        leave_one_out(problem.model, problem.train(), [3], loss=class_loss, **options)

"""Statistics of least squares against statsmodels, and against fitting again without each example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.outliers_influence import OLSInfluence as StatsmodelsInfluence
from torch import Tensor

from lightning_influence.solvers import ConjugateGradient, Exact, OLSInfluence, Solver, ols_influence
from tests.reference.models import random
from tests.reference.solvers import least_squares_without


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    """An intercept, three correlated features of different scales, and one outlier of high leverage."""
    X = torch.cat(
        [torch.ones(n, 1).double(), random(n, 3, seed=1) @ random(3, 3, seed=2) * torch.tensor([1, 5, 0.1])], 1
    )
    X[0, 1:] *= 6
    y = X @ random(4, seed=3) + random(n, seed=4)
    y[0] += 10
    return X, y


SOLVERS = {"closed form": None, "exact": Exact(), "conjugate gradient": ConjugateGradient(rtol=1e-13, maxiter=200)}

STATISTICS = {
    "coefficients": lambda truth: truth.results.params,
    "residuals": lambda truth: truth.results.resid,
    "leverage": lambda truth: truth.hat_matrix_diag,
    "studentized_residuals": lambda truth: truth.resid_studentized_internal,
    "deleted_studentized_residuals": lambda truth: truth.resid_studentized_external,
    "cooks_distance": lambda truth: truth.cooks_distance[0],
    "prediction_changes": lambda truth: truth.dffits[0],
    "coefficient_changes": lambda truth: truth.dfbeta,
    "scaled_coefficient_changes": lambda truth: truth.dfbetas,
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_equal_those_of_statsmodels(name: str, solver: Solver | None) -> None:
    X, y = data()
    truth = StatsmodelsInfluence(OLS(y.numpy(), X.numpy()).fit())
    found = getattr(ols_influence(X, y, solver=solver), name)
    np.testing.assert_allclose(found.numpy(), np.asarray(STATISTICS[name](truth)), rtol=1e-8, atol=1e-8)


def test_coefficient_changes_are_those_of_fitting_again() -> None:
    X, y = data()
    found = ols_influence(X, y)
    for m in range(len(X)):
        without = least_squares_without(X, y, m)
        torch.testing.assert_close(found.coefficient_changes[m], found.coefficients - without)


def test_cooks_distance_is_the_change_of_all_predictions() -> None:
    X, y = data()
    found = ols_influence(X, y)
    for m in range(len(X)):
        shift = X @ (found.coefficients - least_squares_without(X, y, m))
        expected = shift.square().sum() / (X.shape[1] * found.variance)
        torch.testing.assert_close(found.cooks_distance[m], expected)


def test_first_order_lacks_just_the_leverage() -> None:
    X, y = data()
    found = ols_influence(X, y, solver=Exact())
    first_order = found.first_order / len(X)
    torch.testing.assert_close(first_order, found.coefficient_changes * (1 - found.leverage).unsqueeze(1))


def test_leverages_sum_to_the_number_of_coefficients() -> None:
    found: OLSInfluence = ols_influence(*data())
    torch.testing.assert_close(found.leverage.sum(), torch.tensor(4.0).double())


def test_unfit_data_are_refused() -> None:
    X, y = data()
    with pytest.raises(ValueError, match=r"n > k \+ 1"):
        ols_influence(X[:5], y[:5])
    with pytest.raises(ValueError, match="linearly dependent"):
        ols_influence(torch.cat([X, X[:, :1]], 1), y)
    with pytest.raises(ValueError, match="must be finite"):
        ols_influence(X, y * torch.inf)


def test_an_example_that_alone_decides_a_coefficient_is_refused() -> None:
    X, y = data()
    only = torch.zeros(len(X), 1).double()
    only[7] = 1
    with pytest.raises(ValueError, match=r"Example 7 has leverage 1"):
        ols_influence(torch.cat([X, only], 1), y)

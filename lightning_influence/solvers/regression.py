"""Classical influence statistics of ordinary least squares, exactly.

For y = X b + e with n examples and k coefficients, the hat matrix X (XᵀX)⁻¹ Xᵀ has the leverages h on its
diagonal, r = y - X b are the residuals, and s² = rᵀr / (n - k). Removing example m changes

    b by -(XᵀX)⁻¹ x_m r_m / (1 - h_m)        (Sherman & Morrison)

The influence function of the squared error ½ r², with H = XᵀX / n and grad L_m = -r_m x_m, gives
-(1/n) · (-H⁻¹ grad L_m) = -(XᵀX)⁻¹ x_m r_m: the same without 1/(1 - h_m), which is all that first order misses.

Reference: Belsley, Kuh & Welsch 1980, "Regression Diagnostics", Chapter 2; Cook 1977, "Detection of influential
observation in linear regression", Technometrics 19.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_influence.solvers.base import Solver
from lightning_influence.solvers.objective import Objective
from lightning_influence.solvers.operators import HessianOperator


@dataclass(frozen=True)
class OLSInfluence:
    """What each of n examples does to a least-squares fit with k coefficients; all float64.

    Args:
        features: X, shape [n, k].
        coefficients: b, shape [k].
        residuals: r = y - X b, shape [n].
        leverage: h, the diagonal of the hat matrix, shape [n]; they sum to k.
        first_order: n times the change of b by one example's weight, H⁻¹ times minus the gradient, shape [n, k].
    """

    features: Tensor
    coefficients: Tensor
    residuals: Tensor
    leverage: Tensor
    first_order: Tensor

    @property
    def variance(self) -> float:
        """s² = rᵀr / (n - k)."""
        n, k = self.features.shape
        return float(self.residuals.square().sum()) / (n - k)

    @property
    def deleted_variances(self) -> Tensor:
        """s² of the fit without each example, shape [n]."""
        n, k = self.features.shape
        own = self.residuals.square() / (1 - self.leverage)
        return (self.residuals.square().sum() - own) / (n - k - 1)

    @property
    def coefficient_changes(self) -> Tensor:
        """The coefficients with all examples minus those without each one (DFBETA), shape [n, k]."""
        return self.first_order / (len(self.features) * (1 - self.leverage).unsqueeze(1))

    @property
    def scaled_coefficient_changes(self) -> Tensor:
        """The same in standard errors, with the deleted variance (DFBETAS), shape [n, k]."""
        inverse = torch.linalg.inv(self.features.T @ self.features).diagonal()
        return self.coefficient_changes / (self.deleted_variances.unsqueeze(1) * inverse).sqrt()

    @property
    def studentized_residuals(self) -> Tensor:
        """Residuals over their standard errors, r / (s sqrt(1 - h)) (internally studentized), shape [n]."""
        return self.residuals / (self.variance * (1 - self.leverage)).sqrt()

    @property
    def deleted_studentized_residuals(self) -> Tensor:
        """The same with s of the fit without the example, externally studentized, shape [n]."""
        return self.residuals / (self.deleted_variances * (1 - self.leverage)).sqrt()

    @property
    def prediction_changes(self) -> Tensor:
        """Change of the example's own prediction by its removal, in standard errors (DFFITS), shape [n]."""
        return self.deleted_studentized_residuals * (self.leverage / (1 - self.leverage)).sqrt()

    @property
    def cooks_distance(self) -> Tensor:
        """Change of all predictions by the example's removal, squared, over k s², shape [n]."""
        k = self.features.shape[1]
        return self.studentized_residuals.square() * self.leverage / (k * (1 - self.leverage))


def ols_influence(features: Tensor, targets: Tensor, *, solver: Solver | None = None) -> OLSInfluence:
    """Fit by least squares, and say what each example does to the fit.

    Args:
        features: X, shape [n, k], with a column of ones for an intercept; n > k + 1.
        targets: y, shape [n].
        solver: None for the closed form. Otherwise everything comes from the same autograd, operators and solver
            as influences of any model do: the fit is one Newton step from zero.

    Raises:
        ValueError: if the shapes do not fit, or the columns are linearly dependent, also without some example.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 10.0])
        >>> found = ols_influence(torch.stack([torch.ones(4), x], 1), torch.tensor([0.0, 1.1, 1.9, 12.0]))
        >>> int(found.leverage.argmax()), round(float(found.leverage.sum()), 6)
        (3, 2.0)
    """
    X, y = _checked(features, targets)
    found = _closed_form(X, y) if solver is None else _by_solver(X, y, solver)
    if float(found.leverage.max()) > 1 - 1e-10:
        raise ValueError(
            f"Example {int(found.leverage.argmax())} has leverage 1: a coefficient depends on it alone, "
            "and there is no fit without it; leave that column of `features` out."
        )
    return found


def _closed_form(X: Tensor, y: Tensor) -> OLSInfluence:
    Q, R = torch.linalg.qr(X)
    coefficients = torch.linalg.solve_triangular(R, (Q.T @ y).unsqueeze(1), upper=True)[:, 0]
    residuals = y - X @ coefficients
    directions = torch.linalg.solve_triangular(R, Q.T, upper=True).T  # rows (XᵀX)⁻¹ x_m
    first_order = len(X) * residuals.unsqueeze(1) * directions
    return OLSInfluence(X, coefficients, residuals, Q.square().sum(1), first_order)


def _by_solver(X: Tensor, y: Tensor, solver: Solver) -> OLSInfluence:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square() / 2

    def operator_at(weights: Tensor) -> HessianOperator:
        model = nn.Linear(X.shape[1], 1, bias=False, dtype=X.dtype)
        with torch.no_grad():
            model.weight.copy_(weights)
        objective = Objective(model, loss)
        return HessianOperator(objective, objective.batches([(X, y)]))

    start = operator_at(torch.zeros(1, X.shape[1], dtype=X.dtype))
    gradient = start.objective.gradients(start.batches[0]).mean(0, keepdim=True)
    coefficients = -solver.solve(start, gradient).value  # the loss is quadratic: Newton's step is exact
    fitted = operator_at(coefficients)
    gradients = fitted.objective.gradients(fitted.batches[0])
    leverage = (X * solver.solve(fitted, X).value).sum(1) / len(X)  # x_mᵀ H⁻¹ x_m / n
    residuals = y - X @ coefficients[0]
    return OLSInfluence(X, coefficients[0], residuals, leverage, -solver.solve(fitted, gradients).value)


def _checked(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or targets.shape != features.shape[:1] or len(features) <= features.shape[1] + 1:
        raise ValueError(
            "`features` must be [n, k] with n > k + 1, and `targets` [n], got "
            f"{tuple(features.shape)} and {tuple(targets.shape)}."
        )
    X, y = features.double(), targets.double()
    if not bool(X.isfinite().all() and y.isfinite().all()):
        raise ValueError("`features` and `targets` must be finite.")
    if int(torch.linalg.matrix_rank(X)) < X.shape[1]:
        raise ValueError("The columns of `features` are linearly dependent; leave some out.")
    return X, y

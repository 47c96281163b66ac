"""Ridge regression: leave-one-out in closed form, the objective as in `linear_models`.

    J(W) = (1/N) sum_n ½ ||W x_n - y_n||² + (weight_decay / 2) ||W||²
    H = XᵀX / N + weight_decay·I (of each output), leverage h_m = x_mᵀ H⁻¹ x_m / N
    W without m = W - (y_m - W x_m)(H⁻¹ x_m)ᵀ / (N (1 - h_m))           (Sherman-Morrison formula)

The first-order step lacks exactly the factor 1/(1 - h_m).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_hessian(features: Tensor, weight_decay: float) -> Tensor:
    """H of each output, shape [i, i]."""
    X = features.double()
    return X.T @ X / len(X) + weight_decay * torch.eye(X.shape[1], dtype=torch.float64)


def fit_ridge(features: Tensor, targets: Tensor, *, weight_decay: float) -> Tensor:
    """W at the minimum of J: features [n, i], targets [n, o] -> [o, i]."""
    X, Y = features.double(), targets.double()
    return torch.linalg.solve(ridge_hessian(X, weight_decay), X.T @ Y / len(X)).T


def ridge_leverages(features: Tensor, *, weight_decay: float) -> Tensor:
    """h_m = x_mᵀ H⁻¹ x_m / N, shape [n], each in [0, 1)."""
    X = features.double()
    H = ridge_hessian(X, weight_decay)
    return torch.stack([x @ torch.linalg.solve(H, x) / len(X) for x in X])


def ridge_weights_without(features: Tensor, targets: Tensor, m: int, *, weight_decay: float) -> Tensor:
    """W at the minimum of J without example m (normaliser still N), shape [o, i]."""
    X, Y = features.double(), targets.double()
    W = fit_ridge(X, Y, weight_decay=weight_decay)
    direction = torch.linalg.solve(ridge_hessian(X, weight_decay), X[m])
    leverage = X[m] @ direction / len(X)
    residual = Y[m] - W @ X[m]
    return W - torch.outer(residual, direction) / (len(X) * (1 - leverage))


def ridge_prediction_changes(features: Tensor, targets: Tensor, queries: Tensor, *, weight_decay: float) -> Tensor:
    """Change of each query's prediction when example m is removed, shape [q, N, o]."""
    W = fit_ridge(features, targets, weight_decay=weight_decay)
    columns = [
        queries.double() @ (ridge_weights_without(features, targets, m, weight_decay=weight_decay) - W).T
        for m in range(len(features))
    ]
    return torch.stack(columns, dim=1)


def ridge_leave_one_out_changes(
    features: Tensor, targets: Tensor, queries: Tensor, query_targets: Tensor, *, weight_decay: float
) -> Tensor:
    """Change of each query's loss ½ ||W x_q - y_q||² when example m is removed, shape [q, N]."""
    W = fit_ridge(features, targets, weight_decay=weight_decay)
    residuals = queries.double() @ W.T - query_targets.double()  # [q, o]
    shifts = ridge_prediction_changes(features, targets, queries, weight_decay=weight_decay)
    after = ((residuals[:, None] + shifts) ** 2).sum(dim=2)
    return 0.5 * (after - (residuals**2).sum(dim=1, keepdim=True))

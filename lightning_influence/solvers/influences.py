"""Influence by definition: with the training data at hand, and a solver for H⁻¹.

    factor_q = H⁻¹ grad(-f_q),    score[q, m] = factor_qᵀ grad L_m = -grad f_qᵀ H⁻¹ grad L_m

with f the measurement, by default minus the query's loss (Koh & Liang 2017, arXiv:1703.04730, Sections 2.1 and
2.2). It is positive where up-weighting the training example m raises f; -score / N estimates what removing it does
to f. The derivative of the score by the example's inputs x_m says what moving them does: if x_m becomes
x_m + d, and the model is trained again, f changes by about derivative · d / N.

The interface follows pyDVL's `compute_influences` (which has the same sign).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.solvers.base import Solution, Solver
from lightning_influence.solvers.objective import Loss, Objective, check_order
from lightning_influence.solvers.operators import CHUNK_VECTORS, OPERATORS, CurvatureName

Mode = Literal["up", "perturbation"]


def compute_influences(
    model: nn.Module,
    train_loader: Iterable[Any],
    query_loader: Iterable[Any],
    *,
    loss: Loss,
    solver: Solver,
    mode: Mode = "up",
    curvature: CurvatureName = "hessian",
    hessian_regularization: float = 0.0,
    measurement: Loss | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Influence of every training example on every query.

    Args:
        model: trained; called as `model(inputs)`, in eval mode, and left as it is.
        train_loader: yields pairs (inputs, targets) in the dataset's order; the batches are kept in memory.
        query_loader: likewise.
        loss: `loss(outputs, targets) -> [n]`, each example's own loss, summed over its positions, such as
            `cross_entropy` with `reduction="none"`.
        solver: for H⁻¹, such as `ConjugateGradient()`.
        mode: "up" for the scores of up-weighting, "perturbation" for their derivatives by the features.
        curvature: "hessian" or "gauss-newton" of the mean loss.
        hessian_regularization: added to H's diagonal, such as a weight decay.
        measurement: `measurement(outputs, targets) -> [q]`; None for minus the loss.
        dtype: to compute in, such as `torch.float64`.

    Returns:
        Shape [q, N], or [q, N, *features] with `mode="perturbation"`, rows and columns in the loaders' orders;
        in the measurement's units times N.

    Raises:
        ValueError, TypeError: if a loader shuffles, a batch is no pair, or a loss is not [n].
        SolverError: if the system cannot be solved.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from lightning_influence.solvers import Exact
        >>> model = nn.Linear(2, 2)
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> def loss(outputs, targets):
        ...     return cross_entropy(outputs, targets, reduction="none")
        >>> scores = compute_influences(model, data, data, loss=loss, solver=Exact(), hessian_regularization=0.1)
        >>> scores.shape, bool((scores.diagonal() > 0).all())
        (torch.Size([2, 2]), True)
    """
    if mode not in ("up", "perturbation"):
        raise ValueError(f'`mode` must be "up" or "perturbation", got {mode!r}.')
    check_order(train_loader, "train_loader")
    train = list(train_loader)  # drawn once: columns are of the examples that H is of
    factors = compute_influence_factors(
        model,
        train,
        query_loader,
        loss=loss,
        solver=solver,
        curvature=curvature,
        hessian_regularization=hessian_regularization,
        measurement=measurement,
        dtype=dtype,
    )
    return influences_of_factors(model, train, factors.value, loss=loss, mode=mode, dtype=dtype)


def compute_influence_factors(
    model: nn.Module,
    train_loader: Iterable[Any],
    query_loader: Iterable[Any],
    *,
    loss: Loss,
    solver: Solver,
    curvature: CurvatureName = "hessian",
    hessian_regularization: float = 0.0,
    measurement: Loss | None = None,
    dtype: torch.dtype | None = None,
) -> Solution:
    """H⁻¹ times the gradient of minus the measurement, of every query; arguments as in `compute_influences`.

    Returns:
        The factors [q, p], for the p parameters that want gradients in `named_parameters` order, and how each
        was found.
    """
    if curvature not in OPERATORS:
        raise ValueError(f"`curvature` must be one of {sorted(OPERATORS)}, got {curvature!r}.")
    objective = Objective(model, loss, dtype=dtype)
    operator = OPERATORS[curvature](
        objective, objective.batches(train_loader), hessian_regularization=hessian_regularization
    )
    sign = 1 if measurement is None else -1
    queries = [
        sign * objective.gradients(batch, loss=measurement, chunk_size=CHUNK_VECTORS)
        for batch in objective.batches(query_loader, "query_loader")
    ]
    return solver.solve(operator, torch.cat(queries))


def influences_of_factors(
    model: nn.Module,
    train_loader: Iterable[Any],
    factors: Tensor,
    *,
    loss: Loss,
    mode: Mode = "up",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The influences that follow from factors [q, p]; other arguments and result as in `compute_influences`."""
    objective = Objective(model, loss, dtype=dtype)
    if factors.ndim != 2 or factors.shape[1] != objective.size:
        raise ValueError(f"`factors` must have shape [q, {objective.size}], got {tuple(factors.shape)}.")
    factors = factors.to(objective.parameters)
    of_batch = objective.directional if mode == "up" else objective.input_derivatives
    batches = objective.batches(train_loader)
    return torch.cat([of_batch(batch, factors, chunk_size=CHUNK_VECTORS) for batch in batches], dim=1)

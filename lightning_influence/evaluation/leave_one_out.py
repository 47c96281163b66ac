"""Training again without an example: from the trained weights, or from those before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.evaluation.responses import CHUNK_ROWS, Responses
from lightning_influence.solvers import Objective, SolveInfo
from lightning_influence.solvers.objective import Batch, Loss

CONVERGED = 1e-3  # of the first gradient


def leave_one_out(
    model: nn.Module,
    loader: Iterable[Any],
    indices: Sequence[int] | Tensor,
    *,
    loss: Loss,
    weight_decay: float = 0.0,
    steps: int = 500,
    learning_rate: float = 1e-2,
    dtype: torch.dtype | None = None,
) -> Responses:
    """Train on from the model's weights without each of some examples, and with all of them.

    Every run takes the same steps of Adam on the mean loss over all N examples, plus weight_decay / 2 times the
    squared weights, the learning rate falling to 0 by half a cosine; there is no randomness, so runs differ by the
    example alone. Give a trained model for a warm start, one with initial weights for leave-one-out proper. All
    runs go side by side, by `torch.func.vmap`, with the model in eval mode.

    Args:
        model: whose weights are the start; left as it is.
        loader: yields pairs (inputs, targets), the N training examples in the dataset's order.
        indices: dataset indices, m of them, each left out alone; its loss keeps the weight 0 of 1/N.
        loss: `loss(outputs, targets) -> [n]`.
        weight_decay: strength of the penalty.
        steps: of each run.
        learning_rate: of the first step.
        dtype: to compute in; None for the parameters' own.

    Returns:
        The weights after each run; the baseline is the run with all examples. `info.residual` is the size of the
        gradient that is left over the first one, and a run counts as converged up to 1e-3.

    Raises:
        ValueError: if an index is not an integer of the dataset, or `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be positive, got {steps}.")
    objective = Objective(model, loss, dtype=dtype)
    batches = objective.batches(loader, "loader")
    count = sum(batch.size for batch in batches)
    chosen = torch.as_tensor(indices).cpu()
    is_integer = not (chosen.is_floating_point() or chosen.dtype == torch.bool)
    is_list = is_integer and chosen.ndim == 1 and len(chosen) > 0
    if not is_list or not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        raise ValueError(f"`indices` must be a list of dataset indices in 0..{count - 1}, got {chosen.tolist()}.")
    chosen = chosen.long()
    weights = torch.ones(len(chosen) + 1, count, dtype=torch.float32)
    weights[torch.arange(len(chosen)), chosen] = 0  # the last row is the run with all
    weights = weights.to(objective.parameters) / count
    found, residual = _train(objective, batches, weights, weight_decay, steps, learning_rate)
    residual = residual[:-1]
    if not bool(found.isfinite().all()):
        raise ValueError(f"Weights are not finite after {steps} steps; lower `learning_rate`, {learning_rate}.")
    iterations = torch.full((len(chosen),), steps)
    return Responses(
        objective, found[:-1], found[-1], -1 / count, SolveInfo(iterations, residual <= CONVERGED, residual)
    )


def _train(
    objective: Objective,
    batches: list[Batch],
    weights: Tensor,
    decay: float,
    steps: int,
    learning_rate: float,
) -> tuple[Tensor, Tensor]:
    """Parameters [m, p] of runs with examples' weights [m, N], and their gradients' size over the first's [m]."""
    theta = objective.parameters.repeat(len(weights), 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = weights.split([batch.size for batch in batches], dim=1)
    first: Tensor | None = None
    for _ in range(steps):
        gradient = _gradient(objective, batches, parts, theta.detach()) + decay * theta.detach()
        first = gradient.norm(dim=1) if first is None else first
        theta.grad = gradient
        optimizer.step()
        schedule.step()
    found = theta.detach()
    left = (_gradient(objective, batches, parts, found) + decay * found).norm(dim=1)
    start = left if first is None else first
    return found, left / start.where(start > 0, 1)


def _gradient(objective: Objective, batches: list[Batch], parts: Sequence[Tensor], theta: Tensor) -> Tensor:
    """Gradient of each run's weighted mean loss, shape [m, p]."""
    total = torch.zeros_like(theta)
    for batch, weights in zip(batches, parts, strict=True):

        def weighted(parameters: Tensor, weight: Tensor, batch: Batch = batch) -> Tensor:
            return (weight * objective.losses(parameters, batch)).sum()

        total += torch.func.vmap(torch.func.grad(weighted), chunk_size=CHUNK_ROWS)(theta, weights)
    return total

"""Many smooth objectives minimised side by side, each from its own row of parameters, by their gradients alone.

Limited-memory BFGS (Nocedal & Wright 2006, "Numerical Optimization", Algorithms 7.4 and 7.5) with a preconditioner
in place of the scaled identity. Steps are judged by slopes and not by values: the values that we compare differ by
less than the losses that they are made of are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.solvers import SolveInfo

MEMORY = 8
HALVINGS = 20
OVERSHOOT = 0.5  # of the slope before a step, what it may have in the other direction after it
FARTHEST = 10.0  # of the gradient at the start, what it may grow to: the minimum that is sought is near

Gradients = Callable[[Tensor, Tensor], Tensor]
Precondition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Minimum:
    """Where `minimize_rows` came to.

    Args:
        value: shape [m, p].
        info: of each row; its residual is the gradient's size over the start's.
    """

    value: Tensor
    info: SolveInfo


def minimize_rows(
    gradients: Gradients, start: Tensor, precondition: Precondition, *, rtol: float, maxiter: int
) -> Minimum:
    """Follow m objectives downhill until each gradient is small, to minima near the start.

    Objectives may have no lowest value, as those of deep networks far from their weights: a step after which
    the slope is steeper is not taken: on the way to a minimum slopes flatten.

    Args:
        gradients: of rows of parameters [k, p] and which objectives they are of, int64 [k]; gives [k, p].
        start: shape [m, p].
        precondition: something near the inverse Hessian times each row [k, p], positive definite.
        rtol: a row has converged when its gradient is at most this times as large as at the start.
        maxiter: of steps.
    """
    x = start.clone()
    g = gradients(x, torch.arange(len(x), device=x.device))
    size = g.norm(dim=1)
    limit, most = rtol * size, FARTHEST * size
    iterations = torch.zeros(len(x), dtype=torch.int64)
    history = _History(MEMORY)
    active = (size > limit).nonzero().flatten()
    for _ in range(maxiter):
        if not len(active):
            break
        before, slope_of = x[active], g[active]
        direction = -history.inverse_product(slope_of, precondition, active)
        moved, after, took = _line_search(gradients, before, slope_of, direction, active, most[active])
        history.add(moved - before, after - slope_of, active, len(x))
        x[active], g[active] = moved, after
        iterations[active.cpu()] += 1
        active = active[took & (after.norm(dim=1) > limit[active])]
    found = g.norm(dim=1)
    residual = found / size.where(size > 0, 1)
    return Minimum(x, SolveInfo(iterations, found <= limit, residual))


def _line_search(
    gradients: Gradients, x: Tensor, g: Tensor, direction: Tensor, rows: Tensor, most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each row's step until it does not overshoot, nor lead away; rows for which none is found stay."""
    slope = (g * direction).sum(1)
    steepest = slope >= 0  # the history has misled: start from the gradient
    direction = torch.where(steepest.unsqueeze(1), -g, direction)
    slope = (g * direction).sum(1)
    moved, after, took = x.clone(), g.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    step = 1.0
    for _ in range(HALVINGS):
        open_rows = (~took).nonzero().flatten()
        if not len(open_rows):
            break
        tried = x[open_rows] + step * direction[open_rows]
        found = gradients(tried, rows[open_rows])
        ahead, behind = (found * direction[open_rows]).sum(1), slope[open_rows]  # behind < 0
        is_fine = (behind <= ahead) & (ahead <= -OVERSHOOT * behind)
        is_fine &= found.norm(dim=1) <= most[open_rows]  # and so finite
        chosen = open_rows[is_fine]
        moved[chosen], after[chosen], took[chosen] = tried[is_fine], found[is_fine], True
        step /= 2
    return moved, after, took


class _History:
    """The last changes of parameters and gradients, of each row."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s [m, p], y [m, p], 1 / sᵀy [m]; 0: to be left out

    def add(self, s: Tensor, y: Tensor, rows: Tensor, count: int) -> None:
        """Remember a step; without positive curvature along it, it says nothing."""
        product = (s * y).sum(1)
        is_curved = product > 1e-12 * s.norm(dim=1) * y.norm(dim=1)
        full = [s.new_zeros(count, s.shape[1]) for _ in range(2)]
        inverse = s.new_zeros(count)
        full[0][rows], full[1][rows] = s, y
        inverse[rows] = is_curved / product.where(is_curved, 1)
        self.pairs = [*self.pairs[-self.length + 1 :], (full[0], full[1], inverse)]

    def inverse_product(self, g: Tensor, precondition: Precondition, rows: Tensor) -> Tensor:
        """The two-loop recursion, [k, p]."""
        g = g.clone()
        pairs = [(s[rows], y[rows], inverse[rows]) for s, y, inverse in self.pairs]
        weights = []
        for s, y, inverse in reversed(pairs):
            weights.append(inverse * (s * g).sum(1))
            g -= weights[-1].unsqueeze(1) * y
        result = precondition(g).clone()
        for (s, y, inverse), weight in zip(pairs, reversed(weights), strict=True):
            result += (weight - inverse * (y * result).sum(1)).unsqueeze(1) * s
        return result

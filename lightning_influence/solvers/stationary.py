"""The loop of LiSSA and of preconditioned Neumann iterations: x <- x + step(v - H x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, DivergenceError, Draft

Sampling = Literal["all", "batch"]
LONG = 10  # iterations, by which convergence shows
DIVERGED = 1e4  # times ||v||: no iteration that converges lets the residual grow so far


def check_sampling(sampling: str) -> None:
    """Refuse an unknown way of sampling.

    Raises:
        ValueError: unless it is "all" or "batch".
    """
    if sampling not in ("all", "batch"):
        raise ValueError(f'`sampling` must be "all" or "batch", got {sampling!r}.')


def iterate(
    operator: CurvatureOperator,
    vectors: Tensor,
    step: Callable[[Tensor, int], Tensor],
    *,
    damping: float,
    limit: Tensor,
    maxiter: int,
    sampling: Sampling,
    seed: int,
) -> tuple[Draft, Tensor]:
    """Iterate x <- x + step(v - H x - damping x, k) from x = 0.

    Args:
        operator: H.
        vectors: v, shape [q, p].
        step: from residuals [q, p] and the iteration's number to the change of x.
        damping: added to H.
        limit: the residual at which a row is solved, [q]; with "batch" none is.
        maxiter: of iterations.
        sampling: whether a residual is that of all batches, or of one drawn at random.
        seed: of the draws.

    Returns:
        What was found, and the size of each row's last residual that was seen, [q].

    Raises:
        DivergenceError: if the residual grows without bound.
    """
    x, residual = torch.zeros_like(vectors), vectors
    generator = torch.Generator().manual_seed(seed)
    sizes = vectors.norm(dim=1)
    iterations = torch.zeros(len(vectors), dtype=torch.int64)
    halfway = sizes
    for k in range(maxiter + 1):
        if k:
            batch = _drawn(operator, generator) if sampling == "batch" else None
            residual = vectors - operator.product(x, batch) - damping * x
        norms = residual.norm(dim=1)
        if not bool((norms <= DIVERGED * sizes).all()):  # also not if one is not a number
            raise DivergenceError(
                f"The residual after {k} steps is {_growth(norms, sizes)} times the right-hand side."
            )
        if k == maxiter // 2:
            halfway = norms
        if k == maxiter >= LONG and sampling == "all" and bool((norms > sizes.maximum(halfway)).any()):
            raise DivergenceError(f"The residual grew in the last {k - maxiter // 2} steps, beyond the start's.")
        active = norms > limit if sampling == "all" else torch.ones_like(norms, dtype=torch.bool)
        if k == maxiter or not bool(active.any()):
            break
        x[active] += step(residual[active], k)
        iterations[active.cpu()] += 1
    return Draft(x, iterations), norms


def largest_eigenvalue(
    operator: CurvatureOperator,
    apply: Callable[[Tensor], Tensor] | None = None,
    *,
    iterations: int = 30,
    seed: int = 0,
) -> float:
    """Size of the largest eigenvalue of H, or of apply(H v), by power iteration: an estimate from below."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, operator.size, generator=generator, dtype=torch.float64).to(
        operator.device, operator.dtype
    )
    size = 0.0
    for _ in range(iterations):
        vector = operator.product(vector / vector.norm())
        vector = vector if apply is None else apply(vector)
        size = float(vector.norm())
        if size == 0:
            break
    return size


def _drawn(operator: CurvatureOperator, generator: torch.Generator) -> int:
    return int(torch.randint(operator.num_batches, (), generator=generator))


def _growth(norms: Tensor, sizes: Tensor) -> str:
    worst = (norms / sizes.where(sizes > 0, 1)).nan_to_num(nan=torch.inf)
    return f"{float(worst.max()):.2g}"

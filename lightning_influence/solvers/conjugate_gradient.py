"""Conjugate gradients: for a positive definite H, the best solution in a growing Krylov space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, Draft, Solver, SolverError, check_positive
from lightning_influence.solvers.preconditioner import NO_PRECONDITIONER, Preconditioner


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel 1952); a product with H an iteration.

    Args:
        rtol: a row is solved when ||v - H x|| <= max(rtol ||v||, atol).
        atol: as an absolute size.
        maxiter: of iterations; None for ten times the size of H.
        x0: where to start, [q, p] or [p]; None for zero.
        preconditioner: something near H whose inverse is cheap.
        block: let all right-hand sides share one Krylov space (O'Leary 1980, "The block conjugate gradient
            algorithm and related methods"), in the form with orthonormal residuals of Dubrulle 2001,
            "Retooling the method of block conjugate gradients": fewer iterations for many of them.

    Example:
        >>> from lightning_influence.solvers import DenseOperator
        >>> H = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> solution = ConjugateGradient().solve(H, torch.tensor([[3.0, 3.0]]))
        >>> solution.value.tolist(), solution.info.iterations.tolist()
        ([[1.0, 1.0]], [1])
    """

    rtol: float = 1e-6
    atol: float = 0.0
    maxiter: int | None = None
    x0: Tensor | None = None
    preconditioner: Preconditioner = NO_PRECONDITIONER
    block: bool = False

    advice = "raise `maxiter`, `rtol` or `hessian_regularization`, pass a `preconditioner`, or compute in float64"

    def __post_init__(self) -> None:
        check_positive(rtol=self.rtol, maxiter=self.maxiter)
        if self.atol < 0:
            raise ValueError(f"`atol` must not be negative, got {self.atol}.")

    def accepted_residual(self, sizes: Tensor) -> Tensor:
        """max(rtol ||v||, atol)."""
        return (self.rtol * sizes).clamp(min=self.atol)

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        x = torch.zeros_like(vectors) if self.x0 is None else self._start(vectors)
        residual = vectors.clone() if self.x0 is None else vectors - operator.product(x)
        limit = self.accepted_residual(vectors.norm(dim=1))
        maxiter = 10 * operator.size if self.maxiter is None else self.maxiter
        run = self._block if self.block else self._rows
        return run(operator, x, residual, limit, maxiter)

    def _start(self, vectors: Tensor) -> Tensor:
        assert self.x0 is not None
        if self.x0.shape not in (vectors.shape, vectors.shape[1:]):
            raise ValueError(
                f"`x0` must have shape {tuple(vectors.shape)} or [{vectors.shape[1]}], got {tuple(self.x0.shape)}."
            )
        start = self.x0.to(vectors).expand_as(vectors)
        return start * (vectors != 0).any(1, keepdim=True)  # 0 is solved by 0, and nothing else is near enough

    def _rows(
        self, operator: CurvatureOperator, x: Tensor, residual: Tensor, limit: Tensor, maxiter: int
    ) -> Draft:
        """Each row has a Krylov space of its own; they share only the calls of `product`."""
        iterations = torch.zeros(len(x), dtype=torch.int64)
        direction, old = torch.zeros_like(x), torch.ones_like(limit)
        for _ in range(maxiter):
            active = residual.norm(dim=1) > limit
            if not bool(active.any()):
                break
            r = residual[active]
            z = self.preconditioner.solve(r)
            new = (r * z).sum(1)  # rᵀ M⁻¹ r
            p = z + (new / old[active]).unsqueeze(1) * direction[active]
            Hp = operator.product(p)
            step = (new / _curvature(p, Hp)).unsqueeze(1)
            x[active] += step * p
            residual[active] = r - step * Hp
            direction[active], old[active] = p, new
            iterations[active.cpu()] += 1
        return Draft(x, iterations)

    def _block(
        self, operator: CurvatureOperator, x: Tensor, residual: Tensor, limit: Tensor, maxiter: int
    ) -> Draft:
        """All rows share one space. With W² = M⁻¹ it is the plain method for W H W and W v.

        Residuals, in W's coordinates, are C Q with orthonormal rows Q; S are the conjugate directions.
        """
        W = self.preconditioner.inverse_root
        Q, C = _orthonormal_rows(W(residual))
        S, count = Q, 0
        while count < maxiter and bool((residual.norm(dim=1) > limit).any()):
            direction = W(S)
            product = operator.product(direction)
            _curvature(direction, product)
            curvature = direction @ product.T
            step = torch.linalg.inv((curvature + curvature.T) / 2)
            x += C @ step @ direction
            residual = residual - C @ step @ product
            Q, change = _orthonormal_rows(Q - step @ W(product))
            S = Q + change.T @ S
            C = C @ change
            count += 1
        return Draft(x, count)


def _orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows = C Q with orthonormal Q."""
    Q, R = torch.linalg.qr(rows.T)
    return Q.T, R.T


def _curvature(p: Tensor, Hp: Tensor) -> Tensor:
    """pᵀ H p of each row, which must be positive."""
    curvature = (p * Hp).sum(1)
    if not bool((curvature > 0).all()):
        relative = curvature / p.square().sum(1)
        raise SolverError(
            f"ConjugateGradient: H is not positive definite: it has curvature {float(relative.min()):.2g} along a "
            'direction; raise `hessian_regularization`, use the curvature "gauss-newton", or solve by Exact.'
        )
    return curvature

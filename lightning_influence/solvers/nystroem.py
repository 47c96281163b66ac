"""A random sketch of a positive semi-definite C."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, Draft, Solver, SolverError, check_positive
from lightning_influence.solvers.low_rank import Complement, check_complement, low_rank_solve


@dataclass(frozen=True)
class Nystroem(Solver):
    """C ≈ Y (Omegaᵀ Y)⁻¹ Yᵀ with Y = C Omega for a random Omega [p, rank]; `rank` products in one call.

    The stable form of Frangella, Tropp & Udell 2021, "Randomized Nyström preconditioning", arXiv:2110.02820.
    Its error is that of the eigenvalues left out, so it is good where they are far below the regularization.

    Args:
        rank: columns of Omega; more than the size of H counts as that.
        rtol: the residual ||v - H x|| / ||v|| above which a row counts as not converged.
        complement: as in `Arnoldi`.
        seed: of Omega.

    Example:
        >>> from lightning_influence.solvers import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])), regularization=1.0)
        >>> solution = Nystroem(rank=2).solve(H, torch.ones(1, 4))
        >>> [round(v, 3) for v in solution.value[0].tolist()]
        [0.2, 0.333, 1.0, 1.0]
    """

    rank: int
    rtol: float = 0.05
    complement: Complement = "solve"
    seed: int = 0

    advice = "raise `rank` or `hessian_regularization`"

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, rtol=self.rtol)
        check_complement(self.complement)

    def accepted_residual(self, sizes: Tensor) -> Tensor:
        """Rtol ||v||."""
        return self.rtol * sizes

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        eigenvalues, U = self.eigenpairs(operator)
        value = low_rank_solve(U, eigenvalues, vectors, operator.regularization, self.complement)
        return Draft(value, 1, eigenvalues=eigenvalues)

    def eigenpairs(self, operator: CurvatureOperator) -> tuple[Tensor, Tensor]:
        """Eigenvalues [r], descending, and eigenvectors in rows [r, p] of the approximation.

        Raises:
            SolverError: if C has negative eigenvalues.
        """
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(operator.size, min(self.rank, operator.size), generator=generator, dtype=torch.float64)
        Omega = torch.linalg.qr(drawn).Q.T  # orthonormal rows [r, p]
        Y = operator.curvature_product(Omega.to(operator.device, operator.dtype)).double().cpu()
        shift = torch.finfo(operator.dtype).eps * float(Y.norm())  # makes the Cholesky factor exist
        Y = Y + shift * Omega
        core = Y @ Omega.T
        L, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if int(failed):
            raise SolverError(
                "Nystroem: the curvature has negative eigenvalues, which the method cannot represent; "
                'use the curvature "gauss-newton", or Arnoldi.'
            )
        B = torch.linalg.solve_triangular(L, Y, upper=False)  # Bᵀ B ≈ C + shift
        _, sizes, U = torch.linalg.svd(B, full_matrices=False)
        eigenvalues = (sizes.square() - shift).clamp(min=0)
        kept = eigenvalues > shift
        return eigenvalues[kept].to(operator.device, operator.dtype), U[kept].to(operator.device, operator.dtype)

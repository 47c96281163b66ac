"""The leading eigenvectors of C by Krylov iterations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, Draft, Solver, check_positive
from lightning_influence.solvers.low_rank import Complement, check_complement, low_rank_solve

CHECK_EVERY = 5  # iterations between decompositions of the projected matrix


@dataclass(frozen=True)
class EigenPairs:
    """Leading eigenpairs of C.

    Args:
        eigenvalues: by descending size, shape [r].
        vectors: orthonormal rows, shape [r, p].
        iterations: dimension of the space that they were found in.
        converged: whether all of them meet the tolerance.
    """

    eigenvalues: Tensor
    vectors: Tensor
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Arnoldi(Solver):
    """Eigenpairs of the largest sizes, after Schioppa et al. 2022, arXiv:2112.03052.

    They are Ritz pairs of a Krylov space from a random vector, orthogonalized twice at each step. Indefinite
    matrices are fine. An eigenvalue that is repeated is found once, unless the space is exhausted.

    `converged` says that the eigenpairs are right, not that `rank` of them suffice: see `residual`.

    Args:
        rank: how many eigenpairs.
        tolerance: of an eigenpair's residual ||C u - eigenvalue u||, relative to the largest eigenvalue's size.
        maxiter: dimension of the Krylov space at most, which is held in memory; None for 4 rank + 20.
        complement: what becomes of the rest of a right-hand side: "solve" divides it by the operator's
            regularization (dropped if that is zero), "drop" leaves it out, as the paper does.
        seed: of the first vector.

    Example:
        >>> from lightning_influence.solvers import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])), regularization=1.0)
        >>> solution = Arnoldi(rank=2).solve(H, torch.ones(1, 4))
        >>> [round(v, 3) for v in solution.value[0].tolist()]
        [0.2, 0.333, 1.0, 1.0]
    """

    rank: int
    tolerance: float = 1e-5
    maxiter: int | None = None
    complement: Complement = "solve"
    seed: int = 0

    advice = "raise `maxiter` or `tolerance`, or lower `rank`"

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, tolerance=self.tolerance, maxiter=self.maxiter)
        check_complement(self.complement)

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        found = self.eigenpairs(operator)
        value = low_rank_solve(found.vectors, found.eigenvalues, vectors, operator.regularization, self.complement)
        converged = torch.full((len(vectors),), found.converged, device=vectors.device)
        return Draft(value, found.iterations, converged, found.eigenvalues)

    def eigenpairs(self, operator: CurvatureOperator) -> EigenPairs:
        """The leading eigenpairs of C, the operator without its regularization."""
        p, generator = operator.size, torch.Generator().manual_seed(self.seed)
        largest = min(p, self.maxiter or 4 * self.rank + 20)
        basis = torch.zeros(largest + 1, p, dtype=operator.dtype, device=operator.device)
        hessenberg = torch.zeros(largest + 1, largest, dtype=torch.float64)
        basis[0] = _new_direction(basis[:0], generator)
        for j in range(largest):
            image = operator.curvature_product(basis[j : j + 1])[0]
            rest, coordinates = _orthogonalized(image, basis[: j + 1])
            hessenberg[: j + 1, j] = coordinates.double().cpu()
            beta = float(rest.norm())
            is_invariant = beta <= 10 * torch.finfo(basis.dtype).eps * float(hessenberg.abs().max())
            hessenberg[j + 1, j] = 0.0 if is_invariant else beta
            if j + 1 == largest or (j + 1 >= self.rank and (is_invariant or (j + 1) % CHECK_EVERY == 0)):
                pairs = self._ritz_pairs(hessenberg[: j + 2, : j + 1], basis[: j + 1], is_invariant or j + 1 == p)
                if pairs.converged:
                    break
            basis[j + 1] = _new_direction(basis[: j + 1], generator) if is_invariant else rest / beta
        return pairs

    def _ritz_pairs(self, hessenberg: Tensor, basis: Tensor, is_invariant: bool) -> EigenPairs:
        """Eigenpairs of the projected matrix; C u leaves the space by beta times u's last coordinate."""
        projected = hessenberg[:-1]
        eigenvalues, Y = torch.linalg.eigh((projected + projected.T) / 2)
        order = eigenvalues.abs().argsort(descending=True)[: self.rank]
        leading = Y[:, order]  # [m, r]
        errors = hessenberg[-1, -1] * leading[-1].abs()
        limit = self.tolerance * eigenvalues.abs().max()
        return EigenPairs(
            eigenvalues[order].to(basis),
            leading.T.to(basis) @ basis,
            len(basis),
            is_invariant or bool((errors <= limit).all()),
        )


def _orthogonalized(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A vector without its part in the basis, and that part's coordinates; done twice, against rounding."""
    first = basis @ vector
    vector = vector - first @ basis
    second = basis @ vector
    return vector - second @ basis, first + second


def _new_direction(basis: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    rest, _ = _orthogonalized(drawn / drawn.norm(), basis)
    return rest / rest.norm()

"""What a solver is given and what it gives back.

A curvature operator is a symmetric matrix H = C + regularization·I of size p, known by its products with
vectors. Right-hand sides and solutions are rows: [q, p] for q of them. Every solver answers
`solve(operator, vectors)` with x_q ≈ H⁻¹ v_q, and says of each row how far it came: the residual in the answer
is measured by one more product with the whole operator, never taken from the solver's own recurrence.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import InfluenceError


class SolverError(InfluenceError):
    """The system cannot be solved as it was put."""


class DivergenceError(SolverError):
    """An iteration runs away from the solution."""


class CurvatureOperator(ABC):
    """H = C + regularization·I, shape [p, p]; C is a mean over training examples.

    Args:
        regularization: added to the diagonal.
    """

    def __init__(self, regularization: float = 0.0) -> None:
        if not 0 <= regularization < float("inf"):
            raise ValueError(f"`hessian_regularization` must be finite and not negative, got {regularization}.")
        self.regularization = regularization

    @property
    @abstractmethod
    def size(self) -> int:
        """The number p of rows and columns."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the products."""

    @property
    def num_batches(self) -> int:
        """How many estimates of C there are."""
        return 1

    @abstractmethod
    def curvature_product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """C v for each row.

        Args:
            vectors: shape [q, p].
            batch: the number of a batch, whose estimate of C is taken; the mean of all estimates is C.
        """

    def product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """H v for each row [q, p]; arguments as in `curvature_product`."""
        return self.curvature_product(vectors, batch) + self.regularization * vectors

    def dense(self) -> Tensor:
        """H as a symmetric matrix [p, p]; costs p products."""
        matrix = self.product(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return (matrix + matrix.T) / 2


class DenseOperator(CurvatureOperator):
    """A matrix that is at hand.

    Args:
        matrix: C, symmetric [p, p], or [b, p, p] for b batches whose mean is C.
        regularization: added to the diagonal.
    """

    def __init__(self, matrix: Tensor, regularization: float = 0.0) -> None:
        super().__init__(regularization)
        self.batches = matrix if matrix.ndim == 3 else matrix.unsqueeze(0)
        p = matrix.shape[-1]
        if tuple(self.batches.shape[1:]) != (p, p) or not torch.allclose(self.batches, self.batches.mT):
            raise ValueError(f"`matrix` must be symmetric [p, p] or [b, p, p], got shape {tuple(matrix.shape)}.")
        self.matrix = self.batches.mean(0)

    @property
    def size(self) -> int:
        """The number p of rows and columns."""
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The matrix's."""
        return self.matrix.device

    @property
    def num_batches(self) -> int:
        """How many matrices were given."""
        return len(self.batches)

    def curvature_product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """C v for each row [q, p]."""
        return vectors @ (self.matrix if batch is None else self.batches[batch])


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went.

    Args:
        iterations: of each right-hand side, int64 [q].
        converged: whether the solver's own criterion was met, bool [q].
        residual: ||v - H x|| / ||v|| by the whole operator, [q]; 0 where v is 0.
        eigenvalues: those that the solver found, without the regularization, by descending size; None if it
            looks for none.
    """

    iterations: Tensor
    converged: Tensor
    residual: Tensor
    eigenvalues: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """What `Solver.solve` returns.

    Args:
        value: x, shape [q, p].
        info: how each row was found.
    """

    value: Tensor
    info: SolveInfo


@dataclass(frozen=True)
class Draft:
    """What a solver found, before it is checked.

    Args:
        value: shape [q, p].
        iterations: int64 [q], or one number for all.
        converged: bool [q], where the criterion is not the residual.
        eigenvalues: as in `SolveInfo`.
    """

    value: Tensor
    iterations: Tensor | int
    converged: Tensor | None = None
    eigenvalues: Tensor | None = None


class Solver(ABC):
    """A way to x = H⁻¹ v. Solvers are small frozen configurations without any state."""

    advice = "raise `maxiter` or `hessian_regularization`"

    def solve(self, operator: CurvatureOperator, vectors: Tensor) -> Solution:
        """Solve H x = v for each row v.

        Args:
            operator: H, shape [p, p].
            vectors: right-hand sides, shape [q, p].

        Returns:
            The solution [q, p] and, for each row, how it was found. What did not converge, or fits worse than
            x = 0 would, is also warned of.

        Raises:
            ValueError: if `vectors` do not fit the operator.
            SolverError: if the matrix is not what the solver needs, or the iteration diverges.
        """
        vectors = _fitting(vectors, operator)
        with torch.no_grad():
            draft = self._solve(operator, vectors)
            rest = vectors - operator.product(draft.value)
        size = vectors.norm(dim=1)
        residual = rest.norm(dim=1) / size.where(size > 0, 1)
        if not bool(residual.isfinite().all()):
            raise SolverError(f"{type(self).__name__}: the solution is not finite; {self.advice}.")
        converged = draft.converged
        if converged is None:  # recurrences drift by rounding, hence the 2
            converged = rest.norm(dim=1) <= 2 * self.accepted_residual(size)
        iterations = torch.as_tensor(draft.iterations).expand(len(vectors)).clone()
        self._warn(converged, residual)
        return Solution(draft.value, SolveInfo(iterations, converged, residual, draft.eigenvalues))

    def accepted_residual(self, sizes: Tensor) -> Tensor:
        """The largest ||v - H x|| that counts as solved, for vectors of these sizes ||v||, [q]."""
        return 1e-6 * sizes

    @abstractmethod
    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        """Find x; `vectors` are finite and of the operator's dtype."""

    def _warn(self, converged: Tensor, residual: Tensor) -> None:
        failed = ~converged
        if bool(failed.any()):
            warnings.warn(
                f"{type(self).__name__}: {int(failed.sum())} of {len(converged)} right-hand sides did not "
                f"converge; the largest relative residual is {float(residual[failed].max()):.2g}; {self.advice}.",
                stacklevel=3,
            )
        worse = (residual > 1) & converged
        if bool(worse.any()):  # a criterion other than the residual, which x = 0 leaves at 1
            warnings.warn(
                f"{type(self).__name__}: {int(worse.sum())} of {len(converged)} solutions are worse than x = 0; "
                f"the largest relative residual is {float(residual[worse].max()):.2g}; {self.advice}.",
                stacklevel=3,
            )


def _fitting(vectors: Tensor, operator: CurvatureOperator) -> Tensor:
    if vectors.ndim != 2 or vectors.shape[1] != operator.size:
        raise ValueError(
            f"`vectors` must have shape [q, {operator.size}], a right-hand side a row, got {tuple(vectors.shape)}."
        )
    if not vectors.is_floating_point() or not bool(vectors.isfinite().all()):
        raise ValueError("`vectors` must be finite floating-point numbers.")
    return vectors.detach().to(operator.device, operator.dtype)


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not positive and finite; None is passed over.

    Raises:
        ValueError: names the argument.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"`{name}` must be positive and finite, got {number}.")

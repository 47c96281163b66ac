"""The dense solution, which all others are measured by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, Draft, Solver, SolverError


@dataclass(frozen=True)
class Exact(Solver):
    """Decompose H in float64: p products, p² numbers, p³ operations.

    The matrix may be indefinite, as a network's Hessian is, but not singular.

    Example:
        >>> from lightning_influence.solvers import DenseOperator
        >>> H = DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> Exact().solve(H, torch.tensor([[2.0, 2.0]])).value.tolist()
        [[1.0, 0.5]]
    """

    advice = "raise `hessian_regularization`, or compute the operator in float64"

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        matrix = operator.dense().double().cpu()
        if not bool(matrix.isfinite().all()):
            raise SolverError("Exact: the matrix is not finite.")
        eigenvalues, Q = torch.linalg.eigh(matrix)
        smallest, largest = float(eigenvalues.abs().min()), float(eigenvalues.abs().max())
        if smallest <= torch.finfo(operator.dtype).eps * largest:
            raise SolverError(
                f"Exact: the matrix of size {len(matrix)} is singular: its eigenvalues have sizes {smallest:.2g} "
                f"to {largest:.2g}; {self.advice}."
            )
        value = (vectors.double().cpu() @ Q / eigenvalues) @ Q.T
        return Draft(value.to(vectors), 1, eigenvalues=eigenvalues.flip(0).to(vectors) - operator.regularization)

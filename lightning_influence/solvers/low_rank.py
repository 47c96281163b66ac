"""Solving with C ≈ Uᵀ diag(eigenvalues) U, for U with orthonormal rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_influence.solvers.base import SolverError

Complement = Literal["solve", "drop"]


def check_complement(complement: str) -> None:
    """Refuse an unknown treatment of the complement.

    Raises:
        ValueError: unless it is "solve" or "drop".
    """
    if complement not in ("solve", "drop"):
        raise ValueError(f'`complement` must be "solve" or "drop", got {complement!r}.')


def low_rank_solve(
    U: Tensor, eigenvalues: Tensor, vectors: Tensor, regularization: float, complement: Complement
) -> Tensor:
    """(Uᵀ diag(eigenvalues) U + regularization·I)⁻¹ v for each row.

    Args:
        U: eigenvectors in rows, shape [r, p].
        eigenvalues: shape [r].
        vectors: v, shape [q, p].
        regularization: lambda.
        complement: what becomes of the part of v outside of U: "solve" divides it by the regularization,
            and drops it if that is zero; "drop" leaves it out.

    Raises:
        SolverError: if an eigenvalue and the regularization cancel.
    """
    damped = eigenvalues + regularization
    if len(damped) and float(damped.abs().min()) <= torch.finfo(damped.dtype).eps * float(damped.abs().max()):
        raise SolverError(
            "An eigenvalue of the low-rank approximation is zero; raise `hessian_regularization` or lower `rank`."
        )
    coordinates = vectors @ U.T  # [q, r]
    inside = (coordinates / damped) @ U
    if complement == "drop" or not regularization:
        return inside
    return inside + (vectors - coordinates @ U) / regularization

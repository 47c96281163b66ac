"""Kronecker factors, their eigenbasis, Lambda, and the exact empirical Fisher block, densely.

vec stacks the COLUMNS of G [o, i]: element (o, i) is at place i·O + o. Then
vec(L G R) = (Rᵀ ⊗ L) vec(G), and a block indexed by vec has the layout of A ⊗ S = kron(A, S).

References: Martens & Grosse 2015 (arXiv:1503.05671), George et al. 2018 (arXiv:1806.03884).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def vec(G: Tensor) -> Tensor:
    """Stack the columns: [..., o, i] -> [..., i·o]."""
    return G.transpose(-2, -1).flatten(-2)


def unvec(v: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `vec`: [..., i·o] -> [..., o, i] for shape = (o, i)."""
    outputs, inputs = shape
    return v.unflatten(-1, (inputs, outputs)).transpose(-2, -1)


def covariances(inputs: Tensor, output_grads: Tensor, *, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A = (1/M) sum_n sum_s a aᵀ over the M valid positions, S = (1/N) sum_n sum_s d dᵀ.

    Args:
        inputs: a, shape [n, s, i].
        output_grads: d of the summed per-example loss, shape [n, s, o].
        valid: Which positions count, bool [n, s]; by default those with a non-zero d. The default
            also drops positions whose d is zero by chance, e.g. behind dead units.

    Returns:
        A [i, i] and S [o, o], float64.
    """
    a_all, d_all = inputs.double(), output_grads.double()
    if valid is None:
        valid = (d_all != 0).any(dim=-1)
    A = torch.zeros(a_all.shape[2], a_all.shape[2], dtype=torch.float64)
    S = torch.zeros(d_all.shape[2], d_all.shape[2], dtype=torch.float64)
    for n in range(len(a_all)):
        a, d = a_all[n][valid[n]], d_all[n][valid[n]]
        A += a.T @ a  # sum over s of a aᵀ
        S += d.T @ d
    return A / valid.sum(), S / len(a_all)


@dataclass(frozen=True)
class Eigenbasis:
    """A = Q_A diag(eigenvalues_A) Q_Aᵀ and the same for S; eigenvectors are columns, ascending."""

    Q_A: Tensor
    Q_S: Tensor
    eigenvalues_A: Tensor
    eigenvalues_S: Tensor


def eigenbasis(A: Tensor, S: Tensor) -> Eigenbasis:
    """Eigendecompose A [i, i] and S [o, o] in float64."""
    eigenvalues_A, Q_A = torch.linalg.eigh(A.double())
    eigenvalues_S, Q_S = torch.linalg.eigh(S.double())
    return Eigenbasis(Q_A, Q_S, eigenvalues_A, eigenvalues_S)


def eigenvalue_correction(gradients: Tensor, Q_A: Tensor, Q_S: Tensor) -> Tensor:
    """Lambda_oi = (1/N) sum_n (Q_Sᵀ G_n Q_A)_oi², one example at a time.

    Args:
        gradients: G_n, shape [n, o, i].
        Q_A: Eigenvectors of A as columns, shape [i, i].
        Q_S: Eigenvectors of S as columns, shape [o, o].

    Returns:
        Lambda, shape [o, i], float64.
    """
    Lambda = torch.zeros(len(Q_S), len(Q_A), dtype=torch.float64)
    for G in gradients.double():
        Lambda += (Q_S.T @ G @ Q_A) ** 2
    return Lambda / len(gradients)


def fisher_block(gradients: Tensor) -> Tensor:
    """Exact empirical Fisher of one layer, (1/N) sum_n vec(G_n) vec(G_n)ᵀ.

    Args:
        gradients: G_n, shape [n, o, i].

    Returns:
        Shape [i·o, i·o], float64, in the order of `vec`.
    """
    rows = vec(gradients.double())  # [n, i·o]
    block = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        block += torch.outer(row, row)
    return block / len(rows)

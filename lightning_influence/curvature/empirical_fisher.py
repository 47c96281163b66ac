"""The Fisher matrix of the file's rows themselves: dense, a block for each layer, inverted where it is small.

With the n valid rows g_m of a layer, as they are stored, H = (1/n) sum_m g_m g_m^T + damping I. Both ways of
inverting it need plain inner products only; with P = [grad f_q^T g_m] and K = [g_m^T g_m'] they are

- by the examples (the push-through identity): P (K/n + damping I)^-1, of size [n, n];
- by the coordinates, if these are fewer: with V [n, k] the rows as vectors, so that K = V V^T, Woodbury's identity
  makes that (P - P V (V^T V + n damping I)^-1 V^T) / damping, of size [k, k].

So nothing is left out, and what rows do not hold has no part in any score. EK-FAC's matrix has the same mean
square in each direction of its eigenbasis, but no correlation between them; this one has those that n rows show,
with their noise, and wants more damping: on the tasks of `examples/benchmarks/lds.py`, 1 to 10 times the mean
eigenvalue. One block over all layers was worse there than a block for each on two of three tasks.

LoRIF (Li et al. 2026, arXiv:2601.21929) inverts this matrix of projected gradients by Woodbury's identity on a
truncated singular value decomposition. Nothing is truncated here: a direction that is cut off, of eigenvalue e,
counts (e + damping) / damping times as much as it should, so that truncation is right for large damping only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.curvature.base import LayerRows, RowsPart, register_curvature
from lightning_influence.curvature.damping import Damping
from lightning_influence.errors import QueryError
from lightning_influence.functional.kronecker import Eigenbasis

BYTES_PER_ENTRY = 24  # the matrix, its factor and a copy in between, in float64
COLUMNS = 1024  # solved for at a time
FLOAT32 = 2.0**-24  # how exact the scores under the damping alone are
LOST = 0.01  # of scores, at most, by their cancelling


@dataclass(frozen=True)
class EmpiricalFisher:
    """Mean of the rows' outer products, plus the damping (each row once, however often it was trained on).

    The damping rule sees EK-FAC's Lambda, so that it gives the same number. Lambda has this matrix's mean
    eigenvalue where rows are whole and were trained on equally often, with the training labels; that of merged
    rows is smaller, since epochs partly cancel in them.

    All rows of each layer are multiplied with each other: n^2 k / 2 multiply-adds in float64, n^2 (o + i) for
    pairs of one position. The products are kept, up to 256 MB, for the next damping or query; then each call takes
    the smaller of n^3 / 3 and k^3 / 3, and 24 bytes times the square of that size in memory.

    Args:
        max_size: largest number of examples or of a layer's coordinates, whichever is smaller, that is inverted;
            0.9 GB at 6,000.
    """

    max_size: int = 6000

    def __post_init__(self) -> None:
        if isinstance(self.max_size, bool) or not isinstance(self.max_size, int) or self.max_size < 1:
            raise ValueError(f"`max_size` must be a positive integer, got {self.max_size!r}.")

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """1 / damping: the inverse where no row reaches, shape [o, i]."""
        added = _scalar(damping(Lambda))
        return torch.full_like(Lambda, 1 / added if added > 0 else 0.0)

    def rows_part(self, rows: LayerRows, Lambda: Tensor, damping: Damping) -> RowsPart:
        """What the rows add to the damping; by the examples or by the coordinates.

        Raises:
            QueryError: if both are more than `max_size`, or the damping is 0 though there are gradients.
        """
        added, size = _scalar(damping(Lambda)), min(rows.count, rows.width)
        if size > self.max_size:
            raise QueryError(
                f"{rows.name}: `curvature='empirical_fisher'` inverts a matrix of the size of the valid rows, or "
                f"of a row's coordinates, but there are {rows.count:,} and {rows.width:,}, and at most "
                f"{self.max_size:,} are allowed. Pass `curvature=EmpiricalFisher(max_size={size})`, which takes "
                f"{BYTES_PER_ENTRY * size**2 / 1e9:.1f} GB, capture with a smaller `bytes_per_example`, or ask "
                "with `curvature='ekfac'`."
            )
        if not added > 0:
            if Lambda.any():
                raise QueryError(
                    f"{rows.name}: `damping` must be positive with `curvature='empirical_fisher'`, whose matrix "
                    f"has no inverse without; the rule gave {added:g}."
                )
            added = 1.0  # a layer without any gradient says nothing
        return _ByExamples(rows, added) if rows.count <= rows.width else _ByCoordinates(rows, added)


class _ByExamples:
    """(I + K / (n damping))^-1, times scores under the damping alone."""

    def __init__(self, rows: LayerRows, damping: float) -> None:
        self._gram = rows.gram() / damping
        matrix = self._gram / rows.count
        matrix.diagonal().add_(1)
        self._factor = torch.linalg.cholesky(matrix)

    def scores(self, diagonal: Tensor) -> Tensor:
        """Scores under the whole matrix, float64 [q, n]."""
        return torch.cholesky_solve(diagonal.to(self._factor).T, self._factor).T

    def self_influence(self) -> Tensor:
        """diag((I + K / (n damping))^-1 K / damping), shape [n], some columns at a time."""
        parts = [
            torch.cholesky_solve(columns, self._factor).diagonal(-number * COLUMNS)
            for number, columns in enumerate(self._gram.split(COLUMNS, dim=1))
        ]
        return torch.cat(parts)


class _ByCoordinates:
    """I - V (V^T V + n damping I)^-1 V^T, times scores under the damping alone."""

    def __init__(self, rows: LayerRows, damping: float) -> None:
        self._rows = rows
        matrix = functools.reduce(Tensor.add_, (vectors.T @ vectors for _, vectors in rows.blocks()))
        self._damping, self._largest = damping, _largest_eigenvalue(matrix) / rows.count
        matrix.diagonal().add_(rows.count * damping)
        self._factor = torch.linalg.cholesky(matrix)

    def scores(self, diagonal: Tensor) -> Tensor:
        """Scores under the whole matrix, float64 [q, n]; reads the rows twice.

        Raises:
            QueryError: if the damping is so small that rounding would spoil them.
        """
        least = self._largest * FLOAT32 / LOST
        if self._damping < least:
            raise QueryError(
                f"{self._rows.name}: `damping` is {self._damping:.2g}, too small for the largest eigenvalue "
                f"{self._largest:.2g} of `curvature='empirical_fisher'`: rounding would spoil the scores. Pass at "
                f"least {least:.1g}, or ask with `curvature='ekfac'`."
            )
        scores = diagonal.to(self._factor)
        along = scores.new_zeros(len(scores), len(self._factor))  # [q, k]
        for part, vectors in self._rows.blocks():
            along += scores[:, part] @ vectors
        solved = torch.cholesky_solve(along.T, self._factor)
        return torch.cat([scores[:, part] - (vectors @ solved).T for part, vectors in self._rows.blocks()], dim=1)

    def self_influence(self) -> Tensor:
        """g^T H^-1 g of each row, shape [n]."""
        halves = (
            torch.linalg.solve_triangular(self._factor, vectors.T, upper=False).square().sum(0)
            for _, vectors in self._rows.blocks()
        )
        return self._rows.count * torch.cat(list(halves))


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Of a positive semi-definite matrix, nearly, by power iteration."""
    vector = torch.ones_like(matrix[0])
    for _ in range(20):
        vector = matrix @ (vector / vector.norm().clamp(min=1e-300))
    return float(vector.norm())


def _scalar(damping: Tensor | float) -> float:
    if isinstance(damping, Tensor) and damping.numel() != 1:
        raise ValueError(
            "`damping` must be one number for a layer with `curvature='empirical_fisher'`, got a tensor of shape "
            f"{tuple(damping.shape)}."
        )
    return float(damping)


register_curvature("empirical_fisher", EmpiricalFisher())

"""Kronecker factors of a layer's Fisher block (K-FAC; Martens & Grosse 2015, arXiv:1503.05671).

The convention of the package, stated once:

- A = (1/M) sum_n sum_s a a^T over the M positions that carry gradient,
- S = (1/N) sum_n sum_s d d^T over the N examples,

with a the layer's input (1 appended for the bias) and d the gradient of the example's summed loss at
the layer's output. A position carries gradient when its d is not all zero: padding and ignored
positions never do, so padding a batch further changes neither factor. Only the eigenvectors of A and
S enter EK-FAC, which is therefore independent of how A and S are normalised.

A layer with groups of outputs has an A, an S and an M for each group. A diagonal factor keeps the
diagonal of these sums. In a table of which rows are looked up, d is one-hot at the looked-up row and a the
gradient of what was looked up, so that the diagonal of S counts rows.
"""

from __future__ import annotations

from torch import Tensor

from lightning_influence.gradients import LayerGradient, RowGradient, SummedGradient


def carries_gradient(output_grads: Tensor) -> Tensor:
    """Which positions take part in their example's loss, [..., o] -> bool [...]."""
    return (output_grads != 0).any(dim=-1)


def add_covariance_sums(gradient: LayerGradient, A_sum: Tensor, S_sum: Tensor, *, weight: float = 1.0) -> Tensor:
    """Add one batch's sums of a a^T and d d^T in place; cost M (i^2 + o^2) multiply-adds.

    Args:
        gradient: the layer's per-example gradients.
        A_sum: sum over positions of a a^T, shape [i, i], [g, i, i], or [i] for a diagonal A; changed in place.
        S_sum: sum over positions of d d^T, shape [o, o], [g, o/g, o/g], or [o]; changed in place.
        weight: how many positions each position stands for, in a sample of them; for S, which sums over
            positions, where A is their mean.

    Returns:
        The number of positions that carried gradient, int64 of shape [], or [g] with groups.
    """
    if isinstance(gradient, SummedGradient):
        counts = [add_covariance_sums(part, A_sum, S_sum, weight=weight) for part in gradient.parts]
        return sum(counts[1:], start=counts[0])
    if isinstance(gradient, RowGradient):
        return _add_rows(gradient, A_sum, S_sum)
    total: Tensor | None = None
    for inputs, output_grads in gradient.position_chunks():
        counted = carries_gradient(output_grads)
        inputs, output_grads = inputs.to(A_sum.dtype), output_grads.to(S_sum.dtype)
        if not counted.all():
            inputs = inputs * counted.unsqueeze(-1)
        _add_squares(A_sum, inputs, 1.0)
        _add_squares(S_sum, output_grads, weight)
        total = counted.sum(-1) if total is None else total + counted.sum(-1)
    assert total is not None
    return total


def _add_squares(total: Tensor, vectors: Tensor, weight: float) -> None:
    """Add the sum of outer squares of vectors [..., m, x] to [..., x, x], or of squares to [..., x]."""
    if total.ndim < vectors.ndim:
        total.add_(vectors.square().sum(-2), alpha=weight)
    elif vectors.ndim == 2:
        total.addmm_(vectors.T, vectors, alpha=weight)
    else:
        total.baddbmm_(vectors.mT, vectors, alpha=weight)


def _add_rows(gradient: RowGradient, A_sum: Tensor, S_sum: Tensor) -> Tensor:
    """Of a table: a are the gradients, d one-hot rows."""
    grads = gradient.grads.flatten(0, 1).to(A_sum.dtype)  # [m, i]
    counted = carries_gradient(grads)
    _add_squares(A_sum, grads, 1.0)
    S_sum.index_add_(0, gradient.rows.flatten()[counted], counted[counted].to(S_sum.dtype))
    return counted.sum()


def covariance(gradient: LayerGradient) -> tuple[Tensor, Tensor]:
    """A [i, i] and S [o, o] of one batch.

    Example:
        >>> import torch
        >>> from lightning_influence.gradients import FactoredGradient
        >>> a, d = torch.ones(2, 1, 3), torch.ones(2, 1, 2)
        >>> A, S = covariance(FactoredGradient(a, d))
        >>> A[0, 0].item(), S[0, 0].item()
        (1.0, 1.0)
    """
    o, i = gradient.shape
    like = gradient.tensors[-1]
    A_sum, S_sum = like.new_zeros(i, i), like.new_zeros(o, o)
    positions = add_covariance_sums(gradient, A_sum, S_sum)
    return A_sum / positions.clamp(min=1), S_sum / max(len(gradient), 1)

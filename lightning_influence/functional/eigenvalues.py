"""Lambda, EK-FAC's eigenvalues: second moments of the gradients in the Kronecker eigenbasis.

Lambda_oi = (1/N) sum_n (Q_S^T G_n Q_A)_oi^2 with G_n = sum_s d a^T the whole example's gradient
(George et al. 2018, arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import FactoredGradient, LayerGradient, RowGradient, chunk_elements


def second_moment_sum(gradient: LayerGradient, basis: Eigenbasis) -> Tensor:
    """Sum over examples of the squared coordinates, shape [o, i].

    With one position an example's coordinates are an outer product, and the sum is one matrix
    product of n (o + i + o i) multiply-adds beside the rotation; otherwise each is made whole.
    """
    o, i = basis.shape
    if isinstance(gradient, FactoredGradient) and gradient.positions == 1 and basis.eigenvalues_S.ndim == 1:
        rotated = basis.rotate_factors(gradient)
        inputs, sizes = _over_largest(rotated.inputs[:, 0], dim=1)  # an example's size goes to its gradient
        grads, size = _over_largest(rotated.output_grads[:, 0] * sizes)
        return (_squares(grads).T @ _squares(inputs)) * size.square()
    if isinstance(gradient, RowGradient) and basis.Q_S is None:
        _, rows, grads = gradient.combined()
        rotated_rows = grads if basis.Q_A is None else grads @ basis.Q_A  # [m, i]
        return rotated_rows.new_zeros(o, i).index_add_(0, rows, rotated_rows.square())
    total = torch.zeros(o, i, dtype=basis.dtype, device=gradient.device)
    step = max(1, chunk_elements(gradient.device) // (o * i))
    for start in range(0, len(gradient), step):
        total += basis.rotate(gradient[start : start + step]).square().sum(0)
    return total


def _over_largest(values: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The values over the largest magnitude, of all or along a dimension, and that magnitude; 1 for zeros."""
    if not values.numel():
        return values, values.new_ones(())
    largest = values.abs().amax(dim, keepdim=True) if dim is not None else values.abs().max()
    largest = largest.where(largest > 0, 1)
    return values / largest, largest


def _squares(values: Tensor) -> Tensor:
    """Squares of values up to 1.

    Squares of tiny values would be subnormal numbers, with which a CPU multiplies some twenty times slower.
    What is dropped is below 2^-62 of the largest square.
    """
    return hardshrink(values, 2.0**-31).square()

"""Lambda, EK-FAC's eigenvalues: second moments of the gradients in the Kronecker eigenbasis.

Lambda_oi = (1/N) sum_n (Q_S^T G_n Q_A)_oi^2 with G_n = sum_s d a^T the whole example's gradient
(George et al. 2018, arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import CHUNK_ELEMENTS, FactoredGradient, LayerGradient, RowGradient


def second_moment_sum(gradient: LayerGradient, basis: Eigenbasis) -> Tensor:
    """Sum over examples of the squared coordinates, shape [o, i].

    With one position an example's coordinates are an outer product, and the sum is one matrix
    product of n (o + i + o i) multiply-adds beside the rotation; otherwise each is made whole.
    """
    if isinstance(gradient, FactoredGradient) and gradient.positions == 1 and basis.eigenvalues_S.ndim == 1:
        rotated = basis.rotate_factors(gradient)
        return rotated.output_grads[:, 0].square().T @ rotated.inputs[:, 0].square()
    return moments_and_coordinates(gradient, basis, None)[0]


def moments_and_coordinates(
    gradient: LayerGradient, basis: Eigenbasis, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of squared coordinates [o, i] and some of the coordinates, in one pass.

    Args:
        gradient: of n examples.
        basis: the layer's.
        kept: int64 [k], places in the flattened [o, i]; None for no coordinates.

    Returns:
        Sums [o, i] and coordinates [n, k].
    """
    o, i = basis.shape
    if isinstance(gradient, RowGradient) and basis.Q_S is None and o * i * len(gradient) > CHUNK_ELEMENTS:
        return _of_rows(gradient, basis, kept)
    sums, parts = torch.zeros(o, i, dtype=basis.dtype, device=gradient.device), []
    step = max(1, CHUNK_ELEMENTS // (o * i))
    for start in range(0, len(gradient), step):
        coordinates = basis.rotate(gradient[start : start + step])
        if kept is not None:
            parts.append(coordinates.flatten(1)[:, kept])
        sums += coordinates.square().sum(0)
    return sums, torch.cat(parts) if parts else sums.new_zeros(len(gradient), 0 if kept is None else len(kept))


def _of_rows(gradient: RowGradient, basis: Eigenbasis, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for a large table, of which an example looks up few rows."""
    o, i = basis.shape
    examples, rows, grads = gradient.combined()
    rotated = grads if basis.Q_A is None else grads @ basis.Q_A  # [m, i]
    sums = rotated.new_zeros(o, i).index_add_(0, rows, rotated.square())
    if kept is None:
        return sums, sums.new_zeros(len(gradient), 0)
    chosen_rows, places = (kept // i).unique(return_inverse=True)  # rows with a kept coordinate
    place_of_row = torch.full((o,), -1, device=rows.device)
    place_of_row[chosen_rows] = torch.arange(len(chosen_rows), device=rows.device)
    inside = place_of_row[rows] >= 0
    values = rotated.new_zeros(len(gradient), len(chosen_rows), i)
    values[examples[inside], place_of_row[rows[inside]]] = rotated[inside]
    return sums, values[:, places, kept % i]

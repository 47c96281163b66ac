"""Lambda, EK-FAC's eigenvalues: second moments of the gradients in the Kronecker eigenbasis.

Lambda_oi = (1/N) sum_n (Q_S^T G_n Q_A)_oi^2 with G_n = sum_s d a^T the whole example's gradient
(George et al. 2018, arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296).
"""

from __future__ import annotations

from torch import Tensor

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import LayerGradient

CHUNK_ELEMENTS = 16 * 2**20  # of dense coordinates held at a time: 64 MB in float32


def second_moment_sum(gradient: LayerGradient, basis: Eigenbasis) -> Tensor:
    """Sum over examples of the squared coordinates, shape [o, i].

    With one position an example's coordinates are an outer product, and the sum is one matrix
    product of n (o + i + o i) multiply-adds beside the rotation; otherwise each is made whole.
    """
    rotated = basis.rotate_factors(gradient)
    if rotated.positions == 1:
        return rotated.output_grads[:, 0].square().T @ rotated.inputs[:, 0].square()
    o, i = basis.shape
    total = rotated.inputs.new_zeros(o, i)
    chunk = max(1, CHUNK_ELEMENTS // (o * i))
    for start in range(0, len(rotated), chunk):
        total += rotated[start : start + chunk].dense().square().sum(0)
    return total

"""Kronecker factors of a layer's Fisher block (K-FAC; Martens & Grosse 2015, arXiv:1503.05671).

The convention of the package, stated once:

- A = (1/M) sum_n sum_s a a^T over the M positions that carry gradient,
- S = (1/N) sum_n sum_s d d^T over the N examples,

with a the layer's input (1 appended for the bias) and d the gradient of the example's summed loss at
the layer's output. A position carries gradient when its d is not all zero: padding and ignored
positions never do, so padding a batch further changes neither factor. Only the eigenvectors of A and
S enter EK-FAC, which is therefore independent of how A and S are normalised.
"""

from __future__ import annotations

from torch import Tensor

from lightning_influence.gradients import LayerGradient


def carries_gradient(output_grads: Tensor) -> Tensor:
    """Which positions take part in their example's loss, [n, s, o] -> bool [n, s]."""
    return (output_grads != 0).any(dim=-1)


def add_covariance_sums(gradient: LayerGradient, A_sum: Tensor, S_sum: Tensor) -> Tensor:
    """Add one batch's sums of a a^T and d d^T in place; cost M (i^2 + o^2) multiply-adds.

    Args:
        gradient: the layer's per-example gradients.
        A_sum: sum over positions of a a^T, shape [i, i]; changed in place.
        S_sum: sum over positions of d d^T, shape [o, o]; changed in place.

    Returns:
        The number of positions that carried gradient, a 0-dimensional int64 tensor.
    """
    counts = carries_gradient(gradient.output_grads)
    inputs = gradient.inputs.flatten(0, 1).to(A_sum.dtype)  # [m, i]
    if not counts.all():
        inputs = inputs * counts.flatten().unsqueeze(-1)
    output_grads = gradient.output_grads.flatten(0, 1).to(S_sum.dtype)  # [m, o]
    A_sum.addmm_(inputs.T, inputs)
    S_sum.addmm_(output_grads.T, output_grads)
    return counts.sum()


def covariance(gradient: LayerGradient) -> tuple[Tensor, Tensor]:
    """A [i, i] and S [o, o] of one batch.

    Example:
        >>> import torch
        >>> a, d = torch.ones(2, 1, 3), torch.ones(2, 1, 2)
        >>> A, S = covariance(LayerGradient(a, d))
        >>> A[0, 0].item(), S[0, 0].item()
        (1.0, 1.0)
    """
    i, o = gradient.inputs.shape[-1], gradient.output_grads.shape[-1]
    A_sum, S_sum = gradient.inputs.new_zeros(i, i), gradient.output_grads.new_zeros(o, o)
    positions = add_covariance_sums(gradient, A_sum, S_sum)
    return A_sum / positions.clamp(min=1), S_sum / max(len(gradient), 1)

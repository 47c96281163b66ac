"""Inner products of factored gradients with matrices, without ever making the gradients whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.functional.eigenvalues import CHUNK_ELEMENTS
from lightning_influence.gradients import LayerGradient


def inner_products(gradient: LayerGradient, matrices: Tensor) -> Tensor:
    """<matrices_q, G_n> for all pairs, shape [q, n].

    One matrix product of n s q o i multiply-adds; what it holds at a time is the smaller of
    [n s, q o] and [n s, q i], in chunks of examples of at most 64 MB.

    Args:
        gradient: n examples.
        matrices: shape [q, o, i].
    """
    q, o, i = matrices.shape
    left, right = gradient.output_grads, gradient.inputs
    if o < i:  # contract the longer side first
        matrices, left, right = matrices.transpose(1, 2), right, left
    flat = matrices.permute(1, 0, 2).flatten(1)  # [long, q short]
    result = right.new_empty(q, len(gradient))
    chunk = max(1, CHUNK_ELEMENTS // (q * min(o, i) * gradient.positions))
    for start in range(0, len(gradient), chunk):
        rows = slice(start, start + chunk)
        contracted = (left[rows] @ flat).unflatten(-1, (q, -1))  # [n, s, q, short]
        result[:, rows] = torch.einsum("nsqx,nsx->qn", contracted, right[rows])
    return result


def weighted_squares(gradient: LayerGradient, weights: Tensor) -> Tensor:
    """sum_oi weights_oi (G_n)_oi^2 for each example, shape [n]; weights have the shape [o, i]."""
    if gradient.positions == 1:
        squares = gradient.output_grads[:, 0].square() @ weights  # [n, i]
        return (squares * gradient.inputs[:, 0].square()).sum(-1)
    chunk = max(1, CHUNK_ELEMENTS // weights.numel())
    parts = [
        (gradient[start : start + chunk].dense().square() * weights).sum((1, 2))
        for start in range(0, len(gradient), chunk)
    ]
    return torch.cat(parts) if parts else weights.new_zeros(0)

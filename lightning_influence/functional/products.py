"""Inner products of gradients with matrices, in the form in which they are cheapest."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.gradients import CHUNK_ELEMENTS, FactoredGradient, LayerGradient


def inner_products(gradient: LayerGradient, matrices: Tensor) -> Tensor:
    """<matrices_q, G_n> for all pairs, shape [q, n].

    Of gradients that are one outer product, or with one matrix, n s q o i multiply-adds in factors; what this
    holds at a time is the smaller of [n s, q o] and [n s, q i], in chunks of examples of at most 64 MB. Of
    others n (s + q) o i, with the gradients made whole, likewise in chunks.

    Args:
        gradient: n examples.
        matrices: shape [q, o, i].
    """
    if not isinstance(gradient, FactoredGradient) or (gradient.positions > 1 and len(matrices) > 1):
        parts = [matrices.flatten(1) @ dense.flatten(1).T for _, dense in gradient.dense_chunks()]
        return torch.cat(parts, dim=1) if parts else matrices.new_zeros(len(matrices), 0)
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
    if isinstance(gradient, FactoredGradient) and gradient.positions == 1:
        squares = gradient.output_grads[:, 0].square() @ weights  # [n, i]
        return (squares * gradient.inputs[:, 0].square()).sum(-1)
    parts = [(dense.square() * weights).sum((1, 2)) for _, dense in gradient.dense_chunks()]
    return torch.cat(parts) if parts else weights.new_zeros(0)

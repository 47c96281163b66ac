"""Correlations of many rows at once: Pearson's, and Spearman's, which is Pearson's of the ranks.

Rows are along the last dimension, in float64. The order that is asked for is in `actual`: a row of it that is
constant has none, and its correlation is NaN; a row of `predicted` that is constant says nothing, and scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of theirs.

    Args:
        values: shape [..., m], without NaN.

    Returns:
        float64 [..., m].

    Example:
        >>> average_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2


def row_correlations(predicted: Tensor, actual: Tensor) -> Tensor:
    """Pearson's correlation of each row; leading dimensions are broadcast.

    Args:
        predicted: shape [..., m].
        actual: shape [..., m].

    Returns:
        float64 [...]; 0 where `predicted` is constant, NaN where `actual` is.

    Example:
        >>> row_correlations(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])).tolist()
        [-1.0, 0.0]
    """
    says_nothing, has_no_order = (values.amax(-1) == values.amin(-1) for values in (predicted, actual))
    one, two = (values.double() - values.double().mean(-1, keepdim=True) for values in (predicted, actual))
    norms = (one.square().sum(-1) * two.square().sum(-1)).sqrt()
    found = ((one * two).sum(-1) / norms).clamp(-1, 1)
    return found.masked_fill(says_nothing, 0).masked_fill(has_no_order, torch.nan)


def rank_correlations(predicted: Tensor, actual: Tensor) -> Tensor:
    """Spearman's correlation of each row; arguments and result as in `row_correlations`.

    Example:
        >>> rank_correlations(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 8.0, 9.0])).item()
        1.0
    """
    return row_correlations(average_ranks(predicted), average_ranks(actual))

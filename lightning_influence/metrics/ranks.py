"""Correlations of many rows at once: Pearson's, and Spearman's, which is Pearson's of the ranks.

Rows are along the last dimension, in float64. Columns may count several times, or not at all, as in a sample of
them that is drawn with replacement; rows are sorted once for all samples. The order that is asked for is in
`actual`: a row of it that is constant has none, and its correlation is NaN; a constant row of `predicted` says
nothing, and scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SortedRows:
    """Rows whose ranks are wanted several times, each time with other counts of the columns.

    Args:
        values: shape [..., m], without NaN.

    Example:
        >>> rows = SortedRows(torch.tensor([3.0, 1.0, 2.0]))
        >>> rows.ranks(torch.tensor([1.0, 2.0, 0.0])).tolist()  # of [3, 1, 1]; the last one is nobody's
        [3.0, 1.5, 2.5]
    """

    def __init__(self, values: Tensor) -> None:
        ordered, self._order = values.sort(dim=-1)
        differs, ends = ordered[..., 1:] != ordered[..., :-1], ordered[..., :1] == ordered[..., :1]
        places = torch.arange(values.shape[-1], device=values.device)
        # Where in the order those begin and end that are equal to each.
        self._first = torch.where(torch.cat([ends, differs], -1), places, 0).cummax(-1).values
        last = torch.where(torch.cat([differs, ends], -1), places, len(places))
        self._last = last.flip(-1).cummin(-1).values.flip(-1)

    def ranks(self, counts: Tensor) -> Tensor:
        """Ranks from 1 where column j counts `counts[j]` times, float64 [..., m]; equals share their mean."""
        ordered = counts.double()[self._order]
        up_to = ordered.cumsum(-1)
        below = (up_to - ordered).gather(-1, self._first)
        ranks = (below + up_to.gather(-1, self._last) + 1) / 2
        return torch.empty_like(ranks).scatter_(-1, self._order, ranks)


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
    return SortedRows(values).ranks(torch.ones(values.shape[-1], device=values.device, dtype=torch.float32))


def row_correlations(predicted: Tensor, actual: Tensor, counts: Tensor | None = None) -> Tensor:
    """Pearson's correlation of each row; leading dimensions are broadcast.

    Args:
        predicted: shape [..., m].
        actual: shape [..., m].
        counts: how often each column counts, [m]; None for once.

    Returns:
        float64 [...]; 0 where `predicted` is constant, NaN where `actual` is.

    Example:
        >>> row_correlations(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])).tolist()
        [-1.0, 0.0]
    """
    weights = torch.ones(actual.shape[-1], device=actual.device, dtype=torch.float32) if counts is None else counts
    kept = weights > 0
    weights = weights[kept].double()
    predicted, actual = predicted[..., kept].double(), actual[..., kept].double()
    says_nothing, has_no_order = (values.amax(-1) == values.amin(-1) for values in (predicted, actual))
    one, two = (values - (values @ weights / weights.sum())[..., None] for values in (predicted, actual))
    norms = ((one.square() @ weights) * (two.square() @ weights)).sqrt()
    found = ((one * two) @ weights / norms).clamp(-1, 1)
    return found.masked_fill(says_nothing, 0).masked_fill(has_no_order, torch.nan)


def rank_correlations(predicted: Tensor, actual: Tensor) -> Tensor:
    """Spearman's correlation of each row; arguments and result as in `row_correlations`.

    Example:
        >>> rank_correlations(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 8.0, 9.0])).item()
        1.0
    """
    return row_correlations(average_ranks(predicted), average_ranks(actual))

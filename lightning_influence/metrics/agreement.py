"""Whether two sets of scores put the training examples in the same order."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional import spearman_corrcoef


def mean_rank_correlation(scores: Tensor, reference: Tensor) -> float:
    """Spearman's rank correlation of each query's scores with the reference's, averaged.

    Args:
        scores: shape [q, n], n >= 2.
        reference: shape [q, n].

    Returns:
        Between -1 and 1. A query whose scores are all equal in both (its gradient is zero) has no order
        and does not count; NaN if that leaves none.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(mean_rank_correlation(scores, scores.exp()), 4)
        1.0
    """
    has_order = (scores != scores[:, :1]).any(1) | (reference != reference[:, :1]).any(1)
    if not has_order.any():
        return float("nan")
    ordered = (values[has_order].T.contiguous() for values in (scores, reference))
    return float(spearman_corrcoef(*ordered).mean())

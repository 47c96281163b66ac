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
        Between -1 and 1; NaN if a query's scores are all equal.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(mean_rank_correlation(scores, scores.exp()), 4)
        1.0
    """
    return float(spearman_corrcoef(scores.T.contiguous(), reference.T.contiguous()).mean())

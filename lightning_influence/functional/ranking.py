"""Orders of scores: the best k of each query."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, best first; NaN never counts, and ties go to the lower index.

    Args:
        scores: shape [q, n].
        k: how many.
        largest: whether large scores are the best.

    Returns:
        Values [q, k] and column indices int64 [q, k].

    Example:
        >>> top_k(torch.tensor([[1.0, float("nan"), 3.0]]), 2)[1].tolist()
        [[2, 0]]
    """
    worst = -torch.inf if largest else torch.inf
    order = scores.nan_to_num(nan=worst)  # infinities become finite, and so come before NaN
    indices = order.sort(dim=1, descending=largest, stable=True).indices[:, :k]
    return scores.gather(1, indices), indices

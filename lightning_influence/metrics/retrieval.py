"""Are planted sources found? Recall at k and the mean reciprocal rank.

Sources are training examples that are known to matter to a query: its copies, its paraphrases, the poisons behind
it. Ties are broken against the sources, so that constant scores earn nothing; NaN, an example without a row,
comes last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.metrics.checks import check_shape
from lightning_influence.metrics.means import MeanOverQueries


def recall_at_k(scores: Tensor, sources: Tensor, k: int) -> Tensor:
    """Share of each query's sources among its k best-scored examples, averaged over queries.

    Args:
        scores: shape [q, N]; NaN for examples without a row.
        sources: bool, which examples are the query's sources, shape [q, N].
        k: how many examples are looked at; with fewer than there are sources, recall stays below 1.

    Returns:
        A float64 scalar; queries without a source do not count, NaN if none is left.

    Raises:
        TypeError, ValueError: if shapes do not fit, or k is not positive.

    Example:
        >>> sources = torch.tensor([[True, False, True, False]])
        >>> recall_at_k(torch.tensor([[0.9, 0.8, 0.1, 0.0]]), sources, k=2).item()
        0.5
    """
    return _recalls(scores, sources, k).nanmean()


def mean_reciprocal_rank(scores: Tensor, sources: Tensor) -> Tensor:
    """One over the rank of each query's best-scored source, averaged over queries.

    Args:
        scores: shape [q, N]; NaN for examples without a row.
        sources: bool, which examples are the query's sources, shape [q, N].

    Returns:
        A float64 scalar; queries without a source do not count, NaN if none is left.

    Raises:
        TypeError, ValueError: if shapes do not fit.

    Example:
        >>> sources = torch.tensor([[False, False, True]])
        >>> mean_reciprocal_rank(torch.tensor([[0.9, 0.1, 0.8]]), sources).item()
        0.5
    """
    return _reciprocal_ranks(scores, sources).nanmean()


class RecallAtK(MeanOverQueries):
    """`recall_at_k` over batches of queries; `update(scores, sources)`.

    Args:
        k: how many examples are looked at.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = RecallAtK(k=1)
        >>> metric.update(torch.tensor([[0.9, 0.8]]), torch.tensor([[True, False]]))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_k(k)
        self.k = k

    def update(self, scores: Tensor, sources: Tensor) -> None:
        """Add the queries of a batch."""
        self.add(_recalls(scores, sources, self.k))


class MeanReciprocalRank(MeanOverQueries):
    """`mean_reciprocal_rank` over batches of queries; `update(scores, sources)`.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = MeanReciprocalRank()
        >>> metric.update(torch.tensor([[0.9, 0.8]]), torch.tensor([[False, True]]))
        >>> metric.compute().item()
        0.5
    """

    def update(self, scores: Tensor, sources: Tensor) -> None:
        """Add the queries of a batch."""
        self.add(_reciprocal_ranks(scores, sources))


def _recalls(scores: Tensor, sources: Tensor, k: int) -> Tensor:
    _check_k(k)
    found = _sources_in_order(scores, sources)
    return found[:, :k].sum(1).double() / found.sum(1)  # 0 / 0 is NaN: no source


def _reciprocal_ranks(scores: Tensor, sources: Tensor) -> Tensor:
    found = _sources_in_order(scores, sources)
    ranks = found.double().argmax(1) + 1  # the first True
    return torch.where(found.any(1), 1 / ranks.double(), torch.nan)


def _sources_in_order(scores: Tensor, sources: Tensor) -> Tensor:
    """Which of a query's examples, best first, are sources, bool [q, N]."""
    check_shape(scores, "scores", ("q", "N"))
    check_shape(sources, "sources", tuple(scores.shape))
    if sources.dtype != torch.bool:
        raise TypeError(f"`sources` must be a boolean mask [q, N], got {sources.dtype}.")
    sources = sources.to(scores.device)
    others_first = sources.to(torch.uint8).argsort(dim=1, stable=True)
    numbers = scores.double().nan_to_num(nan=-torch.inf).gather(1, others_first)
    best_first = others_first.gather(1, numbers.argsort(dim=1, descending=True, stable=True))
    return sources.gather(1, best_first)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"`k` must be positive, got {k}.")

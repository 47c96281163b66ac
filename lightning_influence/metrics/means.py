"""The accumulator of measures that give each query a number of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOverQueries(Metric):
    """The mean of one number a query; queries whose number is NaN do not count.

    Args:
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean over all queries so far that count; NaN if none does."""
        return self.total / self.count

    def add(self, values: Tensor) -> None:
        """Take the numbers of a batch of queries, [q]."""
        self.total += values.nansum().to(self.total)
        self.count += (~values.isnan()).sum().to(self.count)

"""A and S of a layer, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.factors.base import SumMetric
from lightning_influence.functional.covariance import add_covariance_sums
from lightning_influence.gradients import LayerGradient


class KroneckerCovariance(SumMetric):
    """The Kronecker factors A [i, i] and S [o, o] (convention: `functional.covariance`).

    Args:
        shape: (o, i) of the layer's gradient.
        dtype: of the sums; float32 or float64.

    Example:
        >>> metric = KroneckerCovariance((2, 3))
        >>> metric.update(LayerGradient(torch.ones(4, 1, 3), torch.ones(4, 1, 2)))
        >>> A, S = metric.compute()
        >>> A.shape, S[0, 0].item()
        (torch.Size([3, 3]), 1.0)
    """

    A_sum: Tensor
    S_sum: Tensor
    positions: Tensor
    examples: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        o, i = shape
        self.add_sum("A_sum", (i, i), dtype)
        self.add_sum("S_sum", (o, o), dtype)
        self.add_sum("positions", (), torch.int64)
        self.add_sum("examples", (), torch.int64)

    def update(self, gradient: LayerGradient) -> None:
        """Add a batch of finite per-example gradients."""
        self.positions += add_covariance_sums(gradient, self.A_sum, self.S_sum)
        self.examples += len(gradient)

    def compute(self) -> tuple[Tensor, Tensor]:
        """A [i, i] and S [o, o] over everything seen."""
        return self.A_sum / self.positions.clamp(min=1), self.S_sum / self.examples.clamp(min=1)

"""A and S of a layer, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.factors.base import SumMetric
from lightning_influence.functional.covariance import add_covariance_sums
from lightning_influence.functional.kronecker import Eigenbasis, eigenbasis
from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import LayerGradient


class KroneckerCovariance(SumMetric):
    """The Kronecker factors A [i, i] and S [o, o] (convention: `functional.covariance`).

    Args:
        shape: (o, i) of the layer's gradient.
        structure: which of the factors are matrices, and in how many groups.
        dtype: of the sums; float32 or float64.
        positions: how many positions of each example to take, the same ones for all examples of a batch,
            drawn by an own generator with a fixed seed; None takes all.
        sync_on_compute: whether `compute` and `eigenbasis` join the processes.

    Example:
        >>> from lightning_influence.gradients import FactoredGradient
        >>> metric = KroneckerCovariance((2, 3))
        >>> metric.update(FactoredGradient(torch.ones(4, 1, 3), torch.ones(4, 1, 2)))
        >>> A, S = metric.compute()
        >>> A.shape, S[0, 0].item()
        (torch.Size([3, 3]), 1.0)
    """

    A_sum: Tensor
    S_sum: Tensor
    positions: Tensor
    examples: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        structure: KroneckerStructure = FULL,
        *,
        dtype: torch.dtype = torch.float32,
        positions: int | None = None,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.structure = structure
        self.sampled_positions = positions
        self._generator = torch.Generator().manual_seed(0)
        self.add_sum("A_sum", structure.inputs_shape(shape), dtype)
        self.add_sum("S_sum", structure.outputs_shape(shape), dtype)
        self.add_sum("positions", () if structure.groups == 1 else (structure.groups,), torch.int64)
        self.add_sum("examples", (), torch.int64)

    def update(self, gradient: LayerGradient) -> None:
        """Add a batch of finite per-example gradients."""
        weight = 1.0
        if self.sampled_positions is not None:
            gradient, weight = gradient.sampled(self.sampled_positions, self._generator)
        self.positions += add_covariance_sums(gradient, self.A_sum, self.S_sum, weight=weight)
        self.examples += len(gradient)

    def compute(self) -> tuple[Tensor, Tensor]:
        """A and S over everything seen, in the shapes that the structure gives."""
        counts = self.positions.clamp(min=1)
        counts = counts.reshape(*counts.shape, *[1] * (self.A_sum.ndim - counts.ndim))
        return self.A_sum / counts, self.S_sum / self.examples.clamp(min=1)

    def eigenbasis(self) -> Eigenbasis:
        """The basis of everything seen, decomposed in float64."""
        return eigenbasis(*self.compute(), self.structure)

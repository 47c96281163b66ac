"""Lambda of a layer, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.factors.base import SumMetric
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import LayerGradient


class EigenvalueCorrection(SumMetric):
    """Lambda [o, i]: mean squared coordinates of the gradients in a given eigenbasis.

    Args:
        basis: the layer's eigenbasis, of shape (o, i).
        dtype: of the sums; float32 or float64.
        sync_on_compute: whether `compute` joins the processes.
    """

    squares: Tensor
    examples: Tensor

    def __init__(
        self, basis: Eigenbasis, dtype: torch.dtype = torch.float32, *, sync_on_compute: bool = True
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.basis = basis
        self.add_sum("squares", basis.shape, dtype)
        self.add_sum("examples", (), torch.int64)

    def update(self, gradient: LayerGradient) -> None:
        """Add a batch of finite per-example gradients."""
        self.squares += second_moment_sum(gradient, self.basis)
        self.examples += len(gradient)

    def update_some(self, coordinates: Tensor, kept: Tensor) -> None:
        """Add a batch of which some coordinates are at hand; `compute` is right at these only.

        Args:
            coordinates: of the gradients in the basis, shape [n, k].
            kept: int64 [k], their places in the flattened [o, i], each once.
        """
        self.squares.view(-1)[kept] += coordinates.square().sum(0)
        self.examples += len(coordinates)

    def compute(self) -> Tensor:
        """Lambda [o, i] over everything seen."""
        return self.squares / self.examples.clamp(min=1)

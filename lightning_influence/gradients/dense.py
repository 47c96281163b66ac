"""Gradients that are matrices already, such as those of a normalization's weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients.base import LayerGradient


@dataclass(frozen=True)
class DenseGradient(LayerGradient):
    """Each example's gradient as it is.

    Args:
        values: shape [n, o, i].
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def positions(self) -> int:
        """0: no outer products."""
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values."""
        return (self.values,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> DenseGradient:
        """Of other values."""
        return DenseGradient(*tensors)

    def dense(self) -> Tensor:
        """The values."""
        return self.values

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Of each example, shape [n, p]."""
        return torch.einsum("op,noi,ip->np", U, self.values.float(), V)


@dataclass(frozen=True)
class Coordinates(DenseGradient):
    """What rows keep of gradients: chosen coordinates in an eigenbasis, as values [n, 1, k]."""

    def with_tensors(self, tensors: Sequence[Tensor]) -> Coordinates:
        """Of other values."""
        return Coordinates(*tensors)

"""Gradients with few rows that are not zero: those of a table, of which an example looks up some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.gradients.base import LayerGradient


@dataclass(frozen=True)
class RowGradient(LayerGradient):
    """The gradient of example n has `grads[n, s]` added to its row `rows[n, s]`.

    That is a sum of outer products of one-hot vectors and gradients. In the terms of a layer's matrix
    [o, i] the row is the output o, so that a table shared with an output layer has that layer's shape.

    Args:
        num_rows: o, of the table.
        rows: int64 [n, s].
        grads: d loss_n / d (what was looked up), shape [n, s, i]; zero where padding was looked up.
    """

    num_rows: int
    rows: Tensor
    grads: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.num_rows, self.grads.shape[-1]

    @property
    def positions(self) -> int:
        """Number of looked-up rows s."""
        return self.grads.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Rows and gradients."""
        return self.rows, self.grads

    def with_tensors(self, tensors: Sequence[Tensor]) -> RowGradient:
        """Of other look-ups in a table of the same size."""
        return RowGradient(self.num_rows, *tensors)

    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""
        n, _, i = self.grads.shape
        flat = self.grads.new_zeros(n * self.num_rows, i)
        flat.index_add_(0, self._flat_rows(), self.grads.flatten(0, 1))
        return flat.unflatten(0, (n, self.num_rows))

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Of each look-up, shape [n s, p]."""
        return (U[self.rows] * (self.grads.float() @ V)).flatten(0, 1)

    def combined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each example's look-ups of the same row added up.

        Returns:
            Examples int64 [m], their rows int64 [m] and the sums [m, i]; m is at most n s.
        """
        pairs, places = self._flat_rows().unique(return_inverse=True)
        sums = self.grads.new_zeros(len(pairs), self.grads.shape[-1])
        sums.index_add_(0, places, self.grads.flatten(0, 1))
        return pairs // self.num_rows, pairs % self.num_rows, sums

    def padded(self, positions: int) -> RowGradient:
        """The same gradients with look-ups of row 0 that have no gradient."""
        missing = positions - self.positions
        return RowGradient(self.num_rows, pad(self.rows, (0, missing)), pad(self.grads, (0, 0, 0, missing)))

    def join(self, other: RowGradient) -> RowGradient:
        """The sum with another call's gradients, as further look-ups."""
        return RowGradient(
            self.num_rows, torch.cat([self.rows, other.rows], dim=1), torch.cat([self.grads, other.grads], dim=1)
        )

    def _flat_rows(self) -> Tensor:
        """Row numbers in a table of n tables, int64 [n s]."""
        offsets = torch.arange(len(self.rows), device=self.rows.device).unsqueeze(1) * self.num_rows
        return (self.rows + offsets).flatten()

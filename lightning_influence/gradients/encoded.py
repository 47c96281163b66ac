"""Gradients that were made into a file's rows at once, so that the layer's inputs need no copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.gradients.base import LayerGradient


@dataclass(frozen=True)
class EncodedGradient(LayerGradient):
    """What a codec makes of gradients; only to be written.

    Args:
        arrays: by name, shape [n, ...].
        finite: which examples may be written, bool [n].
        encoded_shape: (o, i) of the gradients.
    """

    arrays: Mapping[str, Tensor]
    finite_examples: Tensor
    encoded_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.encoded_shape

    @property
    def positions(self) -> int:
        """0: no outer products any more."""
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arrays, and which examples are finite."""
        return *self.arrays.values(), self.finite_examples

    def with_tensors(self, tensors: Sequence[Tensor]) -> EncodedGradient:
        """Of other arrays."""
        *arrays, finite = tensors
        return EncodedGradient(dict(zip(self.arrays, arrays, strict=True)), finite, self.encoded_shape)

    def is_finite(self, factor: Tensor | None = None) -> Tensor:
        """Which examples may be written, bool [n]."""
        return self.finite_examples

    def dense(self) -> Tensor:
        """Never."""
        raise TypeError("Encoded gradients can only be written.")

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Never."""
        raise TypeError("Encoded gradients can only be written.")

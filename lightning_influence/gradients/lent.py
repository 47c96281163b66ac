"""Gradients as they were back-propagated, in the model's own memory, to be made into rows a little later."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.gradients.base import LayerGradient


@dataclass(frozen=True)
class LentGradient(LayerGradient):
    """Gradients of which nothing was computed yet; only to be taken back.

    Args:
        raw: as back-propagated; its tensors may be the model's own.
        factor: what they are to be multiplied with, shape [] or [n].
        versions: of the tensors, which grow with every change in place.
        source: what this is a copy of, for whoever wants to know whether that stays as it is.
    """

    raw: LayerGradient
    factor: Tensor
    versions: tuple[int, ...]
    source: LentGradient | None = None

    @classmethod
    def of(cls, raw: LayerGradient, factor: Tensor, outside: Set[int]) -> LentGradient:
        """Refer to what training has computed for this step, and copy what lives on after it.

        Args:
            raw: as back-propagated.
            factor: to multiply with.
            outside: addresses of storages that are to be copied.
        """
        tensors = raw.tensors
        if any(_address(tensor) in outside for tensor in tensors):
            raw = raw.with_tensors([t.clone() if _address(t) in outside else t for t in tensors])
        return cls(raw, factor, tuple(tensor._version for tensor in raw.tensors))

    def copied(self) -> LentGradient:
        """The same of a copy, whatever becomes of the model's memory."""
        raw = self.raw.with_tensors([tensor.clone() for tensor in self.raw.tensors])
        return LentGradient(raw, self.factor, tuple(tensor._version for tensor in raw.tensors), self)

    @property
    def has_kept_source(self) -> bool:
        """Whether that which this is a copy of is still the same; not every change in place is counted."""
        if self.source is None:
            return True
        pairs = zip(self.raw.tensors, self.source.raw.tensors, strict=True)
        return self.source.is_intact and all(_are_same(*pair) for pair in pairs)

    @property
    def is_intact(self) -> bool:
        """Whether nothing was changed in place since; autograd trusts the same numbers."""
        return self.versions == tuple(tensor._version for tensor in self.raw.tensors)

    def taken(self) -> LayerGradient:
        """The gradients themselves, float32; they may still refer to the model's memory."""
        return self.raw.rescaled(self.factor, frozenset())

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.raw.shape

    @property
    def positions(self) -> int:
        """Number of shared positions s."""
        return self.raw.positions

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As back-propagated."""
        return self.raw.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerGradient:
        """Never."""
        raise TypeError("Lent gradients can only be taken.")

    def dense(self) -> Tensor:
        """Never."""
        raise TypeError("Lent gradients can only be taken.")

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Never."""
        raise TypeError("Lent gradients can only be taken.")


def _are_same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one != one)).all())  # NaN was NaN


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""Sums of a layer's gradients from several calls, and gradients of the examples of several batches."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients.base import LayerGradient
from lightning_influence.gradients.dense import DenseGradient
from lightning_influence.gradients.factored import BiasedGradient, FactoredGradient
from lightning_influence.gradients.rows import RowGradient


@dataclass(frozen=True)
class SummedGradient(LayerGradient):
    """The sum of gradients of different forms, as of a table that is also an output layer.

    Args:
        parts: of the same layer and examples, at least two.
    """

    parts: tuple[LayerGradient, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.parts[0].shape

    @property
    def positions(self) -> int:
        """All parts' together; 0 if one is not of outer products."""
        counts = [part.positions for part in self.parts]
        return sum(counts) if all(counts) else 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All parts' tensors."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SummedGradient:
        """Parts of the same forms, of other tensors."""
        left, parts = list(tensors), []
        for part in self.parts:
            taken, left = left[: len(part.tensors)], left[len(part.tensors) :]
            parts.append(part.with_tensors(taken))
        return SummedGradient(tuple(parts))

    def rescaled(self, factor: Tensor, shared: Set[int] | None = None) -> SummedGradient:
        """Every part times the factor."""
        return SummedGradient(tuple(part.rescaled(factor, shared) for part in self.parts))

    def is_finite(self, factor: Tensor | None = None) -> Tensor:
        """Whether all parts are."""
        if factor is None and self.known_finite is not None:
            return self.known_finite
        return torch.stack([part.is_finite(factor) for part in self.parts]).all(0)

    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def sampled(self, positions: int, generator: torch.Generator) -> tuple[LayerGradient, float]:
        """As many positions of each part, if that makes each of them stand for as many others."""
        samples = [part.sampled(positions, generator) for part in self.parts]
        weights = {weight for _, weight in samples}
        if len(weights) > 1:
            return self, 1.0
        return SummedGradient(tuple(part for part, _ in samples)), weights.pop()

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Of all parts."""
        return torch.cat([part.projections(U, V) for part in self.parts])


def add_calls(calls: Sequence[LayerGradient]) -> LayerGradient:
    """The gradients of a layer that was called several times, for the same n examples in each call."""
    joined: list[LayerGradient] = []
    for call in calls:
        for place, other in enumerate(joined):
            if isinstance(call, FactoredGradient) and isinstance(other, FactoredGradient):
                joined[place] = other.join(call)
                break
            if isinstance(call, RowGradient) and isinstance(other, RowGradient):
                joined[place] = other.join(call)
                break
            if isinstance(call, DenseGradient) and isinstance(other, DenseGradient):
                joined[place] = DenseGradient(other.values + call.values)
                break
        else:
            joined.append(call)
    return joined[0] if len(joined) == 1 else SummedGradient(tuple(joined))


def concatenate(batches: Sequence[LayerGradient]) -> LayerGradient:
    """The examples of several batches; those with fewer positions are padded with zeros.

    Where the forms differ, such as a layer that only some batches used, the gradients become dense.
    """
    if len(batches) == 1:
        return batches[0]
    found, known = _concatenated(batches), [batch.known_finite for batch in batches]
    is_known = all(finite is not None for finite in known)
    return found.knowing(torch.cat(known)) if is_known else found  # type: ignore[arg-type]


def _concatenated(batches: Sequence[LayerGradient]) -> LayerGradient:
    if {type(batch) for batch in batches} == {FactoredGradient, BiasedGradient}:
        batches = [FactoredGradient(batch.inputs, batch.output_grads) for batch in batches]  # type: ignore[attr-defined]
    if len({type(batch) for batch in batches}) == 1:
        first = batches[0]
        if isinstance(first, SummedGradient):
            kinds = {tuple(type(part) for part in batch.parts) for batch in batches}  # type: ignore[attr-defined]
            if len(kinds) == 1:
                columns = zip(*(batch.parts for batch in batches), strict=True)  # type: ignore[attr-defined]
                return SummedGradient(tuple(concatenate(column) for column in columns))
        elif isinstance(first, FactoredGradient | RowGradient):
            longest = max(batch.positions for batch in batches)
            return _stacked([batch.padded(longest) for batch in batches])  # type: ignore[attr-defined]
        elif _fit(batches):
            return _stacked(batches)
    return DenseGradient(torch.cat([batch.dense() for batch in batches]))


def _fit(batches: Sequence[LayerGradient]) -> bool:
    return len({(batch.form, *(tensor.shape[1:] for tensor in batch.tensors)) for batch in batches}) == 1


def _stacked(batches: Sequence[LayerGradient]) -> LayerGradient:
    columns = zip(*(batch.tensors for batch in batches), strict=True)
    return batches[0].with_tensors([torch.cat(column) for column in columns])

"""One layer's gradients in all epochs that are merged: their sums, and what these are scored under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import DenseCodec
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.gradient_covariance import PROBES, GradientCovariance
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.rows import EpochRows

CHUNK_BYTES = 4 * 2**20  # of gradients that are added up at a time: what stays in a processor's cache
BASIS_GRADIENTS = 4096  # of all epochs together, of which a basis is made
BASIS_GRADIENTS_PER_ENTRY = 4  # of the longest side that is rotated, at least
LAMBDA_GRADIENTS = 1024  # of all epochs together, of which Lambda is made
LAMBDA_EXAMPLES = 128  # of each epoch, at least
LAMBDA_PRODUCTS = 5 * 10**10  # multiply-adds for a Lambda at most, of gradients that are no pairs,
LAMBDA_AT_LEAST = 32  # but so many examples of each epoch, whatever that takes


def basis_gradients(shape: tuple[int, int], structure: KroneckerStructure) -> int:
    """Of how many gradients [o, i], of all epochs together, a basis is made."""
    o, i = shape
    longest = max(i * structure.full_A, o // structure.groups * structure.full_S)
    return max(BASIS_GRADIENTS, BASIS_GRADIENTS_PER_ENTRY * longest)


def basis_covariance(shape: tuple[int, int], structure: KroneckerStructure, gradients: int) -> GradientCovariance:
    """Of so many gradients; where they are few, of as many probes together as `basis_gradients` have, or exact."""
    o, i = shape[0] // structure.groups, shape[1]
    probes = max(PROBES, -(-PROBES * basis_gradients(shape, structure) // max(1, gradients)))
    if probes > PROBES and probes * (o + i) >= o * i:  # so many take more work than none
        probes = max(o, i)
    return GradientCovariance(shape, structure, probes=probes)


class LayerTrajectory:
    """A layer's gradients in the epochs that are merged.

    Args:
        name: of the layer.
        plan: of it, as it was trained last.
        epochs: one after the other.
        shares: of each in the sum; 0 where the layer was not trained, or was another matrix. Curvature is the mean
            over the others.
        examples: what the epochs' columns say.
    """

    def __init__(
        self, name: str, plan: LayerPlan, epochs: Sequence[EpochRows], shares: Sequence[float], examples: Examples
    ) -> None:
        self._name, self._plan, self._examples = name, plan, examples
        self._epochs, self._shares = epochs, shares
        self._is_dense = any(name in epoch.plans and epoch.plans[name].codec == "dense" for epoch in epochs)

    @property
    def chunk_examples(self) -> int:
        """How many examples' gradients to add up at a time."""
        o, i = self._plan.shape
        most = 2 * o * i if self._is_dense else len(self._epochs) * self._plan.positions * (o + i)
        return max(1, min(512, CHUNK_BYTES // (4 * most)))

    def summed(self, rows: np.ndarray) -> LayerGradient:
        """The weighted sum over the epochs of some examples' gradients."""
        pairs: list[FactoredGradient] = []
        dense = torch.zeros(len(rows) if self._is_dense else 0, *self._plan.shape, dtype=torch.float32)
        for epoch, times, share in zip(self._epochs, self._examples.times_of(rows), self._shares, strict=True):
            factors = torch.from_numpy(times * share).float()
            if not factors.any():
                continue
            codec, arrays = epoch.plans[self._name].codec_without_basis(), epoch.arrays(self._name, rows)
            if isinstance(codec, DenseCodec):
                codec.add_to(dense, arrays, factors)
                continue
            own = codec.decode_gradient(arrays)
            own.output_grads.mul_(factors.view(-1, 1, 1))
            if self._is_dense:  # as where an earlier epoch had longer examples
                dense += own.dense()
            elif pairs and torch.equal(own.tensors[0], pairs[-1].tensors[0]):  # data that is not augmented
                pairs[-1].output_grads.add_(own.output_grads)
            else:
                pairs.append(own)
        if self._is_dense:
            return DenseGradient(dense)
        if not pairs:  # nobody has seen them
            o, i = self._plan.shape
            return FactoredGradient(
                torch.zeros(len(rows), 1, i, dtype=torch.float32),
                torch.zeros(len(rows), 1, o, dtype=torch.float32),
            )
        return FactoredGradient(
            torch.cat([own.inputs for own in pairs], dim=1), torch.cat([own.output_grads for own in pairs], dim=1)
        )

    def last(self, rows: np.ndarray) -> Iterator[LayerGradient]:
        """Some examples' gradients in the last epoch, a chunk at a time."""
        return self._read(len(self._epochs) - 1, rows)

    def basis(self) -> Eigenbasis:
        """Of the gradients' covariances, averaged over the epochs, of each of which other examples are drawn."""
        plan = self._plan
        if plan.structure.is_diagonal:
            return diagonal_basis(plan.shape)
        drawn = list(self._drawn(self._share_of(basis_gradients(plan.shape, plan.structure))))
        covariance = basis_covariance(plan.shape, plan.structure, sum(len(rows) for _, rows in drawn))
        for number, rows in drawn:
            for gradient in self._read(number, rows):
                covariance.add(gradient, 1 / len(rows))
        return eigenbasis(*covariance.compute(), plan.structure)

    def mean_squares(self, basis: Eigenbasis) -> Tensor:
        """Lambda: mean squared coordinates, averaged over the epochs; of each other examples are drawn."""
        o, i = basis.shape
        total, epochs = torch.zeros(basis.shape, dtype=torch.float32), 0
        size = max(LAMBDA_EXAMPLES, self._share_of(LAMBDA_GRADIENTS))
        if self._plan.codec == "dense":  # each is rotated whole
            size = min(size, max(LAMBDA_AT_LEAST, self._share_of(LAMBDA_PRODUCTS // (o * i * (o + i)))))
        for number, seen in self._drawn(size):
            epochs += 1
            for gradient in self._read(number, seen):
                total += second_moment_sum(gradient, basis) / len(seen)
        return total / max(1, epochs)

    def _share_of(self, gradients: int) -> int:
        """Of each epoch in which the layer was trained, of so many in all."""
        return -(-gradients // sum(map(bool, self._shares)))

    def _drawn(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Of each epoch that counts, its place and what `Examples.sample_in` draws."""
        for number, share in enumerate(self._shares):
            rows = self._examples.sample_in(number, size)
            if share and len(rows):
                yield number, rows

    def _read(self, number: int, rows: np.ndarray) -> Iterator[LayerGradient]:
        """Some examples' gradients in an epoch, a chunk at a time."""
        for start in range(0, len(rows), self.chunk_examples):
            yield self._epochs[number].read(self._name, rows[start : start + self.chunk_examples])

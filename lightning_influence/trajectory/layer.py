"""One layer's gradients in all epochs that are merged: their sums, and what these are scored under."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import DenseCodec
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.gradient_covariance import GradientCovariance
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.rows import EpochRows

CHUNK_BYTES = 4 * 2**20  # of gradients that are added up at a time: what stays in a processor's cache
BASIS_GRADIENTS = 4096  # of all epochs together, of which a basis is made
BASIS_GRADIENTS_PER_ENTRY = 4  # of a gradient's longer side, at least
LAMBDA_PRODUCTS = 5 * 10**10  # multiply-adds for a Lambda, of gradients that are no pairs
LAMBDA_AT_LEAST = 32  # examples, whatever that takes


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
        dense = torch.zeros(len(rows) if self._is_dense else 0, *self._plan.shape)
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
        if not pairs:
            return DenseGradient(torch.zeros(len(rows), *self._plan.shape))
        return FactoredGradient(
            torch.cat([own.inputs for own in pairs], dim=1), torch.cat([own.output_grads for own in pairs], dim=1)
        )

    def last(self, rows: np.ndarray) -> LayerGradient:
        """Some examples' gradients in the last epoch."""
        return self._epochs[-1].read(self._name, rows)

    def basis(self) -> Eigenbasis:
        """Of the gradients' covariances, averaged over the epochs, of each of which other examples are drawn."""
        plan = self._plan
        if plan.structure.is_diagonal:
            return diagonal_basis(plan.shape)
        covariance = GradientCovariance(plan.shape, plan.structure)
        wanted = max(BASIS_GRADIENTS, BASIS_GRADIENTS_PER_ENTRY * max(plan.shape))
        each = -(-wanted // sum(map(bool, self._shares)))
        for number, share in enumerate(self._shares):
            rows = self._examples.sample_in(number, each if share else 0)
            for start in range(0, len(rows), self.chunk_examples):
                part = rows[start : start + self.chunk_examples]
                covariance.add(self._epochs[number].read(self._name, part), 1 / len(rows))
        return eigenbasis(*covariance.compute(), plan.structure)

    def mean_squares(self, basis: Eigenbasis, sample: np.ndarray) -> Tensor:
        """Lambda: mean squared coordinates of sampled gradients, averaged over the epochs that saw any of them."""
        o, i = basis.shape
        if self._plan.codec == "dense":  # each is rotated whole
            affordable = LAMBDA_PRODUCTS // (o * i * (o + i) * len(self._epochs))
            sample = sample[: max(LAMBDA_AT_LEAST, affordable)]
        total, step, epochs = torch.zeros(basis.shape), self.chunk_examples, 0
        for epoch, times, share in zip(self._epochs, self._examples.times_of(sample), self._shares, strict=True):
            seen = np.repeat(sample, times) if share else sample[:0]
            epochs += len(seen) > 0
            for start in range(0, len(seen), step):
                gradient = epoch.read(self._name, seen[start : start + step])
                total += second_moment_sum(gradient, basis) / len(seen)
        return total / max(1, epochs)

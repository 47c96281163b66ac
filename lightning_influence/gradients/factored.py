"""Sums of outer products of output gradients and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.gradients.base import LayerGradient, draw_positions


@dataclass(frozen=True)
class FactoredGradient(LayerGradient):
    """The gradient of example n is `sum_s output_grads[n, s] inputs[n, s]^T`, of shape [o, i].

    Args:
        inputs: the layer's inputs a, shape [n, s, i]; with a bias they end in a 1.
        output_grads: d loss_n / d y at the layer's output, shape [n, s, o], of the *summed* loss
            (no batch mean, accumulation or AMP scale in it).

    Example:
        >>> gradient = FactoredGradient(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
        >>> gradient.dense().shape, gradient.dense()[0, 0, 0].item()
        (torch.Size([2, 5, 4]), 3.0)
    """

    inputs: Tensor
    output_grads: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim != 3 or self.inputs.shape[:2] != self.output_grads.shape[:2]:
            raise ValueError(
                "`inputs` and `output_grads` must be [n, s, i] and [n, s, o], got "
                f"{tuple(self.inputs.shape)} and {tuple(self.output_grads.shape)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.output_grads.shape[-1], self.inputs.shape[-1]

    @property
    def positions(self) -> int:
        """Number of shared positions s."""
        return self.inputs.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs and output gradients."""
        return self.inputs, self.output_grads

    def with_tensors(self, tensors: Sequence[Tensor]) -> FactoredGradient:
        """Of other inputs and output gradients."""
        return FactoredGradient(*tensors)

    def __getitem__(self, rows: Tensor | slice) -> FactoredGradient:
        """The same layer's gradients for some of the examples."""
        return FactoredGradient(self.inputs[rows], self.output_grads[rows])

    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""
        return self.output_grads.mT @ self.inputs

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """(U^T d) (V^T a) of each position, shape [n s, p]."""
        return ((self.output_grads.float() @ U) * (self.inputs.float() @ V)).flatten(0, 1)

    def position_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All positions at once."""
        yield self.inputs.flatten(0, 1), self.output_grads.flatten(0, 1)

    def sampled(self, positions: int, generator: torch.Generator) -> tuple[FactoredGradient, float]:
        """The same positions of all examples."""
        if positions >= self.positions:
            return self, 1.0
        drawn, weight = draw_positions((self.output_grads != 0).any(-1).any(0), positions, generator)
        chosen = drawn.to(self.device)
        return FactoredGradient(self.inputs[:, chosen], self.output_grads[:, chosen]), weight

    def with_ones(self) -> FactoredGradient:
        """A 1 appended to the inputs."""
        return FactoredGradient(pad(self.inputs, (0, 1), value=1), self.output_grads)

    def padded(self, positions: int) -> FactoredGradient:
        """The same gradients with zeros for the missing positions."""
        missing = (0, 0, 0, positions - self.positions)
        return FactoredGradient(pad(self.inputs, missing), pad(self.output_grads, missing))

    def join(self, other: FactoredGradient) -> FactoredGradient:
        """The sum with another call's gradients, as further positions."""
        return FactoredGradient(
            torch.cat([self.inputs, other.inputs], dim=1),
            torch.cat([self.output_grads, other.output_grads], dim=1),
        )

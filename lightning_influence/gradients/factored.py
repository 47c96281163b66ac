"""Sums of outer products of output gradients and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @property
    def bounds(self) -> Tensor:
        """|a| |d| over all positions, which no entry of an example's gradient exceeds, shape [n]."""
        norms = [factors.flatten(1).norm(dim=1) for factors in self.tensors]
        return norms[0] * norms[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradients themselves, shape [n, o, i], rounded to a dtype."""
        products = self.output_grads.mT @ self.inputs
        return products if dtype is None else products.to(dtype)

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

    def with_ones(self) -> BiasedGradient:
        """A 1 appended to the inputs."""
        return BiasedGradient(self.inputs, self.output_grads)

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


class BiasedGradient(FactoredGradient):
    """The same with inputs that end in a 1, which is not written before somebody asks for it.

    Args:
        bare_inputs: without the 1, shape [n, s, i - 1].
        output_grads: as `FactoredGradient` has them.
    """

    def __init__(self, bare_inputs: Tensor, output_grads: Tensor) -> None:
        self.__dict__.update(bare_inputs=bare_inputs, output_grads=output_grads)  # is frozen

    bare_inputs: Tensor

    @cached_property
    def inputs(self) -> Tensor:
        """With the 1, shape [n, s, i]."""
        return pad(self.bare_inputs, (0, 1), value=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.output_grads.shape[-1], self.bare_inputs.shape[-1] + 1

    @property
    def positions(self) -> int:
        """Number of shared positions s."""
        return self.bare_inputs.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs without the 1, and output gradients."""
        return self.bare_inputs, self.output_grads

    def with_tensors(self, tensors: Sequence[Tensor]) -> BiasedGradient:
        """Of other inputs and output gradients."""
        return BiasedGradient(*tensors)

    def __getitem__(self, rows: Tensor | slice) -> BiasedGradient:
        """The same layer's gradients for some of the examples."""
        return BiasedGradient(self.bare_inputs[rows], self.output_grads[rows])

    @property
    def bounds(self) -> Tensor:
        """|a| |d| over all positions, with the 1 of each."""
        inputs, output_grads = (factors.flatten(1).norm(dim=1) for factors in self.tensors)
        return inputs.hypot(inputs.new_tensor(self.positions).sqrt()) * output_grads

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradients themselves, shape [n, o, i], rounded to a dtype."""
        dtype = dtype or torch.promote_types(self.bare_inputs.dtype, self.output_grads.dtype)
        o, i = self.shape
        found = self.output_grads.new_empty((len(self), o, i), dtype=dtype)
        found[..., :-1] = self.output_grads.mT @ self.bare_inputs
        found[..., -1] = self.output_grads.sum(1)
        return found

    def sampled(self, positions: int, generator: torch.Generator) -> tuple[BiasedGradient, float]:
        """The same positions of all examples."""
        if positions >= self.positions:
            return self, 1.0
        found, weight = FactoredGradient(self.bare_inputs, self.output_grads).sampled(positions, generator)
        return found.with_ones(), weight

    def padded(self, positions: int) -> BiasedGradient:
        """The same gradients with zeros for the missing positions' inputs and output gradients."""
        missing = (0, 0, 0, positions - self.positions)
        return BiasedGradient(pad(self.bare_inputs, missing), pad(self.output_grads, missing))

"""The form of a case: a model around one layer, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

N = 4  # examples
Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is special about them.

    Args:
        layer: what the row is about.
        flags: how it was built or is used.
        make: the model; its parameters are drawn anew.
        inputs: arguments of its forward, drawn by the generator.
        dims: the dimension of each input that counts examples; None for one that all share. By default the
            layers' `batch_dim`.
        batch_dim: the same of the layers' own inputs.
        pick: the inputs of one example, where they are not slices.
        hold: the model with the statistics of these inputs held, where examples share them.
        reason: part of the reason why not all is covered.
        needs_batch: whether one example alone cannot be run.
    """

    layer: str
    flags: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    dims: tuple[int | None, ...] | None = None
    batch_dim: int = 0
    pick: Callable[[Inputs, int], Inputs] | None = None
    hold: Callable[[nn.Module, Inputs], nn.Module] | None = None
    reason: str = ""
    needs_batch: bool = False

    def __str__(self) -> str:
        return f"{self.layer}({self.flags})"

    def example(self, inputs: Inputs, n: int) -> Inputs:
        """The inputs of one example."""
        if self.pick is not None:
            return self.pick(inputs, n)
        dims = self.dims or (self.batch_dim,) * len(inputs)
        return tuple(
            x if x is None or dim is None else x.narrow(dim, n, 1) for x, dim in zip(inputs, dims, strict=True)
        )


@dataclass(frozen=True)
class Uncovered:
    """A layer that is not attributed, with a part of the reason."""

    layer: str
    flags: str
    make: Callable[[], nn.Module]
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}({self.flags})"


def floats(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
    return lambda g: tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def indices(high: int, *shape: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: (torch.randint(high, shape, generator=g),)


def and_then(
    first: Callable[[torch.Generator], Inputs], *others: Tensor | None
) -> Callable[[torch.Generator], Inputs]:
    return lambda g: (*first(g), *others)

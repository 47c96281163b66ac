"""Rules for the number that is added to a layer's eigenvalues before they are inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Damping(Protocol):
    """Anything that gives a layer's damping from its eigenvalues."""

    def __call__(self, eigenvalues: Tensor) -> Tensor | float:
        """The non-negative damping for a layer with these eigenvalues, shape [o, i]."""


@dataclass(frozen=True)
class HeuristicDamping:
    """`factor` times the layer's mean eigenvalue (Grosse et al. 2023, arXiv:2308.03296).

    Args:
        factor: positive; 0.1 is the rule's usual value. It is the first thing to vary when scores
            are to predict retraining.

    Example:
        >>> import torch
        >>> HeuristicDamping(0.5)(torch.tensor([1.0, 3.0])).item()
        1.0
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"`factor` must be positive and finite, got {self.factor}.")

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """The layer's damping, a 0-dimensional tensor."""
        return self.factor * eigenvalues.mean()


@dataclass(frozen=True)
class AbsoluteDamping:
    """The same number for every layer, in units of the eigenvalues."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(
                f"`damping` must be positive and finite, got {self.value}; "
                "pass HeuristicDamping() to derive it from the layer's eigenvalues."
            )

    def __call__(self, eigenvalues: Tensor) -> float:
        """The number itself."""
        return self.value


def as_damping(damping: Damping | float) -> Damping:
    """A rule as it is; a number as `AbsoluteDamping`.

    Raises:
        ValueError: if a number is not positive and finite.
        TypeError: if it is neither a number nor callable.
    """
    if callable(damping):
        return damping
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise TypeError(
            f"`damping` must be a positive number or a rule such as HeuristicDamping(), got {damping!r}."
        )
    return AbsoluteDamping(float(damping))

"""The contract of a curvature, and the registry of those that a query can name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_influence.curvature.damping import Damping
from lightning_influence.functional.kronecker import Eigenbasis


class Curvature(Protocol):
    """A block-diagonal curvature matrix that is diagonal in each layer's Kronecker eigenbasis."""

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Eigenvalues of the damped inverse, shape [o, i]."""


_CURVATURES: dict[str, Curvature] = {}


def register_curvature(name: str, curvature: Curvature) -> None:
    """Make a curvature known under a name."""
    _CURVATURES[name] = curvature


def get_curvature(curvature: str | Curvature) -> Curvature:
    """A curvature by name, or one's own as it is.

    Raises:
        ValueError: if no curvature has that name.
    """
    if not isinstance(curvature, str):
        return curvature
    if curvature not in _CURVATURES:
        raise ValueError(f"`curvature` must be one of {sorted(_CURVATURES)}, got {curvature!r}.")
    return _CURVATURES[curvature]

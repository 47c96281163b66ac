"""From a layer's factors to the eigenvalues of the damped inverse that a query multiplies with."""

from lightning_influence.curvature.base import Curvature, get_curvature
from lightning_influence.curvature.damping import (
    AbsoluteDamping,
    Damping,
    HeuristicDamping,
    as_damping,
)
from lightning_influence.curvature.kinds import EKFAC, KFAC, Identity

__all__ = [
    "EKFAC",
    "KFAC",
    "AbsoluteDamping",
    "Curvature",
    "Damping",
    "HeuristicDamping",
    "Identity",
    "as_damping",
    "get_curvature",
]

"""From a layer's factors to the eigenvalues of the damped inverse that a query multiplies with."""

from lightning_influence.curvature.base import Curvature, get_curvature
from lightning_influence.curvature.damping import (
    AbsoluteDamping,
    AnyDamping,
    DampedLayer,
    Damping,
    DampingOfLayers,
    GlobalDamping,
    HeuristicDamping,
    LayerwiseDamping,
    TrainingDamping,
    WeightDecayDamping,
    as_damping,
    damping_by_layer,
)
from lightning_influence.curvature.kinds import EKFAC, KFAC, Identity

__all__ = [
    "EKFAC",
    "KFAC",
    "AbsoluteDamping",
    "AnyDamping",
    "Curvature",
    "DampedLayer",
    "Damping",
    "DampingOfLayers",
    "GlobalDamping",
    "HeuristicDamping",
    "Identity",
    "LayerwiseDamping",
    "TrainingDamping",
    "WeightDecayDamping",
    "as_damping",
    "damping_by_layer",
    "get_curvature",
]

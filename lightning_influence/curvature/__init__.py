"""From a layer's factors, or its rows, to the damped inverse that a query multiplies with."""

from lightning_influence.curvature.base import (
    Curvature,
    LayerRows,
    RowCurvature,
    RowsPart,
    basis_of,
    get_curvature,
    register_curvature,
)
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
from lightning_influence.curvature.empirical_fisher import EmpiricalFisher
from lightning_influence.curvature.kinds import EKFAC, KFAC, Diagonal, Identity

__all__ = [
    "EKFAC",
    "KFAC",
    "AbsoluteDamping",
    "AnyDamping",
    "Curvature",
    "DampedLayer",
    "Damping",
    "DampingOfLayers",
    "Diagonal",
    "EmpiricalFisher",
    "GlobalDamping",
    "HeuristicDamping",
    "Identity",
    "LayerRows",
    "LayerwiseDamping",
    "RowCurvature",
    "RowsPart",
    "TrainingDamping",
    "WeightDecayDamping",
    "as_damping",
    "basis_of",
    "damping_by_layer",
    "get_curvature",
    "register_curvature",
]

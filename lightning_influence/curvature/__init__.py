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
    Damping,
    HeuristicDamping,
    as_damping,
)
from lightning_influence.curvature.empirical_fisher import EmpiricalFisher
from lightning_influence.curvature.kinds import EKFAC, KFAC, Diagonal, Identity

__all__ = [
    "EKFAC",
    "KFAC",
    "AbsoluteDamping",
    "Curvature",
    "Damping",
    "Diagonal",
    "EmpiricalFisher",
    "HeuristicDamping",
    "Identity",
    "LayerRows",
    "RowCurvature",
    "RowsPart",
    "as_damping",
    "basis_of",
    "get_curvature",
    "register_curvature",
]

"""Reference methods: H⁻¹ v with the training data at hand, for models that fit; what estimates are measured by."""

from lightning_influence.solvers.arnoldi import Arnoldi
from lightning_influence.solvers.base import (
    CurvatureOperator,
    DenseOperator,
    DivergenceError,
    Solution,
    SolveInfo,
    Solver,
    SolverError,
)
from lightning_influence.solvers.conjugate_gradient import ConjugateGradient
from lightning_influence.solvers.exact import Exact
from lightning_influence.solvers.influences import (
    compute_influence_factors,
    compute_influences,
    influences_of_factors,
)
from lightning_influence.solvers.lissa import LiSSA
from lightning_influence.solvers.neumann import PreconditionedNeumann
from lightning_influence.solvers.nystroem import Nystroem
from lightning_influence.solvers.objective import Objective
from lightning_influence.solvers.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.solvers.preconditioner import EKFACPreconditioner, Preconditioner
from lightning_influence.solvers.regression import OLSInfluence, ols_influence

__all__ = [
    "Arnoldi",
    "ConjugateGradient",
    "CurvatureOperator",
    "DenseOperator",
    "DivergenceError",
    "EKFACPreconditioner",
    "Exact",
    "GaussNewtonOperator",
    "HessianOperator",
    "LiSSA",
    "Nystroem",
    "OLSInfluence",
    "Objective",
    "PreconditionedNeumann",
    "Preconditioner",
    "Solution",
    "SolveInfo",
    "Solver",
    "SolverError",
    "compute_influence_factors",
    "compute_influences",
    "influences_of_factors",
    "ols_influence",
]

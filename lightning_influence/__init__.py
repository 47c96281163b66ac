"""Influence functions for PyTorch Lightning: captured while the model trains, asked for ever after."""

from lightning_influence.callback import InfluenceCallback
from lightning_influence.curvature import GlobalDamping, HeuristicDamping, TrainingDamping, WeightDecayDamping
from lightning_influence.errors import InfluenceError
from lightning_influence.gradients import FactoredGradient
from lightning_influence.layers import LayerAdapter, register_adapter
from lightning_influence.module import AttributionWriter, InfluenceEnsemble, InfluenceModule
from lightning_influence.query import Attribution
from lightning_influence.solvers import compute_influence_factors, compute_influences
from lightning_influence.training.capture import capture

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "AttributionWriter",
    "FactoredGradient",
    "GlobalDamping",
    "HeuristicDamping",
    "InfluenceCallback",
    "InfluenceEnsemble",
    "InfluenceError",
    "InfluenceModule",
    "LayerAdapter",
    "TrainingDamping",
    "WeightDecayDamping",
    "capture",
    "compute_influence_factors",
    "compute_influences",
    "register_adapter",
]

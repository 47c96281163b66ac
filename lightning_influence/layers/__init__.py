"""From modules to per-example gradients: one adapter a layer type, the hooks, the coverage report."""

from lightning_influence.layers import linear as linear  # registers its adapter
from lightning_influence.layers.base import LayerAdapter, find_adapter, register_adapter
from lightning_influence.layers.capture import GradientCapture
from lightning_influence.layers.coverage import NOT_CHOSEN, Coverage, LayerReport, TrackedLayer, track_layers

__all__ = [
    "NOT_CHOSEN",
    "Coverage",
    "GradientCapture",
    "LayerAdapter",
    "LayerReport",
    "TrackedLayer",
    "find_adapter",
    "register_adapter",
    "track_layers",
]

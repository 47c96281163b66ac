"""From modules to per-example gradients: one adapter a layer type, the hooks, the coverage report."""

from lightning_influence.layers import attention as attention  # registers its adapters
from lightning_influence.layers import batch_norm as batch_norm
from lightning_influence.layers import conv as conv
from lightning_influence.layers import conv_transpose as conv_transpose
from lightning_influence.layers import embedding as embedding
from lightning_influence.layers import hf_conv1d as hf_conv1d
from lightning_influence.layers import linear as linear
from lightning_influence.layers import norm as norm
from lightning_influence.layers.base import LayerAdapter, LayerCall, find_adapters, register_adapter
from lightning_influence.layers.capture import GradientCapture, UseShape
from lightning_influence.layers.coverage import Coverage, LayerReport, track_layers
from lightning_influence.layers.discovery import find_layers
from lightning_influence.layers.reasons import NOT_CHOSEN
from lightning_influence.layers.tracked import TrackedLayer

__all__ = [
    "NOT_CHOSEN",
    "Coverage",
    "GradientCapture",
    "LayerAdapter",
    "LayerCall",
    "LayerReport",
    "TrackedLayer",
    "UseShape",
    "find_adapters",
    "find_layers",
    "register_adapter",
    "track_layers",
]

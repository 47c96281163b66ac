"""What the loss was: its scale, its value for each example, its labels, and labels that the model predicts."""

from lightning_influence.losses.predictive import Predictive, predictives
from lightning_influence.losses.scale import LossScale, declared_scale
from lightning_influence.losses.tap import LossTap

__all__ = ["LossScale", "LossTap", "Predictive", "declared_scale", "predictives"]

"""What the loss was: its scale, its value for each example, its labels."""

from lightning_influence.losses.scale import LossScale, declared_scale
from lightning_influence.losses.tap import LossTap

__all__ = ["LossScale", "LossTap", "declared_scale"]

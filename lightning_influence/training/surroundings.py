"""What a trainer and its model say of a step before it runs."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_influence.errors import UnsupportedTrainingError


def check_supported(trainer: Trainer) -> None:
    """Refuse what capture does not work with.

    Raises:
        UnsupportedTrainingError: naming the strategy.
    """
    strategy = trainer.strategy
    if trainer.world_size > 1 or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UnsupportedTrainingError(
            f"Capture supports one process, found {type(strategy).__name__} with {trainer.world_size}; "
            "pass `devices=1` and the default strategy."
        )


def trainable(model: nn.Module) -> list[bool]:
    """Which parameters need a gradient now."""
    return [parameter.requires_grad for parameter in model.parameters()]


def learning_rate(trainer: Trainer) -> float:
    """Of the first parameter group; NaN without an optimizer."""
    if not trainer.optimizers:
        return float("nan")
    return float(trainer.optimizers[0].param_groups[0]["lr"])


def backpropagated_factor(trainer: Trainer, model: LightningModule) -> float:
    """What Lightning multiplies the returned loss with before the backward."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches if model.automatic_optimization else scale

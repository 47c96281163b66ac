"""What a trainer and its model say of a step before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.layers import TrackedLayer
from lightning_influence.processes import ALONE, Processes


def check_supported(trainer: Trainer) -> None:
    """Refuse what capture does not work with.

    Raises:
        UnsupportedTrainingError: naming the strategy, with the reason.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    is_other = isinstance(strategy, DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy)  # children of these
    if is_other or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UnsupportedTrainingError(
            f"Capture does not support {name}: a process must hold whole weights, whole gradients and its own "
            "examples, and run PyTorch's own backward, as with one device or DDP; "
            f'{name} may split them over devices or replace the backward. Pass `strategy="ddp"` or `devices=1`.'
        )
    if trainer.num_nodes > 1:
        raise UnsupportedTrainingError(
            f"Capture supports one machine, found `num_nodes={trainer.num_nodes}`: all processes write one file "
            "through shared memory. Capture with `num_nodes=1`, or afterwards with `capture(model, loader, path)`."
        )


def processes_of(trainer: Trainer) -> Processes:
    """The processes that train together; every one of them must call this, with the same trainer."""
    if trainer.world_size == 1:
        return ALONE
    device = trainer.strategy.root_device
    return Processes(trainer.global_rank, trainer.world_size, group=distributed.new_group(), device=device)


def backward_averages(trainer: Trainer) -> bool:
    """Whether `.grad` will be the processes' mean after the backward that is about to start."""
    model = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and bool(model.require_backward_grad_sync)


def has_exact_average(trainer: Trainer) -> bool:
    """Whether processes average gradients as they are, and not through a communication hook."""
    strategy = trainer.strategy  # which registers the hook on CUDA only
    return getattr(strategy, "_ddp_comm_hook", None) is None or strategy.root_device.type != "cuda"


def trainable(model: nn.Module) -> list[bool]:
    """Which parameters need a gradient now."""
    return [parameter.requires_grad for parameter in model.parameters()]


def learning_rate(trainer: Trainer) -> float:
    """Of the first parameter group; NaN without an optimizer."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rate = groups[0].get("lr") if groups else None
    return float("nan") if rate is None else float(rate)


class LayerRates:
    """Mean learning rates of layers' parameters over an epoch.

    A layer's is that of the parameter group of its first parameter that an optimizer has; zero without.

    Args:
        trainer: of the fit.
        layers: by name.
        is_wanted: whether anything is to be summed at all.
    """

    def __init__(self, trainer: Trainer, layers: Mapping[str, TrackedLayer], *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        groups = {
            id(parameter): group
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._groups: dict[str, dict[str, Any] | None] = {
            name: next((groups[id(p)] for p in layer.parameters.values() if id(p) in groups), None)
            for name, layer in layers.items()
        }
        self._totals = dict.fromkeys(layers, 0.0)
        self._steps = 0

    def add(self) -> None:
        """Take in the rates of the batch that is about to be trained on."""
        self._steps += 1
        for name, group in self._groups.items() if self._is_wanted else ():
            if group is not None:
                self._totals[name] += _rate(name, group)

    def sums(self) -> dict[str, Any]:
        """What `resume` needs."""
        return {"totals": dict(self._totals), "steps": self._steps}

    def resume(self, sums: Mapping[str, Any] | None) -> None:
        """Add those of an earlier part of the epoch."""
        if sums is not None:
            self._steps += sums["steps"]
            self._totals = {name: total + sums["totals"].get(name, 0.0) for name, total in self._totals.items()}

    def means(self) -> dict[str, float]:
        """By layer."""
        return {name: total / max(self._steps, 1) for name, total in self._totals.items()}


def _rate(name: str, group: Mapping[str, Any]) -> float:
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedTrainingError(
            f"Merged rows weigh epochs by their learning rates, but that of layer {name!r} is {group.get('lr')!r} "
            'in its optimizer; pass `trajectory="segments"` or `epochs="last"`.'
        ) from error


def backpropagated_factor(trainer: Trainer, model: LightningModule) -> float:
    """What Lightning multiplies the returned loss with before the backward."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches if model.automatic_optimization else scale

"""What kept a layer's weights back in training, as penalties on them: weight decay, and that training stopped.

With L the trained loss, weight decay l seeks a minimum of L + l/2 |w|^2. Gradient descent from w_0 with learning
rates that sum up to t is at the minimum of about L + 1/(2t) |w - w_0|^2 (Ali, Kolter & Tibshirani 2019,
arXiv:1810.10082, for least squares). Momentum m makes steps 1/(1 - m) times as long. Adam divides gradients by the
root of their second moments v: its stopping, and AdamW's decay, act like penalties v^1/2 times as large
(Loshchilov & Hutter 2019, arXiv:1711.05101), of which a layer's mean is taken; Adam's own
`weight_decay` is a penalty as it is. Gradients that were clipped count as if they were not.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from lightning_influence.layers import TrackedLayer

Group = dict[str, Any]
COUPLED = (SGD, Adam, NAdam, RAdam, Adagrad, RMSprop, Adadelta, Adamax, ASGD)  # decay is added to the gradient


class TrainingTime:
    """Sums over a run's steps of each parameter's learning rates, times what momentum makes of a step.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sums: dict[int, float] = {}  # by id of the parameter
        self._is_whole: bool | None = None

    def add(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self._is_whole is None:
            self._is_whole = self._trainer.global_step == 0  # a resumed run had steps that nobody counted
        for group in optimizer.param_groups:
            added = _number(group.get("lr")) * _lengthening(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._sums[id(parameter)] = self._sums.get(id(parameter), 0.0) + added

    def of(self, parameter: Tensor) -> float:
        """A parameter's sum; NaN if it is not known."""
        return self._sums.get(id(parameter), math.nan) if self._is_whole else math.nan


def describe_penalties(
    trainer: Trainer, layers: Mapping[str, TrackedLayer], time: TrainingTime, scales: Sequence[Tensor]
) -> dict[str, object]:
    """The document of a file, plain values.

    Args:
        trainer: of the fit, after the captured steps.
        layers: by name; a layer's penalties are those of the first of its parameters that an optimizer has.
        time: of the whole fit.
        scales: of the captured steps, how many times an example's own loss is larger than its part in the trained
            one; NaN where there was an overflow, or layers have several. Penalties are multiplied by their
            harmonic mean, as the trained loss is a mean of losses divided by them.
    """
    found = torch.cat([scale.detach().double().cpu().flatten() for scale in scales]) if scales else torch.empty(0)
    scale = 1 / float((1 / found[found.isfinite() & (found > 0)]).mean())  # NaN if there is none
    owners = {
        id(parameter): (optimizer, group)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    described = {}
    for name, layer in layers.items():
        own = next((p for p in layer.parameters.values() if id(p) in owners), None)
        if own is not None:
            described[name] = _describe(*owners[id(own)], own, time, scale)
    return {"loss_scale": _finite(scale), "layers": described}


def _describe(
    optimizer: Optimizer, group: Group, parameter: Tensor, time: TrainingTime, scale: float
) -> dict[str, object]:
    decay = _number(group.get("weight_decay"))
    is_decoupled = isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))
    root = _root_second_moment(optimizer, group, parameter)
    penalty = decay * root if is_decoupled else decay if type(optimizer) in COUPLED else math.nan
    time_passed = time.of(parameter)
    return {
        "optimizer": type(optimizer).__name__,
        "weight_decay": _finite(decay),
        "decay": _finite(scale * penalty) if decay else 0.0,
        "stopping": _finite(scale * root / time_passed) if time_passed else None,
    }


def _root_second_moment(optimizer: Optimizer, group: Group, parameter: Tensor) -> float:
    """What the optimizer divides a parameter's gradients by, its mean; 1 for SGD, NaN where it is not known."""
    if isinstance(optimizer, SGD):
        return 1.0
    state = optimizer.state.get(parameter, {})
    moments = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if not isinstance(optimizer, Adam | AdamW) or moments is None or "step" not in state:
        return math.nan
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return float((moments.double() / correction).sqrt().mean()) + float(group["eps"])


def _lengthening(group: Group) -> float:
    """How much longer steps are for their momentum."""
    momentum, dampening = _number(group.get("momentum", 0.0)), _number(group.get("dampening", 0.0))
    if momentum == 0:
        return 1.0
    return (1 - dampening) / (1 - momentum) if momentum < 1 else math.nan


def _number(value: object) -> float:
    """NaN for what is none, and for what would make us wait for a device."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.device.type == "cpu" else math.nan
    return float(value) if isinstance(value, numbers.Real) else math.nan


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

"""Runs a case: gradients as captured, and as autograd has them for one example at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import Coverage, GradientCapture, TrackedLayer, track_layers
from tests.layers.case import Case, Inputs, N

FIRST, SECOND = 1.0, 0.7  # what inputs of several calls are multiplied with


@dataclass(frozen=True)
class Run:
    """A case's layers and their gradients.

    Args:
        layers: as tracked, by name.
        captured: their gradients.
        expected: the same [n, o, i] by autograd.
        summed: `.grad` [o, i] of the whole batch.
        coverage: of the model.
    """

    layers: Mapping[str, TrackedLayer]
    captured: Mapping[str, LayerGradient]
    expected: Mapping[str, Tensor]
    summed: Mapping[str, Tensor]
    coverage: Coverage

    @property
    def error(self) -> float:
        """The largest difference of a layer's gradients, relative to their norm."""
        return max(relative(self.captured[name].dense(), expected) for name, expected in self.expected.items())


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    """The model with parameters and statistics drawn in float64, the same for each dtype."""
    generator = torch.Generator().manual_seed(1)
    model = case.make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    inputs = case.inputs(torch.Generator().manual_seed(2))
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs)


def loss_of(model: nn.Module, inputs: Inputs, factors: tuple[float, ...] = (FIRST,)) -> Tensor:
    """The summed loss over one or more calls of the model with multiples of the inputs."""
    losses = []
    for factor in factors:
        scaled = (x * factor if x is not None and x.is_floating_point() else x for x in inputs)
        output = model(*scaled)
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        losses.append(factor * wide.square().sum())
    return torch.stack(losses).sum()


def tracked(case: Case, model: nn.Module) -> tuple[dict[str, TrackedLayer], Coverage]:
    """The model's layers, with the batch dimension that a run would find out."""
    layers, coverage = track_layers(model)
    return {name: replace(layer, batch_dim=case.batch_dim) for name, layer in layers.items()}, coverage


def capture(
    case: Case, model: nn.Module, inputs: Inputs, factors: tuple[float, ...] = (FIRST,)
) -> tuple[dict[str, TrackedLayer], dict[str, LayerGradient], Coverage]:
    layers, coverage = tracked(case, model)
    with GradientCapture(layers) as hooks:
        loss_of(model, inputs, factors).backward()
    assert hooks._uses is None or not hooks._uses.failure, hooks._uses.failure
    assert not hooks.unseen
    return layers, hooks.gradients(), coverage


def by_autograd(
    layers: Mapping[str, TrackedLayer], model: nn.Module, inputs: Inputs, factors: tuple[float, ...]
) -> dict[str, Tensor]:
    """The layers' matrices [o, i] of the gradient of one loss."""
    loss = loss_of(model, inputs, factors)
    found = {}
    for name, layer in layers.items():
        parameters = layer.parameters
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found[name] = layer.matrix(dict(zip(parameters, gradients, strict=True))).detach()
    return found


def one_at_a_time(
    case: Case, model: nn.Module, inputs: Inputs, factors: tuple[float, ...] = (FIRST,)
) -> dict[str, Tensor]:
    """The layers' gradients [n, o, i]."""
    model = model if case.hold is None else case.hold(model, inputs)
    layers, _ = tracked(case, model)
    rows = [by_autograd(layers, model, case.example(inputs, n), factors) for n in range(N)]
    return {name: torch.stack([row[name] for row in rows]) for name in layers}


@cache
def run(case: Case, dtype: torch.dtype, factors: tuple[float, ...] = (FIRST,)) -> Run:
    """The case in a dtype; what autograd has, in float64."""
    model, inputs = build(case, dtype), inputs_of(case, dtype)
    layers, captured, coverage = capture(case, model, inputs, factors)
    summed = {
        name: layer.matrix({key: p.grad for key, p in layer.parameters.items()}) for name, layer in layers.items()
    }
    twin = build(case, torch.float64)
    expected = one_at_a_time(case, twin, inputs_of(case, torch.float64), factors)
    return Run(layers, captured, expected, summed, coverage)

"""Hugging Face's Conv1D is a linear layer with a transposed weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.factors import KroneckerCovariance
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import GradientCapture, find_adapters, track_layers
from tests.layers import case_models


def captured(model: nn.Module, x: Tensor) -> LayerGradient:
    layers, coverage = track_layers(model)
    assert coverage.share == 1
    with GradientCapture(layers) as capture:
        model(x).square().sum().backward()
    return capture.gradients()[""]


def same_linear(layer: nn.Module) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf).to(layer.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5)], ids=["vectors", "sequences"])
def test_gradients_and_factors_are_those_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = case_models.Conv1D(3, 5).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(shape).double()
    found, expected = captured(layer, x), captured(same_linear(layer), x)
    torch.testing.assert_close(found.dense(), expected.dense())
    covariances = [KroneckerCovariance((3, 6), dtype=torch.float64) for _ in range(2)]
    for metric, gradient in zip(covariances, (found, expected), strict=True):
        metric.update(gradient)
    torch.testing.assert_close(covariances[0].compute(), covariances[1].compute())


def test_the_real_class_is_covered() -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = Conv1D(3, 5).double(), torch.randn(4, 7, 5).double()
    gradient = captured(layer, x).dense().sum(0)
    torch.testing.assert_close(gradient[:, :-1].T, layer.weight.grad)
    torch.testing.assert_close(gradient[:, -1], layer.bias.grad)


def test_a_class_of_the_same_name_elsewhere_is_another() -> None:
    class Conv1D(case_models.Conv1D):
        __module__ = "somebody.else"

    assert find_adapters(case_models.Conv1D(3, 5))
    assert not find_adapters(Conv1D(3, 5))

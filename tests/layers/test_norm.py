"""Normalizations: statistics of the batch, mixed precision, and Hugging Face's RMS norms."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.functional.structure import DIAGONAL
from lightning_influence.gradients import DenseGradient, LayerGradient
from lightning_influence.layers import GradientCapture, TrackedLayer, find_adapters, track_layers
from lightning_influence.training.verification import GradientCheck


def captured(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, TrackedLayer], dict[str, LayerGradient]]:
    layers, _ = track_layers(model)
    with GradientCapture(layers) as capture:
        model(*inputs).float().square().sum().backward()
    return layers, capture.gradients()


def seeded(module: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def of_grad(layer: TrackedLayer) -> Tensor:
    return layer.matrix({name: parameter.grad for name, parameter in layer.parameters.items()})


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(3), nn.RMSNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True)],
    ids=lambda module: type(module).__name__,
)
def test_the_block_is_diagonal_and_the_bias_the_second_column(module: nn.Module) -> None:
    layers, gradients = captured(module, torch.randn(4, 3, 3))
    assert layers[""].structure == DIAGONAL
    assert isinstance(gradients[""], DenseGradient)
    assert gradients[""].shape == layers[""].shape == (3, 1 if isinstance(module, nn.RMSNorm) else 2)


def test_a_frozen_bias_has_no_column() -> None:
    norm = nn.LayerNorm(3)
    norm.bias.requires_grad_(False)
    _, gradients = captured(norm, torch.randn(4, 3))
    assert gradients[""].shape == (3, 1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False)])
def test_a_norm_without_parameters_is_no_layer(norm: nn.Module) -> None:
    layers, coverage = track_layers(nn.Sequential(nn.Linear(3, 3), norm))
    assert list(layers) == ["0"]
    assert coverage.share == 1


def test_making_gradients_leaves_the_running_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    layers, _ = track_layers(norm)
    with GradientCapture(layers) as capture:
        norm(torch.randn(4, 3)).square().sum().backward()
    before = copy.deepcopy(norm.state_dict())
    capture.gradients()
    torch.testing.assert_close(dict(norm.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_computes_half_precision_in_float32(dtype: torch.dtype, is_training: bool) -> None:
    norm = seeded(nn.BatchNorm2d(3)).train(is_training)
    layers, gradients = captured(norm, torch.randn(4, 3, 5, 6).to(dtype))
    bound = 1e-5 if dtype == torch.float16 else 4e-3  # rounded once at the end, to bfloat16
    difference = gradients[""].dense().float().sum(0) - of_grad(layers[""])
    assert difference.norm() <= bound * of_grad(layers[""]).norm()


def test_sums_do_not_overflow_in_half_precision() -> None:
    norm = nn.BatchNorm2d(1)
    (adapter,) = find_adapters(norm)
    grads = torch.full((2, 1, 64, 64), 100.0, dtype=torch.float16)  # scaled by AMP; their sum is above 65504
    assert adapter.gradient(norm, torch.randn(2, 1, 64, 64).half().abs(), grads).is_finite().all()


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)],
    ids=lambda module: type(module).__name__,
)
def test_gradients_add_up_under_autocast(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), seeded(module))
    layers, _ = track_layers(model)
    check = GradientCheck(layers)
    check.start()
    with GradientCapture(layers) as capture:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 6)).float().square().sum()
        loss.backward()
    check.look(capture.calls()[0])
    assert check.mismatches() == {}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(3), (3,)),
        (nn.LayerNorm([2, 3]), (2, 3)),
        (nn.RMSNorm(3), (3,)),
        (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    ],
)
def test_inputs_without_a_batch_are_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayerError, match=r"Layer '': expected inputs \[n, .* got shape .* add a batch dimension"):
        captured(module, torch.randn(shape))


class NormedPositions(nn.Module):
    """A norm of positions [t, c], which is added to every example."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 3), nn.LayerNorm(3)
        self.register_buffer("positions", torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x) + self.norm(self.positions)


def test_a_norm_of_shared_positions_has_rows_of_examples() -> None:
    layers, gradients = captured(seeded(NormedPositions().double()), torch.randint(7, (4, 5)))
    assert len(gradients["norm"]) == 4
    torch.testing.assert_close(gradients["norm"].dense().sum(0), of_grad(layers["norm"]))


def test_positions_without_loss_change_nothing() -> None:
    norm, x = seeded(nn.LayerNorm(3)).double(), torch.randn(4, 5, 3).double()
    layers, _ = track_layers(norm)
    found = []
    for padded in (x, nn.functional.pad(x, (0, 0, 0, 3))):
        with GradientCapture(layers) as capture:
            norm(padded)[:, :5].square().sum().backward()
        found.append(capture.gradients()[""].dense())
    torch.testing.assert_close(*found)


HUGGING_FACE = {
    "llama": "LlamaRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "mistral": "MistralRMSNorm",
    "gemma": "GemmaRMSNorm",
    "t5": "T5LayerNorm",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model", "name"), HUGGING_FACE.items(), ids=HUGGING_FACE)
def test_hugging_face_norms_equal_autograd(model: str, name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    norm = seeded(getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)(6)).to(dtype)
    x = torch.randn(4, 5, 6).to(dtype)
    _, gradients = captured(norm, x)
    for row, gradient in zip(x, gradients[""].dense(), strict=True):
        norm.zero_grad()
        norm(row[None]).float().square().sum().backward()
        bound = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16: 4e-3 for each of a few roundings
        assert (gradient[:, 0] - norm.weight.grad).norm() <= bound * norm.weight.grad.norm()


class CentredRMSNorm(nn.Module):
    """Something else by the name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.layer_norm(x, (6,))


class BiasedRMSNorm(CentredRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))


class CohereLayerNorm(CentredRMSNorm):
    """One weight and an epsilon, but no RMS norm."""


def test_a_wrong_formula_is_found_by_the_check() -> None:
    norm = CentredRMSNorm()
    layers, _ = track_layers(norm)
    check = GradientCheck(layers)
    check.start()
    with GradientCapture(layers) as capture:
        norm(torch.randn(4, 6) + 1).square().sum().backward()
    check.look(capture.calls()[0])
    assert set(check.mismatches()) == {""}


@pytest.mark.parametrize("make", [BiasedRMSNorm, CohereLayerNorm])
def test_other_norms_are_not_taken_for_rms_norms(make: type[nn.Module]) -> None:
    assert not find_adapters(make())


def test_a_positions_first_batch_is_refused_by_channel_norms() -> None:
    norm = nn.GroupNorm(1, 3)
    (adapter,) = find_adapters(norm)
    with pytest.raises(LayerError, match=r"expected inputs \[n, 3, \.\.\.\] .* got shape \(4, 5, 3\)"):
        adapter.gradient(norm, torch.randn(4, 5, 3), torch.randn(4, 5, 3))

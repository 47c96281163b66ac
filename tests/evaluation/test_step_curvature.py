"""`StepGaussNewton`: the Gauss-Newton matrix of a `training_step`, against that of inputs, targets and a loss."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.evaluation.step_curvature import LayerVectors, StepGaussNewton
from lightning_influence.layers import find_layers
from lightning_influence.solvers import GaussNewtonOperator
from tests.integration.models import Mlp, Pooled, Reused, Task
from tests.integration.nets import SmallTransformer

TOLERANCE = 1e-9  # of float64


def examples(n: int = 6, positions: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, positions, 5) if positions else (n, 5)
    return torch.randn(shape, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def tokens(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(7, (n, 6), generator=generator) for _ in range(2))
    targets[0, :3] = -100
    return ids, targets


def token_loss(outputs: Tensor, targets: Tensor, **options: str) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), **options)


def each_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mT, targets, reduction="none").sum(1)


def matrix_of_step(model: LightningModule, batches: list, damping: float = 0.0) -> tuple[Tensor, LayerVectors]:
    layers, _ = find_layers(dict(model.named_modules()), model)
    space = LayerVectors(layers)
    return StepGaussNewton(model, space, batches, dict.fromkeys(layers, damping)).dense(), space


def reference(net: nn.Module, batches: list, loss: Callable, space: LayerVectors) -> Tensor:
    """The matrix of `solvers`, its parameters in the order of the layers'."""
    dense = GaussNewtonOperator.from_loader(net, batches, loss=loss, dtype=torch.float64).dense()
    ends = torch.tensor([0, *(p.numel() for p in net.parameters())]).cumsum(0).tolist()
    where = {id(p): torch.arange(ends[k], ends[k + 1]) for k, p in enumerate(net.parameters())}
    order = torch.cat([where[id(p)] for p in space.parameters])
    return dense[order][:, order]


def each(function: Callable, factor: float = 1.0) -> Callable:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        values = function(outputs, targets, reduction="none")
        return factor * values.flatten(1).mean(1) if values.ndim > 1 else values

    return loss


CASES = {
    "classes": (Mlp, F.cross_entropy, each(F.cross_entropy), examples()),
    "a constant times the sum": (
        Mlp,
        lambda f, y: 0.3 * F.cross_entropy(f, y, reduction="sum"),
        each(F.cross_entropy),
        examples(),
    ),
    "unreduced": (
        Mlp,
        lambda f, y: F.cross_entropy(f, y, reduction="none").mean(),
        each(F.cross_entropy),
        examples(),
    ),
    "squares": (Mlp, F.mse_loss, each(F.mse_loss), (examples()[0], examples()[0][:, :3].sin())),
    "positions that are averaged": (Pooled, F.cross_entropy, each(F.cross_entropy), examples(positions=3)),
    "a layer used twice": (Reused, F.cross_entropy, each(F.cross_entropy), examples()),
    "two losses": (
        Mlp,
        lambda f, y: F.cross_entropy(f, y) + 0.5 * F.cross_entropy(2 * f, y),
        lambda f, y: F.cross_entropy(f, y, reduction="none") + 0.5 * F.cross_entropy(2 * f, y, reduction="none"),
        examples(),
    ),
    "a transformer with padding": (SmallTransformer, token_loss, each_token_loss, tokens()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_matrix_of_pairs(name):
    make_net, step_loss, own_loss, (inputs, targets) = CASES[name]
    torch.manual_seed(0)
    net = make_net().double()
    if name == "a transformer with padding":
        net.tokens.weight.data *= 3  # far from uniform predictions
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    found, space = matrix_of_step(Task(net, step_loss), [(len(batch[0]), batch) for batch in batches])
    expected = reference(net, batches, own_loss, space)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_damping_is_each_layers_own():
    model, (inputs, targets) = Task(Mlp().double()), examples()
    layers, _ = find_layers(dict(model.named_modules()), model)
    space, batches = LayerVectors(layers), [(6, (inputs, targets))]
    damping = {name: float(k + 1) for k, name in enumerate(layers)}
    plain, damped = (
        StepGaussNewton(model, space, batches, each).dense() for each in (dict.fromkeys(layers, 0.0), damping)
    )
    added = space.matrices((damped - plain).diagonal().unsqueeze(0))
    for name, value in damping.items():
        torch.testing.assert_close(added[name], torch.full_like(added[name], value))


def test_other_parameters_are_held_fixed():
    model, (inputs, targets) = Task(Mlp().double()), examples()
    found, space = matrix_of_step(model, [(6, (inputs, targets))])
    layers = {name: layer for name, layer in space.layers.items() if name == "net.middle"}
    inside = StepGaussNewton(model, LayerVectors(layers), [(6, (inputs, targets))], {"net.middle": 0.0}).dense()
    where = space.positions["net.middle"].flatten()
    order = LayerVectors(layers).positions["net.middle"].flatten()
    torch.testing.assert_close(inside[order][:, order], found[where][:, where])


def test_leaves_the_model_alone():
    model, (inputs, targets) = Task(Mlp().double()), examples()
    model.net.first.weight.grad = torch.ones_like(model.net.first.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrix_of_step(model.train(), [(6, (inputs, targets))])
    assert model.training
    assert model.net.first.weight.grad.eq(1).all()
    assert model.net.last.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_refuses_a_loss_that_is_maximized():
    model = Task(Mlp().double(), lambda f, y: -F.cross_entropy(f, y))
    with pytest.raises(LossNotRecognizedError, match="is maximized"):
        matrix_of_step(model, [(6, examples())])

"""Products of a model's curvature, its gradients and their derivatives, against loops over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Sampler, TensorDataset

from lightning_influence.solvers import GaussNewtonOperator, HessianOperator, Objective
from tests.reference.models import random, seeded_token_model
from tests.reference.solvers import dense_gauss_newton, dense_hessian, gradients
from tests.solvers.problems import class_loss, classifier

KINDS = {"hessian": (HessianOperator, dense_hessian), "gauss-newton": (GaussNewtonOperator, dense_gauss_newton)}


def in_eval(model: nn.Module) -> nn.Module:
    """The reference runs the model as it is."""
    return nn.Sequential(*[module for module in model if not isinstance(module, nn.Dropout)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [7, 30])
def test_dense_operator_equals_the_mean_over_examples(kind: str, batch_size: int) -> None:
    problem, (make, reference) = classifier(), KINDS[kind]
    found = make.from_loader(problem.model, problem.train(batch_size), loss=class_loss).dense()
    expected = reference(in_eval(problem.model), class_loss, problem.inputs, problem.targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_regularization_is_on_the_diagonal(kind: str) -> None:
    problem, (make, _) = classifier(), KINDS[kind]
    plain, regularized = (
        make.from_loader(problem.model, problem.train(), loss=class_loss, hessian_regularization=value).dense()
        for value in (0.0, 0.25)
    )
    torch.testing.assert_close(regularized - plain, 0.25 * torch.eye(len(plain)).double())


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_of_single_batches_have_the_operator_as_their_mean(kind: str) -> None:
    problem, (make, _) = classifier(), KINDS[kind]
    operator = make.from_loader(problem.model, problem.train(7), loss=class_loss)  # the last batch is short
    vectors = random(3, operator.size, seed=1)
    estimates = [operator.curvature_product(vectors, batch) for batch in range(operator.num_batches)]
    assert len(estimates) == 5
    torch.testing.assert_close(torch.stack(estimates).mean(0), operator.curvature_product(vectors))


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    model = nn.Linear(4, 3).double()
    data = [(random(10, 4, seed=1), torch.arange(10) % 3)]
    hessian, gauss_newton = (
        make.from_loader(model, data, loss=class_loss).dense() for make in (HessianOperator, GaussNewtonOperator)
    )
    torch.testing.assert_close(hessian, gauss_newton)


def test_gradients_equal_autograd_one_example_at_a_time() -> None:
    problem = classifier()
    objective = Objective(problem.model, class_loss)
    found = torch.cat([objective.gradients(batch) for batch in objective.batches(problem.train())])
    expected = gradients(in_eval(problem.model), class_loss, problem.inputs, problem.targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_directional_derivatives_are_products_with_the_gradients() -> None:
    problem = classifier()
    objective = Objective(problem.model, class_loss)
    (batch,) = objective.batches(problem.train(30))
    directions = random(3, objective.size, seed=2)
    expected = directions @ objective.gradients(batch).T
    torch.testing.assert_close(objective.directional(batch, directions), expected)


def test_input_derivatives_equal_finite_differences() -> None:
    problem = classifier()
    objective = Objective(problem.model, class_loss)
    (batch,) = objective.batches(problem.train(30))
    directions = random(2, objective.size, seed=2)
    found = objective.input_derivatives(batch, directions)
    assert found.shape == (2, 30, 4)
    for feature in range(4):
        shift = 1e-5 * torch.eye(4).double()[feature]
        after, before = (
            objective.directional(objective.batches([(problem.inputs + s, problem.targets)])[0], directions)
            for s in (shift, -shift)
        )
        torch.testing.assert_close(found[:, :, feature], (after - before) / 2e-5, rtol=1e-6, atol=1e-8)


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)


def attention_model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=7, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Embedding(5, 6), layer, nn.Linear(6, 5)).double()


def convolution_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(9, 3)
    ).double()


def token_data() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Callable]] = {
    "attention": (attention_model, token_data, sequence_loss),
    "reused layer": (lambda: seeded_token_model().double(), token_data, sequence_loss),
    "convolution": (convolution_model, lambda: (random(4, 2, 5, seed=1), torch.arange(4) % 3), class_loss),
}


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_right_for_other_architectures(name: str, kind: str) -> None:
    make_model, data, loss = MODELS[name]
    model, (inputs, targets) = make_model(), data()
    if name == "reused layer":
        targets = targets.clamp(max=6)
    operator = KINDS[kind][0].from_loader(model, [(inputs, targets)], loss=loss)
    found = operator.product(random(2, operator.size, seed=3))
    if kind == "hessian":
        expected = finite_difference(operator.objective, (inputs, targets), random(2, operator.size, seed=3))
    else:
        expected = by_double_backward(model.eval(), loss, inputs, targets, random(2, operator.size, seed=3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def finite_difference(objective: Objective, data: tuple[Tensor, Tensor], vectors: Tensor) -> Tensor:
    """H v by central differences of the mean gradient."""
    rows, start = [], objective.parameters
    (batch,) = objective.batches([data])
    for vector in vectors:
        sides = []
        for sign in (1, -1):
            objective.parameters = start + sign * 1e-5 * vector
            sides.append(objective.gradients(batch).mean(0))
        rows.append((sides[0] - sides[1]) / 2e-5)
    objective.parameters = start
    return torch.stack(rows)


def by_double_backward(
    model: nn.Module, loss: Callable, inputs: Tensor, targets: Tensor, vectors: Tensor
) -> Tensor:
    """Jᵀ H_y J v by plain autograd: J v is the derivative of Jᵀ u by u."""
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(inputs)
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, u, create_graph=True)
    at = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at, targets).mean(), at, create_graph=True)
    rows = []
    for vector in vectors:
        pieces = vector.split([p.numel() for p in parameters])
        inner = sum((g * v.view_as(g)).sum() for g, v in zip(pulled, pieces, strict=True))
        (moved,) = torch.autograd.grad(inner, u, retain_graph=True)
        (curved,) = torch.autograd.grad(slope, at, moved, retain_graph=True)
        back = torch.autograd.grad(outputs, parameters, curved, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in back]))
    return torch.stack(rows)


def test_a_frozen_parameter_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    operator = HessianOperator.from_loader(model, [(random(6, 4), torch.arange(6) % 3)], loss=class_loss)
    assert operator.size == 5 * 3 + 3
    assert operator.dense().shape == (18, 18)


def test_a_float32_model_can_be_computed_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(random(6, 4).float(), torch.arange(6) % 3)]
    operator = HessianOperator.from_loader(model, data, loss=class_loss, dtype=torch.float64)
    expected = dense_hessian(model.double(), class_loss, data[0][0].double(), data[0][1])
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-10, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    problem = classifier()
    problem.model.train()
    kept = {name: value.clone() for name, value in problem.model.state_dict().items()}
    operator = HessianOperator.from_loader(problem.model, problem.train(), loss=class_loss)
    operator.product(random(1, operator.size))
    assert all(module.training for module in problem.model.modules())
    assert all(torch.equal(value, kept[name]) for name, value in problem.model.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def dataset() -> TensorDataset:
    return TensorDataset(classifier().inputs, classifier().targets)


def loader(**options: object) -> DataLoader:
    return DataLoader(dataset(), batch_size=8, **options)


class Backwards(Sampler):
    """Batches of one's own."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[3, 2], [1, 0]])


def test_a_data_loader_in_order_is_taken() -> None:
    operator = HessianOperator.from_loader(classifier().model, loader(), loss=class_loss)
    assert (operator.num_examples, operator.num_batches) == (30, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loader(shuffle=True), "RandomSampler.*shuffle=False"),
        (lambda: loader(drop_last=True), "drop_last=False"),
        (lambda: DataLoader(dataset(), batch_sampler=Backwards()), "draws by Backwards"),
        (lambda: DataLoader(dataset(), batch_sampler=BatchSampler(range(4), 2, False)), "draws by range"),
        (lambda: [], "no batch"),
    ],
)
def test_a_loader_that_is_not_the_dataset_in_order_is_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianOperator.from_loader(classifier().model, make(), loss=class_loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: iter(loader()), "got an iterator"), (lambda: [torch.ones(2, 4)], r"pairs .*got a tensor")],
)
def test_batches_that_are_no_pairs_or_come_once_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HessianOperator.from_loader(classifier().model, make(), loss=class_loss)


def test_a_reduced_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`loss` must return one number for each example, shape \[8\], got \(\)"):
        HessianOperator.from_loader(classifier().model, classifier().train(), loss=cross_entropy)


def test_losses_that_are_not_finite_are_refused() -> None:
    inputs = classifier().inputs.clone()
    inputs[3, 0] = torch.nan
    with pytest.raises(ValueError, match="1 losses of a batch are not finite"):
        HessianOperator.from_loader(classifier().model, [(inputs, classifier().targets)], loss=class_loss)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Objective(nn.Linear(2, 2).requires_grad_(False), class_loss)


class Named(nn.Linear):
    """Returns its outputs in a dictionary."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(inputs)}


def test_gauss_newton_of_several_outputs_is_refused_where_the_hessian_is_not() -> None:
    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return class_loss(outputs["logits"], targets)

    model, data = Named(4, 3).double(), [(random(6, 4), torch.arange(6) % 3)]
    vectors = torch.ones(1, 15).double()
    assert HessianOperator.from_loader(model, data, loss=loss).product(vectors).shape == (1, 15)
    with pytest.raises(TypeError, match="returns one tensor, got dict"):
        GaussNewtonOperator.from_loader(model, data, loss=loss).product(vectors)

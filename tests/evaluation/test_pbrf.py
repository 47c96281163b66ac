"""The proximal Bregman response: against its definition, closed form, and its limit for small weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.evaluation import Responses, pbrf
from lightning_influence.evaluation.pbrf import Proximal, damping_vector
from lightning_influence.solvers import Exact, Objective, compute_influences
from lightning_influence.solvers.preconditioner import Identity
from tests.reference.models import random
from tests.reference.proximal import least_squares_response, proximal_bregman_objective
from tests.solvers.problems import class_loss, classifier
from tests.solvers.test_operators import in_eval

DAMPING = 0.05


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square() / 2


def responses(**options: object) -> Responses:
    problem = classifier()
    options = {"damping": DAMPING, "rtol": 1e-8, **options}
    examples = (problem.inputs[:5], problem.targets[:5])
    return pbrf(problem.model, problem.train(7), examples, loss=class_loss, **options)


def definition(example: int, epsilon: float) -> object:
    problem = classifier()
    model = in_eval(problem.model)
    damping = torch.tensor(DAMPING, dtype=torch.float64)
    chosen = (problem.inputs[example], problem.targets[example])
    return proximal_bregman_objective(
        model, class_loss, problem.inputs, problem.targets, chosen, epsilon=epsilon, damping=damping
    )


@pytest.mark.parametrize("epsilon", [-1 / 30, 0.5])
def test_responses_are_minima_of_the_definition(epsilon: float) -> None:
    found = responses(epsilon=epsilon, rtol=1e-6)
    assert bool(found.info.converged.all())
    for example in (3,):
        objective = definition(example, epsilon)
        theta = found.parameters[example].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(theta), theta)
        start = found.baseline.clone().requires_grad_()
        (at_start,) = torch.autograd.grad(objective(start), start)
        assert gradient.norm() <= 1.01e-6 * at_start.norm()
        assert objective(found.parameters[example]) < objective(found.baseline)


def test_values_and_gradients_equal_the_definition_away_from_the_trained_weights() -> None:
    problem = classifier()
    objective = Objective(problem.model, class_loss)
    batches = objective.batches(problem.train(7))
    (examples,) = objective.batches([(problem.inputs[:3], problem.targets[:3])])
    fast = Proximal(objective, batches, examples, 0.3, damping_vector(objective, DAMPING))
    theta = objective.parameters + 0.3 * random(3, objective.size, seed=1)
    rows = torch.tensor([2, 0, 1])
    for row, value, gradient in zip(rows, fast.values(theta, rows), fast.gradients(theta, rows), strict=True):
        slow = definition(int(row), 0.3)
        at = theta[(rows == row).nonzero()[0, 0]].clone().requires_grad_()
        torch.testing.assert_close(value, slow(at).detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(slow(at), at)[0])


def test_least_squares_responses_equal_the_closed_form() -> None:
    X, y, trained = random(20, 4, seed=1), random(20, seed=2), random(4, seed=3)  # not a minimum: need not be
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = trained.unsqueeze(0).clone()
    found = pbrf(model, [(X, y)], (X[:6], y[:6]), loss=half_square, damping={"weight": 0.1}, rtol=1e-11)
    for example in range(6):
        expected = least_squares_response(
            X, y, trained, example, epsilon=-1 / 20, damping=torch.full((4,), 0.1, dtype=torch.float64)
        )
        torch.testing.assert_close(found.parameters[example], expected, rtol=1e-9, atol=1e-11)


def test_scores_for_a_small_weight_are_influences_by_the_gauss_newton_matrix() -> None:
    problem = classifier()
    first_order = compute_influences(
        problem.model,
        problem.train(),
        problem.queries(),
        loss=class_loss,
        solver=Exact(),
        curvature="gauss-newton",
        hessian_regularization=DAMPING,
    )[:, :5]
    far, near = (responses(epsilon=epsilon).scores(problem.queries()) for epsilon in (1e-3, 1e-4))
    torch.testing.assert_close(near, first_order, rtol=1e-3, atol=1e-3)
    ratio = (far - first_order).norm() / (near - first_order).norm()
    assert 9 < ratio < 11  # what is left is of first order in epsilon


def test_a_measurement_replaces_minus_the_loss_in_scores() -> None:
    problem = classifier()
    found = responses()
    doubled = found.scores(
        problem.queries(), measurement=lambda outputs, targets: -2 * class_loss(outputs, targets)
    )
    torch.testing.assert_close(doubled, 2 * found.scores(problem.queries()))


def test_responses_do_not_depend_on_batches_or_company() -> None:
    problem = classifier()
    alone = pbrf(
        problem.model,
        problem.train(30),
        (problem.inputs[3:4], problem.targets[3:4]),
        loss=class_loss,
        damping=DAMPING,
        rtol=1e-8,
    )
    torch.testing.assert_close(alone.parameters[0], responses().parameters[3], rtol=1e-6, atol=1e-8)


def test_the_preconditioner_changes_only_how_the_responses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = responses()
    without = responses(preconditioner=Identity())
    module = importlib.import_module("lightning_influence.evaluation.pbrf")  # not the function
    monkeypatch.setattr(module, "DENSE_SIZE", 0)
    for found in (without, responses()):  # nothing; a few steps of conjugate gradients
        torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-6, atol=1e-8)
        assert found.info.iterations.sum() > expected.info.iterations.sum()


def test_the_model_is_left_as_it_was() -> None:
    problem = classifier()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    responses()
    assert problem.model.training
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


def test_what_did_not_converge_is_said() -> None:
    with pytest.warns(UserWarning, match="pbrf: 5 of 5 responses did not converge"):
        found = responses(maxiter=1)
    assert not found.info.converged.any()


def test_damping_by_name_goes_to_the_nearest_owner() -> None:
    objective = Objective(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), class_loss)
    found = damping_vector(objective, {"0": 1.0, "0.bias": 2.0, "1": 3.0})
    assert found.tolist() == [1.0] * 4 + [2.0] * 2 + [3.0] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "`damping` must be finite and not negative, got -1.0"),
        ({"damping": {"0": 1.0}}, "`damping` has no number for parameter '3.weight'"),
        ({"damping": {"0": 1.0, "3": 1.0, "7": 1.0}}, r"`damping` names \['7'\]"),
        ({"epsilon": 0.0}, "`epsilon` must be finite and not 0"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        responses(**options)


def test_a_model_of_several_outputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    data = (random(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="`model` must return one tensor, got tuple"):
        pbrf(Two(), [data], data, loss=lambda y, t: class_loss(y[0], t), damping=0.1)


def test_no_example_and_a_loss_that_is_not_convex_are_refused() -> None:
    problem = classifier()
    nothing = (problem.inputs[:0], problem.targets[:0])
    with pytest.raises(ValueError, match="`examples` must hold at least one example"):
        pbrf(problem.model, problem.train(), nothing, loss=class_loss, damping=DAMPING)
    with pytest.raises(ValueError, match="is not positive; raise `damping`, or pass a `loss` that is convex"):
        pbrf(problem.model, problem.train(), problem.train()[0], loss=_concave, damping=1e-6)


def _concave(outputs: Tensor, targets: Tensor) -> Tensor:
    return -outputs.square().sum(1)

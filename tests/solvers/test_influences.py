"""Influences by definition: against dense matrices, against training again, and against our own files."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, capture
from lightning_influence.errors import WeightsMismatchError
from lightning_influence.solvers import (
    ConjugateGradient,
    EKFACPreconditioner,
    Exact,
    GaussNewtonOperator,
    Objective,
    PreconditionedNeumann,
    compute_influence_factors,
    compute_influences,
    influences_of_factors,
)
from tests.reference import linear_models
from tests.reference.models import random
from tests.reference.ridge import fit_ridge
from tests.reference.solvers import dense_gauss_newton, dense_hessian, gradients
from tests.solvers.problems import class_loss, classifier
from tests.solvers.test_operators import in_eval

WEIGHT_DECAY = 0.05


@pytest.mark.parametrize(
    ("curvature", "reference"), [("hessian", dense_hessian), ("gauss-newton", dense_gauss_newton)]
)
def test_scores_equal_the_dense_definition(curvature: str, reference: object) -> None:
    problem = classifier()
    model = in_eval(problem.model)
    H = reference(model, class_loss, problem.inputs, problem.targets)
    H += torch.eye(len(H)).double()  # more than the Hessian's negative eigenvalues
    rows = gradients(model, class_loss, problem.inputs, problem.targets)
    queries = gradients(model, class_loss, problem.query_inputs, problem.query_targets)
    expected = queries @ torch.linalg.solve(H, rows.T)
    for solver in (Exact(), ConjugateGradient(rtol=1e-10)):
        found = compute_influences(
            problem.model,
            problem.train(7),
            problem.queries(),
            loss=class_loss,
            solver=solver,
            curvature=curvature,
            hessian_regularization=1.0,
        )
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def logits_of_target(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.gather(1, targets.unsqueeze(1))[:, 0]


def test_a_measurement_replaces_minus_the_loss() -> None:
    problem = classifier()
    found = factors(measurement=logits_of_target)
    of_logits = gradients(in_eval(problem.model), logits_of_target, problem.query_inputs, problem.query_targets)
    operator = GaussNewtonOperator.from_loader(
        problem.model, problem.train(), loss=class_loss, hessian_regularization=0.1
    )
    torch.testing.assert_close(found, Exact().solve(operator, -of_logits).value)
    default = factors(measurement=lambda outputs, targets: -class_loss(outputs, targets))
    torch.testing.assert_close(default, factors())


def factors(batch_size: int = 8, **options: object) -> Tensor:
    problem = classifier()
    return compute_influence_factors(
        problem.model,
        problem.train(batch_size),
        problem.queries(),
        loss=class_loss,
        solver=Exact(),
        curvature="gauss-newton",
        hessian_regularization=0.1,
        **options,
    ).value


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_results_do_not_depend_on_the_batch_size(mode: str) -> None:
    problem = classifier()
    found = [
        influences_of_factors(problem.model, problem.train(size), factors(size), loss=class_loss, mode=mode)
        for size in (1, 7, 30)
    ]
    assert found[0].shape == (4, 30) if mode == "up" else (4, 30, 4)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_a_train_loader_is_drawn_once() -> None:
    model, X, y, queries, query_targets = ridge()

    class Augmented(TensorDataset):
        draws = 0

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            type(self).draws += 1
            return super().__getitem__(index)

    compute_influences(
        model,
        DataLoader(Augmented(X, y), batch_size=10),
        [(queries, query_targets)],
        loss=half_square,
        solver=Exact(),
        hessian_regularization=WEIGHT_DECAY,
    )
    assert Augmented.draws == len(X)


def test_scores_of_a_converged_classifier_are_those_of_its_objective() -> None:
    X, queries = random(40, 4, seed=1), random(5, 4, seed=2)
    y, query_targets = torch.arange(40) % 3, torch.arange(5) % 3
    fit = linear_models.fit(linear_models.softmax_loss, X, y, 3, weight_decay=WEIGHT_DECAY)
    found = compute_influences(
        fit.to_module(),
        [(X, y)],
        [(queries, query_targets)],
        loss=class_loss,
        solver=ConjugateGradient(rtol=1e-12),
        hessian_regularization=WEIGHT_DECAY,
    )
    expected = linear_models.exact_scores(fit, queries, query_targets)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1) / 2


@functools.cache
def ridge() -> tuple[nn.Sequential, Tensor, Tensor, Tensor, Tensor]:
    """A ridge regression at its optimum; features, targets, and those of queries."""
    X, queries = random(25, 3, seed=1), random(4, 3, seed=2)
    y = X @ random(3, 1, seed=3) + 0.3 * random(25, 1, seed=4)
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(fit_ridge(X, y, weight_decay=WEIGHT_DECAY))
    return model, X, y, queries, random(4, 1, seed=5)


def ridge_influences(**options: object) -> Tensor:
    model, X, y, queries, query_targets = ridge()
    return compute_influences(
        model,
        [(X, y)],
        [(queries, query_targets)],
        loss=half_square,
        solver=Exact(),
        hessian_regularization=WEIGHT_DECAY,
        **options,
    )


def refitted_measurement(X: Tensor, weights: Tensor) -> Tensor:
    """Minus the queries' losses after fitting the weighted examples again, by the normal equations."""
    _, _, y, queries, query_targets = ridge()
    weighted = X * weights.unsqueeze(1)
    H = weighted.T @ X / len(X) + WEIGHT_DECAY * torch.eye(3).double()
    W = torch.linalg.solve(H, weighted.T @ y / len(X))
    return -half_square(queries @ W, query_targets)


def test_scores_are_the_derivative_by_an_examples_weight() -> None:
    _, X, *_ = ridge()
    found = ridge_influences()
    for m in range(len(X)):
        shift = 1e-4 * torch.eye(len(X)).double()[m]
        after, before = (refitted_measurement(X, 1 + s) for s in (shift, -shift))
        # an example of weight 1 + e adds e / N of its loss to the mean
        torch.testing.assert_close(found[:, m], (after - before) / 2e-4 * len(X), rtol=1e-5, atol=1e-7)


def test_perturbations_are_the_derivative_by_an_examples_features() -> None:
    _, X, *_ = ridge()
    found = ridge_influences(mode="perturbation")
    assert found.shape == (4, 25, 3)
    for m in (0, 7, 24):
        for feature in range(3):
            shift = torch.zeros_like(X)
            shift[m, feature] = 1e-4
            after, before = (refitted_measurement(X + s, torch.ones(25).double()) for s in (shift, -shift))
            expected = (after - before) / 2e-4 * len(X)
            torch.testing.assert_close(found[:, m, feature], expected, rtol=1e-5, atol=1e-7)


def test_kfac_of_a_captured_ridge_regression_gives_the_same_scores() -> None:
    # one output: K-FAC's G is mean(r²) XᵀX / N, so with damping mean(r²) weight_decay it is mean(r²) H
    model, X, y, queries, query_targets = ridge()
    mean_square = float((model(X) - y).detach().square().mean())
    with TemporaryDirectory() as folder:
        path = capture(
            model,
            DataLoader(TensorDataset(X, y), batch_size=10),
            Path(folder) / "ridge.h5",
            training_loss=lambda model, batch: half_square(model(batch[0]), batch[1]),
            codec="pairs-float32",
        )
        scores = InfluenceModule.attach(model, path).scores(
            [queries, query_targets],
            damping=mean_square * WEIGHT_DECAY,
            curvature="kfac",
            measurement=lambda model, batch: -half_square(model(batch[0]), batch[1]),
        )
    expected = ridge_influences()
    # float32 rows and factors
    torch.testing.assert_close(scores.double() * mean_square, expected, rtol=1e-4, atol=1e-5)


def training_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return class_loss(model(batch[0]), batch[1])


def test_neumann_with_ekfac_goes_from_the_files_scores_to_the_solution(tmp_path: Path) -> None:
    problem = classifier()
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=8)
    path = capture(problem.model, loader, tmp_path / "file.h5", training_loss=training_loss, codec="pairs-float32")
    query = [problem.query_inputs, problem.query_targets]
    ekfac = InfluenceModule.attach(problem.model, path).scores(
        query, damping=0.05, measurement=lambda model, batch: -training_loss(model, batch)
    )
    M = EKFACPreconditioner.from_store(problem.model, path, damping=0.05)
    operator = GaussNewtonOperator.from_loader(problem.model, loader, loss=class_loss, hessian_regularization=0.05)
    rows = gradients(in_eval(problem.model), class_loss, problem.inputs, problem.targets)
    queries = gradients(in_eval(problem.model), class_loss, *query)

    with pytest.warns(UserWarning, match="did not converge"):
        first = PreconditionedNeumann(M, maxiter=1).solve(operator, queries).value @ rows.T
    torch.testing.assert_close(first, ekfac.double(), rtol=1e-4, atol=1e-5)  # the file is float32

    truth = torch.linalg.solve(operator.dense(), queries.T).T
    for solver in (
        ConjugateGradient(rtol=1e-8, preconditioner=M),
        ConjugateGradient(rtol=1e-8, preconditioner=M, block=True),
        PreconditionedNeumann(M, step=0.5, maxiter=2000, rtol=1e-8),
    ):
        torch.testing.assert_close(solver.solve(operator, queries).value, truth, rtol=1e-5, atol=1e-6)


class Convolutions(nn.Module):
    """A convolution, normalizations, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm1d(3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.scale = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.scale(h).mean(1))


def test_every_layers_factors_find_their_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutions().double().eval()
    inputs, targets = random(20, 2, 4, seed=1), torch.arange(20) % 3
    query = [random(3, 2, 4, seed=2), torch.arange(3)]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=10)
    path = capture(model, loader, tmp_path / "f.h5", training_loss=training_loss, codec="pairs-float32")
    influence = InfluenceModule.attach(model, path)
    assert influence.coverage.share == 1
    scores = influence.scores(query, damping=0.05, measurement=lambda model, batch: -training_loss(model, batch))
    M = EKFACPreconditioner.from_store(model, path, damping=0.05)
    objective = Objective(model, class_loss)
    rows, queries = (objective.gradients(objective.batches([data])[0]) for data in ((inputs, targets), query))
    torch.testing.assert_close(M.solve(queries) @ rows.T, scores.double(), rtol=1e-4, atol=1e-4)


def test_ekfac_speeds_up_conjugate_gradients_where_the_empirical_fisher_is_near(tmp_path: Path) -> None:
    # labels are the model's own, so that the empirical Fisher estimates the Gauss-Newton matrix
    problem = classifier()
    inputs = random(300, 4, seed=11) * torch.tensor([4.0, 1.0, 0.3, 0.1]).double()
    probabilities = in_eval(problem.model)(inputs).detach().softmax(1)
    targets = probabilities.multinomial(1, generator=torch.Generator().manual_seed(12))[:, 0]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=100)
    path = capture(problem.model, loader, tmp_path / "f.h5", training_loss=training_loss, codec="pairs-float32")
    operator = GaussNewtonOperator.from_loader(problem.model, loader, loss=class_loss, hessian_regularization=1e-4)
    M = EKFACPreconditioner.from_store(problem.model, path, damping=1e-4)
    vectors = random(3, operator.size, seed=13)
    plain = ConjugateGradient(rtol=1e-6).solve(operator, vectors).info.iterations
    preconditioned = ConjugateGradient(rtol=1e-6, preconditioner=M).solve(operator, vectors).info.iterations
    assert int(preconditioned.max()) < 0.75 * int(plain.min())


def test_roots_of_the_preconditioner_multiply_to_its_inverse(tmp_path: Path) -> None:
    problem = classifier()
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=8)
    path = capture(
        problem.model, loader, tmp_path / "f.h5", training_loss=training_loss, layers=["0"], codec="pairs-float32"
    )
    M = EKFACPreconditioner.from_store(problem.model, path)  # the last layer is not in the file
    eye = torch.eye(M.size).double()
    root = M.inverse_root(eye)
    torch.testing.assert_close(root @ root, M.solve(eye), rtol=1e-4, atol=1e-4)  # float32 eigenvectors
    assert float(torch.linalg.eigvalsh((root + root.T) / 2).min()) > 0


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    problem = classifier()
    loader = DataLoader(TensorDataset(problem.inputs, problem.targets), batch_size=8)
    path = capture(problem.model, loader, tmp_path / "f.h5", training_loss=training_loss, codec="pairs-float32")
    with pytest.raises(WeightsMismatchError, match=r"factors of layer '3'"):
        EKFACPreconditioner.from_store(nn.Sequential(nn.Linear(4, 5)), path)
    M = EKFACPreconditioner.from_store(problem.model, path)
    with pytest.raises(ValueError, match="is for 43 parameters"):
        M.solve(torch.ones(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "down"}, '`mode` must be "up"'), ({"curvature": "fisher"}, "`curvature` must be one of")],
)
def test_unknown_names_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ridge_influences(**options)


def test_perturbation_of_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(4, 3))
    data = [(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"needs inputs that are one tensor of floating-point .*int64"):
        influences_of_factors(model, data, torch.ones(1, 8 + 15), loss=class_loss, mode="perturbation")


def test_factors_of_another_size_are_refused() -> None:
    problem = classifier()
    with pytest.raises(ValueError, match=r"`factors` must have shape \[q, 43\]"):
        influences_of_factors(problem.model, problem.train(), torch.ones(1, 5), loss=class_loss)

"""Exact leave-one-out on convex models, and how near first-order influence comes to it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.reference.factors import fisher_block, unvec, vec
from tests.reference.linear_models import (
    LinearFit,
    binary_loss,
    exact_scores,
    first_order_changes,
    fit,
    leave_one_out_changes,
    refit_without,
    softmax_loss,
    squared_loss,
)
from tests.reference.models import random
from tests.reference.ridge import (
    fit_ridge,
    ridge_hessian,
    ridge_leave_one_out_changes,
    ridge_leverages,
    ridge_prediction_changes,
    ridge_weights_without,
)
from tests.reference.scores import influence_scores, loss_influence_scores, removal_effect

WEIGHT_DECAY = 0.01
EXACT = {"rtol": 1e-8, "atol": 1e-11}  # Newton stops at gradient 1e-12; H⁻¹ amplifies by 1/0.01


def features_with_ones(n: int, *, seed: int) -> Tensor:
    """Four random features and the constant 1, shape [n, 5]."""
    return torch.cat([random(n, 4, seed=seed), torch.ones(n, 1, dtype=torch.float64)], dim=1)


def regression_data(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    X = features_with_ones(n, seed=seed)
    return X, X @ random(5, 2, seed=100) + 0.5 * random(n, 2, seed=seed + 50)


def class_data(n: int, n_outputs: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy labels of a linear teacher; binary labels when there is one output."""
    X = features_with_ones(n, seed=seed)
    teacher = X @ random(5, n_outputs, seed=101) + random(n, n_outputs, seed=seed + 50)
    return X, (teacher[:, 0] > 0).long() if n_outputs == 1 else teacher.argmax(dim=1)


CASES = {
    "ridge": (squared_loss, 2, regression_data),
    "binary": (binary_loss, 1, lambda n, seed: class_data(n, 1, seed=seed)),
    "softmax": (softmax_loss, 3, lambda n, seed: class_data(n, 3, seed=seed)),
}


def fitted(case: str, n: int = 60) -> tuple[LinearFit, Tensor, Tensor]:
    """The fit, and five queries with their targets."""
    loss, n_outputs, data = CASES[case]
    X, y = data(n, seed=1)
    model = fit(loss, X, y, n_outputs, weight_decay=WEIGHT_DECAY)
    return model, *data(5, seed=2)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of all entries."""
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


@pytest.mark.parametrize("case", CASES)
def test_fit_is_stationary(case: str) -> None:
    model, _, _ = fitted(case)
    mean_gradient = model.gradients(model.features, model.targets).mean(dim=0)
    stationarity = mean_gradient + WEIGHT_DECAY * model.weights
    assert stationarity.abs().max() < 1e-11


@pytest.mark.parametrize("case", CASES)
def test_refit_without_an_example_is_the_fit_on_the_others_with_scaled_decay(case: str) -> None:
    model, _, _ = fitted(case, n=20)
    loss, n_outputs, _ = CASES[case]
    others = torch.arange(20) != 7
    # (1/N) sum over N-1 = (N-1)/N · mean, so the decay relative to the mean grows by N/(N-1)
    rescaled = fit(
        loss, model.features[others], model.targets[others], n_outputs, weight_decay=WEIGHT_DECAY * 20 / 19
    )
    torch.testing.assert_close(refit_without(model, [7]), rescaled.weights, **EXACT)


def test_newton_agrees_with_closed_form_ridge() -> None:
    model, queries, query_targets = fitted("ridge")
    W = fit_ridge(model.features, model.targets, weight_decay=WEIGHT_DECAY)
    torch.testing.assert_close(model.weights, W, **EXACT)
    without = ridge_weights_without(model.features, model.targets, 3, weight_decay=WEIGHT_DECAY)
    torch.testing.assert_close(refit_without(model, [3]), without, **EXACT)
    closed_form = ridge_leave_one_out_changes(
        model.features, model.targets, queries, query_targets, weight_decay=WEIGHT_DECAY
    )
    by_refit = leave_one_out_changes(model, queries, query_targets)
    torch.testing.assert_close(by_refit, closed_form, **EXACT)


def test_ridge_hessian_is_the_autograd_hessian() -> None:
    model, _, _ = fitted("ridge")
    H = ridge_hessian(model.features, WEIGHT_DECAY)
    expected = torch.kron(torch.eye(2, dtype=torch.float64), H)  # rows of W joined
    torch.testing.assert_close(model.hessian(), expected, **EXACT)


def test_ridge_prediction_change_is_first_order_over_one_minus_leverage() -> None:
    model, queries, _ = fitted("ridge")
    X, Y = model.features, model.targets
    exact = ridge_prediction_changes(X, Y, queries, weight_decay=WEIGHT_DECAY)  # [q, N, o]
    leverages = ridge_leverages(X, weight_decay=WEIGHT_DECAY)
    assert bool(((leverages > 0) & (leverages < 1)).all())
    residuals = X @ model.weights.T - Y  # grad L_m = residual xᵀ
    H_inverse = torch.linalg.inv(ridge_hessian(X, WEIGHT_DECAY))
    first_order = (queries @ H_inverse @ X.T)[:, :, None] * residuals / len(X)
    torch.testing.assert_close(exact * (1 - leverages)[None, :, None], first_order, **EXACT)


def test_softmax_hessian_is_the_fisher_with_expected_labels() -> None:
    model, _, _ = fitted("softmax")
    probabilities = (model.features @ model.weights.T).softmax(dim=1)  # [n, o]
    weighted = []
    for label in range(3):
        labels = torch.full((60,), label)
        gradients = model.gradients(model.features, labels)
        weighted.append(probabilities[:, label].sqrt()[:, None, None] * gradients)
    # fisher_block divides by 3 N rows; the expectation over labels by N
    fisher = 3 * fisher_block(torch.cat(weighted))
    order = vec(torch.arange(15.0).reshape(3, 5)).long()  # row by row -> vec order
    hessian = model.hessian()[order][:, order]
    torch.testing.assert_close(hessian, fisher + WEIGHT_DECAY * torch.eye(15, dtype=torch.float64), **EXACT)
    assert torch.equal(unvec(model.weights.flatten()[order], (3, 5)), model.weights)


@functools.cache
def actual_and_estimated_changes(case: str, n: int) -> tuple[Tensor, Tensor]:
    """Leave-one-out and first-order loss changes of 5 queries for 40 removals, each [q, 40]."""
    model, queries, query_targets = fitted(case, n=n)
    removed = range(0, n, n // 40)
    actual = leave_one_out_changes(model, queries, query_targets, removed=removed)
    return actual, first_order_changes(model, queries, query_targets)[:, list(removed)]


@pytest.mark.parametrize("case", CASES)
def test_first_order_influence_predicts_leave_one_out(case: str) -> None:
    actual, estimate = actual_and_estimated_changes(case, 160)
    assert actual.shape == (5, 40)
    # With all 160 removals and four draws of the data the lowest correlation is .9992 (ridge),
    # .9972 (binary), .9979 (softmax). With 60 examples leverages are larger and it falls to .97.
    found = correlation(actual, estimate)
    assert found > 0.99, f"{case}: correlation {found:.4f}"


@pytest.mark.parametrize("case", CASES)
def test_first_order_error_shrinks_with_the_number_of_examples(case: str) -> None:
    def relative_error(n: int) -> float:
        actual, estimate = actual_and_estimated_changes(case, n)
        return ((estimate - actual).norm() / actual.norm()).item()

    # changes are O(1/N), what the first order misses O(1/N²): four times the data, about a
    # quarter of the error; a half leaves room for the draw
    assert relative_error(160) < 0.5 * relative_error(40)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_both_modules_agree_on_the_true_hessian(case: str) -> None:
    model, queries, query_targets = fitted(case)
    o, i = model.weights.shape
    order = vec(torch.arange(o * i).reshape(o, i))
    query_gradients = {"layer": model.gradients(queries, query_targets)}
    loss_gradients = {"layer": model.gradients(model.features, model.targets)}
    matrices = {"layer": model.hessian()[order][:, order]}
    scores = loss_influence_scores(query_gradients, loss_gradients, matrices)
    torch.testing.assert_close(scores, exact_scores(model, queries, query_targets), **EXACT)
    # f = -loss: removal changes the loss by minus the removal effect on f
    torch.testing.assert_close(
        -removal_effect(scores, [4]), first_order_changes(model, queries, query_targets)[:, 4], **EXACT
    )
    opposite = influence_scores(query_gradients, loss_gradients, matrices)  # f = +loss
    torch.testing.assert_close(opposite, -scores, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_removing_a_training_example_raises_its_own_loss(case: str) -> None:
    model, _, _ = fitted(case, n=12)
    actual = leave_one_out_changes(model, model.features, model.targets)
    # without m the minimiser no longer pays for m's loss: true for any objective
    assert bool((actual.diagonal() >= -1e-12).all())
    assert bool((exact_scores(model, model.features, model.targets).diagonal() > 0).all())


@pytest.mark.parametrize("has_bias", [True, False])
def test_module_computes_the_fitted_function(has_bias: bool) -> None:
    model, queries, _ = fitted("softmax")
    module = model.to_module(has_bias=has_bias)
    inputs = queries[:, :4] if has_bias else queries
    torch.testing.assert_close(module(inputs), queries @ model.weights.T, **EXACT)

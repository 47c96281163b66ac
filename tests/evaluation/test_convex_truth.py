"""Where influence functions are known to be right, retraining and the measures must say so."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import compute_influences
from lightning_influence.evaluation import Recipe, Retraining, random_subsets, retrain_subsets
from lightning_influence.metrics import leave_k_out_correlation, leave_one_out_correlation
from lightning_influence.solvers import Exact

N, Q, WEIGHT_DECAY = 60, 8, 0.05


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


@pytest.fixture(scope="module")
def problem() -> tuple[TensorDataset, TensorDataset, Recipe]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N + Q, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(N + Q, 3, generator=generator, dtype=torch.float64)
    labels = (inputs[:, :3] + noise).argmax(1)
    recipe = Recipe(  # all examples in each of many steps: to the optimum
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        functools.partial(torch.optim.SGD, lr=1.0, momentum=0.8, weight_decay=WEIGHT_DECAY),
        epochs=60,
        batch_size=N,
    )
    return TensorDataset(inputs[:N], labels[:N]), TensorDataset(inputs[N:], labels[N:]), recipe


def make_model() -> nn.Module:
    return nn.Linear(4, 3).double()


def retrained(problem: tuple, subsets: Tensor) -> Retraining:
    data, (inputs, labels), recipe = problem[0], problem[1].tensors, problem[2]
    return retrain_subsets(
        make_model,
        data,
        subsets,
        train=recipe,
        measure=lambda model: -losses(model(inputs), labels),
        progress=False,
    )


@pytest.fixture(scope="module")
def scores(problem: tuple) -> Tensor:
    data, queries, recipe = problem
    torch.manual_seed(0)
    model = make_model()
    optimizer = recipe.optimizer(model.parameters())
    for _ in range(recipe.epochs):
        optimizer.zero_grad()
        recipe.loss(model, data.tensors).backward()
        optimizer.step()
    return compute_influences(
        model,
        DataLoader(data, N),
        DataLoader(queries, Q),
        loss=losses,
        solver=Exact(),
        hessian_regularization=WEIGHT_DECAY,
    )


def test_single_removals_are_foretold(problem: tuple, scores: Tensor) -> None:
    indices = torch.arange(0, N, 2)
    subsets = torch.ones(1 + len(indices), N, dtype=torch.bool)
    subsets[torch.arange(1, len(subsets)), indices] = False
    outputs = retrained(problem, subsets).mean_outputs
    effects = outputs[1:] - outputs[0]
    assert float(leave_one_out_correlation(scores, indices, effects)) > 0.98
    assert float(leave_one_out_correlation(scores, indices, effects, correlation="pearson")) > 0.98
    ratio = -scores[:, indices].T / N / effects
    assert 0.8 < float(ratio.median()) < 1  # sizes, too; first order leaves out the example's own leverage


def test_removals_of_groups_are_foretold(problem: tuple, scores: Tensor) -> None:
    groups = random_subsets(N, 25, fraction=0.1, seed=1)
    outputs = retrained(problem, torch.cat([torch.ones(1, N, dtype=torch.bool), ~groups])).mean_outputs
    assert float(leave_k_out_correlation(scores, groups, outputs[1:] - outputs[0])) > 0.9


def test_halves_are_foretold(problem: tuple, scores: Tensor) -> None:
    found = retrained(problem, random_subsets(N, 30, seed=2))
    score, error = found.lds(scores)
    assert score > 0.7  # a half is not a small step
    assert score + 4 * error > found.lds(-scores)[0] + 1

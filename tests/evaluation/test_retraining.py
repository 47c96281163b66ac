"""Retraining on subsets: many at once, one by one, and by the seed alone."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence.evaluation import Recipe, Retraining, random_subsets, retrain_subsets

N, Q = 40, 5
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(N + Q, 6, generator=GENERATOR, dtype=torch.float64)
LABELS = (INPUTS[:, :3].argmax(1) + (torch.rand(N + Q, generator=GENERATOR) < 0.2)) % 3
DATA = TensorDataset(INPUTS[:N], LABELS[:N])
SUBSETS = random_subsets(N, 6)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def log_likelihoods(model: nn.Module) -> Tensor:
    return -cross_entropy(model(INPUTS[N:]), LABELS[N:], reduction="none")


class Mixing(SGD):
    """An optimizer of one's own."""


def without_bias_decay(parameters: Any) -> SGD:
    weights, biases = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
    return SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=0.1)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": functools.partial(SGD, lr=0.1),
    "momentum and weight decay": functools.partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "Adam": functools.partial(Adam, lr=0.01),
    "AdamW": functools.partial(AdamW, lr=0.01, weight_decay=0.1),
}
RECIPE = Recipe(loss, OPTIMIZERS["momentum and weight decay"], 3, 8, CosineAnnealingLR)


def retrained(subsets: Tensor = SUBSETS, **changes: Any) -> Retraining:
    given: dict[str, Any] = {"train": RECIPE, "measure": log_likelihoods, "seeds": 2, "progress": False, **changes}
    return retrain_subsets(given.pop("make_model", mlp), DATA, subsets, **given)


def by_definition(make_model: Callable[[], nn.Module], recipe: Recipe, subset: Tensor, seed: int) -> Tensor:
    """One model, trained as it would be written by hand."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = recipe.optimizer(model.parameters())
    batches_an_epoch = -(-int(subset.sum()) // recipe.batch_size)
    scheduler = recipe.scheduler(optimizer, recipe.epochs * batches_an_epoch) if recipe.scheduler else None
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        members = [n for n in torch.randperm(N, generator=order).tolist() if subset[n]]
        for start in range(0, len(members), recipe.batch_size):
            batch = members[start : start + recipe.batch_size]
            optimizer.zero_grad()
            cross_entropy(model(INPUTS[batch]), LABELS[batch]).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    return log_likelihoods(model).detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make_model", [mlp, convolutions])
def test_many_at_once_are_the_models_of_the_definition(optimizer: str, make_model: Callable, caplog: Any) -> None:
    recipe = replace(RECIPE, optimizer=OPTIMIZERS[optimizer])
    with caplog.at_level(logging.WARNING):
        together = retrained(make_model=make_model, train=recipe)
    assert not caplog.records  # they were trained together
    alone = retrained(make_model=make_model, train=recipe, models_at_once=1)
    expected = torch.stack(
        [torch.stack([by_definition(make_model, recipe, subset, seed) for seed in (0, 1)]) for subset in SUBSETS]
    )
    assert expected.std(0).min() > 1e-3  # subsets differ
    torch.testing.assert_close(alone.outputs, expected, rtol=0, atol=0)  # the same operations
    torch.testing.assert_close(together.outputs, expected, rtol=1e-9, atol=1e-9)  # sums in another order


def test_subsets_of_any_sizes_and_a_constant_rate() -> None:
    recipe = replace(RECIPE, scheduler=None)
    subsets = torch.cat([SUBSETS, random_subsets(N, 3, fraction=0.8), ~torch.eye(N, dtype=torch.bool)[:2]])
    found = retrained(subsets, train=recipe, seeds=[7])
    for subset, outputs in zip(subsets, found.outputs, strict=True):
        torch.testing.assert_close(outputs[0], by_definition(mlp, recipe, subset, 7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("models_at_once", [2, 5, 100])
def test_results_do_not_depend_on_how_many_are_trained_together(models_at_once: int) -> None:
    expected = retrained().outputs
    torch.testing.assert_close(retrained(models_at_once=models_at_once).outputs, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(retrained(SUBSETS[3:5], seeds=[1]).outputs[:, 0], expected[3:5, 1])


def test_parameter_groups_are_kept() -> None:
    def in_groups(parameters: Any) -> SGD:  # by position
        first, *others = parameters
        return SGD([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.01)

    recipe = replace(RECIPE, optimizer=in_groups)
    expected = torch.stack([by_definition(mlp, recipe, subset, 0) for subset in SUBSETS])
    torch.testing.assert_close(retrained(train=recipe, seeds=1).outputs[:, 0], expected, rtol=1e-9, atol=1e-9)


def test_a_schedule_may_need_its_number_of_steps(caplog: Any) -> None:
    recipe = replace(
        RECIPE, scheduler=lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.3)
    )
    found = retrained(train=recipe, seeds=1)
    assert not caplog.records
    torch.testing.assert_close(
        found.outputs[0, 0], by_definition(mlp, recipe, SUBSETS[0], 0), rtol=1e-9, atol=1e-9
    )


def test_frozen_and_tied_parameters_stay_so(caplog: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
            self.last.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.first(inputs).tanh())[:, :3]

    def make_model() -> nn.Module:
        return Tied().double()

    found = retrained(make_model=make_model)
    assert not caplog.records
    alone = retrained(make_model=make_model, models_at_once=1)
    torch.testing.assert_close(found.outputs, alone.outputs, rtol=1e-9, atol=1e-9)


def test_the_same_call_gives_the_same_bits_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = retrained(), retrained()
    assert torch.equal(one.outputs, two.outputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make_model", "optimizer", "reason"),
    [
        (with_dropout, "SGD", "`vmap` refuses"),
        (with_batch_norm, "SGD", "."),
        (mlp, "own", "Mixing is not known to update each number by itself"),
        (mlp, "no decay of biases", "the optimizer's groups depend on the parameters' shapes"),
    ],
)
def test_what_cannot_be_trained_together_is_trained_one_by_one(
    make_model: Callable, optimizer: str, reason: str, caplog: Any
) -> None:
    choices = {**OPTIMIZERS, "own": functools.partial(Mixing, lr=0.1), "no decay of biases": without_bias_decay}
    recipe = replace(RECIPE, optimizer=choices[optimizer])
    with caplog.at_level(logging.WARNING):
        found = retrained(make_model=make_model, train=recipe)
    (record,) = caplog.records  # said once
    assert "one after the other" in record.message
    assert reason in record.message
    alone = retrained(make_model=make_model, train=recipe, models_at_once=1)
    assert torch.equal(found.outputs, alone.outputs)


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def fit(model: nn.Module, subset: Subset, seed: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
    assert isinstance(model, LightningModule)
    trainer.fit(model, DataLoader(subset, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)))


def test_a_trainer_may_do_the_training(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = retrained(SUBSETS[:2], make_model=Lit, train=fit, seeds=1, cache=tmp_path / "cache.npz")
        again = retrained(SUBSETS[:2], make_model=Lit, train=fit, seeds=1)
    assert torch.equal(found.outputs, again.outputs)
    assert not torch.equal(found.outputs[0], found.outputs[1])
    untrained = retrained(SUBSETS[:2], make_model=Lit, train=lambda *_: None, seeds=1)
    assert not torch.allclose(found.outputs, untrained.outputs)


def test_a_lightning_module_may_be_trained_by_a_recipe() -> None:
    recipe = replace(RECIPE, loss=lambda model, batch: model.training_step(batch, 0))
    assert torch.equal(retrained(make_model=Lit, train=recipe).outputs, retrained().outputs)


# --- what it is good for -----------------------------------------------------------------------------


def test_the_result_scores_attributions() -> None:
    found = retrained(random_subsets(N, 30), seeds=3)
    design = torch.cat([found.subsets.double(), torch.ones(30, 1)], 1)
    fitted = torch.linalg.lstsq(design, found.mean_outputs, driver="gelsd").solution[:N].T
    assert found.lds(fitted)[0] > 0.99  # more unknowns than subsets: it fits
    score, error = found.lds(fitted + fitted.std() * torch.randn(Q, N, generator=GENERATOR))
    assert 0.2 < score < 0.95
    assert 0.01 < error < 0.2
    assert 0 < found.reliability < 1
    with pytest.raises(ValueError, match="examples without a valid row have NaN"):
        found.lds(fitted / 0)


def test_random_subsets_are_halves_and_the_first_ones_stay() -> None:
    masks = random_subsets(11, 5, seed=3)
    assert masks.sum(1).tolist() == [6] * 5
    assert torch.equal(random_subsets(11, 9, seed=3)[:5], masks)
    assert len(random_subsets(50, 40).unique(dim=0)) == 40


# --- errors ------------------------------------------------------------------------------------------


class Words(TensorDataset):
    def __getitem__(self, n: int) -> Any:
        return {"text": "word" * n, "label": 0}


class Ragged(TensorDataset):
    def __getitem__(self, n: int) -> Any:
        return torch.zeros(n + 1)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "indices": (lambda: retrained(SUBSETS.long()), r"`subsets` must be a boolean mask \[m, 40\], got torch.int64"),
    "shape": (lambda: retrained(SUBSETS[:, 1:]), r"`subsets` must have shape \[m, 40\], got \[6, 39\]"),
    "empty": (lambda: retrained(SUBSETS & False), r"`subsets`: there is nothing to train on in \[0, 1, 2, 3, 4\]"),
    "no seed": (lambda: retrained(seeds=0), "`seeds` must be a positive number"),
    "seeds": (lambda: retrained(seeds=[1, 1]), r"`seeds` must be .* different seeds, got \[1, 1\]"),
    "no models": (lambda: retrained(models_at_once=0), "`models_at_once` must be positive"),
    "measure": (lambda: retrained(measure=lambda m: 1.0), r"`measure` must return .* shape \[q\], got float"),
    "matrix": (lambda: retrained(measure=lambda m: m(INPUTS)), r"`measure` must return .* got \[45, 3\]"),
    "loss": (
        lambda: retrained(train=replace(RECIPE, loss=lambda m, b: m(b[0])[:, 0])),
        r"`loss` must return a scalar, the mean over the batch, got \[8\]",
    ),
    "divergence": (
        lambda: retrained(train=replace(RECIPE, optimizer=functools.partial(SGD, lr=float("inf")))),
        "12 of 12 models say numbers that are not finite, the first of subset 0, seed 0; lower the learning rate",
    ),
    "epochs": (lambda: replace(RECIPE, epochs=0), "`epochs` must be positive, got 0"),
    "fraction": (lambda: random_subsets(10, 2, fraction=1.0), "`fraction` of 10 examples must leave some in and"),
    "text": (
        lambda: retrain_subsets(mlp, Words(INPUTS), SUBSETS, train=RECIPE, measure=log_likelihoods),
        r"`subsets` must have shape \[m, 45\]",
    ),
    "words": (
        lambda: retrain_subsets(mlp, Words(INPUTS[:N]), SUBSETS, train=RECIPE, measure=log_likelihoods),
        "`dataset` must give tensors or numbers, got .*str",
    ),
    "ragged": (
        lambda: retrain_subsets(mlp, Ragged(INPUTS[:N]), SUBSETS, train=RECIPE, measure=log_likelihoods),
        "`dataset`: its examples cannot be stacked into tensors: .* Pad them",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument_and_what_to_do(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()

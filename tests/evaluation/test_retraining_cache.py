"""What was retrained is kept on disk: through a kill, for more subsets and seeds, and for nothing else."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Subset, TensorDataset

from lightning_influence.evaluation import retrain_subsets
from tests.evaluation.test_retraining import (
    INPUTS,
    LABELS,
    RECIPE,
    SUBSETS,
    Lit,
    N,
    convolutions,
    fit,
    log_likelihoods,
    loss,
    mlp,
    retrained,
)
from tests.matrix.children import run_forked


class Counted:
    """Counts the models that are made to be trained."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> nn.Module:
        self.number += 1
        return mlp()


def test_what_is_kept_is_not_trained_again(tmp_path: Path) -> None:
    made, path = Counted(), tmp_path / "folder" / "cache.npz"
    first = retrained(SUBSETS[:3], make_model=made, cache=path, models_at_once=1)
    assert made.number == 1 + 6  # and one to describe it
    again = retrained(SUBSETS[:3], make_model=made, cache=path, models_at_once=1)
    assert made.number == 1 + 6 + 1
    assert torch.equal(first.outputs, again.outputs)
    more = retrained(SUBSETS, make_model=made, cache=path, models_at_once=1, seeds=[1, 0, 2])
    assert made.number == 1 + 6 + 1 + 1 + 3 * 3 + 3
    assert torch.equal(more.outputs[:3, :2], first.outputs[:, [1, 0]])
    assert torch.equal(more.outputs, retrained(seeds=[1, 0, 2], models_at_once=1).outputs)
    assert [file.name for file in path.parent.iterdir()] == ["cache.npz"]


def test_a_killed_process_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_influence.evaluation.retraining_cache.SECONDS_BETWEEN_WRITES", 0)
    path, calls = tmp_path / "cache.npz", Counted()

    def dying(model: nn.Module, subset: Subset, seed: int) -> None:
        calls.number += 1
        if calls.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def living(model: nn.Module, subset: Subset, seed: int) -> None:
        calls.number += 1

    living.__qualname__ = dying.__qualname__  # the same training
    code = run_forked(lambda: retrained(train=dying, cache=path), tmp_path / "output")
    assert code != 0
    with np.load(path) as file:
        assert len(file["seeds"]) == 4
    found = retrained(train=living, cache=path)
    assert calls.number == SUBSETS.shape[0] * 2 - 4
    assert torch.equal(found.outputs, retrained(train=living).outputs)


def test_an_exception_loses_nothing(tmp_path: Path) -> None:
    calls = Counted()

    def failing(model: nn.Module, subset: Subset, seed: int) -> None:
        calls.number += 1
        if calls.number == 4:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        retrained(train=failing, cache=tmp_path / "cache.npz")
    retrained(train=failing, cache=tmp_path / "cache.npz")
    assert calls.number == 4 + SUBSETS.shape[0] * 2 - 3


def _other(optimizer: torch.optim.Optimizer, steps: int) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, 2 * steps)


_other.__qualname__ = CosineAnnealingLR.__qualname__

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"train": replace(RECIPE, optimizer=functools.partial(SGD, lr=0.2))}, "optimizer"),
    "epochs": ({"train": replace(RECIPE, epochs=4)}, "recipe"),
    "schedule": ({"train": replace(RECIPE, scheduler=None)}, "recipe"),
    "schedule of the same name": ({"train": replace(RECIPE, scheduler=_other)}, "recipe"),
    "function": ({"train": fit, "make_model": Lit}, "model .*; optimizer .*; recipe .*; train .*fit asked for"),
    "model": ({"make_model": convolutions}, "model"),
    "loss": ({"train": replace(RECIPE, loss=lambda *a: 2 * loss(*a))}, "what untrained models say"),
    "measure": ({"measure": lambda model: 2 * log_likelihoods(model)}, "what untrained models say"),
    "first weights": ({"make_model": lambda: mlp().requires_grad_().apply(_halved)}, "what untrained models say"),
}


def _halved(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data /= 2


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_something_else_is_refused(other: str, tmp_path: Path) -> None:
    changes, what = OTHERS[other]
    retrained(SUBSETS[:2], cache=tmp_path / "cache.npz")
    with pytest.raises(ValueError, match=rf"holds retrainings of something else; these differ: .*{what}"):
        retrained(SUBSETS[:2], cache=tmp_path / "cache.npz", **changes)


def test_a_file_of_other_data_is_refused(tmp_path: Path) -> None:
    retrained(SUBSETS[:2], cache=tmp_path / "cache.npz")
    others = TensorDataset(INPUTS[:N], LABELS[:N].flip(0))
    with pytest.raises(ValueError, match=r"these differ: data \(.* in the file, .* asked for\). Delete it"):
        retrain_subsets(
            mlp,
            others,
            SUBSETS[:2],
            train=RECIPE,
            measure=log_likelihoods,
            cache=tmp_path / "cache.npz",
            progress=False,
        )


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a file of retrainings"):
        retrained(cache=tmp_path / "cache.npz")


def moved(model: nn.Module, subset: Subset, seed: int, *, by: float = 0.1) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(by * float(np.random.randn()))


def test_of_a_function_arguments_and_examples_are_known(tmp_path: Path) -> None:
    def ask(dataset: Any, train: Any) -> None:
        given = {"measure": log_likelihoods, "cache": tmp_path / "cache.npz", "progress": False}
        retrain_subsets(mlp, dataset, SUBSETS[:2], train=train, **given)

    data = TensorDataset(INPUTS[:N], LABELS[:N])
    train = functools.partial(moved, by=0.2)
    ask(data, train)
    ask(data, train)
    with pytest.raises(ValueError, match="these differ: train"):
        ask(data, functools.partial(moved, by=0.3))
    with pytest.raises(ValueError, match="these differ: data"):
        ask(TensorDataset(2 * INPUTS[:N], LABELS[:N]), train)


class Noisy(TensorDataset):
    """Never the same."""

    generator = torch.Generator()

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn(x.shape, generator=self.generator), y


def test_a_file_of_augmented_data_is_taken_up(tmp_path: Path) -> None:
    given = {"measure": log_likelihoods, "cache": tmp_path / "cache.npz", "progress": False, "train": moved}
    found = [retrain_subsets(mlp, Noisy(INPUTS[:N], LABELS[:N]), SUBSETS[:2], **given) for _ in range(2)]
    assert torch.equal(found[0].outputs, found[1].outputs)


def test_all_random_numbers_belong_to_the_seed(tmp_path: Path) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    with torch.inference_mode():
        one, two = (retrained(SUBSETS[:2], train=moved) for _ in range(2))
        trained = retrained(SUBSETS[:2])
    assert torch.equal(one.outputs, two.outputs)
    assert not torch.equal(one.outputs[:, 0], one.outputs[:, 1])
    assert torch.equal(trained.outputs, retrained(SUBSETS[:2]).outputs)
    assert np.array_equal(np.random.get_state()[1], before)

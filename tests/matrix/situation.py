"""One situation of the matrix: how a run trains, and what is to come of it.

Everything in a `Situation` is a function or class of a module, so that it can be sent to a spawned process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tests.integration.models import STILL, Loss, Task, seeded, vector_data

N, BATCH = 22, 4  # six batches an epoch, the last one of two examples
EPOCHS = 2
MOVING = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
# Of a median ratio, and of factors: chains of ten roundings by 2^-24, 2^-11 and 2^-8 that partly cancel.
FLOAT32, FLOAT16, BFLOAT16 = 1e-5, 4e-3, 3e-2
INT8 = 1e-2  # of a median ratio
SPOOLED = (
    2e-4  # of the eigen codec's factors where there is no basis before the epoch: rows wait for it in float16
)


@dataclass(frozen=True)
class Expected:
    """A row of the table as it should be.

    Args:
        file: "none", or which epochs the file holds ("epoch 1", "epochs 0 1 2"); a pattern.
        rows: written/missing/invalid in the latest epoch; a pattern, "-" without a file.
        said: a pattern that one of our warnings has; "" for any or none.
        tolerance: how far a median stored/true may be from 1.
        factors: the largest error of A, S and Lambda, relative to their largest entry.
    """

    file: str = "epoch 1"
    rows: str = "22/0/0"
    said: str = ""
    tolerance: float = FLOAT32
    factors: float = FLOAT32


def refused(reason: str) -> Expected:
    """Capture stops with one warning, and there is no file."""
    return Expected("none", "-", f"stopped capturing; training goes on.*{reason}")


def no_file(reason: str = "") -> Expected:
    """A run that has no whole epoch to keep."""
    return Expected("none", "-", reason)


class Net(nn.Module):
    """5 -> 4 -> 4 -> 3 with in-place activations that never die."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.elu_(self.middle(F.elu_(self.first(x)))))


def shuffled(examples: Callable[[], Dataset] = vector_data, **options: Any) -> DataLoader:
    """The examples in batches of four, in an order that the run's seed decides."""
    return DataLoader(examples(), **{"batch_size": BATCH, "shuffle": True, **options})


def no_callbacks(folder: Path) -> list[Callback]:
    """Nothing but capture."""
    return []


def cross_entropy_sum(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of one example, which has no mean to divide by."""
    return F.cross_entropy(outputs, targets, reduction="sum")


def as_it_is(model: LightningModule) -> Any:
    """Not compiled."""
    return model


def fit_once(run: Run) -> Trainer:
    """One trainer, one fit."""
    trainer = run.make_trainer()
    trainer.fit(run.model, run.situation.data())
    return trainer


def nothing_more(run: Run) -> str:
    """No other claim than the row's."""
    return ""


@dataclass(frozen=True)
class Situation:
    """How a run trains.

    Args:
        name: in the table, and for `--only`.
        expected: what is to come of it.
        task: the `LightningModule`, made of a net, a loss and an optimizer.
        net: a module of `nn.Linear` layers.
        loss: of a batch.
        own: the loss of one example.
        wrap: what is trained instead of the module itself, such as its compiled form.
        data: the training data, made anew for each run.
        examples: the dataset by whose index the file's rows stand.
        trainer: options for the `Trainer`.
        callbacks: other callbacks than ours, which may write to a folder.
        influence: arguments of `InfluenceCallback`.
        fit: what is done with trainers.
        check: what else is wrong with the captured run, "" if nothing.
        is_exact: whether one example's own gradient is what a row holds (not with batch statistics).
        has_older_basis: whether A and S are not of the rows but of all examples, which the epoch before has seen.
        process: where it trains: in "this" one, or in one of its own with a time limit, either "forked" or a
            "script", which Lightning starts again for each rank.
        is_quick: takes part in the test suite.
    """

    name: str
    expected: Expected = field(default_factory=Expected)
    task: Callable[..., LightningModule] = Task
    net: Callable[[], nn.Module] = Net
    loss: Loss = F.cross_entropy
    own: Loss = cross_entropy_sum
    wrap: Callable[[LightningModule], Any] = as_it_is
    data: Callable[[], Any] = shuffled
    examples: Callable[[], Dataset] = vector_data
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[Path], list[Callback]] = no_callbacks
    influence: dict[str, Any] = field(default_factory=dict)
    fit: Callable[[Run], Trainer] = fit_once
    check: Callable[[Run], str] = nothing_more
    is_exact: bool = True
    has_older_basis: bool = False
    process: Literal["this", "forked", "script"] = "this"
    is_quick: bool = False


class Run:
    """One training of a situation.

    Args:
        situation: how.
        folder: for all it writes.
        capture: makes our callback, or None to train without it.
        is_still: with learning rate 0, so that all rows belong to the same weights.
    """

    def __init__(
        self, situation: Situation, folder: Path, capture: Callable[..., Callback] | None, *, is_still: bool
    ) -> None:
        self.situation, self.folder, self.capture, self.is_still = situation, folder, capture, is_still
        seed_everything(11, verbose=False)
        self.module = self.make_module()
        self.model = situation.wrap(self.module)
        self.trainer: Trainer | None = None

    @property
    def path(self) -> Path:
        """Where the captured file goes."""
        return self.folder / "influence.h5"

    @property
    def callback_options(self) -> dict[str, Any]:
        """For `InfluenceCallback`; rows are exact unless the situation wants another codec."""
        return {"path": self.path, "codec": "pairs-float32", **self.situation.influence}

    def make_module(self) -> LightningModule:
        """Always with the same weights."""
        optimizer = STILL if self.is_still else MOVING
        return self.situation.task(seeded(self.situation.net), self.situation.loss, optimizer)

    def make_trainer(self, **more: Any) -> Trainer:
        """With the situation's callbacks and, if wanted, ours; with another of both at every call."""
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        fixed = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": self.folder}
        callbacks = self.situation.callbacks(self.folder)
        if self.capture is not None:
            callbacks.append(self.capture(**self.callback_options))
        saves = any("Checkpoint" in type(callback).__name__ for callback in callbacks)
        options = {**quiet, **fixed, "enable_checkpointing": saves, **self.situation.trainer(), **more}
        return Trainer(**options, callbacks=callbacks)

    def fit(self) -> None:
        """Train."""
        torch.manual_seed(3)
        self.trainer = self.situation.fit(self)


def matches(pattern: str, found: str) -> bool:
    """The whole of it."""
    return re.fullmatch(pattern, found) is not None

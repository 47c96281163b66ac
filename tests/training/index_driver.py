"""A model that knows which examples it trained on, and a callback that drives a recorder."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_influence.errors import RowIndexError
from lightning_influence.training.indices import IndexRecorder

N = 11
POSITIONS = torch.arange(N)
DATASET = TensorDataset(torch.linspace(-1, 1, N * 3).reshape(N, 3), POSITIONS)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATASET)


class Model(pl.LightningModule):
    """Remembers the indices that it was trained on, one list a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
        self.truth: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, index = batch
        self.truth.append(torch.atleast_1d(index).tolist())
        return self.layers(x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert len(batch) == 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Driver(pl.Callback):
    """Drives a recorder as a callback that never ends the run does."""

    def __init__(self, recorder: IndexRecorder | None = None) -> None:
        self.recorder = recorder or IndexRecorder()
        self.recorded: list[list[int]] = []
        self.parts: list[tuple[int, ...]] = []
        self.problems: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.recorder.install(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recorder.start_epoch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        try:
            rows = self.recorder.next_batch(batch, batch_idx)
        except RowIndexError as err:
            self.problems.append(str(err))
        else:
            assert rows.indices.dtype == np.int64
            assert sum(rows.parts) == len(rows.indices)
            self.recorded.append(rows.indices.tolist())
            self.parts.append(rows.parts)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.recorder.uninstall()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.recorder.uninstall()


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


def fit(
    train: Any,
    val: Any = None,
    *,
    recorder: IndexRecorder | None = None,
    model: Model | None = None,
    **options: Any,
) -> tuple[Model, Driver]:
    model, driver = model or Model(), Driver(recorder)
    make_trainer(driver, **options).fit(model, train, val)
    return model, driver


def assert_recorded(model: Model, driver: Driver, *, num_batches: int) -> None:
    assert driver.problems == []
    assert len(model.truth) == num_batches
    assert driver.recorded == model.truth


def make_loader(dataset: Any = DATASET, **options: Any) -> DataLoader:
    return DataLoader(dataset, **({"batch_size": 4} | options))

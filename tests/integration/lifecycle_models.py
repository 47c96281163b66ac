"""Small models and data for the tests of the callback's life and of queries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

N, FEATURES, CLASSES, BATCH = 10, 3, 2, 4


class Classifier(pl.LightningModule):
    """Two linear layers and the mean cross-entropy."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.learning_rate = learning_rate
        self.layers = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class HandwrittenLoss(Classifier):
    """No function of torch.nn.functional computes its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self(x).softmax(-1).gather(-1, y[:, None]).log().mean()


class Flattening(Classifier):
    """Its layers see [n * 2, i] for n examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(torch.stack([x, -x], 1).flatten(0, 1)), y.repeat_interleave(2))


class TwoLoaders(Classifier):
    """Takes a batch from each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(self(x), y) for x, y in batch)


class WithLBFGS(Classifier):
    """Its optimizer calls the closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Stream(IterableDataset):
    """The examples without indices."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(dataset())


def dataset(n: int = N) -> TensorDataset:
    """Examples x [n, 3] with labels y [n] that depend on x, always the same."""
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] + 0.3 * x[:, 1] > 0).long())


def loader(n: int = N, batch_size: int = BATCH, *, shuffle: bool = True, **options: Any) -> DataLoader:
    """Shuffled batches of `dataset`."""
    return DataLoader(dataset(n), batch_size=batch_size, shuffle=shuffle, **options)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Two epochs on the CPU, and nothing that prints or writes."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))


def fit(folder: Path, model: pl.LightningModule, data: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Train with a fixed order of the data."""
    trainer = make_trainer(folder, *callbacks, **options)
    torch.manual_seed(3)
    trainer.fit(model, data)
    return trainer

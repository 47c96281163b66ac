"""Runs that save checkpoints, and what is in these, read without our own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.attachment import CHECKPOINT_KEY, STATE_KEY
from lightning_influence.errors import WeightsMismatchError
from tests.integration.lifecycle_models import CLASSES, FEATURES, Classifier, fit, loader

EPOCHS = 4


class Validated(Classifier):
    """Logs a score that is best (smallest) after epoch 1."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        self.log("train_score", abs(self.current_epoch - 1.0), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", abs(self.current_epoch - 1.0))

    def val_dataloader(self) -> DataLoader:
        return loader(shuffle=False)


class Normalizing(Classifier):
    """Has a batch norm, for which weight averaging runs one more epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    """Keeps all checkpoints, named by epoch and step."""
    defaults = {"filename": "{epoch}-{step}", "save_top_k": -1}
    return ModelCheckpoint(dirpath=folder / "checkpoints", **(defaults | options))


def train(folder: Path, *callbacks: pl.Callback, model: Classifier | None = None, **options: Any) -> pl.Trainer:
    """Four epochs of three batches; the file is `influence.h5` unless callbacks say otherwise."""
    if not any(isinstance(callback, InfluenceCallback) for callback in callbacks):
        callbacks = InfluenceCallback(folder / "influence.h5"), *callbacks
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True} | options
    return fit(folder, Validated() if model is None else model, loader(), *callbacks, **options)


def checkpoints(folder: Path) -> list[Path]:
    found = sorted((folder / "checkpoints").glob("*.ckpt"))
    assert found
    return found


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def states(path: Path) -> list[dict[str, str]]:
    """Our states in a checkpoint, wherever they are; it must load with `weights_only=True`."""
    loaded = load(path)
    among = [*loaded.get("callbacks", {}).values(), *loaded.get(CHECKPOINT_KEY, [])]
    return [state for state in among if STATE_KEY in state]


def has_weights(path: Path, weights: dict[str, torch.Tensor], key: str = "state_dict") -> bool:
    """Whether a checkpoint holds exactly these, compared value by value."""
    state = load(path).get(key)
    return state is not None and all(torch.equal(state[name], value) for name, value in weights.items())


class TrainedWeights(pl.Callback):
    """The weights after the last batch of all, copied."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not trainer.fit_loop._skip_backward:
            self.weights = {name: value.detach().clone() for name, value in pl_module.named_parameters()}


def mismatch(checkpoint: Path, model: Any = Validated, **options: Any) -> str:
    """What the error of a checkpoint that is not the file's says."""
    with pytest.raises(WeightsMismatchError) as raised:
        InfluenceModule.from_checkpoint(checkpoint, model, **options)
    return str(raised.value)

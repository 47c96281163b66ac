"""Telling examples from positions where both are equally many.

A layer whose inputs are [n, n, i] may have the examples first, or the positions (`batch_first=False`):
the shapes do not say, and the sum over rows is the same. So the same model is asked once about one
example fewer, and must then have one row fewer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_influence.errors import RowIndexError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.step import LossKind
from lightning_influence.training.asking import example_gradients, kept_random_states


def check_examples_come_first(
    trainer: Trainer,
    model: LightningModule,
    layers: Mapping[str, TrackedLayer],
    gradients: Mapping[str, LayerGradient],
    rows: np.ndarray,
    loss: LossKind,
) -> None:
    """Do nothing if all is well, which the shapes alone nearly always show.

    Args:
        trainer: whose training dataloader made the batch.
        model: in training; a copy of it is asked.
        layers: the tracked layers.
        gradients: theirs, for one batch.
        rows: the batch's dataset indices, int64 [n].
        loss: how the loss's scale is known.

    Raises:
        RowIndexError: if a layer has its positions first, or it cannot be told.
    """
    n = len(rows)
    doubtful = [name for name, g in gradients.items() if n > 1 and g.positions > 1 and g.positions % n == 0]
    if not doubtful:
        return
    try:
        with kept_random_states():
            batch = _fetch(trainer, model, rows[:-1])
            clone = copy.deepcopy(model)
            copies = {name: layers[name].of_copy(clone.get_submodule(name)) for name in doubtful}
            with trainer.precision_plugin.forward_context():
                example_gradients(clone, copies, batch, loss=loss, examples=n - 1)
    except Exception as error:  # the user's code runs here, in a way it may not be made for
        raise RowIndexError(
            f"Whether the inputs of {', '.join(map(repr, doubtful))} have the {n} examples of a batch or "
            f"{n} positions in their first dimension cannot be told: asked about {n - 1} examples, the model "
            f"answered {type(error).__name__}: {error} If examples come first, choose another batch size; "
            "if not, leave the layers out with `layers=`."
        ) from error


def _fetch(trainer: Trainer, model: LightningModule, rows: np.ndarray) -> Any:
    """A batch of these examples, prepared as Lightning prepares training batches."""
    loader = trainer.train_dataloader
    assert loader is not None  # the one DataLoader that the rows' indices came from
    batches = DataLoader(loader.dataset, batch_sampler=[rows.tolist()], collate_fn=loader.collate_fn)
    batch = trainer.precision_plugin.convert_input(next(iter(batches)))
    batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch)

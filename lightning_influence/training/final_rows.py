"""Rows at the final weights: after training, one pass over the examples that its last epoch saw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreWriter
from lightning_influence.training import report
from lightning_influence.training.asking import kept_random_states
from lightning_influence.training.example_batches import ExampleBatches
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.staleness import Agreement
from lightning_influence.training.surroundings import learning_rate
from lightning_influence.training.sweep import Sweep, finish_sweep

AVERAGING = tuple(  # WeightAveraging came with lightning 2.6
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)
)


class FinalRows:
    """Remembers which examples training saw, and captures their rows when it is over.

    Args:
        trainer: of the fit.
        model: in training.
        options: what the user asked for.

    Attributes:
        epoch: the last that was started; -1 before the first.

    Raises:
        UnsupportedTrainingError: with several processes, or manual optimization.
    """

    def __init__(self, trainer: Trainer, model: LightningModule, options: CaptureOptions) -> None:
        self._trainer, self._model, self._options = trainer, model, options
        self._seen: list[np.ndarray] = []
        self._is_resumed = self._is_watched = False
        self.epoch = -1
        if trainer.world_size > 1:
            raise UnsupportedTrainingError(
                f'`rows="final"` works in one process, found {trainer.world_size}; pass `rows="online"`, or call '
                "`capture(model, loader, path)` after training."
            )
        if not model.automatic_optimization:
            raise UnsupportedTrainingError(
                f"{type(model).__name__} optimizes in its `training_step`, so that its losses cannot be had "
                'without training; leave out `rows="final"`.'
            )

    def start_epoch(self, *, is_watched: bool) -> None:
        """Rows will be of this epoch's examples or, if it is not watched, of all that the loader can draw."""
        self._seen, self.epoch, self._is_resumed = [], self._trainer.current_epoch, False
        self._is_watched = is_watched

    def resume(self, seen: Tensor | None) -> None:
        """Go on within an epoch of which an earlier run has seen these examples, int64 [n]; None: not known."""
        self._is_resumed = True
        if seen is not None:
            self._seen.append(seen.numpy())

    def see(self, rows: np.ndarray, *, loaders: int) -> None:
        """Training sees these examples.

        Raises:
            UnsupportedTrainingError: if they are from several dataloaders.
        """
        if loaders != 1:
            raise UnsupportedTrainingError(
                f'`rows="final"` needs one training dataloader, found {loaders}; join the datasets with '
                '`torch.utils.data.ConcatDataset`, or pass `rows="online"`.'
            )
        self._seen.append(rows)

    def seen(self) -> Tensor:
        """The examples that training has seen in this epoch, int64 [n]."""
        seen = np.unique(np.concatenate([np.empty(0, np.int64), *self._seen]))
        return torch.from_numpy(seen[seen >= 0])

    def write(self, path: Path, store_id: str, num_examples: int, bases: Mapping[str, Eigenbasis]) -> Agreement:
        """Sweep over the examples of the last epoch and write the file.

        Args:
            path: of the file.
            store_id: its id.
            num_examples: length of the dataset.
            bases: of the last epoch; layers without one cost a second pass.
        """
        began, options, model = time.monotonic(), self._options, self._model
        key = options.index_key
        with kept_random_states():
            batches = ExampleBatches(
                CombinedLoader(self._trainer.train_dataloader).flattened[0],
                model,
                index_fn=options.index_fn if key is None else itemgetter(key),
                num_examples=num_examples,
                wanted=self.seen().numpy() if self._is_watched else None,
            )
            sweep = Sweep(
                model,
                layers=options.layers,
                codec=options.codec,
                loss=options.loss,
                trainer=self._trainer,
                labels=options.label_source,
                error_budget=options.error_budget,
            )
            visited = sweep.begin(batches)
            needed = [name for name, plan in sweep.plans.items() if plan.needs_basis]
            known = {name: bases[name] for name in needed if name in bases}
            if len(known) < len(needed):
                covariances = sweep.covariances(visited, positions=options.covariance_positions)
                known, visited = {n: metric.eigenbasis() for n, metric in covariances.items()}, iter(batches)
            recorder = Recorder(
                StoreWriter(path, num_examples=num_examples, store_id=store_id, segment=self.epoch),
                sweep.plans,
                bases=known,
                bytes_per_example=options.most_bytes,
                error_budget=options.error_budget,
                covariance_positions=options.covariance_positions,
                has_own_labels=options.label_source is not None,
            )
            try:
                step, rate = self._trainer.global_step, learning_rate(self._trainer)
                sweep.rows(visited, recorder, step_index=step, learning_rate=rate)
                facts: dict[str, Any] = {
                    "epoch": self.epoch,
                    "step_start": step,
                    "step_end": step,
                    **options.facts,
                }
                facts |= {"is_resumed": self._is_resumed, "processes": 1, "loss": options.loss}
                agreement, counts = finish_sweep(recorder, sweep, model, facts)
            except BaseException:
                recorder.discard()
                raise
        seconds = time.monotonic() - began
        report.report_file(
            self._trainer, path, epoch=self.epoch, counts=counts, agreement=agreement, seconds=seconds
        )
        if self._is_resumed:
            report.warn_of_resumed_epoch(path, self.epoch, counts)
        return agreement


def warn_of_order(trainer: Trainer, callback: Callback) -> None:
    """Weights that another callback replaces after ours has written its file are not those of the file."""
    everyone = trainer.callbacks  # type: ignore[attr-defined]
    for other in everyone[everyone.index(callback) + 1 :]:
        if isinstance(other, AVERAGING):
            rank_zero_warn(
                f"InfluenceCallback: {type(other).__name__} replaces the weights when training ends, after the "
                "file was written for those before; put InfluenceCallback after it in the trainer's callbacks."
            )

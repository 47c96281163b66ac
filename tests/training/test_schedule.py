"""Which epoch is certain to be the last, under each option of the `Trainer`."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

from lightning_influence.training.schedule import CaptureSchedule, certain_final_epoch
from tests.integration.lifecycle_models import Classifier, Manual, loader, make_trainer

BATCHES = 3  # 10 examples in batches of 4


class Asking(pl.Callback):
    """Asks at the start of training, as the callback does, and ends the run there."""

    answer: int | None = None
    schedule: CaptureSchedule

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.answer = certain_final_epoch(trainer)
        self.schedule = CaptureSchedule(trainer)
        trainer.should_stop = True


def ask(folder: Path, *callbacks: pl.Callback, model: pl.LightningModule | None = None, **options: Any) -> Asking:
    asking = Asking()
    trainer = make_trainer(folder, asking, *callbacks, **options)
    trainer.fit(model or Classifier(), loader())
    return asking


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_the_last_of_all_epochs_is_certain(tmp_path: Path, epochs: int) -> None:
    assert ask(tmp_path, max_epochs=epochs).answer == epochs - 1


def test_without_a_limit_of_epochs_none_is_certain(tmp_path: Path) -> None:
    assert ask(tmp_path, max_epochs=-1).answer is None
    assert ask(tmp_path, max_epochs=-1, max_steps=2).answer is None


@pytest.mark.parametrize(("steps", "expected"), [(2 * BATCHES - 1, None), (2 * BATCHES, 1), (2 * BATCHES + 1, 1)])
def test_a_limit_of_steps_makes_the_last_uncertain_only_if_it_comes_first(
    tmp_path: Path, steps: int, expected: int | None
) -> None:
    assert ask(tmp_path, max_steps=steps).answer == expected


@pytest.mark.parametrize(("steps", "expected"), [(3, None), (4, 1)])
def test_a_limit_of_steps_counts_accumulated_batches_once(
    tmp_path: Path, steps: int, expected: int | None
) -> None:
    # Two batches make a step, and the last batch of an epoch one of its own.
    assert ask(tmp_path, max_steps=steps, accumulate_grad_batches=2).answer == expected


def test_a_limit_of_steps_under_changing_accumulation_is_uncertain(tmp_path: Path) -> None:
    # Steps needed: 2 in epoch 0 (two batches each), then 3 in epoch 1; a limit of 4 ends within it.
    scheduler = GradientAccumulationScheduler({0: 2, 1: 1})
    assert ask(tmp_path, scheduler, max_steps=4).answer is None


@pytest.mark.parametrize("steps", [5, 100])
def test_a_limit_of_steps_under_manual_optimization_is_uncertain(tmp_path: Path, steps: int) -> None:
    assert ask(tmp_path, model=Manual(), max_steps=steps).answer is None


def test_manual_optimization_without_a_limit_of_steps_is_certain(tmp_path: Path) -> None:
    assert ask(tmp_path, model=Manual()).answer == 1


def test_early_stopping_makes_the_last_uncertain(tmp_path: Path) -> None:
    assert ask(tmp_path, EarlyStopping("loss", strict=False)).answer is None


def test_a_time_limit_makes_the_last_uncertain(tmp_path: Path) -> None:
    assert ask(tmp_path, max_time="01:00:00:00").answer is None
    assert ask(tmp_path, Timer("01:00:00:00")).answer is None


def test_weight_averaging_makes_the_last_uncertain(tmp_path: Path) -> None:
    assert ask(tmp_path, StochasticWeightAveraging(swa_lrs=0.1)).answer is None


def test_other_callbacks_leave_it_certain(tmp_path: Path) -> None:
    assert ask(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True).answer == 1
    assert ask(tmp_path, LearningRateMonitor(), logger=pl.loggers.CSVLogger(tmp_path)).answer == 1


@pytest.mark.parametrize(
    "options",
    [
        {"min_epochs": 1},
        {"limit_train_batches": 1},
        {"limit_train_batches": 0.5},
        {"overfit_batches": 1},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_options_that_end_no_run_leave_it_certain(tmp_path: Path, options: dict) -> None:
    assert ask(tmp_path, **options).answer == 1


@pytest.mark.parametrize(("steps", "expected"), [(1, None), (2, 1)])
def test_a_limit_of_steps_counts_the_limited_batches(tmp_path: Path, steps: int, expected: int | None) -> None:
    assert ask(tmp_path, max_steps=steps, limit_train_batches=1).answer == expected


def test_a_fast_development_run_has_one_epoch(tmp_path: Path) -> None:
    assert ask(tmp_path, fast_dev_run=2).answer == 0


def test_a_certain_run_records_its_last_epoch_and_prepares_bases_in_the_one_before(tmp_path: Path) -> None:
    schedule = ask(tmp_path, max_epochs=4).schedule
    assert not schedule.is_rolling
    assert [schedule.records_rows(epoch) for epoch in range(4)] == [False, False, False, True]
    assert [schedule.prepares_bases(epoch) for epoch in range(4)] == [False, False, True, False]


def test_an_uncertain_run_records_every_epoch(tmp_path: Path) -> None:
    schedule = ask(tmp_path, max_epochs=-1, max_steps=9).schedule
    assert schedule.is_rolling
    assert all(schedule.records_rows(epoch) for epoch in range(4))
    assert not any(schedule.prepares_bases(epoch) for epoch in range(4))

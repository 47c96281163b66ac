"""How a run ends, which epochs are kept, runs that go on, checkpoints and averaged weights."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch.utils.data import DataLoader

from lightning_influence import InfluenceModule
from lightning_influence.errors import InfluenceError
from tests.integration.models import vector_data
from tests.matrix import models
from tests.matrix.situation import Expected, Run, Situation, no_file

CUT_SHORT = "ended before its last batch"


def stops_after_two(folder: Path) -> list[Callback]:
    """The loss cannot fall by 100, so training stops after the second epoch."""
    return [EarlyStopping("loss_epoch", min_delta=100.0, patience=1)]


def time_is_up(folder: Path) -> list[Callback]:
    """After the first epoch."""
    return [Timer(timedelta(microseconds=1), interval="epoch", verbose=False)]


def fit_twice(run: Run) -> Trainer:
    """The same trainer goes on for two more epochs."""
    trainer = run.make_trainer()
    trainer.fit(run.model, run.situation.data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(run.model, run.situation.data())
    return trainer


def fit_two_trainers(run: Run) -> Trainer:
    """The model is trained again, into the same file."""
    run.make_trainer().fit(run.model, run.situation.data())
    trainer = run.make_trainer()
    trainer.fit(run.model, run.situation.data())
    return trainer


def saves_every_step(folder: Path) -> list[Callback]:
    """As many checkpoints as steps."""
    return [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)]


def go_on_from(step: int, run: Run) -> Trainer:
    """Train to the end, then again from a checkpoint of the step."""
    run.make_trainer().fit(run.model, run.situation.data())
    trainer = run.make_trainer()
    checkpoint = run.folder / f"step={step}.ckpt"
    trainer.fit(run.model, run.situation.data(), ckpt_path=str(checkpoint), weights_only=True)
    return trainer


def go_on_after_crash(step: int, run: Run) -> Trainer:
    """Training ends with an exception in the final epoch, and goes on from its last checkpoint."""
    first = run.make_trainer()
    first.callbacks.insert(0, Crash(step))  # type: ignore[attr-defined]
    with contextlib.suppress(ZeroDivisionError):
        first.fit(run.model, run.situation.data())
    trainer = run.make_trainer()
    checkpoint = run.folder / f"step={step}.ckpt"
    trainer.fit(run.model, run.situation.data(), ckpt_path=str(checkpoint), weights_only=True)
    return trainer


class Crash(Callback):
    """Raises before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *rest: object) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError("a crash")


def saving(folder: Path, **options: object) -> list[Callback]:
    """Checkpoints that are named by their step."""
    return [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)]  # type: ignore[arg-type]


def saving_best_and_last(folder: Path) -> list[Callback]:
    """The best is the first epoch's. With a monitor, `save_last` could skip the last epoch."""
    best = ModelCheckpoint(folder, filename="best", monitor="age", mode="min", save_on_train_epoch_end=True)
    return [best, ModelCheckpoint(folder, filename="last")]


def fit_validated(run: Run) -> Trainer:
    """With a validation set."""
    trainer = run.make_trainer()
    validation = DataLoader(vector_data(6, seed=9), batch_size=4)
    trainer.fit(run.model, run.situation.data(), validation)
    return trainer


def last_checkpoint_finds_the_file(run: Run) -> str:
    """The checkpoint of the run's last step, which was saved when the file was whole."""
    assert run.trainer is not None
    return found_from(run, run.folder / f"step={run.trainer.global_step}.ckpt")


def saved_afterwards_finds_the_file(run: Run) -> str:
    """A checkpoint that is saved by hand."""
    assert run.trainer is not None
    run.trainer.save_checkpoint(run.folder / "late.ckpt")
    return found_from(run, run.folder / "late.ckpt")


def found_from(run: Run, checkpoint: Path) -> str:
    """What stands between a checkpoint and the run's file."""
    try:
        found = InfluenceModule.from_checkpoint(checkpoint, run.make_module()).store.path
    except (InfluenceError, OSError) as error:
        return f"{checkpoint.name}: {type(error).__name__}: {error}"
    return "" if found == run.path else f"{checkpoint.name} leads to {found}"


def best_is_refused_and_last_finds_the_file(run: Run) -> str:
    """And the refusal names the checkpoint that has the file's weights."""
    refusal = found_from(run, run.folder / "best.ckpt")
    if "WeightsMismatchError" not in refusal or "last.ckpt" not in refusal:
        return f"expected the best checkpoint to be refused with the name of the last: {refusal or 'it was not'}"
    return found_from(run, run.folder / "last.ckpt")


def the_average_is_refused(run: Run) -> str:
    """The module holds the averaged weights, at which no row was captured."""
    try:
        InfluenceModule.attach(run.module, run.path)
    except InfluenceError as error:
        return "" if type(error).__name__ == "WeightsMismatchError" else f"{type(error).__name__}: {error}"
    return "the averaged weights were taken for those of the file"


def averages(folder: Path) -> list[Callback]:
    """The mean over all steps."""
    return [WeightAveraging()]


def averages_exponentially(folder: Path) -> list[Callback]:
    """A moving average."""
    return [EMAWeightAveraging(decay=0.5)]


def averages_late(folder: Path) -> list[Callback]:
    """From the second epoch; a learning rate so small that still weights stay still."""
    return [StochasticWeightAveraging(swa_lrs=1e-30, swa_epoch_start=1, annealing_epochs=1)]


ENDS = [
    Situation("one epoch", Expected("epoch 0"), trainer=partial(dict, max_epochs=1)),
    Situation(
        "max_steps within an epoch",
        Expected("epoch 0", said=f"epoch 1 {CUT_SHORT}"),
        trainer=partial(dict, max_epochs=-1, max_steps=8),
        is_quick=True,
    ),
    Situation(
        "max_steps within the first epoch",
        no_file("was not written"),
        trainer=partial(dict, max_epochs=-1, max_steps=3),
    ),
    Situation("max_time", Expected("epoch 0"), trainer=partial(dict, max_epochs=9), callbacks=time_is_up),
    Situation(
        "EarlyStopping",
        task=models.LoggingTask,
        trainer=partial(dict, max_epochs=9),
        callbacks=stops_after_two,
        is_quick=True,
    ),
    Situation(
        "should_stop within an epoch",
        Expected("none|epoch 0", "-|22/0/0", "was not written|ended before its last batch"),
        task=models.StoppingTask,
        trainer=partial(dict, max_epochs=3),
    ),
    Situation(
        "should_stop before min_epochs",
        Expected("epoch 1"),
        task=models.EarlyStoppingTask,
        trainer=partial(dict, min_epochs=2, max_epochs=9),
    ),
    Situation(
        "limit_train_batches", Expected(rows="8/14/0"), trainer=partial(dict, limit_train_batches=2), is_quick=True
    ),
    Situation("overfit_batches", Expected(rows="8/14/0"), trainer=partial(dict, overfit_batches=2)),
    Situation("fast_dev_run", no_file(), trainer=partial(dict, fast_dev_run=2)),
    Situation("reload_dataloaders", trainer=partial(dict, reload_dataloaders_every_n_epochs=1)),
    Situation("fit twice", Expected("epoch 3"), fit=fit_twice, is_quick=True),
    Situation("two trainers, one file", fit=fit_two_trainers),
    Situation(
        'epochs="every"',
        Expected("epochs 0 1 2"),
        trainer=partial(dict, max_epochs=3),
        influence={"epochs": "every"},
    ),
    Situation("epochs=2", Expected("epochs 1 3"), trainer=partial(dict, max_epochs=4), influence={"epochs": 2}),
    Situation(
        "epochs=[0, 2]",
        Expected("epochs 0 2"),
        trainer=partial(dict, max_epochs=3),
        influence={"epochs": [0, 2], "codec": "eigen"},
    ),
    Situation('rows="final"', influence={"rows": "final"}),
    Situation(
        "resumed between epochs",
        Expected(tolerance=1e-2),  # int8
        callbacks=saves_every_step,
        influence={"codec": "eigen"},
        fit=partial(go_on_from, 6),
    ),
    Situation("resumed within the epoch before", callbacks=saves_every_step, fit=partial(go_on_from, 3)),
    Situation(
        "resumed within the final epoch",
        Expected(file="epoch 1|none", rows=r"(?!22/)\d+/\d+/0|-", said="missing|not written"),
        callbacks=saves_every_step,
        fit=partial(go_on_after_crash, 9),
    ),
    Situation(
        "checkpoint: every_n_train_steps",
        callbacks=saves_every_step,
        check=last_checkpoint_finds_the_file,
    ),
    Situation(
        "checkpoint: val_check_interval=0.5",
        task=models.LoggingTask,
        trainer=partial(dict, val_check_interval=0.5),
        callbacks=partial(saving, monitor="val_loss"),
        fit=fit_validated,
        check=last_checkpoint_finds_the_file,
    ),
    Situation(
        "checkpoint: check_val_every_n_epoch=2",
        task=models.LoggingTask,
        trainer=partial(dict, check_val_every_n_epoch=2),
        callbacks=partial(saving, monitor="val_loss"),
        fit=fit_validated,
        check=last_checkpoint_finds_the_file,
    ),
    Situation(
        "checkpoint: save_weights_only",
        callbacks=partial(saving, save_weights_only=True),
        check=last_checkpoint_finds_the_file,
    ),
    Situation("checkpoint: saved afterwards", check=saved_afterwards_finds_the_file),
    Situation(
        "checkpoint: best is not last",
        task=models.LoggingTask,
        callbacks=saving_best_and_last,
        check=best_is_refused_and_last_finds_the_file,
    ),
    Situation("WeightAveraging", callbacks=averages, check=the_average_is_refused),
    Situation("EMAWeightAveraging", callbacks=averages_exponentially, check=the_average_is_refused),
    Situation(
        "SWA",
        Expected("epoch 2"),
        trainer=partial(dict, max_epochs=3),
        callbacks=averages_late,
        check=the_average_is_refused,
    ),
    Situation(
        "SWA with BatchNorm",
        Expected("epoch 2"),
        net=models.Normalised,
        trainer=partial(dict, max_epochs=3),
        callbacks=averages_late,
        check=the_average_is_refused,
        is_exact=False,
    ),
]

"""How a run ends, which epochs are kept, runs that go on, checkpoints and averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.errors import InfluenceError
from lightning_influence.store import StoreReader
from tests.integration.models import vector_data
from tests.matrix import models
from tests.matrix.measuring import contents
from tests.matrix.situation import FLOAT32, INT8, SPOOLED, Expected, Run, Situation, no_file, shuffled

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


def saves_and_notes(
    steps: int, folder: Path, *, examples: Callable[[], TensorDataset] = vector_data
) -> list[Callback]:
    """A checkpoint after so many steps, again and again, and a diary."""
    return [Diary(folder, examples()), *saving(folder, every_n_train_steps=steps)]


saves_every_step, saves_every_third_step = partial(saves_and_notes, 1), partial(saves_and_notes, 3)
many = partial(vector_data, 640)


def go_on_from(step: int, run: Run) -> Trainer:
    """Train to the end, then again from a checkpoint of the step."""
    run.make_trainer().fit(run.model, run.situation.data())
    trainer = run.make_trainer()
    checkpoint = run.folder / f"step={step}.ckpt"
    trainer.fit(run.model, run.situation.data(), ckpt_path=str(checkpoint), weights_only=True)
    return trainer


def go_on_after_crash(saved: int, crashes: int, run: Run) -> Trainer:
    """Training ends with an exception before a step, and goes on from the last checkpoint before that."""
    first = run.make_trainer()
    first.callbacks.insert(0, Crash(crashes))  # type: ignore[attr-defined]
    with contextlib.suppress(ZeroDivisionError):
        first.fit(run.model, run.situation.data())
    trainer = run.make_trainer()
    checkpoint = run.folder / f"step={saved}.ckpt"
    trainer.fit(run.model, run.situation.data(), ckpt_path=str(checkpoint), weights_only=True)
    return trainer


class Crash(Callback):
    """Raises before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *rest: object) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError("a crash")


class Diary(Callback):
    """Writes down which examples each step has seen; what a resumed run has left behind is struck out."""

    def __init__(self, folder: Path, examples: TensorDataset) -> None:
        self.path, self.inputs = folder / "diary", examples.tensors[0]

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if int(line.split()[0]) < trainer.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seen = [int((self.inputs == row).all(1).nonzero()) for row in batch[0]]
        with self.path.open("a") as file:
            print(trainer.global_step - 1, trainer.current_epoch, *seen, file=file)


def rows_are_those_seen(run: Run, *, is_resumed: bool) -> str:
    """Rows from before and after the checkpoint, each of the step that the diary says."""
    reader = StoreReader(run.path)
    times, steps = [0] * reader.num_examples, [-1] * reader.num_examples
    for line in (run.folder / "diary").read_text().splitlines():
        step, epoch, *seen = map(int, line.split())
        for index in seen if epoch == 1 else ():
            times[index] += 1
            steps[index] = step
    found = [reader.column(name).tolist() for name in ("occurrences", "step")]
    if found != [times, steps]:
        return f"expected occurrences and steps {times}, {steps}, found {found}"
    return "" if reader.attributes["is_resumed"] == is_resumed else f"expected is_resumed={is_resumed}"


def rows_are_of_the_final_weights(run: Run) -> str:
    """Though the weights have moved in every step of the epoch."""
    ratio = contents(StoreReader(run.path), run.situation, run.module.state_dict()).ratio
    return "" if abs(ratio - 1) <= FLOAT32 else f"at the final weights, stored/true is {ratio}"


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
        Expected("epoch 0", r"\d+/\d+/0", said=CUT_SHORT),
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
        no_file(r"epoch 2 was to be captured.*was not written"),
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
        influence={"epochs": "every", "trajectory": "segments"},
    ),
    Situation(
        "epochs=2",
        Expected("epochs 1 3"),
        trainer=partial(dict, max_epochs=4),
        influence={"epochs": 2, "trajectory": "segments"},
    ),
    Situation(
        "epochs=[0, 2]",
        Expected("epochs 0 2", tolerance=INT8, factors=SPOOLED),
        trainer=partial(dict, max_epochs=3),
        influence={"epochs": [0, 2], "trajectory": "segments", "codec": "eigen"},
    ),
    Situation('rows="final"', influence={"rows": "final"}, check=rows_are_of_the_final_weights),
    Situation(
        'rows="final", EarlyStopping',
        task=models.LoggingTask,
        trainer=partial(dict, max_epochs=9),
        callbacks=stops_after_two,
        influence={"rows": "final"},
        check=rows_are_of_the_final_weights,
        is_quick=True,
    ),
    Situation(
        "resumed between epochs",
        Expected(tolerance=INT8, factors=SPOOLED),  # the first run has ended, and left nothing but its file
        callbacks=saves_every_step,
        influence={"codec": "eigen"},
        fit=partial(go_on_from, 6),
        check=partial(rows_are_those_seen, is_resumed=False),
    ),
    Situation("resumed within the epoch before", callbacks=saves_every_step, fit=partial(go_on_from, 3)),
    Situation(
        "resumed between epochs, after a crash",
        Expected(tolerance=INT8),  # with the bases of the run that crashed
        callbacks=saves_every_third_step,
        influence={"codec": "eigen"},
        fit=partial(go_on_after_crash, 6, 8),
        check=partial(rows_are_those_seen, is_resumed=False),
    ),
    Situation(
        "resumed within the final epoch",
        Expected(rows="17/5/0", said="5 of 22 examples are missing"),
        callbacks=saves_every_third_step,
        fit=partial(go_on_after_crash, 9, 11),
        check=partial(rows_are_those_seen, is_resumed=True),
        is_quick=True,
    ),
    Situation(
        "resumed within the final epoch, eigen",
        # The rows before are lost: the first 256 wait until it is known which coordinates are worth keeping.
        Expected(rows="12/10/0", said="10 of 22 examples are missing", tolerance=INT8),
        callbacks=saves_every_third_step,
        influence={"codec": "eigen"},
        fit=partial(go_on_after_crash, 9, 11),
        has_older_basis=True,
    ),
    Situation(
        "resumed within the final epoch, eigen, 640",
        Expected(rows="479/161/0", said="161 of 640 examples are missing", tolerance=INT8),
        data=partial(shuffled, many, batch_size=64),
        examples=many,
        callbacks=partial(saves_and_notes, 5, examples=many),
        influence={"codec": "eigen"},
        fit=partial(go_on_after_crash, 15, 17),
        check=partial(rows_are_those_seen, is_resumed=True),
        has_older_basis=True,
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

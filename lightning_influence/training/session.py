"""One `trainer.fit` with capture: what happens at each of Lightning's hooks, from start to file."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import ALONE, Processes
from lightning_influence.training import report
from lightning_influence.training.bases import BasisPreparation
from lightning_influence.training.batch_capture import BatchCapture, CapturedBatch, Wanted
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.training.final_rows import FinalRows, warn_of_order
from lightning_influence.training.indices import IndexRecorder
from lightning_influence.training.mixing import check_mixing
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.outcome import Outcome
from lightning_influence.training.planning import agree_on_plans
from lightning_influence.training.resume import Resumption, resume_path
from lightning_influence.training.schedule import CaptureSchedule
from lightning_influence.training.surroundings import check_supported, has_exact_average, processes_of

CHECKED_SHARE = 0.1  # of the captured batches after the first, at random: nothing periodic slips through
CHECKED_SHARE_OF_OTHERS = 0.02  # in the epochs that are merged with one that was checked so


class CaptureSession:
    """State and steps of one fit. Whatever it raises ends capture and not training.

    The first batch of the run is always looked at, whatever the epoch: unseen losses, unused layers
    and rows without index come to light in the first second instead of the last epoch.

    Several processes do the same at the same hooks. What they do together they do at the end of batches
    only, and one that has failed takes part until all know.

    Args:
        options: what the user asked for.
        trainer: of the fit.
        model: in training.
        store_id: id of the file to be written; the first process's counts.
    """

    def __init__(self, options: CaptureOptions, trainer: Trainer, model: LightningModule, store_id: str) -> None:
        self.options, self.trainer, self.model, self.store_id = options, trainer, model, store_id
        self.processes: Processes = ALONE
        self._batches = BatchCapture(trainer, model, options, self._wanted)
        self._path = options.path.absolute()  # whatever the working directory becomes
        self._scratch: str | None = None
        self._indices = IndexRecorder(
            options.index_fn, index_key=options.index_key, num_examples=options.num_examples
        )
        self._plans: dict[str, LayerPlan] = {}
        self._bases = BasisPreparation(options)
        self._outcome: Outcome  # from the start of training
        self._final_rows: FinalRows | None = None
        self._schedule: CaptureSchedule | None = None
        self._epoch: int | None = None
        self._records_rows = self._is_for_bases = self._watches_rows = False  # what the epoch is for
        self._capture: EpochCapture | None = None
        self._normalizations: list[str] | None = None
        self._skips_rest = False
        self._is_epoch_whole = False  # whether the epoch has reached its last batch
        self._is_over = False
        self._unchecked: list[CapturedBatch] = []  # overflowed, before the first batch that did not
        self._is_unmixed = False  # whether a captured epoch's batch was looked at for rows of several examples
        self._resumption = Resumption()
        self._failure: Exception | None = None
        self._random = random.Random(0)  # an own generator

    @property
    def path(self) -> Path:
        """Where the file goes; a fast development run leaves none."""
        return Path(self._scratch) / "influence.h5" if self._scratch else self._path

    @property
    def has_started(self) -> bool:
        """Whether training began; a fit that has reached its last epoch before does not."""
        return self._schedule is not None

    @property
    def finished_epoch(self) -> int | None:
        """The last that is in the file; None while there is no file of this run."""
        return self._outcome.finished_epoch if self.has_started else None

    def start(self, callback: Callback) -> None:
        """Before the training dataloader is made, for the trainer's callback whose session this is."""
        check_supported(self.trainer)
        self.processes = processes_of(self.trainer)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._scratch = self.processes.from_first(tempfile.mkdtemp() if self.processes.is_first else None)
        self.store_id = self.processes.from_first(self.store_id)
        if not has_exact_average(self.trainer):
            report.warn_of_no_check()
        self._batches.processes = self.processes
        if self.options.rows == "final":
            self._final_rows = FinalRows(self.trainer, self.model, self.options)
        if self._final_rows is not None or self.options.merges:
            warn_of_order(self.trainer, callback)
        self._indices.install(self.trainer)

    def resume(self, store_id: str) -> None:
        """Go on with the file of the run that the checkpoint is of, before training starts."""
        self.store_id, self._resumption.is_wanted = store_id, True

    def start_training(self) -> None:
        """When the number of batches is known."""
        options = self.options
        self._schedule = CaptureSchedule(self.trainer, options.epochs, options.rows, merges=options.merges)
        is_resumed = self._resumption.is_wanted
        self._outcome = Outcome(options, self.path, self.store_id, self._schedule, self.processes, is_resumed)
        if is_resumed:
            self._resumption.load(self._resume_path, step=self.trainer.global_step, processes=self.processes)
        self._outcome.resume(self._resumption, self.trainer.current_epoch)

    def start_epoch(self) -> None:
        """Decide what this epoch is for."""
        self._begin_epoch()
        self._resumption.start_epoch()
        self._indices.start_epoch()

    def _begin_epoch(self) -> None:
        self._epoch = self.trainer.current_epoch
        if self._schedule is not None:
            self._schedule.start_epoch(self.trainer)
            self._records_rows = self._schedule.records_rows(self._epoch)
            self._is_for_bases = self._schedule.prepares_bases(self._epoch)
            self._watches_rows = self._final_rows is not None and self._schedule.wants(self._epoch)
        if self._final_rows is not None:
            self._final_rows.start_epoch(is_watched=self._watches_rows)
        self._skips_rest = self._is_epoch_whole = False
        self._bases.start_epoch()
        self._batches.start_epoch()

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Note the batch's rows and, if they are wanted, arm the hooks."""
        if self._skips_rest:  # nearly all batches of a run: cost nothing
            return
        if self._epoch is None:  # Lightning does not announce an epoch that it resumes
            self._begin_epoch()
            self._resumption.is_within_epoch = batch_idx > 0
            if self._final_rows is not None and batch_idx > 0:
                self._final_rows.resume(self._resumption.state["seen"] if self._resumption.state else None)
        if batch_idx == 0 and not self._batches.tracking.is_current:
            self._batches.track()
            self._plans, self._bases = {}, BasisPreparation(self.options)
        is_wanted = self._records_rows or self._prepares_bases or not self._plans or self._watches_rows
        if not is_wanted and self._batches.tracking.is_verified:
            self._skips_rest = self._is_epoch_whole = True
            self._batches.disarm()
            self._indices.skip_rest()
            return
        if self._failure is not None:
            return
        found = self._indices.next_batch(batch, batch_idx)
        rows = found.indices
        if self._final_rows is not None:
            self._final_rows.see(rows, loaders=len(found.parts))
            if self._plans and self._batches.tracking.is_verified and not self._prepares_bases:
                return
        if self._records_rows:
            if self._capture is None:
                self._capture = EpochCapture(self._batches, self.options, self.processes)
                if not self._is_unmixed:
                    self._batches.keep(batch, len(rows))
            self._capture.see(batch, rows, batch_idx)
        self._batches.start(batch, rows, found.parts)

    def before_backward(self, loss: Tensor) -> None:
        """Open the hooks; prepare the check against `.grad`."""
        if self._skips_rest or self._failure is not None:
            return
        is_first = self._records_rows and (self._capture is None or self._capture.recorder is None)
        share = CHECKED_SHARE_OF_OTHERS if self._outcome.trajectory.epochs else CHECKED_SHARE
        is_checked = not self._batches.tracking.is_verified or is_first or self._random.random() < share
        self._batches.before_backward(loss, is_checked=is_checked)

    def after_backward(self) -> None:
        """Check the gradients and, if nothing more is added to them, take them before anything changes."""
        if not self._skips_rest and self._failure is None:
            self._batches.after_backward()

    def before_step(self, optimizer: Optimizer) -> None:
        """Note what is applied."""
        self._batches.before_step(optimizer)

    def end_batch(self, outputs: Any) -> None:
        """Take in the batch's gradients, and finish the file after an epoch's last batch."""
        if self._skips_rest:
            return
        is_last, together = self.trainer.is_last_batch, self.processes.together
        with together():
            if self._failure is not None:
                raise self._failure
            batch = self._batches.finish(outputs)
        with together():
            self._batches.tracking.judge(self.processes)
        self._plans = {n: plan for n, plan in self._plans.items() if n in self._batches.tracking.layers}
        is_new, batches = not self._plans, [] if batch is None else [batch]
        if is_new:
            batches = self._unchecked = [*self._unchecked, *batches]
            is_checked = self._batches.tracking.is_verified or is_last
            self._make_plans(batches[-1] if batches and is_checked else None)
            with together():
                if (state := self._resumption.fitting(self._plans)) is not None:
                    self._bases.load(state["bases"], self._plans)
        self._prepare_recorder()
        with together():
            for batch in batches if self._plans else ():
                self._take_in(batch, is_new)
        if is_last and self._capture is not None and not self._capture.has_examples():
            self._drop_capture()  # the batch norm update of weight averaging, say
        if self._capture is not None:
            self._capture.lay_out_if_ready(is_last)
        self._is_epoch_whole = is_last
        if is_last and self._plans:
            self._end_batches()

    def end_epoch(self) -> None:
        """An epoch whose last batch was never reached is written only if there is nothing whole."""
        capture = self._capture
        if capture is not None:
            self._raise_failure()
            kept = None if self._resumption.capture is None else capture.unfinished  # for a run that is resumed
            if self._outcome.is_empty and kept is None and capture.has_examples():
                self._end_batches()
            else:
                waiting = self._outcome.trajectory.epochs
                report.warn_of_partial_epoch(self.path, self._epoch, self.finished_epoch, kept, waiting)
                self._drop_capture()
        self._batches.disarm()
        self._epoch, self._records_rows, self._is_for_bases, self._watches_rows = None, False, False, False

    def end_training(self) -> None:
        """Capture rows that are wanted at the final weights; say so if there is no file, or its rows are old."""
        self._raise_failure()
        if self._final_rows is not None and self._plans:
            self._outcome.write_final_rows(self._final_rows, self._indices.num_examples, self._bases.bases)
        self._outcome.merge(self.trainer, self.model)
        if self.finished_epoch is None:
            wanted = self._schedule.final_epoch if self._schedule is not None else None
            report.warn_of_no_file(self.options.path, wanted)
        if self._is_epoch_whole:
            self._resume_path.unlink(missing_ok=True)
        self._is_over = True
        report.warn_of_losses(self._outcome.agreement, self._plans, self._normalizations, self.options)

    def merge_late(self) -> None:
        """Of a run that ended while it merged, and had nothing left to train when it was resumed."""
        if self.options.merges and not self.has_started and self._resume_path.exists():
            self.start_training()
            self._outcome.merge(self.trainer, self.model)
            self._resume_path.unlink(missing_ok=True)
            self._is_over = True

    def merge_after_exception(self) -> None:
        """Of a run that was interrupted, merge the whole epochs, for the weights at the end of the last one."""
        if self.has_started and not self._is_over and self.processes.is_alone:
            self._outcome.merge(self.trainer, None)

    def fail(self, error: Exception) -> bool:
        """Whether the other processes have still to be told; then this one goes on until they are."""
        if self.has_started:
            self._outcome.give_up(self.trainer)
        self._resumption.capture = None  # nothing that a resumed run should go on with
        if self.processes.is_alone or self.processes.is_over:
            return False
        self._failure = self._failure or error
        self._batches.disarm()
        return True

    def _raise_failure(self) -> None:
        with self.processes.together():
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Leave nothing behind but finished files; may be called at any time and more than once."""
        self._batches.close()
        self._indices.uninstall()
        self._drop_capture()
        if self.has_started:
            self._outcome.trajectory.close(keeps_rows=not self._is_over and self._resume_path.exists())
        self._bases, self._is_over = BasisPreparation(self.options), True
        if self._scratch and self.processes.is_first:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _prepares_bases(self) -> bool:
        return self._is_for_bases and any(plan.needs_basis for plan in self._plans.values())

    def _wanted(self) -> Wanted:
        """Of the batch that is being captured."""
        if self._capture is not None and self._capture.recorder is not None:
            return self._capture.wanted()
        first = Wanted({}, keeps_labels=self._records_rows or self._is_for_bases)
        return self._bases.wanted(self._plans) if self._prepares_bases else first

    def _make_plans(self, batch: CapturedBatch | None) -> None:
        """From the first batch: how layers are stored, the same in all processes."""
        assert self._schedule is not None
        self._plans = agree_on_plans(
            batch,
            self._batches.tracking,
            self.options,
            self.processes,
            num_examples=self._indices.num_examples,
            when=self._schedule.describe(),
        )
        with self.processes.together():
            if self._plans and not self._records_rows:
                self._look_for_mixing(is_captured=False)

    def _prepare_recorder(self) -> None:
        """Before the first batch of a captured epoch is recorded."""
        capture = self._capture
        if capture is None or capture.recorder is not None or not self._plans:
            return
        with self.processes.together():
            if not self._is_unmixed:
                self._look_for_mixing(is_captured=True)
                self._is_unmixed = True
            if self._normalizations is None:  # said once
                self._normalizations = report.normalizations_over_the_batch(self.model)
                report.warn_of_coupling(self._normalizations)
            examples, bases = self._indices.num_examples, self._bases.bases
            capture.recorder = self._outcome.recorder(self._plans, capture, examples, bases)
        if self._resumption.is_within_epoch:
            capture.resume(self._resumption.take_capture(capture.epoch, self.path.parent, self.processes))
            with self.processes.together():
                self._resumption.rename(self._resume_path, capture.unfinished)

    def _take_in(self, batch: CapturedBatch, is_new: bool) -> None:
        """Add a batch to what this epoch is for."""
        self._unchecked = []
        if self._records_rows:
            assert self._capture is not None
            gradients = {name: batch.step.gradients[name] for name in self._plans}
            self._capture.add(replace(batch, step=replace(batch.step, gradients=gradients)))
        elif is_new and self._prepares_bases:
            self._bases.add(batch, self._plans)

    def _look_for_mixing(self, *, is_captured: bool) -> None:
        """Say if rows are made of several examples, by the kept batch."""
        batch, self._batches.first_batch = self._batches.first_batch, None
        layers, n = self._batches.tracking.layers, self._batches.first_size
        check_mixing(self.trainer, self.model, layers, batch, n, is_captured=is_captured)

    def _end_batches(self) -> None:
        """After an epoch's last batch: the file, and bases for the next."""
        capture, processes = self._capture, self.processes
        if capture is not None and capture.recorder is not None:
            tracking, datasets = self._batches.tracking, self._indices.datasets
            self._outcome.end_epoch(capture, tracking, datasets, is_whole=self._is_epoch_whole)
            self._capture, self._resumption.capture = None, None
            with processes.together():
                made = capture.next_bases() if processes.is_first else {}
            self._bases.share(made, processes)
        elif self._prepares_bases:
            self._bases.finish(self._plans, processes)

    def save_state(self) -> None:
        """Keep beside the file what a run needs that is resumed from the checkpoint that is being saved."""
        if self._is_over or self._failure is not None or not self._plans:
            return
        capture = None if self._capture is None else self._capture.state()
        seen = None if self._final_rows is None else self._final_rows.seen()
        trajectory = self._outcome.trajectory.state()
        kept = (capture, seen, trajectory, self._resumption.capture)
        if self._bases.is_empty and all(part is None for part in kept):
            return
        self._resumption.save(
            self._resume_path,
            self._plans,
            {"bases": self._bases.state(), "seen": seen, "trajectory": trajectory},
            capture,
            step=self.trainer.global_step,
            processes=self.processes,
        )

    @property
    def _resume_path(self) -> Path:
        return resume_path(self.path, self.store_id, self.processes)

    def _drop_capture(self) -> None:
        """Leave no unfinished file but one that a resumed run needs."""
        capture, self._capture = self._capture, None
        if capture is not None:
            (capture.discard if self._resumption.capture is None else capture.suspend)()

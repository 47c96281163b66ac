"""One `trainer.fit` with capture: what happens at each of Lightning's hooks, from start to file."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence.errors import StoreError, UnsupportedTrainingError
from lightning_influence.layer_plan import LayerPlan, plan_layers
from lightning_influence.processes import ALONE, Processes
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreReader, StoreWriter
from lightning_influence.training import report
from lightning_influence.training.asking import copied
from lightning_influence.training.bases import BasisPreparation
from lightning_influence.training.batch_capture import BatchCapture, CapturedBatch, Wanted
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.training.final_rows import FinalRows
from lightning_influence.training.indices import IndexRecorder
from lightning_influence.training.mixing import check_mixing
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.resume import load_state, resume_path, save_state
from lightning_influence.training.schedule import CaptureSchedule
from lightning_influence.training.staleness import Agreement
from lightning_influence.training.surroundings import check_supported, processes_of

CHECKED_SHARE = 0.1  # of the captured batches after the first, at random: nothing periodic slips through


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
        self.finished_epoch: int | None = None
        self.processes: Processes = ALONE
        self._path = options.path.absolute()  # whatever the working directory becomes
        self._scratch: str | None = None
        self._indices = IndexRecorder(
            options.index_fn, index_key=options.index_key, num_examples=options.num_examples
        )
        self._plans: dict[str, LayerPlan] = {}
        self._bases = BasisPreparation(options.covariance_positions)
        self._final_rows: FinalRows | None = None
        self._schedule: CaptureSchedule | None = None
        self._epoch: int | None = None
        self._capture: EpochCapture | None = None
        self._agreement = Agreement()
        self._normalizations: list[str] | None = None
        self._skips_rest = False
        self._is_unmixed = False  # whether a captured epoch's batch was looked at for rows of several examples
        self._is_resumed = False  # from a checkpoint of a run with capture
        self._resumed_state: dict[str, Any] | None = None
        self._resumed_step: int | None = None  # where, if within an epoch, until its capture has begun
        self._is_state_kept = False  # whether the unfinished file is for a resumed run
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

    def start(self, callback: Callback) -> None:
        """Before the training dataloader is made.

        Args:
            callback: among the trainer's, whose session this is.
        """
        check_supported(self.trainer)
        self.processes = processes_of(self.trainer)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._scratch = self.processes.from_first(tempfile.mkdtemp() if self.processes.is_first else None)
        self.store_id = self.processes.from_first(self.store_id)
        self._batches = BatchCapture(self.trainer, self.model, self.options, self.processes, self._wanted)
        self._final_rows = (
            FinalRows(self.trainer, self.model, self.options) if self.options.rows == "final" else None
        )
        if self._final_rows is not None:
            self._final_rows.warn_of_order(callback)
        self._indices.install(self.trainer)

    def resume(self, store_id: str) -> None:
        """Go on with the file of the run that the checkpoint is of, before training starts."""
        self.store_id, self._is_resumed = store_id, True

    def start_training(self) -> None:
        """When the number of batches is known."""
        self._schedule = CaptureSchedule(self.trainer, self.options.epochs, self.options.rows)
        if self._is_resumed:
            step = self.trainer.global_step
            with self.processes.together():
                self._resumed_state = load_state(self._resume_path, step=step, processes=self.processes)
            known = self.processes.gather(self._resumed_state is not None)
            if not all(known):  # each has its own part
                self._resumed_state = None

    def start_epoch(self, batch_idx: int = 0) -> None:
        """Decide what this epoch is for.

        Args:
            batch_idx: of its first batch, which is not 0 where training is resumed within it.
        """
        self._epoch = self.trainer.current_epoch
        if self._schedule is not None:
            self._schedule.start_epoch(self.trainer)
        if self._final_rows is not None:
            self._final_rows.start_epoch()
            if batch_idx > 0:
                state = self._resumed_state
                self._final_rows.resume(state["seen"] if state else None)
        self._skips_rest = False
        self._bases.start_epoch()
        self._resumed_step = self.trainer.global_step if batch_idx > 0 else None
        if batch_idx == 0:
            self._indices.start_epoch()

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Note the batch's rows and, if they are wanted, arm the hooks."""
        if self._skips_rest:  # nearly all batches of a run: cost nothing
            return
        if self._epoch is None:  # Lightning announces no epoch that it resumes in its middle
            self.start_epoch(batch_idx)
        if batch_idx == 0 and not self._batches.tracking.is_current:
            self._track()
        if self._plans and self._batches.tracking.is_verified and not self._wants_gradients():
            self._skips_rest = True
            self._batches.disarm()
            self._indices.skip_rest()
            return
        if self._failure is not None:
            return
        rows = self._indices.next_batch(batch, batch_idx).indices
        if self._final_rows is not None:
            self._final_rows.see(rows)
        if self._records_rows():
            if self._capture is None:
                self._capture = EpochCapture(self.trainer, self.model, self.options, self.processes)
                if not self._is_unmixed:
                    self._batches.first_batch = copied(batch)
            self._capture.see(batch, rows, batch_idx)
        self._batches.start(batch, rows)

    def before_backward(self, loss: Tensor) -> None:
        """Open the hooks; prepare the check against `.grad`."""
        if self._skips_rest or self._failure is not None:
            return
        is_first = self._records_rows() and (self._capture is None or self._capture.recorder is None)
        is_checked = not self._batches.tracking.is_verified or is_first or self._random.random() < CHECKED_SHARE
        self._batches.before_backward(loss, is_checked=is_checked)

    def after_backward(self) -> None:
        """Check the gradients and, if nothing more is added to them, take them before anything changes."""
        if not self._skips_rest and self._failure is None:
            self._batches.after_backward()

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
        is_new = not self._plans
        if is_new:
            self._make_plans(batch)
            self._load_bases()
        self._prepare_recorder()
        with together():
            self._take_in(batch, is_new)
        if is_last and self._capture is not None and self._capture.recorder and not self._capture.has_trained():
            self._drop_capture()  # the batch norm update of weight averaging, say
        if self._capture is not None:
            self._capture.lay_out_if_ready(is_last)
        if is_last and self._plans:
            self._end_batches()

    def end_epoch(self) -> None:
        """An epoch whose last batch was never reached leaves no file."""
        if self._capture is not None:
            report.warn_of_partial_epoch(self.path, self._epoch, self.finished_epoch)
            self._is_state_kept = False
            self._drop_capture()
        self._batches.disarm()

    def end_training(self) -> None:
        """Capture rows that are wanted at the final weights; say so if there is no file, or its rows are old."""
        with self.processes.together():
            if self._failure is not None:
                raise self._failure
        if self._final_rows is not None and self._plans:
            assert self._indices.num_examples is not None
            self._agreement = self._final_rows.write(
                self.path, self.store_id, self._indices.num_examples, self._bases.bases
            )
            self.finished_epoch = self._final_rows.epoch
        if self.finished_epoch is None:
            wanted = self._schedule.final_epoch if self._schedule is not None else None
            report.warn_of_no_file(self.options.path, wanted)
        self._resume_path.unlink(missing_ok=True)
        self._epoch = None
        codecs = {plan.codec for plan in self._plans.values()}
        report.warn_of_losses(self._agreement, codecs, self._normalizations or ())

    def fail(self, error: Exception) -> bool:
        """Whether the other processes have still to be told; then this one goes on until they are."""
        self._is_state_kept = False
        if self.processes.is_alone or self.processes.is_over:
            return False
        self._failure = error
        self._batches.disarm()
        return True

    def close(self) -> None:
        """Leave nothing behind but finished files; may be called at any time and more than once."""
        if hasattr(self, "_batches"):
            self._batches.close()
        self._indices.uninstall()
        self._drop_capture()
        self._epoch = None
        if self._scratch and self.processes.is_first:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _track(self) -> None:
        """Start over with the layers that are trainable now."""
        self._batches.track()
        self._plans, self._bases = {}, BasisPreparation(self.options.covariance_positions)

    def _records_rows(self) -> bool:
        return self._epoch is not None and self._schedule is not None and self._schedule.records_rows(self._epoch)

    def _prepares_bases(self) -> bool:
        needs = any(plan.needs_basis for plan in self._plans.values())
        return (
            needs
            and self._epoch is not None
            and self._schedule is not None
            and self._schedule.prepares_bases(self._epoch)
        )

    def _wants_gradients(self) -> bool:
        return self._records_rows() or self._prepares_bases() or not self._plans or self._final_rows is not None

    def _wanted(self) -> Wanted:
        """Of the batch that is being captured."""
        recorder = self._capture.recorder if self._capture is not None else None
        if recorder is not None:
            return Wanted({name: partial(recorder.reduce, name) for name in recorder.reduced_layers})
        return self._bases.wanted(self._plans) if self._prepares_bases() else Wanted({})

    def _make_plans(self, batch: CapturedBatch | None) -> None:
        """From the first batch: how layers are stored, the same in all processes."""
        processes, tracking = self.processes, self._batches.tracking
        with processes.together():
            if self._indices.num_examples is None:
                raise UnsupportedTrainingError(
                    "The training dataset has no length, so its rows have no place; give it a `__len__`, or pass "
                    "`num_examples=`."
                )
            own = plan_layers(tracking.layers, batch.step.gradients, self.options.codec) if batch else None
        known = [plans for plans in processes.gather(own) if plans is not None]
        if not known:
            return
        with processes.together():
            self._plans = _common_plans(known)
            if not processes.is_alone:
                tracking.agree(self._plans)
            if batch is not None:
                report.warn_of_weights(batch.step.scale.factor)
            if not self._records_rows():
                self._look_for_mixing(is_captured=False)
            assert self._schedule is not None
            report.announce(
                self.options.path,
                self._plans,
                tracking.coverage,
                when=self._schedule.describe(),
                bytes_per_example=self.options.bytes_per_example,
                num_examples=self._indices.num_examples,
            )

    def _load_bases(self) -> None:
        """Once it is known how layers are stored: what the resumed run had for their bases."""
        state = self._resumed_state
        if state is None or not self._plans:
            return
        with self.processes.together():
            self._bases.load(state["bases"], self._plans)

    def _prepare_recorder(self) -> None:
        """Before the first batch of a captured epoch is recorded."""
        capture = self._capture
        if capture is None or capture.recorder is not None or not self._plans:
            return
        with self.processes.together():
            if not self._is_unmixed:
                self._look_for_mixing(is_captured=True)
                self._is_unmixed = True
            capture.recorder = self._make_recorder()
        if self._resumed_step is not None:
            state, self._resumed_state = self._resumed_state, None
            kept = state["capture"] if state else None
            if not capture.recorder.writer.partial_path.exists():
                kept = None
            capture.resume(kept, self._resumed_step)
            self._is_state_kept, self._resumed_step = kept is not None, None

    def _take_in(self, batch: CapturedBatch | None, is_new: bool) -> None:
        """Add a batch to what this epoch is for."""
        if not self._plans:
            return
        if self._records_rows():
            assert self._capture is not None
            if batch is not None:
                step = batch.step
                gradients = {name: step.gradients[name] for name in self._plans}
                self._capture.add(replace(batch, step=replace(step, gradients=gradients)))
        elif is_new and batch is not None and self._prepares_bases():
            self._bases.add(batch, self._plans)

    def _look_for_mixing(self, *, is_captured: bool) -> None:
        """Say if rows are made of several examples, by the kept batch."""
        batch, self._batches.first_batch = self._batches.first_batch, None
        tracking, n = self._batches.tracking, self._batches.size
        check_mixing(self.trainer, self.model, tracking.layers, batch, n, is_captured=is_captured)

    def _make_recorder(self) -> Recorder:
        assert self._schedule is not None
        assert self._indices.num_examples is not None
        assert self._epoch is not None
        if self._normalizations is None:  # said once
            self._normalizations = report.normalizations_over_the_batch(self.model)
            report.warn_of_coupling(self._normalizations)
        keeps = self.options.keeps_segments and self._has_own_file()
        return Recorder(
            StoreWriter(
                self.path,
                num_examples=self._indices.num_examples,
                store_id=self.store_id,
                segment=self._epoch,
                after=self.path if keeps else None,
            ),
            self._plans,
            bases=self._bases.bases,
            bytes_per_example=self.options.bytes_per_example,
            keep_covariances=self._schedule.keeps_covariances(self._epoch),
            covariance_positions=self.options.covariance_positions,
            processes=self.processes,
        )

    def _end_batches(self) -> None:
        """After an epoch's last batch: the file, and bases for the next."""
        capture, processes = self._capture, self.processes
        if capture is not None and capture.recorder is not None:
            self._agreement = capture.finish(self.path, self._batches.tracking)
            self.finished_epoch, self._capture, self._is_state_kept = capture.epoch, None, False
            with processes.together():
                made = capture.next_bases() if processes.is_first else {}
            self._bases.share(made, processes)
        elif self._prepares_bases():
            self._bases.finish(self._plans, processes)

    def save_state(self) -> None:
        """Keep beside the file what a run needs that is resumed from the checkpoint that is being saved."""
        is_wanted = self._epoch is not None and (
            self._records_rows() or self._prepares_bases() or self._final_rows is not None
        )
        if not is_wanted or self._failure is not None or not self._plans:
            return
        capture = None if self._capture is None else self._capture.state()
        save_state(
            self._resume_path,
            {
                "bases": self._bases.state(),
                "capture": capture,
                "seen": None if self._final_rows is None else self._final_rows.seen(),
            },
            epoch=self._epoch or 0,
            step=self.trainer.global_step,
            processes=self.processes,
        )
        self._is_state_kept = capture is not None

    @property
    def _resume_path(self) -> Path:
        return resume_path(self.path, self.store_id, self.processes)

    def _has_own_file(self) -> bool:
        """Whether the file at `path` is of this run, or of the one that it resumes."""
        if self.finished_epoch is not None:
            return True
        try:
            return self._is_resumed and StoreReader(self.path).store_id == self.store_id
        except StoreError:
            return False

    def _drop_capture(self) -> None:
        if self._capture is not None:
            if self._is_state_kept:
                self._capture.suspend()
            else:
                self._capture.discard()
            self._capture = None


def _common_plans(plans: Sequence[Mapping[str, LayerPlan]]) -> dict[str, LayerPlan]:
    """The layers that all processes can capture, with room for the longest example that any has seen."""
    first, *others = plans
    return {
        name: replace(plan, positions=max([plan.positions, *(other[name].positions for other in others)]))
        for name, plan in first.items()
        if all(name in other for other in others)
    }

"""What becomes of captured epochs: a file each, a segment each, or rows that wait to be merged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import Processes
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreWriter
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.training.final_rows import FinalRows
from lightning_influence.training.index_layout import DatasetRange
from lightning_influence.training.merging import TrajectoryCapture
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.resume import Resumption, is_file_of
from lightning_influence.training.schedule import CaptureSchedule
from lightning_influence.training.staleness import Agreement
from lightning_influence.training.tracking import LayerTracking

logger = logging.getLogger(__name__)


class Outcome:
    """The file of one fit.

    Args:
        options: what the user asked for.
        path: of the file.
        store_id: its id.
        schedule: which epochs are captured.
        processes: that train together.
        is_resumed: whether this run goes on with one that may have left a file.

    Attributes:
        finished_epoch: the last that is in the file; None while there is no file of this run.
        agreement: how its rows agree with exact ones, in the first process.
        trajectory: the epochs that wait to be merged.
    """

    def __init__(
        self,
        options: CaptureOptions,
        path: Path,
        store_id: str,
        schedule: CaptureSchedule,
        processes: Processes,
        is_resumed: bool,
    ) -> None:
        self.finished_epoch: int | None = None
        self.agreement = Agreement()
        self._has_merged = False  # or has begun to
        self.trajectory = TrajectoryCapture(options, path, store_id, processes, schedule.count())
        self._options, self._path, self._store_id = options, path, store_id
        self._schedule, self._processes, self._is_resumed = schedule, processes, is_resumed

    @property
    def is_empty(self) -> bool:
        """Whether no epoch was captured to its end."""
        return self.finished_epoch is None and not self.trajectory.epochs

    def recorder(
        self,
        plans: Mapping[str, LayerPlan],
        capture: EpochCapture,
        num_examples: int | None,
        bases: Mapping[str, Eigenbasis],
    ) -> Recorder:
        """Of the epoch that begins.

        Args:
            plans: how layers are stored.
            capture: of it.
            num_examples: length of the dataset.
            bases: from the epoch before.
        """
        assert num_examples is not None
        options = self._options
        if options.merges:
            return self.trajectory.recorder(plans, capture, num_examples=num_examples)
        epoch = capture.epoch
        is_left = self._is_resumed and is_file_of(self._path, self._store_id)
        has_file = self.finished_epoch is not None or is_left
        writer = StoreWriter(
            self._path,
            num_examples=num_examples,
            store_id=self._store_id,
            segment=epoch,
            after=self._path if has_file and options.keeps_segments else None,
        )
        return Recorder(
            writer,
            plans,
            bases=bases,
            bytes_per_example=options.most_bytes,
            error_budget=options.error_budget,
            keep_covariances=self._schedule.keeps_covariances(epoch),
            covariance_positions=options.covariance_positions,
            has_own_labels=options.label_source is not None,
            processes=self._processes,
        )

    def end_epoch(
        self, capture: EpochCapture, tracking: LayerTracking, datasets: Sequence[DatasetRange], *, is_whole: bool
    ) -> None:
        """After the last batch of a captured epoch.

        Args:
            capture: of the epoch.
            tracking: of the layers.
            datasets: of which the rows are.
            is_whole: whether it has reached its last batch.
        """
        if self._options.merges:
            self.trajectory.add(capture, tracking, datasets, is_whole=is_whole)
            return
        self.agreement = capture.finish(self._path, tracking, datasets, is_whole=is_whole)
        self.finished_epoch = capture.epoch

    def write_final_rows(
        self, final: FinalRows, num_examples: int | None, bases: Mapping[str, Eigenbasis]
    ) -> None:
        """Sweep over the examples of the last epoch, after training; `bases` of it save a second sweep."""
        assert num_examples is not None
        self.agreement = final.write(self._path, self._store_id, num_examples, bases)
        self.finished_epoch = final.epoch

    def resume(self, resumption: Resumption, epoch: int) -> None:
        """Go on with the epochs that wait to be merged, where training goes on in an epoch."""
        if not self._options.merges or not (epoch or self._is_resumed):
            return
        state = resumption.state
        capture = None if state is None else state["capture"]
        kept = [] if capture is None else [capture["recorder"]["unfinished"]]
        self.trajectory.resume(state, [e for e in range(epoch) if self._schedule.wants(e)], kept)

    def give_up(self, trainer: Trainer) -> None:
        """After a failure of ours, merge the whole epochs, for the weights at the end of the last one."""
        try:
            if self._processes.is_alone and not self._has_merged:  # not again what has just failed
                self.merge(trainer, None)
        except Exception as error:  # the first failure is the one to be told
            logger.debug("whole epochs could not be merged", exc_info=error)
        finally:
            self.trajectory.close(keeps_rows=False)

    def merge(self, trainer: Trainer, model: LightningModule | None) -> None:
        """Merge the epochs that wait for it, if there are any.

        Args:
            trainer: of the fit.
            model: at the weights that the file is for; None: those at the end of the last captured epoch.
        """
        if self.trajectory.epochs:
            self._has_merged = True
            self.finished_epoch, self.agreement = self.trajectory.write(trainer, model)

"""One captured epoch: its recorder, and what the file says of it besides rows and factors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.weights import weights_hash
from lightning_influence.processes import Processes
from lightning_influence.recorder import Recorder
from lightning_influence.step import StepGradients
from lightning_influence.training import report
from lightning_influence.training.batch_capture import BatchCapture, CapturedBatch, Wanted
from lightning_influence.training.fisher_report import LabelCost, fisher_attributes, fisher_document, report_labels
from lightning_influence.training.index_layout import DatasetRange
from lightning_influence.training.indices import NO_ROW
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.penalties import describe_penalties
from lightning_influence.training.staleness import Agreement, StalenessProbe
from lightning_influence.training.surroundings import LayerRates, backpropagated_factor
from lightning_influence.training.tracking import LayerTracking

TRIED_BATCHES = 4  # of the first epoch, that are copied to see whether the model changes what it has computed
TRIED_LATER = 2  # of other epochs


class EpochCapture:
    """Capture of one epoch, from its first batch to its file.

    Args:
        captured: of the fit's batches, at the start of the epoch's first captured one.
        options: what the user asked for.
        processes: that train together; the first one writes what is not rows.

    Attributes:
        recorder: of the rows; None until it is known how layers are stored.
    """

    def __init__(
        self,
        captured: BatchCapture,
        options: CaptureOptions,
        processes: Processes,
    ) -> None:
        self.recorder: Recorder | None = None
        trainer, model, layers = captured.trainer, captured.model, captured.tracking.layers
        self._trainer, self._model, self._options, self._processes = trainer, model, options, processes
        self._batch_capture = captured
        self._time, self._background = captured.time, captured.background
        self._copied = 0  # batches
        self._to_copy = TRIED_LATER if captured.has_copied else TRIED_BATCHES
        captured.has_copied = True
        self._last_copied: StepGradients | None = None
        self._scales: list[Tensor] = []  # of steps, how an example's own loss is to its part in the trained one
        self._backpropagated = 1.0
        self._staleness = StalenessProbe()
        self._rates = LayerRates(trainer, layers, is_wanted=options.merges)
        self._batches = 0
        self._began, self._label_seconds = time.monotonic(), 0.0
        self._is_resumed = False
        self._attributes: dict[str, Any] = {"epoch": trainer.current_epoch, "step_start": trainer.global_step}
        if processes.is_first:
            self._attributes["weights_hash_start"] = weights_hash(model)

    @property
    def epoch(self) -> int:
        """Its number, counted from 0."""
        return self._attributes["epoch"]

    @property
    def unfinished(self) -> Path | None:
        """Where the rows are until there is a file; None before they are anywhere."""
        return None if self.recorder is None else self.recorder.writer.partial_path

    def see(self, batch: Any, rows: np.ndarray, batch_idx: int) -> None:
        """Before `training_step` can change the batch."""
        self._rates.add()
        self._backpropagated = backpropagated_factor(self._trainer, self._model)
        if self._processes.is_first and not self._options.merges and (rows != NO_ROW).all():
            self._staleness.see(batch, rows, batch_idx, self._trainer.num_training_batches)

    def add(self, batch: CapturedBatch) -> None:
        """Record a batch's rows."""
        assert self.recorder is not None
        self._batches += 1
        self._label_seconds += batch.label_seconds
        for gradients in batch.labels:
            self.recorder.add_labels(gradients)
        scale = batch.step.scale.factor.detach() * (self._backpropagated / len(batch.rows))
        self._scales.append(scale if batch.has_one_scale else torch.full_like(scale, math.nan))
        if not self._hands_over:
            self._record(batch)
        else:
            assert self._background is not None
            step = batch.step
            self._background.submit(partial(self._record, batch), nbytes=step.nbytes, check=step.check_lent)
            self._try(step)

    def _try(self, step: StepGradients) -> None:
        """Copy all batches from now on if the last copied one's memory was changed, during a whole step since."""
        last, self._last_copied = self._last_copied, step if self._copies else None
        self._copied += self._copies
        changed = None if last is None or self._batch_capture.changes_memory else last.changed_source()
        if changed is not None:
            self._batch_capture.changes_memory = True
            report.say_what_is_copied(changed)

    @property
    def _copies(self) -> bool:
        """Whether a batch is recorded of a copy."""
        return self._batch_capture.changes_memory or self._copied < self._to_copy

    def _record(self, batch: CapturedBatch) -> None:
        assert self.recorder is not None
        self.recorder.update(
            batch.step.taken(), batch.rows, step_index=batch.step_index, learning_rate=batch.learning_rate
        )

    @property
    def is_in_background(self) -> bool:
        """Whether most batches are recorded by another thread."""
        return self._background is not None

    @property
    def _hands_over(self) -> bool:
        """Whether this batch is: what processes do together they do here."""
        if self._background is None or self.recorder is None:
            return False
        return self._processes.is_alone or not self.recorder.needs_layout

    def wanted(self) -> Wanted:
        """Of the batch that is being captured."""
        assert self.recorder is not None
        return Wanted.of_rows(self.recorder, lends=self._hands_over, copies=self._copies)

    def settle(self) -> None:
        """Wait until all batches are recorded; before anybody looks at the recorder."""
        if self._background is not None:
            self._background.drain()

    def _abandon(self) -> None:
        if self._background is not None:
            self._background.abandon()

    def has_examples(self) -> bool:
        """Whether a batch had a backward in any process; all ask together, after the epoch's last batch."""
        with self._processes.together():
            self.settle()
        return sum(self._processes.total(0 if self.recorder is None else self.recorder.examples)) > 0

    def lay_out_if_ready(self, is_last: bool) -> None:
        """Choose what rows keep, all processes together, once there are examples enough."""
        recorder = self.recorder
        if recorder is None or self._processes.is_alone or not recorder.needs_layout:
            return
        waiting = self._processes.total(*recorder.waiting)
        if is_last or recorder.has_enough(*waiting):
            recorder.lay_out()

    def state(self) -> dict[str, Any] | None:
        """What `resume` needs; None if there are no rows to go on with."""
        self.settle()
        recorded = None if self.recorder is None else self.recorder.state()
        if recorded is None:
            return None
        return {
            "recorder": recorded,
            "attributes": dict(self._attributes),
            "batches": self._batches,
            "rates": self._rates.sums(),
            "step": self._trainer.global_step,
        }

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on in an epoch that an earlier run had begun, with its rows up to its state if there is one."""
        self._is_resumed = True
        if state is not None:
            assert self.recorder is not None
            self._attributes |= state["attributes"]
            self._batches += state["batches"]
            self._rates.resume(state.get("rates"))
            self.recorder.resume(state["recorder"], step=state["step"], device=self._model.device)

    def suspend(self) -> None:
        """Leave the unfinished file for a resumed run."""
        self._abandon()
        if self.recorder is not None:
            self.recorder.suspend()

    def finish(
        self, path: Path, tracking: LayerTracking, datasets: Sequence[DatasetRange], *, is_whole: bool
    ) -> Agreement:
        """Factors, staleness, file, log; how rows agree with the final weights' is known to the first process.

        Args:
            path: of the file.
            tracking: of the layers.
            datasets: of which the rows are, one after the other.
            is_whole: whether the epoch has reached its last batch.
        """
        recorder, trainer, model = self.recorder, self._trainer, self._model
        assert recorder is not None
        began = time.monotonic()
        layers = recorder.factors()
        cost = LabelCost(self._label_seconds, began - self._began)
        agreement, documents = Agreement(), {}
        with self._processes.together():
            if self._processes.is_first:
                counts = recorder.counts()
                agreement = self._staleness.measure(
                    trainer, model, tracking.layers, self._options.loss, recorder, layers
                )
                documents = self.documents(tracking, datasets)
                documents |= fisher_document(self._options.label_source, recorder.labels, cost)
        recorder.finish(layers, attributes=self.attributes(agreement, is_whole=is_whole), documents=documents)
        with self._processes.together():
            if self._processes.is_first:
                report.report_file(
                    trainer,
                    path,
                    epoch=self.epoch,
                    counts=counts,
                    agreement=agreement,
                    seconds=time.monotonic() - began,
                )
                report_labels(self._options.label_source, recorder.labels, cost)
                if self._is_resumed:
                    report.warn_of_resumed_epoch(path, self.epoch, counts)
                elif not is_whole:
                    report.warn_of_part_of_epoch(path, self.epoch, counts)
        return agreement

    def learning_rates(self) -> dict[str, float]:
        """The mean of each recorded layer's in this epoch."""
        assert self.recorder is not None
        means = self._rates.means()
        return {name: means[name] for name in self.recorder.plans}

    def attributes(self, agreement: Agreement | None = None, *, is_whole: bool) -> dict[str, Any]:
        """What the file says of the epoch, after its last batch."""
        final = self._final_attributes(agreement or Agreement()) if self._processes.is_first else {}
        return {**self._attributes, **final, "is_whole": is_whole and not self._is_resumed}

    def documents(self, tracking: LayerTracking, datasets: Sequence[DatasetRange]) -> dict[str, object]:
        """What the file says of the run, after the epoch's last batch."""
        assert self.recorder is not None
        return {
            "coverage": tracking.coverage.to_builtins(),
            "loss": self.recorder.loss,
            "penalties": describe_penalties(self._trainer, tracking.layers, self._time, self._scales),
            "datasets": [dataset._asdict() for dataset in datasets],
            "versions": {"lightning": lightning.__version__, "torch": torch.__version__},
        }

    def next_bases(self) -> Mapping[str, Eigenbasis]:
        """After `finish`: this epoch's bases, for the next."""
        assert self.recorder is not None
        return self.recorder.next_bases()

    def discard(self) -> None:
        """Leave no unfinished file; may be called more than once."""
        self._abandon()
        if self.recorder is not None:
            self.recorder.discard()

    def _final_attributes(self, agreement: Agreement) -> dict[str, Any]:
        planned = self._trainer.num_training_batches
        return {
            "step_end": self._trainer.global_step,
            "weights_hash_end": weights_hash(self._model),
            "batches_captured": self._batches,
            "batches_planned": -1 if math.isinf(planned) else int(planned),
            "rows": self._options.rows,
            **fisher_attributes(
                self._options.label_source, None if self.recorder is None else self.recorder.labels
            ),
            "loss": self._options.loss,
            "is_resumed": self._is_resumed,
            "processes": self._processes.size,
            "staleness_spearman": agreement.staleness,
            "staleness_note": agreement.note,
            "codec_spearman": agreement.codec,
            **self._options.facts,
        }

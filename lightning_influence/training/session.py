"""One `trainer.fit` with capture: what happens at each of Lightning's hooks, from start to file."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.weights import weights_hash
from lightning_influence.gradients import LayerGradient
from lightning_influence.layer_record import CodecName, LayerPlan, plan_layers
from lightning_influence.recorder import Recorder
from lightning_influence.step import LossKind, StepGradients
from lightning_influence.training import report
from lightning_influence.training.asking import copied
from lightning_influence.training.indices import IndexRecorder
from lightning_influence.training.schedule import CaptureSchedule
from lightning_influence.training.staleness import Agreement, StalenessProbe
from lightning_influence.training.surroundings import (
    backpropagated_factor,
    check_supported,
    learning_rate,
)
from lightning_influence.training.tracking import LayerTracking

CHECKED_SHARE = 0.1  # of the captured batches after the first, at random: nothing periodic slips through


@dataclass(frozen=True)
class CaptureOptions:
    """The arguments of `InfluenceCallback`, which documents them."""

    path: Path
    layers: Sequence[str] | None
    codec: CodecName
    bytes_per_example: int
    covariance_positions: int | None
    fisher: str
    loss: LossKind
    index_fn: Callable[[Any], Sequence[int] | Tensor] | None


class CaptureSession:
    """State and steps of one fit. Whatever it raises ends capture and not training.

    The first batch of the run is always looked at, whatever the epoch: unseen losses, unused layers
    and rows without index come to light in the first second instead of the last epoch.

    Args:
        options: what the user asked for.
        trainer: of the fit.
        model: in training.
        store_id: id of the file to be written.
    """

    def __init__(self, options: CaptureOptions, trainer: Trainer, model: LightningModule, store_id: str) -> None:
        self.options, self.trainer, self.model, self.store_id = options, trainer, model, store_id
        self.finished_epoch: int | None = None
        self._path = options.path.absolute()  # whatever the working directory becomes
        self._indices = IndexRecorder(options.index_fn)
        self._plans: dict[str, LayerPlan] = {}
        self._bases: dict[str, Eigenbasis] = {}
        self._track()
        self._scratch = tempfile.mkdtemp() if trainer.fast_dev_run else None  # type: ignore[attr-defined]
        self._schedule: CaptureSchedule | None = None
        self._step: StepGradients | None = None
        self._first_batch: Any = None
        self._covariances: dict[str, KroneckerCovariance] = {}
        self._recorder: Recorder | None = None
        self._epoch: int | None = None
        self._epoch_attributes: dict[str, Any] = {}
        self._batch_rows: np.ndarray | None = None
        self._batch_facts: dict[str, float] = {}
        self._is_armed = False
        self._backwards = 0
        self._staleness = StalenessProbe()
        self._agreement = Agreement()
        self._normalizations: list[str] | None = None
        self._skips_rest = False
        self._random = random.Random(0)  # an own generator

    @property
    def path(self) -> Path:
        """Where the file goes; a fast development run leaves none."""
        return Path(self._scratch) / "influence.h5" if self._scratch else self._path

    @property
    def has_started(self) -> bool:
        """Whether training began; a fit that has reached its last epoch before does not."""
        return self._schedule is not None

    def start(self) -> None:
        """Before the training dataloader is made."""
        check_supported(self.trainer)
        self._indices.install(self.trainer)

    def start_training(self) -> None:
        """When the number of batches is known."""
        self._schedule = CaptureSchedule(self.trainer)

    def start_epoch(self) -> None:
        """Decide what this epoch is for."""
        self._epoch = self.trainer.current_epoch
        self._epoch_attributes = {}
        self._staleness = StalenessProbe()
        self._skips_rest = False
        self._indices.start_epoch()
        self._bases |= {name: metric.eigenbasis() for name, metric in self._covariances.items()}
        self._covariances = {}

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Note the batch's rows and, if they are wanted, arm the hooks."""
        if self._skips_rest:  # nearly all batches of a run: cost nothing
            return
        self.disarm()
        if batch_idx == 0 and not self._tracking.is_current:
            self._track()
        self._backwards = 0
        if self._tracking.is_verified and not self._wants_gradients():
            self._skips_rest = True
            self._indices.skip_rest()
            return
        self._batch_rows = self._indices.next_batch(batch, batch_idx).indices
        if self._records_rows() and not self._epoch_attributes:
            self._epoch_attributes = {
                "epoch": self.trainer.current_epoch,
                "step_start": self.trainer.global_step,
                "weights_hash_start": weights_hash(self.model),
            }
        if self._records_rows():
            self._staleness.see(batch, self._batch_rows, batch_idx, self.trainer.num_training_batches)
        self._batch_facts = {
            "learning_rate": learning_rate(self.trainer),
            "factor": backpropagated_factor(self.trainer, self.model),
            "step": self.trainer.global_step,
        }
        if not self._plans:
            self._first_batch = copied(batch)
        self._step = None
        self._tracking.capture.__enter__()
        self._is_armed = True
        # Gradients that flow before the step's own backward (adversarial examples, say) are not the step's.
        self._tracking.capture.set_open(not self.model.automatic_optimization)

    def before_backward(self, loss: Tensor) -> None:
        """Open the hooks; prepare the check against `.grad`."""
        if self._skips_rest:
            return
        self._backwards += 1
        if self._is_armed and self._backwards == 1:
            self._tracking.capture.set_open(True)
            is_first = self._recorder is None and self._records_rows()
            if not self._tracking.is_verified or is_first or self._random.random() < CHECKED_SHARE:
                self._tracking.start_check()
            self._loss = loss.detach().clone()

    def after_backward(self) -> None:
        """Check the gradients and, if this was the batch's one backward, take them before anything changes."""
        if self._skips_rest or not self._is_armed:
            return
        is_over = self.model.automatic_optimization
        if is_over:
            self.disarm()  # the optimizer is left alone
        with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
            if self._backwards == 1:
                self._tracking.verify(self._loss)
                self._plans = {name: plan for name, plan in self._plans.items() if name in self._tracking.layers}
            if is_over:
                self._step = self._collect()

    def end_batch(self, outputs: Any) -> None:
        """Take in the batch's gradients, and finish the file after an epoch's last batch."""
        if self._skips_rest:
            return
        rows, self._batch_rows = self._batch_rows, None
        if rows is None or not self._batch_facts:
            return
        if self._backwards > 1:
            self._refuse_backwards()
        # Without a backward: a skipped step, or the batch norm update of weight averaging.
        has_manual_loss = bool(outputs) and not self.model.automatic_optimization
        if self._step is None and (
            has_manual_loss or len(self._tracking.capture.unseen) < len(self._tracking.layers)
        ):
            self._batch_rows = rows
            self._step, self._batch_rows = self._collect(), None
        self.disarm()
        facts, self._batch_facts = self._batch_facts, {}
        step, self._step = self._step, None
        if step is not None:
            self._take_in(step, rows, facts)
        self._tracking.capture.clear()
        if self._recorder is not None and self.trainer.is_last_batch:
            self._finish()

    def end_epoch(self) -> None:
        """An epoch whose last batch was never reached leaves no file."""
        self.disarm()
        if self._recorder is not None:
            report.warn_of_partial_epoch(self.path, self._epoch, self.finished_epoch)
            self._drop_recorder()
        self._epoch = None

    def end_training(self) -> None:
        """Say so if there is no file, or its rows are old."""
        if self.finished_epoch is None:
            wanted = self._schedule.final_epoch if self._schedule is not None else None
            report.warn_of_no_file(self.options.path, wanted)
        codecs = {plan.codec for plan in self._plans.values()}
        report.warn_of_losses(self._agreement, codecs, self._normalizations or ())

    def disarm(self) -> None:
        """Remove the hooks; may be called at any time."""
        if self._is_armed:
            self._is_armed = False
            self._tracking.capture.set_open(False)
            self._tracking.capture.__exit__()

    def close(self) -> None:
        """Leave nothing behind but finished files; may be called at any time and more than once."""
        self.disarm()
        self._tracking.capture.clear()
        self._indices.uninstall()
        self._drop_recorder()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _track(self) -> None:
        """Start over with the layers that are trainable now."""
        self._tracking = LayerTracking(self.model, self.options.layers, self.options.loss)
        self._plans, self._bases = {}, {}

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
        return self._records_rows() or self._prepares_bases() or not self._plans

    def _refuse_backwards(self) -> None:
        """Several backwards in a batch, where their sum is not what one optimizer step applies."""
        if self.model.automatic_optimization:
            raise UnsupportedTrainingError(
                f"`training_step` ran {self._backwards} times for one batch, as LBFGS does; capture needs an "
                "optimizer that calls its closure once."
            )
        if len(self.trainer.optimizers) > 1:
            raise UnsupportedTrainingError(
                f"One batch had {self._backwards} backwards for {len(self.trainer.optimizers)} optimizers; which "
                "gradients each of them applied cannot be told. Capture needs one backward or one optimizer."
            )

    def _collect(self) -> StepGradients:
        """The batch's gradients, copied."""
        assert self._batch_rows is not None
        if not self._plans:
            batch, self._first_batch = self._first_batch, None
            self._tracking.settle(self.trainer, batch, len(self._batch_rows))
        factor = self._batch_facts["factor"]
        recorder, capture, n = self._recorder, self._tracking.capture, len(self._batch_rows)
        reduce = {name: partial(recorder.reduce, name) for name in recorder.reduced_layers} if recorder else {}
        names = None
        if self._prepares_bases() and not self._records_rows():
            names = [name for name, plan in self._plans.items() if plan.needs_basis]
            reduce = {name: partial(self._add_to_covariance, name) for name in names}
        return capture.gradients(n, backpropagated_factor=factor, reduce=reduce, names=names)

    def _add_to_covariance(self, name: str, gradient: LayerGradient) -> LayerGradient:
        """Towards the next epoch's basis of a layer; nothing else of the gradients is wanted."""
        plan = self._plans[name]
        if name not in self._covariances:
            positions = self.options.covariance_positions
            self._covariances[name] = KroneckerCovariance(plan.shape, plan.structure, positions=positions)
        self._covariances[name].to(gradient.device).update(gradient.finite())
        return gradient[:0]

    def _take_in(self, step: StepGradients, rows: np.ndarray, facts: dict[str, float]) -> None:
        if not self._plans:
            self._make_plans(step)
            if self._prepares_bases() and not self._records_rows():
                for name in (name for name, plan in self._plans.items() if plan.needs_basis):
                    self._add_to_covariance(name, step.gradients[name])
        if self._records_rows():
            if self._recorder is None:
                self._recorder = self._make_recorder()
            self._recorder.update(step, rows, step_index=int(facts["step"]), learning_rate=facts["learning_rate"])

    def _make_plans(self, step: StepGradients) -> None:
        if self._indices.num_examples is None:
            raise UnsupportedTrainingError(
                "The training dataset has no length, so its rows have no place; give it a `__len__`."
            )
        self._plans = plan_layers(self._tracking.layers, step.gradients, self.options.codec)
        report.warn_of_weights(step.scale.factor)
        assert self._schedule is not None
        report.announce(
            self.options.path,
            self._plans,
            self._tracking.coverage,
            is_rolling=self._schedule.is_rolling,
            bytes_per_example=self.options.bytes_per_example,
            num_examples=self._indices.num_examples,
        )

    def _make_recorder(self) -> Recorder:
        assert self._schedule is not None
        assert self._indices.num_examples is not None
        if self._normalizations is None:  # said once
            self._normalizations = report.normalizations_over_the_batch(self.model)
            report.warn_of_coupling(self._normalizations)
        return Recorder(
            self.path,
            self._plans,
            num_examples=self._indices.num_examples,
            store_id=self.store_id,
            bases=self._bases,
            bytes_per_example=self.options.bytes_per_example,
            keep_covariances=self._schedule.is_rolling,
            covariance_positions=self.options.covariance_positions,
        )

    def _finish(self) -> None:
        """Factors, staleness, file, log."""
        recorder = self._recorder
        assert recorder is not None
        layers, counts = recorder.factors(), recorder.counts()
        agreement = self._staleness.measure(
            self.trainer, self.model, self._tracking.layers, self.options.loss, recorder, layers
        )
        self._agreement, self._staleness = agreement, StalenessProbe()
        recorder.finish(
            layers,
            attributes={
                **self._epoch_attributes,
                "step_end": self.trainer.global_step,
                "weights_hash_end": weights_hash(self.model),
                "fisher": self.options.fisher,
                "loss": self.options.loss,
                "staleness_spearman": agreement.staleness,
                "staleness_note": agreement.note,
                "codec_spearman": agreement.codec,
            },
            documents={
                "coverage": self._tracking.coverage.to_builtins(),
                "loss": recorder.loss,
                "versions": {"lightning": lightning.__version__, "torch": torch.__version__},
            },
        )
        if self._schedule is not None and self._schedule.is_rolling:
            self._bases = recorder.next_bases()
        self.finished_epoch = self._epoch
        self._recorder = None
        report.report_file(self.trainer, self.path, epoch=self._epoch, counts=counts, agreement=agreement)

    def _drop_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.discard()
            self._recorder = None

"""Capture of one training batch after another: hooks on, backwards watched, gradients collected.

With one optimizer, a step applies the sum of a batch's gradients, and that is collected. Several optimizers
each apply the gradients of a backward of their own: every layer's are those of the one backward that
reached it while it was trainable. Gradients that are set to zero before they are applied are nobody's: a
layer that gets such is left out, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.background import Background, usable_threads
from lightning_influence.errors import LayerError, RowIndexError, UnsupportedTrainingError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import UseShape
from lightning_influence.processes import ALONE
from lightning_influence.recorder import Recorder
from lightning_influence.step import StepGradients
from lightning_influence.training import report
from lightning_influence.training.asking import copied
from lightning_influence.training.indices import NO_ROW
from lightning_influence.training.labels import LabelCapture
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.penalties import TrainingTime
from lightning_influence.training.surroundings import (
    backpropagated_factor,
    backward_averages,
    has_exact_average,
    learning_rate,
)
from lightning_influence.training.tracking import LayerTracking

NO_LOSS = torch.zeros((), dtype=torch.float32)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a batch's gradients.

    Args:
        reduce: by layer, what to make of its gradients at once.
        names: of the layers; None takes all.
        labels: what takes gradients under labels of the model's own, a pass at a time; None: they are not wanted,
            or to be kept.
        keeps_labels: whether the batch is to have them.
        lends: whether nothing is computed yet, and gradients may refer to the model's own memory.
        copies: whether they refer to a copy of it all the same.
    """

    reduce: Mapping[str, Callable[[LayerGradient], LayerGradient]]
    names: Collection[str] | None = None
    labels: Callable[[Mapping[str, LayerGradient]], None] | None = None
    keeps_labels: bool = False
    lends: bool = False
    copies: bool = False

    @classmethod
    def of_rows(cls, recorder: Recorder, *, lends: bool, copies: bool) -> Wanted:
        """Of a batch whose rows are recorded."""
        reduce = {name: partial(recorder.reduce, name) for name in recorder.reduced_layers}
        return cls(reduce, labels=recorder.label_sink, lends=lends, copies=copies)


@dataclass(frozen=True)
class CapturedBatch:
    """One batch's gradients and what its rows say besides.

    Args:
        step: the gradients of its n examples.
        rows: their dataset indices, int64 [n].
        step_index: optimizer steps taken before this one.
        learning_rate: of the first parameter group at this step.
        labels: gradients of each pass under labels of the model's own, if they were to be kept.
        label_seconds: that these passes took.
        has_one_scale: whether the gradients of all layers are of losses of the same scale.
    """

    step: StepGradients
    rows: np.ndarray
    step_index: int
    learning_rate: float
    labels: Sequence[Mapping[str, LayerGradient]] = ()
    label_seconds: float = 0.0
    has_one_scale: bool = True


class BatchCapture:
    """Captures training batches.

    Args:
        trainer: of the fit.
        model: in training.
        options: what the user asked for.
        wanted: what is wanted of the batch that was started.

    Attributes:
        processes: that train together.
        tracking: the layers.
        time: that training took, in learning rates.
        first_batch: a copy of the first batch, for whoever wants to ask about it.
        first_size: number of its rows.
        changes_memory: whether the model was seen to change in place what it has computed for an earlier step.
        has_copied: whether an epoch's first batches were copied to see that.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule,
        options: CaptureOptions,
        wanted: Callable[[], Wanted],
    ) -> None:
        self.trainer, self.model = trainer, model
        self._options, self._wanted = options, wanted
        self.processes = ALONE
        self.time = TrainingTime(trainer)
        self.first_batch: Any = None
        self.first_size = 0
        self.changes_memory, self.has_copied = False, False
        self._sizes: Sequence[int] = ()
        self._is_armed = False
        self._rows: np.ndarray | None = None
        self._loss: Tensor
        self._labels = LabelCapture(trainer, model, options)
        self._background: Background | None = None
        self._is_divided = False  # whether it is known who makes rows
        self._forget()
        self.track()

    @property
    def background(self) -> Background | None:
        """What records while training goes on; None where there is no core for it, or nothing to gain."""
        is_wanted = self._options.merges and self._options.background
        if not self._is_divided and is_wanted and self.trainer.strategy.root_device.type == "cpu":
            has_core = usable_threads(self.trainer.world_size) > 1
            self._background = Background() if has_core else None
            report.say_who_makes_rows(has_core)
        self._is_divided = True
        return self._background

    def track(self) -> None:
        """Start over with the layers that are trainable now."""
        self.tracking = LayerTracking(self.model, self._options.layers, self._options.loss)
        self._is_settled = False
        self._parameters = list(self.model.parameters())
        self.start_epoch()

    def start_epoch(self) -> None:
        """Nothing waits for an optimizer's step."""
        self._waiting: set[str] = set()  # layers with gradients that no optimizer has applied

    def keep(self, batch: Any, n: int) -> None:
        """Copy a batch of n rows, before `training_step` can change it."""
        self.first_batch, self.first_size = copied(batch), n

    def start(self, batch: Any, rows: np.ndarray, parts: Sequence[int]) -> None:
        """Arm the hooks, before `training_step`.

        Args:
            batch: as `training_step` gets it.
            rows: dataset indices, int64 [n]; `NO_ROW` where a row is of no example.
            parts: how many of the rows each loader gave.
        """
        self.disarm()
        self._forget()
        self._rows, self._sizes = rows, parts
        self._learning_rate = learning_rate(self.trainer)
        self._factor = backpropagated_factor(self.trainer, self.model)
        self._step_index = self.trainer.global_step
        if not self._is_settled:
            self.keep(batch, len(rows))
        if self._labels.are_drawn:
            wanted = self._wanted()
            self._labels.start(self.tracking.capture, wanted.labels, keeps=wanted.keeps_labels)
        self.tracking.capture.__enter__()
        self._is_armed = True
        # Gradients that flow before the step's own backward (adversarial examples, say) are not the step's.
        self.tracking.capture.set_open(not self.model.automatic_optimization)

    def before_backward(self, loss: Tensor, *, is_checked: bool) -> None:
        """Open the hooks; prepare the check against `.grad`."""
        self._backwards += 1
        if not self._is_armed:
            return
        self._find_lost()
        self._labels.run(loss, self._rows, self._factor, is_settled=self._is_settled, backwards=self._backwards)
        self.tracking.capture.set_open(True)
        is_sum = self._backwards > 1 and not self._has_several_optimizers  # is compared as a whole
        if is_checked and not is_sum and has_exact_average(self.trainer):
            self._is_averaged = backward_averages(self.trainer)
            self.tracking.start_check()
        self._loss = self._loss + loss.detach() if is_sum else loss.detach().clone()

    def after_backward(self) -> None:
        """Look at the gradients and, if nothing more will be added to them, take them before anything changes."""
        if not self._is_armed:
            return
        is_over = self.model.automatic_optimization
        if is_over:
            self.disarm()  # the optimizer is left alone
        else:
            reached = self.tracking.capture.shapes()
            self._waiting |= {name for name in reached if self.tracking.layers[name].has_grad}
        with torch._C.DisableTorchFunction():  # what we do here is not for the loss tap to look at
            self.tracking.look(self._loss, is_averaged=self._is_averaged)
            if is_over or self._has_several_optimizers:
                self._collect()
                self.tracking.stop_check()

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer applies the gradients of its parameters."""
        self.time.add(optimizer)
        if not self._waiting:
            return
        applied = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._waiting = {
            name
            for name in self._waiting & self.tracking.layers.keys()
            if not applied & {id(parameter) for parameter in self.tracking.layers[name].parameters.values()}
        }

    def finish(self, outputs: Any) -> CapturedBatch | None:
        """The batch's gradients; None if it had no backward, as a skipped step has."""
        rows, self._rows = self._rows, None
        if rows is None:
            return None
        if self._backwards > 1 and self.model.automatic_optimization:
            raise UnsupportedTrainingError(
                f"`training_step` ran {self._backwards} times for one batch, as LBFGS does; capture needs an "
                "optimizer that calls its closure once."
            )
        is_reached = len(self.tracking.capture.unseen) < len(self.tracking.layers)
        if is_reached and not self._backwards:
            raise UnsupportedTrainingError(
                f"{type(self.model).__name__} calls `backward` itself, which Lightning does not tell, so that its "
                "gradients cannot be checked; call `self.manual_backward(loss)`."
            )
        # Without a backward: a skipped step, or the batch norm update of weight averaging.
        is_manual = bool(outputs) and not self.model.automatic_optimization
        if not self._parts and (is_manual or is_reached):
            self._rows = rows
            self._collect()
            self._rows = None
        self.disarm()
        self.tracking.stop_check()
        self.tracking.capture.clear()
        if not has_exact_average(self.trainer):  # there is nothing to compare with
            self.tracking.is_verified = True
        if not self._parts:
            return None
        step, kept = self._joined(), rows[rows != NO_ROW]
        factors = [part.scale.factor for part in self._parts]
        has_one_scale = all(torch.equal(factor, factors[0]) for factor in factors[1:])
        self._forget()  # the last batch of an epoch is not kept alive through the next
        if not len(kept):
            return None
        labels, seconds = self._labels.results()
        return CapturedBatch(step, kept, self._step_index, self._learning_rate, labels, seconds, has_one_scale)

    def disarm(self) -> None:
        """Remove the hooks; may be called at any time."""
        if self._is_armed:
            self._is_armed = False
            self.tracking.capture.set_open(False)
            self.tracking.capture.__exit__()

    def close(self) -> None:
        """Remove the hooks and forget everything."""
        self.disarm()
        self._forget()
        self.first_batch = None
        if self._background is not None:
            self._background.close()
            self._background = None
        self.tracking.capture.clear()

    @property
    def _has_several_optimizers(self) -> bool:
        return len(self.trainer.optimizers) > 1 and not self.model.automatic_optimization

    def _forget(self) -> None:
        self._backwards = 0
        self._is_averaged = False
        self._loss = NO_LOSS  # of the backwards that are compared as a whole
        self._parts: list[StepGradients] = []
        self._shapes: dict[str, list[UseShape]] = {}

    def _collect(self) -> None:
        """Copy the gradients of what was back-propagated since the last time."""
        assert self._rows is not None
        capture, n = self.tracking.capture, len(self._rows)
        shapes = capture.shapes()
        if not self._is_settled:
            self._shapes = {**shapes, **self._shapes}
            if not self._has_several_optimizers:
                self._settle()
            else:
                others = {name: uses[0].shape[0] for name, uses in shapes.items() if uses[0].shape[0] != n}
                reasons = {name: f"it saw {rows} rows in a batch of {n} examples" for name, rows in others.items()}
                self.tracking.drop(reasons)
                shapes = {name: uses for name, uses in shapes.items() if name not in others}
        self._labels.take(shapes)
        wanted, kept = self._wanted(), self._rows != NO_ROW
        if self._has_several_optimizers and shapes.keys().isdisjoint(wanted.names or shapes):
            capture.forget_reached()  # a backward of other layers, whose loss is no part of the next one's
            return
        part = capture.since_last(
            n,
            backpropagated_factor=self._factor,
            reduce=wanted.reduce,
            names=wanted.names,
            kept=None if kept.all() else torch.from_numpy(kept),
            foreign=self._grads() if wanted.lends else None,
            copies=wanted.copies,
        )
        self._leave_out([n for n in part.gradients if any(n in other.gradients for other in self._parts)])
        self._parts.append(part)

    def _grads(self) -> list[Tensor]:
        """What optimizers will change."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _find_lost(self) -> None:
        """Layers whose gradients were set to zero before an optimizer applied them."""
        lost = [
            name for name in self._waiting & self.tracking.layers.keys() if not self.tracking.layers[name].has_grad
        ]
        self._waiting -= set(lost)
        self._drop_or_refuse(
            lost,
            "its gradients are set to zero before an optimizer applies them (call "
            "`self.toggle_optimizer(optimizer)` before and `self.untoggle_optimizer(optimizer)` after each "
            "optimizer's part of `training_step`)",
        )

    def _settle(self) -> None:
        try:
            self.tracking.settle(self.trainer, self.first_batch, self._sizes, self._shapes)
        except RowIndexError as error:
            if len(self._sizes) == 1:
                raise
            raise RowIndexError(
                f"{error} The batch has parts from {len(self._sizes)} dataloaders: put them together "
                "(`torch.cat`) before the model, or join the datasets with `torch.utils.data.ConcatDataset`."
            ) from error
        self._is_settled = True

    def _joined(self) -> StepGradients:
        """One step of the parts, of just the layers that are wanted; losses and labels are the first part's."""
        if not self._is_settled:
            self._settle()
        names = self._wanted().names
        gradients = {name: gradient for part in self._parts for name, gradient in part.gradients.items()}
        layers = {n: layer for n, layer in self.tracking.layers.items() if names is None or n in names}
        return replace(self._parts[0], gradients=gradients).with_zeros(layers)

    def _leave_out(self, names: Sequence[str]) -> None:
        """Layers that several backwards reached, for several optimizers."""
        self._drop_or_refuse(
            names,
            "gradients from several backwards of one batch reach it, and which of them the optimizers' steps "
            "applied cannot be told (call `self.toggle_optimizer(optimizer)` before and "
            "`self.untoggle_optimizer(optimizer)` after each optimizer's part of `training_step`)",
        )

    def _drop_or_refuse(self, names: Sequence[str], reason: str) -> None:
        """Leave layers out at first, and refuse them later."""
        if self._is_settled and names:
            raise LayerError(f"Layer {names[0]!r}: {reason}; this was not so in the first batch.")
        self.tracking.drop({name: reason for name in names if name in self.tracking.layers})

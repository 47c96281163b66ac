"""The layers that a fit attributes: found, checked against `.grad`, and left out with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.errors import LayerError, RowIndexError
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layers import TrackedLayer, track_layers
from lightning_influence.processes import ALONE, Processes
from lightning_influence.step import LossKind, StepCapture
from lightning_influence.training import report
from lightning_influence.training.layout import Shapes, ask_copy, find_batch_dims
from lightning_influence.training.surroundings import trainable
from lightning_influence.training.verification import GradientCheck


class LayerTracking:
    """Which layers are captured, and whether their gradients were found to be whole.

    Args:
        model: in training, or swept after it.
        patterns: the `layers` that the user asked for.
        loss: how the loss's scale is known.

    Attributes:
        layers: those that are captured, by name.
        capture: of their gradients.
        coverage: the report on all parameters.
        is_verified: whether a batch's gradients were compared with `.grad`.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] | None, loss: LossKind) -> None:
        self.model = model
        self.layers, self.coverage = track_layers(model, patterns)
        self.capture = StepCapture(self.layers, loss=loss)
        self.is_verified = False
        self._check = GradientCheck(
            self.layers
        )  # of all, also those that are dropped: processes drop by themselves
        self._trainable = trainable(model)

    @property
    def is_current(self) -> bool:
        """Whether the same parameters are trainable as before; finetuning (un)freezes layers."""
        return self._trainable == trainable(self.model)

    def start_check(self) -> None:
        """Just before a backward that is to be checked."""
        self._check.start()

    def stop_check(self) -> None:
        """After a batch's last backward."""
        self._check.stop()

    def look(self, loss: Tensor, *, is_averaged: bool = False) -> None:
        """Just after a backward: see how the captured gradients compare with `.grad`, if that was started.

        Args:
            loss: that was just back-propagated.
            is_averaged: whether `.grad` is the mean over processes now.

        Raises:
            LayerError: if a layer's gradients cannot be had any more, or none is left.
        """
        if not self.is_verified:
            changed = "its input is changed in place before the backward"
            self.drop(dict.fromkeys(self.capture.changed, changed))
        if not self._check.is_started:
            return
        calls, failures = self.capture.raw_calls()
        self._leave_out(failures)
        self._check.look(calls, is_averaged=is_averaged)
        if not self.is_verified and (accounted := self.capture.accounted_for()) is not None:
            rest = float((loss.float().sum() - accounted).abs() / loss.float().sum().abs())
            if rest > 0.01:
                report.warn_of_other_terms(rest)

    def judge(self, processes: Processes = ALONE) -> None:
        """Leave out, at first, and refuse, later, layers whose captured gradients are not their whole.

        Of several processes, all must call this.

        Raises:
            LayerError: if a layer that was whole in the first batch is not any more, or none is left.
        """
        errors = self._check.mismatches(processes)
        if not self.is_verified and processes.total(float(errors is None))[0]:
            errors = None  # in one of them, so that all look again
        if errors is None:  # not looked at, or an overflow: look again at the next batch
            return
        reasons = {
            name: "its weight is also used outside of its forward, or gradients flow through it twice (captured "
            f"gradients differ from .grad by {error:.0%})"
            for name, error in errors.items()
            if name in self.layers
        }
        self._leave_out(reasons)
        self.is_verified = True

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        if self.is_verified and reasons:
            name, reason = next(iter(reasons.items()))
            raise LayerError(f"Layer {name!r}: {reason}; this was not so in the first batch.")
        self.drop(reasons)

    def settle(self, trainer: Trainer, batch: Any, parts: Sequence[int], shapes: Shapes) -> None:
        """`settle_by` asking a copy of the model, in the trainer's precision."""
        assert isinstance(self.model, LightningModule)
        model = self.model
        self.settle_by(lambda fewer: ask_copy(trainer, model, self.layers, fewer), batch, parts, shapes)

    def settle_by(self, ask: Callable[[Any], Shapes], batch: Any, parts: Sequence[int], shapes: Shapes) -> None:
        """After the first batch: drop what it did not use, and find where the examples are.

        Args:
            ask: the shapes that the layers see for another batch.
            batch: as `training_step` got it.
            parts: number of examples that each loader gave.
            shapes: of the output gradients of the layers that its backwards reached.

        Raises:
            RowIndexError: if the rows of no layer are the batch's examples.
        """
        unseen = [name for name in self.layers if name not in shapes]
        self.drop(dict.fromkeys(unseen, "no call of it took part in the first batch's backward"))
        found, reasons = find_batch_dims(self.layers, shapes, batch, parts, ask)
        if not found:
            name = next(iter(reasons))
            raise RowIndexError(
                f"Layer {name!r} saw {shapes[name][0].shape[0]} rows in a batch of {sum(parts)} examples, nor has "
                "another layer one row an example; leave the layer out with `layers=`, or, if a batch holds other "
                "rows than the sampler's indices say, pass `index_fn=`."
            )
        self._keep({**self.layers, **found})
        self.drop(reasons)

    def agree(self, plans: Mapping[str, LayerPlan]) -> None:
        """Go on with the layers that all processes capture, with the batch dimension that the plans say."""
        others = [name for name in self.layers if name not in plans]
        self.drop(dict.fromkeys(others, "another process does not capture it"))
        self._keep({name: replace(self.layers[name], batch_dim=plan.batch_dim) for name, plan in plans.items()})

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Stop tracking layers, and say why in the coverage.

        Raises:
            LayerError: if none is left.
        """
        if not reasons:
            return
        self.coverage = self.coverage.without(self.layers, reasons)
        self._keep({name: layer for name, layer in self.layers.items() if name not in reasons})
        if not self.layers:
            raise LayerError(f"No layer can be attributed:\n{self.coverage}")

    def _keep(self, layers: dict[str, TrackedLayer]) -> None:
        self.layers = layers
        self.capture.keep(layers)

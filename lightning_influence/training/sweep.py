"""One pass or two over the examples at the weights that a model has, in eval mode, without an optimizer step.

Where a layer's codec needs an eigenbasis that is not there yet, the examples are visited twice: once for the
covariances, once for the rows. The rest is as in training: what is stored, which layers are left out, and the
check of the first batch (and of some later ones) against `.grad`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import length_hint
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.errors import (
    CaptureError,
    LayerError,
    QueryError,
    RowIndexError,
    UnsupportedTrainingError,
)
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.fisher import LabelPasses, LabelSource
from lightning_influence.functional.weights import weights_hash
from lightning_influence.gradients import LayerGradient, concatenate
from lightning_influence.layer_plan import CodecName, LayerPlan, plan_layers
from lightning_influence.recorder import RecordedCounts, Recorder
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import LossKind, StepGradients
from lightning_influence.training import report
from lightning_influence.training.asking import (
    Answer,
    Measurement,
    NoLossError,
    Objective,
    back_propagated,
    copy_to_ask,
    shapes_seen,
    summed_objective,
    training_objective,
)
from lightning_influence.training.fisher_report import LabelCost, fisher_attributes, fisher_document, report_labels
from lightning_influence.training.indices import NO_ROW
from lightning_influence.training.staleness import EXAMPLES, Agreement, rank_agreement
from lightning_influence.training.tracking import LayerTracking

Batches = Iterable[tuple[np.ndarray, Any]]
CHECKED_SHARE = 0.1  # of the batches after the first, at random
LOOKED_AT = 8  # batches at most, until one without an overflow could be checked
LOSSES = "`training_loss=`, a function (model, batch) -> [n] with each example's own loss"


class Sweep:
    """Gradients of every example at the weights of now.

    Call `begin`, then `covariances` if a plan needs a basis that is not at hand, then `rows`; all within
    `kept_random_states()`, so that training and the user's own random numbers notice nothing.

    Args:
        model: a `LightningModule`, of which a copy is asked; or any module, itself asked by `training_loss`.
        layers: names or patterns of those to attribute; None takes all.
        codec: how gradients are stored.
        loss: how the scale of what `training_step` returns is known.
        training_loss: `training_loss(model, batch) -> [n]`, each example's own loss; None takes `training_step`.
        trainer: whose precision is used; None for none but the caller's.
        labels: of which covariances and Lambda are, if not of the training set's.
        error_budget: as for `plan_layers`.

    Attributes:
        tracking: the layers that are captured, and the report on all parameters.
        plans: how each layer is stored; empty before `begin`.
        labels: as above.
        label_seconds: that passes under these labels took, since `began`.

    Raises:
        UnsupportedTrainingError: if the model has no `training_step` that only returns a loss.
        CaptureError: if the model cannot be copied.
        LayerError: if no layer can be attributed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str] | None = None,
        codec: CodecName = "auto",
        loss: LossKind = "auto",
        training_loss: Measurement | None = None,
        trainer: Trainer | None = None,
        labels: LabelSource | None = None,
        error_budget: float | None = None,
    ) -> None:
        instead = LOSSES if trainer is None else 'leave out `rows="final"`'
        self._objective = _objective(model, training_loss, instead)
        self._model = model if training_loss is not None else _copy(model, instead)
        self.tracking = LayerTracking(self._model, layers, loss if training_loss is None else "sum")
        if "" in self.tracking.layers:
            raise LayerError(
                "The model is itself a layer, which has no name; wrap it, as in `nn.Sequential(model)`."
            )
        self.plans: dict[str, LayerPlan] = {}
        self.labels, self.label_seconds = labels, 0.0
        self._passes = None if labels is None else LabelPasses(labels, self._model)
        self._codec, self._error_budget = codec, error_budget
        self._precision = nullcontext if trainer is None else trainer.precision_plugin.forward_context
        scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        self.began = time.monotonic()
        self._random = random.Random(0)  # an own generator
        self._visited: int | None = None  # examples that the covariances are of
        self._middle = 0  # number of the batch from which examples are kept for `agreement`
        self._kept: list[tuple[np.ndarray, dict[str, LayerGradient]]] = []

    def begin(self, batches: Batches) -> Iterator[tuple[np.ndarray, Any]]:
        """Learn from a first batch which layers can be attributed, and plan how they are stored.

        Returns:
            The batches of this iteration, from the first.

        Raises:
            CaptureError: one of its children, if there is no batch, or no gradient to be had.
        """
        self._middle = length_hint(batches, 0) // 2
        rest, looked_at, step = iter(batches), [], None
        for indices, batch in rest:
            looked_at.append((indices, batch))
            with suppress(NoLossError):
                step = self._look(indices, batch)
                if self.tracking.is_verified or len(looked_at) >= LOOKED_AT:
                    break
        if step is None:
            raise CaptureError(f"None of {len(looked_at)} batches has a loss; `loader` must give at least one.")
        self.tracking.is_verified = True  # from here on, a layer that is not whole is refused
        self.plans = plan_layers(self.tracking.layers, step.gradients, self._codec, self._error_budget)
        report.warn_of_weights(step.scale.factor)
        return chain(looked_at, rest)

    def covariances(self, batches: Batches, *, positions: int | None) -> dict[str, KroneckerCovariance]:
        """Those that give the bases of the layers that need one.

        Args:
            batches: of all examples.
            positions: how many positions of each example to take; None for all.
        """
        metrics = {
            name: KroneckerCovariance(plan.shape, plan.structure, positions=positions, sync_on_compute=False)
            for name, plan in self.plans.items()
            if plan.needs_basis
        }

        def add(name: str, gradient: LayerGradient) -> LayerGradient:
            metrics[name].to(gradient.device).update(gradient.finite())
            return gradient[:0]

        def add_labels(gradients: Mapping[str, LayerGradient]) -> None:
            for name in metrics.keys() & gradients.keys():
                add(name, gradients[name])

        reduce = {name: partial(add, name) if self.labels is None else _nothing_of for name in metrics}
        self._visited = 0
        for indices, batch in batches:
            self._visited += len(indices)
            with suppress(NoLossError):
                self._ask(indices, batch, names=metrics, reduce=reduce, take_labels=add_labels)
        return metrics

    def rows(
        self, batches: Batches, recorder: Recorder, *, step_index: int = -1, learning_rate: float = math.nan
    ) -> None:
        """Record the gradients of all examples but those whose `training_step` skips them by returning None.

        Args:
            batches: of all examples.
            recorder: with the plans of this sweep, and bases where they need one.
            step_index: optimizer steps taken so far; -1 if that is not known.
            learning_rate: for the rows' column.

        Raises:
            CaptureError: if these are not as many examples as the covariances are of.
        """
        kept = visited = 0
        for number, (indices, batch) in enumerate(batches):
            visited += len(indices)
            keeps = number >= self._middle and kept < EXAMPLES
            layers = () if keeps else recorder.reduced_layers
            try:
                reduce = {name: partial(recorder.reduce, name) for name in layers}
                step = self._ask(indices, batch, reduce=reduce, take_labels=recorder.label_sink)
            except NoLossError:  # skipped, as in training
                continue
            indices = indices[indices != NO_ROW]
            if keeps:
                some = torch.arange(min(EXAMPLES - kept, len(indices)))  # no slice, which would hold all
                self._kept.append((indices[: len(some)], {name: g[some] for name, g in step.gradients.items()}))
                kept += len(some)
            recorder.update(step, indices, step_index=step_index, learning_rate=learning_rate)
        if self._visited is not None and visited != self._visited:
            raise CaptureError(
                f"The loader gave {self._visited} examples at first and {visited} the second time; give it data "
                "that can be iterated again."
            )

    def agreement(self, recorder: Recorder, factors: Mapping[str, ScoredLayer]) -> Agreement:
        """What the codec costs: scores of some rows as stored against scores of their gradients.

        Args:
            recorder: with all rows written.
            factors: made from them.
        """
        if not self._kept:
            return Agreement(note="no example was kept")
        rows = np.concatenate([rows for rows, _ in self._kept])
        chosen = np.flatnonzero(recorder.writer.read_column("valid")[rows])
        some = torch.from_numpy(chosen)
        exact = {name: concatenate([gradients[name] for _, gradients in self._kept])[some] for name in factors}
        return rank_agreement(factors, exact, recorder.stored_rows(rows[chosen].tolist()), self._error_budget)

    def _look(self, indices: np.ndarray, batch: Any) -> StepGradients:
        """A batch's gradients, after leaving out what cannot be attributed."""
        with self._back_propagated(len(indices), batch, is_checked=True) as answer:
            tracking = self.tracking
            tracking.look(answer.total.detach())
            tracking.judge()
            tracking.settle_by(self._shapes_of, batch, [len(indices)], tracking.capture.shapes())
            return tracking.capture.gradients(len(indices), backpropagated_factor=self._scale)

    def _shapes_of(self, batch: Any) -> Any:
        return shapes_seen(self._model, self.tracking.layers, batch, self._objective)

    def _ask(
        self,
        indices: np.ndarray,
        batch: Any,
        *,
        names: Collection[str] | None = None,
        reduce: Mapping[str, Callable[[LayerGradient], LayerGradient]],
        take_labels: Callable[[Mapping[str, LayerGradient]], None] | None = None,
    ) -> StepGradients:
        """The gradients of a batch's wanted examples; those under other labels go to `take_labels`, if wanted."""
        kept, is_checked = torch.from_numpy(indices != NO_ROW), self._random.random() < CHECKED_SHARE
        passes = None if take_labels is None else self._label_passes(kept, take_labels)
        with self._back_propagated(len(indices), batch, is_checked=is_checked, passes=passes) as answer:
            if passes is not None and self._passes is not None:
                self._passes.check_reached(self.tracking.capture.shapes().keys())
            self.tracking.look(answer.total.detach())
            self.tracking.judge()
            step = self.tracking.capture.gradients(
                len(indices),
                backpropagated_factor=self._scale,
                names=names,
                reduce=reduce,
                kept=None if kept.all() else kept,
            )
        if answer.values is None:
            return step
        losses = answer.values.detach().float()
        return replace(step, scale=replace(step.scale, losses=losses[kept.to(losses.device)]))

    def _label_passes(
        self, kept: Tensor, take: Callable[[Mapping[str, LayerGradient]], None]
    ) -> Callable[[Tensor], None] | None:
        """What to do before a batch's backward: passes under other labels, one after the other."""
        passes, capture, n = self._passes, self.tracking.capture, len(kept)
        if passes is None:
            return None

        def hand_over() -> None:
            for gradients in passes.each(capture, n, kept=None if kept.all() else kept):
                take(gradients)

        def run(loss: Tensor) -> None:
            began = time.perf_counter()
            passes.run(capture, loss, n, scale=1.0 if self._scale == 1 else self._scale / n, after_pass=hand_over)
            self.label_seconds += time.perf_counter() - began

        return run

    @contextmanager
    def _back_propagated(
        self, n: int, batch: Any, *, is_checked: bool, passes: Callable[[Tensor], None] | None = None
    ) -> Iterator[Answer]:
        def objective(model: nn.Module, batch: Any) -> Answer:
            if is_checked:
                self.tracking.start_check()
            return self._objective(model, batch)

        capture = self.tracking.capture
        capture.keep_graph(passes is not None)
        try:
            with (
                self._precision(),
                back_propagated(
                    self._model, capture, batch, objective, scale=self._scale, before_backward=passes
                ) as answer,
            ):
                if answer.values is not None and len(answer.values) != n:
                    raise RowIndexError(
                        f"`training_loss` must return one loss an example, [{n}] for this batch, got "
                        f"[{len(answer.values)}]; if a batch holds other rows than indices say, pass `index_fn=`."
                    )
                yield answer
        except NoLossError:
            raise
        except QueryError as error:  # of a model that cannot be asked
            raise CaptureError(str(error)) from error
        finally:
            capture.clear()


def _nothing_of(gradient: LayerGradient) -> LayerGradient:
    return gradient[:0]


def _objective(model: nn.Module, training_loss: Measurement | None, instead: str) -> Objective:
    if training_loss is not None:
        expected = (
            "`training_loss(model, batch)` must return a differentiable tensor of shape [n], one loss an example"
        )
        return partial(summed_objective, training_loss, expected)
    if not isinstance(model, LightningModule) or not model.automatic_optimization:
        why = "optimizes in its `training_step`" if isinstance(model, LightningModule) else "is a plain module"
        raise UnsupportedTrainingError(
            f"{type(model).__name__} {why}, so that its losses cannot be had without training; pass {instead}."
        )
    return partial(training_objective, instead=instead)


def _copy(model: nn.Module, instead: str) -> nn.Module:
    """A copy, because `training_step` may feed metrics, or keep what it has seen."""
    try:
        return copy_to_ask(model, {})[0]
    except Exception as error:  # whatever the user's attributes do when they are copied
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass {instead}."
        ) from error


def finish_sweep(
    recorder: Recorder, sweep: Sweep, model: nn.Module, attributes: Mapping[str, Any]
) -> tuple[Agreement, RecordedCounts]:
    """Factors and file of a sweep.

    Args:
        recorder: with all rows.
        sweep: that made them.
        model: whose weights they are of.
        attributes: of the file, besides what every sweep says.
    """
    factors, counts = recorder.factors(), recorder.counts()
    agreement, digest = sweep.agreement(recorder, factors), weights_hash(model)
    cost = LabelCost(sweep.label_seconds, time.monotonic() - sweep.began, "sweep")
    recorder.finish(
        factors,
        attributes={
            "rows": "final",
            "weights_hash_start": digest,
            "weights_hash_end": digest,
            **fisher_attributes(sweep.labels, recorder.labels),
            "staleness_spearman": agreement.staleness,
            "staleness_note": agreement.note,
            "codec_spearman": agreement.codec,
            **attributes,
        },
        documents={
            "coverage": sweep.tracking.coverage.to_builtins(),
            "loss": recorder.loss,
            "versions": {"lightning": lightning.__version__, "torch": torch.__version__},
            **fisher_document(sweep.labels, recorder.labels, cost),
        },
    )
    report_labels(sweep.labels, recorder.labels, cost)
    return agreement, counts

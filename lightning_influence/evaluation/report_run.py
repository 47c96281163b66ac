"""`verify`: asks all questions of a report that time and data allow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.curvature import AnyDamping
from lightning_influence.errors import InfluenceError
from lightning_influence.evaluation.report import Check, VerificationReport
from lightning_influence.evaluation.report_file import (
    Drawn,
    coverage_check,
    damping_check,
    halves_check,
    staleness_check,
    storage_check,
)
from lightning_influence.evaluation.report_pbrf import Pairs, pbrf_check
from lightning_influence.evaluation.report_reference import (
    QUERIES,
    GaussNewtonReference,
    Sample,
    Subject,
    gauss_newton_check,
    load_sample,
    rows_check,
)
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.query import InfluenceQuery
from lightning_influence.step import LossKind
from lightning_influence.training.asking import example_gradients, kept_random_states, without_other_processes

NEEDS_DATA = ("rows", "gauss-newton", "pbrf")
HALVES_SHARE, GAUSS_NEWTON_SHARE, LEAST_PBRF_SHARE = 0.1, 0.5, 0.2  # of the time


class Verification:
    """One report in the making.

    Args:
        engine: of the file.
        model: at the file's weights.
        layers: the tracked ones.
        loss_kind: how the loss's scale is known, as in the file.
        damping: that scores are asked with.
        minutes: that it may take.
        seed: of what is drawn.

    Raises:
        ValueError: if `minutes` is not positive.
    """

    def __init__(
        self,
        engine: InfluenceQuery,
        model: nn.Module,
        layers: Mapping[str, TrackedLayer],
        *,
        loss_kind: LossKind,
        damping: AnyDamping,
        minutes: float,
        seed: int,
    ) -> None:
        if not 0 < minutes < math.inf:
            raise ValueError(f"`minutes` must be positive and finite, got {minutes}.")
        self.engine, self.model, self.layers = engine, model, layers
        self.loss_kind, self.damping, self.minutes, self.seed = loss_kind, damping, minutes, seed
        self._began = time.monotonic()
        self._checks: list[Check] = []

    def report(
        self, *, loader: Iterable[Any] | None, query_batch: Any, move: Callable[[Any], Any], pairs: Pairs | None
    ) -> VerificationReport:
        """Ask everything.

        Args:
            loader: of the training set; None leaves out what needs it.
            query_batch: as `training_step` takes it; None takes training examples.
            move: brings it to the model's device.
            pairs: the model as a function of inputs, and its loss; None leaves out what needs it.
        """
        engine, drawn = self.engine, Drawn.of(self.engine.store, None, self.seed)
        with kept_random_states(), without_other_processes():
            for name, check in (("coverage", coverage_check), ("staleness", staleness_check)):
                self._ask(name, check, engine.store)
            self._ask("storage", storage_check, engine.store)
            self._ask("damping", damping_check, engine, drawn, self.damping)
            seconds = HALVES_SHARE * 60 * self.minutes
            self._ask("halves", halves_check, engine, drawn, self.damping, seed=self.seed, seconds=seconds)
            if loader is None:
                self._leave_out("`train_loader` was not passed; pass a loader of the training set.")
            else:
                self._ask_with_data(loader, query_batch, move, pairs)
        facts = engine.store.attributes
        return VerificationReport(
            file=str(engine.store.path),
            model=type(self.model).__name__,
            num_examples=int(facts["num_examples"]),
            damping=str(self.damping),
            checks=tuple(self._checks),
            seconds=time.monotonic() - self._began,
            minutes=float(self.minutes),
        )

    def _ask_with_data(
        self, loader: Iterable[Any], query_batch: Any, move: Callable[[Any], Any], pairs: Pairs | None
    ) -> None:
        try:
            model = _with_step(self.model, pairs)
            sample = load_sample(self.engine, model, loader, self.seed)
            if query_batch is None:
                sample, query_batch = _parted(sample)
            else:
                query_batch = move(query_batch)
            subject = self._subject(model, query_batch)
        except Exception as error:  # the user's code runs here, in a way it may not be made for
            self._leave_out(_reason(error))
            return
        self._ask("rows", rows_check, subject, sample)
        try:
            seconds = min(GAUSS_NEWTON_SHARE * 60 * self.minutes, self._seconds_left)
            reference = GaussNewtonReference(subject, sample, seconds=seconds, seed=self.seed)
        except Exception as error:
            self._leave_out(_reason(error), *NEEDS_DATA[1:])
            return
        self._ask("gauss-newton", gauss_newton_check, subject, reference)
        if pairs is None:
            self._leave_out(
                "pass `loss=`, of (outputs, targets) and one number an example, and `net=` if it is not the model "
                "that is called with the inputs.",
                "pbrf",
            )
            return
        seconds = max(self._seconds_left, LEAST_PBRF_SHARE * 60 * self.minutes)  # plans may be off
        self._ask("pbrf", pbrf_check, subject, pairs, query_batch, sample, reference, seconds=seconds)

    def _subject(self, model: nn.Module, query_batch: Any) -> Subject:
        asked = example_gradients(model, self.layers, query_batch, loss=self.loss_kind).gradients
        queries: dict[str, LayerGradient] = {name: gradient[:QUERIES] for name, gradient in asked.items()}
        scores: Tensor = self.engine.scores(queries, damping=self.damping)
        return Subject(self.engine, model, self.layers, self.damping, queries, scores, self.loss_kind)

    @property
    def _seconds_left(self) -> float:
        return max(0.0, 60 * self.minutes - (time.monotonic() - self._began))

    def _ask(self, name: str, check: Callable[..., Check], *args: Any, **kwargs: Any) -> None:
        try:
            self._checks.append(check(*args, **kwargs))
        except Exception as error:  # one question less; the user's code runs in some of them
            self._checks.append(Check(name, check.__doc__ or "", left_out=_reason(error)))

    def _leave_out(self, why: str, *names: str) -> None:
        self._checks += [Check(name, "", left_out=why) for name in names or NEEDS_DATA]


class _PairsStep(LightningModule):
    """A plain module with a `training_step`, for batches that are pairs (inputs, targets)."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.net, self._loss = pairs.net, pairs.loss

    def training_step(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return self._loss(self.net(inputs), targets).sum()


def _with_step(model: nn.Module, pairs: Pairs | None) -> nn.Module:
    return model if pairs is None or isinstance(model, LightningModule) else _PairsStep(pairs)


def _parted(sample: Sample) -> tuple[Sample, Any]:
    """The last batch as queries, the others to be ranked."""
    if len(sample.batches) < 2:
        raise InfluenceError("`query_batch` was not passed, and the training set is one batch; pass queries.")
    return Sample(sample.indices[:-1], sample.batches[:-1]), sample.batches[-1]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]

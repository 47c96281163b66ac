"""Passes under labels of the model's own, in training: when they run, and who takes their gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.fisher import LabelPasses, LabelSource, check_graph
from lightning_influence.gradients import LayerGradient
from lightning_influence.step import StepCapture
from lightning_influence.training.indices import NO_ROW
from lightning_influence.training.options import CaptureOptions

Take = Callable[[Mapping[str, LayerGradient]], None]


class LabelCapture:
    """Runs the passes of training batches; does nothing with the training labels' Fisher.

    Args:
        trainer: of the fit.
        model: in training.
        options: what the user asked for.

    """

    def __init__(self, trainer: Trainer, model: LightningModule, options: CaptureOptions) -> None:
        self._seconds = 0.0
        self._trainer, self._model, self._source = trainer, model, options.label_source
        self._passes: LabelPasses | None = None
        self._kept: list[Mapping[str, LayerGradient]] = []
        self._capture: StepCapture
        self._take: Take | None = None
        self._rows: np.ndarray

    @property
    def are_drawn(self) -> bool:
        """Whether there are any labels but the training set's."""
        return self._source is not None

    def start(self, capture: StepCapture, take: Take | None, *, keeps: bool) -> None:
        """Before the batch's forward.

        Args:
            capture: that will be entered.
            take: what takes the gradients.
            keeps: whether they are kept for `results`, if nothing takes them.
        """
        self._seconds, self._capture, self._kept = 0.0, capture, []
        self._take = take or (self._keep if keeps else None)
        capture.keep_graph(self._take is not None)

    def run(
        self, loss: torch.Tensor, rows: np.ndarray | None, factor: float, *, is_settled: bool, backwards: int
    ) -> None:
        """Before the batch's own backward.

        Args:
            loss: that will be back-propagated.
            rows: dataset indices, int64 [n].
            factor: what Lightning has multiplied the loss with.
            is_settled: whether it is known which dimension of each layer counts examples; else `take` comes later.
            backwards: how many the batch has had, this one included.
        """
        if self._take is None or self._source is None or rows is None:
            return
        began = time.perf_counter()
        if self._passes is None:
            check_graph(loss, self._capture.hooks.edges, kind=self._source.kind)
            self._passes = LabelPasses(self._source, self._model, seed=self._trainer.global_rank)
        self._check(self._source, backwards)
        self._rows = rows
        has_scale = getattr(self._trainer.precision_plugin, "scaler", None) is not None
        self._passes.run(
            self._capture,
            loss,
            len(rows),
            scale=factor / len(rows) if has_scale else 1.0,
            after_pass=self._hand_over if is_settled else None,
        )
        self._seconds += time.perf_counter() - began

    def take(self, reached: Collection[str]) -> None:
        """After the batch's own backward, once it is known which dimension of each layer counts examples.

        Args:
            reached: layers that the backward reached.
        """
        if self._take is None or self._passes is None:
            return
        began = time.perf_counter()
        self._hand_over()
        self._passes.check_reached([name for name in reached if name in self._capture.layers])
        self._seconds += time.perf_counter() - began

    def results(self) -> tuple[list[Mapping[str, LayerGradient]], float]:
        """What was kept of the batch, and the seconds that its passes took."""
        kept, self._kept = self._kept, []
        return kept, self._seconds

    def _keep(self, gradients: Mapping[str, LayerGradient]) -> None:
        """A copy: the model may use its activations' memory again."""
        self._kept.append(
            {name: gradient.rescaled(torch.ones((), dtype=torch.float32)) for name, gradient in gradients.items()}
        )

    def _hand_over(self) -> None:
        assert self._passes is not None
        assert self._take is not None
        kept = self._rows != NO_ROW
        mask = None if kept.all() else torch.from_numpy(kept)
        for gradients in self._passes.each(self._capture, len(self._rows), kept=mask):
            self._take(gradients)

    def _check(self, source: LabelSource, backwards: int) -> None:
        strategy_model = self._trainer.strategy.model
        problem = ""
        if backwards > 1:
            problem = "several backwards in one batch"
        elif isinstance(strategy_model, DistributedDataParallel) and strategy_model.static_graph:
            problem = "DDP with `static_graph=True`"
        if problem:
            raise UnsupportedTrainingError(
                f'`fisher="{source.kind}"` does not go with {problem}; pass `fisher="empirical"`.'
            )

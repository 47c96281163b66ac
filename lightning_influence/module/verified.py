"""A model and its file, and questions that take other examples than the file's: how far can it be trusted?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from lightning_influence.curvature import AnyDamping, Curvature
from lightning_influence.evaluation.handed_in import precondition, scores_of_gradients
from lightning_influence.evaluation.report import VerificationReport
from lightning_influence.evaluation.report_pbrf import Pairs
from lightning_influence.evaluation.report_run import Verification
from lightning_influence.module.hosted import HostedModel
from lightning_influence.module.perturbation import input_derivatives
from lightning_influence.query import DEFAULT_DAMPING
from lightning_influence.solvers.objective import Loss
from lightning_influence.step import LossKind
from lightning_influence.training.asking import Measurement


class VerifiedModel(HostedModel):
    """Answers about examples that are handed in, and checks the file's answers by them."""

    def scores_of(
        self,
        batch: Any,
        examples: Any,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
    ) -> Tensor:
        """Scores of training examples that are handed in, at the model's weights: what adding them would do.

        For examples that the file has no row of: with another label, another image, from another source. Plus
        the score over the number of training examples estimates what adding the example does to the measurement.

        Args:
            batch: q queries.
            examples: m examples, as `training_step` takes a batch.
            damping: as in `scores`.
            curvature: as in `scores`; that which is made of the rows is refused.
            measurement: of the queries, as in `scores`.

        Returns:
            Shape [q, m], on the CPU.
        """
        queries = self._gradients(self._transferred(batch), measurement)
        new = self._gradients(self._transferred(examples), None)
        return scores_of_gradients(self._engine(), queries, new, damping=damping, curvature=curvature)

    def perturbation(
        self,
        batch: Any,
        examples: Any,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
        training_loss: Measurement | None = None,
        inputs: int | str = 0,
    ) -> Tensor:
        """Derivative of each query's score of each training example by that example's own features.

        If example x becomes x + d, and the model is trained again, the measurement changes by about
        <derivative, d> / N. Of the covered layers, at the model's weights; the file's rows are not read.

        Args:
            batch: q queries.
            examples: n training examples, as `training_step` takes a batch.
            damping: as in `scores`.
            curvature: as in `scores`, but for "empirical_fisher".
            measurement: as in `scores`.
            training_loss: `training_loss(model, batch) -> [n]`, for a model without a `training_step`.
            inputs: index or key of the features in `examples`.

        Returns:
            Shape [q, n, *features].

        Raises:
            QueryError: if the features are integers, such as tokens, or the model does not depend on them.
        """
        gradients = self._gradients(self._transferred(batch), measurement)
        return input_derivatives(
            self.model,
            self._tracked,
            precondition(self._engine(), gradients, damping=damping, curvature=curvature),
            self._transferred(examples),
            loss=cast(LossKind, self.store.attributes.get("loss", "auto")),
            training_loss=training_loss,
            inputs=inputs,
        )

    def verify(
        self,
        train_loader: Iterable[Any] | None = None,
        query_batch: Any = None,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        loss: Loss | None = None,
        net: nn.Module | None = None,
        minutes: float = 5.0,
        seed: int = 0,
    ) -> VerificationReport:
        """How far scores can be trusted, on this model and file; `print` the report, or take its `to_json()`.

        From the file: how much of the model is covered, how rows aged, what storing loses, whether the damping
        matters, how much of the order is chance. With data also: whether rows still say what gradients say,
        agreement with conjugate gradients on the Gauss-Newton matrix, and with the proximal Bregman response.
        What cannot be asked is left out, and why is said.

        Args:
            train_loader: of the training set, shuffled or not; batches as `training_step` takes them.
            query_batch: queries, of which the first 8 are asked; None takes training examples.
            damping: that you ask with.
            loss: `loss(outputs, targets) -> [n]`, each example's own, of torch's loss functions, where batches are
                pairs (inputs, targets). All but the last question work without, if the model has a
                `training_step`.
            net: called with the inputs for the outputs; None for the model itself.
            minutes: that it may take, roughly: examples are left out to keep it.
            seed: of what is drawn.
        """
        made = Verification(
            self._engine(),
            self.model,
            self._tracked,
            loss_kind=cast(LossKind, self.store.attributes.get("loss", "auto")),
            damping=damping,
            minutes=minutes,
            seed=seed,
        )
        pairs = None if loss is None else Pairs(net or self.model, loss)
        return made.report(loader=train_loader, query_batch=query_batch, move=self._transferred, pairs=pairs)

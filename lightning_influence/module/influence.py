"""`InfluenceModule`: asks a file of captured gradients, with the model that they belong to."""

from __future__ import annotations

import inspect
import os
import pickle
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.attachment import find_store, matching_segment
from lightning_influence.curvature import AnyDamping, Curvature
from lightning_influence.damping_advice import DampingAdvice
from lightning_influence.errors import CorruptStoreError, QueryError
from lightning_influence.fisher import describe_fisher
from lightning_influence.layers import Coverage
from lightning_influence.module.perturbation import input_derivatives, preconditioned_queries
from lightning_influence.module.verified import VerifiedModel
from lightning_influence.query import DEFAULT_DAMPING, Attribution, described_layers
from lightning_influence.segments import Segments
from lightning_influence.step import LossKind
from lightning_influence.store import StoreReader
from lightning_influence.training.asking import Measurement


class InfluenceModule(VerifiedModel):
    """Answers which training examples made the model say what it says, from its file alone.

    A score is positive where up-weighting the training example raises the query's measurement (a
    helpful example, a proponent), and negative where it lowers it. Minus the score over the number
    of training examples estimates what removing the example does to the measurement, in its units
    (nats for a log-likelihood). The default measurement is minus the query's loss, found in the
    model's own `training_step`, run in eval mode and without a trainer.

    Use `from_checkpoint` or `attach`. As a `LightningModule` it works with `trainer.predict`, whose
    batches must be as `training_step` takes them; set `query_options` to pass arguments to `top_k`.

    Args:
        model: the trained model.
        store: its file.
    """

    @classmethod
    def attach(cls, model: nn.Module, store: str | os.PathLike[str] | StoreReader) -> InfluenceModule:
        """Join a model that is at hand and a file.

        Raises:
            StoreError: one of its children, if the file cannot be used.
            WeightsMismatchError: if the weights are not those that the file was captured for.
        """
        reader = store if isinstance(store, StoreReader) else StoreReader(store)
        return cls(model, matching_segment(model, reader))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        model: LightningModule | type[LightningModule],
        store: str | os.PathLike[str] | None = None,
        **load_kwargs: Any,
    ) -> InfluenceModule:
        """Load a checkpoint and find the file that belongs to it.

        Args:
            checkpoint: path of a Lightning checkpoint.
            model: the class, loaded with `load_from_checkpoint`, or an instance to load weights into.
            store: the file's path, if it is not where the checkpoint says.
            load_kwargs: for `load_from_checkpoint`. Pass `weights_only=False` for a checkpoint of your
                own that holds more than plain values.

        Raises:
            QueryError: if the checkpoint holds more than plain values.
            StoreError: one of its children, if the file cannot be found or used.
            WeightsMismatchError: if the checkpoint's weights are not the file's; names the checkpoint whose are,
                if it is near.
        """
        weights_only = load_kwargs.pop("weights_only", True)
        try:
            loaded = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise QueryError(
                f"{checkpoint} holds more than plain values: {str(error).splitlines()[0]} If you trust it, "
                "pass `weights_only=False`."
            ) from error
        reader = find_store(checkpoint, loaded) if store is None else StoreReader(store)
        if isinstance(model, LightningModule):
            model.load_state_dict(loaded["state_dict"])
        else:
            load_kwargs.setdefault("map_location", "cpu")
            if "weights_only" in inspect.signature(model.load_from_checkpoint).parameters:  # lightning>=2.6
                load_kwargs["weights_only"] = weights_only
            model = model.load_from_checkpoint(Path(checkpoint), **load_kwargs)
        return cls(model, matching_segment(model, reader, checkpoint=Path(checkpoint)))

    @overload
    def scores(
        self,
        batch: Any,
        *,
        damping: AnyDamping = ...,
        curvature: str | Curvature = ...,
        measurement: Measurement | None = ...,
        segments: Segments = ...,
        per_layer: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def scores(
        self,
        batch: Any,
        *,
        damping: AnyDamping = ...,
        curvature: str | Curvature = ...,
        measurement: Measurement | None = ...,
        segments: Segments = ...,
        per_layer: Literal[True],
    ) -> dict[str, Tensor]: ...

    def scores(
        self,
        batch: Any,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
        segments: Segments = None,
        per_layer: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Scores of every training example for every query in the batch.

        Args:
            batch: q queries, as `training_step` takes a batch (labels are part of the question:
                "why this answer?" takes the answer as the label).
            damping: added to each layer's eigenvalues: a rule, by default their mean, a number, or
                a mapping from layers' names or patterns to these. Another one needs no new capture;
                `recommend_damping` says which to take.
            curvature: "ekfac", "kfac", "diagonal" (of the parameters), "empirical_fisher" (the rows' own, which
                wants more damping: start at `HeuristicDamping(10.0)`) or "identity" (plain dot products of
                gradients).
            measurement: `measurement(model, batch) -> [q]`, to ask about anything else than the
                log-likelihood, such as a margin; row j must depend on query j only.
            segments: of a file that holds several epochs, which to ask. None or "last": that of the
                model's weights. "learning_rate" or "mean": the mean over it and all before it, weighted by
                their mean learning rates, or equally: TracIn's sum over checkpoints, but for the query's
                gradient, which stays that of the model's weights. A mapping {segment number: weight}: the
                sum of weight times scores, as given. An epoch that did not train on an example adds nothing
                to its score; one that was resumed or cut short, and lacks its row, makes it NaN.
            per_layer: return what each layer adds to the scores, by its name.

        Returns:
            Shape [q, N], on the CPU; NaN for training examples without a valid row.

        Raises:
            QueryError: if the queries' gradients cannot be had, or the file lacks what `segments` asks for.
        """
        gradients = self._gradients(self._transferred(batch), measurement)
        ask = self._engine().scores_by_layer if per_layer else self._engine().scores
        return ask(gradients, damping=damping, curvature=curvature, segments=segments)

    def scores_by_segment(
        self,
        batch: Any,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
    ) -> dict[int, Tensor]:
        """Influence over time: scores of the model's segment and of each before it, by segment number.

        Arguments as in `scores`; the query's gradients are those of the model's weights in each. NaN for
        training examples without a valid row in that segment.
        """
        gradients = self._gradients(self._transferred(batch), measurement)
        return self._engine().scores_by_segment(gradients, damping=damping, curvature=curvature)

    def top_k(
        self,
        batch: Any,
        k: int = 10,
        *,
        largest: bool = True,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
        segments: Segments = None,
    ) -> Attribution:
        """The k training examples with the largest scores (`largest=False`: the smallest)."""
        self._engine().check_k(k, segments)
        gradients = self._gradients(self._transferred(batch), measurement)
        options: dict[str, Any] = {"damping": damping, "curvature": curvature, "segments": segments}
        return self._engine().top_k(gradients, k, largest=largest, **options)

    def self_influence(
        self,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> Tensor:
        """How much each training example bends the model for itself, shape [N].

        Mislabelled and atypical examples come out on top. With `segments`, as in `scores`, it is summed over
        epochs, each with the gradients of its own rows.
        """
        return self._engine().self_influence(damping=damping, curvature=curvature, segments=segments)

    def removal_effect(
        self,
        batch: Any,
        indices: Tensor | np.ndarray | list[int],
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        measurement: Measurement | None = None,
        segments: Segments = None,
    ) -> Tensor:
        """Predicted change of each query's measurement if these training examples were removed.

        First order in the group's size; in the measurement's units. The order of the predictions is
        more reliable than their size, since the empirical Fisher is not the Hessian.

        Args:
            batch: q queries.
            indices: dataset indices to remove together, each once.
            damping: as in `scores`.
            curvature: as in `scores`.
            measurement: as in `scores`.
            segments: as in `scores`; of several, the weighted mean of their predictions.

        Returns:
            Shape [q].

        Raises:
            QueryError: if an index has no valid row or occurs twice; if the weights of `segments` do not
                sum to 1, since there is then no scale.
        """
        gradients = self._gradients(self._transferred(batch), measurement)
        options: dict[str, Any] = {"damping": damping, "curvature": curvature, "segments": segments}
        return self._engine().removal_effect(gradients, indices, **options)

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
            preconditioned_queries(self._engine(), gradients, damping=damping, curvature=curvature),
            self._transferred(examples),
            loss=cast(LossKind, self.store.attributes.get("loss", "auto")),
            training_loss=training_loss,
            inputs=inputs,
        )

    def recommend_damping(self) -> DampingAdvice:
        """Which damping to ask this file with, and how much that matters; nothing but the file is read.

        `TrainingDamping` of how the layers were trained, if the file says; else the default. Pass its `damping`
        as `damping=`; print it to see why, and how scores would differ at others.
        """
        return self._engine().recommend_damping()

    @property
    def coverage(self) -> Coverage:
        """Which parameters are attributed, and why the others are not."""
        try:
            return Coverage.from_builtins(self.store.document("coverage"))
        except (TypeError, AttributeError) as error:
            raise CorruptStoreError(
                f"{self.store.path}: the document 'coverage' cannot be read: {error}. Capture again."
            ) from error

    def summary(self) -> str:
        """What the file holds, in a few lines."""
        facts = self.store.attributes
        layers = ", ".join(f"{entry['name']} ({entry['codec']})" for entry in described_layers(self.store))
        lines = [
            f"{self.store.path}: {facts['num_examples']:,} examples, {facts['rows_written']:,} seen in "
            f"training, {facts['rows_missing']:,} missing, {facts['rows_invalid']:,} invalid; "
            f"{facts['bytes_per_row']:,} bytes per row",
            f"layers: {layers}",
            str(self.coverage),
        ]
        if facts.get("rows") == "final":
            lines.insert(1, f"captured in eval mode, at the weights after training, {describe_fisher(facts)}")
        elif facts.get("trajectory") == "merge":
            merged = ", ".join(str(e["epoch"]) for e in self.store.document("trajectory")["epochs"])
            lines.insert(
                1, f"merged from epochs {merged}, weighted by their learning rates, for the final weights"
            )
        elif "epoch" in facts:
            resumed = "" if facts.get("is_whole", True) else " (a part of it: it was resumed, or cut short)"
            lines[1:1] = [
                f"captured in epoch {facts['epoch']}{resumed}, optimizer steps {facts['step_start']} to "
                f"{facts['step_end']}, {describe_fisher(facts)}",
                f"staleness: {_staleness_text(facts)}",
            ]
        if len(self.store.segments) > 1:
            lines.insert(1, f"this is epoch {self.store.number} of {', '.join(map(str, self.store.segments))}")
        return "\n".join(lines)


def _staleness_text(facts: dict[str, Any]) -> str:
    value = facts["staleness_spearman"]
    if np.isnan(value):
        return f"not measured ({facts['staleness_note']})"
    return (
        f"Spearman {value:.3f} between scores of rows as captured and at the final weights; "
        f"of rows as stored and exact gradients {facts.get('codec_spearman', np.nan):.3f}"
    )

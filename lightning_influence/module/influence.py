"""`InfluenceModule`: asks a file of captured gradients, with the model that they belong to."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_influence.attachment import find_store, matching_segment
from lightning_influence.damping_advice import DampingAdvice
from lightning_influence.errors import CorruptStoreError, QueryError
from lightning_influence.fisher import describe_fisher
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import Coverage
from lightning_influence.module.ensemble import Average, InfluenceEnsemble
from lightning_influence.module.verified import VerifiedModel
from lightning_influence.query import (
    MEMORY_BUDGET,
    Attribution,
    GroupAttribution,
    Groups,
    InfluenceQuery,
    QueryOptions,
    ScoreOptions,
    Subset,
    described_layers,
    parse_bytes,
)
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

    Attributes:
        memory_budget: what a question may take beyond the model, the file's factors, the queries' gradients and
            what it returns: bytes, or such as "1GB", the default. It does not grow with N, but for
            `curvature="empirical_fisher"`, whose matrix is of the rows.
    """

    memory_budget: str | int = MEMORY_BUDGET

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

    @staticmethod
    def ensemble(models: Sequence[InfluenceModule], *, average: Average = "mean") -> InfluenceEnsemble:
        """Ask several runs on the same dataset as one, by the mean of their scores; see `InfluenceEnsemble`."""
        return InfluenceEnsemble(models, average=average)

    @overload
    def scores(
        self,
        batch: Any,
        *,
        measurement: Measurement | None = ...,
        per_layer: Literal[False] = ...,
        per_token: bool = ...,
        **options: Unpack[ScoreOptions],
    ) -> Tensor: ...

    @overload
    def scores(
        self,
        batch: Any,
        *,
        measurement: Measurement | None = ...,
        per_layer: Literal[True],
        per_token: bool = ...,
        **options: Unpack[ScoreOptions],
    ) -> dict[str, Tensor]: ...

    def scores(
        self,
        batch: Any,
        *,
        measurement: Measurement | None = None,
        per_layer: bool = False,
        per_token: bool = False,
        **options: Unpack[ScoreOptions],
    ) -> Tensor | dict[str, Tensor]:
        """Scores of every training example for every query in the batch.

        Args:
            batch: q queries, as `training_step` takes a batch (labels are part of the question:
                "why this answer?" takes the answer as the label).
            measurement: `measurement(model, batch) -> [q]`, to ask about anything else than the
                log-likelihood, such as a margin; row j must depend on query j only.
            per_layer: return what each layer adds to the scores, by its name.
            per_token: return what each position (token) of the training examples adds, for rows that keep
                positions apart: those of `InfluenceCallback(codec="pairs")`. A layer used on vectors has one; one
                that is called several times in a step has those of each call, one after the other.
            options: `damping`, `curvature`, `segments`, `layers`, `subset`: see `ScoreOptions`.

        Returns:
            Shape [q, N], with `subset` [q, len(subset)] in its order, with `per_token` [..., s]; on the CPU; NaN
            for training examples without a valid row.

        Raises:
            QueryError: if the queries' gradients cannot be had, or the file lacks what is asked for.
        """
        gradients = self._queries(batch, measurement)
        ask = self._engine().scores_by_layer if per_layer else self._engine().scores
        return ask(gradients, per_token=per_token, **options)

    def scores_by_segment(
        self, batch: Any, *, measurement: Measurement | None = None, **options: Unpack[ScoreOptions]
    ) -> dict[int, Tensor]:
        """Influence over time: scores of the model's segment and of each before it, by segment number.

        Arguments as in `scores`, without `segments`; the query's gradients are those of the model's weights in
        each. NaN for training examples without a valid row in that segment.
        """
        return self._engine().scores_by_segment(self._queries(batch, measurement), **options)

    def top_k(
        self,
        batch: Any,
        k: int = 10,
        *,
        largest: bool = True,
        measurement: Measurement | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Attribution:
        """The k training examples with the largest scores (`largest=False`: the smallest).

        Ties go to the lower index. Memory does not grow with the training set; other arguments as in `scores`.
        """
        self._engine().check_k(k, options.get("segments"), options.get("subset"))
        return self._engine().top_k(self._queries(batch, measurement), k, largest=largest, **options)

    def self_influence(self, **options: Unpack[ScoreOptions]) -> Tensor:
        """How much each training example bends the model for itself, shape [N] or [len(subset)].

        Mislabelled and atypical examples come out on top. With `segments` it is summed over epochs, each with
        the gradients of its own rows. Options as in `scores`; one pass over the file.
        """
        return self._engine().self_influence(**options)

    def removal_effect(
        self,
        batch: Any,
        indices: Subset,
        *,
        measurement: Measurement | None = None,
        **options: Unpack[QueryOptions],
    ) -> Tensor:
        """Predicted change of each query's measurement if these training examples were removed.

        First order in the group's size; in the measurement's units. The order of the predictions is
        more reliable than their size, since the empirical Fisher is not the Hessian.

        Args:
            batch: q queries.
            indices: dataset indices to remove together, each once, or a mask bool [N].
            measurement: as in `scores`.
            options: as in `scores`, without `subset`; of several segments, the weighted mean of their predictions.

        Returns:
            Shape [q].

        Raises:
            QueryError: if an index has no valid row or occurs twice; if the weights of `segments` do not
                sum to 1, since there is then no scale.
        """
        return self._engine().removal_effect(self._queries(batch, measurement), indices, **options)

    def group_scores(
        self,
        batch: Any,
        groups: Groups,
        *,
        measurement: Measurement | None = None,
        **options: Unpack[QueryOptions],
    ) -> GroupAttribution:
        """What groups of training examples (classes, sources, any labels) add up to, in one pass over the file.

        Args:
            batch: q queries.
            groups: a label for each training example, [N], or a mapping from names to dataset indices or masks,
                which may overlap.
            measurement: as in `scores`.
            options: as in `scores`, without `subset`.

        Returns:
            Names, sums of scores [q, groups], predicted effects of removing each group [q, groups] and how many
            examples are in each sum: those with a valid row.

        Raises:
            QueryError: if the groups do not fit the file.
        """
        return self._engine().group_scores(self._queries(batch, measurement), groups, **options)

    def scores_between(
        self, indices: Subset, other_indices: Subset | None = None, **options: Unpack[QueryOptions]
    ) -> Tensor:
        """Scores of training examples for training examples, from their stored rows, shape [m, n].

        Symmetric for the same indices, with `self_influence` on the diagonal, to rounding and without
        `rank`; NaN for training examples without a valid row.

        Args:
            indices: dataset indices, each once, or a mask bool [N].
            other_indices: likewise; None for the same.
            options: as in `scores`, without `subset`.
        """
        return self._engine().scores_between(indices, other_indices, **options)

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

    def _engine(self) -> InfluenceQuery:
        engine = super()._engine()
        engine.memory_budget = parse_bytes(self.memory_budget)
        return engine

    def _queries(self, batch: Any, measurement: Measurement | None) -> dict[str, LayerGradient]:
        """The queries' gradients of a batch that is anywhere, as a data loader has it."""
        return self._gradients(self._transferred(batch), measurement)

    def _gradients(self, batch: Any, measurement: Measurement | None) -> dict[str, LayerGradient]:
        inference = [name for name, parameter in self.model.named_parameters() if parameter.is_inference()]
        if inference:
            raise QueryError(
                f"{', '.join(inference[:3])} of {type(self.model).__name__} were made in `torch.inference_mode()` "
                "and cannot have gradients; make or load the model outside of it."
            )
        return super()._gradients(batch, measurement)


def _staleness_text(facts: dict[str, Any]) -> str:
    value = facts["staleness_spearman"]
    if np.isnan(value):
        return f"not measured ({facts['staleness_note']})"
    return (
        f"Spearman {value:.3f} between scores of rows as captured and at the final weights; "
        f"of rows as stored and exact gradients {facts.get('codec_spearman', np.nan):.3f}"
    )

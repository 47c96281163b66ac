"""Several runs on the same dataset, asked as one: the mean of their scores.

What one run's scores say of retraining is partly luck of that run: its initial weights and the order of its data.
The mean over runs predicts retraining better (Park et al. 2023, arXiv:2303.14186, whose TRAK averages over models,
too). With m a model and M_n the models that have a row of example n,

    score[q, n] = sum_{m in M_n} w_mq score_m[q, n] / sum_{m in M_n} w_mq.

"mean" has w_mq = 1. "standardized" has w_mq = 1 / (standard deviation of score_m[q, n] over n): no model outvotes
the others by the size of its scores alone. Both are means, so that units stay what they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.errors import QueryError
from lightning_influence.exports import UNKNOWN_LABEL, example_labels, ranked_columns
from lightning_influence.functional.ranking import top_k
from lightning_influence.module.hosted import checked_options
from lightning_influence.query import Attribution, GroupAttribution, Groups, Subset
from lightning_influence.query.places import as_indices
from lightning_influence.segments import answerable, weighted_segments
from lightning_influence.store import StoreReader

Average = Literal["mean", "standardized"]
AVERAGES = ("mean", "standardized")
_OF_PARTS = ("subset", "per_layer", "per_token")  # options whose answers are not the scores of all examples


class InfluenceEnsemble(LightningModule):
    """The questions of `InfluenceModule`, answered by the mean over several of them.

    Made by `InfluenceModule.ensemble`. Each model finds the query's gradients with its own weights. An example
    that only some of the models have a row of (as where each of them dropped another last batch) has the mean over
    these; one that none of them has is NaN. As a `LightningModule` it works with `trainer.predict`; set
    `query_options` to pass arguments to `top_k`.

    Args:
        models: `InfluenceModule`s of runs on the same dataset, in the same order; their networks may differ, as
            long as they take the same batches.
        average: "mean", or "standardized", by each model's spread of scores for each query.

    Raises:
        ValueError: if there are no models, or no such average.
        QueryError: if their datasets differ in length or labels, or a file is given twice.
    """

    def __init__(self, models: Sequence[LightningModule], *, average: Average = "mean") -> None:
        super().__init__()
        if average not in AVERAGES:
            raise ValueError(f"`average` must be one of {AVERAGES}, got {average!r}.")
        self.average = average
        stores = [cast(StoreReader, model.store) for model in models]
        self._labels, self._where = _common_labels(stores), str(stores[0].path)
        self.models = nn.ModuleList(models)
        self.query_options: dict[str, Any] = {}

    def scores(self, batch: Any, **options: Any) -> Any:
        """Mean scores, [q, N] (with `per_layer=True` by layer); arguments as in `InfluenceModule.scores`."""
        found = [model.scores(batch, **options) for model in self._members]
        weights, known = self._weights(batch, options, found), self._known(options)
        if not options.get("per_layer"):
            return _weighted_mean(found, weights, known)
        names = [list(each) for each in found]
        if any(other != names[0] for other in names):
            raise QueryError(f"`per_layer` needs models with the same layers, got {names}.")
        return {name: _weighted_mean([each[name] for each in found], weights, known) for name in names[0]}

    def top_k(self, batch: Any, k: int = 10, *, largest: bool = True, **options: Any) -> Attribution:
        """The k examples with the largest (or smallest) mean scores; as `InfluenceModule.top_k`.

        Unlike that of a single model, it holds the scores of all examples by all models, [q, N] each.
        """
        subset = options.pop("subset", None)
        examples = np.arange(len(self._labels))
        if subset is not None:
            examples = np.sort(as_indices(subset, len(examples), "subset", self._where))
            options["subset"] = examples  # in the dataset's order, so that ties go to the lower index
        scores = self.scores(batch, **options)
        rows = int((~scores.isnan()).any(0).sum())
        if not rows:
            raise QueryError("no score of these queries is a number; is there a NaN in them?")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rows:
            raise ValueError(f"`k` must be an integer from 1 to {rows}, the number of examples, got {k!r}.")
        values, places = top_k(scores, k, largest=largest)
        return Attribution(torch.from_numpy(examples)[places], values)

    def self_influence(self, **options: Any) -> Tensor:
        """The plain mean, [N]; arguments as in `InfluenceModule.self_influence`."""
        found = [model.self_influence(**options)[None] for model in self._members]
        return _weighted_mean(found, [torch.ones(1, dtype=torch.float32)] * len(found), self._known(options))[0]

    def scores_between(self, indices: Subset, other_indices: Subset | None = None, **options: Any) -> Tensor:
        """The plain mean, [m, n]; arguments as in `InfluenceModule.scores_between`."""
        found = [model.scores_between(indices, other_indices, **options) for model in self._members]
        return _weighted_mean(
            found, [torch.ones(1, dtype=torch.float32)] * len(found), [~each.isnan() for each in found]
        )

    def group_scores(self, batch: Any, groups: Groups, **options: Any) -> GroupAttribution:
        """Sums of the mean scores over groups of examples, as `InfluenceModule.group_scores`.

        Each model adds up, in one pass, those examples of a group that the same models have rows of.
        """
        known = np.stack([each.numpy() for each in self._known(options)])
        names, parts = _parts_of_groups(groups, known, self._where)
        weights = self._weights(batch, options)
        found = [model.group_scores(batch, parts, **options) for model in self._members]
        known = known[:, [members[0] for members in parts.values()]]
        scores = _joined_parts([each.scores for each in found], weights, known, parts, len(names))
        effects = None
        if all(each.removal_effects is not None for each in found):
            effects = _joined_parts([each.removal_effects for each in found], weights, known, parts, len(names))
        counts = torch.zeros(len(names), dtype=torch.int64)
        for (number, _), members, by_any in zip(parts, parts.values(), np.logical_or.reduce(known), strict=True):
            counts[number] += len(members) * int(by_any)
        return GroupAttribution(names, scores, effects, counts)

    def removal_effect(self, batch: Any, indices: Tensor | np.ndarray | list[int], **options: Any) -> Tensor:
        """Mean predicted change of each query's measurement, [q]; as `InfluenceModule.removal_effect`.

        Raises:
            QueryError: as that, also if one of the models has no row of one of the examples.
        """
        weights = self._weights(batch, options)
        found = [model.removal_effect(batch, indices, **options)[:, None] for model in self._members]
        return _weighted_mean(found, weights, [torch.ones(1, dtype=torch.bool)] * len(found))[:, 0]

    def to_columns(self, answers: Attribution | Sequence[Attribution] | None = None) -> dict[str, np.ndarray]:
        """A table as `InfluenceModule.to_columns` makes it, of what all models have in common.

        Returns:
            `index` and `label`; or `query`, `rank`, `index`, `score` and `label` of answers.
        """
        if answers is None:
            return {"index": np.arange(len(self._labels)), "label": self._labels.copy()}
        answers = [answers] if isinstance(answers, Attribution) else answers
        return ranked_columns(answers, {"label": self._labels})

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Attribution:
        """`top_k` of a batch with `query_options`; called by `trainer.predict`."""
        return self.top_k(batch, **checked_options(self.query_options))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch as it is: each model prepares and moves it as in its training."""
        return batch

    @property
    def _members(self) -> Iterable[Any]:
        return iter(self.models)

    def _known(self, options: dict[str, Any]) -> list[Tensor]:
        """Which of the examples that are asked about each model has an answer for, bool [n]."""
        known = []
        for model in self._members:
            weighted = weighted_segments(model.store, options.get("segments"))
            known.append(torch.from_numpy(answerable(each.store for each in weighted)))
        if options.get("subset") is None:
            return known
        subset = as_indices(options["subset"], len(self._labels), "subset", self._where)
        return [each[subset] for each in known]

    def _weights(self, batch: Any, options: dict[str, Any], found: list[Any] | None = None) -> list[Tensor]:
        """Each model's, [q, 1] or one for all queries.

        Args:
            batch: the queries.
            options: of the question.
            found: scores of all examples by each model, if they are there.
        """
        if self.average == "mean":
            return [torch.ones(1, dtype=torch.float32)] * len(self.models)
        if found is None or any(options.get(name) is not None for name in _OF_PARTS):
            others = {key: value for key, value in options.items() if key not in _OF_PARTS}
            found = [model.scores(batch, **others) for model in self._members]
        spreads = torch.stack([_spread(scores.double()) for scores in found])
        weights = torch.where(spreads > 0, 1 / spreads, 0.0)
        weights = (weights / weights.amax(0)).float()  # within float32, of whatever scale the scores are
        return list(torch.where(weights.sum(0) > 0, weights, 1.0))  # no model tells examples apart: all alike


def _weighted_mean(found: Iterable[Tensor], weights: Iterable[Tensor], known: Iterable[Tensor]) -> Tensor:
    """Over the models that know an example; NaN where none does.

    Args:
        found: each model's answers [q, n] or [q, n, s].
        weights: each model's, [q, 1] or [1].
        known: which examples each knows, bool [n] or [q, n]. What is NaN all the same, as scores of a query that
            is not finite, makes the mean NaN.
    """
    total: Tensor | float = 0.0
    counted: Tensor | float = 0.0
    for values, weight, own in zip(found, weights, known, strict=True):
        if values.ndim > 2:  # [q, n, s], with weights [q, 1]
            weight, own = weight.unsqueeze(-1), own.unsqueeze(-1)
        total = total + weight * values.masked_fill(~own, 0.0)
        counted = counted + weight * own
    return cast(Tensor, total / counted)


def _spread(scores: Tensor) -> Tensor:
    """Standard deviation over the examples that have a score, [q, 1]."""
    is_known = ~scores.isnan()
    number = is_known.sum(1, keepdim=True)
    centered = scores - scores.nansum(1, keepdim=True) / number
    return (centered.masked_fill(~is_known, 0.0).square().sum(1, keepdim=True) / number).sqrt()


def _common_labels(stores: Sequence[StoreReader]) -> np.ndarray:
    """Labels [N] as far as any of the files knows them.

    Raises:
        ValueError: if there are no files.
        QueryError: if the files are not of the same examples, or one is given twice.
    """
    if not stores:
        raise ValueError("`models` must hold at least one InfluenceModule, got none.")
    first, labels, runs = stores[0], example_labels(stores[0]), {(stores[0].store_id, stores[0].number)}
    for store in stores[1:]:
        if store.num_examples != first.num_examples:
            raise QueryError(
                f"an ensemble needs runs on the same dataset, but {first.path} has {first.num_examples:,} "
                f"examples and {store.path} has {store.num_examples:,}."
            )
        if (store.store_id, store.number) in runs:
            raise QueryError(f"{store.path} is in the ensemble twice (id {store.store_id}); give each run once.")
        runs.add((store.store_id, store.number))
        own = example_labels(store)
        differ = np.flatnonzero((labels != own) & (labels != UNKNOWN_LABEL) & (own != UNKNOWN_LABEL))
        if len(differ):
            n = differ[0]
            raise QueryError(
                f"an ensemble needs runs on the same dataset, but {len(differ):,} labels of {store.path} differ "
                f"from those of the files before, as that of example {n}: {own[n]}, not {labels[n]}."
            )
        labels = np.where(labels == UNKNOWN_LABEL, own, labels)
    return labels


def _parts_of_groups(
    groups: Groups, known: np.ndarray, where: str
) -> tuple[list[Hashable], dict[tuple[int, int], np.ndarray]]:
    """Groups, and their examples apart by which models know them.

    Args:
        groups: as `InfluenceModule.group_scores` takes them.
        known: bool [models, N].
        where: for messages.

    Returns:
        The groups' names, and by a group's number and a set of models the dataset indices.
    """
    if isinstance(groups, Mapping):
        members = [as_indices(own, known.shape[1], f"groups[{name!r}]", where) for name, own in groups.items()]
        names = list(groups)
    else:
        labels = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
        if labels.shape != (known.shape[1],):
            raise QueryError(
                f"`groups` must have one label for each of the {known.shape[1]} examples of {where}, or be a "
                f"mapping from names to their indices, got shape {labels.shape}."
            )
        names = np.unique(labels).tolist()
        members = [np.flatnonzero(labels == name) for name in names]
    patterns = np.unique(known, axis=1, return_inverse=True)[1].reshape(-1)
    parts = {}
    for number, own in enumerate(members):
        for pattern in np.unique(patterns[own]).tolist():
            parts[number, pattern] = own[patterns[own] == pattern]
    return names, parts


def _joined_parts(
    found: Sequence[Tensor],
    weights: Sequence[Tensor],
    known: np.ndarray,
    parts: Iterable[tuple[int, int]],
    count: int,
) -> Tensor:
    """Sums over groups, [q, groups], of sums over their parts by each model, [q, parts], that it knows or not."""
    by_model = torch.from_numpy(known)
    mean, by_any = _weighted_mean(found, weights, by_model), by_model.any(0)
    numbers = torch.tensor([number for number, _ in parts])
    sums = torch.zeros(len(mean), count, dtype=torch.float32).index_add_(
        1, numbers, mean.masked_fill(~by_any, 0.0)
    )
    is_known = torch.zeros(count, dtype=torch.bool)
    is_known[numbers[by_any]] = True
    return sums.masked_fill(~is_known, torch.nan)

"""What does training on a part of the data do? Train a small model again on many subsets, and look.

This is the truth that attributions are measured against: `retrain_subsets` makes it, and `Retraining` says how
well scores predict it (`metrics.linear_datamodeling_score`, Park et al. 2023, arXiv:2303.14186).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from lightning_influence.evaluation.retraining_cache import RetrainingCache
from lightning_influence.evaluation.retraining_identity import identity_of
from lightning_influence.evaluation.retraining_recipe import (
    MakeModel,
    Measure,
    Recipe,
    device_of,
    measured,
    pick,
    read_whole,
    seeded,
    seeded_model,
    train_alone,
)
from lightning_influence.evaluation.retraining_stacked import train_stacked, why_not_stacked
from lightning_influence.metrics import (
    bootstrap_rank_correlations,
    linear_datamodeling_score,
    split_half_reliability,
    standard_errors,
    subset_predictions,
)

Train = Callable[[nn.Module, Subset[Any], int], None]
Job = tuple[Tensor, int]  # a mask [N] and a seed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retraining:
    """What models say that were trained on subsets.

    Args:
        subsets: which examples each was trained on, bool [m, N].
        outputs: the measure of each, [m, seeds, q].
        seeds: of the trainings.
    """

    subsets: Tensor
    outputs: Tensor
    seeds: tuple[int, ...]

    @property
    def mean_outputs(self) -> Tensor:
        """Averaged over the seeds, float64 [m, q]."""
        return self.outputs.double().mean(1)

    @property
    def reliability(self) -> float:
        """How well the mean outputs would agree, as ranks, with those of as many other seeds; NaN of one seed.

        No method can be expected to score more than about its square root.
        """
        return split_half_reliability(self.outputs)

    def lds(self, scores: Tensor, *, num_bootstraps: int = 200, seed: int = 0) -> tuple[float, float]:
        """The linear datamodeling score of scores [q, N], and its standard error over queries and subsets.

        Raises:
            ValueError: if shapes do not fit, or a score is NaN, as of examples without a row.
        """
        score = linear_datamodeling_score(scores.cpu(), self.subsets, self.mean_outputs)
        drawn = bootstrap_rank_correlations(
            [subset_predictions(scores.cpu(), self.subsets)],
            self.mean_outputs.T,
            num_bootstraps=num_bootstraps,
            seed=seed,
        )
        return float(score), float(standard_errors(drawn[0]))


def random_subsets(num_examples: int, number: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of one size, bool [number, num_examples].

    Args:
        num_examples: of the dataset.
        number: of subsets.
        fraction: of the examples that a subset holds, rounded.
        seed: of the draws; subset j is the same for any number.

    Raises:
        ValueError: if a subset would be empty or whole.

    Example:
        >>> random_subsets(10, 3).sum(1).tolist()
        [5, 5, 5]
    """
    size = round(fraction * num_examples)
    if not 0 < size < num_examples:
        raise ValueError(f"`fraction` of {num_examples} examples must leave some in and some out, got {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(number, num_examples, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(num_examples, generator=generator)[:size]] = True
    return masks


@torch.inference_mode(False)
def retrain_subsets(
    make_model: MakeModel,
    dataset: Dataset[Any],
    subsets: Tensor,
    *,
    train: Recipe | Train,
    measure: Measure,
    seeds: int | Iterable[int] = 1,
    cache: str | os.PathLike[str] | None = None,
    models_at_once: int = 32,
    progress: bool = True,
) -> Retraining:
    """Train a model on each of many subsets, with each of several seeds, and measure it.

    A seed makes the first weights, the order of examples and all else that torch, NumPy or Python draw, the same
    for all subsets, so differences are paired. Where the model allows, many models are trained as one
    (`torch.func.vmap`); where it does not (dropout, normalizations with running statistics, optimizers that mix
    parameters), one after the other, and a line in the log says why. Both give the same models up to rounding,
    which training may amplify.

    Args:
        make_model: makes a model from torch's own random numbers, on its device. Called once a training.
        dataset: N examples. For a `Recipe` it is read once, into memory: augmentations stand still.
        subsets: which examples to train on, bool [m, N], such as `random_subsets(len(dataset), 64)`.
        train: a `Recipe`, or `train(model, subset, seed)` that trains the model in place, such as by a Trainer.
        measure: `measure(model) -> [q]`, of the trained model in eval mode, such as queries' log-likelihoods.
        seeds: how many, or which.
        cache: a file to keep what was measured, of one process at a time. It is taken up where it stopped, and
            further subsets and seeds are added to it. Of a function `train`, it knows its name, a partial's
            numbers and strings, and a few examples only: delete it when you change the function's body.
        models_at_once: how many are trained as one, at most.
        progress: whether to show a bar, if the terminal can.

    Returns:
        The subsets and the models' outputs.

    Raises:
        TypeError: if `subsets` is no mask, or the dataset's examples cannot be stacked.
        ValueError: if shapes do not fit, the cache is of something else, or a model ends with numbers that are not
            finite.

    Example:
        >>> from functools import partial
        >>> from torch.nn.functional import mse_loss
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        >>> recipe = Recipe(
        ...     lambda model, batch: mse_loss(model(batch[0]), batch[1]), partial(torch.optim.SGD, lr=0.1), 5, 10
        ... )
        >>> found = retrain_subsets(
        ...     lambda: nn.Linear(3, 1), data, random_subsets(20, 4), train=recipe,
        ...     measure=lambda model: model(x[:2])[:, 0], seeds=2, progress=False,
        ... )
        >>> found.outputs.shape
        torch.Size([4, 2, 2])
    """
    check_subsets(subsets, len(dataset))  # type: ignore[arg-type]
    if models_at_once < 1:
        raise ValueError(f"`models_at_once` must be positive, got {models_at_once}.")
    subsets, chosen_seeds = subsets.cpu(), _as_seeds(seeds)
    trainer = _Trainer(make_model, dataset, train, measure, models_at_once)
    with RetrainingCache(cache, trainer.identity(), trainer.probe()) as known:
        jobs = [(mask, seed) for seed in chosen_seeds for mask in subsets if known.get(mask, seed) is None]
        with tqdm(total=len(jobs), desc="retraining", unit="model", disable=None if progress else True) as bar:
            for (mask, seed), outputs in trainer.run(jobs):
                known.put(mask, seed, outputs)
                bar.update()
        found = [[known.get(mask, seed) for seed in chosen_seeds] for mask in subsets]
    result = torch.stack([torch.stack(row) for row in found])  # type: ignore[arg-type]
    _refuse_failures(result, chosen_seeds)
    return Retraining(subsets, result, chosen_seeds)


class _Trainer:
    """What is trained, and how; arguments as in `retrain_subsets`."""

    def __init__(
        self,
        make_model: MakeModel,
        dataset: Dataset[Any],
        train: Recipe | Train,
        measure: Measure,
        models_at_once: int,
    ) -> None:
        self.make_model, self.dataset, self.train, self.measure = make_model, dataset, train, measure
        self.models_at_once = models_at_once
        self.untrained = seeded_model(make_model, 0)
        self.data = read_whole(dataset, device_of(self.untrained)) if isinstance(train, Recipe) else None

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Tensor]]:
        """Each job with what its model says, as it comes."""
        if not jobs:
            return
        if isinstance(self.train, Recipe) and self.models_at_once > 1 and len(jobs) > 1:
            group = max(_by_size(jobs).values(), key=len)[:2]
            why = why_not_stacked(self.make_model, self.train, self.data, *_columns(group), self.measure)
            if not why:
                yield from self._run_stacked(jobs)
                return
            log.warning("Models are retrained one after the other: %s.", why)
        for job in jobs:
            yield job, measured(self._trained_alone(*job), self.measure)

    def identity(self) -> dict[str, str]:
        """All that can be said in words of what is trained."""
        return identity_of(self.train, self.untrained, self.dataset, self.data)

    def probe(self) -> Tensor:
        """What the untrained model says, and its loss on the first examples, [p]."""
        said = measured(self.untrained, self.measure).double()
        if not isinstance(self.train, Recipe):
            return said
        first = torch.arange(min(self.train.batch_size, len(self.dataset)))  # type: ignore[arg-type]
        with torch.no_grad(), seeded(0):
            loss = self.train.loss(self.untrained, pick(self.data, first.to(device_of(self.untrained))))
        if loss.ndim:
            raise ValueError(f"`loss` must return a scalar, the mean over the batch, got {list(loss.shape)}.")
        return torch.cat([said, loss.double().cpu()[None]])

    def _run_stacked(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Tensor]]:
        assert isinstance(self.train, Recipe)
        for group in _by_size(jobs).values():
            for start in range(0, len(group), self.models_at_once):
                chunk = group[start : start + self.models_at_once]
                models = train_stacked(self.make_model, self.train, self.data, *_columns(chunk))
                for job, model in zip(chunk, models, strict=True):
                    yield job, measured(model, self.measure)

    def _trained_alone(self, mask: Tensor, seed: int) -> nn.Module:
        model = seeded_model(self.make_model, seed)
        if isinstance(self.train, Recipe):
            train_alone(model, self.train, self.data, mask, seed)
            return model
        with seeded(seed), torch.enable_grad():
            self.train(model, Subset(self.dataset, mask.nonzero()[:, 0].tolist()), seed)
        return model


def check_subsets(subsets: Tensor, num_examples: int) -> None:
    """Refuse anything but a mask of subsets [m, N] that all have examples.

    Raises:
        TypeError: if it is not boolean.
        ValueError: if the shape is another, or a subset is empty.
    """
    if not isinstance(subsets, Tensor) or subsets.dtype != torch.bool:
        found = subsets.dtype if isinstance(subsets, Tensor) else type(subsets).__name__
        raise TypeError(f"`subsets` must be a boolean mask [m, {num_examples}], got {found}.")
    if subsets.ndim != 2 or subsets.shape[1] != num_examples or not len(subsets):
        raise ValueError(f"`subsets` must have shape [m, {num_examples}], got {list(subsets.shape)}.")
    empty = (~subsets.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"`subsets`: there is nothing to train on in {empty[:5]}; each must hold an example.")


def _as_seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"`seeds` must be a positive number, or different seeds, got {seeds}.")
    return chosen


def _by_size(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    """Jobs whose trainings have the same number of steps, and batches of the same sizes."""
    groups: dict[int, list[Job]] = defaultdict(list)
    for mask, seed in jobs:
        groups[int(mask.sum())].append((mask, seed))
    return groups


def _columns(jobs: Sequence[Job]) -> tuple[Tensor, list[int]]:
    return torch.stack([mask for mask, _ in jobs]), [seed for _, seed in jobs]


def _refuse_failures(outputs: Tensor, seeds: tuple[int, ...]) -> None:
    failed = (~outputs.isfinite()).any(-1).nonzero().tolist()
    if failed:
        subset, seed = failed[0]
        raise ValueError(
            f"{len(failed)} of {outputs.shape[0] * outputs.shape[1]} models say numbers that are not finite, the "
            f"first of subset {subset}, seed {seeds[seed]}; lower the learning rate, or look at `measure`."
        )

"""Take each query's most influential examples away, train again, and watch the prediction.

The examples that a method names are its claim of what a prediction rests on. If it flips without them, and not
without as many random ones, the claim holds; the smallest number that flips it bounds the size of the prediction's
data support (Ilyas et al. 2022, "Datamodels: Predicting Predictions from Training Data", arXiv:2202.00622).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_influence.evaluation.retraining import Retraining
from lightning_influence.metrics import brittleness, data_support


@dataclass(frozen=True)
class Removal:
    """What became of each query's prediction without its top examples.

    Args:
        removed: how many were removed, increasing, ks numbers.
        margins: of models trained without them, float64 [q, ks], averaged over seeds; negative is flipped.
        baseline: of models trained on all examples, [q].
    """

    removed: tuple[int, ...]
    margins: Tensor
    baseline: Tensor

    @property
    def flipped(self) -> Tensor:
        """The share of predictions that flip at each number, [ks]; see `metrics.brittleness`."""
        return brittleness(self.margins, self.baseline)

    @property
    def data_support(self) -> Tensor:
        """The smallest number that flips each prediction, [q]; see `metrics.data_support`."""
        return data_support(self.margins, self.baseline, self.removed)


def remove_top_k(scores: Tensor, removed: Sequence[int], *, retrain: Callable[[Tensor], Retraining]) -> Removal:
    """Train again without the best-scored examples of each query, for several numbers of them.

    Costs 1 + q times ks trainings a seed; compare with what random scores flip.

    Args:
        scores: shape [q, N], positive where the example supports the prediction; NaN, an example without a row, is
            never removed.
        removed: how many examples to remove, increasing.
        retrain: trains on subsets, bool [m, N], and measures `margins` for the same q queries, in their order:
            `functools.partial(retrain_subsets, make_model, dataset, train=..., measure=..., seeds=...)`, called as
            `retrain(subsets)`. With a cache, several methods share trainings.

    Returns:
        The margins of each query, and how many predictions flip.

    Raises:
        ValueError: if shapes do not fit, the numbers are not increasing, or a query has fewer scores than are to
            be removed.

    Example:
        >>> def retrain(subsets):  # a model whose margin is the number of its examples, minus 8
        ...     outputs = subsets.sum(1).double()[:, None, None] - 8
        ...     return Retraining(subsets, outputs, (0,))
        >>> remove_top_k(torch.arange(10.0)[None], [1, 3], retrain=retrain).margins.tolist()
        [[1.0, -1.0]]
    """
    if scores.ndim != 2:
        raise ValueError(f"`scores` must have shape [q, N], got {list(scores.shape)}.")
    num_queries, num_examples = scores.shape
    if not removed or sorted(set(removed)) != list(removed) or not 0 < removed[0] <= removed[-1] < num_examples:
        raise ValueError(
            f"`removed` must be increasing numbers from 1 to {num_examples - 1}, got {list(removed)}."
        )
    scored = (~scores.isnan()).sum(1)
    if bool((scored < removed[-1]).any()):
        query = int(scored.argmin())
        raise ValueError(
            f"`removed` asks for {removed[-1]} examples, but query {query} has {int(scored[query])} scores that "
            "are not NaN; remove fewer, or leave the query out."
        )
    known_first = scores.cpu().isnan().to(torch.uint8).argsort(dim=1, stable=True)
    numbers = scores.cpu().nan_to_num(nan=-torch.inf).gather(1, known_first)
    order = known_first.gather(1, numbers.argsort(dim=1, descending=True, stable=True))
    subsets = torch.ones(1 + num_queries * len(removed), num_examples, dtype=torch.bool)  # the first one is whole
    for row, (query, count) in enumerate(_rows(num_queries, removed), start=1):
        subsets[row, order[query, :count]] = False
    outputs = retrain(subsets).mean_outputs
    if outputs.shape != (len(subsets), num_queries):
        raise ValueError(
            f"`retrain` must measure a margin for each of the {num_queries} queries of `scores`, shape "
            f"[{len(subsets)}, {num_queries}], got {list(outputs.shape)}."
        )
    by_query = outputs[1:].view(num_queries, len(removed), num_queries)
    return Removal(tuple(removed), by_query.diagonal(dim1=0, dim2=2).T, outputs[0])


def margins(model: nn.Module, inputs: object, classes: Tensor) -> Tensor:
    """A classifier's logit of the given class minus its best other, [q]; negative where it says something else.

    Args:
        model: `model(inputs)` gives logits [q, classes].
        inputs: of q queries.
        classes: whose prediction is watched, int64 [q]: the trained model's own, or the true ones.

    Example:
        >>> margins(nn.Identity(), torch.tensor([[2.0, 5.0, 1.0]]), torch.tensor([0])).tolist()
        [-3.0]
    """
    logits = model(inputs)
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def _rows(num_queries: int, removed: Sequence[int]) -> list[tuple[int, int]]:
    return [(query, count) for query in range(num_queries) for count in removed]

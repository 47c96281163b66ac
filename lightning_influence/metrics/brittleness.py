"""How brittle are predictions? The share that flips when the most influential examples are taken away.

For a query, the smallest number of training examples whose removal flips its prediction is the size of its data
support (Ilyas et al. 2022, "Datamodels", arXiv:2202.00622). Removing the top k of an attribution method and
training again bounds it from above; the better the method, the more predictions flip at the same k.
`lightning_influence.evaluation.remove_top_k` measures the margins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_influence.metrics.checks import check_finite, check_shape


def brittleness(margins: Tensor, baseline: Tensor) -> Tensor:
    """Share of the predictions that flip at each number of removed examples.

    Args:
        margins: of each query after retraining without its k most influential examples, shape [q, ks]: the
            prediction's logit minus the best other, averaged over seeds; negative is flipped.
        baseline: of models trained on all examples, shape [q]. Queries without a positive one do not count: there
            is no prediction to flip.

    Returns:
        float64 [ks]; NaN if no query counts.

    Raises:
        ValueError: if shapes do not fit, or a number is not finite.

    Example:
        >>> margins = torch.tensor([[0.5, -0.1], [0.9, 0.2]])
        >>> brittleness(margins, torch.tensor([1.0, 1.0])).tolist()
        [0.0, 0.5]
    """
    is_flipped, counts = _flips(margins, baseline)
    return is_flipped.sum(0).double() / counts.sum()


def data_support(margins: Tensor, baseline: Tensor, removed: Sequence[int]) -> Tensor:
    """The smallest number of removed examples, of those tried, that flips each prediction.

    Args:
        margins: as in `brittleness`, shape [q, ks].
        baseline: shape [q].
        removed: how many examples were removed, increasing, ks numbers.

    Returns:
        float64 [q]; infinite where none flips it, NaN where there is no prediction to flip.

    Raises:
        ValueError: if shapes do not fit, or a number is not finite.

    Example:
        >>> margins = torch.tensor([[0.5, -0.1], [0.9, 0.2]])
        >>> data_support(margins, torch.tensor([1.0, 1.0]), [10, 20]).tolist()
        [20.0, inf]
    """
    is_flipped, counts = _flips(margins, baseline)
    if len(removed) != margins.shape[1] or sorted(set(removed)) != list(removed):
        raise ValueError(f"`removed` must be {margins.shape[1]} increasing numbers, got {list(removed)}.")
    sizes = torch.tensor(list(removed), dtype=torch.float64, device=margins.device)
    return torch.where(is_flipped, sizes, torch.inf).amin(1).masked_fill(~counts, torch.nan)


class Brittleness(Metric):
    """`brittleness` over batches of queries; `update(margins, baseline)`.

    Args:
        num_removals: how many numbers of removed examples are tried.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = Brittleness(num_removals=2)
        >>> metric.update(torch.tensor([[0.5, -0.1], [0.9, 0.2]]), torch.tensor([1.0, 1.0]))
        >>> metric.compute().tolist()
        [0.0, 0.5]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    flipped: Tensor
    count: Tensor

    def __init__(self, num_removals: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_removals = num_removals
        self.add_state("flipped", torch.zeros(num_removals, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, margins: Tensor, baseline: Tensor) -> None:
        """Add the queries of a batch."""
        check_shape(margins, "margins", ("q", self.num_removals))
        is_flipped, counts = _flips(margins, baseline)
        self.flipped += is_flipped.sum(0).to(self.flipped.device)
        self.count += counts.sum().to(self.count.device)

    def compute(self) -> Tensor:
        """The shares of all queries so far."""
        return self.flipped.double() / self.count


def _flips(margins: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Which predictions are flipped, [q, ks], and which count, [q]."""
    check_shape(margins, "margins", ("q", "ks"))
    check_shape(baseline, "baseline", (len(margins),))
    for values, name in ((margins, "margins"), (baseline, "baseline")):
        check_finite(values, name, "leave out the queries of models that have failed")
    counts = baseline.to(margins.device) > 0
    return (margins < 0) & counts[:, None], counts

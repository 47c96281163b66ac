"""Are wrong labels found? The area under the ROC curve of a ranking of the training examples.

A mislabelled example bends the model for itself, so that its self-influence is large (Koh & Liang 2017,
arXiv:1703.04730, Section 5.4). AUROC is the probability that a wrong label is ranked above a right one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from lightning_influence.metrics.checks import check_shape
from lightning_influence.metrics.ranks import average_ranks


def mislabel_auroc(suspicion: Tensor, is_mislabelled: Tensor) -> Tensor:
    """Area under the ROC curve of finding wrong labels by a score, such as self-influence.

    Args:
        suspicion: the larger the more suspect, shape [N]; NaN, an example without a row, does not count.
        is_mislabelled: bool [N].

    Returns:
        A scalar between 0 and 1, .5 for a random order; NaN unless there are labels of both kinds.

    Raises:
        TypeError, ValueError: if shapes do not fit.

    Example:
        >>> mislabel_auroc(torch.tensor([120.0, 3.0, 90.0]), torch.tensor([True, False, False])).item()
        1.0
    """
    check_shape(suspicion, "suspicion", ("N",))
    check_shape(is_mislabelled, "is_mislabelled", (len(suspicion),))
    if is_mislabelled.dtype != torch.bool:
        raise TypeError(f"`is_mislabelled` must be boolean [N], got {is_mislabelled.dtype}.")
    counts = ~suspicion.isnan()
    wrong = is_mislabelled.to(suspicion.device)[counts]
    if wrong.all() or not wrong.any():
        return torch.tensor(torch.nan, dtype=torch.float64)
    # Ranks in (0, 1], for `binary_auroc` passes other numbers through a sigmoid, where large ones become equal.
    ranks = average_ranks(suspicion[counts]) / len(wrong)
    return binary_auroc(ranks, wrong.long())


class MislabelAUROC(Metric):
    """`mislabel_auroc` over batches of training examples; `update(suspicion, is_mislabelled)`.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = MislabelAUROC()
        >>> metric.update(torch.tensor([120.0, 3.0]), torch.tensor([True, False]))
        >>> metric.update(torch.tensor([90.0]), torch.tensor([False]))
        >>> metric.compute().item()
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    suspicion: list[Tensor]
    wrong: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("suspicion", [], dist_reduce_fx="cat")
        self.add_state("wrong", [], dist_reduce_fx="cat")

    def update(self, suspicion: Tensor, is_mislabelled: Tensor) -> None:
        """Add some training examples."""
        check_shape(suspicion, "suspicion", ("N",))
        check_shape(is_mislabelled, "is_mislabelled", (len(suspicion),))
        # Both of the metric's own dtype: a process without any example joins with an empty tensor of it.
        self.suspicion.append(suspicion.to(self.device, self.dtype))
        self.wrong.append(is_mislabelled.to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """The area for all examples so far; NaN before there are labels of both kinds."""
        if isinstance(self.suspicion, list) and not self.suspicion:
            return torch.tensor(torch.nan, dtype=torch.float64)
        suspicion, wrong = (torch.cat(s) if isinstance(s, list) else s for s in (self.suspicion, self.wrong))
        return mislabel_auroc(suspicion, wrong.bool())

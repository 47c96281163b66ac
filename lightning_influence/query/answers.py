"""What questions return."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor


class Attribution(NamedTuple):
    """The training examples that speak loudest for each query.

    Args:
        indices: dataset indices, int64 [q, k], best first.
        scores: their scores, [q, k], in the measurement's units times the number of training
            examples; positive: up-weighting the example raises the measurement (a proponent).
    """

    indices: Tensor
    scores: Tensor


class GroupAttribution(NamedTuple):
    """What groups of training examples add up to for each query.

    Args:
        groups: their names; labels in ascending order, or the mapping's keys in its order.
        scores: sums of their examples' scores, [q, groups]; NaN for a group without a valid row.
        removal_effects: predicted change of the measurement if the group were removed, [q, groups], as
            `removal_effect`; None if the weights of `segments` do not sum to 1, so that it has no scale.
        counts: how many examples of each have a valid row and so are in its sum, int64 [groups].
    """

    groups: list[Hashable]
    scores: Tensor
    removal_effects: Tensor | None
    counts: Tensor

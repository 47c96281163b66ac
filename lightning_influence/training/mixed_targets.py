"""Mixed targets in a batch: they give away mixing that happens before `training_step`, as in a `collate_fn`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2  # of a row's norm, or of a target's weight
NO_INDEX = "The gradient of a mixed example belongs to no one index of the dataset."
REMEDY = (
    "Turn the mixing off in the captured epochs (the last one, by default), or augment each example by itself, in "
    "the dataset."
)


class Mixing(NamedTuple):
    """What was found.

    Args:
        is_certain: rows are made of several examples; if not, rows can be had but may not mean what they should.
        text: what was found and what to do.
    """

    is_certain: bool
    text: str


def find_mixed_targets(batch: Any, n: int) -> Mixing | None:
    """Targets [n, classes] in a batch, each of at most two classes, as mixup makes them; None if there are none.

    It is certain if the weights of the two classes are the same in all rows that have two, and a permutation of
    the examples explains them: then the sum of each class's column is a whole number. Fewer than three classes
    tell nothing.
    """
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    for tensor in tensors:
        shares = _class_shares(tensor, n)
        if shares is None:
            continue
        found = (
            f"Targets of shape {tuple(tensor.shape)} in the batch have two classes whose weights add up to 1, as "
            "mixup and cutmix make them in a `collate_fn` or in a hook"
        )
        if _are_of_a_permutation(shares, tolerance_of(tensor.dtype)):
            return Mixing(
                True,
                f"{found}: all the same two weights, as of one permutation of the batch. {NO_INDEX} {REMEDY} If "
                "these are the dataset's own targets, let a batch hold their classes and weights, and make one "
                "tensor of them in `training_step`.",
            )
        return Mixing(False, f"{found}. If so, rows are wrong: {NO_INDEX} {REMEDY}")
    return None


def tolerance_of(dtype: torch.dtype) -> float:
    """How far values may be off by rounding, relative to their norm."""
    if not dtype.is_floating_point:
        return 0.0
    return HALF_TOLERANCE if dtype in (torch.float16, torch.bfloat16) else TOLERANCE


def _class_shares(targets: Tensor, n: int) -> Tensor | None:
    """Targets [n, classes > 2] without their label smoothing, if none has more than two classes and one has."""
    if not (targets.is_floating_point() and targets.ndim == 2 and len(targets) == n and targets.shape[1] > 2):
        return None
    tolerance, classes = tolerance_of(targets.dtype), targets.shape[1]
    targets = targets.detach().double().cpu()
    smoothed = float(targets.min())  # the weight of a class that is not the example's
    if not 0 <= smoothed < 0.5 / classes or not bool(((targets.sum(1) - 1).abs() < tolerance).all()):
        return None
    if smoothed and classes < 4:  # any three weights are two and a smallest one
        return None
    shares = (targets - smoothed) / (1 - classes * smoothed)
    return shares if int((shares > tolerance).sum(1).max()) == 2 else None


def _are_of_a_permutation(shares: Tensor, tolerance: float) -> bool:
    """Whether shares [n, classes] are l * targets + (1 - l) * permuted targets, with one l for all."""
    largest = shares[(shares > tolerance).sum(1) == 2].max(1).values
    has_one_weight = float(largest.max() - largest.min()) < tolerance and float(largest.min()) > 0.5 + tolerance
    sums = shares.sum(0)
    return len(largest) > 2 and has_one_weight and bool(((sums - sums.round()).abs() < tolerance).all())

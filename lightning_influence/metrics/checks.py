"""What the measures refuse: arguments whose shapes do not fit, and numbers that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor


def check_scores(scores: Tensor, argument: str = "scores") -> None:
    """Refuse anything but finite floating-point scores [q, N].

    Raises:
        ValueError: if the shape is another, or a score is NaN or infinite.
    """
    check_shape(scores, argument, ("q", "N"))
    check_finite(
        scores, argument, "examples without a valid row have NaN; pass `scores.nan_to_num()` to count them as 0"
    )


def check_groups(groups: Tensor, num_examples: int, argument: str) -> None:
    """Refuse anything but a mask of groups [m, N] of at least two groups.

    Raises:
        TypeError: if it is not boolean.
        ValueError: if the shape is another.
    """
    if groups.dtype != torch.bool:
        raise TypeError(
            f"`{argument}` must be a boolean mask [m, N], got {groups.dtype} {tuple(groups.shape)}; of indices, "
            "make one with `torch.zeros(m, N, dtype=torch.bool).scatter(1, indices, True)`."
        )
    check_shape(groups, argument, ("m", num_examples))
    if len(groups) < 2:
        raise ValueError(f"`{argument}` must hold at least two groups to compare, got {len(groups)}.")


def check_measured(values: Tensor, argument: str, num_groups: int, num_queries: int) -> None:
    """Refuse anything but finite measurements [m, q].

    Raises:
        ValueError: if the shape is another, or one is NaN or infinite.
    """
    check_shape(values, argument, (num_groups, num_queries))
    check_finite(values, argument, "leave out the models that have failed, or the queries that they failed at")


def check_shape(values: Tensor, argument: str, expected: tuple[int | str, ...]) -> None:
    """Refuse another shape than the one expected; letters stand for any size.

    Raises:
        ValueError: if the shape is another.
    """
    fits = len(expected) == values.ndim and all(
        isinstance(want, str) or want == size for want, size in zip(expected, values.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"`{argument}` must have shape [{wanted}], got {list(values.shape)}.")


def check_finite(values: Tensor, argument: str, advice: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: if there are any.
    """
    count = int((~values.isfinite()).sum())
    if count:
        raise ValueError(f"`{argument}`: {count} of {values.numel()} values are not finite; {advice}.")

"""From the loss calls of a step to the factor that turns its gradients into per-example ones.

The definitions are stated in `lightning_influence.losses.functions`. With several calls in a step
the weights relative to one another are kept, and the first call's scale is taken out of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses.call import LossCall
from lightning_influence.losses.functions import recognised_names
from lightning_influence.losses.reading import LossReading, read_call

DECLARE = (
    'pass `loss="mean"` or `loss="sum"` to declare whether the back-propagated value is the mean '
    "or the sum over the batch's examples"
)


@dataclass(frozen=True, eq=False)
class LossScale:
    """How the gradients of one step relate to those of its examples' own losses.

    Args:
        factor: gradient of l_n = g * factor; a scalar, or of shape [n] for unreduced losses;
            float64 if the loss is, else float32. Not finite where no gradient can be had: an
            overflow, an example of weight zero, a batch whose positions are all ignored.
        losses: per-example losses l_n, shape [n], of the factor's dtype, detached; of several
            calls their weighted sum. NaN where unknown.
        labels: the first call's class of each example, shape [n], int64, else None.
        describe: makes `description`, which is wanted of one step only.
        is_flattened: whether the losses' first dimension counts positions too, of which those of an example
            are taken to be together.
    """

    factor: Tensor
    losses: Tensor
    labels: Tensor | None
    describe: Callable[[], dict[str, object]]
    is_flattened: bool = False

    def of_positions_first(self) -> LossScale:
        """The scale if positions come before examples, so that flattened losses are not those of examples.

        Raises:
            LossNotRecognizedError: if each position has a factor of its own.
        """
        if not self.is_flattened:
            return self
        if self.factor.ndim:
            raise LossNotRecognizedError(
                "Unreduced losses were flattened with positions first, so it is not known which of them are an "
                "example's; put the batch first before the loss, or let the loss function reduce."
            )
        return replace(self, losses=torch.full_like(self.losses, math.nan))

    def of_examples(self, kept: Tensor) -> LossScale:
        """The scale of some of the examples, by a mask [n]."""
        labels = None if self.labels is None else self.labels[kept.to(self.labels.device)]
        factor = self.factor[kept.to(self.factor.device)] if self.factor.ndim else self.factor
        losses = self.losses[kept.to(self.losses.device)]
        return replace(self, factor=factor, losses=losses, labels=labels)

    @property
    def description(self) -> dict[str, object]:
        """For the file, in plain builtins.

        Function, reduction, count, the constant |c| (its largest entry for unreduced losses), and, for
        each call, `terms` with its weight relative to the first's magnitude.
        """
        return self.describe()


def declared_scale(kind: Literal["mean", "sum"], n: int, backpropagated_factor: float) -> LossScale:
    """The scale when the user declares what the back-propagated value is.

    Args:
        kind: "mean" or "sum" over the examples of the batch.
        n: number of examples in the batch.
        backpropagated_factor: what the loss was multiplied by on its way to `backward`: 1 over the
            gradient accumulation, times the AMP scale.

    Raises:
        ValueError: `kind` is neither, or `n` is not positive.

    Example:
        >>> declared_scale("mean", 8, 0.5).factor
        tensor(16.)
    """
    if kind not in ("mean", "sum"):
        raise ValueError(f'`loss` must be "mean" or "sum" when it is declared, got {kind!r}.')
    _check_examples(n)
    count = float(n if kind == "mean" else 1)
    constant = abs(backpropagated_factor)
    description: dict[str, object] = {
        "function": "declared",
        "reduction": kind,
        "count": count,
        "constant": constant,
    }
    factor = _divide(count, torch.tensor(constant, dtype=torch.float32))
    return LossScale(factor, torch.full((n,), math.nan, dtype=torch.float32), None, lambda: description)


@torch.no_grad()
def scale_of_calls(calls: list[LossCall], n: int) -> LossScale:
    """The scale of a step from its recorded calls, in the order in which they were made.

    Args:
        calls: the calls; those that no backward reached, or with weight zero, do not count.
        n: number of examples in the step.

    Raises:
        LossNotRecognizedError: no call counts, or their scales cannot be combined.
        ValueError: `n` is not positive.
    """
    _check_examples(n)
    weighed = weighed_readings(calls, n)
    readings, weights = [reading for _, reading, _ in weighed], [weight for _, _, weight in weighed]
    first = readings[0]

    dtype = torch.promote_types(first.constant.dtype, torch.float32)
    factor = _divide(first.count, first.constant.abs().to(dtype))
    if first.is_ignored is not None:
        factor = factor.where((first.constant != 0) | ~first.is_ignored, 0)
    sign = first.constant.sign()
    losses = first.losses * sign  # its own weight is 1
    for reading, weight in zip(readings[1:], weights[1:], strict=True):
        losses = losses + sign * weight * reading.losses
    if first.reduction == "none":
        losses = losses.where(factor.isfinite(), math.nan)
    is_flattened = any(reading.is_flattened for reading in readings)
    return LossScale(factor, losses.to(dtype), first.labels, partial(_describe, readings, weights), is_flattened)


def weighed_readings(calls: list[LossCall], n: int) -> list[tuple[LossCall, LossReading, float]]:
    """The calls that took part in a backward, what they say, and their weights relative to the first's.

    Raises:
        LossNotRecognizedError: no call counts, or their scales cannot be combined.
    """
    found = [(call, read_call(call, n)) for call in _counting(calls)]
    return [(call, reading, _relative_weight(reading, found[0][1])) for call, reading in found]


def _counting(calls: list[LossCall]) -> list[LossCall]:
    """The calls that took part in a backward; of weight zero only if unreduced and alone."""
    reached = [call for call in calls if call.constant is not None]
    counting = [call for call in reached if call.constant is not None and call.constant.any()]
    # A batch that is masked out as a whole is no reason to stop: its rows get no finite factor.
    counting = counting or [c for c in reached if c.constant is not None and c.constant.ndim]
    if counting:
        return counting
    seen = ", ".join(dict.fromkeys(call.name for call in calls)) or "none was called"
    reason = "with weight zero only" if reached else f"(seen in the forward: {seen})"
    raise LossNotRecognizedError(
        f"No recognised loss took part in a backward of this step {reason}. Recognised are these "
        f"functions of torch.nn.functional and their modules: {recognised_names()}. For any other "
        f"loss {DECLARE}."
    )


def _relative_weight(reading: LossReading, first: LossReading) -> float:
    """Weight of a call relative to the first; refuses what could change from batch to batch."""
    if reading is first:
        return 1.0
    c, c_first = reading.unreduced_constant, first.unreduced_constant
    if c.shape == c_first.shape and math.isclose(reading.count, first.count, rel_tol=1e-5):
        largest = c_first.abs().argmax()
        ratio = c.flatten()[largest] / c_first.flatten()[largest]
        # NaN and infinity, from an overflow, pass: their factor says that there is no gradient.
        tolerance = 1e-5 * c.abs().max()
        if not bool(((c - ratio * c_first).abs() > tolerance).any()):
            return float(ratio)
    raise LossNotRecognizedError(
        f"{first} and {reading} were back-propagated in one step, but average over different "
        "counts or masks, so their relative weight would change from batch to batch. Give both "
        f"the same reduction over the same examples, or {DECLARE}."
    )


def _describe(readings: list[LossReading], weights: list[float]) -> dict[str, object]:
    first = readings[0]
    c = first.unreduced_constant.flatten()
    largest = float(c[c.abs().argmax()])
    terms = [
        {
            "function": reading.name,
            "reduction": reading.reduction,
            "weight": math.copysign(1.0, largest) * weight,
        }
        for reading, weight in zip(readings, weights, strict=True)
    ]
    return {
        "function": first.name,
        "reduction": first.reduction,
        "count": first.count,
        "constant": abs(largest),
        "terms": terms,
    }


def _divide(count: float, constant: Tensor) -> Tensor:
    """`count / constant`, NaN unless both are positive and finite."""
    if constant.ndim == 0:  # the usual case, in one operation instead of seven
        c = float(constant)
        return constant.new_tensor(count / c if count > 0 and 0 < c < math.inf else math.nan)
    factor = count / constant
    return factor.where((constant > 0) & constant.isfinite() & (factor > 0), math.nan)


def _check_examples(n: int) -> None:
    if n < 1:
        raise ValueError(f"`n`, the number of examples in the step, must be positive, got {n}.")

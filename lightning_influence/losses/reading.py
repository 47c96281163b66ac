"""Reading a recorded call: the per-example losses, the count and the constant of each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses.call import LossCall, at_least_float32
from lightning_influence.losses.functions import RULES, Arguments


@dataclass(frozen=True, eq=False)
class LossReading:
    """What a call says about each of the n examples.

    Args:
        name: name of the function.
        reduction: its reduction, legacy arguments resolved.
        count: what the reduction divides the sum of `losses` by.
        losses: per-example losses, shape [n].
        constant: c, a scalar, or c_n of shape [n] under `reduction="none"`.
        unreduced_constant: c as recorded: a scalar, or of the loss's shape.
        is_ignored: whether all positions of the example are ignored ones, shape [n].
        labels: one class per example if that is what the targets are, shape [n], int64.
        is_flattened: whether the first dimension counts more than the examples, which are taken to be together.
    """

    name: str
    reduction: str
    count: float
    losses: Tensor
    constant: Tensor
    unreduced_constant: Tensor
    is_ignored: Tensor | None
    labels: Tensor | None
    is_flattened: bool

    def __str__(self) -> str:
        return f"{self.name} (reduction {self.reduction!r}, count {self.count:g})"


@torch.no_grad()
def read_call(call: LossCall, n: int) -> LossReading:
    """Works out the per-example losses and the count of a call that a backward reached."""
    assert call.constant is not None
    rule, arguments = RULES[call.function], call.arguments()
    reduction = _resolve_reduction(arguments, call.name)
    values = call.function(**(arguments | {"reduction": "none"}))
    rows = _split(values, arguments["input"], n, call.name)  # [n, s]

    constant = at_least_float32(call.constant)
    unreduced_constant = constant
    if reduction == "none":
        element_constants = constant.reshape(n, -1)
        constant = _one_per_example(element_constants, call.name)
        rows = rows.where(element_constants != 0, 0)

    is_mean_of_elements = reduction == "mean" and not rule.has_classes
    losses = rows.mean(dim=1) if is_mean_of_elements else rows.sum(dim=1)
    count = 1.0
    if reduction == "mean":
        count = rule.divisor(arguments, values) / (rows.shape[1] if is_mean_of_elements else 1)
    elif reduction == "batchmean":
        count = float(arguments["input"].shape[0]) if arguments["input"].ndim else 1.0

    is_ignored, labels, target = None, None, arguments["target"]
    if rule.has_classes and not target.is_floating_point():
        if reduction == "none":
            is_ignored = (target == arguments["ignore_index"]).reshape(n, -1).all(dim=1)
        labels = target.reshape(n).to(torch.int64, copy=True) if target.numel() == n else None
    is_flattened = values.ndim > 0 and len(values) > n
    return LossReading(
        call.name, reduction, count, losses, constant, unreduced_constant, is_ignored, labels, is_flattened
    )


def _resolve_reduction(arguments: Arguments, name: str) -> str:
    """The reduction in force; takes the legacy `size_average` and `reduce` out of `arguments`."""
    reduction: str = arguments["reduction"]
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        if reduction != "mean":
            raise LossNotRecognizedError(
                f"{name} got `reduction={reduction!r}` beside the legacy `size_average` or "
                "`reduce`; pass `reduction` alone."
            )
        means = size_average is None or size_average
        reduction = "none" if reduce is not None and not reduce else "mean" if means else "sum"
    if reduction not in ("mean", "sum", "none", "batchmean"):
        raise LossNotRecognizedError(
            f"`reduction` of {name} must be 'mean', 'sum', 'none' or 'batchmean', got {reduction!r}."
        )
    return reduction


def _split(values: Tensor, inputs: Tensor, n: int, name: str) -> Tensor:
    """Unreduced values as [n, s]: each example's positions in a row."""
    first = values.shape[0] if values.ndim else 1
    # Broadcasting can put the target's examples first: then rows of `values` are not examples.
    is_batch_first = values.ndim == 0 or (inputs.shape[:1] == values.shape[:1] and inputs.ndim >= values.ndim)
    if first == 0 or first % n or not is_batch_first:
        raise LossNotRecognizedError(
            f"{name} was called with `input` of shape {tuple(inputs.shape)} and gave losses of "
            f"shape {tuple(values.shape)}, which do not split into the {n} examples of the step; "
            "their first dimension must be the examples, or a multiple of them. Reshape the "
            'arguments, or declare `loss="mean"` or `loss="sum"`.'
        )
    return values.reshape(n, -1)


def _one_per_example(constants: Tensor, name: str) -> Tensor:
    """The value that the non-zero entries of each row share, shape [n]; 0 if there are none."""
    largest = constants.gather(1, constants.abs().argmax(dim=1, keepdim=True))  # [n, 1]
    tolerance = 8 * torch.finfo(constants.dtype).eps * largest.abs()
    differs = (constants != 0) & ((constants - largest).abs() > tolerance)
    if bool(differs.any()):
        raise LossNotRecognizedError(
            f"The unreduced losses of {name} enter with different weights within one example "
            f"(example {int(differs.any(dim=1).int().argmax())}), so its loss is not "
            f"{name}'s own; weights may differ between examples, or be zero. Weigh the examples "
            'instead, or declare `loss="mean"` or `loss="sum"`.'
        )
    return largest.squeeze(1)

"""The recognised loss functions, and what each one's reductions mean for a single example.

A layer's hook sees g, the gradient of whatever was back-propagated. To undo the reduction, the
gradient accumulation, the AMP scale and the user's constants, two things must be known: c, the
derivative of the back-propagated value with respect to the loss function's value (a tensor hook
records it), and what that value is made of. The definitions, used everywhere in this package:

- The loss l_n of example n is the function's own value for that example.
  `cross_entropy`, `nll_loss`: the *sum* over the example's positions (tokens, pixels), class
  weights, label smoothing and ignored positions included as the function itself does.
  Element-wise functions: the *mean* over the example's elements under `reduction="mean"`, their
  *sum* under `"sum"`, `"batchmean"` and `"none"`.
- `count` is what the reduction divides the sum of all l_n by, so that the gradient of l_n is
  `g * count / |c|`. Mean of classes: number of positions that are not ignored, or the sum of
  their class weights; element-wise mean: number of examples; `"batchmean"`: size of the input's
  first dimension; `"sum"` and `"none"`: 1.
- Under `"none"` c has the loss's shape. The elements of an example must share one value c_n,
  apart from zeros: those are masked and belong to no example's loss.
- The sign of c stays in g: if a loss is maximised, the gradient is that of its negative.

The rows of an example are contiguous: the first dimension is n, or a multiple of n that
`reshape(n, -1)` splits into examples, as in logits of shape [n * s, o].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class LossRule:
    """What one loss function's `reduction="mean"` does.

    Args:
        divisor: what the mean divides the sum of all elements by, from the bound arguments and
            the unreduced values.
        has_classes: the targets are classes; an example's loss is a sum over its positions.
    """

    divisor: Callable[[Arguments, Tensor], float]
    has_classes: bool = False


def _number_of_elements(arguments: Arguments, values: Tensor) -> float:
    return float(values.numel())


def _sum_of_weights(arguments: Arguments, values: Tensor) -> float:
    """A weighted mean; `weight` has the input's shape (torch checks that)."""
    weight = arguments.get("weight")  # older torch has none for `l1_loss`
    return float(values.numel()) if weight is None else float(weight.sum())


def _sum_of_class_weights(arguments: Arguments, values: Tensor) -> float:
    target, weight = arguments["target"], arguments["weight"]
    if target.is_floating_point():  # class probabilities: torch divides by the positions alone
        return float(values.numel())
    is_kept = target != arguments["ignore_index"]
    return float(is_kept.sum()) if weight is None else float(weight[target[is_kept]].sum())


CLASSES = LossRule(_sum_of_class_weights, has_classes=True)
ELEMENTS = LossRule(_number_of_elements)
WEIGHTED_ELEMENTS = LossRule(_sum_of_weights)

RULES: dict[Callable[..., Any], LossRule] = {
    F.cross_entropy: CLASSES,
    F.nll_loss: CLASSES,
    F.mse_loss: WEIGHTED_ELEMENTS,
    F.l1_loss: WEIGHTED_ELEMENTS,
    F.smooth_l1_loss: ELEMENTS,
    F.huber_loss: ELEMENTS,  # its mean divides by the elements even with a weight
    F.binary_cross_entropy: ELEMENTS,
    F.binary_cross_entropy_with_logits: ELEMENTS,
    F.kl_div: ELEMENTS,
    F.gaussian_nll_loss: ELEMENTS,
    F.poisson_nll_loss: ELEMENTS,
}


def recognised_names() -> str:
    """The recognised functions, for messages."""
    return ", ".join(function.__name__ for function in RULES)

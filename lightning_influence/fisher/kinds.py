"""Which labels the Fisher's gradients are of, and how a file says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.losses import Predictive

FisherKind = Literal["empirical", "sampled", "exact"]
EXACT_PULLS = 64  # at most, each of which costs a backward
Pulls = list[tuple[Tensor, Tensor]]  # predictions, and gradients at them


@dataclass(frozen=True)
class LabelSource:
    """Where labels come from, besides the training set.

    Args:
        kind: "sampled" or "exact".
        samples: labels drawn for each example, for "sampled".
    """

    kind: FisherKind
    samples: int = 1

    def pulls(self, predictives: list[Predictive], generator: torch.Generator) -> Iterator[Pulls]:
        """Gradients at a step's predictions; the mean of their squares over all is the Fisher's.

        Args:
            predictives: of the losses that the step's is made of.
            generator: of the draws, on the predictions' device.

        Raises:
            UnsupportedTrainingError: if exact labels would be too many, or it is not known whose they are.
        """
        if self.kind == "sampled":
            for _ in range(self.samples):
                yield [(each.prediction, each.sampled(generator)) for each in predictives]
            return
        total = self.passes(predictives)
        for each in predictives:
            for j in range(each.pulls):
                yield [(each.prediction, each.exact(j) * total**0.5)]

    def passes(self, predictives: list[Predictive]) -> int:
        """How many backwards a step takes."""
        if self.kind == "sampled":
            return self.samples
        total = sum(each.pulls for each in predictives)
        if total > EXACT_PULLS:
            raise UnsupportedTrainingError(
                f'`fisher="exact"` would take {total} backwards a step, one for each class (or number) that the '
                f'model predicts of an example, and {EXACT_PULLS} are the most; pass `fisher="sampled"`, whose '
                "`fisher_samples` says how many labels are drawn instead."
            )
        if any(each.is_flattened for each in predictives):
            raise UnsupportedTrainingError(
                'The loss gets positions and examples in one dimension, so that `fisher="exact"` does not know '
                "which are an example's; give it a prediction of shape [n, classes, positions], or pass "
                '`fisher="sampled"`.'
            )
        return total


def describe_fisher(facts: Mapping[str, Any]) -> str:
    """What the attributes of a file say, in a few words."""
    kind, text = facts.get("fisher", "empirical"), ""
    if kind == "sampled":
        labels = facts["fisher_samples"]
        text = f"{labels} label{'s' if labels > 1 else ''} an example"
    if kind != "empirical" and "effective_samples_S" in facts:
        sizes = f"{facts['effective_samples_S']:,.0f} of S and {facts['effective_samples_Lambda']:,.0f} of Lambda"
        text += f"{'; ' if text else ''}effective sample sizes {sizes}, of the layer with the smallest"
    return f"{kind} Fisher" + (f" ({text})" if text else "")

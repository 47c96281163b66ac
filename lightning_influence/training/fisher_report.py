"""What a file and the user are told of a Fisher whose labels are not the training set's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_influence.fisher import LabelFactors, LabelSource, describe_fisher


@dataclass(frozen=True)
class LabelCost:
    """What passes under other labels took, in this process.

    Args:
        seconds: of the passes and of what is made of their gradients.
        whole_seconds: of what they were part of.
        whole: what that is.
    """

    seconds: float
    whole_seconds: float
    whole: Literal["epoch", "sweep"] = "epoch"

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.seconds / max(self.whole_seconds, 1e-9):.0%} of the {self.whole}"


def fisher_attributes(source: LabelSource | None, labels: LabelFactors | None) -> dict[str, Any]:
    """For the root of a file, after the factors were made."""
    if source is None or labels is None:
        return {"fisher": "empirical"}
    sizes = labels.effective_sizes()
    smallest = {side: min(size[side] for size in sizes.values()) for side in ("S", "Lambda")}
    return {
        "fisher": source.kind,
        "fisher_samples": source.samples if source.kind == "sampled" else 0,
        **{f"effective_samples_{side}": value for side, value in smallest.items()},
    }


def fisher_document(
    source: LabelSource | None, labels: LabelFactors | None, cost: LabelCost
) -> Mapping[str, dict[str, Any]]:
    """By layer, and what it cost; nothing with the training labels."""
    if source is None or labels is None:
        return {}
    return {
        "fisher": {
            "seconds": cost.seconds,
            f"{cost.whole}_seconds": cost.whole_seconds,
            "effective_samples": labels.effective_sizes(),
        }
    }


def report_labels(source: LabelSource | None, labels: LabelFactors | None, cost: LabelCost) -> None:
    """One line with the cost."""
    if source is not None and labels is not None:
        text = describe_fisher(fisher_attributes(source, labels))
        rank_zero_info(f"InfluenceCallback: {text}; the passes of its labels took {cost}")

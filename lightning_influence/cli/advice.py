"""Which damping to ask a file with, as plain values and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_influence.cli.dampings import argument_of
from lightning_influence.errors import InfluenceError
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader


def advice_of(store: StoreReader) -> dict[str, Any]:
    """The advice of `recommend_damping`, in plain values.

    Returns:
        `advised`, the rule as it is written in Python; `as_argument`, what `--damping` takes for it; its `reason`;
        and `spearman_at_factor`: by factors of `HeuristicDamping`, how scores correlate with those at the advised
        one. Of a file whose layers cannot be read, `advised` is None, and the `reason` says why.
    """
    try:
        advice = InfluenceQuery(store).recommend_damping()
    except InfluenceError as error:
        return {"advised": None, "as_argument": None, "reason": str(error), "spearman_at_factor": {}}
    return {
        "advised": str(advice.damping),
        "as_argument": argument_of(advice.damping),
        "reason": advice.reason,
        "spearman_at_factor": {f"{factor:g}": value for factor, value in advice.sensitivity.items()},
    }


def text_of(found: Mapping[str, Any]) -> str:
    """The advice for people, below the other facts."""
    if found["advised"] is None:
        return f"  damping: no advice: {found['reason']}"
    reason, _, _ = found["reason"].partition(". ")
    rules = "  ".join(f"{factor}*mean {value:.3f}" for factor, value in found["spearman_at_factor"].items())
    return (
        f"  damping: --damping {found['as_argument']} is advised, {reason.rstrip('.')}\n"
        f"    Spearman of its scores with those at  {rules}"
    )

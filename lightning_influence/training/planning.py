"""How layers are stored, found out from the first batch, the same in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_influence.layer_plan import CodecName, LayerPlan, plan_layers
from lightning_influence.processes import Processes
from lightning_influence.training.batch_capture import CapturedBatch
from lightning_influence.training.tracking import LayerTracking


def agree_on_plans(
    batch: CapturedBatch | None, tracking: LayerTracking, codec: CodecName, processes: Processes
) -> dict[str, LayerPlan]:
    """The plans of the layers that every process can capture; none if no process has had a backward.

    Args:
        batch: of this process; None if it had no backward.
        tracking: the layers that this process can capture, and then those of all.
        codec: that was asked for.
        processes: that train together.
    """
    with processes.together():
        own = plan_layers(tracking.layers, batch.step.gradients, codec) if batch else None
    known = [plans for plans in processes.gather(own) if plans is not None]
    plans = _common(known) if known else {}
    if plans and not processes.is_alone:
        with processes.together():
            tracking.agree(plans)
    return plans


def _common(plans: Sequence[Mapping[str, LayerPlan]]) -> dict[str, LayerPlan]:
    """The layers that all have, with room for the longest example that any has seen."""
    first, *others = plans
    return {
        name: replace(plan, positions=max([plan.positions, *(other[name].positions for other in others)]))
        for name, plan in first.items()
        if all(name in other for other in others)
    }

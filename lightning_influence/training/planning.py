"""How layers are stored, found out from the first batch, the same in all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.layer_plan import LayerPlan, plan_layers, plan_whole_gradients
from lightning_influence.processes import Processes
from lightning_influence.training import report
from lightning_influence.training.batch_capture import CapturedBatch
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.tracking import LayerTracking


def agree_on_plans(
    batch: CapturedBatch | None,
    tracking: LayerTracking,
    options: CaptureOptions,
    processes: Processes,
    *,
    num_examples: int | None,
    when: str,
) -> dict[str, LayerPlan]:
    """The plans of the layers that every process can capture; none if no process has had a backward.

    Args:
        batch: of this process; None if it had no backward.
        tracking: the layers that this process can capture, and then those of all.
        options: what the user asked for, and is now told.
        processes: that train together.
        num_examples: length of the dataset.
        when: what is captured, in words.

    Raises:
        UnsupportedTrainingError: if the dataset has no length.
    """
    with processes.together():
        if num_examples is None:
            raise UnsupportedTrainingError(
                "The training dataset has no length, so its rows have no place; give it a `__len__`, or pass "
                "`num_examples=`."
            )
        own = _plans(tracking, batch, options) if batch else None
    known = [plans for plans in processes.gather(own) if plans is not None]
    if not known:
        return {}
    with processes.together():
        plans = _common(known)
        if not processes.is_alone:
            tracking.agree(plans)
        if batch is not None:
            report.warn_of_weights(batch.step.scale.factor)
        report.announce(
            options,
            plans,
            tracking.coverage,
            when=when,
            num_examples=num_examples,
        )
    return plans


def _plans(tracking: LayerTracking, batch: CapturedBatch, options: CaptureOptions) -> dict[str, LayerPlan]:
    if options.merges:
        return plan_whole_gradients(tracking.layers, batch.step.gradients, options.codec)
    return plan_layers(tracking.layers, batch.step.gradients, options.codec, options.error_budget)


def _common(plans: Sequence[Mapping[str, LayerPlan]]) -> dict[str, LayerPlan]:
    """The layers that all have, with room for the longest example that any has seen."""
    first, *others = plans
    return {
        name: replace(plan, positions=max([plan.positions, *(other[name].positions for other in others)]))
        for name, plan in first.items()
        if all(name in other for other in others)
    }

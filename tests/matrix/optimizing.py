"""Precision, optimization and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.integration.models import Checkpointed, ManualTask, float16
from tests.matrix import models
from tests.matrix.situation import BFLOAT16, FLOAT16, INT8, Expected, Situation, refused


def overflowing() -> dict[str, Any]:
    """The first step's scaled gradients are infinite in float16; the next scale, 2^10, fits."""
    return {**float16(init_scale=2.0**40, backoff_factor=2.0**-30), "max_epochs": 1}


def float16_with_accumulation() -> dict[str, Any]:
    """Two scales at once."""
    return {**float16(), "accumulate_grad_batches": 4}


def checkpointed() -> Checkpointed:
    """The newer kind."""
    return Checkpointed(use_reentrant=False)


def checkpointed_reentrant() -> Checkpointed:
    """The older kind."""
    return Checkpointed(use_reentrant=True)


HALF = Expected(tolerance=FLOAT16, factors=FLOAT16)
BRAIN = Expected(tolerance=BFLOAT16, factors=BFLOAT16)

OPTIMIZING = [
    Situation("plain 32-bit", is_quick=True),
    Situation("codec pairs (int8)", Expected(tolerance=INT8, factors=2e-2), influence={"codec": "pairs"}),
    Situation("codec eigen", Expected(tolerance=INT8), influence={"codec": "eigen"}, is_quick=True),
    Situation("bf16-mixed", BRAIN, trainer=partial(dict, precision="bf16-mixed")),
    Situation("bf16-true", BRAIN, trainer=partial(dict, precision="bf16-true")),
    Situation("16-mixed", HALF, trainer=float16),
    Situation("16-mixed, accumulated", HALF, trainer=float16_with_accumulation),
    Situation(
        "16-mixed, first step overflows",
        Expected("epoch 0", "22/0/4", "4 rows have non-finite gradients", FLOAT16, FLOAT16),
        trainer=overflowing,
        is_quick=True,
    ),
    Situation("64-true", trainer=partial(dict, precision="64-true")),
    Situation("accumulation, short last window", trainer=partial(dict, accumulate_grad_batches=4)),
    Situation("clipping", trainer=partial(dict, gradient_clip_val=1e-3)),
    Situation(
        "clipping and accumulation", trainer=partial(dict, gradient_clip_val=0.1, accumulate_grad_batches=4)
    ),
    Situation("manual optimization", task=ManualTask),
    Situation("several optimizers, one backward", task=models.TwoOptimizersTask),
    Situation(
        "GAN",
        task=models.AdversarialTask,
        net=models.Adversaries,
        loss=models.both_losses,
        own=models.both_losses_sum,
        is_quick=True,
    ),
    Situation(
        "GAN without toggle_optimizer",
        Expected(said="net.judge.*toggle_optimizer"),
        task=models.UntoggledTask,
        net=models.Adversaries,
        loss=models.both_losses,
        own=models.both_losses_sum,
        check=models.the_judge_is_left_out,
    ),
    Situation("LBFGS", refused("calls its closure once"), task=models.LBFGSTask),
    Situation("no loss for some batches", Expected(rows="18/4/0"), task=models.SkippingTask, is_quick=True),
    Situation("several losses", loss=models.two_terms, own=models.two_terms_sum),
    Situation("gradient checkpointing", net=checkpointed),
    Situation("gradient checkpointing, reentrant", net=checkpointed_reentrant),
    Situation("compiled LightningModule", wrap=models.compiled),
    Situation("compiled net", task=models.CompiledNetTask),
    Situation("compiled layer", task=models.CompiledLayerTask),
    Situation("Module.compile()", task=models.CompiledInPlaceTask),
]

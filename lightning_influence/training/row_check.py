"""Telling a batch's examples from other rows, once a run.

A layer's first dimension may be as long as the batch by chance: positions come first
(`batch_first=False`), or the layer runs on something else than the batch (a table of labels). The
shapes do not say, and the sum over rows is the same. So a copy of the model is asked about the first
batch without its last example: every layer must then see one row fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.training.asking import copy_to_ask, kept_random_states, rows_seen


def layers_of_other_rows(
    trainer: Trainer,
    model: LightningModule,
    layers: Mapping[str, TrackedLayer],
    gradients: Mapping[str, LayerGradient],
    batch: Any,
) -> dict[str, str]:
    """Layers whose rows are not the batch's examples, each with the reason to leave it out.

    Where the model cannot be asked, a warning names the layers whose shapes leave a doubt.

    Args:
        trainer: whose precision is used.
        model: in training; a copy of it is asked, in eval mode.
        layers: the tracked layers.
        gradients: theirs, for the batch.
        batch: n examples, in the first dimension of its tensors.
    """
    n = len(next(iter(gradients.values())))
    if n < 2:
        return {}
    try:
        if not model.automatic_optimization:
            raise QueryError("its `training_step` optimizes by itself")
        with kept_random_states(), trainer.precision_plugin.forward_context():
            seen = rows_seen(*copy_to_ask(model, layers), _without_last_example(batch, n))
    except Exception as error:  # the user's code runs here, in a way it may not be made for
        doubtful = [name for name, g in gradients.items() if g.positions > 1 and g.positions % n == 0]
        if doubtful:
            rank_zero_warn(
                f"InfluenceCallback: the inputs of {', '.join(doubtful)} have as many positions as the batch has "
                f"examples ({n}), or a multiple. They are taken to have the examples first, which could not be "
                f"checked ({type(error).__name__}: {error}). If not, leave them out with `layers=`."
            )
        return {}
    return {
        name: f"its first dimension is not the batch's examples (of {n - 1} examples it saw {rows} rows)"
        for name, rows in seen.items()
        if rows != n - 1
    }


def _without_last_example(batch: Any, n: int) -> Any:
    return apply_to_collection(batch, Tensor, lambda t: t[:-1].clone() if t.ndim and len(t) == n else t.clone())

"""Which dimension of a layer's inputs counts the batch's examples, found out once a run.

Positions may come first (`batch_first=False`), or a layer may run on something else than the batch (a
table of labels) that is as long as the batch by chance. The shapes of one batch do not say, and the sum over
rows is the same. So a copy of the model is asked about the first batch without its last example (of each
loader's part): the dimension that counts examples is the one that is then smaller by as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.layers import TrackedLayer, UseShape
from lightning_influence.training.asking import (
    copy_to_ask,
    kept_random_states,
    shapes_seen,
    without_other_processes,
)

Shapes = Mapping[str, Sequence[UseShape]]


def find_batch_dims(
    layers: Mapping[str, TrackedLayer],
    shapes: Shapes,
    batch: Any,
    parts: Sequence[int],
    ask: Callable[[Any], Shapes],
) -> tuple[dict[str, TrackedLayer], dict[str, str]]:
    """The layers with their batch dimension, and those of which no dimension counts examples, with the reason.

    Where the model cannot be asked, examples are taken to come first, and a warning names the layers
    whose shapes leave a doubt.

    Args:
        layers: the tracked layers.
        shapes: of their output gradients in the step that was just done.
        batch: the step's, with examples in the first dimension of its tensors.
        parts: number of examples that each loader gave.
        ask: the shapes for another batch, in eval mode, as `ask_copy` does.
    """
    n = sum(parts)
    if n == 1:  # nothing to leave out; the only example is where the size is 1 in all uses
        dims = {name: _batch_dim(shapes.get(name, ()), shapes.get(name, ()), (1, 1)) for name in layers}
        return _settled(layers, dims, shapes, 1)
    try:
        fewer = ask(_without_last_examples(batch, parts))
    except Exception as error:  # the user's code runs here, in a way it may not be made for
        _warn_of_doubt(shapes, n, error)
        return dict(layers), {}
    sizes = n, n - sum(part > 1 for part in parts)
    dims = {name: _batch_dim(shapes.get(name, ()), fewer.get(name, ()), sizes) for name in layers}
    return _settled(layers, dims, fewer, sizes[1])


def ask_copy(trainer: Trainer, model: LightningModule, layers: Mapping[str, TrackedLayer], batch: Any) -> Shapes:
    """The shapes that a copy of a model in training sees for a batch, in the trainer's precision.

    Raises:
        QueryError: if it cannot be asked.
    """
    if not model.automatic_optimization:
        raise QueryError("its `training_step` optimizes by itself")
    with kept_random_states(), without_other_processes(), trainer.precision_plugin.forward_context():
        return shapes_seen(*copy_to_ask(model, layers), batch)


def _settled(
    layers: Mapping[str, TrackedLayer], dims: Mapping[str, int | None], shapes: Shapes, examples: int
) -> tuple[dict[str, TrackedLayer], dict[str, str]]:
    """The layers with the dimension that was found, and the reason against those without."""
    found = {
        name: replace(layer, batch_dim=dim) for name, layer in layers.items() if (dim := dims[name]) is not None
    }
    reasons = {
        name: "none of its dimensions counts the batch's examples "
        f"(of {examples} examples it saw {shapes[name][0].shape})"
        for name in layers
        if name not in found
    }
    return found, reasons


def _batch_dim(uses: Sequence[UseShape], fewer: Sequence[UseShape], wanted: tuple[int, int]) -> int | None:
    """The first dimension that has the wanted sizes in all uses and all others; 0 if nothing was seen."""
    if not uses or not fewer:
        return 0
    candidates = None
    for use, other in zip(uses, fewer, strict=False):
        pairs = enumerate(zip(use.shape, other.shape, strict=False))
        fitting = {dim for dim, sizes in pairs if sizes == wanted}
        if use.batch_dim is not None:  # known without asking
            if use.batch_dim not in fitting:
                return None
            continue
        candidates = fitting if candidates is None else candidates & fitting
    return 0 if candidates is None else min(candidates, default=None)


def _warn_of_doubt(shapes: Shapes, n: int, error: Exception) -> None:
    doubtful = [
        name
        for name, uses in shapes.items()
        if any(use.batch_dim is None and n in use.shape[1:-1] for use in uses)
    ]
    if doubtful:
        rank_zero_warn(
            f"InfluenceCallback: the inputs of {', '.join(doubtful)} have as many positions as the batch has "
            f"examples ({n}). They are taken to have the examples first, which could not be "
            f"checked ({type(error).__name__}: {error}). If not, leave them out with `layers=`."
        )


def _without_last_examples(batch: Any, parts: Sequence[int]) -> Any:
    """A copy of the batch in which each loader's part has one example less, if it has several."""
    longer = {part for part in parts if part > 1}
    if not longer:
        raise ValueError("each loader's part of the batch has but one example")

    def shortened(tensor: Tensor) -> Tensor:
        return (tensor[:-1] if tensor.ndim and len(tensor) in longer else tensor).clone()

    return apply_to_collection(batch, Tensor, shortened)

"""How much the rows aged between their step and the end of the epoch.

Rows are captured while the weights move. To see what that did, some examples are evaluated again at
the final weights, and scores of their rows as captured are compared with scores of their rows as they
would be now: the mean Spearman correlation over some of them as queries. The examples are those of a
few batches spread evenly over the epoch, kept as training saw them: the dataset is not asked again,
so augmentation is no part of the measure, and a dataset that draws random numbers is not disturbed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_influence.curvature import HeuristicDamping, get_curvature
from lightning_influence.functional.eigenvalues import CHUNK_ELEMENTS
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.recorder import Recorder
from lightning_influence.scoring import ScoredLayer, sum_of_scores
from lightning_influence.step import LossKind
from lightning_influence.training.asking import example_gradients, kept_random_states

EXAMPLES = 128
QUERIES = 16
BATCHES = 8  # as many ages of rows, unless batches are very large or small, or the epoch is short


class StalenessProbe:
    """Keeps a few of an epoch's batches, and asks about them at its end."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, Any]] = []
        self._wanted: frozenset[int] | None = None
        self._problem = ""

    def see(self, batch: Any, rows: np.ndarray, batch_idx: int, num_batches: float) -> None:
        """Copy the batch if it is one of those to keep, before `training_step` can change it.

        Args:
            batch: as `training_step` gets it.
            rows: its dataset indices, int64 [n].
            batch_idx: its number in the epoch.
            num_batches: in the epoch.
        """
        if self._wanted is None:
            self._wanted = _spread(num_batches, len(rows))
        if batch_idx not in self._wanted or self._problem:
            return
        try:
            self._kept.append((rows, apply_to_collection(batch, Tensor, lambda t: t.detach().clone())))
        except Exception as error:  # a batch of a kind that cannot be rebuilt
            self._problem = _reason(error)

    def measure(
        self,
        trainer: Trainer,
        model: LightningModule,
        layers: Mapping[str, TrackedLayer],
        loss: LossKind,
        recorder: Recorder,
        factors: Mapping[str, ScoredLayer],
    ) -> tuple[float, str]:
        """The rank agreement and "", or NaN and the reason why there is none.

        A copy of the model is asked, in eval mode, and random states are put back, so that neither
        the user's metrics nor the order of the data notice.

        Args:
            trainer: whose precision is used.
            model: in training, at its final weights.
            layers: the tracked layers of the model.
            loss: how the loss's scale is known.
            recorder: with all rows written.
            factors: made from them.
        """
        if self._problem or not self._kept:
            return math.nan, self._problem or "the number of batches was not known"
        if not model.automatic_optimization:
            return math.nan, "not measured with manual optimization"
        try:
            with kept_random_states(), trainer.precision_plugin.forward_context():
                final = self._ask(copy.deepcopy(model), layers, loss)  # a copy without its trainer
            rows = np.concatenate([rows for rows, _ in self._kept])
            chosen = _sample(recorder.writer.read_column("valid")[rows].astype(bool))
            final = {name: gradient[chosen] for name, gradient in final.items()}
            stored = recorder.stored_rows(rows[chosen.numpy()])
            return rank_agreement(factors, final, stored), ""
        except Exception as error:  # the user's code runs here, in a way it may not be made for
            return math.nan, _reason(error)

    def _ask(
        self, clone: LightningModule, layers: Mapping[str, TrackedLayer], loss: LossKind
    ) -> dict[str, LayerGradient]:
        for name in ("forward", "training_step"):  # a compiled model's are bound to the original
            vars(clone).pop(name, None)
        of_clone = {name: layer.of_copy(clone.get_submodule(name)) for name, layer in layers.items()}
        asked = [example_gradients(clone, of_clone, batch, loss=loss).gradients for _, batch in self._kept]
        return {name: LayerGradient.concatenate([part[name] for part in asked]) for name in layers}


def _spread(num_batches: float, batch_size: int) -> frozenset[int]:
    """Numbers of the batches to keep: the middles of equal parts of the epoch."""
    if math.isinf(num_batches):
        return frozenset()
    affordable = min(BATCHES, num_batches // 12, max(2, 4 * EXAMPLES // batch_size))
    parts = min(int(num_batches), max(int(affordable), math.ceil(EXAMPLES / batch_size)))
    return frozenset(int((part + 0.5) * num_batches / parts) for part in range(parts))


def _sample(valid: np.ndarray) -> Tensor:
    """Positions of up to 128 valid rows, at random but always the same."""
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(valid))[:EXAMPLES]  # an own generator
    return torch.from_numpy(chosen)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def rank_agreement(
    layers: Mapping[str, ScoredLayer],
    final: Mapping[str, LayerGradient],
    stored: Mapping[str, Mapping[str, Tensor]],
) -> float:
    """Mean Spearman correlation of EK-FAC scores of rows as stored and as they would be now.

    Args:
        layers: the factors.
        final: the examples' gradients at the final weights.
        stored: their arrays, in the same order.

    Returns:
        1 where nothing aged; NaN for fewer than three examples.
    """
    examples = len(next(iter(final.values())))
    largest = max(layer.Lambda.numel() for layer in layers.values())
    queries = min(QUERIES, examples, max(4, 4 * CHUNK_ELEMENTS // largest))
    if examples < 3:
        return float("nan")
    asked = {name: gradient[:queries] for name, gradient in final.items()}
    now = {name: layer.codec.encode(final[name]) for name, layer in layers.items()}
    kind, rule = get_curvature("ekfac"), HeuristicDamping()
    projected = {name: layer.precondition(asked[name], kind, rule) for name, layer in layers.items()}
    scores = [sum_of_scores(layers, projected, arrays) for arrays in (stored, now)]
    others = ~torch.eye(queries, examples, dtype=torch.bool)  # a query's own row is no news
    return mean_rank_correlation(*(each.cpu()[others].view(queries, examples - 1) for each in scores))

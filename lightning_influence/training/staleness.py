"""How much the rows aged between their step and the end of the epoch.

Rows are captured while the weights move. To see what that did, some examples are evaluated again at
the final weights, and scores of their rows as captured are compared with scores of their rows as they
would be now: the mean Spearman correlation over some of them as queries. The examples are those of a
few batches spread evenly over the epoch, kept as training saw them: the dataset is not asked again,
so augmentation is no part of the measure, and a dataset that draws random numbers is not disturbed.

The same examples say what the codec costs: scores of their rows as encoded now against scores of their
gradients as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.codecs import EigenCodec, allocate
from lightning_influence.curvature import HeuristicDamping, get_curvature
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.products import inner_products
from lightning_influence.gradients import CHUNK_ELEMENTS, FactoredGradient, LayerGradient, concatenate
from lightning_influence.layers import TrackedLayer
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.recorder import Recorder
from lightning_influence.row_choice import RowTrial
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import LossKind
from lightning_influence.training.asking import (
    copied,
    copy_to_ask,
    example_gradients,
    kept_random_states,
    without_other_processes,
)

EXAMPLES = 128
QUERIES = 16
FINE = 0.95  # rank correlation of what the codec stores, unless users say
BATCHES = 8  # as many ages of rows, unless batches are very large or small, or the epoch is short


@dataclass(frozen=True)
class Agreement:
    """Mean Spearman correlations between scores of the same examples at damping 0.1, 1 where nothing is lost.

    Args:
        staleness: rows as captured against rows as they would be at the final weights.
        codec: rows as encoded at the final weights against the gradients themselves.
        fine_bytes: of the eigen codec that would bring `codec` to what is wanted, as far as it depends on them; 0
            where more bytes than rows have are not what it takes, None where that is not known.
        note: why they are NaN, if they are.
    """

    staleness: float = math.nan
    codec: float = math.nan
    fine_bytes: int | None = None
    note: str = ""


def wanted_spearman(error_budget: float | None) -> float:
    """Of scores of rows and of exact gradients, below which users are warned."""
    return FINE if error_budget is None else 1 - error_budget


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
            self._kept.append((rows, copied(batch)))
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
    ) -> Agreement:
        """The rank agreements, or NaN and the reason why there are none.

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
            return Agreement(note=self._problem or "the number of batches was not known")
        if not model.automatic_optimization:
            return Agreement(note="not measured with manual optimization")
        try:
            with kept_random_states(), without_other_processes(), trainer.precision_plugin.forward_context():
                final = self._ask(*copy_to_ask(model, layers), loss)
            rows = np.concatenate([rows for rows, _ in self._kept])
            chosen = _sample(recorder.writer.read_column("valid")[rows].astype(bool))
            final = {name: gradient[chosen] for name, gradient in final.items()}
            stored = recorder.stored_rows(rows[chosen.numpy()])
            return rank_agreement(factors, final, stored, recorder.error_budget)
        except Exception as error:  # the user's code runs here, in a way it may not be made for
            return Agreement(note=_reason(error))

    def _ask(
        self, clone: LightningModule, layers: Mapping[str, TrackedLayer], loss: LossKind
    ) -> dict[str, LayerGradient]:
        asked = [example_gradients(clone, layers, batch, loss=loss).gradients for _, batch in self._kept]
        return {name: concatenate([part[name] for part in asked]) for name in layers}


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
    error_budget: float | None = None,
) -> Agreement:
    """How EK-FAC scores agree between rows as stored, rows as they would be now, and exact gradients.

    Args:
        layers: the factors.
        final: the examples' gradients at the final weights.
        stored: their arrays, in the same order.
        error_budget: 1 minus the correlation that is wanted; None for the usual one.
    """
    examples = len(next(iter(final.values())))
    if examples < 3:
        return Agreement(note=f"only {examples} examples")
    largest = max(layer.Lambda.numel() for layer in layers.values())
    queries = min(QUERIES, examples, max(4, 4 * CHUNK_ELEMENTS // largest))
    scores = torch.zeros(3, queries, examples, dtype=torch.float32)
    for name, layer in layers.items():
        inverse = get_curvature("ekfac").inverse_eigenvalues(layer.basis, layer.Lambda, HeuristicDamping(0.1))
        asked = layer.basis.rotate(final[name][:queries]) * inverse
        projected = layer.codec.project(asked, layer.basis)
        scores[0] += layer.codec.scores(projected, stored[name]).cpu()
        scores[1] += layer.codec.scores(projected, layer.codec.encode(final[name])).cpu()
        scores[2] += _exact_scores(layer.basis, asked, final[name]).cpu()
    others = ~torch.eye(queries, examples, dtype=torch.bool)  # a query's own row is no news
    aged, now, exact = (each[others].view(queries, examples - 1) for each in scores)
    codec, wanted = mean_rank_correlation(now, exact), wanted_spearman(error_budget)
    fine_bytes = _fine_bytes(layers, final, 1 - wanted) if codec < wanted else 0
    return Agreement(mean_rank_correlation(aged, now), codec, fine_bytes)


def _fine_bytes(layers: Mapping[str, ScoredLayer], final: Mapping[str, LayerGradient], error: float) -> int:
    """Bytes with which the eigen codec would lose that little; 0 unless these are more than it has."""
    eigen = {name: layer for name, layer in layers.items() if isinstance(layer.codec, EigenCodec)}
    if not eigen:
        return 0
    bases = {name: layer.basis for name, layer in eigen.items()}
    Lambdas = {name: layer.Lambda for name, layer in eigen.items()}
    trial = RowTrial(bases, Lambdas, final)
    wanted, used = trial.least_bytes(error), sum(layer.codec.bytes_per_row for layer in eigen.values())
    return wanted if wanted > used and trial.error(allocate(Lambdas, wanted)) <= error else 0


def _exact_scores(basis: Eigenbasis, asked: Tensor, gradient: LayerGradient) -> Tensor:
    """Inner products of queries [q, o, i] in the eigenbasis with gradients, rotating what is smaller."""
    if isinstance(gradient, FactoredGradient) and gradient.positions == 1:
        return inner_products(basis.rotate_factors(gradient), asked)
    return inner_products(gradient, basis.rotate_back(asked))

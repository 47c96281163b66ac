"""Which damping to ask a file with, and how much that matters, from the file alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_influence.curvature import (
    DampedLayer,
    Damping,
    DampingOfLayers,
    HeuristicDamping,
    TrainingDamping,
    damping_by_layer,
    get_curvature,
)
from lightning_influence.gradients import DenseGradient
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.penalties import read_penalties
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader

FACTORS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
SAMPLED, QUERIES = 256, 16  # rows, drawn with a fixed seed
CHUNK_ELEMENTS = 2**24  # of queries' gradients at a time


@dataclass(frozen=True)
class DampingAdvice:
    """A damping for a file; `print` shows all of it.

    Args:
        damping: to pass as `damping=`.
        reason: why this one.
        sensitivity: by factor of `HeuristicDamping`, the mean Spearman correlation of scores with those at the
            advised damping, rows of training examples being both queries and examples: where it is near 1, the
            damping hardly matters. NaN of a file with fewer than 3 rows.
    """

    damping: Damping | DampingOfLayers
    reason: str
    sensitivity: Mapping[float, float]

    def __str__(self) -> str:
        factors = "  ".join(f"{factor:>6g}" for factor in self.sensitivity)
        values = "  ".join(f"{value:>6.3f}" for value in self.sensitivity.values())
        return (
            f"{self.damping}: {self.reason}\nSpearman correlation of scores with those at other factors of "
            f"HeuristicDamping:\nfactor    {factors}\nSpearman  {values}"
        )


def advise_damping(
    store: StoreReader, layers: Mapping[str, ScoredLayer], default: HeuristicDamping
) -> DampingAdvice:
    """`TrainingDamping` where the file says how its layers were trained, else the default.

    Args:
        store: the file.
        layers: its layers.
        default: what a query takes that is told nothing.
    """
    penalties = read_penalties(store, layers)
    unknown = [name for name, own in penalties.items() if math.isnan(own.decay + own.stopping)]
    damping: Damping | DampingOfLayers = default if unknown else TrainingDamping()
    if unknown:
        reason = (
            "the default, since nothing in rows tells which factor is best, and it is not known how "
            f"{', '.join(unknown)} were trained: {penalties[unknown[0]].note}"
        )
    else:
        reason = (
            "by the weight decay and the learning rates that each layer was trained with. With curvature='ekfac' "
            "it came near the best factor of HeuristicDamping on the tasks of examples/benchmarks/damping.py, "
            "small models of up to a few thousand examples; rules from rows did not."
        )
    curvature = get_curvature("ekfac")
    seen = {name: DampedLayer(each.eigenvalues(curvature), *penalties[name]) for name, each in layers.items()}
    return DampingAdvice(damping, reason, _sensitivity(store, layers, damping_by_layer(damping, seen)))


def _sensitivity(
    store: StoreReader, layers: Mapping[str, ScoredLayer], advised: Mapping[str, Damping]
) -> dict[float, float]:
    """Rank correlations of sampled rows' scores at each factor with those at the advised damping."""
    valid = np.flatnonzero(store.column("valid"))
    rows = np.sort(np.random.default_rng(0).permutation(valid)[:SAMPLED])
    if len(rows) < 3:
        return dict.fromkeys(FACTORS, math.nan)
    asked = np.arange(len(rows))[:: max(1, len(rows) // QUERIES)][:QUERIES]
    others = torch.ones(len(asked), len(rows), dtype=torch.bool)
    others[torch.arange(len(asked)), torch.from_numpy(asked)] = False  # a query's own row is no news
    rules: dict[float, Mapping[str, Damping]] = {f: dict.fromkeys(layers, HeuristicDamping(f)) for f in FACTORS}
    scores = _scores(store, layers, rows, asked, [advised, *rules.values()])
    kept = [each[others].view(len(asked), -1) for each in scores]
    return {factor: mean_rank_correlation(own, kept[0]) for factor, own in zip(rules, kept[1:], strict=True)}


def _scores(
    store: StoreReader,
    layers: Mapping[str, ScoredLayer],
    rows: np.ndarray,
    asked: np.ndarray,
    rules: list[Mapping[str, Damping]],
) -> Tensor:
    """Scores of some rows, of which some are the queries, by each rule, [rules, q, n]."""
    scores, curvature = torch.zeros(len(rules), len(asked), len(rows), dtype=torch.float32), get_curvature("ekfac")
    for name, layer in layers.items():
        arrays = {
            key: torch.from_numpy(np.array(array[rows])).to(layer.Lambda.device)
            for key, array in store.rows(name).items()
        }
        step = max(1, CHUNK_ELEMENTS // layer.Lambda.numel())
        for start in range(0, len(asked), step):
            part = slice(start, start + step)
            query = DenseGradient(layer.codec.decode({key: array[asked[part]] for key, array in arrays.items()}))
            for number, rule in enumerate(rules):
                projected = layer.precondition(query, curvature, rule[name])
                scores[number, part] += layer.scores(projected, arrays).cpu()
    return scores

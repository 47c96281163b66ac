"""Rules that choose a factor of `HeuristicDamping` from a file's rows alone; `damping.py` judges them.

None of them comes near the best factor on all tasks. They are kept so that nobody has to try them again.
"""

# %%
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.gradients import DenseGradient
from lightning_influence.metrics import rank_correlations

SAMPLED, QUERIES = 384, 64
Layers = list[tuple[Tensor, Tensor]]  # rows in the eigenbasis [n, o i], and Lambda [o, i]


def sampled_rows(influence: InfluenceModule) -> Layers:
    """Of each layer, rows of the same examples, drawn with a fixed seed."""
    query, store = influence._engine(), influence.store
    valid = np.flatnonzero(query.valid.numpy())
    chosen = np.sort(np.random.default_rng(0).permutation(valid)[:SAMPLED])
    layers = []
    for name, layer in query.layers.items():
        arrays = {key: torch.from_numpy(np.array(array[chosen])) for key, array in store.rows(name).items()}
        rows = [
            layer.basis.rotate(
                DenseGradient(layer.codec.decode({k: a[start : start + 32] for k, a in arrays.items()}))
            )
            for start in range(0, len(chosen), 32)
        ]
        layers.append((torch.cat(rows).flatten(1), layer.Lambda))
    return layers


def by_likelihood(influence: InfluenceModule, factors: Sequence[float]) -> float:
    """Rows of one half are most likely under a Gaussian of the other half's mean squares, damped."""
    layers, half = sampled_rows(influence), SAMPLED // 2

    def surprise(factor: float) -> float:
        total = 0.0
        for rows, Lambda in layers:
            kept = rows.any(0)
            squares = [part[:, kept].square().mean(0).double() for part in (rows[:half], rows[half:])]
            for fitted, other in (squares, squares[::-1]):
                damped = fitted + factor * float(Lambda.mean())
                total += float((damped.log() + other / damped).sum())
        return total

    return min(factors, key=surprise)


def by_split_half(influence: InfluenceModule, factors: Sequence[float]) -> float:
    """The smallest at which eigenvalues of two halves of the rows give scores that agree by .9 (Spearman)."""
    layers, rest = sampled_rows(influence), SAMPLED - QUERIES
    halves = slice(QUERIES, QUERIES + rest // 2), slice(QUERIES + rest // 2, None)

    def agreement(factor: float) -> float:
        found = []
        for half in halves:
            scores = torch.zeros(QUERIES, rest)
            for rows, Lambda in layers:
                damped = rows[half].square().mean(0) + factor * Lambda.mean()
                scores += (rows[:QUERIES] / damped) @ rows[QUERIES:].T
            found.append(scores)
        return float(rank_correlations(*found).nanmean())

    return next((factor for factor in factors if agreement(factor) >= 0.9), factors[-1])


def by_leverage(influence: InfluenceModule, factors: Sequence[float]) -> float:
    """The smallest at which an example's mean leverage is at most 1, as it is with the Fisher matrix itself."""
    layers, examples = sampled_rows(influence), int(influence._engine().valid.sum())

    def leverage(factor: float) -> float:
        sums = (
            (rows.square() / (Lambda.flatten() + factor * Lambda.mean())).sum(1).mean() for rows, Lambda in layers
        )
        return float(sum(sums)) / examples

    return next((factor for factor in factors if leverage(factor) <= 1), factors[-1])


RULES: dict[str, Callable[[InfluenceModule, Sequence[float]], float]] = {
    "held-out likelihood": by_likelihood,
    "split-half agreement": by_split_half,
    "leverage": by_leverage,
}

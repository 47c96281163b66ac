"""Measures of attributions from their definitions, a query and a group at a time, with SciPy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor


def linear_datamodeling_score(scores: Tensor, subsets: Tensor, truth: Tensor) -> float:
    found = []
    for q in range(len(scores)):
        sums = [sum(float(scores[q, n]) for n in range(scores.shape[1]) if subset[n]) for subset in subsets]
        found.append(spearmanr(sums, truth[:, q].numpy())[0])
    return float(np.mean(found))


def leave_k_out_correlation(scores: Tensor, groups: Tensor, effects: Tensor, correlation: str) -> float:
    correlate = {"spearman": spearmanr, "pearson": pearsonr}[correlation]
    found = []
    for q in range(len(scores)):
        predicted = [-sum(float(scores[q, n]) for n in torch.nonzero(group)[:, 0]) for group in groups]
        found.append(correlate(predicted, effects[:, q].numpy())[0])
    return float(np.mean(found))


def recall_at_k(scores: Tensor, sources: Tensor, k: int) -> float:
    """Without ties, and with at least one source for each query."""
    found = []
    for query, wanted in zip(scores.numpy(), sources.numpy(), strict=True):
        best = sorted(range(len(query)), key=lambda n: -query[n])[:k]
        found.append(sum(wanted[n] for n in best) / wanted.sum())
    return float(np.mean(found))


def mean_reciprocal_rank(scores: Tensor, sources: Tensor) -> float:
    """Without ties, and with at least one source for each query."""
    found = []
    for query, wanted in zip(scores.numpy(), sources.numpy(), strict=True):
        best = sorted(range(len(query)), key=lambda n: -query[n])
        found.append(1 / (1 + next(rank for rank, n in enumerate(best) if wanted[n])))
    return float(np.mean(found))


def mislabel_auroc(suspicion: Tensor, is_mislabelled: Tensor) -> float:
    return float(roc_auc_score(is_mislabelled.numpy(), suspicion.numpy()))


def rank_stability(scores: Tensor) -> float:
    runs, queries, _ = scores.shape
    found = [
        spearmanr(scores[a, q].numpy(), scores[b, q].numpy())[0]
        for q in range(queries)
        for a in range(runs)
        for b in range(a)
    ]
    return float(np.mean(found))


def brittleness(margins: Tensor, baseline: Tensor) -> list[float]:
    kept = [row for row, start in zip(margins.tolist(), baseline.tolist(), strict=True) if start > 0]
    return [sum(row[k] < 0 for row in kept) / len(kept) for k in range(margins.shape[1])]


def spearman_brown(r: float, times: float) -> float:
    return math.nan if r != r else times * r / (1 + (times - 1) * r)

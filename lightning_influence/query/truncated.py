"""Preconditioned queries of low rank, for rows that are pairs.

A row d a^T meets a query V [o, i] in o i multiply-adds. Of V's nearest matrix of rank r, U W^T, it is
(d . U)(a . W), 2 r (o + i) of them (TracIn's and LoGra's factors, on the query's side: the rows stay whole).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.gradients import BiasedGradient, FactoredGradient

log = logging.getLogger(__name__)
ITERATIONS, MORE = 2, 8  # of a subspace of so many dimensions more, after which the error is near the least


class TruncatedQueries:
    """Queries [q, o, i] as U W^T.

    Args:
        matrices: the queries whole.
        rank: of each; by a randomized range finder with a generator of its own (Halko et al. 2011,
            arXiv:0909.4061, Algorithm 4.4).

    Attributes:
        kept: of each query's squared norm, the share that is left, float32 [q].
    """

    def __init__(self, matrices: Tensor, rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        width = min(rank + MORE, *matrices.shape[1:])
        start = torch.randn(matrices.shape[2], width, generator=generator).to(matrices)
        left = torch.linalg.qr(matrices @ start).Q  # [q, o, r + more]
        for _ in range(ITERATIONS):
            left = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ left).Q).Q
        right = left.mT @ matrices  # [q, r + more, i]
        best = torch.linalg.eigh((right @ right.mT).double()).eigenvectors[..., -rank:].to(matrices)
        self._left, self._right = left @ best, right.mT @ best  # [q, o, r], [q, i, r]
        total = matrices.square().sum((1, 2))
        self.kept = (self._right.square().sum((1, 2)) / total.where(total > 0, 1)).where(total > 0, 1.0)

    def _of_inputs(self, rows: FactoredGradient) -> Tensor:
        """The rows' inputs times W, [n, s, q r]; a bias's ones are not written out."""
        flat = self._right.permute(1, 0, 2).flatten(1)  # [i, q r]
        if isinstance(rows, BiasedGradient):
            return (rows.bare_inputs @ flat[:-1]).add_(flat[-1])
        return rows.inputs @ flat

    @property
    def rank(self) -> int:
        """Of each query."""
        return self._left.shape[2]

    def scores(self, rows: FactoredGradient) -> Tensor:
        """<U W^T, G_n>, shape [q, n]."""
        q, _, r = self._left.shape
        left = rows.output_grads @ self._left.permute(1, 0, 2).flatten(1)  # [n, s, q r]
        right = self._of_inputs(rows)
        return (left * right).sum(1).unflatten(1, (q, r)).sum(2).T


def log_truncated(queries: Mapping[str, Tensor | TruncatedQueries]) -> None:
    """Say how much is left of each layer's queries: the median and the least of their squared norms' shares."""
    for name, each in queries.items():
        if isinstance(each, TruncatedQueries):
            log.info(
                "%s: queries of rank %d keep %.4f of their squared norm (least %.4f)",
                name,
                each.rank,
                float(each.kept.median()),
                float(each.kept.min()),
            )

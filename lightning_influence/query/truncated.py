"""Preconditioned queries of low rank, for rows that are pairs.

A row d a^T meets a query V [o, i] in o i multiply-adds. Of V's nearest matrix of rank r, U W^T, it is
(d . U)(a . W), 2 r (o + i) of them. The rows stay whole.
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
        matrices: the queries whole, of any size; one that is not finite has no scores.
        rank: of each; by randomized subspace iteration with a generator of its own (Halko et al. 2011, "Finding
            structure with randomness", arXiv:0909.4061).

    Attributes:
        kept: of each query's squared norm, the share that is left, float32 [q]; 1 of a query that is zero.
    """

    def __init__(self, matrices: Tensor, rank: int) -> None:
        size = matrices.abs().amax((1, 2), keepdim=True)
        has_size = size.isfinite() & (size > 0)
        units = (matrices / size).where(has_size, 0.0)  # so that no square leaves float32
        generator = torch.Generator().manual_seed(0)
        width = min(rank + MORE, *matrices.shape[1:])
        start = torch.randn(matrices.shape[2], width, generator=generator, dtype=torch.float32).to(matrices)
        left = torch.linalg.qr(units @ start).Q  # [q, o, r + more]
        for _ in range(ITERATIONS):
            left = torch.linalg.qr(units @ torch.linalg.qr(units.mT @ left).Q).Q
        right = left.mT @ units  # [q, r + more, i]
        best = torch.linalg.eigh((right @ right.mT).cpu().double()).eigenvectors[..., -rank:].to(matrices)
        right = right.mT @ best  # [q, i, r]
        self._left = (left @ best) * size.where(size.isfinite(), torch.nan)  # [q, o, r]
        self._right = right
        shares = right.square().sum((1, 2)) / units.square().sum((1, 2))
        self.kept = shares.where(has_size.flatten(), 1.0).where(size.flatten().isfinite(), torch.nan)

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

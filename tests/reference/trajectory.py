"""The trajectory from its definition: weighted sums over epochs, in one eigenbasis, densely in float64.

G_n = sum_e w_e c_en G_en / sum_e w_e, with w_e an epoch's weight and c_en how often it trained on example n
(Pruthi et al. 2020, arXiv:2002.08484, for the sum). A = E[G^T G], S = E[G G^T] and Lambda are means over the
epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """One epoch of one layer, float64.

    Args:
        inputs: a [n, i], with the bias's 1.
        output_grads: d [n, o].
        times: c [n]; 0 for examples that it did not see.
        weight: w.
    """

    inputs: Tensor
    output_grads: Tensor
    times: Tensor
    weight: float

    @property
    def gradients(self) -> Tensor:
        """G [n, o, i]."""
        return self.output_grads[:, :, None] * self.inputs[:, None, :]


def merged_gradients(epochs: Sequence[Epoch]) -> Tensor:
    """G_n, [n, o, i]."""
    total = sum(epoch.weight * epoch.times[:, None, None] * epoch.gradients for epoch in epochs)
    return total / sum(epoch.weight for epoch in epochs)


def averaged_moments(epochs: Sequence[Epoch]) -> tuple[Tensor, Tensor]:
    """A = E[G^T G] and S = E[G G^T] of the examples as often as each epoch saw them, the mean over the epochs."""
    A = S = 0.0
    for epoch in epochs:
        G, share = epoch.gradients, epoch.times[:, None, None] / epoch.times.sum() / len(epochs)
        A = A + (G.mT @ G * share).sum(0)
        S = S + (G @ G.mT * share).sum(0)
    return A, S


def averaged_fisher(epochs: Sequence[Epoch]) -> tuple[Tensor, Tensor, Tensor]:
    """Q_A, Q_S and Lambda of examples that every epoch saw as `times` says."""
    Q_A, Q_S = (torch.linalg.eigh(moment).eigenvectors for moment in averaged_moments(epochs))
    Lambda = 0.0
    for epoch in epochs:
        squares = (Q_S.T @ epoch.gradients @ Q_A).square() * epoch.times[:, None, None]
        Lambda = Lambda + squares.sum(0) / epoch.times.sum() / len(epochs)
    return Q_A, Q_S, Lambda


def merged_scores(queries: Tensor, epochs: Sequence[Epoch], *, damping: float) -> Tensor:
    """One layer's scores [q, n] of query gradients [q, o, i]; damping times the mean of Lambda is added to it."""
    Q_A, Q_S, Lambda = averaged_fisher(epochs)
    rotated = Q_S.T @ queries @ Q_A / (Lambda + damping * Lambda.mean())
    return rotated.flatten(1) @ (Q_S.T @ merged_gradients(epochs) @ Q_A).flatten(1).T


def merged_kfac_scores(queries: Tensor, epochs: Sequence[Epoch], *, damping: float) -> Tensor:
    """The same under the matrix A (x) S / tr S itself, which is made whole."""
    A, S = averaged_moments(epochs)
    whole = torch.kron(S / S.trace(), A)  # of gradients [o, i] flattened row by row
    damped = whole + damping * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
    return torch.linalg.solve(damped, queries.flatten(1).T).T @ merged_gradients(epochs).flatten(1).T

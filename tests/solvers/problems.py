"""Small problems whose dense truth is at hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_influence.solvers import DenseOperator
from tests.reference.models import random


def spd(p: int, *, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A positive definite matrix with eigenvalues from 1 / condition to 1, in random directions."""
    Q, _ = torch.linalg.qr(random(p, p, seed=seed))
    return (Q * torch.logspace(0, -float(torch.tensor(condition).log10()), p, dtype=torch.float64)) @ Q.T


def spd_operator(p: int = 20, **options: float) -> DenseOperator:
    return DenseOperator(symmetric(spd(p, **options)))


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class Problem:
    """A classifier 4 -> 5 -> 3 in float64 with 30 training examples and 4 queries."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor

    def train(self, batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True))

    def queries(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.query_inputs, self.query_targets)]


@functools.cache
def classifier() -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    labels = torch.randint(0, 3, (34,), generator=torch.Generator().manual_seed(4))
    x = random(34, 4, seed=5)
    return Problem(model.train(), x[:30], labels[:30], x[30:], labels[30:])

"""Curvature of a model's mean training loss, by products with vectors.

    Hessian       H = (1/N) sum_n ∇² L_n
    Gauss-Newton  G = (1/N) sum_n J_nᵀ (∇²_y L_n) J_n, with J_n = d outputs_n / d parameters

G is H without the curvature of the model itself: positive semi-definite for losses that are convex in the
outputs, equal to H for linear models, and the Fisher matrix for losses such as cross-entropy and ½ squared error
(Martens 2020, "New insights and perspectives on the natural gradient method", JMLR 21).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.solvers.base import CurvatureOperator
from lightning_influence.solvers.objective import Batch, Loss, Objective

CurvatureName = Literal["hessian", "gauss-newton"]
CHUNK_VECTORS = 64


class ModelOperator(CurvatureOperator):
    """The mean over a loader's examples; the batches are kept in memory.

    Args:
        objective: model and loss.
        batches: of the training data, as `objective.batches(loader)` gives them.
        hessian_regularization: added to the diagonal, such as the weight decay of an L2 penalty
            (weight_decay / 2) ||parameters||².
    """

    def __init__(self, objective: Objective, batches: list[Batch], *, hessian_regularization: float = 0.0) -> None:
        super().__init__(hessian_regularization)
        self.objective, self.batches = objective, batches
        self.num_examples = sum(batch.size for batch in batches)

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        loss: Loss,
        hessian_regularization: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> ModelOperator:
        """The operator of a model's training data; arguments as in `compute_influences`."""
        objective = Objective(model, loss, dtype=dtype)
        return cls(objective, objective.batches(loader), hessian_regularization=hessian_regularization)

    @property
    def size(self) -> int:
        """The number p of parameters that want gradients."""
        return self.objective.size

    @property
    def dtype(self) -> torch.dtype:
        """The objective's."""
        return self.objective.dtype

    @property
    def device(self) -> torch.device:
        """The objective's."""
        return self.objective.device

    @property
    def num_batches(self) -> int:
        """How many batches the loader had."""
        return len(self.batches)

    def curvature_product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """C v for each row [q, p]; a batch's estimate is (batches / N) times the sum over its examples."""
        if batch is not None:
            return self._sum_product(vectors, self.batches[batch]) * (self.num_batches / self.num_examples)
        total = torch.zeros_like(vectors)
        for each in self.batches:
            total += self._sum_product(vectors, each)
        return total / self.num_examples

    @abstractmethod
    def _sum_product(self, vectors: Tensor, batch: Batch) -> Tensor:
        """The product of the batch's summed curvature with each row [q, p]."""


class HessianOperator(ModelOperator):
    """The Hessian of the mean loss; it need not be positive, unless the loss is convex in the parameters."""

    def _sum_product(self, vectors: Tensor, batch: Batch) -> Tensor:
        def gradient(parameters: Tensor) -> Tensor:
            return torch.func.grad(lambda p: self.objective.losses(p, batch).sum())(parameters)

        pull_back = torch.func.vjp(gradient, self.objective.parameters)[1]  # a gradient's Jacobian is symmetric
        return _each(lambda vector: pull_back(vector)[0], vectors)


class GaussNewtonOperator(ModelOperator):
    """The generalized Gauss-Newton matrix of the mean loss; the model must return one tensor."""

    def _sum_product(self, vectors: Tensor, batch: Batch) -> Tensor:
        parameters = self.objective.parameters

        def outputs(parameters: Tensor) -> Tensor:
            found = self.objective.outputs(parameters, batch.inputs)
            if not isinstance(found, Tensor):
                raise TypeError(
                    f"The Gauss-Newton matrix needs a model that returns one tensor, got {type(found).__name__}; "
                    'wrap the model, or use the curvature "hessian".'
                )
            return found

        def loss_gradient(outputs: Tensor) -> Tensor:
            return torch.func.grad(lambda y: self.objective.loss(y, batch.targets).sum())(outputs)

        at, pull_back = torch.func.vjp(outputs, parameters)[:2]
        curve = torch.func.vjp(loss_gradient, at)[1]

        def product(vector: Tensor) -> Tensor:
            moved = torch.func.jvp(outputs, (parameters,), (vector,))[1]  # J v
            return pull_back(curve(moved)[0])[0]

        return _each(product, vectors)


OPERATORS: dict[str, type[ModelOperator]] = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator}


def _each(product: Any, vectors: Tensor) -> Tensor:
    return torch.func.vmap(product, chunk_size=CHUNK_VECTORS)(vectors).detach()

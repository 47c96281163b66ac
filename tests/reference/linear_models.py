"""Linear models at their exact optimum, where the effect of removing an example is known.

Objective, for weights W [o, i] and features x (append a column of ones for a bias):

    J(W) = (1/N) sum_n loss(W x_n, y_n) + (weight_decay / 2) ||W||²

Removing example m keeps the normaliser: J_m(W) = J(W) - (1/N) loss(W x_m, y_m). That is the
objective whose derivative by 1/N is the influence function (Koh & Liang 2017, arXiv:1703.04730).
The weight decay belongs to the objective and its Hessian, not to an example's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OutputLoss = Callable[[Tensor, Tensor], Tensor]


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ ||output - target||² per example: [n, o], [n, o] -> [n]."""
    return 0.5 * ((outputs - targets) ** 2).sum(dim=1)


def binary_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss of one logit: [n, 1], labels 0 or 1 [n] -> [n]."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype), reduction="none")


def softmax_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy: logits [n, o], class indices [n] -> [n]."""
    return F.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class LinearFit:
    """A linear model at the minimum of J.

    Attributes:
        output_loss: Outputs [n, o] and targets to losses [n].
        features: Shape [n, i], float64.
        targets: What `output_loss` takes, first axis n.
        weight_decay: As in J; positive makes the minimum unique.
        weights: W, shape [o, i], float64.
    """

    output_loss: OutputLoss
    features: Tensor
    targets: Tensor
    weight_decay: float
    weights: Tensor

    def objective(self, weights: Tensor, keep: Tensor) -> Tensor:
        """J with only the examples where the weights `keep` [n] are 1; the normaliser stays N."""
        losses = self.output_loss(self.features @ weights.T, self.targets)
        return (keep * losses).sum() / len(losses) + 0.5 * self.weight_decay * (weights**2).sum()

    def hessian(self) -> Tensor:
        """Second derivative of J at the weights, rows of W joined, shape [o·i, o·i]."""
        keep = torch.ones(len(self.features), dtype=torch.float64)
        return _hessian(lambda weights: self.objective(weights, keep), self.weights)

    def gradients(self, features: Tensor, targets: Tensor) -> Tensor:
        """Loss gradient of each given example (without weight decay), shape [n, o, i]."""
        rows = []
        for x, y in zip(features.double(), targets, strict=True):
            weights = self.weights.clone().requires_grad_()
            loss = self.output_loss(x[None] @ weights.T, y[None]).sum()
            rows.append(torch.autograd.grad(loss, weights)[0])
        return torch.stack(rows)

    def losses(self, weights: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        """Loss of each given example at the given weights, shape [n]."""
        return self.output_loss(features.double() @ weights.T, targets)

    def to_module(self, *, has_bias: bool = False) -> nn.Linear:
        """The same function as an `nn.Linear` in float64.

        With `has_bias` the last feature must be the constant 1: its column becomes the bias.
        """
        outputs, inputs = self.weights.shape
        module = nn.Linear(inputs - has_bias, outputs, bias=has_bias, dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(self.weights[:, : inputs - has_bias])
            if has_bias:
                module.bias.copy_(self.weights[:, -1])
        return module


def fit(
    output_loss: OutputLoss, features: Tensor, targets: Tensor, n_outputs: int, *, weight_decay: float
) -> LinearFit:
    """Minimise J to convergence by Newton's method in float64, from zero weights."""
    features = features.double()
    targets = targets.double() if targets.is_floating_point() else targets
    start = torch.zeros(n_outputs, features.shape[1], dtype=torch.float64)
    keep = torch.ones(len(features), dtype=torch.float64)
    model = LinearFit(output_loss, features, targets, weight_decay, start)
    weights = _newton(lambda weights: model.objective(weights, keep), start)
    return LinearFit(output_loss, features, targets, weight_decay, weights)


def refit_without(model: LinearFit, removed: Sequence[int]) -> Tensor:
    """Weights [o, i] at the minimum of J without the given examples, by Newton to convergence."""
    keep = torch.ones(len(model.features), dtype=torch.float64)
    keep[list(removed)] = 0.0
    return _newton(lambda weights: model.objective(weights, keep), model.weights)


def leave_one_out_changes(
    model: LinearFit, features: Tensor, targets: Tensor, *, removed: Sequence[int] | None = None
) -> Tensor:
    """True change of each query's LOSS when example m is removed and the model refitted.

    Args:
        model: The fit on all N examples.
        features: The queries, shape [q, i].
        targets: Their targets, first axis q.
        removed: The examples to remove, each alone; by default every one in turn.

    Returns:
        loss_q(W without m) - loss_q(W), shape [q, N], or a column for each of `removed`.
    """
    before = model.losses(model.weights, features, targets)
    columns = [
        model.losses(refit_without(model, [m]), features, targets) - before
        for m in (range(len(model.features)) if removed is None else removed)
    ]
    return torch.stack(columns, dim=1)


def exact_scores(model: LinearFit, features: Tensor, targets: Tensor) -> Tensor:
    """Scores grad L_qᵀ H⁻¹ grad L_m with the true Hessian of J, shape [q, N]."""
    queries = model.gradients(features, targets).flatten(1)
    examples = model.gradients(model.features, model.targets).flatten(1)
    return queries @ torch.linalg.solve(model.hessian(), examples.T)


def first_order_changes(model: LinearFit, features: Tensor, targets: Tensor) -> Tensor:
    """First-order estimate of `leave_one_out_changes`, exact_scores / N; shape [q, N].

    The score is for f = -loss and removal changes f by -score/N, so the loss changes by +score/N.
    """
    return exact_scores(model, features, targets) / len(model.features)


def _hessian(function: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Dense Hessian with the weights flattened row by row."""
    size = weights.numel()
    return torch.func.hessian(function)(weights).reshape(size, size)


def _newton(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Newton's method with step halving until the gradient is below 1e-12."""
    weights = start.clone()
    for _ in range(100):
        gradient = torch.func.grad(function)(weights)
        if gradient.abs().max() < 1e-12:
            return weights
        step = torch.linalg.solve(_hessian(function, weights), gradient.flatten()).view_as(weights)
        # 1e-14: at the optimum the decrease drowns in rounding
        while function(weights - step) > function(weights) + 1e-14:
            step = step / 2
        weights = weights - step
    raise RuntimeError("Newton's method did not converge; use a larger weight_decay")

"""The proximal Bregman objective from its definition, one example at a time, and its minimum for least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]


def flat_outputs(model: nn.Module) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The parameters, flat, and the outputs for one example as a function of them."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    start = torch.cat([p.detach().double().flatten() for p in model.parameters()])

    def outputs(parameters: Tensor, x: Tensor) -> Tensor:
        pieces = parameters.split([shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return functional_call(model, named, (x.unsqueeze(0),))

    return start, outputs


def proximal_bregman_objective(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    example: tuple[Tensor, Tensor],
    *,
    epsilon: float,
    damping: Tensor,
) -> Callable[[Tensor], Tensor]:
    """(1/N) sum_n D_n + epsilon L_m + ½ sum_p damping_p (theta_p - trained_p)², a function of theta [p]."""
    trained, outputs = flat_outputs(model)

    def objective(theta: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, t in zip(inputs, targets, strict=True):
            anchor = outputs(trained, x).detach().requires_grad_()
            value = loss(anchor, t.unsqueeze(0)).sum()
            (slope,) = torch.autograd.grad(value, anchor)
            y = outputs(theta, x)
            total = total + loss(y, t.unsqueeze(0)).sum() - value.detach() - (slope * (y - anchor.detach())).sum()
        x, t = example
        own = loss(outputs(theta, x), t.unsqueeze(0)).sum()
        return total / len(inputs) + epsilon * own + (damping * (theta - trained) ** 2).sum() / 2

    return objective


def least_squares_response(
    X: Tensor, y: Tensor, trained: Tensor, example: int, *, epsilon: float, damping: Tensor
) -> Tensor:
    """The minimum for outputs X theta and losses ½ (output - y)²: D_n is ½ (change of output)²; shape [p]."""
    x = X[example]
    H = X.T @ X / len(X) + torch.diag(damping) + epsilon * torch.outer(x, x)
    return trained - epsilon * torch.linalg.solve(H, (x @ trained - y[example]) * x)

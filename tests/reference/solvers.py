"""Dense curvature, influence by definition and least squares without an example, by loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]


def flat_losses(model: nn.Module, loss: Loss) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The trainable parameters, flat, and the loss of one example as a function of them."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    start = torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])

    def one(parameters: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = parameters.split([shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return loss(functional_call(model, named, (x.unsqueeze(0),)), y.unsqueeze(0))[0]

    return start, one


def dense_hessian(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of the loss's Hessian, entry by entry from `torch.autograd`, [p, p]."""
    start, one = flat_losses(model, loss)
    total = torch.zeros(len(start), len(start), dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        total += torch.autograd.functional.hessian(lambda p, x=x, y=y: one(p, x, y), start)
    return total / len(inputs)


def dense_gauss_newton(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of Jᵀ (∇² loss by outputs) J, [p, p]; outputs are [1, o]."""
    start, _ = flat_losses(model, loss)
    _, outputs_of = flat_losses(model, lambda outputs, _: outputs)
    total = torch.zeros(len(start), len(start), dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        outputs = outputs_of(start, x, y)
        J = torch.autograd.functional.jacobian(lambda p, x=x, y=y: outputs_of(p, x, y), start)
        curvature = torch.autograd.functional.hessian(lambda o, y=y: loss(o[None], y[None])[0], outputs)
        total += J.T @ curvature @ J
    return total / len(inputs)


def gradients(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each example's loss, [n, p]."""
    start, one = flat_losses(model, loss)
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        at = start.clone().requires_grad_()
        rows.append(torch.autograd.grad(one(at, x, y), at)[0])
    return torch.stack(rows)


def least_squares_without(X: Tensor, y: Tensor, m: int) -> Tensor:
    """Coefficients of the fit to all examples but m, [k]."""
    keep = torch.arange(len(X)) != m
    return torch.linalg.lstsq(X[keep], y[keep].unsqueeze(1)).solution[:, 0]

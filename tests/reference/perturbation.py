"""Derivatives of influence scores by the training example's inputs, from full matrices, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.factors import vec
from tests.reference.gradients import double_copy


def perturbation(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    preconditioned: Mapping[str, Tensor],
    examples: tuple[Tensor, Tensor],
) -> Tensor:
    """Sum over layers of V_qᵀ (d grad L_n / d x_n), by the Jacobian of each layer's gradient; float64.

    Args:
        model: takes inputs [1, ...].
        loss: of outputs and targets of one example, a scalar.
        preconditioned: V of linear layers with a bias, by name, [q, o, i].
        examples: inputs and targets.

    Returns:
        Shape [q, n, *features].
    """
    model = double_copy(model).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def flat_gradient(x: Tensor, target: Tensor, layer: str) -> Tensor:
        def own(weight: Tensor, bias: Tensor) -> Tensor:
            values = {**parameters, f"{layer}.weight": weight, f"{layer}.bias": bias}
            return loss(functional_call(model, values, (x[None],)), target[None])

        weight, bias = torch.func.grad(own, argnums=(0, 1))(
            parameters[f"{layer}.weight"], parameters[f"{layer}.bias"]
        )
        return vec(torch.cat([weight, bias[:, None]], dim=1)[None])[0]

    columns = []
    for x, target in zip(examples[0].double(), examples[1], strict=True):
        total = torch.zeros(())
        for layer, V in preconditioned.items():
            jacobian = torch.func.jacrev(flat_gradient)(x, target, layer)  # [o·i, *features]
            total = total + torch.tensordot(vec(V.double()), jacobian, dims=1)
        columns.append(total)
    return torch.stack(columns, dim=1)

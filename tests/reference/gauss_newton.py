"""The Gauss-Newton matrix of a layer, from its definition: Jacobians of the prediction, Hessian of the loss.

No labels are drawn and no distribution is named: with f(x) the prediction for one example and l(f) its own loss,
the block of a layer is (1/N) sum_n J_n^T H_n J_n with J_n = d f / d W and H_n = d^2 l / d f^2, in float64
(Schraudolph 2002; Martens 2020, arXiv:1412.1193). Its K-FAC factors replace d d^T by D^T H D, D = d f / d y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.reference.gradients import double_copy, double_example, has_trainable_bias


@dataclass(frozen=True)
class Linearized:
    """One layer (called once) in the linearized model, example by example.

    Args:
        inputs: a, each [s, i], with a 1 appended for a bias.
        jacobians: D = d f / d y, each [f, s, o].
        hessians: H, each [f, f].
    """

    inputs: list[Tensor]
    jacobians: list[Tensor]
    hessians: list[Tensor]

    def A(self) -> Tensor:
        """Mean over the positions that the loss's curvature depends on."""
        cases = zip(self.inputs, self.jacobians, self.hessians, strict=True)
        kept = [a[(torch.einsum("ab,bso->aso", H, D) != 0).any(0).any(-1)] for a, D, H in cases]
        rows = torch.cat(kept)
        return rows.T @ rows / len(rows)

    def S(self) -> Tensor:
        """(1/N) sum_n sum_s D_s^T H D_s."""
        terms = [
            torch.einsum("aso,ab,bsp->op", D, H, D) for D, H in zip(self.jacobians, self.hessians, strict=True)
        ]
        return torch.stack(terms).mean(0)

    def Lambda(self, Q_A: Tensor, Q_S: Tensor) -> Tensor:
        """(1/N) sum_n of the diagonal of J^T H J in the basis, [o, i]."""
        terms = []
        for a, D, H in zip(self.inputs, self.jacobians, self.hessians, strict=True):
            J = Q_S.T @ torch.einsum("aso,si->aoi", D, a) @ Q_A  # [f, o, i]
            terms.append(torch.einsum("aoi,ab,boi->oi", J, H, J))
        return torch.stack(terms).mean(0)


def linearize(
    model: nn.Module,
    examples: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    layers: Iterable[str],
) -> dict[str, Linearized]:
    """Of linear layers.

    Args:
        model: predicts a batch from a batch of inputs.
        examples: input and target, without the batch dimension.
        loss: of a prediction and target of a batch of one.
        layers: their names.
    """
    model = double_copy(model).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen[name] = args[0].detach().clone(), output
        return output.clone()  # on which an in-place activation may act

    for name in layers:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    found = {name: Linearized([], [], []) for name in layers}
    for example in examples:
        x, target = double_example(example)
        f = model(x[None])
        H = torch.autograd.functional.hessian(lambda f, t=target: loss(f, t[None]), f.detach())
        H = H.reshape(f.numel(), f.numel())
        for name, linearized in found.items():
            a, y = seen[name]
            rows = [torch.autograd.grad(each, y, retain_graph=True)[0] for each in f.flatten()]
            a = a.reshape(-1, a.shape[-1])
            if has_trainable_bias(model.get_submodule(name)):
                a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            linearized.inputs.append(a)
            linearized.jacobians.append(torch.stack(rows).reshape(f.numel(), len(a), -1))
            linearized.hessians.append(H)
    return found

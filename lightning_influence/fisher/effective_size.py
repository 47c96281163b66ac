"""How many examples a factor is really a mean of.

Kish's effective sample size (Kish 1965, Survey Sampling): (sum_n w_n)^2 / sum_n w_n^2, with w_n the squared
norm of what example n adds to the factor, over all labels of it: sum_s |d_ns|^2 for S, |G_n|^2 for Lambda (the
norm of the coordinates that rows keep, where only these are summed). Then trace(S) and sum(Lambda) are means of
w_n, and have the relative variance of a mean over that many examples, less 1/N. If a few examples carry all of the
gradient, it is that few, however many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient, SummedGradient


class EffectiveSize:
    """Sums of w_n and w_n^2 over the steps of an epoch."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # of w_n^0, w_n^1, w_n^2
        self._step: Tensor | None = None  # w_n of the passes of this step

    def add(self, norms: Tensor, is_finite: Tensor | None = None) -> None:
        """Take in one pass.

        Args:
            norms: of the examples that are finite.
            is_finite: of all examples of the step; None if all are.
        """
        weights = norms.double()
        if is_finite is not None:
            weights = torch.zeros(len(is_finite), dtype=torch.float64, device=norms.device)
            weights[is_finite] = norms.double()
        self._step = weights if self._step is None else self._step + weights.to(self._step.device)

    def end_step(self) -> None:
        """After a step's last pass."""
        if self._step is not None:
            w, self._step = self._step, None
            self.sums += torch.stack([torch.ones_like(w).sum(), w.sum(), w.square().sum()]).to(self.sums.device)

    def restart(self) -> None:
        """Forget everything, as w_n will be another norm."""
        self.sums.zero_()
        self._step = None

    def value(self, examples: int) -> float:
        """Of a mean over that many examples, if the others are as those that were seen."""
        count, total, squares = self.sums.tolist()
        return total**2 / squares * examples / count if squares else 0.0


def squared_output_norms(gradient: LayerGradient) -> Tensor:
    """sum_s |d_ns|^2, shape [n]; of a form that has no output gradients, that of what is linear in them."""
    if isinstance(gradient, SummedGradient):
        return torch.stack([squared_output_norms(part) for part in gradient.parts]).sum(0)
    return gradient.tensors[-1].float().flatten(1).square().sum(1)


def squared_norms(gradient: LayerGradient) -> Tensor:
    """|G_n|^2, shape [n]."""
    if isinstance(gradient, DenseGradient):
        return squared_output_norms(gradient)
    o, i = gradient.shape
    if isinstance(gradient, FactoredGradient) and gradient.positions * (i + o) <= 2 * i * o:
        a, d = gradient.inputs.float(), gradient.output_grads.float()
        if gradient.positions == 1:
            return a.square().sum((1, 2)) * d.square().sum((1, 2))
        return ((a @ a.mT) * (d @ d.mT)).sum((1, 2))
    norms = [dense.square().sum((1, 2)) for _, dense in gradient.dense_chunks()]
    return torch.cat(norms) if norms else gradient.tensors[-1].new_zeros(0)

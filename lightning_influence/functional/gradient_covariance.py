"""Second moments of whole examples' gradients on either side.

    A = E[G^T G],  S = E[G G^T] / E|G|^2

with G [o, i] an example's gradient. Their eigenvectors are those of Shampoo's preconditioner, in whose basis SOAP
takes squares as EK-FAC does in K-FAC's (Vyas et al. 2024, arXiv:2409.11321), and A (x) S has the trace of the
Fisher block. K-FAC's own factors (`functional.covariance`) treat an input and its output gradient as independent,
and the positions of an example too; these do not. Where there is one position they take no more work,
A = E[|d|^2 a a^T] and S in proportion to E[|a|^2 d d^T]. Elsewhere a few random probes z of each gradient do, as
E[(G^T z)(G^T z)^T] = G^T G for E[z z^T] = 1: a small share of what positions cost one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import FactoredGradient, LayerGradient

PROBES = 8  # of each gradient and side, unless gradients are few; sides that are no wider are exact


class GradientCovariance:
    """Sums A and S over batches.

    Args:
        shape: (o, i) of the layer's gradient.
        structure: which of the two are matrices, and in how many groups.
        probes: of each gradient and side.

    Example:
        >>> sums = GradientCovariance((1, 2))
        >>> sums.add(FactoredGradient(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]])))
        >>> A, S = sums.compute()
        >>> A.tolist(), S.tolist()
        ([[36.0, 48.0], [48.0, 64.0]], [[1.0]])
    """

    def __init__(
        self, shape: tuple[int, int], structure: KroneckerStructure = FULL, *, probes: int = PROBES
    ) -> None:
        self._structure, self._number = structure, probes
        self._A = torch.zeros(structure.inputs_shape(shape), dtype=torch.float32)
        self._S = torch.zeros(structure.outputs_shape(shape), dtype=torch.float32)
        self._weight = 0.0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, gradient: LayerGradient, weight: float = 1.0) -> None:
        """Add a batch of finite per-example gradients, on the CPU, each of this weight."""
        self._weight += weight * len(gradient)
        if isinstance(gradient, FactoredGradient) and gradient.positions == 1 and self._structure == FULL:
            a, d = gradient.inputs[:, 0].float(), gradient.output_grads[:, 0].float()
            _add_squares(self._A, a * d.norm(dim=1, keepdim=True), weight)
            _add_squares(self._S, d * a.norm(dim=1, keepdim=True), weight)
            return
        for _, dense in gradient.dense_chunks():
            groups = self._structure.groups
            G = dense.float().unflatten(1, (groups, -1)).transpose(0, 1)  # [g, n, o / g, i]
            self._add(self._A, G.mT, weight, is_full=self._structure.full_A)
            self._add(self._S, G, weight, is_full=self._structure.full_S)

    def add_moments(self, A: Tensor, S: Tensor) -> None:
        """Add E[G^T G] and E[G G^T] of what gradients lack whose weights sum to 1."""
        self._A += A
        self._S += S

    def compute(self) -> tuple[Tensor, Tensor]:
        """A and S over everything seen, in the shapes that the structure gives."""
        S = self._S
        traces = S.diagonal(dim1=-2, dim2=-1).sum(-1) if self._structure.full_S else S.sum(-1)  # [] or [g]
        traces = traces.where(traces > 0, 1).view(*traces.shape, *[1] * (S.ndim - traces.ndim))
        return self._A / (self._weight or 1.0), S / traces

    def _probes(self, n: int, y: int) -> Tensor:
        """Of n examples, [n, y, probes]: those of neighbours are the same numbers, a place further on."""
        numbers = torch.randn(n - 1 + y, self._number, generator=self._generator, dtype=torch.float32)
        return numbers.unfold(0, y, 1).mT

    def _add(self, total: Tensor, matrices: Tensor, weight: float, *, is_full: bool) -> None:
        """Add M M^T, or its diagonal, of matrices [g, n, x, y]."""
        groups, _, x, y = matrices.shape
        total = total.view(groups, *total.shape[-1 - is_full :])
        if not is_full:
            total.add_(matrices.square().sum((1, 3)), alpha=weight)
            return
        if y > self._number:
            matrices, weight = matrices @ self._probes(matrices.shape[1], y), weight / self._number
        for own, vectors in zip(total, matrices.mT.reshape(groups, -1, x), strict=True):
            _add_squares(own, vectors, weight)


def _add_squares(total: Tensor, vectors: Tensor, weight: float) -> None:
    """Add the sum of outer squares of vectors [m, x] to [x, x]."""
    total.addmm_(vectors.T, vectors, alpha=weight)

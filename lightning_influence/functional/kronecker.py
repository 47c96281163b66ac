"""The Kronecker-factored eigenbasis of a layer (George et al. 2018, arXiv:1806.03884).

A = Q_A diag(eigenvalues_A) Q_A^T and S = Q_S diag(eigenvalues_S) Q_S^T give the basis Q_A (x) Q_S of
the layer's Fisher block. A gradient G [o, i] has the coordinates Q_S^T G Q_A in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients import LayerGradient


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors and eigenvalues of A and S, leading ones first.

    Args:
        Q_A: eigenvectors of A in columns, shape [i, i].
        Q_S: eigenvectors of S in columns, shape [o, o].
        eigenvalues_A: shape [i], descending, clamped to be non-negative.
        eigenvalues_S: shape [o], descending, clamped to be non-negative.
    """

    Q_A: Tensor
    Q_S: Tensor
    eigenvalues_A: Tensor
    eigenvalues_S: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (o, i) of a gradient in this basis."""
        return self.Q_S.shape[0], self.Q_A.shape[0]

    def rotate(self, gradient: LayerGradient) -> Tensor:
        """Coordinates Q_S^T G_n Q_A of each example's gradient, shape [n, o, i]."""
        return self.rotate_factors(gradient).dense()

    def rotate_factors(self, gradient: LayerGradient) -> LayerGradient:
        """The same gradients with inputs Q_A^T a and output gradients Q_S^T d."""
        return LayerGradient(gradient.inputs @ self.Q_A, gradient.output_grads @ self.Q_S)

    def rotate_back(self, coordinates: Tensor) -> Tensor:
        """Gradients Q_S Z Q_A^T of coordinates Z [..., o, i]."""
        return self.Q_S @ coordinates @ self.Q_A.T


def eigenbasis(A: Tensor, S: Tensor) -> Eigenbasis:
    """Decompose A [i, i] and S [o, o] in float64 on the CPU; the result has their dtype and device.

    Raises:
        ValueError: if a factor has non-finite entries.

    Example:
        >>> basis = eigenbasis(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(1))
        >>> basis.eigenvalues_A.tolist()
        [3.0, 1.0]
    """
    Q_A, eigenvalues_A = _descending_eigh(A, "A")
    Q_S, eigenvalues_S = _descending_eigh(S, "S")
    return Eigenbasis(Q_A, Q_S, eigenvalues_A, eigenvalues_S)


def _descending_eigh(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not factor.isfinite().all():
        raise ValueError(f"The covariance {name} of shape {tuple(factor.shape)} is not finite.")
    values, vectors = torch.linalg.eigh(factor.to("cpu", torch.float64))
    return vectors.flip(-1).to(factor), values.flip(-1).clamp(min=0).to(factor)

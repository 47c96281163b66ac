"""The Kronecker-factored eigenbasis of a layer (George et al. 2018, arXiv:1806.03884).

A = Q_A diag(eigenvalues_A) Q_A^T and S = Q_S diag(eigenvalues_S) Q_S^T give the basis Q_A (x) Q_S of
the layer's Fisher block. A gradient G [o, i] has the coordinates Q_S^T G Q_A in it. A diagonal factor
has no Q: its side is not rotated. With g groups of outputs there is a block, and a basis, for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import FactoredGradient, LayerGradient, RowGradient


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors and eigenvalues of A and S, leading ones first.

    Args:
        Q_A: eigenvectors of A in columns, shape [i, i]; with groups [g, i, i]; None for a diagonal A.
        Q_S: eigenvectors of S in columns, shape [o, o]; with groups [g, o/g, o/g]; None for a diagonal S.
        eigenvalues_A: shape [i] or [g, i], non-negative; descending, or A's diagonal as it is.
        eigenvalues_S: shape [o] or [g, o/g], likewise.
    """

    Q_A: Tensor | None
    Q_S: Tensor | None
    eigenvalues_A: Tensor
    eigenvalues_S: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (o, i) of a gradient in this basis."""
        return self.eigenvalues_S.numel(), self.eigenvalues_A.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis."""
        return self.eigenvalues_A.dtype

    @property
    def is_diagonal(self) -> bool:
        """Whether nothing is rotated."""
        return self.Q_A is None and self.Q_S is None

    def to(self, device: torch.device | str) -> Eigenbasis:
        """The same basis on a device."""
        Q_A, Q_S = (None if Q is None else Q.to(device) for Q in (self.Q_A, self.Q_S))
        return Eigenbasis(Q_A, Q_S, self.eigenvalues_A.to(device), self.eigenvalues_S.to(device))

    def eigenvalue_products(self) -> Tensor:
        """K-FAC's eigenvalues, those of S times those of A, shape [o, i]."""
        products = self.eigenvalues_S.unsqueeze(-1) * self.eigenvalues_A.unsqueeze(-2)  # [g, o/g, i]
        return products.reshape(self.shape)

    def rotate(self, gradient: LayerGradient) -> Tensor:
        """Coordinates Q_S^T G_n Q_A of each example's gradient, shape [n, o, i]."""
        if isinstance(gradient, FactoredGradient) and self._is_cheaper_by_factors(gradient):
            return self.rotate_factors(gradient).dense()
        if isinstance(gradient, RowGradient) and self.Q_S is None:
            rotated = gradient.grads if self.Q_A is None else gradient.grads @ self.Q_A
            return RowGradient(gradient.num_rows, gradient.rows, rotated).dense()
        return self.rotate_dense(gradient.dense())

    def rotate_factors(self, gradient: FactoredGradient) -> FactoredGradient:
        """The same gradients with inputs Q_A^T a and output gradients Q_S^T d; not for groups."""
        inputs = gradient.inputs if self.Q_A is None else gradient.inputs @ self.Q_A
        output_grads = gradient.output_grads if self.Q_S is None else gradient.output_grads @ self.Q_S
        return FactoredGradient(inputs, output_grads)

    def rotate_dense(self, gradients: Tensor) -> Tensor:
        """Coordinates Q_S^T G Q_A of gradients G [..., o, i]."""
        grouped = self._grouped(gradients)
        if self.Q_A is not None:
            grouped = grouped @ self.Q_A
        if self.Q_S is not None:
            grouped = self.Q_S.mT @ grouped
        return grouped.reshape(gradients.shape)

    def rotate_back(self, coordinates: Tensor) -> Tensor:
        """Gradients Q_S Z Q_A^T of coordinates Z [..., o, i]."""
        grouped = self._grouped(coordinates)
        if self.Q_S is not None:
            grouped = self.Q_S @ grouped
        if self.Q_A is not None:
            grouped = grouped @ self.Q_A.mT
        return grouped.reshape(coordinates.shape)

    def diagonal(self, eigenvalues: Tensor) -> Tensor:
        """Diagonal, in the parameters' coordinates, of the matrix with these eigenvalues [o, i] in this basis."""
        Q_A, Q_S = (None if Q is None else Q.square() for Q in (self.Q_A, self.Q_S))
        return Eigenbasis(Q_A, Q_S, self.eigenvalues_A, self.eigenvalues_S).rotate_back(eigenvalues)

    def _grouped(self, matrices: Tensor) -> Tensor:
        """[..., o, i] as [..., g, o/g, i] if there are groups."""
        return matrices.unflatten(-2, tuple(self.eigenvalues_S.shape)) if self.eigenvalues_S.ndim > 1 else matrices

    def _is_cheaper_by_factors(self, gradient: FactoredGradient) -> bool:
        """Whether s (i^2 + o^2) multiply-adds are fewer than o i (o + i), those of the product alike."""
        if self.eigenvalues_S.ndim > 1:
            return False
        o, i = self.shape
        inputs, outputs = i * (self.Q_A is not None), o * (self.Q_S is not None)
        return gradient.positions * (i * inputs + o * outputs) <= o * i * (inputs + outputs)


def eigenbasis(A: Tensor, S: Tensor, structure: KroneckerStructure = FULL) -> Eigenbasis:
    """Decompose A and S in float64 on the CPU; the result has their dtype and device.

    Args:
        A: shape [i, i]; other structures' shapes: `KroneckerStructure.inputs_shape`.
        S: shape [o, o]; `KroneckerStructure.outputs_shape`.
        structure: which of the two are matrices, and in how many groups.

    Raises:
        ValueError: if a factor has non-finite entries.

    Example:
        >>> basis = eigenbasis(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(1))
        >>> basis.eigenvalues_A.tolist()
        [3.0, 1.0]
    """
    Q_A, eigenvalues_A = _descending_eigh(A, "A") if structure.full_A else (None, A)
    Q_S, eigenvalues_S = _descending_eigh(S, "S") if structure.full_S else (None, S)
    return Eigenbasis(Q_A, Q_S, eigenvalues_A, eigenvalues_S)


def diagonal_basis(shape: tuple[int, int], device: torch.device | str = "cpu") -> Eigenbasis:
    """The basis of the parameters themselves, for a gradient (o, i) whose Fisher block is diagonal."""
    o, i = shape
    ones = torch.ones(max(o, i), device=device, dtype=torch.float32)
    return Eigenbasis(None, None, ones[:i].clone(), ones[:o].clone())


def _descending_eigh(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not factor.isfinite().all():
        raise ValueError(f"The covariance {name} of shape {tuple(factor.shape)} is not finite.")
    values, vectors = torch.linalg.eigh(factor.to("cpu", torch.float64))
    vectors = hardshrink(vectors, 1e-12)  # rounding errors, which would become subnormal numbers in products
    return vectors.flip(-1).to(factor), values.flip(-1).clamp(min=0).to(factor)

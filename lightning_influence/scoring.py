"""What a file knows of one layer, and the scores that follow from it.

score[q, m] = -grad f_q^T (G + damping)^-1 grad L_m, with f the measurement and L the training loss
(Koh & Liang 2017, arXiv:1703.04730; with EK-FAC for G: Grosse et al. 2023, arXiv:2308.03296). With the
default measurement f = -L this is grad L_q^T (G + damping)^-1 grad L_m: positive where up-weighting the
training example m raises the query's log-likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import Codec, codec_from_config
from lightning_influence.curvature import Curvature, Damping, basis_of
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import LayerGradient


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's eigenbasis, eigenvalues and codec.

    Args:
        basis: the Kronecker eigenbasis.
        Lambda: EK-FAC's eigenvalues, shape [o, i].
        codec: what the rows are written in.
    """

    basis: Eigenbasis
    Lambda: Tensor
    codec: Codec

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Basis, eigenvalues and the codec's state, as a file holds them."""
        tensors = {**vars(self.basis), "Lambda": self.Lambda, **self.codec.state()}
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        codec_id: str,
        config: Mapping[str, Any],
        structure: KroneckerStructure = FULL,
        device: torch.device | str = "cpu",
    ) -> ScoredLayer:
        """The inverse of `to_arrays`.

        Raises:
            ValueError, KeyError or TypeError: if the arrays do not fit together.
        """
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        basis = _basis_of(tensors, structure)
        Lambda = tensors.pop("Lambda")
        if Lambda.shape != basis.shape or Lambda.dtype != torch.float32:
            raise ValueError(f"Lambda must be float32 {basis.shape}, got {Lambda.dtype} {tuple(Lambda.shape)}")
        return cls(basis, Lambda, codec_from_config(codec_id, config, tensors, basis))

    def eigenvalues(self, curvature: Curvature) -> Tensor:
        """What the curvature adds damping to, shape [o, i]; Lambda if it adds none."""
        seen = [self.Lambda]

        def see(eigenvalues: Tensor) -> float:
            seen.append(eigenvalues)
            return 1.0

        curvature.inverse_eigenvalues(self.basis, self.Lambda, see)
        return seen[-1]

    def precondition(self, query: LayerGradient, curvature: Curvature, damping: Damping) -> Tensor:
        """(G + damping)^-1 times the queries' gradients, as the codec takes them."""
        basis = basis_of(curvature, self.basis)
        inverse = curvature.inverse_eigenvalues(self.basis, self.Lambda, damping)
        return self.codec.project(basis.rotate(query) * inverse, basis)

    def scores(self, preconditioned: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Scores of the arrays' rows, shape [q, n]."""
        return self.codec.scores(preconditioned, arrays)

    def self_influence(self, arrays: Mapping[str, Tensor], curvature: Curvature, damping: Damping) -> Tensor:
        """Grad L_n^T (G + damping)^-1 grad L_n of each row, shape [n]."""
        inverse = curvature.inverse_eigenvalues(self.basis, self.Lambda, damping)
        return self.codec.quadratic(inverse, basis_of(curvature, self.basis), arrays)


def _basis_of(tensors: dict[str, Tensor], structure: KroneckerStructure) -> Eigenbasis:
    """Take the basis out of a layer's arrays; it has eigenvectors just where the structure says."""
    values = {side: tensors.pop(f"eigenvalues_{side}") for side in "AS"}
    o, i = values["S"].numel(), values["A"].shape[-1]
    Q = {side: tensors.pop(f"Q_{side}", None) for side in "AS"}
    expected = {
        "A": structure.inputs_shape((o, i)) if structure.full_A else None,
        "S": structure.outputs_shape((o, i)) if structure.full_S else None,
    }
    diagonal = KroneckerStructure(structure.groups, full_A=False, full_S=False)
    sizes = {"A": diagonal.inputs_shape((o, i)), "S": diagonal.outputs_shape((o, i))}
    for side in "AS":
        vectors = Q[side]
        found = None if vectors is None else tuple(vectors.shape)
        if found != expected[side] or tuple(values[side].shape) != sizes[side]:
            raise ValueError(
                f"Q_{side} and eigenvalues_{side} must be {expected[side]} and {sizes[side]}, "
                f"got {found} and {tuple(values[side].shape)}"
            )
        if {tensor.dtype for tensor in (vectors, values[side]) if tensor is not None} != {torch.float32}:
            raise ValueError(f"Q_{side} and eigenvalues_{side} must be float32")
    return Eigenbasis(Q["A"], Q["S"], values["A"], values["S"])

"""Approximate curvature whose inverse is cheap; EK-FAC's from a captured file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_influence.curvature import AnyDamping, as_damping, get_curvature
from lightning_influence.errors import WeightsMismatchError
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.layers import TrackedLayer, find_layers
from lightning_influence.query import DEFAULT_DAMPING, InfluenceQuery, described_layers
from lightning_influence.store import StoreReader


class Preconditioner(Protocol):
    """A positive definite matrix M near H."""

    def solve(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v for each row [q, p]."""

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """M^-½ v for each row [q, p], by the symmetric root."""


@dataclass(frozen=True)
class Identity:
    """No preconditioning."""

    def solve(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return vectors

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return vectors


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's block, diagonal in a Kronecker eigenbasis.

    Args:
        positions: where in the flat vector each entry of the layer's matrix is, int64 [o, i].
        basis: the layer's eigenbasis.
        inverse: eigenvalues of the damped inverse, positive [o, i].
    """

    positions: Tensor
    basis: Eigenbasis
    inverse: Tensor


NO_PRECONDITIONER = Identity()


class EKFACPreconditioner:
    """EK-FAC's damped curvature of a model's layers (George et al. 2018, arXiv:1806.03884).

    Parameters of no layer get a multiple of the identity: the mean of the layers' eigenvalues. Whatever the
    preconditioner is, the solution is H's; what it changes is how soon it is found.

    Args:
        size: number p of parameters.
        blocks: of the layers.
    """

    def __init__(self, size: int, blocks: list[KroneckerBlock]) -> None:
        self.size, self.blocks = size, blocks
        covered = torch.zeros(size, dtype=torch.bool)
        for block in blocks:
            covered[block.positions.flatten().cpu()] = True
        self._others = (~covered).nonzero().flatten()
        eigenvalues = torch.cat([1 / block.inverse.flatten().cpu() for block in blocks])
        self._inverse_of_others = 1 / float(eigenvalues.mean())

    @classmethod
    def from_store(
        cls,
        model: nn.Module,
        store: str | os.PathLike[str] | StoreReader,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str = "ekfac",
    ) -> EKFACPreconditioner:
        """Take the factors from a file that was captured for the model.

        Args:
            model: as the operator has it; the same parameters must want gradients.
            store: the file.
            damping: added to the eigenvalues; what the operator's `hessian_regularization` is, or more.
            curvature: "ekfac" or "kfac".

        Raises:
            ValueError: if it is another curvature.
            WeightsMismatchError: if the file has layers that the model does not have.
        """
        reader = store if isinstance(store, StoreReader) else StoreReader(store)
        kind, rule = get_curvature(curvature), as_damping(damping)
        size, positions = _positions(model, reader)
        if curvature not in ("ekfac", "kfac"):
            raise ValueError(f"`curvature` of a preconditioner must be 'ekfac' or 'kfac', got {curvature!r}.")
        query = InfluenceQuery(reader)
        rules = query.dampings(kind, rule)
        blocks = [
            KroneckerBlock(
                positions[name], layer.basis, kind.inverse_eigenvalues(layer.basis, layer.Lambda, rules[name])
            )
            for name, layer in query.layers.items()
        ]
        return cls(size, [_positive(block) for block in blocks])

    def solve(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v for each row [q, p]."""
        return self._power(vectors, 1.0)

    def inverse_root(self, vectors: Tensor) -> Tensor:
        """M^-½ v for each row [q, p]."""
        return self._power(vectors, 0.5)

    def _power(self, vectors: Tensor, exponent: float) -> Tensor:
        if vectors.shape[1] != self.size:
            raise ValueError(
                f"The preconditioner is for {self.size} parameters, got vectors of {vectors.shape[1]}; make it "
                "from the operator's model."
            )
        result = torch.zeros_like(vectors)
        result[:, self._others] = vectors[:, self._others] * self._inverse_of_others**exponent
        for block in self.blocks:
            basis = _in_dtype(block.basis, vectors)
            coordinates = basis.rotate_dense(vectors[:, block.positions])  # [q, o, i]
            scaled = coordinates * block.inverse.to(vectors) ** exponent
            result[:, block.positions] = basis.rotate_back(scaled)
        return result


def _positions(model: nn.Module, reader: StoreReader) -> tuple[int, dict[str, Tensor]]:
    """The number of parameters that want gradients, and by layer where its matrix's entries are among them."""
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    places: dict[int, Tensor] = {}
    size = 0
    for key, parameter in trainable.items():
        places[key] = torch.arange(size, size + parameter.numel()).view(parameter.shape)
        size += parameter.numel()
    known, _ = find_layers(dict(model.named_modules()), model)
    return size, {
        entry["name"]: _matrix_positions(known, entry["name"], bool(entry.get("has_bias")), places, reader)
        for entry in described_layers(reader)
    }


def _matrix_positions(
    known: Mapping[str, TrackedLayer], name: str, has_bias: bool, places: Mapping[int, Tensor], reader: StoreReader
) -> Tensor:
    layer = known[name].with_bias(has_bias) if name in known else None
    if layer is None or layer.has_bias != has_bias:
        raise WeightsMismatchError(
            f"{reader.path} has factors of layer {name!r}, {'with' if has_bias else 'without'} a bias, which the "
            "model does not have as trainable parameters; pass the model as it was trained."
        )
    return layer.matrix({key: places[id(parameter)] for key, parameter in layer.parameters.items()})


def _positive(block: KroneckerBlock) -> KroneckerBlock:
    """A layer without any gradient has inverse 0; a preconditioner must be definite."""
    positive = block.inverse > 0
    usual = float(block.inverse[positive].mean()) if bool(positive.any()) else 1.0
    return KroneckerBlock(block.positions, block.basis, block.inverse.where(positive, usual))


def _in_dtype(basis: Eigenbasis, like: Tensor) -> Eigenbasis:
    Q_A, Q_S = (None if Q is None else Q.to(like) for Q in (basis.Q_A, basis.Q_S))
    return Eigenbasis(Q_A, Q_S, basis.eigenvalues_A.to(like), basis.eigenvalues_S.to(like))

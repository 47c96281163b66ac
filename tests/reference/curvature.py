"""Damped curvature of one layer as a full matrix [i·o, i·o] in the order of `factors.vec`.

A damping is a function from the layer's curvature eigenvalues to the number that is added to them.
A curvature is a function from a layer's activations to its matrix.

References: Grosse et al. 2023 (arXiv:2308.03296), George et al. 2018 (arXiv:1806.03884).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tests.reference.activations import LayerActivations
from tests.reference.factors import covariances, eigenbasis, eigenvalue_correction, fisher_block, vec

Damping = Callable[[Tensor], float]
Curvature = Callable[[LayerActivations], Tensor]


def absolute_damping(value: float) -> Damping:
    """The same number for every layer."""
    return lambda eigenvalues: value


def heuristic_damping(factor: float = 0.1) -> Damping:
    """`factor` times the mean of the layer's own eigenvalues."""
    return lambda eigenvalues: factor * eigenvalues.mean().item()


def ekfac_matrix(Q_A: Tensor, Q_S: Tensor, Lambda: Tensor, damping: float) -> Tensor:
    """(Q_A ⊗ Q_S) diag(vec Lambda) (Q_A ⊗ Q_S)ᵀ + damping·I, shape [i·o, i·o]."""
    Q = torch.kron(Q_A.double(), Q_S.double())
    return Q @ torch.diag(vec(Lambda.double())) @ Q.T + damping * _identity(len(Q))


def kfac_matrix(A: Tensor, S: Tensor, damping: float) -> Tensor:
    """A ⊗ S + damping·I, shape [i·o, i·o]."""
    product = torch.kron(A.double(), S.double())
    return product + damping * _identity(len(product))


def ekfac_curvature(damping: Damping) -> Curvature:
    """EK-FAC; the damping rule sees Lambda [o, i]."""

    def matrix(activations: LayerActivations) -> Tensor:
        basis = eigenbasis(*covariances(activations.inputs, activations.output_grads))
        Lambda = eigenvalue_correction(activations.gradients(), basis.Q_A, basis.Q_S)
        return ekfac_matrix(basis.Q_A, basis.Q_S, Lambda, damping(Lambda))

    return matrix


def kfac_curvature(damping: Damping) -> Curvature:
    """K-FAC; the damping rule sees the eigenvalues of A ⊗ S as outer products [o, i]."""

    def matrix(activations: LayerActivations) -> Tensor:
        A, S = covariances(activations.inputs, activations.output_grads)
        basis = eigenbasis(A, S)
        return kfac_matrix(A, S, damping(torch.outer(basis.eigenvalues_S, basis.eigenvalues_A)))

    return matrix


def diagonal_matrix(matrix: Tensor, damping: float) -> Tensor:
    """A matrix without what is off its diagonal, + damping·I."""
    return torch.diag(matrix.diagonal()) + damping * _identity(len(matrix))


def diagonal_curvature(damping: Damping) -> Curvature:
    """The diagonal of the EK-FAC matrix, entry by entry of the parameters."""

    def matrix(activations: LayerActivations) -> Tensor:
        undamped = ekfac_curvature(absolute_damping(0.0))(activations)
        return diagonal_matrix(undamped, damping(undamped.diagonal()))

    return matrix


def empirical_fisher_curvature(damping: Damping) -> Curvature:
    """(1/N) sum_n vec(G_n) vec(G_n)ᵀ + damping·I; the damping rule sees Lambda [o, i]."""

    def matrix(activations: LayerActivations) -> Tensor:
        basis = eigenbasis(*covariances(activations.inputs, activations.output_grads))
        Lambda = eigenvalue_correction(activations.gradients(), basis.Q_A, basis.Q_S)
        block = fisher_block(activations.gradients())
        return block + damping(Lambda) * _identity(len(block))

    return matrix


def identity_curvature(activations: LayerActivations) -> Tensor:
    """H = I: scores are plain dot products of gradients."""
    return _identity(activations.inputs.shape[2] * activations.output_grads.shape[2])


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def global_damping(factor: float, matrices: Iterable[Tensor]) -> Damping:
    """`factor` times the mean eigenvalue of the block-diagonal matrix of all layers: its trace over its size."""
    blocks = list(matrices)
    value = factor * sum(block.trace().item() for block in blocks) / sum(len(block) for block in blocks)
    return absolute_damping(value)

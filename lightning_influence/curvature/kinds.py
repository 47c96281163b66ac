"""EK-FAC, K-FAC, its diagonal and the identity, all over the same stored factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.curvature.base import register_curvature
from lightning_influence.curvature.damping import Damping
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis


class EKFAC:
    """Eigenvalue-corrected K-FAC: 1 / (Lambda + damping) (George et al. 2018, arXiv:1806.03884)."""

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Eigenvalues of the damped inverse, shape [o, i]."""
        return _invert(Lambda, damping)


class KFAC:
    """K-FAC: 1 / (eigenvalues of S times eigenvalues of A + damping).

    Martens & Grosse 2015, arXiv:1503.05671; damped as a whole, not factor by factor. A block that is
    diagonal anyway, as a normalization's, has no factors and keeps Lambda. Of merged epochs, A and S are those of
    whole gradients (`functional.gradient_covariance`).
    """

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Eigenvalues of the damped inverse, shape [o, i]."""
        return _invert(Lambda if basis.is_diagonal else basis.eigenvalue_products(), damping)


class Diagonal:
    """The diagonal of EK-FAC's matrix in the coordinates of the parameters, 1 / (diagonal + damping).

    diagonal_oi = sum_kl Q_S[o, k]^2 Lambda_kl Q_A[i, l]^2. It has the mean of Lambda, so that damping rules by the
    mean give the same number. It is the exact mean square of G_oi only if the gradient's coordinates in the
    eigenbasis are uncorrelated; no row is read for it.
    """

    def basis(self, eigenbasis: Eigenbasis) -> Eigenbasis:
        """The parameters' own."""
        return diagonal_basis(eigenbasis.shape, eigenbasis.eigenvalues_A.device)

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Diagonal of the damped inverse, shape [o, i]."""
        return _invert(basis.diagonal(Lambda), damping)


class Identity:
    """No curvature: scores are plain dot products of gradients; damping has no effect."""

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Ones, shape [o, i]."""
        return torch.ones_like(Lambda)


def _invert(eigenvalues: Tensor, damping: Damping) -> Tensor:
    added = torch.as_tensor(damping(eigenvalues), dtype=eigenvalues.dtype, device=eigenvalues.device)
    if not bool((added.isfinite() & (added >= 0)).all()):
        raise ValueError(
            f"`damping` must give finite numbers that are not negative, but {damping!r} gave {added}."
        )
    damped = eigenvalues + added
    return 1 / damped.where(damped > 0, torch.inf)  # a layer without any gradient says nothing


register_curvature("ekfac", EKFAC())
register_curvature("kfac", KFAC())
register_curvature("diagonal", Diagonal())
register_curvature("identity", Identity())

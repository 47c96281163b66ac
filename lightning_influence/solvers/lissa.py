"""LiSSA: the Neumann series of H⁻¹."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, DivergenceError, Draft, Solver, check_positive
from lightning_influence.solvers.stationary import Sampling, check_sampling, iterate, largest_eigenvalue


@dataclass(frozen=True)
class LiSSA(Solver):
    """h <- v + (1 - dampen) h - H h / scale, with x = h / scale (Agarwal et al. 2017, arXiv:1602.03943).

    Written for x it is x <- x + (v - H x) / scale - dampen x. It converges if `scale` is more than half of the
    largest eigenvalue, and takes about scale / (smallest eigenvalue) iterations. With `dampen` the limit is that
    of H + dampen scale I: then `converged` is about that system, `residual` about the one that was asked for.

    Args:
        dampen: shrinks x at each step; 0 for the unbiased limit.
        scale: None for 1.1 times the largest eigenvalue by power iteration.
        maxiter: of iterations.
        rtol: of the residual at which to stop.
        sampling: "all" uses every batch in each iteration; "batch" one at random, as the paper does, always for
            `maxiter` iterations; x then keeps the noise of the last draws.
        seed: of the draws.

    Example:
        >>> import torch
        >>> from lightning_influence.solvers import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> LiSSA(scale=2.0).solve(H, torch.tensor([[1.0, 1.0]])).info.converged.item()
        True
    """

    dampen: float = 0.0
    scale: float | None = None
    maxiter: int = 1000
    rtol: float = 1e-4
    sampling: Sampling = "all"
    seed: int = 0

    advice = "raise `maxiter` or `hessian_regularization`, or lower `scale`"

    def __post_init__(self) -> None:
        check_positive(scale=self.scale, maxiter=self.maxiter, rtol=self.rtol)
        check_sampling(self.sampling)
        if not 0 <= self.dampen < 1:
            raise ValueError(f"`dampen` must be in [0, 1), got {self.dampen}.")

    def accepted_residual(self, sizes: Tensor) -> Tensor:
        """Rtol ||v||."""
        return self.rtol * sizes

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        limit = self.accepted_residual(vectors.norm(dim=1))
        scale = 1.1 * largest_eigenvalue(operator) if self.scale is None else self.scale
        scale = scale or 1.0
        try:
            draft, norms = iterate(
                operator,
                vectors,
                lambda residual, k: residual / scale,
                damping=self.dampen * scale,
                limit=limit,
                maxiter=self.maxiter,
                sampling=self.sampling,
                seed=self.seed,
            )
        except DivergenceError as error:
            raise DivergenceError(
                f"LiSSA diverges with scale {scale:.3g} and dampen {self.dampen:g}: H's largest eigenvalue is "
                f"about {largest_eigenvalue(operator):.3g}, and `scale` must be above half of it (with "
                '`sampling="batch"` above half of any batch\'s); H must have no negative eigenvalue. Raise '
                "`scale` or `hessian_regularization`."
            ) from error
        own = norms <= limit if self.dampen and self.sampling == "all" else None
        return Draft(draft.value, draft.iterations, own)

"""Neumann iterations with a preconditioner, EK-FAC's above all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.solvers.base import CurvatureOperator, DivergenceError, Draft, Solver, check_positive
from lightning_influence.solvers.preconditioner import Preconditioner
from lightning_influence.solvers.stationary import Sampling, check_sampling, iterate, largest_eigenvalue


@dataclass(frozen=True)
class PreconditionedNeumann(Solver):
    """x <- x + step M⁻¹ (v - H x) from x = 0, in the manner of ASTRA (Wang et al. 2025, arXiv:2507.14740).

    With EK-FAC for M and step 1 the first iterate is EK-FAC's answer, and each further one removes some of what
    EK-FAC gets wrong. It converges if step times the largest eigenvalue of M⁻¹ H is below 2. EK-FAC from training
    labels is too small where the model fits its labels well; then take a smaller step, or None. (Of the paper only
    the iteration is taken, not its schedule of steps and batches.)

    Args:
        preconditioner: M.
        step: a positive number; None for 1 / 1.1 of the largest eigenvalue of M⁻¹ H, by power iteration; or a
            function of the iteration's number, which should decay with `sampling="batch"`.
        maxiter: of iterations; 1 gives M⁻¹ v, for step 1.
        rtol: of the residual at which to stop.
        sampling: "all" uses every batch in each iteration; "batch" one at random, always for `maxiter`.
        seed: of the draws.
    """

    preconditioner: Preconditioner
    step: float | Callable[[int], float] | None = 1.0
    maxiter: int = 100
    rtol: float = 1e-4
    sampling: Sampling = "all"
    seed: int = 0

    advice = (
        "raise `maxiter` or `hessian_regularization`, or bring the preconditioner's damping near to the latter"
    )

    def __post_init__(self) -> None:
        check_positive(maxiter=self.maxiter, rtol=self.rtol, step=None if callable(self.step) else self.step)
        check_sampling(self.sampling)

    def accepted_residual(self, sizes: Tensor) -> Tensor:
        """Rtol ||v||."""
        return self.rtol * sizes

    def _solve(self, operator: CurvatureOperator, vectors: Tensor) -> Draft:
        automatic = 1.0 if self.step is not None else 1 / (1.1 * self._largest_eigenvalue(operator))

        def change(residual: Tensor, k: int) -> Tensor:
            step = self.step(k) if callable(self.step) else self.step
            return (automatic if step is None else step) * self.preconditioner.solve(residual)

        try:
            draft, _ = iterate(
                operator,
                vectors,
                change,
                damping=0.0,
                limit=self.accepted_residual(vectors.norm(dim=1)),
                maxiter=self.maxiter,
                sampling=self.sampling,
                seed=self.seed,
            )
        except DivergenceError as error:
            largest = self._largest_eigenvalue(operator)
            raise DivergenceError(
                f"PreconditionedNeumann diverges: M⁻¹ H's largest eigenvalue is about {largest:.3g}, and `step` "
                f'must be below {2 / largest:.2g} (lower with `sampling="batch"`); H must have no negative '
                "eigenvalue. Lower `step`, or raise the preconditioner's damping or `hessian_regularization`."
            ) from error
        return draft

    def _largest_eigenvalue(self, operator: CurvatureOperator) -> float:
        return largest_eigenvalue(operator, self.preconditioner.solve)

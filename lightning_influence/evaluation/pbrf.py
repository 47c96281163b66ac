"""The proximal Bregman response: what influence functions of a network approximate.

A network's influence scores are not what training again without an example would do (Basu et al. 2021,
arXiv:2006.14651). They are, to first order in epsilon, the response that minimises

    (1/N) sum_n D_n(theta) + epsilon L_m(theta) + ½ sum_p damping_p (theta_p - trained_p)²
    D_n(theta) = l_n(y_n) - l_n(y_n at trained) - <grad l_n(y_n at trained), y_n - y_n at trained>

from the trained weights (Bae et al. 2022, "If influence functions are the answer, then what is the question?",
arXiv:2209.05364, proposed it). D_n is the Bregman divergence of the loss in the outputs y_n: it asks for the
trained network's outputs and not for the labels, so the trained weights are the minimum of the mean even where
training did not converge. Its Hessian there is the Gauss-Newton matrix G, hence
theta - trained = -epsilon (G + damping)⁻¹ grad L_m + O(epsilon²).

Where outputs have kinks, as with ReLU, so has the objective, and a response may lie on one, where no gradient is
small: it then counts as not converged, though nothing near is better.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_influence.evaluation.descent import minimize_rows
from lightning_influence.evaluation.responses import CHUNK_ROWS, Responses
from lightning_influence.solvers import (
    ConjugateGradient,
    GaussNewtonOperator,
    Objective,
    Preconditioner,
    SolveInfo,
)
from lightning_influence.solvers.objective import Batch, Loss

DENSE_SIZE = 4096  # of parameters; a matrix of that size is 134 MB
CG_STEPS = 10


def pbrf(
    model: nn.Module,
    loader: Iterable[Any],
    examples: tuple[Any, Any],
    *,
    loss: Loss,
    damping: float | Mapping[str, float],
    epsilon: float | None = None,
    preconditioner: Preconditioner | None = None,
    rtol: float = 1e-4,
    maxiter: int = 200,
    dtype: torch.dtype | None = torch.float64,
) -> Responses:
    """The proximal Bregman response to each of some examples.

    Costs some ten passes over the training data for each example, with the default preconditioner's on top;
    examples are followed side by side.

    Args:
        model: trained; called as `model(inputs)`, returns one tensor; run in eval mode, and left as it is.
        loader: yields pairs (inputs, targets), the N training examples in the dataset's order.
        examples: a pair (inputs, targets), m examples whose weight is changed, each alone.
        loss: `loss(outputs, targets) -> [n]`, each example's own loss, summed over its positions; convex in the
            outputs.
        damping: what pulls to the trained weights: a number for all, or by the names of parameters or of modules
            that hold them. To compare with scores from a file, what is added to their eigenvalues.
        epsilon: added to an example's weight 1/N in the mean loss; None for -1/N, which removes it.
        preconditioner: near G + damping, such as `EKFACPreconditioner.from_store(...)`; None for G itself, dense
            up to 4,096 parameters, and beyond by some steps of conjugate gradients.
        rtol: of an objective's gradient, what may be left.
        maxiter: of steps.
        dtype: to compute in; the objectives are small differences of losses, hence float64.

    Returns:
        The responses; `scores(queries)` of them compares with influence scores.

    Raises:
        ValueError, TypeError: if the loader shuffles, there is no example, `damping` leaves a parameter out, the
            loss is not convex, or a model returns more than a tensor.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> def loss(outputs, targets):
        ...     return (outputs - targets).square().sum(1) / 2
        >>> responses = pbrf(model, [(x, x)], (x, x), loss=loss, damping=0.1)
        >>> responses.scores([(x, x)]).shape, responses.info.converged.tolist()
        (torch.Size([2, 2]), [True, True])
    """
    if not any(leaf.numel() for leaf in tree_leaves(examples) if isinstance(leaf, Tensor)):
        raise ValueError("`examples` must hold at least one example, a pair of tensors (inputs, targets).")
    objective = Objective(model, loss, dtype=dtype)
    batches = objective.batches(loader, "loader")
    (chosen,) = objective.batches([examples], "examples")
    if epsilon is None:
        epsilon = -1 / sum(batch.size for batch in batches)
    if epsilon == 0 or not abs(epsilon) < float("inf"):
        raise ValueError(f"`epsilon` must be finite and not 0, got {epsilon}; -1/N removes an example.")
    problem = Proximal(objective, batches, chosen, epsilon, damping_vector(objective, damping))
    solve = problem.inverse_gauss_newton() if preconditioner is None else preconditioner.solve
    parts = []
    for rows in torch.arange(chosen.size, device=objective.device).split(CHUNK_ROWS):
        start = objective.parameters.expand(len(rows), -1)
        gradients = partial(problem.gradients_of, rows)
        parts.append(minimize_rows(gradients, start, solve, rtol=rtol, maxiter=maxiter))
    info = SolveInfo(*(torch.cat([getattr(p.info, name) for p in parts]) for name in _FIELDS))
    warn_unconverged(info, "pbrf")
    return Responses(objective, torch.cat([part.value for part in parts]), objective.parameters, epsilon, info)


_FIELDS = ("iterations", "converged", "residual")


def warn_unconverged(info: SolveInfo, name: str) -> None:
    """Say which responses are not yet what they should be."""
    failed = ~info.converged
    if bool(failed.any()):
        warnings.warn(
            f"{name}: {int(failed.sum())} of {len(failed)} responses did not converge; the largest gradient left "
            f"is {float(info.residual[failed].max()):.2g} of that at the start; raise `damping`, `maxiter` or "
            "`rtol`, take a smaller `epsilon`, or, if the model has kinks (ReLU), accept it.",
            stacklevel=3,
        )


def damping_vector(objective: Objective, damping: float | Mapping[str, float]) -> Tensor:
    """The damping of each parameter, shape [p].

    Raises:
        ValueError: if a number is negative or not finite, or a parameter has none, or a name is of none.
    """
    by_name = damping if isinstance(damping, Mapping) else dict.fromkeys(objective.shapes, damping)
    for name, number in by_name.items():
        if not 0 <= number < float("inf"):
            raise ValueError(f"`damping` must be finite and not negative, got {number} for {name!r}.")
    found, used = torch.empty_like(objective.parameters), set()
    for parameter, where in objective.slices.items():
        owners = [name for name in by_name if parameter == name or parameter.startswith(f"{name}.")]
        if not owners:
            raise ValueError(f"`damping` has no number for parameter {parameter!r}; it has {sorted(by_name)}.")
        nearest = max(owners, key=len)
        used.add(nearest)
        found[where] = by_name[nearest]
    if unknown := sorted(set(by_name) - used):
        raise ValueError(f"`damping` names {unknown}, which hold no trainable parameter that nothing nearer has.")
    return found


@dataclass(frozen=True)
class Proximal:
    """The proximal Bregman objectives of m examples.

    Args:
        objective: model and loss.
        batches: of the training data.
        examples: those whose weight is changed.
        epsilon: by how much.
        damping: of each parameter, shape [p].
    """

    objective: Objective
    batches: list[Batch]
    examples: Batch
    epsilon: float
    damping: Tensor

    def __post_init__(self) -> None:
        anchors = [self._anchor(batch) for batch in self.batches]
        object.__setattr__(self, "_anchors", anchors)

    def values(self, theta: Tensor, rows: Tensor) -> Tensor:
        """The objectives of some of the examples, int64 [k], each at its own parameters [k, p]; shape [k]."""
        return torch.func.vmap(self._value, chunk_size=CHUNK_ROWS)(theta, *self._examples(rows))

    def gradients(self, theta: Tensor, rows: Tensor) -> Tensor:
        """Their gradients, shape [k, p]; batch by batch, so that memory does not grow with the data."""
        chosen = self._examples(rows)
        total = self.damping * (theta - self.objective.parameters)
        total += self.epsilon * self._mapped(self._loss_of_one)(theta, *chosen)
        count = sum(batch.size for batch in self.batches)
        for batch, anchor in zip(self.batches, self._anchors, strict=True):  # type: ignore[attr-defined]
            total += self._mapped(lambda p, b=batch, a=anchor: self._divergence(p, b, *a))(theta) / count
        return total

    def gradients_of(self, chosen: Tensor, theta: Tensor, rows: Tensor) -> Tensor:
        """`gradients`, with rows counted among those that are chosen."""
        return self.gradients(theta, chosen[rows])

    def inverse_gauss_newton(self) -> Callable[[Tensor], Tensor]:
        """(G + damping)⁻¹ for rows [k, p]: dense, or for many parameters by a few steps, which is near enough."""
        operator = _DampedGaussNewton(self.objective, self.batches, self.damping)
        if operator.size > DENSE_SIZE:
            return operator.roughly_solved
        matrix = operator.dense()
        jitter = torch.finfo(matrix.dtype).eps * matrix.diagonal().mean() * operator.size
        factor, failure = torch.linalg.cholesky_ex(matrix + jitter * torch.eye(len(matrix)).to(matrix))
        if int(failure):
            raise ValueError(
                "The Gauss-Newton matrix plus `damping` is not positive; raise `damping`, or pass a `loss` that "
                "is convex in the outputs."
            )
        return lambda vectors: torch.cholesky_solve(vectors.T, factor).T

    def _mapped(self, function: Any) -> Any:
        return torch.func.vmap(torch.func.grad(function), chunk_size=CHUNK_ROWS)

    def _value(self, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        count = sum(batch.size for batch in self.batches)
        pairs = zip(self.batches, self._anchors, strict=True)  # type: ignore[attr-defined]
        divergence = sum(self._divergence(theta, batch, *anchor) for batch, anchor in pairs)
        proximity = (self.damping * (theta - self.objective.parameters).square()).sum() / 2
        return divergence / count + self.epsilon * self._loss_of_one(theta, inputs, targets) + proximity

    def _divergence(self, theta: Tensor, batch: Batch, outputs: Tensor, slopes: Tensor, losses: Tensor) -> Tensor:
        """The sum of D_n over a batch."""
        now = self.objective.outputs(theta, batch.inputs)
        linear = losses.sum() + (slopes * (now - outputs)).sum()
        return self.objective.loss(now, batch.targets).sum() - linear

    def _loss_of_one(self, theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        return self.objective.losses(theta, Batch(inputs, targets, 1))[0]

    def _anchor(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, the loss's slopes in them, and losses at the trained weights."""
        with torch.no_grad():
            outputs = self.objective.outputs(self.objective.parameters, batch.inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"`model` must return one tensor, got {type(outputs).__name__}; wrap it.")

        def total(y: Tensor) -> tuple[Tensor, Tensor]:
            losses = self.objective.loss(y, batch.targets)
            return losses.sum(), losses

        slopes, losses = torch.func.grad(total, has_aux=True)(outputs)
        return outputs, slopes, losses.detach()

    def _examples(self, rows: Tensor) -> tuple[Any, Any]:
        """Each example as a batch of its own, stacked: [k, 1, ...]."""

        def chosen(value: Any) -> Any:
            return value[rows].unsqueeze(1)

        return tree_map(chosen, (self.examples.inputs, self.examples.targets))


class _DampedGaussNewton(GaussNewtonOperator):
    """G plus a diagonal matrix."""

    def __init__(self, objective: Objective, batches: list[Batch], damping: Tensor) -> None:
        super().__init__(objective, batches)
        self.damping = damping

    def product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """As of every operator."""
        return self.curvature_product(vectors, batch) + self.damping * vectors

    def roughly_solved(self, vectors: Tensor) -> Tensor:
        """(G + damping)⁻¹ v for each row, by a few steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it all converged is judged elsewhere
            return ConjugateGradient(rtol=0.1, maxiter=CG_STEPS).solve(self, vectors).value

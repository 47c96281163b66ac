"""Influence scores from full matrices.

score[q, m] = sum over layers of -grad f_qᵀ H⁻¹ grad L_m, with f the measurement. For f = -loss
this is grad L_qᵀ H⁻¹ grad L_m: positive for a proponent. Gradients are dicts, layer name to
[n, o, i]; matrices are dicts, layer name to the damped H [i·o, i·o].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.activations import collect_activations
from tests.reference.curvature import Curvature
from tests.reference.factors import unvec, vec
from tests.reference.gradients import LossFn, per_example_gradients

Gradients = dict[str, Tensor]


def precondition(gradients: Tensor, matrix: Tensor) -> Tensor:
    """H⁻¹ applied to each gradient: [n, o, i] with H [i·o, i·o] -> [n, o, i]."""
    solved = torch.linalg.solve(matrix, vec(gradients.double()).T).T
    return unvec(solved, (gradients.shape[1], gradients.shape[2]))


def influence_scores(measurement_gradients: Gradients, loss_gradients: Gradients, matrices: Gradients) -> Tensor:
    """-grad f_qᵀ H⁻¹ grad L_m, summed over layers.

    Args:
        measurement_gradients: grad f of the queries, [q, o, i] a layer.
        loss_gradients: grad L of the training examples, [n, o, i] a layer.
        matrices: Damped H a layer.

    Returns:
        Shape [q, n], float64.
    """
    total: Tensor | float = 0.0
    for name, matrix in matrices.items():
        queries = vec(precondition(measurement_gradients[name], matrix))
        total = total - queries @ vec(loss_gradients[name].double()).T
    assert isinstance(total, Tensor)
    return total


def loss_influence_scores(
    query_loss_gradients: Gradients, loss_gradients: Gradients, matrices: Gradients
) -> Tensor:
    """`influence_scores` for the default measurement f = -loss; shape [q, n]."""
    measurement = {name: -gradient for name, gradient in query_loss_gradients.items()}
    return influence_scores(measurement, loss_gradients, matrices)


def self_influence(loss_gradients: Gradients, matrices: Gradients) -> Tensor:
    """Each example's score for itself, grad L_nᵀ H⁻¹ grad L_n, shape [n]."""
    return loss_influence_scores(loss_gradients, loss_gradients, matrices).diagonal()


def removal_effect(scores: Tensor, removed: Sequence[int]) -> Tensor:
    """Estimated change of f when examples are removed, -sum over m of score[q, m] / N.

    Args:
        scores: Shape [q, n] with ALL N training examples as columns.
        removed: Columns of the removed examples.

    Returns:
        Shape [q], in units of f.
    """
    total = torch.zeros(len(scores), dtype=scores.dtype)
    for m in removed:
        total -= scores[:, m]
    return total / scores.shape[1]


def reference_scores(
    model: nn.Module,
    examples: Sequence[Any],
    queries: Sequence[Any],
    loss_fn: LossFn,
    layers: Sequence[str],
    *,
    curvature: Curvature,
) -> Tensor:
    """Everything from model and data to scores for f = -loss; shape [q, n], float64."""
    activations = collect_activations(model, examples, loss_fn, layers)
    return loss_influence_scores(
        per_example_gradients(model, queries, loss_fn, layers),
        per_example_gradients(model, examples, loss_fn, layers),
        {name: curvature(activations[name]) for name in layers},
    )

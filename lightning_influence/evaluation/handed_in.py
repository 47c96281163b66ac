"""Scores of training examples that are handed in, whose gradients the file does not have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature import (
    AnyDamping,
    Curvature,
    RowCurvature,
    as_damping,
    basis_of,
    get_curvature,
)
from lightning_influence.errors import QueryError
from lightning_influence.functional.products import inner_products
from lightning_influence.gradients import LayerGradient
from lightning_influence.query import InfluenceQuery


def scores_of_gradients(
    engine: InfluenceQuery,
    queries: Mapping[str, LayerGradient],
    examples: Mapping[str, LayerGradient],
    *,
    damping: AnyDamping,
    curvature: str | Curvature = "ekfac",
) -> Tensor:
    """What `InfluenceQuery.scores` would say of rows with these gradients, stored exactly.

    Args:
        engine: of the file with the factors.
        queries: by layer, the gradients of minus the measurement, q of them.
        examples: by layer, the gradients of the examples' losses, m of them.
        damping: as in `scores`.
        curvature: as in `scores`, but for that of the rows.

    Returns:
        Shape [q, m], on the CPU.

    Raises:
        QueryError: if the curvature is made of the file's rows.
    """
    directions = precondition(engine, queries, damping=damping, curvature=curvature)
    return scores_along(directions, examples)


def precondition(
    engine: InfluenceQuery,
    queries: Mapping[str, LayerGradient],
    *,
    damping: AnyDamping,
    curvature: str | Curvature = "ekfac",
) -> dict[str, Tensor]:
    """(G + damping)⁻¹ times the queries' gradients, by layer [q, o, i]; arguments as in `scores_of_gradients`."""
    kind = get_curvature(curvature)
    if isinstance(kind, RowCurvature):
        raise QueryError(
            f"`curvature={curvature!r}` is made of the file's rows, and handed-in examples have none; "
            "pass `curvature='ekfac'`."
        )
    rules = engine.dampings(kind, as_damping(damping))
    found = {}
    for name, layer in engine.layers.items():
        basis = basis_of(kind, layer.basis)
        inverse = kind.inverse_eigenvalues(layer.basis, layer.Lambda, rules[name])
        found[name] = basis.rotate_back(basis.rotate(queries[name].to(engine.device)) * inverse)
    return found


def scores_along(directions: Mapping[str, Tensor], examples: Mapping[str, LayerGradient]) -> Tensor:
    """Inner products of directions [q, o, i] with the examples' gradients, summed over layers, [q, m]."""
    parts = [
        inner_products(examples[name].to(matrices.device), matrices).cpu() for name, matrices in directions.items()
    ]
    return torch.stack(parts).sum(0)

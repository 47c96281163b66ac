"""Scores beside what they may be taken for: Figure 1 of Bae et al. 2022 (arXiv:2209.05364), as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.metrics import rank_correlations, row_correlations

SMALLEST_COUNT = 3  # of examples that a correlation is made of


@dataclass(frozen=True)
class Agreement:
    """How one kind of scores agrees with one reference.

    Args:
        method: the scores' name.
        reference: the reference's name.
        pearson: mean over queries.
        spearman: mean over queries.
        pearson_error: standard error of that mean over queries; NaN for one query.
        spearman_error: likewise.
        pooled: Pearson's correlation over all pairs of query and example at once.
        slope: of the line through 0 that predicts the reference by the scores; 1 if they have its size.
        queries: how many entered the means: those whose reference has an order. Scores without one count as 0.
        pairs: of query and example that have both numbers.
    """

    method: str
    reference: str
    pearson: float
    spearman: float
    pearson_error: float
    spearman_error: float
    pooled: float
    slope: float
    queries: int
    pairs: int


@dataclass(frozen=True)
class Comparison:
    """Scores, references, and how they agree.

    Args:
        scores: by name, shape [q, m].
        references: by name, shape [q, m]; with `scores`, the two axes of a scatter plot.
        rows: a row for each pair of scores and reference.
    """

    scores: dict[str, Tensor]
    references: dict[str, Tensor]
    rows: list[Agreement]

    def __str__(self) -> str:
        method = max(len("scores"), *(len(row.method) for row in self.rows))
        reference = max(len("reference"), *(len(row.reference) for row in self.rows))
        names = f"{'scores':{method}s}  {'reference':{reference}s}"
        head = f"{names}  Pearson      Spearman     pooled     slope  queries  pairs"
        return "\n".join([head, *(_line(row, method, reference) for row in self.rows)])

    def __getitem__(self, names: tuple[str, str]) -> Agreement:
        """The agreement of (scores, reference).

        Raises:
            KeyError: if there is none.
        """
        found = {(row.method, row.reference): row for row in self.rows}
        if names not in found:
            raise KeyError(f"no agreement of {names}; there are {', '.join(map(str, found))}")
        return found[names]


def compare(scores: Tensor | Mapping[str, Tensor], references: Mapping[str, Tensor]) -> Comparison:
    """Correlate scores with references, query by query.

    Args:
        scores: of m examples for q queries, shape [q, m]; several kinds by name. NaN for what has no score.
        references: by name, shape [q, m], in the same sign: such as `scores` of `pbrf` (what influence functions
            approximate), and of `leave_one_out` from the trained weights (warm start) or from initial ones.

    Returns:
        The table, and the arrays.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> truth = torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.0, -2.0]])
        >>> print(compare(2 * truth, {"truth": truth}))
        scores  reference  Pearson      Spearman     pooled     slope  queries  pairs
        scores  truth      1.000 ±.000  1.000 ±.000   1.000   5.0e-01        2      6
    """
    methods = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    if not methods or not references:
        raise ValueError("`scores` and `references` must each name at least one tensor.")
    shape = next(iter(methods.values())).shape
    for name, values in [*methods.items(), *references.items()]:
        if values.ndim != 2 or values.shape != shape:
            raise ValueError(
                f"All must have one shape [q, m]; {name!r} has {tuple(values.shape)}, not {tuple(shape)}."
            )
    rows = [
        _agreement(method, reference, a.detach().double().cpu(), b.detach().double().cpu())
        for method, a in methods.items()
        for reference, b in references.items()
    ]
    return Comparison(methods, dict(references), rows)


def _agreement(method: str, reference: str, a: Tensor, b: Tensor) -> Agreement:
    has_both = a.isfinite() & b.isfinite()
    pairs = [(x[known], y[known]) for x, y, known in zip(a, b, has_both, strict=True)]
    pairs = [(x, y) for x, y in pairs if len(x) >= SMALLEST_COUNT and _varies(y)]
    linear = [float(row_correlations(x, y)) for x, y in pairs]
    ranked = [float(rank_correlations(x, y)) for x, y in pairs]
    x, y = a[has_both], b[has_both]
    pooled = float(row_correlations(x, y)) if len(x) >= SMALLEST_COUNT else math.nan
    slope = float((x * y).sum() / (x * x).sum()) if bool(x.any()) else math.nan
    (pearson, pearson_error), (spearman, spearman_error) = _mean(linear), _mean(ranked)
    return Agreement(
        method,
        reference,
        pearson,
        spearman,
        pearson_error,
        spearman_error,
        pooled,
        slope,
        queries=len(pairs),
        pairs=int(has_both.sum()),
    )


def _varies(x: Tensor) -> bool:
    return bool((x != x[0]).any())


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    if not values:
        return math.nan, math.nan
    each = torch.tensor(values, dtype=torch.float64)
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan
    return float(each.mean()), error


def _line(row: Agreement, method: int, reference: int) -> str:
    def with_error(value: float, error: float) -> str:
        shown = "" if math.isnan(error) else f"±{error:.3f}".replace("0.", ".")
        return f"{value:.3f} {shown:5s}"

    return (
        f"{row.method:{method}s}  {row.reference:{reference}s}  {with_error(row.pearson, row.pearson_error)}  "
        f"{with_error(row.spearman, row.spearman_error)}  {row.pooled:6.3f}  {row.slope:8.1e}  {row.queries:7d}  "
        f"{row.pairs:5d}"
    )

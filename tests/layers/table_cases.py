"""Cases of tables: `nn.Embedding` and `nn.EmbeddingBag`."""

from __future__ import annotations

import torch
from torch import nn

from tests.layers import case_models as models
from tests.layers.case import Case, Inputs, N, floats, indices

_OFFSETS = torch.tensor([0, 3, 3, 5])  # the second bag is empty
_FLAT = torch.tensor([1, 4, 1, 2, 0, 6, 6])  # the last two are the last bag's


def _one_bag(inputs: Inputs, n: int) -> Inputs:
    """One bag of (indices, offsets [n] or [n + 1], weights)."""
    flat, offsets, weights = (*inputs, None)[:3]
    assert flat is not None
    assert offsets is not None
    bounds = [*offsets.tolist(), len(flat)]
    inside = slice(bounds[n], bounds[n + 1])
    ends = torch.tensor([0, bounds[n + 1] - bounds[n]])[: 1 + len(offsets) - N]
    return (flat[inside], ends) if weights is None else (flat[inside], ends, weights[inside])


def _bag(flags: str, **options: object) -> Case:
    return Case("nn.EmbeddingBag", flags, lambda: nn.EmbeddingBag(7, 3, **options), indices(7, N, 5))


def _flat_bag(flags: str, *, last: bool = False, weighted: bool = False, **options: object) -> Case:
    offsets = torch.cat([_OFFSETS, torch.tensor([len(_FLAT)])]) if last else _OFFSETS

    def inputs(g: torch.Generator) -> Inputs:
        weights = torch.randn(len(_FLAT), generator=g, dtype=torch.float64)
        return (_FLAT, offsets, weights) if weighted else (_FLAT, offsets)

    make = lambda: nn.EmbeddingBag(7, 3, include_last_offset=last, **options)  # noqa: E731
    return Case("nn.EmbeddingBag", flags, make, inputs, pick=_one_bag)


def _positions(flags: str, **options: object) -> Case:
    return Case("nn.Embedding", f"positions {flags}", lambda: models.Positions(**options), indices(7, N, 5))


TABLES = [
    Case("nn.Embedding", "", lambda: nn.Embedding(7, 3), indices(7, N, 5)),
    Case("nn.Embedding", "one index", lambda: nn.Embedding(7, 3), indices(7, N)),
    Case("nn.Embedding", "indices [n, 2, 3]", lambda: nn.Embedding(7, 3), indices(7, N, 2, 3)),
    Case("nn.Embedding", "positions first", lambda: nn.Embedding(7, 3), indices(7, 5, N), batch_dim=1),
    Case("nn.Embedding", "padding_idx=2", lambda: nn.Embedding(7, 3, padding_idx=2), indices(7, N, 9)),
    Case("nn.Embedding", "padding_idx=-1", lambda: nn.Embedding(7, 3, padding_idx=-1), indices(7, N, 9)),
    Case("nn.Embedding", "sparse=True", lambda: nn.Embedding(7, 3, sparse=True), indices(7, N, 5)),
    _positions("[t]"),
    _positions("[1, t]", has_batch=True),
    _positions("[t], added first", is_first=True),
    _positions("[1, t], added first", is_first=True, has_batch=True),
    _positions("[t], in place", is_in_place=True),
    _positions("[1, t], in place", is_in_place=True, has_batch=True),
    Case("nn.Embedding", "tied nn.Linear", models.Tied, indices(7, N, 5)),
    Case("nn.Embedding", "tied nn.Linear with a bias", lambda: models.Tied(bias=True), indices(7, N, 5)),
    Case("nn.Embedding", "tied, padding_idx", lambda: models.Tied(padding_idx=1), indices(7, N, 5)),
    Case("nn.Embedding", "tied by F.linear", models.TiedByFunction, indices(7, N, 5)),
    *(_bag(f"{mode}, [n, s]", mode=mode) for mode in ("sum", "mean", "max")),
    *(_bag(f"{mode}, [n, s], padding_idx=3", mode=mode, padding_idx=3) for mode in ("sum", "mean", "max")),
    *(_flat_bag(f"{mode}, offsets", mode=mode) for mode in ("sum", "mean", "max")),
    *(_flat_bag(f"{mode}, offsets, padding_idx=1", mode=mode, padding_idx=1) for mode in ("sum", "mean", "max")),
    *(_flat_bag(f"{mode}, include_last_offset", mode=mode, last=True) for mode in ("sum", "mean", "max")),
    _flat_bag("sum, offsets, per_sample_weights", mode="sum", weighted=True),
    _flat_bag("sum, per_sample_weights, padding_idx=1", mode="sum", weighted=True, last=True, padding_idx=1),
    Case(
        "nn.EmbeddingBag",
        "sum, [n, s], per_sample_weights",
        lambda: models.WeightedBag(7, 3, mode="sum"),
        lambda g: (*indices(7, N, 5)(g), *floats((N, 5))(g)),
    ),
    _bag("mean, sparse=True", mode="mean", sparse=True),
]

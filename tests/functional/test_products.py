"""Products with factored gradients equal those with the gradients made whole."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.functional import products
from lightning_influence.functional.products import inner_products, weighted_squares
from lightning_influence.gradients import FactoredGradient, LayerGradient
from tests.reference.models import random

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few dozen terms in another order
SHAPES = [(3, 7), (7, 3), (4, 4), (1, 5), (5, 1)]


def gradient(shape: tuple[int, int], n: int, s: int) -> LayerGradient:
    o, i = shape
    return FactoredGradient(random(n, s, i, seed=1), random(n, s, o, seed=2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("s", [1, 4])
def test_inner_products_equal_dense_ones(shape: tuple[int, int], s: int) -> None:
    batch, matrices = gradient(shape, 6, s), random(3, *shape, seed=3)
    expected = torch.einsum("qoi,noi->qn", matrices, batch.dense())
    torch.testing.assert_close(inner_products(batch, matrices), expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("s", [1, 4])
def test_weighted_squares_equal_dense_ones(shape: tuple[int, int], s: int) -> None:
    batch, weights = gradient(shape, 6, s), random(*shape, seed=3)
    expected = torch.einsum("oi,noi->n", weights, batch.dense() ** 2)
    torch.testing.assert_close(weighted_squares(batch, weights), expected, **EXACT)


@pytest.mark.parametrize("chunk_elements", [1, 100])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_chunks_change_nothing(
    shape: tuple[int, int], chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, matrices = gradient(shape, 7, 3), random(2, *shape, seed=3)
    whole = inner_products(batch, matrices), weighted_squares(batch, matrices[0])
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", chunk_elements)
    torch.testing.assert_close(inner_products(batch, matrices), whole[0], **EXACT)
    torch.testing.assert_close(weighted_squares(batch, matrices[0]), whole[1], **EXACT)


@pytest.mark.parametrize("s", [1, 3])
def test_no_example_gives_no_product(s: int) -> None:
    nothing = gradient((3, 5), 0, s)
    assert inner_products(nothing, random(2, 3, 5)).shape == (2, 0)
    assert weighted_squares(nothing, random(3, 5)).shape == (0,)

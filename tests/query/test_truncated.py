"""Queries of low rank: what is left of them, against a singular value decomposition."""

from __future__ import annotations

import logging

import pytest
import torch

from lightning_influence.gradients import FactoredGradient
from lightning_influence.query import InfluenceQuery
from lightning_influence.query.truncated import TruncatedQueries
from tests.test_curvature_matrix import FILES, asked


def decaying(q: int, o: int, i: int) -> torch.Tensor:
    """Matrices whose singular values fall by a third each."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(q, o, o, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(q, i, i, generator=generator)).Q
    return left * (2 / 3) ** torch.arange(o) @ right.mT[:, :o]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("positions", [1, 3])
def test_scores_are_those_of_nearly_the_nearest_matrices(positions: int, has_bias: bool) -> None:
    matrices, generator = decaying(4, 12, 30), torch.Generator().manual_seed(1)
    inputs = torch.randn(9, positions, 30 - has_bias, generator=generator)
    rows = FactoredGradient(inputs, torch.randn(9, positions, 12, generator=generator))
    rows = rows.with_ones() if has_bias else rows
    U, values, Vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    for rank in (1, 4, 12):
        found = TruncatedQueries(matrices, rank)
        nearest = U[..., :rank] * values[:, None, :rank] @ Vh[:, :rank]
        share = values[:, :rank].square().sum(1) / values.square().sum(1)
        torch.testing.assert_close(found.kept.double(), share, rtol=0, atol=2e-3)
        assert (found.kept <= share + 1e-6).all()  # none is nearer than the nearest
        expected = torch.einsum("qoi,noi->qn", nearest, rows.dense().double())
        torch.testing.assert_close(found.scores(rows).double(), expected, rtol=0, atol=0.1 * float(expected.std()))


def test_queries_of_their_own_rank_are_exact() -> None:
    whole = torch.einsum("qor,qir->qoi", torch.randn(3, 8, 2), torch.randn(3, 20, 2))
    rows = FactoredGradient(torch.randn(5, 1, 20), torch.randn(5, 1, 8))
    found = TruncatedQueries(whole, 2)
    torch.testing.assert_close(found.kept, torch.ones(3))
    torch.testing.assert_close(found.scores(rows), torch.einsum("qoi,noi->qn", whole, rows.dense()))


def test_zero_queries_have_zero_scores() -> None:
    found = TruncatedQueries(torch.zeros(2, 4, 6), 2)
    assert found.kept.tolist() == [1, 1]
    assert not found.scores(FactoredGradient(torch.randn(3, 1, 6), torch.randn(3, 1, 4))).any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_queries_of_any_size_are_cut_alike(size: float) -> None:
    matrices, rows = decaying(3, 12, 30), FactoredGradient(torch.randn(5, 1, 30), torch.randn(5, 1, 12))
    usual, found = TruncatedQueries(matrices, 3), TruncatedQueries(matrices * size, 3)
    torch.testing.assert_close(found.kept, usual.kept)
    torch.testing.assert_close(found.scores(rows) / size, usual.scores(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_has_no_scores_and_spoils_no_other(value: float) -> None:
    matrices, rows = decaying(3, 12, 30), FactoredGradient(torch.randn(5, 1, 30), torch.randn(5, 1, 12))
    usual = TruncatedQueries(matrices, 3)
    matrices[1, 2, 3] = value
    found = TruncatedQueries(matrices, 3)
    assert found.kept.isnan().tolist() == [False, True, False]
    assert found.scores(rows)[1].isnan().all()
    torch.testing.assert_close(found.scores(rows)[[0, 2]], usual.scores(rows)[[0, 2]])


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return FILES["pairs-float32"](tmp_path_factory.mktemp("vectors") / "rows.h5")


def test_the_log_says_what_is_left_and_random_numbers_are_not_touched(
    vectors: InfluenceQuery, caplog: pytest.LogCaptureFixture
) -> None:
    queries, state = asked(vectors), torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="lightning_influence"):
        found = vectors.scores(queries, rank=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert any("queries of rank 1 keep" in message for message in caplog.messages)
    assert not torch.equal(found, vectors.scores(queries))
    torch.testing.assert_close(found, vectors.scores(queries, rank=1), rtol=0, atol=0)


def test_a_rank_that_saves_nothing_changes_nothing(vectors: InfluenceQuery) -> None:
    queries = asked(vectors)
    assert torch.equal(vectors.scores(queries, rank=1000), vectors.scores(queries))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_must_be_a_positive_integer(vectors: InfluenceQuery, rank: object) -> None:
    with pytest.raises(ValueError, match="`rank` must be a positive integer"):
        vectors.scores(asked(vectors), rank=rank)


def test_rank_is_not_for_tokens(vectors: InfluenceQuery) -> None:
    with pytest.raises(ValueError, match="`rank` cannot be combined with `per_token`"):
        vectors.scores(asked(vectors), rank=2, per_token=True)

"""Every curvature on every codec equals the dense matrix in float64, over the rows as they are stored.

What codecs lose of a row is bounded in `tests/codecs`; here nothing is lost, and answers are off by float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_influence.codecs import Codec, DenseCodec, EigenCodec
from lightning_influence.codecs.base import _CODECS
from lightning_influence.codecs.tiers import Tier, tier_of
from lightning_influence.curvature import (
    AbsoluteDamping,
    Damping,
    EmpiricalFisher,
    HeuristicDamping,
    RowCurvature,
    empirical_fisher,
    get_curvature,
)
from lightning_influence.curvature.base import _CURVATURES
from lightning_influence.errors import QueryError
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.quantize import RowDtype
from lightning_influence.gradients import DenseGradient, LayerGradient
from lightning_influence.query import InfluenceQuery
from lightning_influence.row_file import specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader, StoreWriter
from lightning_influence.stored_rows import StoredRows
from tests.plain_loop import STORE_ID, decoded_rows, query_gradients, record
from tests.reference.curvature import diagonal_matrix, ekfac_matrix, kfac_matrix
from tests.reference.factors import fisher_block
from tests.reference.models import (
    classification_examples,
    seeded_classifier,
    seeded_token_model,
    token_examples,
)
from tests.reference.scores import loss_influence_scores, removal_effect, self_influence

CURVATURES = ("ekfac", "kfac", "diagonal", "empirical_fisher", "identity")
N, Q = 20, 3  # N: fewer than one layer's coordinates, more than another's
DAMPINGS = {"small": HeuristicDamping(0.01), "usual": HeuristicDamping(0.1), "large": HeuristicDamping(100.0)}


def dense_matrix(curvature: str, layer: ScoredLayer, rows: Tensor, damping: Damping) -> Tensor:
    """The damped curvature [i·o, i·o] of a layer, by its definition, from the file's factors or rows."""
    basis, Lambda = layer.basis, layer.Lambda.double()
    Q_A, Q_S = basis.Q_A.double(), basis.Q_S.double()
    if curvature == "identity":
        return torch.eye(Lambda.numel(), dtype=torch.float64)
    if curvature == "kfac":
        A, S = Q_A * basis.eigenvalues_A.double() @ Q_A.T, Q_S * basis.eigenvalues_S.double() @ Q_S.T
        return kfac_matrix(A, S, float(damping(basis.eigenvalue_products().double())))
    added = float(damping(Lambda))
    if curvature == "empirical_fisher":
        return fisher_block(rows) + added * torch.eye(Lambda.numel(), dtype=torch.float64)
    if curvature == "diagonal":
        return diagonal_matrix(ekfac_matrix(Q_A, Q_S, Lambda, 0.0), added)
    return ekfac_matrix(Q_A, Q_S, Lambda, added)


def recoded(path: Path, query: InfluenceQuery, make: Callable[[ScoredLayer], Codec]) -> InfluenceQuery:
    """The same file with the rows in another codec."""
    layers, arrays = {}, {}
    for name, layer in query.layers.items():
        codec = make(layer)
        encoded = codec.encode(DenseGradient(decoded_rows(query, name)))
        arrays[name] = {key: array.numpy() for key, array in encoded.items()}
        layers[name] = ScoredLayer(layer.basis, layer.Lambda, codec)
    codecs = {name: layer.codec for name, layer in layers.items()}
    described = [
        {**entry, "codec": codecs[entry["name"]].codec_id, "config": codecs[entry["name"]].get_config()}
        for entry in query.store.document("layers")
    ]
    writer = StoreWriter(path, num_examples=N, store_id=STORE_ID)
    writer.create({name: specs(codec) for name, codec in codecs.items()})
    writer.write_rows(np.arange(N), columns={"valid": np.ones(N, np.uint8)}, arrays=arrays)
    writer.finish(
        attributes={},
        documents={"layers": described, "coverage": query.store.document("coverage")},
        factors={name: layer.to_arrays() for name, layer in layers.items()},
    )
    return InfluenceQuery(StoreReader(path))


def eigen(bits: int, share: float) -> Callable[[ScoredLayer], Codec]:
    """Of some of the coordinates, as merged rows are."""

    def make(layer: ScoredLayer) -> Codec:
        coordinates = layer.Lambda.flatten().argsort(descending=True)
        coordinates = coordinates[: max(1, int(share * len(coordinates)))]
        whitening = (layer.Lambda + 0.1 * layer.Lambda.mean()).flatten()[coordinates].sqrt()
        return EigenCodec(layer.basis, coordinates, whitening, [tier_of(bits, len(coordinates))])

    return make


def tiers(layer: ScoredLayer) -> Codec:
    """Of all coordinates, the leading ones with more bits."""
    one, two, rest = layer.Lambda.flatten().argsort(descending=True).tensor_split(3)
    coordinates = torch.cat([one, two, rest])
    whitening = (layer.Lambda + 0.1 * layer.Lambda.mean()).flatten()[coordinates].sqrt()
    sizes = {8: len(one), 4: len(two), 2: len(rest)}
    kept = [Tier(bits, size, suffix=f"_{bits}") for bits, size in sizes.items() if size]
    return EigenCodec(layer.basis, coordinates, whitening, kept)


def dense(dtype: RowDtype) -> Callable[[ScoredLayer], Codec]:
    return lambda layer: DenseCodec(layer.basis.shape, dtype=dtype)


def vectors(path: Path, codec: str) -> InfluenceQuery:
    return record(path, seeded_classifier(), classification_examples(N), codec=codec, bytes_per_example=10**6)


def sequences(path: Path, codec: str) -> InfluenceQuery:
    return record(path, seeded_token_model(), token_examples([3] * N), codec=codec, bytes_per_example=10**6)


FILES: dict[str, Callable[[Path], InfluenceQuery]] = {
    "pairs-float32": lambda path: vectors(path, "pairs-float32"),
    "pairs-int8": lambda path: vectors(path, "pairs"),
    "pairs-float16-of-sequences": lambda path: sequences(path, "pairs-float16"),
    "dense-float32": lambda path: recoded(
        path, vectors(path.with_name("a.h5"), "pairs-float32"), dense("float32")
    ),
    "dense-int8": lambda path: recoded(path, sequences(path.with_name("a.h5"), "pairs-float32"), dense("int8")),
    "eigen-8-bits": lambda path: sequences(path, "eigen"),
    "eigen-8-bits-some": lambda path: recoded(path, vectors(path.with_name("a.h5"), "eigen"), eigen(8, 0.5)),
    "eigen-4-bits": lambda path: recoded(path, vectors(path.with_name("a.h5"), "eigen"), eigen(4, 1.0)),
    "eigen-2-bits": lambda path: recoded(path, sequences(path.with_name("a.h5"), "eigen"), eigen(2, 0.6)),
    "eigen-tiers": lambda path: recoded(path, sequences(path.with_name("a.h5"), "eigen"), tiers),
}


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    query = FILES[request.param](tmp_path_factory.mktemp("file") / "rows.h5")
    assert {layer.codec.codec_id for layer in query.layers.values()} == {request.param.split("-")[0]}
    return query


def asked(file: InfluenceQuery) -> dict[str, LayerGradient]:
    if "first" in file.layers:
        return query_gradients(seeded_classifier(), classification_examples(Q, seed=9))
    return query_gradients(seeded_token_model(), token_examples([3] * Q, seed=9))


def close(found: Tensor, expected: Tensor, share: float) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=share * largest)


def test_every_curvature_and_codec_is_in_the_matrix() -> None:
    assert {name.split("-")[0] for name in FILES} == set(_CODECS)
    assert set(CURVATURES) == set(_CURVATURES)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_answers_equal_the_dense_matrix(file: InfluenceQuery, curvature: str, damping: str) -> None:
    rule, queries = DAMPINGS[damping], asked(file)
    rows = {name: decoded_rows(file, name).double() for name in file.layers}
    matrices = {name: dense_matrix(curvature, file.layers[name], rows[name], rule) for name in rows}
    expected = loss_influence_scores({name: g.dense().double() for name, g in queries.items()}, rows, matrices)
    # float32 of rows, projected queries and factors; the smallest damped eigenvalue is some 1e-4 of the largest
    share = 1e-3 if damping == "small" else 5e-5
    found = file.scores(queries, curvature=curvature, damping=rule)
    close(found, expected, share)
    close(sum(file.scores_by_layer(queries, curvature=curvature, damping=rule).values()), expected, share)
    close(file.self_influence(curvature=curvature, damping=rule), self_influence(rows, matrices), share)
    effect = file.removal_effect(queries, [2, 5, 7], curvature=curvature, damping=rule)
    close(effect, removal_effect(expected, [2, 5, 7]), share)
    top = file.top_k(queries, 4, curvature=curvature, damping=rule)
    assert torch.equal(top.scores, found.sort(dim=1, descending=True).values[:, :4])


@pytest.mark.parametrize("value", [1e-9, 1e12])
def test_extreme_damping_stays_the_dense_matrix_by_either_way(tmp_path: Path, value: float) -> None:
    file = vectors(tmp_path / "a.h5", "pairs-float32")
    rows = {name: decoded_rows(file, name).double() for name in file.layers}
    assert {len(rows[name]) < rows[name][0].numel() for name in rows} == {True, False}  # both ways
    matrices = {
        name: dense_matrix("empirical_fisher", file.layers[name], rows[name], AbsoluteDamping(value))
        for name in rows
    }
    # 1e-9 of eigenvalues up to 1: self-influence is float64 throughout, but for the rows
    for name in rows:
        part = EmpiricalFisher().rows_part(file._rows(name), file.layers[name].Lambda, AbsoluteDamping(value))
        close(part.self_influence(), self_influence({name: rows[name]}, {name: matrices[name]}), 1e-6)


def test_the_two_ways_of_inverting_agree(tmp_path: Path) -> None:
    file = FILES["dense-float32"](tmp_path / "rows.h5")  # whose products are float64 throughout
    for name in file.layers:
        rows = torch.cat([block for _, block in file._rows(name).blocks()])
        # they agree on scores that are inner products with the rows, as all are
        plain = torch.randn(Q, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ rows @ rows.T
        ways = (empirical_fisher._ByExamples, empirical_fisher._ByCoordinates)
        one, other = (way(file._rows(name), 0.01) for way in ways)
        torch.testing.assert_close(one.scores(plain), other.scores(plain), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(one.self_influence(), other.self_influence(), rtol=1e-8, atol=1e-10)


def test_blocks_of_rows_do_not_matter(file: InfluenceQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = asked(file)
    whole = file.scores(queries, curvature="empirical_fisher"), file.self_influence(curvature="empirical_fisher")
    diagonal = file.self_influence(curvature="diagonal")
    file = InfluenceQuery(file.store)  # which keeps no products
    monkeypatch.setattr("lightning_influence.stored_rows.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("lightning_influence.curvature.empirical_fisher.COLUMNS", 3)
    monkeypatch.setattr("lightning_influence.codecs.eigen.CHUNK_ELEMENTS", 60)
    close(file.scores(queries, curvature="empirical_fisher"), whole[0].double(), 1e-5)
    close(file.self_influence(curvature="empirical_fisher"), whole[1].double(), 1e-5)
    close(file.self_influence(curvature="diagonal"), diagonal.double(), 1e-5)


def test_the_same_question_twice_has_the_same_bits(file: InfluenceQuery) -> None:
    queries = asked(file)
    for curvature in ("diagonal", "empirical_fisher"):
        first = file.scores(queries, curvature=curvature)
        file.scores(queries, curvature=curvature, damping=3.0)
        assert torch.equal(file.scores(queries, curvature=curvature), first)


def test_huge_damping_gives_the_order_of_plain_dot_products(file: InfluenceQuery) -> None:
    queries = asked(file)
    plain = file.scores(queries, curvature="identity")
    for curvature in ("diagonal", "empirical_fisher"):
        damped = 1e8 * file.scores(queries, curvature=curvature, damping=1e8)
        close(damped, plain.double(), 1e-5)


def test_only_valid_rows_are_in_the_empirical_fisher(tmp_path: Path) -> None:
    examples = classification_examples(N)
    examples[4] = (torch.full((5,), torch.inf), examples[4][1])
    gappy = record(tmp_path / "gappy.h5", seeded_classifier(), examples, order=range(N - 2))
    kept = [n for n in range(N - 2) if n != 4]
    alone = record(tmp_path / "alone.h5", seeded_classifier(), [examples[n] for n in kept])
    queries = query_gradients(seeded_classifier(), classification_examples(Q, seed=9))
    found, expected = (query.scores(queries, curvature="empirical_fisher") for query in (gappy, alone))
    close(found[:, kept], expected.double(), 1e-4)
    assert torch.equal(found.isnan().all(0), torch.tensor([n not in kept for n in range(N)]))
    own = gappy.self_influence(curvature="empirical_fisher")
    close(own[kept], alone.self_influence(curvature="empirical_fisher").double(), 1e-4)
    assert int(own.isnan().sum()) == 3


def test_a_layer_without_gradient_says_nothing(tmp_path: Path) -> None:
    model = seeded_classifier()
    with torch.no_grad():
        model.last.weight.zero_()  # nothing flows back to the first layer
    file = record(tmp_path / "dead.h5", model, classification_examples(N))
    queries = query_gradients(model, classification_examples(Q, seed=9))
    for curvature in ("diagonal", "empirical_fisher"):
        by_layer = file.scores_by_layer(queries, curvature=curvature)
        assert not by_layer["first"].any()
        assert bool(by_layer["last"].isfinite().all())
        assert bool(file.self_influence(curvature=curvature).isfinite().all())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> InfluenceQuery:
    return vectors(tmp_path_factory.mktemp("small") / "a.h5", "pairs-float32")


def test_a_matrix_that_is_too_large_is_refused_with_what_it_would_take(small: InfluenceQuery) -> None:
    message = r"layer 'first' of .*a\.h5: .* there are 20 and 24, and at most 19 .*max_size=20\).* 0\.0 GB"
    with pytest.raises(QueryError, match=message):
        small.scores(asked(small), curvature=EmpiricalFisher(max_size=19))
    with pytest.raises(QueryError, match=message):
        small.self_influence(curvature=EmpiricalFisher(max_size=19))
    assert bool(small.scores(asked(small), curvature=EmpiricalFisher(max_size=20)).isfinite().all())


def test_products_are_kept_for_the_next_damping_while_there_is_room(
    small: InfluenceQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, queries = InfluenceQuery(small.store), asked(small)
    monkeypatch.setattr("lightning_influence.stored_rows.KEPT_BYTES", 8 * N * N)
    first = query.scores(queries, curvature="empirical_fisher")
    (kept,) = query._row_products.values()
    before = kept.clone()
    monkeypatch.setattr(StoredRows, "_products", None)  # not made again
    query.scores_by_layer(queries, curvature="empirical_fisher", damping=3.0)
    assert torch.equal(query.scores(queries, curvature="empirical_fisher"), first)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_an_impossible_size_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="`max_size` must be a positive integer"):
        EmpiricalFisher(max_size=size)  # type: ignore[arg-type]


def test_damping_of_zero_is_refused_by_the_empirical_fisher(small: InfluenceQuery) -> None:
    with pytest.raises(QueryError, match=r"layer 'first' .*`damping` must be positive .* the rule gave 0"):
        small.scores(asked(small), curvature="empirical_fisher", damping=lambda eigenvalues: 0.0)


def test_a_damping_for_each_direction_is_refused_by_the_empirical_fisher(small: InfluenceQuery) -> None:
    with pytest.raises(ValueError, match=r"must be one number for a layer .* shape \(4, 6\)"):
        small.scores(asked(small), curvature="empirical_fisher", damping=lambda eigenvalues: eigenvalues)


def test_a_device_without_float64_and_a_file_without_rows_are_refused(small: InfluenceQuery) -> None:
    codec, maps = small.layers["first"].codec, small.store.rows("first")
    with pytest.raises(QueryError, match=r"needs float64, which mps has not; move the model to the CPU"):
        StoredRows("layer 'first'", maps, codec, small.valid, device=torch.device("mps"), kept={})
    with pytest.raises(QueryError, match=r"layer 'first' has no valid rows"):
        StoredRows("layer 'first'", maps, codec, ~small.valid, device=torch.device("cpu"), kept={})


class InverseDiagonal:
    """A curvature of somebody else: the K-FAC eigenvalues in the layer's eigenbasis, by the old contract alone."""

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        return get_curvature("kfac").inverse_eigenvalues(basis, Lambda, damping)


def test_a_curvature_with_inverse_eigenvalues_alone_goes_on_working(file: InfluenceQuery) -> None:
    queries, own = asked(file), InverseDiagonal()
    assert not isinstance(own, RowCurvature)
    assert torch.equal(file.scores(queries, curvature=own), file.scores(queries, curvature="kfac"))
    assert torch.equal(file.self_influence(curvature=own), file.self_influence(curvature="kfac"))

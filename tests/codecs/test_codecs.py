"""One suite for every codec: what it stores, how exactly, and that its answers are its rows' answers.

Answers are compared in float32, with sums of up to a few hundred products: 1e-5 of the largest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_influence.codecs import (
    Codec,
    DenseCodec,
    EigenCodec,
    PairsCodec,
    codec_from_config,
)
from lightning_influence.codecs.base import _CODECS
from lightning_influence.codecs.tiers import Tier, tier_of
from lightning_influence.curvature import AbsoluteDamping, get_curvature
from lightning_influence.functional.covariance import covariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.functional.rotated import NOISE, quantize_rotated, restore_rotated, rotate_groups
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient, concatenate

N, Q = 9, 4


@dataclass(frozen=True)
class Case:
    """A codec for gradients of one shape.

    Args:
        make: from the shape (o, i), positions, has_bias, basis and Lambda.
        entry_error: of an entry, as a share of its group's largest.
    """

    make: Callable[..., Codec]
    entry_error: float


def pairs(dtype: str) -> Callable[..., Codec]:
    def make(shape, positions, has_bias, basis, Lambda) -> Codec:
        return PairsCodec(shape, positions=positions, has_bias=has_bias, dtype=dtype)

    return make


def eigen(share: float) -> Callable[..., Codec]:
    def make(shape, positions, has_bias, basis, Lambda) -> Codec:
        return of_tiers(basis, Lambda, [tier_of(8, max(1, int(share * Lambda.numel())))])

    return make


def eigen_of_few_bits(bits: int, multiple: int = 64, suffix: str = "_") -> Callable[..., Codec]:
    def make(shape, positions, has_bias, basis, Lambda) -> Codec:
        return of_tiers(
            basis, Lambda, [Tier(bits, Lambda.numel(), multiple=multiple, suffix=suffix and f"_{bits}")]
        )

    return make


def eigen_of_tiers(shape, positions, has_bias, basis, Lambda) -> Codec:
    """8, 4 and 2 bits where there are three coordinates."""
    size = Lambda.numel()
    eight, four = max(1, size // 8), size // 2
    sizes = {8: eight, 4: max(0, four - eight), 2: size - max(eight, four)}
    return of_tiers(basis, Lambda, [tier_of(bits, number) for bits, number in sizes.items() if number])


def of_tiers(basis: Eigenbasis, Lambda: Tensor, tiers: list[Tier]) -> EigenCodec:
    """The largest Lambda, whitened as allocations are."""
    coordinates = Lambda.flatten().argsort(descending=True)[: sum(tier.size for tier in tiers)]
    whitening = (Lambda + 0.1 * Lambda.mean()).flatten()[coordinates].sqrt()
    return EigenCodec(basis, coordinates, whitening, tiers)


def dense(dtype: str) -> Callable[..., Codec]:
    def make(shape, positions, has_bias, basis, Lambda) -> Codec:
        return DenseCodec(shape, dtype=dtype)

    return make


CASES = {
    "dense-int8": Case(dense("int8"), 1 / 254),
    "dense-float16": Case(dense("float16"), 2.0**-11),
    "dense-float32": Case(dense("float32"), 0.0),
    "pairs-int8": Case(pairs("int8"), 1 / 254),
    "pairs-float16": Case(pairs("float16"), 2.0**-11),
    "pairs-float32": Case(pairs("float32"), 0.0),
    "eigen-whole": Case(eigen(1.0), 1 / 254),
    "eigen-half": Case(eigen(0.5), 1 / 254),
    "eigen-4-bits": Case(eigen_of_few_bits(4), NOISE[4]),
    "eigen-2-bits": Case(eigen_of_few_bits(2), NOISE[2]),
    "eigen-tiers": Case(eigen_of_tiers, NOISE[2]),
    "eigen-8-bits-of-schema-4": Case(eigen_of_few_bits(8, 256, ""), 1 / 254),
    "eigen-2-bits-of-schema-4": Case(eigen_of_few_bits(2, 256, ""), NOISE[2]),
}
every_codec = pytest.mark.parametrize("name", CASES)
every_layer = pytest.mark.parametrize(
    ("shape", "positions", "has_bias"),
    [((5, 8), 1, True), ((5, 8), 1, False), ((70, 9), 3, True), ((3, 130), 2, False), ((1, 2), 1, True)],
    ids=["bias", "no-bias", "sequence-wide-out", "sequence-wide-in", "one-output"],
)


def batch(shape: tuple[int, int], positions: int, has_bias: bool, *, n: int = N, seed: int = 0) -> LayerGradient:
    generator = torch.Generator().manual_seed(seed)
    o, i = shape
    a = torch.randn(n, positions, i, generator=generator) * torch.logspace(0, -2, i)
    d = torch.randn(n, positions, o, generator=generator) * torch.logspace(-1, -4, o)
    if has_bias:
        a[..., -1] = 1
    return FactoredGradient(a, d)


@dataclass(frozen=True)
class Stored:
    codec: Codec
    basis: Eigenbasis
    Lambda: Tensor
    gradient: LayerGradient
    arrays: dict[str, Tensor]


def stored(name: str, shape: tuple[int, int], positions: int, has_bias: bool) -> Stored:
    gradient = batch(shape, positions, has_bias)
    basis = eigenbasis(*covariance(gradient))
    Lambda = second_moment_sum(gradient, basis) / N
    codec = CASES[name].make(shape, positions, has_bias, basis, Lambda)
    return Stored(codec, basis, Lambda, gradient, codec.encode(gradient))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_every_registered_codec_is_in_the_suite() -> None:
    kinds = {stored(name, (5, 8), 1, True).codec.codec_id for name in CASES}
    assert kinds == set(_CODECS)


@every_codec
@every_layer
def test_arrays_are_as_declared(name: str, shape, positions: int, has_bias: bool) -> None:
    row = stored(name, shape, positions, has_bias)
    found = {key: (tuple(array.shape), array.numpy().dtype.str[1:]) for key, array in row.arrays.items()}
    declared = {key: ((N, *one), dtype) for key, (one, dtype) in row.codec.arrays().items()}
    assert found == declared


@every_codec
@every_layer
def test_bytes_per_row_is_what_the_arrays_take(name: str, shape, positions: int, has_bias: bool) -> None:
    row = stored(name, shape, positions, has_bias)
    assert row.codec.bytes_per_row * N == sum(array.numpy().nbytes for array in row.arrays.values())


def group_maxima(values: Tensor, group: int) -> Tensor:
    """max|group| for every entry of [..., d]."""
    parts = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in values.split(group, dim=-1)]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("dtype", "group"), [("int8", 64), ("float16", 10**6), ("float32", 1)])
@every_layer
def test_pairs_are_off_by_no_more_than_documented(
    dtype: str, group: int, shape, positions: int, has_bias: bool
) -> None:
    row = stored(f"pairs-{dtype}", shape, positions, has_bias)
    assert isinstance(row.codec, PairsCodec)
    decoded = row.codec.decode_gradient(row.arrays)
    share = CASES[f"pairs-{dtype}"].entry_error
    for found, values in (
        (decoded.inputs, row.gradient.inputs),
        (decoded.output_grads, row.gradient.output_grads),
    ):
        stored_values = values[..., : values.shape[-1] - (has_bias and values is row.gradient.inputs)]
        off = (found[..., : stored_values.shape[-1]] - stored_values).abs()
        # 2^-22: float32's own rounding of the scale and the product
        assert bool((off <= group_maxima(stored_values, group) * (share + 2.0**-22 * bool(share))).all())


@pytest.mark.parametrize("name", ["eigen-whole", "eigen-half"])
@every_layer
def test_kept_coordinates_are_off_by_no_more_than_documented(
    name: str, shape, positions: int, has_bias: bool
) -> None:
    row = stored(name, shape, positions, has_bias)
    codec = row.codec
    assert isinstance(codec, EigenCodec)
    kept = row.basis.rotate(row.gradient).flatten(1)[:, codec.coordinates] / codec.whitening
    decoded = codec.decode(row.arrays)
    again = (row.basis.Q_S.T @ decoded @ row.basis.Q_A).flatten(1)[:, codec.coordinates] / codec.whitening
    # decoding and rotating back costs float32 some 1e-5 of the largest whitened entry
    bound = group_maxima(kept, 64) / 254 + 1e-5 * kept.abs().max() * codec.whitening.max() / codec.whitening
    assert bool(((again - kept).abs() <= bound).all())


@pytest.mark.parametrize("bits", [4, 2])
def test_few_bits_lose_the_share_of_a_groups_square_that_is_documented(bits: int) -> None:
    values = torch.randn(400, 600, generator=torch.Generator().manual_seed(0)) ** 3  # with outliers
    codes, steps = quantize_rotated(values, bits)
    assert codes.shape == (400, 640 * bits // 8)
    restored = rotate_groups(restore_rotated(codes, steps, bits))[:, :600]
    lost = float((restored - values).square().sum() / values.square().sum())
    assert lost == pytest.approx(NOISE[bits], rel=0.35)  # rotated groups are Gaussian nearly, not quite
    even = restored[:, :512]
    assert abs(float((even - values[:, :512]).mean())) < 0.01  # no bias


@pytest.mark.parametrize("name", ["eigen-half"])
def test_coordinates_that_were_not_kept_decode_to_zero(name: str) -> None:
    row = stored(name, (5, 8), 1, True)
    assert isinstance(row.codec, EigenCodec)
    decoded = (row.basis.Q_S.T @ row.codec.decode(row.arrays) @ row.basis.Q_A).flatten(1)
    left_out = torch.ones(40, dtype=torch.bool)
    left_out[row.codec.coordinates] = False
    assert left_out.sum() == 40 - len(row.codec.coordinates) > 10
    assert decoded[:, left_out].abs().max() < 1e-6 * decoded.abs().max()


@every_codec
@every_layer
def test_scores_are_inner_products_with_the_decoded_rows(name: str, shape, positions: int, has_bias: bool) -> None:
    row = stored(name, shape, positions, has_bias)
    queries = row.basis.rotate(batch(shape, positions, has_bias, n=Q, seed=1))  # any coordinates [q, o, i]
    found = row.codec.scores(row.codec.project(queries, row.basis), row.arrays)
    expected = torch.einsum("qoi,noi->qn", row.basis.rotate_back(queries), row.codec.decode(row.arrays))
    assert found.shape == (Q, N)
    assert_close(found, expected)


@every_codec
@every_layer
def test_quadratic_is_the_weighted_squares_of_the_rotated_decoded_rows(
    name: str, shape, positions: int, has_bias: bool
) -> None:
    row = stored(name, shape, positions, has_bias)
    weights = 1 / (row.Lambda + row.Lambda.mean())
    decoded = row.basis.Q_S.T @ row.codec.decode(row.arrays) @ row.basis.Q_A
    expected = torch.einsum("oi,noi->n", weights, decoded.square())
    assert_close(row.codec.quadratic(weights, row.basis, row.arrays), expected)


@every_codec
@every_layer
def test_answers_in_another_basis_are_those_of_the_decoded_rows(
    name: str, shape, positions: int, has_bias: bool
) -> None:
    row, parameters = stored(name, shape, positions, has_bias), diagonal_basis(shape)
    queries, decoded = batch(shape, positions, has_bias, n=Q, seed=1).dense(), row.codec.decode(row.arrays)
    found = row.codec.scores(row.codec.project(queries, parameters), row.arrays)
    assert_close(found, torch.einsum("qoi,noi->qn", queries, decoded))
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    expected = torch.einsum("oi,noi->n", weights, decoded.square())
    assert_close(row.codec.quadratic(weights, parameters, row.arrays), expected)


@every_codec
@every_layer
def test_products_of_rows_are_those_of_the_decoded_rows(name: str, shape, positions: int, has_bias: bool) -> None:
    row = stored(name, shape, positions, has_bias)
    some = {key: array[:4] for key, array in row.arrays.items()}
    decoded = row.codec.decode(row.arrays).double().flatten(1)
    products = row.codec.products(some, row.arrays)
    assert products.dtype == torch.float64
    assert_close(products, decoded[:4] @ decoded.T)
    vectors = row.codec.vectors(row.arrays).double()
    assert_close(vectors @ vectors.T, decoded @ decoded.T)


@every_codec
@every_layer
def test_a_codec_comes_back_from_its_config_and_state(name: str, shape, positions: int, has_bias: bool) -> None:
    row = stored(name, shape, positions, has_bias)
    config = json.loads(json.dumps(row.codec.get_config()))
    again = codec_from_config(row.codec.codec_id, config, row.codec.state(), row.basis)
    assert again.arrays() == row.codec.arrays()
    assert again.get_config() == row.codec.get_config()
    for key, array in again.encode(row.gradient).items():
        assert torch.equal(array, row.arrays[key])
    assert torch.equal(again.decode(row.arrays), row.codec.decode(row.arrays))


@every_codec
def test_rows_do_not_depend_on_the_others_in_the_batch(name: str) -> None:
    row = stored(name, (70, 9), 3, True)
    alone = row.codec.decode(row.codec.encode(row.gradient[4:5]))[0]
    beside_others = row.codec.decode(row.arrays)[4]
    # a matrix product of another size may round another way, and tip a few codes over, of which four are coarse
    bound = 2e-2 if "bits" in name or "tiers" in name else 1e-3
    assert (alone - beside_others).norm() < bound * beside_others.norm()


@every_codec
def test_examples_with_fewer_positions_decode_to_the_same_gradient(name: str) -> None:
    row = stored(name, (5, 8), 3, True)
    short = batch((5, 8), 2, True)
    decoded = row.codec.decode(row.codec.encode(short))
    padded = concatenate([short, row.gradient])[:N]
    assert_close(decoded, row.codec.decode(row.codec.encode(padded)))


@every_codec
def test_zero_gradients_decode_to_exact_zeros(name: str) -> None:
    row = stored(name, (5, 8), 2, True)
    zero = FactoredGradient(torch.zeros(3, 2, 8), torch.zeros(3, 2, 5))
    assert not row.codec.decode(row.codec.encode(zero)).any()


@every_codec
def test_no_example_makes_empty_arrays(name: str) -> None:
    row = stored(name, (5, 8), 2, True)
    arrays = row.codec.encode(row.gradient[:0])
    assert {len(array) for array in arrays.values()} == {0}
    assert row.codec.decode(arrays).shape == (0, 5, 8)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_too_many_positions_are_refused(dtype: str) -> None:
    codec = PairsCodec((5, 8), positions=2, has_bias=True, dtype=dtype)
    with pytest.raises(ValueError, match="3 positions, but rows were laid out for 2"):
        codec.encode(batch((5, 8), 3, True))


@every_codec
def test_damping_is_not_baked_into_the_rows(name: str) -> None:
    row = stored(name, (5, 8), 2, True)
    queries = row.basis.rotate(batch((5, 8), 2, True, n=Q, seed=1))
    decoded = row.basis.Q_S.T @ row.codec.decode(row.arrays) @ row.basis.Q_A
    for kind in ("ekfac", "kfac"):
        for damping in (1e-7, 1e-2, 10.0):
            inverse = get_curvature(kind).inverse_eigenvalues(row.basis, row.Lambda, AbsoluteDamping(damping))
            found = row.codec.scores(row.codec.project(queries * inverse, row.basis), row.arrays)
            expected = torch.einsum("qoi,oi,noi->qn", queries, inverse, decoded)
            assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, r"`dtype` must be one of \['float16', 'float32', 'int8'\], got 'int4'"),
        ({"positions": 0}, r"must be positive, got \(5, 8\) and 0"),
        ({"shape": (0, 8)}, r"must be positive, got \(0, 8\)"),
        ({"shape": (5, 1)}, r"must be positive, got \(5, 1\)"),  # nothing but a bias
    ],
)
def test_pairs_refuse_impossible_layers(arguments: dict, message: str) -> None:
    options = {"shape": (5, 8), "positions": 1, "has_bias": True} | arguments
    with pytest.raises(ValueError, match=message):
        PairsCodec(options.pop("shape"), **options)


@pytest.mark.parametrize(
    ("coordinates", "whitening", "message"),
    [
        ([0, 40], [1.0, 1.0], r"must lie in \[0, 40\)"),
        ([-1], [1.0], r"must lie in \[0, 40\)"),
        ([], [], r"must be \[k\] with k >= 1"),
        ([0, 1], [1.0], r"got \(2,\) and \(1,\)"),
    ],
)
def test_eigen_refuses_impossible_coordinates(coordinates: list, whitening: list, message: str) -> None:
    basis = stored("pairs-int8", (5, 8), 1, True).basis
    with pytest.raises(ValueError, match=message):
        EigenCodec(basis, torch.tensor(coordinates, dtype=torch.int64), torch.tensor(whitening))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tiers": [[3, 2]]}, r"`bits` must be one of \[8, 4, 2\], got 3"),
        ({"bits": 3}, r"`bits` must be one of \[8, 4, 2\], got 3"),
        ({"tiers": [[8, 2], [4, 0]]}, r"`size` must be positive, got 0"),
        ({"tiers": [[8, 1]]}, r"`tiers` must hold the 2 coordinates, got 1"),
        ({"tiers": []}, r"`tiers` must hold the 2 coordinates, got 0"),
    ],
)
def test_eigen_refuses_other_tiers(config: dict, message: str) -> None:
    basis = stored("pairs-int8", (5, 8), 1, True).basis
    state = {"coordinates": torch.tensor([0, 3]), "whitening": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        codec_from_config("eigen", config, state, basis)


def test_an_unknown_codec_lists_the_known() -> None:
    basis = stored("pairs-int8", (5, 8), 1, True).basis
    with pytest.raises(ValueError, match=r"unknown codec 'sketch', known are \['dense', 'eigen', 'pairs'\]"):
        codec_from_config("sketch", {}, {}, basis)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("is_sum", [False, True], ids=["matrices", "sums of outer products"])
def test_dense_rounding_stays_within_its_bound(dtype: str, is_sum: bool) -> None:
    """Entries over ten orders of magnitude, and some that float16 has no room for."""
    generator = torch.Generator().manual_seed(5)
    sizes = 10.0 ** torch.linspace(-9, 1, 30)
    inputs, grads = torch.randn(8, 3, 30, generator=generator) * sizes, torch.randn(8, 3, 5, generator=generator)
    pairs = FactoredGradient(inputs, grads)
    exact = pairs.dense()
    codec = DenseCodec((5, 30), dtype=dtype)
    error = (codec.decode(codec.encode(pairs if is_sum else DenseGradient(exact))) - exact).abs().flatten(1)
    values = exact.abs().flatten(1)
    products = (inputs.flatten(1).norm(dim=1) * grads.flatten(1).norm(dim=1))[:, None]
    if dtype == "float32":
        bound = torch.zeros_like(values)
    elif dtype == "int8":
        bound = group_maxima(values, 64) / 254
    else:
        smallest = 1e-12 * products if is_sum else 3e-8 * values.amax(1, keepdim=True)
        bound = torch.maximum(2.0**-11 * values, smallest)
    assert bool((error <= bound * (1 + 1e-3) + 1e-6 * values).all())

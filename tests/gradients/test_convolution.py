"""A convolution's gradients without its patches: every answer against loops over positions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lightning_influence.functional.covariance import add_covariance_sums
from lightning_influence.gradients import (
    ConvGeometry,
    ConvGradient,
    DenseGradient,
    LayerGradient,
    SummedGradient,
    TransposedConvGradient,
    add_calls,
    concatenate,
    convolution,
)

GEOMETRIES = {
    "plain": (ConvGeometry((3, 2), (1, 1), (1, 1)), (5, 4)),
    "remainder": (ConvGeometry((3, 2), (2, 3), (1, 2)), (8, 10)),
    "1x1": (ConvGeometry((1, 1), (1, 1), (1, 1)), (3, 4)),
    "1x1 strided": (ConvGeometry((1, 1), (2, 2), (1, 1)), (3, 4)),
    "one position": (ConvGeometry((3, 4), (1, 1), (1, 1)), (3, 4)),
    "groups": (ConvGeometry((2, 2), (1, 2), (2, 1), groups=2), (5, 6)),
    "depthwise": (ConvGeometry((2, 2), (1, 1), (1, 1), groups=4), (4, 4)),
    "1d": (ConvGeometry((3,), (2,), (2,)), (11,)),
    "3d": (ConvGeometry((2, 1, 2), (1, 2, 1), (1, 1, 2), groups=2), (3, 4, 4)),
}
N, C, O = 3, 4, 8  # noqa: E741 (the package's index letters)

every_geometry = pytest.mark.parametrize("name", GEOMETRIES)
every_class = pytest.mark.parametrize("kind", [ConvGradient, TransposedConvGradient])
with_and_without_ones = pytest.mark.parametrize("has_ones", [False, True], ids=["", "ones"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(
    name: str, has_ones: bool = False, kind: type[ConvGradient] = ConvGradient, n: int = N, seed: int = 0
) -> ConvGradient:
    geometry, spatial = GEOMETRIES[name]
    sizes = zip(spatial, geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    outputs = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes]
    return kind(draw(n, C, *spatial, seed=seed), draw(n, O, *outputs, seed=seed + 1), geometry, has_ones)


def output_places(gradient: ConvGradient) -> list[tuple[int, ...]]:
    return list(product(*map(range, gradient.output_grads.shape[2:])))


def patch(gradient: ConvGradient, n: int, group: int, place: tuple[int, ...]) -> Tensor:
    """The inputs [i] that an output is made of, gathered one by one."""
    geometry, values = gradient.geometry, []
    channels = C // geometry.groups
    for channel in range(group * channels, (group + 1) * channels):
        for offset in product(*map(range, geometry.kernel_size)):
            at = [
                p * s + k * d for p, s, k, d in zip(place, geometry.stride, offset, geometry.dilation, strict=True)
            ]
            values.append(gradient.inputs[(n, channel, *at)])
    return torch.stack(values + [torch.ones((), dtype=torch.float64)] * gradient.has_ones)


def factors(gradient: ConvGradient, group: int, places: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Patches [n, s, i] and output gradients [n, s, o/g] of a group."""
    rows = slice(group * O // gradient.geometry.groups, (group + 1) * O // gradient.geometry.groups)
    patches = [[patch(gradient, n, group, place) for place in places] for n in range(len(gradient))]
    grads = [[gradient.output_grads[(n, rows, *place)] for place in places] for n in range(len(gradient))]
    return torch.stack([torch.stack(row) for row in patches]), torch.stack([torch.stack(row) for row in grads])


def loops(gradient: ConvGradient) -> Tensor:
    """Gradients [n, o, i]."""
    groups = [factors(gradient, g, output_places(gradient)) for g in range(gradient.geometry.groups)]
    return torch.cat([torch.einsum("nso,nsi->noi", d, a) for a, d in groups], dim=1)


def covariance_sums(gradient: LayerGradient, weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    o, i = gradient.shape
    groups = gradient.geometry.groups  # type: ignore[attr-defined]
    leading = () if groups == 1 else (groups,)
    A = torch.zeros(*leading, i, i, dtype=torch.float64)
    S = torch.zeros(*leading, o // groups, o // groups, dtype=torch.float64)
    return A, S, add_covariance_sums(gradient, A, S, weight=weight)


@every_geometry
@with_and_without_ones
def test_dense_equals_a_sum_of_outer_products(name, has_ones):
    gradient = make(name, has_ones)
    assert gradient.dense().shape == (N, *gradient.shape)
    torch.testing.assert_close(gradient.dense(), loops(gradient))


FAST = {
    "blocks of 8": (ConvGeometry((3, 3), (1, 1), (1, 1)), 8, 16, 9),
    "stride with remainder": (ConvGeometry((3, 3), (2, 2), (1, 1)), 8, 8, 16),
    "groups": (ConvGeometry((3, 3), (1, 1), (1, 1), groups=2), 16, 16, 9),
    "depthwise": (ConvGeometry((3, 3), (2, 1), (1, 1), groups=6), 6, 6, 10),
}


@pytest.mark.parametrize("name", FAST)
@with_and_without_ones
def test_dense_by_convolution_equals_dense_by_patches(name, has_ones):
    geometry, c, o, size = FAST[name]
    outputs = [(size - 3) // s + 1 for s in geometry.stride]
    exact = ConvGradient(draw(5, c, size, size), draw(5, o, *outputs), geometry, has_ones)
    gradient = exact.with_tensors([tensor.float() for tensor in exact.tensors])
    assert gradient._is_faster_by_convolution
    assert not exact._is_faster_by_convolution
    error = (gradient.dense() - exact.dense()).norm() / exact.dense().norm()
    assert error < 1e-6  # some dozen products in float32


@every_geometry
@with_and_without_ones
def test_projections_sum_to_those_of_the_dense_gradients(name, has_ones):
    gradient = make(name, has_ones)
    for p in (2, 9):  # fewer and more than outputs in a group
        U, V = draw(gradient.shape[0], p, seed=3).float(), draw(gradient.shape[1], p, seed=4).float()
        expected = torch.einsum("op,noi,ip->p", U.double(), loops(gradient), V.double())
        found = gradient.projections(U, V)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(0).double(), expected, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize("limit", [1, 2**20], ids=["one at a time", "all"])
@every_geometry
@with_and_without_ones
def test_position_chunks_are_patches_and_output_gradients(name, has_ones, limit, monkeypatch):
    monkeypatch.setattr(convolution, "CACHED_ELEMENTS", limit)
    gradient = make(name, has_ones)
    chunks = list(gradient.position_chunks())
    assert len(chunks) == (N if limit == 1 else 1)
    for group in range(gradient.geometry.groups):
        a, d = factors(gradient, group, output_places(gradient))
        pick = (lambda t: t) if gradient.geometry.groups == 1 else (lambda t, g=group: t[g])
        assert torch.equal(torch.cat([pick(inputs) for inputs, _ in chunks]), a.flatten(0, 1))
        assert torch.equal(torch.cat([pick(grads) for _, grads in chunks]), d.flatten(0, 1))


@every_geometry
@every_class
def test_a_sample_of_all_positions_is_the_gradient_itself(name, kind):
    gradient = make(name, kind=kind)
    assert gradient.sampled(gradient.positions, torch.Generator()) == (gradient, 1.0)


@every_geometry
@with_and_without_ones
def test_every_position_is_drawn_and_is_that_position(name, has_ones):
    gradient = make(name, has_ones)
    places = {loops_at(gradient, [place]).numpy().tobytes() for place in output_places(gradient)}
    generator, drawn = torch.Generator().manual_seed(0), set()
    for _ in range(12 * gradient.positions if gradient.positions > 1 else 0):
        sample, weight = gradient.sampled(1, generator)
        assert (sample.positions, sample.shape, weight) == (1, gradient.shape, gradient.positions)
        drawn.add(sample.dense().numpy().tobytes())
    assert gradient.positions == 1 or drawn == places


@every_geometry
def test_a_sample_without_one_position_lacks_that_position(name):
    gradient = make(name, has_ones=True)
    if gradient.positions == 1:
        return
    sample, weight = gradient.sampled(gradient.positions - 1, torch.Generator().manual_seed(0))
    assert weight == gradient.positions / (gradient.positions - 1)
    missing = loops(gradient) - sample.dense()
    assert sum(torch.allclose(missing, loops_at(gradient, [place])) for place in output_places(gradient)) == 1


def loops_at(gradient: ConvGradient, places: list[tuple[int, ...]]) -> Tensor:
    groups = [factors(gradient, g, places) for g in range(gradient.geometry.groups)]
    return torch.cat([torch.einsum("nso,nsi->noi", d, a) for a, d in groups], dim=1)


@pytest.mark.parametrize("name", ["remainder", "groups", "depthwise", "1d"])
def test_covariances_of_single_positions_average_to_the_full_ones(name, monkeypatch):
    gradient = make(name, has_ones=True)
    A, S, count = covariance_sums(gradient)
    A_mean, S_mean, counts = torch.zeros_like(A), torch.zeros_like(S), 0
    for place in range(gradient.positions):
        order = torch.tensor([place])
        monkeypatch.setattr(torch, "randperm", lambda s, generator, order=order: order)
        sample, weight = gradient.sampled(1, torch.Generator())
        A_one, S_one, one = covariance_sums(sample, weight)
        A_mean += A_one * weight / gradient.positions
        S_mean += S_one / gradient.positions
        counts = counts + one
    assert torch.equal(torch.as_tensor(counts), count)
    torch.testing.assert_close(A_mean, A)
    torch.testing.assert_close(S_mean, S)


def test_a_sample_has_the_same_positions_for_all_examples():
    gradient = make("groups", has_ones=True, n=1)
    twins = gradient.with_tensors([tensor.expand(3, *tensor.shape[1:]) for tensor in gradient.tensors])
    sample, _ = twins.sampled(3, torch.Generator().manual_seed(0))
    assert torch.equal(sample.dense()[0], sample.dense()[1])
    assert sample.positions == 3


@every_class
def test_scale_and_rows_act_on_the_dense_gradients(kind):
    gradient = make("groups", kind=kind)
    scaled = gradient.rescaled(torch.tensor([2.0, 0.0, -1.0]))
    assert type(scaled) is kind
    expected = loops(gradient) * torch.tensor([2.0, 0.0, -1.0]).reshape(-1, 1, 1)
    torch.testing.assert_close(scaled.dense().double(), expected, rtol=1e-4, atol=1e-4)  # a float32 copy
    assert torch.equal(gradient[1:].dense(), gradient.dense()[1:])
    assert gradient[:0].dense().shape == (0, *gradient.shape)


def test_a_transposed_layer_is_scaled_by_what_is_linear_in_the_loss():
    gradient = make("plain", kind=TransposedConvGradient)
    scaled = gradient.rescaled(torch.tensor(3.0))
    torch.testing.assert_close(scaled.inputs, 3 * gradient.inputs.float())
    assert torch.equal(scaled.output_grads, gradient.output_grads.float())


@pytest.mark.parametrize("place", [0, 1], ids=["inputs", "output_grads"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@every_class
def test_an_example_with_a_bad_entry_is_not_finite(kind, bad, place):
    gradient = make("groups", kind=kind).rescaled(torch.tensor(1.0))
    gradient.tensors[place][1].view(-1)[5] = bad
    assert gradient.is_finite().tolist() == [True, False, True]


@every_class
def test_batches_of_one_size_are_stacked_and_stay_small(kind):
    parts = [make("groups", kind=kind, seed=0), make("groups", kind=kind, n=2, seed=5)]
    joined = concatenate(parts)
    assert type(joined) is kind
    torch.testing.assert_close(joined.dense(), torch.cat([loops(part) for part in parts]))


def test_batches_of_other_image_sizes_become_dense():
    geometry = GEOMETRIES["plain"][0]
    small, large = make("plain"), ConvGradient(draw(2, C, 6, 7), draw(2, O, 4, 6), geometry)
    joined = concatenate([small, large])
    assert isinstance(joined, DenseGradient)
    torch.testing.assert_close(joined.values, torch.cat([loops(small), loops(large)]))


def test_batches_in_other_geometries_are_not_stacked():
    """A weight may be shared by convolutions with other strides, whose tensors can be alike in shape."""
    one, other = (ConvGradient(draw(2, C, 5), draw(2, O, 2), ConvGeometry((2,), (s,), (1,))) for s in (2, 3))
    torch.testing.assert_close(concatenate([one, other]).dense(), torch.cat([loops(one), loops(other)]))
    assert not torch.equal(one.dense(), other.dense())


def test_calls_on_other_image_sizes_add_up():
    geometry = GEOMETRIES["plain"][0]
    small, large = make("plain"), ConvGradient(draw(N, C, 6, 7), draw(N, O, 4, 6), geometry)
    both = add_calls([small, large])
    assert isinstance(both, SummedGradient)
    torch.testing.assert_close(both.dense(), loops(small) + loops(large))
    A, S, count = covariance_sums(small)
    A_more, S_more, more = covariance_sums(large)
    A_both, S_both = torch.zeros_like(A), torch.zeros_like(S)
    assert add_covariance_sums(both, A_both, S_both) == count + more
    torch.testing.assert_close(A_both, A + A_more)
    torch.testing.assert_close(S_both, S + S_more)


def test_ones_are_a_last_column():
    gradient = make("groups")
    dense = gradient.with_ones().dense()
    torch.testing.assert_close(dense[..., :-1], loops(gradient))
    torch.testing.assert_close(dense[..., -1], gradient.output_grads.sum((2, 3)))


def test_inputs_are_kept_without_their_patches():
    gradient = make("plain", has_ones=True)
    assert gradient.nbytes == 8 * (gradient.inputs.numel() + gradient.output_grads.numel())
    patches = gradient.geometry.patches(gradient.inputs)
    assert patches.data_ptr() == gradient.inputs.data_ptr()


def test_inputs_without_their_padding_are_refused():
    with pytest.raises(
        ValueError, match=r"must be padded: outputs \(2, 3, 8\) .* need \(10,\) of them, got \(8,\)"
    ):
        ConvGradient(draw(2, 4, 8), draw(2, 3, 8), ConvGeometry((3,), (1,), (1,)))


def test_mixed_precisions_are_multiplied_in_the_wider_one():
    exact = make("groups", has_ones=True)
    mixed = exact.with_tensors([exact.inputs.float(), exact.output_grads.bfloat16()])
    rounded = exact.with_tensors([exact.inputs, exact.output_grads.bfloat16().double()])
    assert mixed.dense().dtype == torch.float32
    torch.testing.assert_close(mixed.dense().double(), loops(rounded), rtol=1e-4, atol=1e-4)

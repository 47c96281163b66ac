"""The same claims for every layer with every flag (`cases`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_influence.codecs import DenseCodec, EigenCodec
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import LayerGradient, RowGradient, SummedGradient
from lightning_influence.layers import TrackedLayer
from tests.layer_table import BOUNDS, adapters_without_row
from tests.layers.case import Case, N
from tests.layers.cases import CASES
from tests.layers.running import FIRST, SECOND, build, by_autograd, capture, inputs_of, relative, run

EVERY = pytest.mark.parametrize("case", CASES, ids=str)
# bfloat16 keeps 8 bits, 4e-3 a rounding. In a block of layers an activation near 0 may also change sides.
BFLOAT16, BFLOAT16_BLOCK = 0.02, 0.2
SLACK = 1.01  # on bounds of rounding to int8, which is itself computed in float32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The layers are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", BOUNDS, ids=["float64", "float32"])
@EVERY
def test_gradients_equal_autograd_one_example_at_a_time(case: Case, dtype: torch.dtype) -> None:
    assert run(case, dtype).error <= BOUNDS[dtype]


@EVERY
def test_rows_add_up_to_grad(case: Case) -> None:
    done = run(case, torch.float64)
    for name, gradient in done.captured.items():
        assert relative(gradient.dense().sum(0), done.summed[name]) <= 1e-10


@EVERY
def test_projections_add_up_to_those_of_grad(case: Case) -> None:
    done = run(case, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, gradient in done.captured.items():
        U, V = (torch.randn(size, 3, generator=generator) for size in gradient.shape)
        expected = torch.einsum("op,oi,ip->p", U, done.summed[name].float(), V)
        torch.testing.assert_close(gradient.projections(U, V).sum(0), expected, rtol=1e-3, atol=1e-3)


@EVERY
def test_all_parameters_are_covered_or_the_reason_is_said(case: Case) -> None:
    coverage = run(case, torch.float64).coverage
    if case.reason:
        assert any(case.reason in layer.reason for layer in coverage.uncovered)
    else:
        assert coverage.share == 1
        assert not coverage.uncovered


@EVERY
def test_two_calls_in_a_step_add_up(case: Case) -> None:
    factors = (FIRST, FIRST) if case.hold else (FIRST, SECOND)  # held statistics are those of one input
    assert run(case, torch.float64, factors).error <= BOUNDS[torch.float64]


@pytest.mark.parametrize("case", [case for case in CASES if not case.needs_batch], ids=str)
def test_a_batch_of_one_is_enough(case: Case) -> None:
    model = build(case, torch.float64)
    inputs = case.example(inputs_of(case, torch.float64), 1)
    layers, captured, _ = capture(case, model, inputs)
    expected = by_autograd(layers, model, inputs, (FIRST,))
    for name, gradient in captured.items():
        assert len(gradient) == 1
        assert relative(gradient.dense()[0], expected[name]) <= 1e-10


@EVERY
def test_factors_equal_their_definition(case: Case) -> None:
    done = run(case, torch.float64)
    for name, layer in done.layers.items():
        if layer.structure.is_diagonal:
            continue
        gradient = done.captured[name]
        metric = KroneckerCovariance(layer.shape, layer.structure, dtype=torch.float64)
        metric.update(gradient)
        A, S, summed = by_loops(gradient, layer.structure)
        torch.testing.assert_close(metric.compute(), (A, S), rtol=1e-10, atol=1e-12)
        assert relative(summed, done.expected[name].sum(0)) <= 1e-10  # so the positions are those of the gradient


@EVERY
def test_coordinates_and_lambda_equal_their_definition(case: Case) -> None:
    done = run(case, torch.float64)
    for name, layer in done.layers.items():
        gradient, basis = done.captured[name], basis_of(layer, done.captured[name])
        expected = rotated_by_loops(done.expected[name], basis, layer.structure.groups)
        assert relative(basis.rotate(gradient), expected) <= 1e-10
        assert relative(second_moment_sum(gradient, basis), expected.square().sum(0)) <= 1e-10


@EVERY
def test_codecs_give_the_gradients_back(case: Case) -> None:
    done = run(case, torch.float32)
    for name, layer in done.layers.items():
        gradient, basis = done.captured[name], basis_of(layer, done.captured[name])
        dense = gradient.dense()
        exact, rounded = DenseCodec(layer.shape, dtype="float32"), DenseCodec(layer.shape)
        assert torch.equal(exact.decode(exact.encode(gradient)), dense)
        error = (rounded.decode(rounded.encode(gradient)) - dense).abs()
        assert error.max() <= SLACK * dense.abs().max() / 254

        Lambda = second_moment_sum(gradient, basis) / N
        whitening = (Lambda + 0.1 * Lambda.mean()).sqrt().flatten()
        eigen = EigenCodec(basis, torch.arange(whitening.numel()), whitening)
        error = (eigen.decode(eigen.encode(gradient)) - dense).flatten(1).norm(dim=1)
        largest = (basis.rotate(gradient).flatten(1) / whitening).abs().amax(1)
        # an entry of z is off by max|z| / 254, so a coordinate by that much times its whitening
        assert (error <= SLACK * whitening.norm() * largest / 254 + 1e-5 * dense.abs().max()).all()


@EVERY
def test_bfloat16_is_close_to_float32(case: Case) -> None:
    low = build(case, torch.bfloat16)
    inputs = inputs_of(case, torch.bfloat16)
    wide = tuple(x.float() if x is not None and x.is_floating_point() else x for x in inputs)
    expected = capture(case, copy.deepcopy(low).float(), wide)[1]
    tolerance = BFLOAT16_BLOCK if case.layer.startswith("nn.Transformer") else BFLOAT16
    for name, gradient in capture(case, low, inputs)[1].items():
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient.dense(), expected[name].dense()) <= tolerance


def test_every_registered_adapter_has_a_case() -> None:
    assert adapters_without_row() == []


def basis_of(layer: TrackedLayer, gradient: LayerGradient) -> Eigenbasis:
    """The layer's basis in the gradient's dtype."""
    if layer.structure.is_diagonal:
        unit = diagonal_basis(layer.shape)
        return Eigenbasis(None, None, unit.eigenvalues_A.to(gradient.dtype), unit.eigenvalues_S.to(gradient.dtype))
    metric = KroneckerCovariance(layer.shape, layer.structure, dtype=gradient.dtype)
    metric.update(gradient)
    return metric.eigenbasis()


def by_loops(gradient: LayerGradient, structure: KroneckerStructure) -> tuple[Tensor, Tensor, Tensor]:
    """A, S and the sum of the gradients over examples, position by position."""
    (o, i), groups = gradient.shape, structure.groups
    A, S = torch.zeros(groups, i, i).double(), torch.zeros(groups, o // groups, o // groups).double()
    total, counts = torch.zeros(groups, o // groups, i).double(), torch.zeros(groups, 1, 1).double()
    for group, a, d in positions_of(gradient, structure):
        if not d.any():
            continue
        A[group] += torch.outer(a, a)
        S[group] += torch.outer(d, d)
        total[group] += torch.outer(d, a)
        counts[group] += 1
    A, S = A / counts.clamp(min=1), S / N
    A = A if structure.full_A else A.diagonal(dim1=1, dim2=2)
    S = S if structure.full_S else S.diagonal(dim1=1, dim2=2)
    return (A[0], S[0], total[0]) if groups == 1 else (A, S, total.flatten(0, 1))


def positions_of(gradient: LayerGradient, structure: KroneckerStructure) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Group, a [i] and d [o / groups] of each position of each example."""
    if isinstance(gradient, SummedGradient):
        for part in gradient.parts:
            yield from positions_of(part, structure)
    elif isinstance(gradient, RowGradient):
        one_hot = torch.eye(gradient.num_rows).double()
        for row, a in zip(gradient.rows.flatten(), gradient.grads.flatten(0, 1), strict=True):
            if a.any():  # a looked-up row without gradient is no position
                yield 0, a, one_hot[row]
    else:
        for inputs, output_grads in gradient.position_chunks():
            if structure.groups == 1:
                inputs, output_grads = inputs[None], output_grads[None]
            for group in range(structure.groups):
                for a, d in zip(inputs[group], output_grads[group], strict=True):
                    yield group, a, d


def rotated_by_loops(dense: Tensor, basis: Eigenbasis, groups: int) -> Tensor:
    """Q_S^T G Q_A of dense gradients [n, o, i], group by group."""
    rows = []
    for group, block in enumerate(dense.chunk(groups, dim=1)):
        Q_A, Q_S = (Q if Q is None or groups == 1 else Q[group] for Q in (basis.Q_A, basis.Q_S))
        block = block if Q_A is None else block @ Q_A
        rows.append(block if Q_S is None else torch.einsum("po,npi->noi", Q_S, block))
    return torch.cat(rows, dim=1)

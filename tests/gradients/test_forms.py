"""Every form of a gradient stands for one dense matrix an example; the truth is made by loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_influence.functional import coordinates
from lightning_influence.functional.coordinates import CoordinateSelection
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.functional.products import inner_products, weighted_squares
from lightning_influence.gradients import (
    DenseGradient,
    FactoredGradient,
    LayerGradient,
    RowGradient,
    SummedGradient,
    add_calls,
    base,
    concatenate,
)

O, I = 7, 4  # noqa: E741 (the package's index letters)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factored(n: int = 5, s: int = 3, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(drawn(n, s, I, seed=seed), drawn(n, s, O, seed=seed + 1))


def rows(n: int = 5, s: int = 6, seed: int = 0) -> RowGradient:
    """Few rows, so that most are looked up more than once."""
    places = torch.randint(0, O, (n, s), generator=torch.Generator().manual_seed(seed))
    return RowGradient(O, places, drawn(n, s, I, seed=seed))


def dense(n: int = 5, seed: int = 0) -> DenseGradient:
    return DenseGradient(drawn(n, O, I, seed=seed))


def summed(n: int = 5, seed: int = 0) -> SummedGradient:
    return SummedGradient((factored(n, seed=seed), rows(n, seed=seed + 7)))


FORMS: dict[str, Callable[..., LayerGradient]] = {
    "factored": factored,
    "rows": rows,
    "dense": dense,
    "summed": summed,
}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())


def truth(gradient: LayerGradient) -> Tensor:
    """[n, o, i] by loops over examples and positions."""
    if isinstance(gradient, SummedGradient):
        return sum(truth(part) for part in gradient.parts)  # type: ignore[return-value]
    if isinstance(gradient, DenseGradient):
        return gradient.values
    total = torch.zeros(len(gradient), *gradient.shape, dtype=torch.float64)
    for n in range(len(gradient)):
        for s in range(gradient.positions):
            if isinstance(gradient, RowGradient):
                total[n, gradient.rows[n, s]] += gradient.grads[n, s]
            else:
                assert isinstance(gradient, FactoredGradient)
                total[n] += torch.outer(gradient.output_grads[n, s], gradient.inputs[n, s])
    return total


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_form
def test_dense_is_the_sum_over_positions(make: Callable[..., LayerGradient]) -> None:
    gradient = make()
    assert gradient.shape == (O, I)
    close(gradient.dense(), truth(gradient))


@every_form
def test_projections_add_up_to_those_of_the_sum_over_examples(make: Callable[..., LayerGradient]) -> None:
    gradient, U, V = make(), drawn(O, 3, seed=5).float(), drawn(I, 3, seed=6).float()
    expected = torch.stack([U[:, p].double() @ truth(gradient).sum(0) @ V[:, p].double() for p in range(3)])
    torch.testing.assert_close(gradient.projections(U, V).sum(0).double(), expected, rtol=1e-4, atol=1e-4)


@every_form
def test_some_of_the_examples_are_the_same_examples(make: Callable[..., LayerGradient]) -> None:
    gradient, chosen = make(), torch.tensor([3, 0])
    close(gradient[chosen].dense(), truth(gradient)[chosen])
    close(gradient[1:3].dense(), truth(gradient)[1:3])
    assert len(gradient[:0]) == 0


@every_form
@pytest.mark.parametrize("factor", [torch.tensor(0.5), torch.arange(5) / 3], ids=["one", "each"])
def test_rescaling_multiplies_each_example_once(make: Callable[..., LayerGradient], factor: Tensor) -> None:
    gradient = make()
    before = truth(gradient)
    scaled = gradient.rescaled(factor)
    assert scaled.dtype == torch.float32
    expected = before * (factor if factor.ndim == 0 else factor[:, None, None])
    torch.testing.assert_close(scaled.dense().double(), expected, rtol=1e-5, atol=1e-5)
    for tensor in gradient.tensors:
        tensor.zero_()
    torch.testing.assert_close(scaled.dense().double(), expected, rtol=1e-5, atol=1e-5)  # it was a copy


@every_form
def test_an_example_that_is_not_finite_is_told(make: Callable[..., LayerGradient]) -> None:
    gradient = make()
    assert gradient.is_finite().all()
    gradient.tensors[-1][2].flatten()[0] = torch.nan
    gradient.tensors[-1][4].flatten()[0] = torch.inf
    assert gradient.is_finite().tolist() == [True, True, False, True, False]


@every_form
def test_joined_batches_hold_the_examples_of_both(make: Callable[..., LayerGradient]) -> None:
    first, second = make(n=2), make(n=3, seed=9)
    close(concatenate([first, second]).dense(), torch.cat([truth(first), truth(second)]))
    assert type(concatenate([first, second])) is type(first)


@pytest.mark.parametrize("other", [factored, rows, dense, summed])
@every_form
def test_batches_of_different_forms_can_be_joined(
    make: Callable[..., LayerGradient], other: Callable[..., LayerGradient]
) -> None:
    first, second = make(n=2), other(n=3, seed=9)
    close(concatenate([first, second]).dense(), torch.cat([truth(first), truth(second)]))


@pytest.mark.parametrize("make", [factored, rows])
def test_shorter_examples_are_padded_without_effect(make: Callable[..., LayerGradient]) -> None:
    short, long = make(n=2, s=1), make(n=3, s=4, seed=9)
    joined = concatenate([short, long])
    assert joined.positions == 4
    close(joined.dense(), torch.cat([truth(short), truth(long)]))


@pytest.mark.parametrize("other", [factored, rows, dense])
@every_form
def test_calls_of_one_layer_add_up(
    make: Callable[..., LayerGradient], other: Callable[..., LayerGradient]
) -> None:
    calls = [make(), other(seed=9), make(seed=5)]
    close(add_calls(calls).dense(), sum(truth(call) for call in calls))


def test_calls_of_one_form_stay_in_it() -> None:
    assert isinstance(add_calls([factored(), factored(seed=3)]), FactoredGradient)
    assert isinstance(add_calls([rows(), rows(seed=3)]), RowGradient)
    assert isinstance(add_calls([dense(), dense(seed=3)]), DenseGradient)


def test_look_ups_of_a_row_are_combined_within_an_example_only() -> None:
    gradient = rows()
    examples, places, sums = gradient.combined()
    found = torch.zeros(5, O, I, dtype=torch.float64)
    for example, place, total in zip(examples, places, sums, strict=True):
        assert not found[example, place].any()
        found[example, place] = total
    close(found, truth(gradient))


@every_form
def test_inner_products_and_weighted_squares_are_those_of_the_dense(make: Callable[..., LayerGradient]) -> None:
    gradient, matrices, weights = make(), drawn(2, O, I, seed=3), drawn(O, I, seed=4)
    close(inner_products(gradient, matrices), torch.einsum("qoi,noi->qn", matrices, truth(gradient)))
    close(weighted_squares(gradient, weights), (truth(gradient).square() * weights).sum((1, 2)))


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=seed))[0]


def values(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


BASES = {
    "full": Eigenbasis(rotation(I, 1), rotation(O, 2), values(I), values(O)),
    "rows-as-they-are": Eigenbasis(rotation(I, 1), None, values(I), values(O)),
    "inputs-as-they-are": Eigenbasis(None, rotation(O, 2), values(I), values(O)),
    "diagonal": Eigenbasis(None, None, values(I), values(O)),
    "groups": Eigenbasis(
        torch.stack([rotation(I, seed) for seed in range(O)]),
        torch.ones(O, 1, 1, dtype=torch.float64),
        values(O, I),
        values(O, 1),
    ),
}
every_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())


def rotated(gradients: Tensor, basis: Eigenbasis) -> Tensor:
    """Q_S^T G Q_A of each example and group, by loops."""
    coordinates = []
    for gradient in gradients:
        groups = basis.eigenvalues_S.shape[0] if basis.eigenvalues_S.ndim > 1 else 1
        blocks = []
        for number, block in enumerate(gradient.chunk(groups)):
            Q_A = basis.Q_A if basis.Q_A is None or groups == 1 else basis.Q_A[number]
            Q_S = basis.Q_S if basis.Q_S is None or groups == 1 else basis.Q_S[number]
            block = block if Q_A is None else block @ Q_A
            blocks.append(block if Q_S is None else Q_S.T @ block)
        coordinates.append(torch.cat(blocks))
    return torch.stack(coordinates)


@every_basis
@every_form
def test_coordinates_are_those_of_the_dense(make: Callable[..., LayerGradient], basis: Eigenbasis) -> None:
    gradient = make()
    expected = rotated(truth(gradient), basis)
    assert basis.shape == (O, I)
    close(basis.rotate(gradient), expected)
    close(basis.rotate_back(expected), truth(gradient))


@pytest.mark.parametrize("positions", [1, 2, 40])
def test_the_cheaper_way_to_rotate_gives_the_same(positions: int) -> None:
    gradient = factored(s=positions)
    close(BASES["full"].rotate(gradient), rotated(truth(gradient), BASES["full"]))


@pytest.mark.parametrize("chunk", [2**24, 1], ids=["at-once", "one-by-one"])
@every_basis
@every_form
def test_moments_and_chosen_coordinates_are_those_of_the_dense(
    make: Callable[..., LayerGradient], basis: Eigenbasis, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", chunk)
    gradient, kept = make(), torch.tensor([5, 0, 27, 6])
    expected = rotated(truth(gradient), basis)
    close(CoordinateSelection(basis, kept).of(gradient), expected.flatten(1)[:, kept])
    close(second_moment_sum(gradient, basis), expected.square().sum(0))


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("copied", [0, 128], ids=["blocks", "all-products"])
@pytest.mark.parametrize("kept", [[0], [27, 0], [3, 7, 11], list(range(28))], ids=["one", "two", "column", "all"])
def test_chosen_coordinates_do_not_depend_on_the_way_they_are_made(
    positions: int, kept: list[int], copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinates, "COPIED", copied)
    gradient = factored(s=positions)
    expected = rotated(truth(gradient), BASES["full"]).flatten(1)[:, kept]
    selection = CoordinateSelection(BASES["full"], torch.tensor(kept))
    close(selection.of(gradient), expected)
    close(selection.of(DenseGradient(truth(gradient))), expected)


@pytest.mark.parametrize("make", [factored, rows], ids=["factored", "rows"])
def test_a_sample_takes_every_position_that_carries_gradient_if_there_are_few(
    make: Callable[..., LayerGradient],
) -> None:
    """As where the loss looks at a classification token."""
    gradient = make(s=40)
    linear = gradient.tensors[-1].clone()
    linear[:, [position for position in range(40) if position not in (3, 17)]] = 0
    gradient = gradient.with_tensors([*gradient.tensors[:-1], linear])
    sample, weight = gradient.sampled(4, torch.Generator().manual_seed(0))
    assert weight == 1
    close(sample.dense(), truth(gradient))


def test_a_sample_stands_for_the_positions_that_carry_gradient() -> None:
    gradient = factored(s=40)
    half = FactoredGradient(gradient.inputs, gradient.output_grads * (torch.arange(40) < 20).unsqueeze(-1))
    sample, weight = half.sampled(5, torch.Generator().manual_seed(0))
    assert (sample.positions, weight) == (5, 4)
    assert bool((sample.output_grads != 0).any(-1).all())


def test_a_sample_of_no_gradient_at_all_is_no_gradient() -> None:
    nothing = FactoredGradient(drawn(5, 40, I), torch.zeros(5, 40, O, dtype=torch.float64))
    assert not nothing.sampled(4, torch.Generator())[0].dense().any()


def test_gradients_are_unchanged_by_being_measured() -> None:
    gradient = dense()
    before = gradient.values.clone()
    second_moment_sum(gradient, BASES["diagonal"])
    diagonal_basis((O, I)).rotate(gradient)
    assert torch.equal(gradient.values, before)

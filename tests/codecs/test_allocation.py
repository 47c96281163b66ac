"""Which coordinates rows keep: within the budget, and by what they are worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.codecs import EigenCodec, allocate, allocate_for, expected_spearman
from lightning_influence.codecs.tiers import LOST, tier_of
from lightning_influence.functional.kronecker import eigenbasis

layers_of_lambda = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4)


def drawn(*shape: int, seed: int = 0, decades: float = 4.0) -> Tensor:
    """Eigenvalues that fall over some powers of ten."""
    return 10 ** (-decades * torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


@given(layers_of_lambda, st.integers(1, 2000), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_allocation_respects_the_budget_and_every_layer(
    shapes: list[tuple[int, int]], budget: int, seed: int
) -> None:
    Lambdas = {str(number): drawn(*shape, seed=seed + number) for number, shape in enumerate(shapes)}
    chosen = allocate(Lambdas, budget)
    # a layer that got none is given one on top: a code and a scale
    assert sum(allocation.nbytes for allocation in chosen.values()) <= max(budget, 5 * len(shapes))
    for name, allocation in chosen.items():
        k = sum(tier.size for tier in allocation.tiers)
        assert 1 <= k == len(allocation.coordinates.unique()) == len(allocation.whitening)
        assert int(allocation.coordinates.max()) < Lambdas[name].numel()
        assert bool((allocation.whitening > 0).all())
        bits = [tier.bits for tier in allocation.tiers]
        assert bits == sorted(set(bits), reverse=True)


@pytest.mark.parametrize("budget", [1000, 4096, 8192])
def test_rows_of_many_layers_use_nearly_all_of_the_budget(budget: int) -> None:
    Lambdas = {str(number): drawn(40, 50, seed=number) for number in range(6)}
    one = eigenbasis(torch.eye(50), torch.eye(40))
    found = sum(EigenCodec.of(one, chosen).bytes_per_row for chosen in allocate(Lambdas, budget).values())
    assert 0.95 * budget <= found <= budget


def test_a_large_budget_keeps_everything_in_8_bits() -> None:
    Lambda = drawn(20, 30)
    Lambda[:5] = 0  # as what the first examples do not touch
    (chosen,) = allocate({"layer": Lambda}, 10**9).values()
    assert [(tier.bits, tier.size) for tier in chosen.tiers] == [(8, 600)]


def test_the_most_important_coordinates_come_first_and_have_the_most_bits() -> None:
    Lambda = drawn(60, 50)
    (chosen,) = allocate({"layer": Lambda}, 1300).values()
    kept = Lambda.flatten()[chosen.coordinates]
    assert [tier.bits for tier in chosen.tiers] == [8, 4, 2]
    assert bool((kept.diff() <= 0).all())
    left_out = Lambda.flatten().sort().values[: 3000 - len(kept)]
    assert kept.min() >= left_out.max()
    torch.testing.assert_close(chosen.whitening, (kept + 0.1 * Lambda.mean()).sqrt())


@pytest.mark.parametrize("budget", [300, 600, 1200, 2400])
def test_no_uniform_number_of_bits_keeps_more(budget: int) -> None:
    """The definition: what is kept of the sum of the squares (Lambda / (Lambda + delta))^2."""
    Lambda = drawn(40, 32, decades=3.0)
    gains = (Lambda / (Lambda + 0.1 * Lambda.mean())).double().square().flatten().sort(descending=True).values
    (chosen,) = allocate({"layer": Lambda}, budget).values()
    bits = torch.tensor(list(itertools.chain(*([tier.bits] * tier.size for tier in chosen.tiers))))
    found = sum((1 - LOST[b]) * float(gains[: len(bits)][bits == b].sum()) for b in LOST)
    for b in LOST:
        affordable = int(budget / (b / 8 + (4 / 64 if b == 8 else 4 / 256)))
        assert found >= 0.99 * (1 - LOST[b]) * float(gains[:affordable].sum())  # .99: multiples of 64


def test_the_budget_is_shared_by_signal_and_not_by_scale() -> None:
    Lambda = drawn(30, 40)
    chosen = allocate({"small": 1e-8 * Lambda, "large": 1e8 * Lambda}, 400)
    # Lambda / (Lambda + 0.1 mean) has no unit: both layers get half
    assert abs(chosen["small"].nbytes - chosen["large"].nbytes) <= 16 + 4


def test_a_layer_without_gradient_keeps_one_coordinate() -> None:
    chosen = allocate({"dead": torch.zeros(20, 30), "alive": drawn(20, 30)}, 200)
    assert len(chosen["dead"].coordinates) == 1
    assert bool(chosen["dead"].whitening.isfinite().all())


def test_equal_eigenvalues_are_kept_as_far_as_the_budget_goes() -> None:
    (chosen,) = allocate({"layer": torch.ones(40, 100)}, 600).values()
    assert 500 <= chosen.nbytes <= 600


@pytest.mark.parametrize("tail", [1, 10, 40, 63])
def test_the_last_coordinates_of_a_layer_are_not_padded_at_a_loss(tail: int) -> None:
    Lambda = drawn(1, 64 + tail, decades=0.1)
    for budget in range(20, 120):
        (chosen,) = allocate({"layer": Lambda}, budget).values()
        padding = sum((tier.width - tier.size) * tier.bits / 8 for tier in chosen.tiers)
        assert padding <= 64 - 32  # more coordinates than these would have taken as many bytes with 8 bits each


@pytest.mark.parametrize("wanted", [0.7, 0.9, 0.99, 0.999])
def test_an_error_is_reached_with_the_least_bytes(wanted: float) -> None:
    Lambdas = {"one": drawn(60, 50), "two": drawn(30, 70, seed=1)}

    def expected(chosen: dict) -> float:
        return expected_spearman(Lambdas, {name: allocation.tiers for name, allocation in chosen.items()})

    chosen = allocate_for(Lambdas, wanted)
    nbytes = sum(allocation.nbytes for allocation in chosen.values())
    assert expected(chosen) >= wanted
    assert expected(allocate(Lambdas, int(0.9 * nbytes))) < wanted


def test_an_expected_spearman_is_that_of_independent_gaussians() -> None:
    """By drawing them: within .02, as correlations of 400 scores of 20 queries scatter, and rounding is uneven."""
    from lightning_influence.metrics import mean_rank_correlation

    Lambda = drawn(40, 50, decades=3.0)
    (chosen,) = allocate({"layer": Lambda}, 250).values()
    generator = torch.Generator().manual_seed(3)
    root = Lambda.flatten().sqrt()
    queries, rows = (torch.randn(n, 2000, generator=generator) * root for n in (20, 400))
    inverse = 1 / (Lambda + 0.1 * Lambda.mean()).flatten()
    exact = (queries * inverse) @ rows.T
    one = eigenbasis(torch.diag(torch.arange(50.0, 0, -1)), torch.diag(torch.arange(40.0, 0, -1)))
    codec = EigenCodec.of(one, chosen)
    projected = codec.project((queries * inverse).view(20, 40, 50), one)
    found = codec.scores(projected, codec.encode_coordinates(rows[:, chosen.coordinates]))
    measured = mean_rank_correlation(found, exact)
    assert measured == pytest.approx(expected_spearman({"layer": Lambda}, {"layer": chosen.tiers}), abs=0.02)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 2, 4)])
def test_tiers_that_do_not_fall_are_refused(bits: tuple[int, ...]) -> None:
    tiers = [tier_of(number, 64) for number in bits]
    with pytest.raises(ValueError, match="`tiers` must have falling bits, each once, got"):
        EigenCodec(
            eigenbasis(torch.eye(20), torch.eye(20)),
            torch.arange(64 * len(bits)),
            torch.ones(64 * len(bits)),
            tiers,
        )

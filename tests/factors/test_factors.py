"""The accumulators add up to the functional results, and differ from `torchmetrics.Metric` as promised."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

from lightning_influence.factors import EigenvalueCorrection, KroneckerCovariance
from lightning_influence.functional.covariance import covariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, eigenbasis
from lightning_influence.gradients import FactoredGradient, LayerGradient, concatenate
from tests.reference.models import random

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of a few dozen terms in another order
SHAPES = [(3, 5), (1, 5), (3, 1), (1, 1)]  # (o, i); one output is every regression


def gradient(n: int, s: int = 2, shape: tuple[int, int] = (3, 5)) -> LayerGradient:
    o, i = shape
    result = FactoredGradient(random(n, s, i, seed=1), random(n, s, o, seed=2))
    result.output_grads[::3, -1] = 0  # some positions are padding
    return result


def some_basis(shape: tuple[int, int] = (3, 5)) -> Eigenbasis:
    return eigenbasis(*covariance(gradient(11, 2, shape)))


def accumulated(batches: list[LayerGradient], shape: tuple[int, int] = (3, 5)) -> list[torch.Tensor]:
    """A, S and Lambda."""
    covariances = KroneckerCovariance(shape, dtype=torch.float64)
    corrections = EigenvalueCorrection(some_basis(shape), dtype=torch.float64)
    for batch in batches:
        covariances.update(batch)
        corrections.update(batch)
    return [*covariances.compute(), corrections.compute()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_equal_the_functional_results(shape: tuple[int, int]) -> None:
    whole = gradient(12, 2, shape)
    expected = [*covariance(whole), second_moment_sum(whole, some_basis(shape)) / 12]
    assert_same(accumulated([whole], shape), expected)


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    whole = gradient(12)
    batches = [whole[start : start + batch_size] for start in range(0, 12, batch_size)]
    assert_same(accumulated(batches), accumulated([whole]))


def test_order_does_not_matter() -> None:
    whole = gradient(12)
    assert_same(accumulated([whole[torch.randperm(12)]]), accumulated([whole]))


def test_padding_to_other_lengths_does_not_matter() -> None:
    whole = gradient(12)
    longer = concatenate([whole[:6], gradient(1, 4)])[:6]
    assert longer.positions == 4
    assert_same(accumulated([longer, whole[6:]]), accumulated([whole]))


def test_compute_may_be_called_between_updates() -> None:
    metric = KroneckerCovariance((3, 5), dtype=torch.float64)
    metric.update(gradient(12)[:5])
    metric.compute()
    metric.update(gradient(12)[5:])
    assert_same(list(metric.compute()), list(covariance(gradient(12))))


def test_reset_forgets() -> None:
    metric = KroneckerCovariance((3, 5), dtype=torch.float64)
    metric.update(FactoredGradient(random(4, 1, 5, seed=8), random(4, 1, 3, seed=9)))
    metric.reset()
    metric.update(gradient(12))
    assert_same(list(metric.compute()), list(covariance(gradient(12))))


def test_nothing_seen_gives_zeros() -> None:
    metric = KroneckerCovariance((3, 5))
    A, S = metric.compute()
    assert not A.any()
    assert not S.any()


def test_compute_keeps_no_second_copy_of_its_result() -> None:
    metric = EigenvalueCorrection(some_basis(), dtype=torch.float64)
    metric.update(gradient(6))
    first, second = metric.compute(), metric.compute()
    assert metric._computed is None
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_comes_back(shape: tuple[int, int]) -> None:
    saved = KroneckerCovariance(shape, dtype=torch.float64)
    saved.update(gradient(6, 2, shape))
    loaded = KroneckerCovariance(shape, dtype=torch.float64)
    loaded.load_state_dict(saved.state_dict())
    loaded.update(gradient(3, 2, shape))
    saved.update(gradient(3, 2, shape))
    assert_same(list(loaded.compute()), list(saved.compute()))


@pytest.mark.parametrize("other", [(3, 6), (4, 5), (1, 1)])
def test_another_layers_state_is_refused(other: tuple[int, int]) -> None:
    state = KroneckerCovariance(other).state_dict()
    with pytest.raises(ValueError, match=r"must have shape .* it belongs to another layer"):
        KroneckerCovariance((3, 5)).load_state_dict(state)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casts_leave_the_precision_of_the_sums(cast) -> None:
    metric = cast(KroneckerCovariance((3, 5)))
    assert metric.A_sum.dtype == metric.S_sum.dtype == torch.float32
    assert metric.positions.dtype == torch.int64
    parent = cast(torch.nn.ModuleDict({"metric": EigenvalueCorrection(some_basis())}))
    assert parent["metric"].squares.dtype == torch.float32


def test_float64_sums_take_float32_gradients() -> None:
    batch = gradient(12)
    single = FactoredGradient(batch.inputs.float(), batch.output_grads.float())
    rounded = FactoredGradient(single.inputs.double(), single.output_grads.double())
    covariances = KroneckerCovariance((3, 5), dtype=torch.float64)
    covariances.update(single)
    assert_same(list(covariances.compute()), list(covariance(rounded)))


def test_counts_are_exact_beyond_float32() -> None:
    metric = KroneckerCovariance((1, 1))
    metric.positions += 2**24  # where float32 stops counting
    metric.update(FactoredGradient(torch.ones(1, 1, 1), torch.ones(1, 1, 1)))
    assert metric.positions.item() == 2**24 + 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_on_counting(copied) -> None:
    metric = KroneckerCovariance((1, 5), dtype=torch.float64)
    metric.update(gradient(12, 2, (1, 5))[:5])
    other = copied(metric)
    other.update(gradient(12, 2, (1, 5))[5:])
    assert_same(list(other.compute()), list(covariance(gradient(12, 2, (1, 5)))))


def _one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        whole, shape = gradient(12, 2, (1, 5)), (1, 5)
        own = whole[:5] if rank == 0 else whole[5:]  # unequal shares
        metric = KroneckerCovariance(shape, dtype=torch.float64)
        correction = EigenvalueCorrection(some_basis(shape), dtype=torch.float64)
        metric.update(own)
        correction.update(own)
        results = [[*metric.compute(), correction.compute()] for _ in range(2)]  # the second is no double
        assert metric.examples.item() == len(own)  # the own sums are put back
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_add_up_to_the_whole(tmp_path: Path) -> None:
    # forked processes need not import everything again
    start_processes(_one_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = accumulated([gradient(12, 2, (1, 5))], (1, 5))
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for result in results:
            assert_same(result, expected)

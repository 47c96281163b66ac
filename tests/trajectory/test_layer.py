"""A layer's gradients in several epochs: what is read of them, and how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import DenseGradient, FactoredGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.row_file import specs
from lightning_influence.store import StoreWriter
from lightning_influence.trajectory import EpochRows
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.layer import (
    BASIS_GRADIENTS,
    LayerTrajectory,
    basis_covariance,
    basis_gradients,
)
from tests.reference.models import random

N, SHAPE = 6, (50, 40)


def epoch_of(folder: Path, number: int, rows: np.ndarray, *, is_in: bool = True) -> EpochRows:
    """An epoch that has seen some examples, whose gradients are pairs."""
    plan = LayerPlan(SHAPE, False, "pairs", 1, "float16")
    codec = plan.codec_without_basis()
    writer = StoreWriter(folder / f"{number}.h5", num_examples=N, store_id="examples")
    writer.create({"layer": specs(codec)} if is_in else {})
    o, i = SHAPE
    pairs = FactoredGradient(
        random(len(rows), 1, i, seed=number).float(), random(len(rows), 1, o, seed=9 + number).float()
    )
    arrays = {"layer": {key: array.numpy() for key, array in codec.encode(pairs).items()}} if is_in else {}
    writer.write_rows(rows, columns={"valid": np.ones(len(rows), np.uint8)}, arrays=arrays)
    return EpochRows(number, writer, {"layer": plan} if is_in else {}, {"layer": 1.0}, {})


def test_sums_of_examples_that_the_layer_has_not_seen_take_no_whole_gradients(tmp_path: Path) -> None:
    epochs = [
        epoch_of(tmp_path, 0, np.arange(3), is_in=False),  # frozen
        epoch_of(tmp_path, 1, np.arange(3, N)),
    ]
    examples = Examples(epochs, N)
    layer = LayerTrajectory("layer", epochs[-1].plans["layer"], epochs, [0.0, 1.0], examples)
    unseen = layer.summed(np.arange(3))
    assert unseen.shape == SHAPE
    assert len(unseen) == 3
    assert unseen.nbytes < 4 * N * sum(SHAPE)
    assert not unseen.dense().any()
    torch.testing.assert_close(layer.summed(np.arange(N))[3:].dense(), layer.summed(np.arange(3, N)).dense())


def test_basis_and_eigenvalues_are_of_examples_as_often_as_they_were_seen(tmp_path: Path) -> None:
    """So both have the trace of the Fisher block of what was drawn."""
    epochs = [epoch_of(tmp_path, 0, np.array([0, 0, 0, 0, 1, 2])), epoch_of(tmp_path, 1, np.arange(N))]
    layer = LayerTrajectory("layer", epochs[-1].plans["layer"], epochs, [0.5, 0.5], Examples(epochs, N))
    basis = layer.basis()
    squares = [epoch.read("layer", np.arange(N)).dense().square().sum((1, 2)) for epoch in epochs]
    times = torch.tensor([4.0, 1, 1, 0, 0, 0])
    expected = ((squares[0] * times).sum() / times.sum() + squares[1].mean()) / 2
    torch.testing.assert_close(basis.eigenvalue_products().sum(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.mean_squares(basis).sum(), expected, rtol=1e-4, atol=0)


def test_few_gradients_are_probed_so_often_that_their_covariances_are_exact() -> None:
    G = random(5, 30, 40, seed=3).float()
    covariance = basis_covariance((30, 40), FULL, len(G))
    covariance.add(DenseGradient(G))
    A, S = covariance.compute()
    torch.testing.assert_close(A, (G.mT @ G).mean(0), rtol=1e-4, atol=1e-4)
    expected = (G @ G.mT).mean(0)
    torch.testing.assert_close(S, expected / expected.trace(), rtol=1e-4, atol=1e-4)


def test_a_long_table_is_not_probed_where_that_takes_more_work(monkeypatch) -> None:
    G = random(3, 4000, 5, seed=3).float()
    covariance = basis_covariance((4000, 5), KroneckerStructure(full_S=False), len(G))
    monkeypatch.setattr(covariance, "_probes", None)
    covariance.add(DenseGradient(G))
    torch.testing.assert_close(covariance.compute()[0], (G.mT @ G).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "structure", "expected"),
    [
        ((10, 20), FULL, BASIS_GRADIENTS),
        ((10, 5000), FULL, 20000),
        ((5000, 10), FULL, 20000),
        ((50000, 64), KroneckerStructure(full_S=False), BASIS_GRADIENTS),  # a table's rows are not rotated
        ((5000, 10), KroneckerStructure(groups=5000), BASIS_GRADIENTS),
    ],
)
def test_gradients_for_a_basis_grow_with_the_sides_that_are_rotated(shape, structure, expected) -> None:
    assert basis_gradients(shape, structure) == expected

"""The five precisions, and what becomes of a batch whose float16 gradients overflow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset

from lightning_influence.store import StoreReader
from tests.integration.models import float16, vector_data
from tests.matrix.measuring import contents, error_of
from tests.matrix.optimizing import OPTIMIZING
from tests.matrix.rows import measure
from tests.matrix.running import train
from tests.matrix.situation import Situation, shuffled

SITUATIONS = {situation.name: situation for situation in OPTIMIZING}
FITTING = 2.0**10  # a loss scale that float16 has room for; 2^40 is beyond it


@pytest.mark.parametrize("precision", ["plain 32-bit", "bf16-mixed", "bf16-true", "16-mixed", "64-true"])
def test_training_rows_and_factors_are_as_expected_in(precision: str, tmp_path: Path) -> None:
    row = measure(SITUATIONS[precision], tmp_path)
    assert not row.flaws, row


def overflows_at_once() -> dict[str, Any]:
    """In the first batch; then the scale fits."""
    return {**float16(init_scale=2.0**40, backoff_factor=2.0**-30), "max_epochs": 1}


def overflows_later() -> dict[str, Any]:
    """In the second epoch's third batch, after eight steps that went well."""
    return float16(init_scale=FITTING, growth_factor=2.0**30, backoff_factor=2.0**-30, growth_interval=8)


OVERFLOWS = {
    "first batch": Situation("overflows at once", trainer=overflows_at_once),
    "captured epoch": Situation("overflows later", trainer=overflows_later),
}


@pytest.fixture(params=OVERFLOWS.values(), ids=OVERFLOWS.keys())
def situation(request: pytest.FixtureRequest) -> Situation:
    return request.param


def test_an_overflowed_batch_is_in_the_file_as_invalid_rows(situation: Situation, tmp_path: Path) -> None:
    trained = train(situation, tmp_path, is_captured=True, is_still=True)
    store = StoreReader(tmp_path / "influence.h5")
    assert contents(store, situation, trained.weights).rows == "22/0/4"
    (step,) = set(store.column("step")[store.column("valid") == 0].tolist())  # they are of one batch
    assert step == {"overflows at once": 0, "overflows later": 8}[situation.name]
    assert any("4 rows have non-finite gradients" in each for each in trained.said)


def test_an_overflowed_batch_does_not_change_training(situation: Situation, tmp_path: Path) -> None:
    plain, captured = (
        train(situation, tmp_path / str(is_captured), is_captured=is_captured, is_still=False)
        for is_captured in (False, True)
    )
    assert captured.digest == plain.digest


def test_factors_are_those_of_a_run_without_the_overflowed_rows(situation: Situation, tmp_path: Path) -> None:
    """Loss scales and batch sizes are powers of two, so the remaining rows round alike in both runs."""
    train(situation, tmp_path / "with", is_captured=True, is_still=True)
    store = StoreReader(tmp_path / "with" / "influence.h5")
    kept = partial(kept_rows, tuple(store.column("valid").nonzero()[0].tolist()))
    without = replace(situation, trainer=partial(float16, FITTING), data=partial(shuffled, kept), examples=kept)
    train(without, tmp_path / "without", is_captured=True, is_still=True)
    other = StoreReader(tmp_path / "without" / "influence.h5")
    assert other.attributes["rows_written"] == 18
    for layer in store.layers:
        for found, expected in zip(blocks(store, layer), blocks(other, layer), strict=True):
            assert error_of(found, expected) <= 1e-5  # float32 sums in another order


def kept_rows(indices: tuple[int, ...]) -> Dataset:
    return Subset(vector_data(22), indices)


def blocks(store: StoreReader, layer: str) -> list[torch.Tensor]:
    """A, S and the diagonal of EK-FAC's block in the parameters' own coordinates: without signs of Q."""
    stored = {key: torch.from_numpy(array).double() for key, array in store.factors(layer).items()}
    Q_A, Q_S = stored["Q_A"], stored["Q_S"]
    A, S = (stored[f"Q_{side}"] @ stored[f"eigenvalues_{side}"].diag() @ stored[f"Q_{side}"].T for side in "AS")
    return [A, S, Q_S.square() @ stored["Lambda"] @ Q_A.square().T]

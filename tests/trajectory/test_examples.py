"""Which examples are drawn of which epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_influence.store import ArraySpec, StoreWriter
from lightning_influence.trajectory import EpochRows
from lightning_influence.trajectory.examples import Examples

N = 20


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Of three epochs, the second of which has not seen the first five examples, and the last one twice."""
    epochs = []
    for number, rows in enumerate((np.arange(N), np.arange(5, N), np.arange(N))):
        writer = StoreWriter(tmp_path / f"{number}.h5", num_examples=N, store_id="examples")
        writer.create({"layer": {"a": ArraySpec((1,), np.dtype("f4"))}})
        times = np.where((rows == N - 1) & (number == 1), 2, 1).astype(np.int32)
        columns = {"valid": np.ones(len(rows), np.uint8), "occurrences": times}
        writer.write_rows(rows, columns=columns, arrays={"layer": {"a": np.zeros((len(rows), 1), np.float32)}})
        epochs.append(EpochRows(number, writer, {}, {}, {}))
    return Examples(epochs, N)


def test_of_each_epoch_others_are_drawn_in_order(examples: Examples) -> None:
    drawn = [examples.sample_in(number, 6) for number in (0, 2)]
    assert [len(rows) for rows in drawn] == [6, 6]
    assert all((np.diff(rows) > 0).all() for rows in drawn)
    assert not {*drawn[0]} & {*drawn[1]}
    assert [rows.tolist() for rows in drawn] == [examples.sample_in(number, 6).tolist() for number in (0, 2)]


def test_only_what_the_epoch_has_seen_is_drawn(examples: Examples) -> None:
    assert min(examples.sample_in(1, 6)) >= 5


def test_examples_are_drawn_as_often_as_the_epoch_has_seen_them(examples: Examples) -> None:
    assert examples.sample_in(1, N).tolist() == [*range(5, N), N - 1]


@pytest.mark.parametrize("number", [0, 2])
def test_all_are_drawn_where_there_are_few(examples: Examples, number: int) -> None:
    assert examples.sample_in(number, 3 * N).tolist() == list(range(N))

"""Tables are what other libraries take, and files hold what tables hold."""

import csv

import numpy as np
import pytest
import torch

from lightning_influence.exports import (
    ROWS_AT_ONCE,
    example_columns,
    example_labels,
    ranked_columns,
    score_columns,
    write_table,
)
from lightning_influence.store import COLUMNS, StoreReader
from tests.golden.test_golden import FOLDER


@pytest.fixture
def store() -> StoreReader:
    return StoreReader(FOLDER / "schema_v5.h5")


def test_every_column_of_the_file_is_in_the_table(store):
    columns = example_columns(store)
    assert list(columns) == ["index", *COLUMNS]
    assert columns["index"].tolist() == list(range(store.num_examples))
    assert all(np.array_equal(columns[name], store.column(name), equal_nan=True) for name in COLUMNS)


def test_labels_of_rows_that_are_not_there_are_unknown(store):
    written = store.column("written").astype(bool)
    labels = example_labels(store)
    assert (~written).any()
    assert (labels[~written] == -1).all()
    assert np.array_equal(labels[written], store.column("label")[written])


def test_answers_stand_below_each_other():
    known = {"label": np.arange(10) % 3}
    first = (torch.tensor([[4, 2], [0, 9]]), torch.tensor([[3.0, 2.0], [1.5, 1.0]], dtype=torch.bfloat16))
    second = (torch.tensor([[7, 5, 1]]), torch.tensor([[9.0, 8.0, 7.0]]))
    table = ranked_columns([first, second], known)
    assert {name: column.tolist() for name, column in table.items()} == {
        "query": [0, 0, 1, 1, 2, 2, 2],
        "rank": [1, 2, 1, 2, 1, 2, 3],
        "index": [4, 2, 0, 9, 7, 5, 1],
        "score": [3.0, 2.0, 1.5, 1.0, 9.0, 8.0, 7.0],
        "label": [1, 2, 0, 0, 1, 2, 1],
    }


def test_no_answers_are_an_empty_table():
    assert {name: len(column) for name, column in ranked_columns([], {"label": np.arange(3)}).items()} == {
        "query": 0,
        "rank": 0,
        "index": 0,
        "score": 0,
        "label": 0,
    }


def test_pandas_takes_a_table(store):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(example_columns(store) | score_columns(np.ones((2, store.num_examples))))
    assert len(frame) == store.num_examples
    assert frame["label"].tolist() == store.column("label").tolist()
    assert [*frame.columns][-2:] == ["score_0", "score_1"]


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet", ".arrow"])
def test_files_hold_what_the_table_holds(tmp_path, suffix):
    """More rows than are written at once; floats survive text."""
    n = ROWS_AT_ONCE + 3
    columns = {"index": np.arange(n), "value": np.random.default_rng(0).normal(size=n).astype(np.float32)}
    path = tmp_path / f"table{suffix}"
    if suffix in (".parquet", ".arrow"):
        arrow = pytest.importorskip("pyarrow")
    write_table(path, columns)
    if suffix == ".csv":
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found = {name: [float(row[name]) for row in rows] for name in columns}
    elif suffix == ".npz":
        found = dict(np.load(path))
    elif suffix == ".parquet":
        found = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
    else:
        found = arrow.ipc.open_file(path).read_all().to_pydict()
    assert list(found) == list(columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(found[name], column)


def test_steps_of_a_text_file_can_be_watched(tmp_path):
    seen = []

    def watch(steps):
        for step in steps:
            seen.append(step)
            yield step

    write_table(tmp_path / "table.csv", {"index": np.arange(2 * ROWS_AT_ONCE + 1)}, watch)
    assert seen == [0, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE]

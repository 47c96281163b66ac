"""How often each example was trained on, for samplers that draw with replacement."""

from pathlib import Path

import numpy as np
import pytest
from store_example import LAYERS, N

from lightning_influence.store import StoreReader, StoreWriter

NOTHING = {"attributes": {}, "documents": {}, "factors": {}}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def writer(tmp_path: Path) -> StoreWriter:
    writer = StoreWriter(tmp_path / "run.h5", num_examples=N, store_id="0123456789abcdef")
    writer.create(LAYERS)
    return writer


def test_occurrences_count_within_and_across_batches(writer):
    writer.write_rows(np.array([4, 1, 4, 4, 1]), columns={}, arrays={})
    writer.write_rows(np.array([1, 0]), columns={}, arrays={})
    reader = StoreReader(writer.finish(**NOTHING))
    assert reader.column("occurrences").tolist() == [1, 3, 0, 0, 3, 0, 0]
    assert reader.column("occurrences").dtype == np.int32
    assert reader.column("written").tolist() == [1, 1, 0, 0, 1, 0, 0]


def test_occurrences_that_are_given_replace_the_count(writer):
    writer.write_rows(np.array([4, 1, 4]), columns={}, arrays={})
    writer.write_rows(np.array([4, 2]), columns={"occurrences": np.array([2, 0])}, arrays={})
    assert writer.read_column("occurrences").tolist() == [0, 1, 0, 0, 2, 0, 0]
    assert writer.read_column("written").tolist() == [0, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("count", [-1, 2**31])
def test_occurrences_that_are_no_count_are_refused(writer, count):
    with pytest.raises(ValueError, match=r"'rows/occurrences' must be counts from 0"):
        writer.write_rows(np.array([0]), columns={"occurrences": np.array([count])}, arrays={})
    assert not writer.read_column("written").any()


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_trained_on_each_written_example_once(version):
    reader = StoreReader(GOLDEN / f"schema_v{version}.h5")
    occurrences = reader.column("occurrences")
    assert occurrences.dtype == np.int32
    np.testing.assert_array_equal(occurrences, reader.column("written"))
    assert 0 < occurrences.sum() < len(occurrences)

"""Several processes write one file: real ones, that share nothing but its path."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from store_example import LAYERS, N, random_arrays

from lightning_influence.errors import StoreError
from lightning_influence.store import ArraySpec, StoreReader, StoreWriter

STORE_ID = "0123456789abcdef"
NOTHING = {"attributes": {}, "documents": {}, "factors": {}}
MINE, THEIRS = np.array([0, 5, 2]), np.array([6, 1, 3])


def new_writer(path: Path, **arguments: object) -> StoreWriter:
    return StoreWriter(path, **({"num_examples": N, "store_id": STORE_ID} | arguments))


def write(writer: StoreWriter, indices: np.ndarray) -> None:
    """Rows that their seed tells."""
    arrays = random_arrays(N, seed=3)
    writer.write_rows(
        indices,
        columns={"valid": np.ones(len(indices), bool), "label": indices},
        arrays={layer: {name: rows[indices] for name, rows in named.items()} for layer, named in arrays.items()},
    )


def join_and_write(path: Path) -> None:
    writer = new_writer(path)
    writer.join(LAYERS)
    write(writer, THEIRS)
    write(writer, THEIRS[:1])
    writer.leave()


def check_rows(reader: StoreReader, written: np.ndarray) -> None:
    """Written rows are as they were given, the others are not marked as written."""
    reader.verify_rows()
    assert np.flatnonzero(reader.column("written")).tolist() == sorted(written)
    for layer, named in random_arrays(N, seed=3).items():
        for name, rows in named.items():
            np.testing.assert_array_equal(reader.rows(layer)[name][written], rows[written])
    np.testing.assert_array_equal(reader.column("label")[written], written)


@pytest.mark.ddp
def test_two_processes_write_one_file(tmp_path):
    writer = new_writer(tmp_path / "run.h5")
    writer.create(LAYERS)
    process = multiprocessing.get_context("spawn").Process(target=join_and_write, args=(writer.path,))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    assert not writer.path.exists()
    write(writer, MINE)
    reader = StoreReader(writer.finish(**NOTHING))
    check_rows(reader, np.concatenate([MINE, THEIRS]))
    assert reader.column("occurrences").tolist() == [1, 1, 1, 1, 0, 1, 2]
    assert list(tmp_path.iterdir()) == [writer.path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_rows_that_a_killed_process_did_not_write_are_not_marked_as_written(tmp_path):
    writer = new_writer(tmp_path / "run.h5")
    writer.create(LAYERS)
    write(writer, MINE)
    child = os.fork()
    if child == 0:
        try:
            joined = new_writer(tmp_path / "run.h5")
            joined.join(LAYERS)
            write(joined, THEIRS[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    check_rows(StoreReader(writer.finish(**NOTHING)), np.array([*MINE, THEIRS[0]]))


def test_a_joined_writer_sees_what_the_creator_wrote(tmp_path):
    first, second = new_writer(tmp_path / "run.h5"), new_writer(tmp_path / "run.h5")
    first.create(LAYERS)
    second.join(LAYERS)
    write(first, MINE)
    assert second.read_column("label").tolist() == [0, -1, 2, -1, -1, 5, -1]
    found, expected = second.read_rows("head", MINE)["scale"], first.read_rows("head", MINE)["scale"]
    np.testing.assert_array_equal(found, expected)


def test_a_segment_with_earlier_ones_can_be_joined(tmp_path):
    path = tmp_path / "run.h5"
    for segment in range(2):
        arguments = {"segment": segment, "after": path if segment else None}
        first, second = new_writer(path, **arguments), new_writer(path, **arguments)
        first.create(LAYERS)
        second.join(LAYERS)
        write(second, THEIRS)
        second.leave()
        write(first, MINE)
        first.finish(**NOTHING)
    for segment in range(2):
        check_rows(StoreReader(path, segment), np.concatenate([MINE, THEIRS]))


def test_only_the_creator_finishes(tmp_path):
    first, second = new_writer(tmp_path / "run.h5"), new_writer(tmp_path / "run.h5")
    first.create(LAYERS)
    with pytest.raises(StoreError, match="was created by this writer: `finish` or `discard` it"):
        first.leave()
    second.join(LAYERS)
    with pytest.raises(StoreError, match="was joined: its creator finishes it; `leave` it"):
        second.finish(**NOTHING)
    second.leave()
    for call in (second.leave, lambda: second.finish(**NOTHING), lambda: write(second, MINE)):
        with pytest.raises(StoreError, match="not open for writing"):
            call()
    StoreReader(first.finish(**NOTHING)).verify_rows()


def test_discard_of_a_writer_that_did_not_create_deletes_nothing(tmp_path):
    first = new_writer(tmp_path / "run.h5")
    first.create(LAYERS)
    joined, failed, left = (new_writer(tmp_path / "run.h5") for _ in range(3))
    joined.join(LAYERS)
    left.join(LAYERS)
    left.leave()
    with pytest.raises(StoreError):
        failed.join({})
    for writer in (joined, failed, left, new_writer(tmp_path / "run.h5")):
        writer.discard()
    write(first, MINE)
    check_rows(StoreReader(first.finish(**NOTHING)), MINE)


def test_discard_after_finish_leaves_the_next_segments_file(tmp_path):
    first = new_writer(tmp_path / "run.h5")
    first.create(LAYERS)
    first.finish(**NOTHING)
    second = new_writer(tmp_path / "run.h5", segment=1, after=tmp_path / "run.h5")
    second.create(LAYERS)
    first.discard()
    assert StoreReader(second.finish(**NOTHING)).segments == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_examples": N + 1}, "num_examples"),
        ({"store_id": "01234567-another"}, "store_id"),  # of the same partial name
        ({"segment": 1}, "segment"),
    ],
)
def test_a_file_of_another_run_or_segment_cannot_be_joined(tmp_path, arguments, name):
    first, second = new_writer(tmp_path / "run.h5"), new_writer(tmp_path / "run.h5", **arguments)
    first.create(LAYERS)
    with pytest.raises(StoreError, match=f"must have '{name}' = .*: all processes must"):
        second.join(LAYERS)


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ({"head": LAYERS["head"]}, "layers/encoder.0.linear/rows/input"),
        (LAYERS | {"head": {"scale": ArraySpec((), "f4")}}, "layers/head/rows/scale"),
        (LAYERS | {"head": {"scale": ArraySpec((1,), "f8")}}, "layers/head/rows/scale"),
        (LAYERS | {"body": {"scale": ArraySpec((), "f8")}}, "layers/body/rows/scale"),
    ],
)
def test_a_file_of_other_layers_cannot_be_joined(tmp_path, layers, name):
    first, second = new_writer(tmp_path / "run.h5"), new_writer(tmp_path / "run.h5")
    first.create(LAYERS)
    with pytest.raises(StoreError, match=f"must have '{name}' = "):
        second.join(layers)


def test_a_file_that_is_finished_or_not_there_cannot_be_joined(tmp_path):
    first, second = new_writer(tmp_path / "run.h5"), new_writer(tmp_path / "run.h5")
    with pytest.raises(StoreError, match=r"cannot be joined: .* must have called `create` before"):
        second.join(LAYERS)
    first.create(LAYERS)
    with pytest.raises(StoreError, match="is open already"):
        first.join(LAYERS)
    first.finish(**NOTHING)
    with pytest.raises(StoreError, match="cannot be joined"):
        second.join(LAYERS)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_example import ATTRIBUTES, DOCUMENTS, FACTORS, LAYERS, N, random_arrays, write_file

from lightning_influence.errors import StoreError
from lightning_influence.store import ArraySpec, StoreReader, StoreWriter
from lightning_influence.store.schema import COLUMNS

LAYER = "encoder.0.linear"
STORE_ID = "0123456789abcdef"
NOTHING = {"attributes": {}, "documents": {}, "factors": {}}


def open_writer(path: Path, num_examples: int = N, store_id: str = STORE_ID) -> StoreWriter:
    writer = StoreWriter(path, num_examples=num_examples, store_id=store_id)
    writer.create(LAYERS)
    return writer


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)


def test_constructor_writes_nothing(tmp_path):
    StoreWriter(tmp_path / "new" / "run.h5", num_examples=N, store_id=STORE_ID)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_at_path_before_finish(tmp_path):
    writer = open_writer(tmp_path / "new" / "run.h5")
    assert list((tmp_path / "new").iterdir()) == [writer.partial_path]


def test_only_the_finished_file_is_left(store_path):
    assert list(store_path.parent.iterdir()) == [store_path]


def test_rows_written_in_any_order_lie_at_their_index(tmp_path):
    arrays = random_arrays(N)
    order = np.random.default_rng(1).permutation(N)
    writer = open_writer(tmp_path / "run.h5")
    for part in (order[:3], order[3:4], order[4:]):
        batch = {layer: {name: array[part] for name, array in named.items()} for layer, named in arrays.items()}
        writer.write_rows(part, columns={"loss": part.astype(float)}, arrays=batch)
    reader = StoreReader(writer.finish(**NOTHING))
    for layer, named in arrays.items():
        for name, array in named.items():
            np.testing.assert_array_equal(reader.rows(layer)[name], array)
    np.testing.assert_array_equal(reader.column("loss"), np.arange(N))


def test_rows_never_written_are_flagged(store_path):
    assert StoreReader(store_path).column("written").tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_rows_never_written_hold_the_unknown_values_and_zeros(store_path):
    reader = StoreReader(store_path)
    found = [reader.column(name)[2] for name in COLUMNS]
    np.testing.assert_array_equal(found, [unknown for _, unknown in COLUMNS.values()])
    assert not reader.rows(LAYER)["input"][2].any()


def test_last_of_a_repeated_index_wins(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    indices = np.array([4, 1, 4, 4, 1])
    scale = np.arange(5.0)
    writer.write_rows(indices, columns={"label": np.arange(5)}, arrays={"head": {"scale": scale}})
    assert writer.read_rows("head", slice(0, N))["scale"].tolist() == [0, 4, 0, 0, 3, 0, 0]
    assert writer.read_column("label").tolist() == [-1, 4, -1, -1, 3, -1, -1]


def test_a_row_written_again_is_overwritten_where_values_are_given(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    writer.write_rows(np.array([1]), columns={"step": np.array([5])}, arrays={})
    writer.write_rows(np.array([1]), columns={"label": np.array([3])}, arrays={})
    assert (writer.read_column("step")[1], writer.read_column("label")[1]) == (5, 3)


def test_an_empty_batch_writes_nothing(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    writer.write_rows(np.array([], dtype=int), columns={}, arrays=random_arrays(0))
    assert not writer.read_column("written").any()


def test_rows_read_back_are_copies(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    writer.read_rows("head", slice(0, N))["scale"][:] = 1
    writer.read_column("step")[:] = 1
    assert not writer.read_rows("head", slice(0, N))["scale"].any()
    assert (writer.read_column("step") == -1).all()


@pytest.mark.parametrize("bad", [[-1, 2], [0, N], [2**40]])
def test_indices_out_of_range_are_refused_with_their_numbers(tmp_path, bad):
    writer = open_writer(tmp_path / "run.h5")
    outside = [index for index in bad if not 0 <= index < N]
    with pytest.raises(ValueError, match=rf"must lie in 0\.\.6, got \[{outside[0]}\]"):
        writer.write_rows(np.array(bad), columns={}, arrays={})


@pytest.mark.parametrize("bad", [np.array([0.0]), np.array([True]), np.array([[0]])])
def test_indices_that_are_no_integer_vector_are_refused(tmp_path, bad):
    writer = open_writer(tmp_path / "run.h5")
    with pytest.raises(ValueError, match="integers of shape"):
        writer.write_rows(bad, columns={}, arrays={})


@pytest.mark.parametrize(
    ("columns", "arrays", "message"),
    [
        ({"written": np.ones(1)}, {}, "do not pass it"),
        ({"lost": np.ones(1)}, {}, "no dataset 'rows/lost'"),
        ({"loss": np.ones(2)}, {}, r"float32 of shape \(1,\), got float64 of shape \(2,\)"),
        ({"label": np.ones(1)}, {}, "must be int64 of shape"),
        ({}, {"body": {"scale": np.ones(1)}}, "no dataset 'layers/body/rows/scale'"),
        ({}, {"head": {"scale": np.ones((1, 1))}}, r"got float64 of shape \(1, 1\)"),
        ({}, {"head": {"scale": np.ones(1, np.float32)}}, "must be float64 .*, got float32"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_whole(tmp_path, columns, arrays, message):
    writer = open_writer(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=message):
        writer.write_rows(np.array([0]), columns={"step": np.array([1])} | columns, arrays=arrays)
    assert not writer.read_column("written").any()
    assert writer.read_column("step")[0] == -1


def test_rows_outside_the_dataset_cannot_be_read_back(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=r"`indices` must lie in 0..6, got \[7\]"):
        writer.read_rows("head", np.arange(5, 8))
    with pytest.raises(ValueError, match="no layer 'body'"):
        writer.read_rows("body", slice(0, 1))
    with pytest.raises(ValueError, match="no column 'lost'"):
        writer.read_column("lost")


@pytest.mark.parametrize("name", ["", ".", "a/b", "a\0b"])
def test_names_that_hdf5_reads_as_paths_are_refused(tmp_path, name):
    spec = ArraySpec((), "f4")
    for layers in ({name: {"a": spec}}, {"a": {name: spec}}):
        with pytest.raises(ValueError, match="rename it"):
            StoreWriter(tmp_path / "run.h5", num_examples=1, store_id=STORE_ID).create(layers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["f16", "c8", "u8", "O", "S3", "?", "M8[s]"])
def test_a_dtype_off_the_list_is_refused(dtype):
    with pytest.raises(ValueError, match="cannot be stored"):
        ArraySpec((), dtype)


def test_an_empty_row_is_refused():
    with pytest.raises(ValueError, match="positive sizes"):
        ArraySpec((3, 0), "f4")


@pytest.mark.parametrize("arguments", [{"num_examples": 0}, {"store_id": "short"}, {"store_id": "a/" * 8}])
def test_bad_constructor_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least"):
        StoreWriter(tmp_path / "a", **({"num_examples": 1, "store_id": STORE_ID} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attributes": {"complete": True}}, "belongs to the format"),
        ({"attributes": {"a": [1]}}, "bool, int, float or str, got <class 'list'>"),
        ({"attributes": {"a": np.float32(1)}}, "convert it"),
        ({"attributes": {"a": "x" * 40_000}}, "make it a document"),
        ({"attributes": {"a": 2**64}}, "fit 64 bits"),
        ({"documents": {"a": {1, 2}}}, "JSON's types"),
        ({"documents": {"a": "x" * 2**24}}, "make it an array"),
        ({"documents": {"a/b": 1}}, "rename it"),
        ({"factors": {"body": {}}}, "none of"),
        ({"factors": {LAYER: {"Q": np.ones(2, complex)}}}, "cannot be stored"),
        ({"factors": {LAYER: {"Q": np.ones((0, 2))}}}, "must not be empty"),
    ],
)
def test_finish_can_be_repeated_after_a_value_error(tmp_path, arguments, message):
    writer = open_writer(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=message):
        writer.finish(**(NOTHING | arguments))
    assert not writer.path.exists()
    StoreReader(writer.finish(**NOTHING)).verify_rows()


def test_an_older_file_survives_a_discard(store_path):
    before = store_path.read_bytes()
    writer = open_writer(store_path, store_id="another-run")
    writer.discard()
    writer.discard()
    assert store_path.read_bytes() == before
    assert list(store_path.parent.iterdir()) == [store_path]


def test_an_older_file_survives_a_failed_finish(store_path):
    before = store_path.read_bytes()
    writer = open_writer(store_path, store_id="another-run")
    writer.partial_path.unlink()
    with pytest.raises(StoreError, match="cannot be finished"):
        writer.finish(**NOTHING)
    assert store_path.read_bytes() == before


def test_an_older_file_is_replaced_by_finish(store_path):
    open_writer(store_path, store_id="another-run").finish(**NOTHING)
    assert StoreReader(store_path).store_id == "another-run"


def test_two_runs_have_different_partial_files(tmp_path):
    first = open_writer(tmp_path / "run.h5", store_id="first-run")
    second = open_writer(tmp_path / "run.h5", store_id="second-run")
    assert first.partial_path.exists()
    assert first.partial_path != second.partial_path


@pytest.mark.parametrize("end", ["finish", "discard"])
def test_nothing_can_be_written_after_the_end(tmp_path, end):
    writer = open_writer(tmp_path / "run.h5")
    writer.finish(**NOTHING) if end == "finish" else writer.discard()
    for call in (
        lambda: writer.write_rows(np.array([0]), columns={}, arrays={}),
        lambda: writer.read_rows("head", slice(0, 1)),
        lambda: writer.read_column("loss"),
        lambda: writer.finish(**NOTHING),
    ):
        with pytest.raises(StoreError, match="not open for writing"):
            call()


def test_create_twice_is_refused(tmp_path):
    writer = open_writer(tmp_path / "run.h5")
    with pytest.raises(StoreError, match="is open already"):
        writer.create(LAYERS)


def test_a_directory_at_path_is_refused_at_once(tmp_path):
    with pytest.raises(StoreError, match="is a directory"):
        open_writer(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made a directory"):
        open_writer(tmp_path / "file" / "run.h5")


@pytest.mark.skipif(sys.platform != "linux", reason="counts disk blocks")
@pytest.mark.parametrize("has_fallocate", [True, False])
def test_every_block_is_reserved_before_rows_are_written(tmp_path, monkeypatch, has_fallocate):
    if not has_fallocate:  # as on macOS and Windows
        monkeypatch.delattr(os, "posix_fallocate")
    writer = StoreWriter(tmp_path / "run.h5", num_examples=100, store_id=STORE_ID)
    specs = {"a": ArraySpec((16, 16), "f4"), "b": ArraySpec((), "u1")}
    writer.create({f"block.{k}." + "x" * 200: specs for k in range(100)})
    status = writer.partial_path.stat()
    assert status.st_blocks * 512 >= status.st_size > 100 * 100 * 1025


def test_many_small_arrays_start_at_zero(tmp_path):
    # HDF5 must not hand out blocks that metadata was in: datasets are not filled.
    writer = StoreWriter(tmp_path / "run.h5", num_examples=2, store_id=STORE_ID)
    layers = {f"block.{k}": {"a": ArraySpec((k + 1,), "u1")} for k in range(100)}
    writer.create(layers)
    assert not any(writer.read_rows(layer, slice(0, 2))["a"].any() for layer in layers)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from lightning_influence.errors import StoreError
from lightning_influence.store import ArraySpec, StoreWriter

path, stage = Path(sys.argv[1]), sys.argv[2]
writer = StoreWriter(path, num_examples=1000, store_id="0123456789abcdef")
# Python ignores SIGXFSZ, so that a write past the limit is an error like a full disk's.
limit = 1_000_000 if stage == "create" else 8_000_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    writer.create({"a": {"rows": ArraySpec((1000,), "f4")}})
    writer.finish(attributes={}, documents={}, factors={"a": {"Q": np.ones((1000, 1000))}})
except StoreError as err:
    print(err)
writer.discard()
print([file.name for file in path.parent.iterdir()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
@pytest.mark.parametrize("stage", ["create", "finish"])
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, stage):
    result = run_python(FULL_DISK, tmp_path / "run.h5", stage)
    assert result.returncode == 0, result.stderr
    message, files = result.stdout.splitlines()
    assert message.startswith("no room for ")
    assert "bytes are free on its disk" in message
    assert files == "[]"


KILLED = """
import os, signal, sys
import numpy as np
from lightning_influence.store import ArraySpec, StoreWriter

writer = StoreWriter(sys.argv[1], num_examples=9, store_id="0123456789abcdef")
writer.create({"a": {"rows": ArraySpec((4,), "f4")}})
arrays = {"a": {"rows": np.ones((1, 4), np.float32)}}
writer.write_rows(np.array([3]), columns={}, arrays=arrays)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_leaves_no_file_at_path(tmp_path):
    result = run_python(KILLED, tmp_path / "run.h5")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]


def test_finished_files_use_only_checksummed_metadata(store_path):
    assert store_path.read_bytes()[8] == 2  # the superblock's version


def test_row_arrays_are_aligned(store_path):
    with h5py.File(store_path) as file:
        for layer, arrays in LAYERS.items():
            for name in arrays:
                assert file[f"layers/{layer}/rows/{name}"].id.get_offset() % 64 == 0


def test_factors_of_any_byte_order_and_stride_are_stored(tmp_path):
    factor = np.arange(12, dtype=">f8").reshape(3, 4).T
    writer = open_writer(tmp_path / "run.h5")
    path = writer.finish(attributes={}, documents={}, factors={LAYER: {"Q": factor}})
    np.testing.assert_array_equal(StoreReader(path).factors(LAYER)["Q"], factor)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first = write_file(tmp_path / "a.h5")
    time.sleep(1.1)  # HDF5 would store the second of creation
    second = write_file(tmp_path / "b.h5")
    assert first.read_bytes() == second.read_bytes()


def test_rows_written_by_a_forked_process_arrive(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    writer = open_writer(tmp_path / "run.h5")
    child = os.fork()
    if child == 0:
        writer.write_rows(np.array([2]), columns={}, arrays={"head": {"scale": np.ones(1)}})
        os._exit(0)
    os.waitpid(child, 0)
    reader = StoreReader(writer.finish(attributes=ATTRIBUTES, documents=DOCUMENTS, factors=FACTORS))
    assert reader.rows("head")["scale"][2] == 1

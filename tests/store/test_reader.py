import os
import pickle
import random
import sys
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_example import ATTRIBUTES, DOCUMENTS, FACTORS, LAYERS, N, random_arrays, write_file

from lightning_influence.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    NotAStoreError,
    SchemaVersionError,
    StoreError,
    StoreNotFoundError,
)
from lightning_influence.store import StoreReader, StoreWriter

LAYER = "encoder.0.linear"
ROWS = f"layers/{LAYER}/rows/input"
FACTOR = f"layers/{LAYER}/factors/Q_A"


def flip(path: Path, dataset: str) -> None:
    """Change one byte of a dataset behind HDF5's back."""
    with h5py.File(path) as file:
        offset = file[dataset].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def put(path: Path, name: str, **arguments: object) -> None:
    """Put another dataset with a correct checksum in the place of `name`."""
    with h5py.File(path, "r+") as file:
        del file[name]
        dataset = file.create_dataset(name, **arguments)
        data = arguments.get("data")
        checksum = zlib.crc32(data.tobytes()) if isinstance(data, np.ndarray) else 0
        dataset.attrs["crc32"] = np.uint32(checksum)


def test_attributes_come_back_as_builtins(store_path):
    reader = StoreReader(store_path)
    assert {name: reader.attributes[name] for name in ATTRIBUTES} == ATTRIBUTES
    assert {type(value) for value in reader.attributes.values()} == {bool, int, float, str}


def test_identity_comes_back(store_path):
    reader = StoreReader(store_path)
    assert (reader.path, reader.num_examples, reader.store_id, reader.layers) == (
        store_path,
        N,
        "0123456789abcdef",
        tuple(sorted(LAYERS)),
    )


def test_documents_come_back(store_path):
    reader = StoreReader(store_path)
    assert {name: reader.document(name) for name in DOCUMENTS} == DOCUMENTS


def test_factors_come_back_with_shape_and_dtype(store_path):
    found = StoreReader(store_path).factors(LAYER)
    for name, factor in FACTORS[LAYER].items():
        np.testing.assert_array_equal(found[name], factor)
        assert (found[name].shape, found[name].dtype) == (factor.shape, factor.dtype)


def test_a_layer_without_factors_has_none(store_path):
    assert StoreReader(store_path).factors("head") == {}


def test_rows_are_contiguous_read_only_maps_equal_to_what_h5py_reads(store_path):
    reader = StoreReader(store_path)
    with h5py.File(store_path) as file:
        for layer, arrays in LAYERS.items():
            for name in arrays:
                rows = reader.rows(layer)[name]
                assert isinstance(rows, np.memmap)
                assert rows.flags.c_contiguous
                assert not rows.flags.writeable
                np.testing.assert_array_equal(rows, file[f"layers/{layer}/rows/{name}"])


def test_an_intact_file_verifies(store_path):
    StoreReader(store_path).verify_rows()


def test_a_reader_survives_pickling(store_path):
    reader = pickle.loads(pickle.dumps(StoreReader(store_path)))
    np.testing.assert_array_equal(reader.rows("head")["scale"][6], random_arrays(6)["head"]["scale"][0])


def test_a_reader_keeps_its_file_when_a_new_run_replaces_it(store_path):
    reader = StoreReader(store_path)
    before = np.array(reader.rows("head")["scale"])
    writer = StoreWriter(store_path, num_examples=2, store_id="another-run")
    writer.create({})
    writer.finish(attributes={}, documents={}, factors={})
    np.testing.assert_array_equal(reader.rows("head")["scale"], before)
    reader.verify_rows()


def test_a_file_without_layers_opens(tmp_path):
    writer = StoreWriter(tmp_path / "run.h5", num_examples=2, store_id="another-run")
    writer.create({})
    path = writer.finish(attributes={}, documents={}, factors={})
    assert StoreReader(path).layers == ()


def test_unknown_names_are_refused_with_those_that_exist(store_path):
    reader = StoreReader(store_path)
    with pytest.raises(ValueError, match=r"no layer 'body' .* it has \['encoder.0.linear', 'head'\]"):
        reader.rows("body")
    with pytest.raises(ValueError, match="no layer 'body'"):
        reader.factors("body")
    with pytest.raises(ValueError, match="no document 'body'"):
        reader.document("body")
    with pytest.raises(ValueError, match="no column 'body'"):
        reader.column("body")


def test_unknown_attributes_and_members_are_ignored(store_path):
    with h5py.File(store_path, "r+") as file:
        file.attrs["remark"] = "a string of variable length"
        file.attrs["table"] = np.ones(3)
        file["later/version"] = np.ones(3)
        file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")
    assert not {"remark", "table"} & set(StoreReader(store_path).attributes)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(StoreNotFoundError, match="capture gradients first"):
        StoreReader(tmp_path / "run.h5")
    with pytest.raises(StoreNotFoundError, match="Neither is there a directory"):
        StoreReader(tmp_path / "new" / "run.h5")


def test_a_missing_file_names_the_partial_one(tmp_path):
    writer = StoreWriter(tmp_path / "run.h5", num_examples=2, store_id="another-run")
    writer.create({})
    with pytest.raises(StoreNotFoundError, match=r"left run\.h5\.another-\.partial"):
        StoreReader(tmp_path / "run.h5")


def test_a_directory_is_not_a_store(tmp_path):
    with pytest.raises(NotAStoreError, match="is a directory"):
        StoreReader(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_without_permission_is_refused(store_path):
    store_path.chmod(0)
    with pytest.raises(StoreError, match="check its permissions"):
        StoreReader(store_path)


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"PK\x03\x04" * 100])
def test_a_file_that_is_not_hdf5_is_not_a_store(tmp_path, content):
    (tmp_path / "run.h5").write_bytes(content)
    with pytest.raises(NotAStoreError, match="is not HDF5"):
        StoreReader(tmp_path / "run.h5")


@pytest.mark.parametrize("value", [None, "somebody-else", np.bytes_("lightning"), 3])
def test_hdf5_of_others_is_not_a_store(tmp_path, value):
    with h5py.File(tmp_path / "run.h5", "w") as file:
        if value is not None:
            file.attrs["format"] = value
    with pytest.raises(NotAStoreError, match="`format` must be 'lightning-influence'"):
        StoreReader(tmp_path / "run.h5")


def test_another_schema_version_is_named(store_path):
    with h5py.File(store_path, "r+") as file:
        file.attrs["schema_version"] = 6
    with pytest.raises(SchemaVersionError, match=r"version 6, expected one of \[1, 2, 3, 4, 5\]"):
        StoreReader(store_path)


@pytest.mark.parametrize("value", [None, False, 1, np.ones(2, bool)])
def test_a_file_not_marked_complete_is_incomplete(store_path, value):
    with h5py.File(store_path, "r+") as file:
        del file.attrs["complete"]
        if value is not None:
            file.attrs["complete"] = value
    with pytest.raises(IncompleteStoreError, match="never finished"):
        StoreReader(store_path)


def test_a_partial_file_is_incomplete_under_any_name(tmp_path):
    writer = StoreWriter(tmp_path / "run.h5", num_examples=N, store_id="another-run")
    writer.create(LAYERS)
    with pytest.raises(IncompleteStoreError, match="never finished"):
        StoreReader(writer.partial_path)
    writer.partial_path.rename(writer.path)
    with pytest.raises(IncompleteStoreError, match="never finished"):
        StoreReader(writer.path)


def test_a_partial_file_that_hdf5_cannot_open_is_incomplete(store_path):
    partial = store_path.rename(store_path.with_suffix(".partial"))
    os.truncate(partial, 2000)
    with pytest.raises(IncompleteStoreError, match="HDF5 cannot open it"):
        StoreReader(partial)


@pytest.mark.parametrize("name", ["schema_version", "num_examples", "store_id", "segment"])
@pytest.mark.parametrize("value", [None, 0.5, "1", np.ones(2, int)])
def test_a_bad_identity_is_corrupt(store_path, name, value):
    with h5py.File(store_path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    with pytest.raises(CorruptStoreError, match=f"attribute `{name}` must have"):
        StoreReader(store_path)


@pytest.mark.parametrize("count", [N - 1, N + 1, 2**62])
def test_another_number_of_examples_is_corrupt(store_path, count):
    with h5py.File(store_path, "r+") as file:
        file.attrs["num_examples"] = count
    with pytest.raises(CorruptStoreError, match=rf"must have shape \({count},\), found \(7,\)"):
        StoreReader(store_path)


def test_row_arrays_of_another_length_are_corrupt(store_path):
    put(store_path, ROWS, data=np.ones((N + 1, 3, 5), np.float16))
    with pytest.raises(CorruptStoreError, match=r"must have 7 rows .* found shape \(8, 3, 5\)"):
        StoreReader(store_path)


def test_every_truncation_is_an_error(store_path):
    content = store_path.read_bytes()
    for length in range(0, len(content), 197):
        store_path.write_bytes(content[:length])
        expected = NotAStoreError if length < 8 else CorruptStoreError
        with pytest.raises(expected, match="is not HDF5" if length < 8 else "truncated"):
            StoreReader(store_path)


@pytest.mark.parametrize("name", ["rows/loss", "rows/written", "documents/versions"])
def test_a_changed_column_or_document_is_found_on_opening(store_path, name):
    flip(store_path, name)
    with pytest.raises(CorruptStoreError, match=f"/{name} has checksum .* expected"):
        StoreReader(store_path)


def test_a_changed_factor_is_found_on_reading_it(store_path):
    flip(store_path, FACTOR)
    reader = StoreReader(store_path)
    with pytest.raises(CorruptStoreError, match=f"{FACTOR} has checksum"):
        reader.factors(LAYER)


def test_a_changed_row_is_found_by_verify_rows(store_path):
    flip(store_path, ROWS)
    reader = StoreReader(store_path)
    with pytest.raises(CorruptStoreError, match=f"{ROWS} has checksum"):
        reader.verify_rows()


@pytest.mark.parametrize("name", ["rows", "documents", "layers", "segments", "rows/loss", f"layers/{LAYER}/rows"])
def test_a_missing_member_is_corrupt(store_path, name):
    with h5py.File(store_path, "r+") as file:
        del file[name]
    with pytest.raises(CorruptStoreError, match=f"/{name} must have .*, found nothing"):
        StoreReader(store_path)


def test_a_name_that_is_not_utf8_is_corrupt(store_path):
    with h5py.File(store_path, "r+") as file:
        file["layers"].create_group(b"\xff")
    with pytest.raises(CorruptStoreError, match="/layers must have names in UTF-8"):
        StoreReader(store_path)


def test_a_dataset_in_the_place_of_a_group_is_corrupt(store_path):
    put(store_path, "layers/head", data=np.ones(3))
    with pytest.raises(CorruptStoreError, match="must have a group, found Dataset"):
        StoreReader(store_path)


@pytest.mark.parametrize("kind", ["group", "type"])
def test_a_member_that_is_no_dataset_is_corrupt(store_path, kind):
    with h5py.File(store_path, "r+") as file:
        del file[ROWS]
        file[ROWS] = np.dtype("f4") if kind == "type" else file  # a cycle
    with pytest.raises(CorruptStoreError, match=f"{ROWS} must have a dataset, found"):
        StoreReader(store_path)


def test_a_column_of_another_dtype_is_corrupt(store_path):
    put(store_path, "rows/loss", data=np.ones(N))
    with pytest.raises(CorruptStoreError, match="/rows/loss must have dtype f4, found float64"):
        StoreReader(store_path)


@pytest.mark.parametrize("data", [np.ones(3, np.int8), np.ones((3, 3), np.uint8)])
def test_a_document_that_is_not_bytes_is_corrupt(store_path, data):
    put(store_path, "documents/versions", data=data)
    with pytest.raises(CorruptStoreError, match="bytes of u1, found"):
        StoreReader(store_path)


def test_a_document_that_is_too_long_is_corrupt(store_path):
    put(store_path, "documents/versions", data=np.zeros(2**24 + 1, np.uint8))
    with pytest.raises(CorruptStoreError, match="at most 16777216 bytes"):
        StoreReader(store_path)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000])
def test_a_document_that_is_not_json_is_corrupt(store_path, text):
    put(store_path, "documents/versions", data=np.frombuffer(text, np.uint8))
    reader = StoreReader(store_path)
    with pytest.raises(CorruptStoreError, match="must be JSON"):
        reader.document("versions")


@pytest.mark.parametrize(
    "dtype", [">f4", "c8", "S4", "u2", h5py.string_dtype(), h5py.vlen_dtype("i4"), h5py.ref_dtype]
)
def test_a_dtype_off_the_list_is_corrupt(store_path, dtype):
    put(store_path, FACTOR, shape=(3,), dtype=dtype)
    with pytest.raises(CorruptStoreError, match="dtype among"):
        StoreReader(store_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": np.ones((N, 3, 5), np.float16), "chunks": (1, 3, 5)},
        {"data": np.zeros((N, 3, 5), np.float16), "compression": "gzip"},
        {"shape": (2**40, 2**20), "chunks": (1, 1024), "dtype": "f2"},
    ],
)
def test_a_chunked_dataset_is_corrupt(store_path, arguments):
    put(store_path, ROWS, **arguments)
    with pytest.raises(CorruptStoreError, match="must have contiguous layout"):
        StoreReader(store_path)


def test_a_virtual_dataset_is_corrupt(store_path):
    with h5py.File(store_path, "r+") as file:
        del file[FACTOR]
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "data", (3,))
        file.create_virtual_dataset(FACTOR, layout)
    with pytest.raises(CorruptStoreError, match="must have contiguous layout"):
        StoreReader(store_path)


def test_external_storage_is_corrupt(store_path):
    put(store_path, FACTOR, shape=(3,), dtype="u1", external=[("/etc/passwd", 0, 3)])
    with pytest.raises(CorruptStoreError, match="external storage"):
        StoreReader(store_path)


@pytest.mark.parametrize("link", [h5py.SoftLink("/rows/loss"), h5py.ExternalLink("run.h5", "/rows/loss")])
@pytest.mark.parametrize("name", [ROWS, "rows/loss", "documents", "layers/head"])
def test_a_link_that_is_not_hard_is_corrupt(store_path, name, link):
    with h5py.File(store_path, "r+") as file:
        del file[name]
        file[name] = link
    with pytest.raises(CorruptStoreError, match=f"/{name} must have a hard link, found"):
        StoreReader(store_path)


def test_a_dataset_without_data_is_corrupt(store_path):
    put(store_path, FACTOR, shape=(3,), dtype="f4")
    with pytest.raises(CorruptStoreError, match="found one missing"):
        StoreReader(store_path)


def test_an_empty_dataset_is_corrupt(store_path):
    put(store_path, FACTOR, data=h5py.Empty("f4"))
    with pytest.raises(CorruptStoreError, match="found one missing"):
        StoreReader(store_path)


@pytest.mark.parametrize("value", [None, "0", np.ones(2, np.uint32), 0.5])
def test_a_dataset_without_checksum_is_corrupt(store_path, value):
    with h5py.File(store_path, "r+") as file:
        del file[FACTOR].attrs["crc32"]
        if value is not None:
            file[FACTOR].attrs["crc32"] = value
    with pytest.raises(CorruptStoreError, match="integer attribute `crc32`"):
        StoreReader(store_path)


def test_a_huge_shape_is_corrupt_and_allocates_nothing(store_path):
    size, huge = 12_347, 2**50
    put(store_path, FACTOR, data=np.zeros(size, np.uint8))  # h5py's default has no checksums
    content = store_path.read_bytes()
    patched = content.replace(size.to_bytes(8, "little"), huge.to_bytes(8, "little"))
    assert patched != content
    store_path.write_bytes(patched)
    tracemalloc.start()
    # HDF5 2 refuses such a size by itself, older ones leave it to us.
    with pytest.raises(CorruptStoreError, match=r"is truncated or damaged|inside the file's"):
        StoreReader(store_path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def contents(reader: StoreReader) -> list[object]:
    """All that a reader gives, comparable; damage that a checksum covers raises."""
    reader.verify_rows()
    found: list[object] = [reader.segments]
    for segment in map(reader.segment, reader.segments):
        arrays = [segment.column("loss"), segment.column("written")]
        for layer in LAYERS:
            arrays += [*segment.factors(layer).values(), *segment.rows(layer).values()]
        documents = [segment.document(name) for name in DOCUMENTS]
        found += [segment.attributes, segment.layers, documents, *(array.tobytes() for array in arrays)]
    return found


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> tuple[Path, list[object]]:
    """A finished file of two segments, not to be changed, and its contents."""
    path = write_file(tmp_path_factory.mktemp("intact") / "run.h5")
    write_file(path, segment=1, after=path)
    return path, contents(StoreReader(path))


def check_damaged(intact: tuple[Path, list[object]], damaged: bytes) -> None:
    """Damage must be a StoreError, or in bytes that mean nothing."""
    path, expected = intact
    damaged_path = path.with_name("damaged.h5")
    damaged_path.write_bytes(damaged)
    try:
        found = contents(StoreReader(damaged_path))
    except StoreError:
        return
    assert found == expected


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_random_damage_is_a_store_error_or_harmless(intact, data):
    damaged = bytearray(intact[0].read_bytes())
    position = st.integers(0, len(damaged) - 1)
    for start in data.draw(st.lists(position, min_size=1, max_size=4)):
        patch = data.draw(st.binary(min_size=1, max_size=16))
        damaged[start : start + len(patch)] = patch
    end = data.draw(st.one_of(st.none(), position))
    check_damaged(intact, bytes(damaged[:end]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in KiB")
def test_no_flipped_bit_is_a_raw_error_or_costs_memory(intact):
    import resource

    content = intact[0].read_bytes()
    generator = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for position in generator.sample(range(len(content)), 120):
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(8)
        check_damaged(intact, bytes(damaged))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000

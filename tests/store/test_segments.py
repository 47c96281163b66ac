"""Several captured epochs in one file: the root is the latest, the others keep every bit."""

import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from store_example import ATTRIBUTES, DOCUMENTS, FACTORS, LAYERS, N, random_arrays

from lightning_influence.errors import CorruptStoreError, IncompleteStoreError, StoreError, StoreNotFoundError
from lightning_influence.store import ArraySpec, StoreReader, StoreWriter
from lightning_influence.store.schema import SCHEMA_VERSION

STORE_ID = "0123456789abcdef"
LAYER = "encoder.0.linear"
GOLDEN = Path(__file__).parents[1] / "golden"


def write_segment(
    path: Path,
    segment: int,
    *,
    after: Path | None = None,
    layers: dict[str, dict[str, ArraySpec]] = LAYERS,
    num_examples: int = N,
    store_id: str = STORE_ID,
    seed: int | None = None,
) -> Path:
    """A file whose root is a segment with all rows but 2 written, of values that its seed tells."""
    writer = StoreWriter(path, num_examples=num_examples, store_id=store_id, segment=segment, after=after)
    writer.create(layers)
    indices = np.array([6, 0, 3, 5, 1, 4])
    arrays = random_arrays(6, seed=segment if seed is None else seed)
    columns = {"valid": np.ones(6, bool), "loss": np.full(6, segment)}
    writer.write_rows(indices, columns=columns, arrays={layer: arrays[layer] for layer in layers})
    return writer.finish(
        attributes=ATTRIBUTES | {"epoch": segment},
        documents=DOCUMENTS | {"epoch": segment},
        factors={layer: named for layer, named in FACTORS.items() if layer in layers},
    )


def contents(reader: StoreReader) -> dict[str, Any]:
    """All that a reader gives, comparable."""
    attributes = {name: value for name, value in reader.attributes.items() if name != "segment"}
    datasets = {name: (array.dtype, array.shape, array.tobytes()) for name, array, _ in reader.datasets()}
    return {"attributes": attributes, "layers": reader.layers, "number": reader.number, **datasets}


@pytest.fixture(scope="module")
def three_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the segments 2, 5 and 9, of which 5 has one layer only."""
    path = tmp_path_factory.mktemp("segments") / "run.h5"
    write_segment(path, 2)
    write_segment(path, 5, after=path, layers={"head": LAYERS["head"]})
    return write_segment(path, 9, after=path).read_bytes()


@pytest.fixture
def three(tmp_path: Path, three_content: bytes) -> Path:
    path = tmp_path / "three.h5"
    path.write_bytes(three_content)
    return path


def test_a_file_of_one_segment_says_its_number(tmp_path):
    reader = StoreReader(write_segment(tmp_path / "run.h5", 4))
    assert (reader.segments, reader.number, reader.attributes["segment"]) == ((4,), 4, 4)


def test_the_root_is_the_segment_written_last(three):
    reader = StoreReader(three)
    assert reader.segments == (2, 5, 9)
    assert (reader.number, reader.document("epoch")) == (9, 9)


@pytest.mark.parametrize("number", [2, 5, 9])
def test_each_segment_equals_the_file_of_its_own(tmp_path, three, number):
    layers = {"head": LAYERS["head"]} if number == 5 else LAYERS
    alone = StoreReader(write_segment(tmp_path / "alone.h5", number, layers=layers))
    view = StoreReader(three).segment(number)
    assert contents(view) == contents(alone)
    assert view.attributes == alone.attributes
    for layer in layers:
        np.testing.assert_equal(view.factors(layer), alone.factors(layer))
        np.testing.assert_equal(view.rows(layer), alone.rows(layer))
    np.testing.assert_array_equal(view.column("loss"), alone.column("loss"))
    assert {name: view.document(name) for name in DOCUMENTS} == DOCUMENTS
    view.verify_rows()


def test_a_segment_shares_the_map_of_its_reader(three):
    reader = StoreReader(three)
    three.unlink()
    view = reader.segment(5)
    assert (view.layers, view.path, view.segments) == (("head",), three, (2, 5, 9))
    assert np.shares_memory(view.segment(9).rows("head")["scale"], reader.rows("head")["scale"])
    assert reader.number == 9


@pytest.mark.parametrize("number", [2, 9])
def test_a_segment_survives_pickling(three, number):
    view = StoreReader(three).segment(number)
    assert contents(pickle.loads(pickle.dumps(view))) == contents(view)
    assert contents(StoreReader(three, number)) == contents(view)


def test_an_unknown_segment_is_refused_with_those_that_exist(three):
    with pytest.raises(ValueError, match=r"no segment 3 in .* it has \[2, 5, 9\]"):
        StoreReader(three).segment(3)
    with pytest.raises(ValueError, match="no segment 3"):
        StoreReader(three, 3)


@pytest.mark.parametrize("number", [2, 5, 9])
def test_a_segment_captured_again_replaces_the_old_one_and_those_after_it(three, number):
    before = {other: contents(StoreReader(three, other)) for other in (2, 5, 9)}
    write_segment(three, number, after=three, seed=100)
    reader = StoreReader(three)
    earlier = [other for other in (2, 5, 9) if other < number]
    assert (reader.segments, reader.number) == ((*earlier, number), number)
    np.testing.assert_array_equal(reader.rows("head")["scale"][6], random_arrays(6, seed=100)["head"]["scale"][0])
    assert all(contents(reader.segment(other)) == before[other] for other in earlier)
    reader.verify_rows()


def test_a_replaced_segment_takes_no_room(tmp_path):
    path = write_segment(tmp_path / "run.h5", 3)
    size = path.stat().st_size
    assert write_segment(path, 3, after=path).stat().st_size == size


def test_a_segment_of_an_older_schema_is_kept_as_it_was(tmp_path):
    old = StoreReader(GOLDEN / "schema_v2.h5")
    writer = StoreWriter(
        tmp_path / "run.h5", num_examples=20, store_id=old.store_id, segment=7, after=GOLDEN / "schema_v2.h5"
    )
    writer.create({})
    reader = StoreReader(writer.finish(attributes={}, documents={}, factors={}))
    assert (reader.attributes["schema_version"], reader.segments) == (SCHEMA_VERSION, (0, 7))
    kept = reader.segment(0)
    assert contents(kept) == contents(old)
    assert kept.attributes["schema_version"] == 2
    assert kept.column("occurrences").tolist() == [1] * 18 + [0] * 2


def test_rows_of_a_segment_that_are_never_written_are_zeros_beside_earlier_ones(tmp_path):
    path = tmp_path / "run.h5"
    layers = {f"block.{k}": {"a": ArraySpec((k + 1,), "u1")} for k in range(60)}
    for segment in range(3):
        writer = StoreWriter(
            path, num_examples=2, store_id=STORE_ID, segment=segment, after=path if segment else None
        )
        writer.create(layers)
        assert not any(writer.read_rows(layer, slice(0, 2))["a"].any() for layer in layers)
        ones = {layer: {"a": np.ones((2, *named["a"].shape), np.uint8)} for layer, named in layers.items()}
        writer.write_rows(np.arange(2), columns={}, arrays=ones)
        writer.finish(attributes={}, documents={}, factors={})
    StoreReader(path).verify_rows()


def test_every_block_of_a_file_with_earlier_segments_is_reserved(three):
    writer = StoreWriter(three, num_examples=N, store_id=STORE_ID, segment=10, after=three)
    writer.create({"large": {"a": ArraySpec((1000,), "f4")}})
    status = writer.partial_path.stat()
    assert status.st_blocks * 512 >= status.st_size > 3 * 1000


def test_a_discarded_segment_leaves_the_file_as_it_was(three, three_content):
    writer = StoreWriter(three, num_examples=N, store_id=STORE_ID, segment=10, after=three)
    writer.create(LAYERS)
    with pytest.raises(IncompleteStoreError, match="never finished"):
        StoreReader(writer.partial_path)
    writer.discard()
    assert three.read_bytes() == three_content
    assert list(three.parent.iterdir()) == [three]


def test_damage_is_carried_along_and_still_found(three):
    with h5py.File(three) as file:
        offset = file["segments/2/layers/head/rows/scale"].id.get_offset()
    content = bytearray(three.read_bytes())
    content[offset] ^= 1
    three.write_bytes(content)
    write_segment(three, 10, after=three)
    with pytest.raises(CorruptStoreError, match="/segments/2/layers/head/rows/scale has checksum"):
        StoreReader(three).verify_rows()


@pytest.mark.parametrize("arguments", [{"num_examples": N + 1}, {"store_id": "0123456789-another"}])
def test_a_file_of_another_run_or_dataset_is_refused(three, three_content, arguments):
    writer = StoreWriter(three, **({"num_examples": N, "store_id": STORE_ID} | arguments), segment=10, after=three)
    with pytest.raises(StoreError, match="`after` must be a file of the same run and dataset"):
        writer.create(LAYERS)
    assert three.read_bytes() == three_content
    assert list(three.parent.iterdir()) == [three]


def test_an_unfinished_or_missing_file_is_refused(tmp_path):
    unfinished = StoreWriter(tmp_path / "run.h5", num_examples=N, store_id=STORE_ID)
    unfinished.create(LAYERS)
    for after, error in (
        (unfinished.partial_path, IncompleteStoreError),
        (tmp_path / "no.h5", StoreNotFoundError),
    ):
        writer = StoreWriter(tmp_path / "b.h5", num_examples=N, store_id=STORE_ID, segment=1, after=after)
        with pytest.raises(error):
            writer.create(LAYERS)


@pytest.mark.parametrize("segment", [-1, 10**18, 0.0, True, "1"])
def test_a_segment_that_is_no_number_is_refused(tmp_path, segment):
    with pytest.raises(ValueError, match="`segment` must be an integer from 0"):
        StoreWriter(tmp_path / "run.h5", num_examples=N, store_id=STORE_ID, segment=segment)


def test_the_same_segments_give_the_same_bytes(tmp_path, three_content):
    path = write_segment(tmp_path / "b.h5", 2)
    write_segment(path, 5, after=path, layers={"head": LAYERS["head"]})
    assert write_segment(path, 9, after=path).read_bytes() == three_content


@pytest.mark.parametrize("name", ["x", "02", "-1", "9", "²", "1" * 19])
def test_a_name_that_is_no_other_number_is_corrupt(three, name):
    with h5py.File(three, "r+") as file:
        file.move("segments/2", f"segments/{name}")
    with pytest.raises(CorruptStoreError, match="must have a number other than 9"):
        StoreReader(three)


@pytest.mark.parametrize("name", ["format", "complete", "store_id", "num_examples", "segment", "schema_version"])
@pytest.mark.parametrize("value", [None, 99, "1", np.ones(2)])
def test_a_segment_of_another_identity_is_corrupt(three, name, value):
    with h5py.File(three, "r+") as file:
        attributes = file["segments/2"].attrs
        del attributes[name]
        if value is not None:
            attributes[name] = value
    with pytest.raises(CorruptStoreError, match=f"/segments/2, attribute `{name}`, must have"):
        StoreReader(three)


@pytest.mark.parametrize(
    "name", ["rows", "documents", "layers", "rows/loss", "rows/occurrences", "layers/head/rows"]
)
def test_a_missing_member_of_a_segment_is_corrupt(three, name):
    with h5py.File(three, "r+") as file:
        del file[f"segments/2/{name}"]
    with pytest.raises(CorruptStoreError, match=f"/segments/2/{name} must have .*, found nothing"):
        StoreReader(three)


@pytest.mark.parametrize("link", [h5py.SoftLink("/"), h5py.ExternalLink("run.h5", "/")])
def test_a_segment_that_is_linked_from_elsewhere_is_corrupt(three, link):
    with h5py.File(three, "r+") as file:
        del file["segments/2"]
        file["segments/2"] = link
    with pytest.raises(CorruptStoreError, match="/segments/2 must have a hard link"):
        StoreReader(three)


def test_a_segment_that_is_the_root_again_is_corrupt(three):
    with h5py.File(three, "r+") as file:
        file["segments/3"] = file
    with pytest.raises(CorruptStoreError, match="/segments/3, attribute `segment`, must have 3, found 9"):
        StoreReader(three)


def test_a_dataset_in_the_place_of_a_segment_is_corrupt(three):
    with h5py.File(three, "r+") as file:
        file["segments/3"] = np.ones(3)
    with pytest.raises(CorruptStoreError, match="/segments/3 must have a group, found Dataset"):
        StoreReader(three)


def test_rows_of_a_segment_of_another_length_are_corrupt(three):
    with h5py.File(three, "r+") as file:
        del file["segments/2/layers/head/rows/scale"]
        dataset = file.create_dataset("segments/2/layers/head/rows/scale", data=np.ones(N + 1))
        dataset.attrs["crc32"] = np.uint32(0)
    with pytest.raises(CorruptStoreError, match=r"/segments/2/layers/head/rows/scale must have 7 rows"):
        StoreReader(three)


@pytest.mark.parametrize("name", ["rows/loss", "documents/versions"])
def test_a_changed_column_or_document_of_a_segment_is_found_on_opening(three, name):
    with h5py.File(three) as file:
        offset = file[f"segments/2/{name}"].id.get_offset()
    content = bytearray(three.read_bytes())
    content[offset] ^= 1
    three.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=f"/segments/2/{name} has checksum"):
        StoreReader(three)


def test_a_changed_factor_of_a_segment_is_found_on_reading_it(three):
    with h5py.File(three) as file:
        offset = file[f"segments/2/layers/{LAYER}/factors/Q_A"].id.get_offset()
    content = bytearray(three.read_bytes())
    content[offset] ^= 1
    three.write_bytes(content)
    reader = StoreReader(three)
    reader.factors(LAYER)
    with pytest.raises(CorruptStoreError, match=f"/segments/2/layers/{LAYER}/factors/Q_A has checksum"):
        reader.segment(2).factors(LAYER)


def test_unknown_members_of_a_segment_are_ignored_and_not_copied(three):
    with h5py.File(three, "r+") as file:
        file["segments/2"].attrs["remark"] = "a string of variable length"
        file["segments/2/elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")
    assert "remark" not in StoreReader(three, 2).attributes
    write_segment(three, 10, after=three)
    with h5py.File(three) as file:
        assert set(file["segments/2"]) == {"rows", "layers", "documents"}
    assert os.listdir(three.parent) == [three.name]


@pytest.mark.parametrize(("epoch", "number"), [(4, 4), (-1, 0), (0.5, 0), ("2", 0), (None, 0), (True, 0)])
def test_the_segment_of_an_older_file_is_its_epoch(tmp_path, epoch, number):
    path = tmp_path / "old.h5"
    path.write_bytes((GOLDEN / "schema_v2.h5").read_bytes())
    if epoch is not None:
        with h5py.File(path, "r+") as file:
            file.attrs["epoch"] = np.bytes_(epoch) if isinstance(epoch, str) else epoch
    assert StoreReader(path).segments == (number,)

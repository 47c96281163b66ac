"""The writer's use of h5py: laying a file out and adding datasets to it.

HDF5 recovers badly from a write that fails, so the writer reserves disk blocks before each of these
calls: HDF5 then only ever writes to blocks that the file has.
"""

import functools
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from lightning_influence.errors import StoreError
from lightning_influence.store import disk
from lightning_influence.store.encoding import encode_text, encode_value
from lightning_influence.store.reader import StoreReader
from lightning_influence.store.schema import FORMAT, SCHEMA_VERSION

Array = tuple[tuple[int, ...], np.dtype]  # shape and dtype

HEADER_BYTES = 4096  # generous: what HDF5 spends on one dataset or group of ours, names aside

# The object formats of HDF5 1.8: every piece of metadata has a checksum, and all readers know them.
_LIBVER = ("v108", "v108")
META_BLOCK_BYTES = 1 << 16  # metadata side by side, so that HDF5 writes it in a few large pieces
_ALIGNMENT = 64  # bytes; row arrays start on a cache line when mapped


def open_for_writing(path: Path) -> h5py.File:
    """Open an existing file so that what is added keeps its format and alignment."""
    return h5py.File(
        path,
        "r+",
        libver=_LIBVER,
        alignment_threshold=1,
        alignment_interval=_ALIGNMENT,
        meta_block_size=META_BLOCK_BYTES,
    )


def identity(*, num_examples: int, store_id: str, segment: int) -> dict[str, np.ndarray]:
    """The root attributes of an incomplete file."""
    return {
        "format": encode_text(FORMAT),
        "schema_version": encode_value(SCHEMA_VERSION),
        "complete": encode_value(False),
        "store_id": encode_text(store_id),
        "num_examples": encode_value(num_examples),
        "segment": encode_value(segment),
    }


def create_file(
    path: Path,
    attributes: Mapping[str, np.ndarray],
    *,
    layers: Iterable[str],
    arrays: Mapping[str, Array],
    earlier: Sequence[StoreReader] = (),
) -> dict[str, int]:
    """Create an incomplete file of zeros and of earlier segments, reserve its disk blocks and close it.

    Args:
        path: the new file; a stale one of that name is unlinked.
        attributes: of `identity`.
        layers: names of all layers.
        arrays: by full name in the file, all columns' and row arrays' shapes and dtypes.
        earlier: segments to copy into `/segments`.

    Returns:
        By full name, the offset of each array's first byte in the file.

    Raises:
        StoreError: if there is no room.
    """
    path.unlink(missing_ok=True)  # not truncated: somebody may have it mapped
    with path.open("xb") as file:
        file.write(_empty_file())
    wanted = META_BLOCK_BYTES + 16 * HEADER_BYTES + sum(len(layer) + 4 * HEADER_BYTES for layer in layers)
    for name, (shape, dtype) in arrays.items():
        wanted += math.prod(shape) * dtype.itemsize + len(name) + HEADER_BYTES
    disk.reserve(path, wanted + sum(_segment_bytes(segment) for segment in earlier))

    offsets = {}
    with open_for_writing(path) as file:
        _set_attributes(file, attributes)
        for group in ("documents", "layers", "segments"):
            file.create_group(group)
        _create_layers(file, layers)
        for name, (shape, dtype) in arrays.items():
            offsets[name] = create_dataset(file, name, shape, dtype).id.get_offset()
        for segment in earlier:
            _copy_segment(file, segment)
    return offsets


def find_arrays(
    path: Path,
    attributes: Mapping[str, np.ndarray],
    *,
    arrays: Mapping[str, Array],
) -> dict[str, int]:
    """The offsets in a file that another process has created with the same arguments.

    Raises:
        StoreError: if they were others.
    """
    with h5py.File(path, "r") as file:
        found: dict[str, object] = {name: file.attrs.get(name) for name in attributes}
        found |= {name: (dataset.shape, dataset.dtype) for name, dataset in _row_arrays(file)}
        expected: dict[str, object] = {name: value[()] for name, value in attributes.items()} | dict(arrays)
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise StoreError(
                    f"{path} must have {name!r} = {expected.get(name)}, found {found.get(name)}: all processes "
                    "must write the same segment of the same run with the same layers."
                )
        return {name: file[name].id.get_offset() for name in arrays}


def _row_arrays(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """By full name, all columns and row arrays of the root."""
    for group in ("rows", *(f"layers/{layer}/rows" for layer in file["layers"])):
        for name, dataset in file[group].items():
            yield f"{group}/{name}", dataset


def write_dataset(file: h5py.File, name: str, array: np.ndarray, crc32: int) -> None:
    """A new dataset with its data and checksum."""
    dataset = create_dataset(file, name, array.shape, array.dtype, crc32)
    dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, array)  # a fifth of the time of `[...] =`


def _set_attributes(group: h5py.Group, attributes: Mapping[str, np.ndarray]) -> None:
    for name, value in attributes.items():
        group.attrs[name] = value


def _create_layers(group: h5py.Group, layers: Iterable[str]) -> None:
    for layer in layers:
        group.create_group(f"layers/{layer}/factors")
        group.create_group(f"layers/{layer}/rows")


def _segment_bytes(segment: StoreReader) -> int:
    """Room for a copy of an earlier segment."""
    groups = 16 * HEADER_BYTES + sum(len(layer) + 4 * HEADER_BYTES for layer in segment.layers)
    attributes = sum(len(str(value)) * 4 + len(name) + HEADER_BYTES for name, value in segment.attributes.items())
    datasets = sum(array.nbytes + len(name) + HEADER_BYTES for name, array, _ in segment.datasets())
    return groups + attributes + datasets


def _copy_segment(file: h5py.File, segment: StoreReader) -> None:
    """Copy bytes and checksums as they are: damage stays as visible as it was."""
    group = file.create_group(f"segments/{segment.number}")
    attributes = {**segment.attributes, "segment": segment.number}
    _set_attributes(group, {name: encode_value(value) for name, value in attributes.items()})
    group.create_group("documents")
    group.create_group("layers")
    _create_layers(group, segment.layers)
    for name, array, crc32 in segment.datasets():
        write_dataset(file, f"{group.name}/{name}", array, crc32)


@functools.cache
def _empty_file() -> bytes:
    empty = io.BytesIO()
    with h5py.File(empty, "w", libver=_LIBVER):
        pass
    return empty.getvalue()


def create_dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype, crc32: int = 0
) -> h5py.Dataset:
    """An unfilled contiguous dataset whose place in the file is fixed at once.

    `Group.create_dataset` has no argument for early allocation, hence the lower level.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # reserved blocks are zeros already
    properties.set_obj_track_times(False)  # the same input gives the same bytes
    group, _, last = name.rpartition("/")
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    dataset = h5py.Dataset(
        h5py.h5d.create(
            file.require_group(group).id,
            last.encode(),
            h5py.h5t.py_create(dtype),
            space,
            properties,
        )
    )
    dataset.attrs["crc32"] = np.uint32(crc32)
    return dataset

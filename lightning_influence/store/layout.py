"""The writer's use of h5py: laying a file out and adding datasets to it.

HDF5 recovers badly from a write that fails, so the writer reserves disk blocks before each of these
calls: HDF5 then only ever writes to blocks that the file has.
"""

import functools
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

from lightning_influence.store import disk
from lightning_influence.store.encoding import encode_text
from lightning_influence.store.schema import FORMAT, SCHEMA_VERSION, ArraySpec, stored_dtype

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


def create_file(
    path: Path,
    *,
    num_examples: int,
    store_id: str,
    layers: Iterable[str],
    specs: Mapping[str, ArraySpec],
) -> dict[str, int]:
    """Create an incomplete file of zeros, reserve its disk blocks and close it.

    Args:
        path: the new file; a stale one of that name is unlinked.
        num_examples: N.
        store_id: of the run.
        layers: names of all layers.
        specs: by full name in the file, all columns and row arrays.

    Returns:
        By full name, the offset of each array's first byte in the file.

    Raises:
        StoreError: if there is no room.
    """
    path.unlink(missing_ok=True)  # not truncated: somebody may have it mapped
    with path.open("xb") as file:
        file.write(_empty_file())
    wanted = META_BLOCK_BYTES + 16 * HEADER_BYTES + sum(len(layer) + 4 * HEADER_BYTES for layer in layers)
    for name, spec in specs.items():
        wanted += num_examples * spec.nbytes + len(name) + HEADER_BYTES
    disk.reserve(path, wanted)

    offsets = {}
    with open_for_writing(path) as file:
        file.attrs["format"] = encode_text(FORMAT)
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["complete"] = False
        file.attrs["store_id"] = encode_text(store_id)
        file.attrs["num_examples"] = num_examples
        for group in ("documents", "layers"):
            file.create_group(group)
        for layer in layers:
            file.create_group(f"layers/{layer}/factors")
            file.create_group(f"layers/{layer}/rows")
        for name, spec in specs.items():
            shape = (num_examples, *spec.shape)
            dataset = create_dataset(file, name, shape, stored_dtype(spec.dtype))
            offsets[name] = dataset.id.get_offset()
    return offsets


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

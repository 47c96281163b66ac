"""What a reader believes of a file: its structure, checked against its real size.

Nothing here reads the data of a dataset. HDF5 parses its metadata, this module accepts only plain
contiguous datasets that lie inside the file, and hands out where they lie; the reader maps them.
So no size that a file claims is ever allocated, and no filter, link or object in it is followed.
"""

import math
import re
from dataclasses import dataclass
from typing import TypeGuard

import h5py
import numpy as np

from lightning_influence.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    NotAStoreError,
    SchemaVersionError,
)
from lightning_influence.store.schema import (
    COLUMNS,
    DTYPES,
    FORMAT,
    MAX_ATTRIBUTE_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_SEGMENT,
    READABLE_VERSIONS,
    SEGMENTS_SINCE,
)

Attribute = bool | int | float | str

_ATTRIBUTE_TYPES = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID)


@dataclass(frozen=True)
class Extent:
    """Where a dataset lies in the file.

    Args:
        offset: of its first byte in the file.
        shape: of the array.
        dtype: of the array.
        crc32: the checksum of its bytes that the file claims.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    crc32: int

    @property
    def nbytes(self) -> int:
        """Length in the file, in bytes; a Python integer, which does not overflow."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Structure:
    """Everything that a segment says apart from its data.

    Args:
        where: the segment's group, "" for the root.
        number: the segment's.
        attributes: of the root or of the segment's group.
        columns: by name, extents of shape [N].
        documents: by name, extents of shape [bytes], u1.
        factors: by layer, by name, of any shape.
        rows: by layer, by name, of shape [N, ...].
    """

    where: str
    number: int
    attributes: dict[str, Attribute]
    columns: dict[str, Extent]
    documents: dict[str, Extent]
    factors: dict[str, dict[str, Extent]]
    rows: dict[str, dict[str, Extent]]


def read_structures(file: h5py.File, path: str, size: int) -> tuple[Structure, ...]:
    """Read and check all of a file but its data.

    Args:
        file: an open file.
        path: its name, for messages.
        size: its real size in bytes.

    Returns:
        The root's structure, then those of the segments captured before.

    Raises:
        NotAStoreError, SchemaVersionError, IncompleteStoreError, CorruptStoreError: see there.
    """
    attributes = _read_attributes(file)
    _check_identity(attributes, path)
    root = _read_segment(file, attributes, _root_number(attributes, path), path, size)
    if not has_segments(attributes):
        return (root,)
    group, earlier = _group(file, "segments", path), []
    for name in _names(group, path):
        member = _group(group, name, path)
        attributes = _read_attributes(member)
        _check_segment(name, attributes, root, path)
        earlier.append(_read_segment(member, attributes, int(name), path, size))
    return root, *earlier


def has_segments(attributes: dict[str, Attribute]) -> bool:
    """Whether the version in these attributes knows segments and occurrences."""
    return int(attributes["schema_version"]) >= SEGMENTS_SINCE


def _read_segment(
    group: h5py.Group, attributes: dict[str, Attribute], number: int, path: str, size: int
) -> Structure:
    """Read and check the members of the root or of an earlier segment."""
    where = "" if group.name == "/" else f"/segments/{number}"
    columns = _read_extents(_group(group, "rows", path), path, size)
    documents = _read_extents(_group(group, "documents", path), path, size)
    factors, rows = {}, {}
    layers = _group(group, "layers", path)
    for layer in _names(layers, path):
        members = _group(layers, layer, path)
        factors[layer] = _read_extents(_group(members, "factors", path), path, size)
        rows[layer] = _read_extents(_group(members, "rows", path), path, size)
    structure = Structure(where, number, attributes, columns, documents, factors, rows)
    _check_shapes(structure, path)
    return structure


def _check_shapes(structure: Structure, path: str) -> None:
    """Are all columns there, everything as long as the dataset, and documents bytes?"""
    where, n = structure.where, structure.attributes["num_examples"]
    columns = structure.columns
    for name, (dtype, _) in COLUMNS.items():
        if name == "occurrences" and not has_segments(structure.attributes):
            continue
        if name not in columns:
            raise _corrupt(path, f"{where}/rows/{name}", "a dataset", "nothing")
        if columns[name].dtype != np.dtype(dtype):
            raise _corrupt(path, f"{where}/rows/{name}", f"dtype {dtype}", str(columns[name].dtype))
    for name, extent in columns.items():
        if extent.shape != (n,):
            raise _corrupt(path, f"{where}/rows/{name}", f"shape {(n,)}", f"{extent.shape}")
    for layer, arrays in structure.rows.items():
        for name, extent in arrays.items():
            if extent.shape[:1] != (n,):
                found = f"shape {extent.shape}"
                raise _corrupt(path, f"{where}/layers/{layer}/rows/{name}", f"{n} rows (`num_examples`)", found)
    for name, extent in structure.documents.items():
        if extent.dtype != np.uint8 or len(extent.shape) != 1 or extent.nbytes > MAX_DOCUMENT_BYTES:
            expected = f"at most {MAX_DOCUMENT_BYTES} bytes of u1"
            found = f"{extent.dtype} of shape {extent.shape}"
            raise _corrupt(path, f"{where}/documents/{name}", expected, found)


def _check_identity(attributes: dict[str, Attribute], path: str) -> None:
    """Is it ours, of a schema that we read, finished, and does it say how long it is?"""
    version = attributes.get("schema_version")
    if attributes.get("format") != FORMAT:
        raise NotAStoreError(
            f"{path} is HDF5, but its attribute `format` must be {FORMAT!r}, "
            f"found {attributes.get('format')!r}; pass a file that this package wrote."
        )
    if type(version) is not int:
        raise _corrupt(path, "attribute `schema_version`", "an integer", repr(version))
    if version not in READABLE_VERSIONS:
        raise SchemaVersionError(
            f"{path} has schema version {version}, expected one of {sorted(READABLE_VERSIONS)}; "
            "read it with the version of lightning-influence that wrote it, or a later one."
        )
    if attributes.get("complete") is not True:
        raise IncompleteStoreError(
            f"{path} was never finished: its attribute `complete` must be true, found "
            f"{attributes.get('complete')!r}. Training or capture ended early; capture again."
        )
    n = attributes.get("num_examples")
    if type(n) is not int or n < 1:
        raise _corrupt(path, "attribute `num_examples`", "an integer above 0", repr(n))
    if not isinstance(attributes.get("store_id"), str):
        found = repr(attributes.get("store_id"))
        raise _corrupt(path, "attribute `store_id`", "a string", found)


def _root_number(attributes: dict[str, Attribute], path: str) -> int:
    """The root's segment number; before there were segments, its epoch."""
    if has_segments(attributes):
        number = attributes.get("segment")
        if not _is_number(number):
            expected = f"an integer from 0 to {MAX_SEGMENT}"
            raise _corrupt(path, "attribute `segment`", expected, repr(number))
        return int(number)
    epoch = attributes.get("epoch")
    return int(epoch) if _is_number(epoch) else 0


def _is_number(value: Attribute | None) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_SEGMENT


def _check_segment(name: str, attributes: dict[str, Attribute], root: Structure, path: str) -> None:
    """Is it of the root's run, with a number of its own, in a schema that we read?"""
    where = f"/segments/{name}"
    if not re.fullmatch(r"0|[1-9][0-9]{0,17}", name) or int(name) == root.number:
        expected = f"a number other than {root.number}, the root's, as its name"
        raise _corrupt(path, where, expected, repr(name))
    shared = ("format", "complete", "store_id", "num_examples")
    expected_attributes = {key: root.attributes[key] for key in shared} | {"segment": int(name)}
    for key, expected_value in expected_attributes.items():
        found = attributes.get(key)
        if type(found) is not type(expected_value) or found != expected_value:
            raise _corrupt(path, f"{where}, attribute `{key}`,", repr(expected_value), repr(found))
    version = attributes.get("schema_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise _corrupt(
            path, f"{where}, attribute `schema_version`,", f"one of {sorted(READABLE_VERSIONS)}", repr(version)
        )


def _read_attributes(group: h5py.Group) -> dict[str, Attribute]:
    """The attributes that are as the format wants them; the others are unknown to us."""
    attributes: dict[str, Attribute] = {}
    for name in group.attrs:
        if not isinstance(name, str):  # h5py gives bytes for a name that is not UTF-8
            continue
        attribute = group.attrs.get_id(name)
        kind = attribute.get_type()
        is_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        is_small = attribute.shape == () and attribute.get_storage_size() <= MAX_ATTRIBUTE_BYTES
        if is_small and (is_text or isinstance(kind, _ATTRIBUTE_TYPES)):
            value = group.attrs[name]
            attributes[name] = value.decode() if is_text else value.item()
    return attributes


def _group(parent: h5py.Group, name: str, path: str) -> h5py.Group:
    """The group `name` of `parent`, linked directly."""
    where = f"{parent.name}/{name}".replace("//", "/")
    group = _member(parent, name, path, where)
    if not isinstance(group, h5py.Group):
        raise _corrupt(path, where, "a group", type(group).__name__)
    return group


def _member(parent: h5py.Group, name: str, path: str, where: str) -> object:
    """What is at `name`, if a hard link leads there: others may lead out of the file."""
    if not parent.id.links.exists(name.encode()):
        raise _corrupt(path, where, "a member", "nothing")
    link = parent.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise _corrupt(path, where, "a hard link", type(link).__name__)
    return parent[name]


def _names(group: h5py.Group, path: str) -> list[str]:
    """The names in a group; h5py gives bytes for one that is not UTF-8."""
    names = list(group)
    if not all(isinstance(name, str) for name in names):
        raise _corrupt(path, str(group.name), "names in UTF-8", repr(names[:5]))
    return names


def _read_extents(group: h5py.Group, path: str, size: int) -> dict[str, Extent]:
    """By name, where the datasets of a group lie."""
    return {name: _read_extent(group, name, path, size) for name in _names(group, path)}


def _read_extent(group: h5py.Group, name: str, path: str, size: int) -> Extent:
    """Where one dataset lies, if it is plain and lies inside the file."""
    where = f"{group.name}/{name}"
    dataset = _member(group, name, path, where)
    if not isinstance(dataset, h5py.Dataset):
        raise _corrupt(path, where, "a dataset", type(dataset).__name__)
    properties = dataset.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise _corrupt(path, where, "contiguous layout", "a chunked, compact or virtual one")
    if properties.get_nfilters() or properties.get_external_count():
        raise _corrupt(path, where, "plain bytes in the file", "filters or external storage")
    dtype = dataset.dtype
    if dtype.str not in {np.dtype(code).newbyteorder("<").str for code in DTYPES}:
        raise _corrupt(path, where, f"dtype among {sorted(DTYPES)}, little-endian", str(dtype))
    offset, checksum = dataset.id.get_offset(), _checksum(dataset)
    if dataset.shape is None or offset is None or checksum is None:
        raise _corrupt(path, where, "data and an integer attribute `crc32`", "one missing")
    extent = Extent(offset, dataset.shape, dtype, checksum)
    if extent.nbytes < 1 or offset + extent.nbytes > size:
        expected = f"data inside the file's {size} bytes"
        found = f"{dtype} of shape {extent.shape} from byte {offset}"
        raise _corrupt(path, where, expected, found)
    return extent


def _checksum(dataset: h5py.Dataset) -> int | None:
    """The attribute `crc32`, None if there is none that is an integer."""
    if "crc32" not in dataset.attrs:
        return None
    attribute = dataset.attrs.get_id("crc32")
    is_integer = isinstance(attribute.get_type(), h5py.h5t.TypeIntegerID)
    return int(dataset.attrs["crc32"]) if is_integer and attribute.shape == () else None


def _corrupt(path: str, where: str, expected: str, found: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path}: {where} must have {expected}, found {found}. "
        "The file is damaged; restore a copy or capture again."
    )

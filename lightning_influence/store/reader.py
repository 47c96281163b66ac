"""Reading a finished file of captured gradients. `store.schema` describes the file.

h5py parses the structure once and is closed; all data is then read through one read-only memory
map, which is safe across forks and keeps this file even if a new run replaces it at its path.
"""

import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import h5py
import numpy as np

from lightning_influence.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    NotAStoreError,
    StoreError,
    StoreNotFoundError,
)
from lightning_influence.store.checks import Extent, Structure, has_segments, read_structures
from lightning_influence.store.pages import release

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_Value = TypeVar("_Value")


class StoreReader:
    """Opens and checks a finished file, and reads one of its segments.

    It can be pickled; it then opens the file at `path` again.

    Args:
        path: the file.
        segment: number of the segment to read; None for the one captured last.

    Attributes:
        path: the file.
        segments: numbers of all segments in the file, ascending.
        number: of the segment that this reader reads, as all that follows.
        attributes: root attributes of the segment, plain bool, int, float and str.
        num_examples: N, the length of the dataset.
        store_id: what tells this run's file from others.
        layers: names of the layers.

    Raises:
        StoreNotFoundError: if there is no file.
        NotAStoreError: if it is not HDF5 or not ours.
        SchemaVersionError: if it is of another schema.
        IncompleteStoreError: if it was never finished.
        CorruptStoreError: if it is damaged.
        StoreError: if it may not be read.
        ValueError: if it has no such segment.
    """

    def __init__(self, path: str | os.PathLike[str], segment: int | None = None) -> None:
        self.path = Path(path)
        self._bytes, (root, *earlier) = _open(self.path)
        self._structures = {structure.number: structure for structure in (root, *earlier)}
        self.segments = tuple(sorted(self._structures))
        for structure in self._structures.values():
            for name, extent in structure.columns.items():
                self._verify(f"{structure.where}/rows/{name}", extent)
            for name, extent in structure.documents.items():
                self._verify(f"{structure.where}/documents/{name}", extent)
        self._select(root.number if segment is None else segment)
        self._asked = segment

    def __reduce__(self) -> tuple[type["StoreReader"], tuple[Path, int | None]]:
        return StoreReader, (self.path, self._asked)

    def segment(self, number: int) -> "StoreReader":
        """A reader of another segment; it shares the open file.

        Raises:
            ValueError: if there is no such segment.
        """
        view = object.__new__(type(self))  # `copy.copy` would go by `__reduce__` and open the file again
        view.__dict__.update(self.__dict__)
        view._select(number)
        view._asked = number
        return view

    def document(self, name: str) -> Any:
        """The JSON document of that name.

        Raises:
            ValueError: if there is none.
            CorruptStoreError: if it is not JSON.
        """
        extent = _look_up(self._structure.documents, name, "document", self.path)
        try:
            return json.loads(self._map(extent).tobytes())
        except (ValueError, RecursionError) as err:
            where = f"{self._structure.where}/documents/{name}"
            raise CorruptStoreError(f"{self.path}: {where} must be JSON: {err}. Capture again.") from err

    def column(self, name: str) -> np.ndarray:
        """A copy of one column, shape [N].

        Files older than `occurrences` trained on every written example once.

        Raises:
            ValueError: if there is none.
        """
        if name == "occurrences" and not has_segments(self.attributes):
            return self.column("written").astype(np.int32)
        mapped = self._map(_look_up(self._structure.columns, name, "column", self.path))
        copied = np.array(mapped)
        release(mapped)
        return copied

    def factors(self, layer: str) -> dict[str, np.ndarray]:
        """Copies of one layer's factors, by name, of any shape.

        Raises:
            ValueError: if there is no such layer.
            CorruptStoreError: if a checksum differs.
        """
        extents = _look_up(self._structure.factors, layer, "layer", self.path)
        for name, extent in extents.items():
            self._verify(f"{self._structure.where}/layers/{layer}/factors/{name}", extent)
        return {name: np.array(self._map(extent)) for name, extent in extents.items()}

    def rows(self, layer: str) -> dict[str, np.memmap]:
        """One layer's row arrays, by name: read-only maps of shape [N, ...], not checked.

        Raises:
            ValueError: if there is no such layer.
        """
        extents = _look_up(self._structure.rows, layer, "layer", self.path)
        return {name: self._map(extent) for name, extent in extents.items()}

    def verify_rows(self) -> None:
        """Compare the checksums of all row arrays of all segments.

        This reads the whole file, so opening does not do it: call it once after copying a file.

        Raises:
            CorruptStoreError: if one differs.
        """
        for structure in self._structures.values():
            for layer, extents in structure.rows.items():
                for name, extent in extents.items():
                    self._verify(f"{structure.where}/layers/{layer}/rows/{name}", extent)

    def datasets(self) -> Iterator[tuple[str, np.memmap, int]]:
        """Every dataset of the segment: name within it, read-only map, claimed checksum; not checked."""
        structure = self._structure
        groups = {"rows": structure.columns, "documents": structure.documents}
        groups |= {f"layers/{layer}/factors": extents for layer, extents in structure.factors.items()}
        groups |= {f"layers/{layer}/rows": extents for layer, extents in structure.rows.items()}
        for group, extents in groups.items():
            for name, extent in extents.items():
                yield f"{group}/{name}", self._map(extent), extent.crc32

    def _select(self, number: int) -> None:
        """Read this segment from now on."""
        if number not in self._structures:
            raise ValueError(f"no segment {number!r} in {self.path}; it has {[*self.segments]}.")
        self._structure = self._structures[number]
        self.number = self._structure.number
        self.attributes = dict(self._structure.attributes)
        self.num_examples = int(self.attributes["num_examples"])
        self.store_id = str(self.attributes["store_id"])
        self.layers = tuple(self._structure.rows)

    def _map(self, extent: Extent) -> np.memmap:
        part = self._bytes[extent.offset : extent.offset + extent.nbytes]
        return cast(np.memmap, part.view(extent.dtype).reshape(extent.shape))

    def _verify(self, where: str, extent: Extent) -> None:
        part = self._bytes[extent.offset : extent.offset + extent.nbytes]
        found = zlib.crc32(part.data)
        release(part)
        if found != extent.crc32:
            raise CorruptStoreError(
                f"{self.path}: {where} has checksum {found:08x}, expected {extent.crc32:08x}. "
                "The file is damaged; restore a copy or capture again."
            )


def _open(path: Path) -> tuple[np.memmap, tuple[Structure, ...]]:
    """Map a file and read its segments' structures, the root's first."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise NotAStoreError(f"{path} is a directory or device; pass a file.")
        # Both views are of one open file, so a run that replaces it meanwhile cannot mix them.
        with path.open("rb") as handle:
            if handle.read(len(_SIGNATURE)) != _SIGNATURE:
                raise NotAStoreError(
                    f"{path} is not HDF5: it must start with {_SIGNATURE!r}; pass a file that this package wrote."
                )
            mapped = np.memmap(handle, dtype=np.uint8, mode="r")
            return mapped, _parse(handle, path, mapped.size)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise StoreNotFoundError(f"there is no file {path}.{_partial_hint(path)}") from err
    except OSError as err:
        raise StoreError(f"{path} cannot be read: {err.strerror}; check its permissions.") from err


def _parse(handle: Any, path: Path, size: int) -> tuple[Structure, ...]:
    """Read the structures, with all that h5py may raise over garbage turned into our errors."""
    try:
        with h5py.File(handle, "r") as file:
            return read_structures(file, str(path), size)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as err:
        if path.suffix == ".partial":
            raise IncompleteStoreError(
                f"{path} was never finished, and HDF5 cannot open it ({err}). Capture again."
            ) from err
        raise CorruptStoreError(
            f"{path} is truncated or damaged: HDF5 reports {err}. Restore a copy or capture again."
        ) from err


def _partial_hint(path: Path) -> str:
    """Say if a run has left an unfinished file behind."""
    if not path.parent.is_dir():
        return f" Neither is there a directory {path.parent}."
    found = sorted(
        other.name
        for other in path.parent.iterdir()
        if other.name.startswith(f"{path.name}.") and other.suffix == ".partial"
    )
    if not found:
        return " Check the path, or capture gradients first."
    return f" A run that has not finished left {', '.join(found)}: wait for it, or capture again."


def _look_up(known: Mapping[str, _Value], name: str, what: str, path: Path) -> _Value:
    if name not in known:
        raise ValueError(f"no {what} {name!r} in {path}; it has {[*known]}.")
    return known[name]

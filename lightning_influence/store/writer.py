"""Writing a file of captured gradients, row by row, in the order in which training sees them.

h5py lays the file out and closes it; rows are then written through a memory map, which is fast for
shuffled rows and safe across forked data loader workers. `store.schema` describes the file.
"""

import math
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_influence.errors import StoreError
from lightning_influence.store import disk, layout
from lightning_influence.store.encoding import (
    check_indices,
    check_rows,
    encode_attribute,
    encode_document,
    encode_factor,
)
from lightning_influence.store.reader import StoreReader
from lightning_influence.store.schema import COLUMNS, MAX_SEGMENT, ArraySpec, check_name, stored_dtype


class StoreWriter:
    """Writes one segment of one run's file: `create`, then `write_rows` any number of times, then `finish`.

    Until `finish` returns, everything is in `partial_path`; a file already at `path` stays as it
    is and is then replaced in one step.

    Several processes of one machine may write one file together. Each has a writer made with the same arguments:
    one calls `create`; when it is done, the others call `join`, write and `leave`; then the first calls
    `finish`. Order them by barriers, and leave each row to one process.

    Args:
        path: where the finished file will be. Nothing is written before `create`.
        num_examples: N, the length of the dataset.
        store_id: what tells this run's file from others, of at least 8 letters, digits, - or _.
        segment: number of the segment to be written, such as the epoch; it will be the file's root.
        after: a finished file of this run, usually the one at `path`, whose segments of smaller numbers the
            new file will hold too (later ones are of a past that a resumed run has left). `create` copies
            them, so k segments one by one copy the first k - 1 times.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_examples: int,
        store_id: str,
        segment: int = 0,
        after: str | os.PathLike[str] | None = None,
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {num_examples}.")
        if len(store_id) < 8 or not store_id.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                "`store_id` must be at least 8 letters, digits, '-' or '_', "
                f"got {store_id!r}; use uuid.uuid4().hex."
            )
        if isinstance(segment, bool) or not isinstance(segment, int) or not 0 <= segment <= MAX_SEGMENT:
            raise ValueError(f"`segment` must be an integer from 0 to {MAX_SEGMENT}, got {segment!r}.")
        self.path = Path(path)
        self.num_examples = num_examples
        self.store_id = store_id
        self.segment = segment
        self.after = None if after is None else Path(after)
        # The id is in the name, so that two runs never truncate each other's mapped file.
        self.partial_path = self.path.with_name(f"{self.path.name}.{store_id[:8]}.partial")
        self._is_creator = False  # of what is at `partial_path`; others only join
        self._file: np.memmap | None = None  # the partial file's bytes, while it is being written
        self._rows: dict[str, np.ndarray] = {}  # parts of it, by the dataset's name in the file
        self._layers: dict[str, tuple[str, ...]] = {}  # the names of each layer's row arrays

    def create(self, layers: Mapping[str, Mapping[str, ArraySpec]]) -> None:
        """Lay the file out, reserve all its disk blocks, and copy the segments of `after`.

        Args:
            layers: by layer name, by array name: one row's shape and dtype.

        Raises:
            StoreError: if there is no room or no permission, if it was called before, or if `after`
                is unfinished, damaged or of another run.
            ValueError: if a name cannot be stored.
        """
        self._check_new()
        arrays = self._arrays(layers)
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a directory; `path` must name a file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"{self.path.parent} cannot be made a directory: {err}") from err
        earlier = self._earlier_segments()
        self._is_creator = True
        try:
            offsets = layout.create_file(
                self.partial_path, self._identity(), layers=layers, arrays=arrays, earlier=earlier
            )
            self._map(offsets, arrays)
        except (OSError, RuntimeError, KeyError) as err:
            self.discard()
            raise StoreError(f"{self.partial_path} cannot be created: {err}") from err
        except BaseException:
            self.discard()
            raise
        for name, (_, unknown) in COLUMNS.items():
            self._rows[f"rows/{name}"][:] = unknown
        self._layers = {layer: tuple(named) for layer, named in layers.items()}

    def join(self, layers: Mapping[str, Mapping[str, ArraySpec]]) -> None:
        """Write to the file that another process of this machine has created; ends with `leave`.

        Rows go into the same memory, so nothing is lost or joined later. A process that dies leaves
        the rows that it has not written with `written` = 0.

        Args:
            layers: as the other process gave to `create`, which must have returned.

        Raises:
            StoreError: if there is no such file, if it is of another run, segment or layout, or if
                this writer is in use.
        """
        self._check_new()
        arrays = self._arrays(layers)
        try:
            self._map(layout.find_arrays(self.partial_path, self._identity(), arrays=arrays), arrays)
        except (OSError, RuntimeError, KeyError) as err:
            self._unmap()
            raise StoreError(
                f"{self.partial_path} cannot be joined: {err}. One process must have called `create` "
                "before, on the same machine."
            ) from err
        self._layers = {layer: tuple(named) for layer, named in layers.items()}

    def take_over(self, layers: Mapping[str, Mapping[str, ArraySpec]], unfinished: str) -> None:
        """Go on with the file that an earlier run of the same id has left, under a name that is this run's own.

        Args:
            layers: as that run gave to `create`.
            unfinished: the name that its `partial_path` had.

        Raises:
            StoreError: if it is gone, or as for `join`.
        """
        self._check_new()
        claimed = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            self.path.with_name(unfinished).replace(claimed)
        except OSError as err:
            raise StoreError(f"{unfinished} cannot be taken over: {err}; capture the epoch anew.") from err
        self.partial_path = claimed
        self.join(layers)
        self._is_creator = True

    def suspend(self) -> None:
        """End, and leave the unfinished file for a resumed run to take over."""
        if self._file is not None:
            self._file.flush()
        self._unmap()
        self._is_creator = False

    def forget_rows(self, forgotten: np.ndarray) -> None:
        """Mark some rows as never written.

        Args:
            forgotten: a mask of shape [N].
        """
        self._check_open()
        for name, (_, unknown) in COLUMNS.items():
            self._rows[f"rows/{name}"][forgotten] = unknown
        for layer, arrays in self._layers.items():
            for name in arrays:
                self._rows[f"layers/{layer}/rows/{name}"][forgotten] = 0

    def leave(self) -> None:
        """End a joined writer's part; the file stays for its creator to finish.

        Raises:
            StoreError: if this writer has not joined.
        """
        file = self._check_open()
        if self._is_creator:
            raise StoreError(f"{self.partial_path} was created by this writer: `finish` or `discard` it.")
        file.flush()
        self._unmap()

    def write_rows(
        self,
        indices: np.ndarray,
        *,
        columns: Mapping[str, np.ndarray],
        arrays: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Write some examples' rows, mark them as written and count their occurrences.

        What is not given keeps what it had. A row written before is overwritten; of an index that
        occurs twice in `indices` the last one counts, and its `occurrences` grow by two. All is
        checked before anything is written. No two processes may write the same row.

        Args:
            indices: dataset indices of the rows, any order, integers of shape [n].
            columns: by column name ("valid", "loss", ...), shape [n]. `occurrences` given here replace
                the count: pass them where rows are written that were not just trained on.
            arrays: by layer, by array name: shape [n, ...], of exactly the dtype in its spec.

        Raises:
            StoreError: if the file is not open for writing.
            ValueError: if an index, name, shape or dtype does not fit.
        """
        self._check_open()
        check_indices(indices := np.asarray(indices), self.num_examples)
        if "written" in columns:
            raise ValueError("column 'written' is set by `write_rows`; do not pass it.")
        values = {f"rows/{name}": np.asarray(column) for name, column in columns.items()}
        for layer, named in arrays.items():
            values |= {f"layers/{layer}/rows/{name}": array for name, array in named.items()}
        for name, value in values.items():
            if name not in self._rows:
                raise ValueError(f"no dataset {name!r} in {self.partial_path}; has {[*self._rows]}.")
            check_rows(name, value, (len(indices), *self._rows[name].shape[1:]), self._rows[name].dtype)

        # NumPy promises no order among repeated indices, so repeats are dropped here.
        unique, from_end, counts = np.unique(indices[::-1], return_index=True, return_counts=True)
        if len(unique) < len(indices):
            values = {name: value[len(indices) - 1 - from_end] for name, value in values.items()}
            indices = unique
        self._rows["rows/written"][indices] = 0  # a process that dies here leaves no row half old, half new
        for name, value in values.items():
            self._rows[name][indices] = value
        if "occurrences" not in columns:
            self._rows["rows/occurrences"][indices] += counts
        self._rows["rows/written"][indices] = 1

    def read_rows(self, layer: str, indices: slice | np.ndarray, *, copies: bool = True) -> dict[str, np.ndarray]:
        """Copies of some of one layer's rows, by array name, each of shape [n, ...].

        Args:
            layer: its name.
            indices: dataset indices, a slice or integers of shape [n].
            copies: False gives of a slice the file's own memory, which the caller must not change.

        Raises:
            StoreError: if the file is not open for writing.
            ValueError: if there is no such layer or no such rows.
        """
        self._check_open()
        if layer not in self._layers:
            raise ValueError(f"no layer {layer!r} in {self.partial_path}; it has {[*self._layers]}.")
        if not isinstance(indices, slice):
            check_indices(indices, self.num_examples)
        rows = {name: self._rows[f"layers/{layer}/rows/{name}"][indices] for name in self._layers[layer]}
        return {name: array.copy() for name, array in rows.items()} if copies else rows

    def read_column(self, name: str) -> np.ndarray:
        """A copy of one column, shape [N].

        Raises:
            StoreError: if the file is not open for writing.
            ValueError: if there is no such column.
        """
        self._check_open()
        if name not in COLUMNS:
            raise ValueError(f"no column {name!r}; there are {[*COLUMNS]}.")
        return np.array(self._rows[f"rows/{name}"])

    def finish(
        self,
        *,
        attributes: Mapping[str, bool | int | float | str],
        documents: Mapping[str, object],
        factors: Mapping[str, Mapping[str, np.ndarray]],
    ) -> Path:
        """Add what is known only now, mark the file complete and move it to `path`.

        Reads the whole file once for its checksums. A ValueError leaves everything as it was; after
        a StoreError only `discard` is left to do. Neither touches a file already at `path`.

        Args:
            attributes: root attributes.
            documents: by name, what `json.dumps` takes.
            factors: by layer, by name: small arrays of any shape.

        Returns:
            `path`.

        Raises:
            StoreError: if the file is not open for writing or was only joined, or there is no room.
            ValueError: if an attribute, document or factor cannot be stored.
        """
        self._check_open()
        if not self._is_creator:
            raise StoreError(f"{self.partial_path} was joined: its creator finishes it; `leave` it.")
        encoded = {name: encode_attribute(name, value) for name, value in attributes.items()}
        additions = {}
        for name, document in documents.items():
            additions[f"documents/{name}"] = encode_document(name, document)
        for layer, named in factors.items():
            if layer not in self._layers:
                raise ValueError(f"factors for {layer!r}, which is none of {[*self._layers]}.")
            for name, array in named.items():
                additions[f"layers/{layer}/factors/{name}"] = encode_factor(layer, name, array)

        try:
            wanted = self.partial_path.stat().st_size + layout.META_BLOCK_BYTES + 16 * layout.HEADER_BYTES
            for name, value in (encoded | additions).items():
                wanted += value.nbytes + len(name) + layout.HEADER_BYTES
            disk.reserve(self.partial_path, wanted)
            self._add(encoded, additions)
            self._unmap()  # Windows replaces no file that is mapped
            disk.replace_durably(self.partial_path, self.path)
        except (OSError, RuntimeError, KeyError) as err:
            self._unmap()
            raise StoreError(
                f"{self.partial_path} cannot be finished: {err}. Free what is in the way and "
                "capture again; `discard` deletes the unfinished file."
            ) from err
        self._is_creator = False
        return self.path

    def discard(self) -> None:
        """Delete the unfinished file if this writer has created one; `path` is never touched."""
        self._unmap()
        if self._is_creator:
            self.partial_path.unlink(missing_ok=True)
        self._is_creator = False

    def _identity(self) -> dict[str, np.ndarray]:
        return layout.identity(num_examples=self.num_examples, store_id=self.store_id, segment=self.segment)

    def _arrays(self, layers: Mapping[str, Mapping[str, ArraySpec]]) -> dict[str, layout.Array]:
        """By full name in the file, shapes and dtypes of all columns and row arrays."""
        specs = {f"rows/{name}": ArraySpec((), dtype) for name, (dtype, _) in COLUMNS.items()}
        for layer, arrays in layers.items():
            check_name("layer", layer)
            for name, spec in arrays.items():
                check_name(f"row array of layer {layer!r}:", name)
                specs[f"layers/{layer}/rows/{name}"] = spec
        return {name: ((self.num_examples, *spec.shape), stored_dtype(spec.dtype)) for name, spec in specs.items()}

    def _earlier_segments(self) -> list[StoreReader]:
        """The segments of `after` that the new file keeps."""
        if self.after is None:
            return []
        reader = StoreReader(self.after)
        found, expected = (reader.store_id, reader.num_examples), (self.store_id, self.num_examples)
        if found != expected:
            raise StoreError(
                f"`after` must be a file of the same run and dataset: {self.after} has the id and "
                f"`num_examples` {found}, expected {expected}; choose another path or pass no `after`."
            )
        return [reader.segment(number) for number in reader.segments if number < self.segment]

    def _map(self, offsets: Mapping[str, int], arrays: Mapping[str, layout.Array]) -> None:
        """Map the partial file, and of it each array."""
        self._file = np.memmap(self.partial_path, dtype=np.uint8, mode="r+")
        plain = np.asarray(self._file)  # whose parts are had faster
        for name, (shape, dtype) in arrays.items():
            part = plain[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize]
            self._rows[name] = part.view(dtype).reshape(shape)

    def _add(self, attributes: Mapping[str, np.ndarray], additions: Mapping[str, np.ndarray]) -> None:
        """Write attributes, documents, factors and all checksums; set `complete` last."""
        self._check_open().flush()
        with layout.open_for_writing(self.partial_path) as file:
            for name, rows in self._rows.items():
                file[name].attrs.modify("crc32", np.uint32(zlib.crc32(rows.data)))
            for name, array in additions.items():
                layout.write_dataset(file, name, array, zlib.crc32(array.data))
            for name, value in attributes.items():
                file.attrs[name] = value
            file.flush()  # or a run killed just now might leave the flag without the rest
            file.attrs.modify("complete", True)

    def _unmap(self) -> None:
        self._file, self._rows = None, {}

    def _check_new(self) -> None:
        if self._file is not None:
            raise StoreError(f"{self.partial_path} is open already; call `create` or `join` once.")

    def _check_open(self) -> np.memmap:
        """The bytes of the partial file, if it can be written to."""
        if self._file is None:
            raise StoreError(
                f"{self.partial_path} is not open for writing: `create` or `join` comes first, "
                "and nothing comes after `finish`, `leave` or `discard`."
            )
        return self._file

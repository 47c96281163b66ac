"""Writing a file of captured gradients, row by row, in the order in which training sees them.

h5py lays the file out and closes it; rows are then written through a memory map, which is fast for
shuffled rows and safe across forked data loader workers. `store.schema` describes the file.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from lightning_influence.errors import StoreError
from lightning_influence.store import disk, layout
from lightning_influence.store.encoding import (
    encode_attribute,
    encode_document,
    encode_factor,
)
from lightning_influence.store.schema import (
    COLUMNS,
    ArraySpec,
    check_name,
    stored_dtype,
)


class StoreWriter:
    """Writes one run's file: `create`, then `write_rows` any number of times, then `finish`.

    Until `finish` returns, everything is in `partial_path`; a file already at `path` stays as it
    is and is then replaced in one step. Use one writer a process.

    Args:
        path: where the finished file will be. Nothing is written before `create`.
        num_examples: N, the length of the dataset.
        store_id: what tells this run's file from others, of at least 8 letters, digits, - or _.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_examples: int, store_id: str) -> None:
        if num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {num_examples}.")
        if len(store_id) < 8 or not store_id.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                "`store_id` must be at least 8 letters, digits, '-' or '_', "
                f"got {store_id!r}; use uuid.uuid4().hex."
            )
        self.path = Path(path)
        self.num_examples = num_examples
        self.store_id = store_id
        # The id is in the name, so that two runs never truncate each other's mapped file.
        self.partial_path = self.path.with_name(f"{self.path.name}.{store_id[:8]}.partial")
        self._file: np.memmap | None = None  # the partial file's bytes, while it is being written
        self._rows: dict[str, np.ndarray] = {}  # parts of it, by the dataset's name in the file
        self._layers: dict[str, tuple[str, ...]] = {}  # the names of each layer's row arrays

    def create(self, layers: Mapping[str, Mapping[str, ArraySpec]]) -> None:
        """Lay the file out and reserve all its disk blocks.

        Args:
            layers: by layer name, by array name: one row's shape and dtype.

        Raises:
            StoreError: if there is no room or no permission, or if it was called before.
            ValueError: if a name cannot be stored.
        """
        if self._file is not None:
            raise StoreError(f"{self.partial_path} was created before; call `create` once.")
        specs = {f"rows/{name}": ArraySpec((), dtype) for name, (dtype, _) in COLUMNS.items()}
        for layer, arrays in layers.items():
            check_name("layer", layer)
            for name, spec in arrays.items():
                check_name(f"row array of layer {layer!r}:", name)
                specs[f"layers/{layer}/rows/{name}"] = spec
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a directory; `path` must name a file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"{self.path.parent} cannot be made a directory: {err}") from err
        try:
            offsets = layout.create_file(
                self.partial_path,
                num_examples=self.num_examples,
                store_id=self.store_id,
                layers=layers,
                specs=specs,
            )
            self._file = np.memmap(self.partial_path, dtype=np.uint8, mode="r+")
            for name, spec in specs.items():
                stop = offsets[name] + self.num_examples * spec.nbytes
                flat = self._file[offsets[name] : stop].view(stored_dtype(spec.dtype))
                self._rows[name] = flat.reshape(self.num_examples, *spec.shape)
        except (OSError, RuntimeError, KeyError) as err:
            self.discard()
            raise StoreError(f"{self.partial_path} cannot be created: {err}") from err
        except BaseException:
            self.discard()
            raise
        for name, (_, unknown) in COLUMNS.items():
            self._rows[f"rows/{name}"][:] = unknown
        self._layers = {layer: tuple(arrays) for layer, arrays in layers.items()}

    def write_rows(
        self,
        indices: np.ndarray,
        *,
        columns: Mapping[str, np.ndarray],
        arrays: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Write some examples' rows and mark them as written.

        What is not given keeps what it had. A row written before is overwritten; of an index that
        occurs twice in `indices` the last one counts. All is checked before anything is written.

        Args:
            indices: dataset indices of the rows, any order, integers of shape [n].
            columns: by column name ("valid", "loss", ...), shape [n].
            arrays: by layer, by array name: shape [n, ...], of exactly the dtype in its spec.

        Raises:
            StoreError: if the file is not open for writing.
            ValueError: if an index, name, shape or dtype does not fit.
        """
        self._check_open()
        indices = np.asarray(indices)
        self._check_indices(indices)
        if "written" in columns:
            raise ValueError("column 'written' is set by `write_rows`; do not pass it.")
        values = {f"rows/{name}": np.asarray(column) for name, column in columns.items()}
        for layer, named in arrays.items():
            values |= {f"layers/{layer}/rows/{name}": array for name, array in named.items()}
        for name, value in values.items():
            self._check_values(name, value, len(indices))

        # NumPy promises no order among repeated indices, so repeats are dropped here.
        unique, from_end = np.unique(indices[::-1], return_index=True)
        last = len(indices) - 1 - from_end
        for name, value in values.items():
            self._rows[name][unique] = value[last]
        self._rows["rows/written"][unique] = 1

    def read_rows(self, layer: str, indices: slice | np.ndarray) -> dict[str, np.ndarray]:
        """Copies of some of one layer's rows, by array name, each of shape [n, ...].

        Args:
            layer: its name.
            indices: dataset indices, a slice or integers of shape [n].

        Raises:
            StoreError: if the file is not open for writing.
            ValueError: if there is no such layer or no such rows.
        """
        self._check_open()
        if layer not in self._layers:
            raise ValueError(f"no layer {layer!r} in {self.partial_path}; it has {[*self._layers]}.")
        if not isinstance(indices, slice):
            self._check_indices(indices)
        rows = {name: self._rows[f"layers/{layer}/rows/{name}"] for name in self._layers[layer]}
        return {name: np.array(array[indices]) for name, array in rows.items()}

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
            StoreError: if the file is not open for writing, or there is no room.
            ValueError: if an attribute, document or factor cannot be stored.
        """
        self._check_open()
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
        return self.path

    def discard(self) -> None:
        """Delete the unfinished file, if there is one; `path` is never touched."""
        self._unmap()
        self.partial_path.unlink(missing_ok=True)

    def _add(self, attributes: Mapping[str, np.ndarray], additions: Mapping[str, np.ndarray]) -> None:
        """Write attributes, documents, factors and all checksums; set `complete` last."""
        self._check_open().flush()
        with layout.open_for_writing(self.partial_path) as file:
            for name, rows in self._rows.items():
                file[name].attrs.modify("crc32", np.uint32(zlib.crc32(rows.data)))
            for name, array in additions.items():
                dataset = layout.create_dataset(file, name, array.shape, array.dtype, zlib.crc32(array.data))
                dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, array)  # a fifth of the time of `[...] =`
            for name, value in attributes.items():
                file.attrs[name] = value
            file.flush()  # or a run killed just now might leave the flag without the rest
            file.attrs.modify("complete", True)

    def _unmap(self) -> None:
        self._file, self._rows = None, {}

    def _check_open(self) -> np.memmap:
        """The bytes of the partial file, if it can be written to."""
        if self._file is None:
            raise StoreError(
                f"{self.partial_path} is not open for writing: `create` comes first, "
                "and nothing comes after `finish` or `discard`."
            )
        return self._file

    def _check_indices(self, indices: np.ndarray) -> None:
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise ValueError(f"`indices` must be integers of shape [n], got {indices.dtype} {indices.shape}.")
        outside = indices[(indices < 0) | (indices >= self.num_examples)]
        if outside.size:
            raise ValueError(
                f"`indices` must lie in 0..{self.num_examples - 1}, got {outside[:5].tolist()}; "
                "`num_examples` must be the length of the dataset."
            )

    def _check_values(self, name: str, value: np.ndarray, n: int) -> None:
        """Refuse what the file has no place for: `value` must be [n, ...] for dataset `name`."""
        if name not in self._rows:
            raise ValueError(f"no dataset {name!r} in {self.partial_path}; has {[*self._rows]}.")
        rows = self._rows[name]
        expected = (n, *rows.shape[1:])
        # A column converts between kinds of integer or float; a codec gives what it declared.
        is_column = name.startswith("rows/")
        fits = np.can_cast(value.dtype, rows.dtype, "same_kind" if is_column else "equiv")
        if value.shape != expected or not fits:
            raise ValueError(
                f"{name!r} must be {rows.dtype} of shape {expected}, got {value.dtype} of shape {value.shape}."
            )

"""Answers and stored columns as tables, and tables as files.

A table is a dict from column names to arrays of one length, which `pandas.DataFrame` and `pyarrow.table` take as
it is. What a file does not know is -1 in `label` and `step` and NaN in `loss` and `learning_rate`
(`store.schema`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.store import COLUMNS, StoreReader

Columns = Mapping[str, np.ndarray]
Watch = Callable[[Iterable[int]], Iterable[int]]  # such as a progress bar
ROWS_AT_ONCE = 4096  # of a text file
UNKNOWN_LABEL = -1


def example_columns(store: StoreReader) -> dict[str, np.ndarray]:
    """The index and every column of all examples, [N] each; a value of an unwritten row means nothing."""
    return {"index": np.arange(store.num_examples)} | {name: store.column(name) for name in COLUMNS}


def known_of_examples(store: StoreReader) -> dict[str, np.ndarray]:
    """`label`, `loss` and `step` of all examples, [N] each."""
    return {name: store.column(name) for name in ("label", "loss", "step")}


def example_labels(store: StoreReader) -> np.ndarray:
    """Labels [N]; -1 where there is no row, too."""
    return np.where(store.column("written").astype(bool), store.column("label"), UNKNOWN_LABEL)


def ranked_columns(answers: Iterable[tuple[Tensor, Tensor]], known: Columns) -> dict[str, np.ndarray]:
    """The best examples of all queries below each other, one row for each pair of them.

    Args:
        answers: dataset indices and scores of some queries at a time, [q, k] each, best first.
        known: of all examples, [N] each.

    Returns:
        `query` (counted from 0 over all answers), `rank` (from 1), `index`, `score`, and what is known.
    """
    parts = [(indices.cpu().numpy(), scores.float().cpu().numpy()) for indices, scores in answers]
    index = _joined([indices.reshape(-1) for indices, _ in parts], np.int64)
    ks = _joined([np.full(len(indices), indices.shape[1]) for indices, _ in parts], np.int64)
    return {
        "query": np.repeat(np.arange(len(ks)), ks),
        "rank": np.arange(len(index)) - np.repeat(ks.cumsum() - ks, ks) + 1,
        "index": index,
        "score": _joined([scores.reshape(-1) for _, scores in parts], np.float32),
        **{name: column[index] for name, column in known.items()},
    }


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def score_columns(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [q, N] as a column for each query: `score_0` and so on."""
    return {f"score_{number}": row for number, row in enumerate(scores)}


def check_table_path(path: Path, argument: str) -> None:
    """Refuse a path that no table can be written to.

    Args:
        path: as in `write_table`.
        argument: how the user gave it, for messages.

    Raises:
        ValueError: if its suffix is not known, or there is no such folder.
        QueryError: if what writes it is not installed.
    """
    if path.suffix not in WRITERS:
        *most, last = WRITERS
        raise ValueError(f"{argument} must end in {', '.join(most)} or {last}, got {str(path)!r}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{argument} {path}: there is no folder {path.absolute().parent}.")
    if path.suffix in _BY_ARROW:
        _arrow(path)


def write_table(path: Path, columns: Columns, watch: Watch = iter) -> None:
    """Write a table to .csv, .npz, .parquet or .arrow (Arrow's file format, Feather 2), by the path's suffix.

    Args:
        path: the file, replaced if it is there.
        columns: of one length.
        watch: for what is written step by step.

    Raises:
        ValueError, QueryError: as `check_table_path`.
    """
    check_table_path(path, "a table's path")
    WRITERS[path.suffix](path, columns, watch)


def _write_npz(path: Path, columns: Columns, watch: Watch) -> None:
    arrays: dict[str, Any] = dict(columns)
    np.savez(path, **arrays)


def _write_csv(path: Path, columns: Columns, watch: Watch) -> None:
    length = max(map(len, columns.values()), default=0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for start in watch(range(0, length, ROWS_AT_ONCE)):
            part = (column[start : start + ROWS_AT_ONCE].tolist() for column in columns.values())
            writer.writerows(zip(*part, strict=True))


def _write_parquet(path: Path, columns: Columns, watch: Watch) -> None:
    from pyarrow import parquet

    parquet.write_table(_arrow(path).table(dict(columns)), path)


def _write_arrow(path: Path, columns: Columns, watch: Watch) -> None:
    arrow = _arrow(path)
    table = arrow.table(dict(columns))
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise QueryError(
            f"{path}: writing {path.suffix} needs pyarrow; `pip install pyarrow`, or write .csv or .npz."
        ) from error
    return pyarrow


_BY_ARROW = (".parquet", ".arrow")
WRITERS = {".csv": _write_csv, ".npz": _write_npz, ".parquet": _write_parquet, ".arrow": _write_arrow}

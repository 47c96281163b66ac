"""Examples as records, records as text, and all examples as a table in a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.functional.ranking import top_k
from lightning_influence.store import COLUMNS, StoreReader

Columns = Mapping[str, np.ndarray]
_INTEGER_UNKNOWN = -1  # labels and steps, see `store.schema`


def columns(store: StoreReader) -> dict[str, np.ndarray]:
    """The index and every column of all examples, [N] each; a value of an unwritten row means nothing."""
    return {"index": np.arange(store.num_examples)} | {name: store.column(name) for name in COLUMNS}


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, best first, at most as many as are not NaN."""
    return top_k(values[None], min(count, int((~values.isnan()).sum())))[1][0]


def check_scores(query: int, scores: Tensor) -> None:
    """Refuse scores of which none is finite.

    Args:
        query: its number.
        scores: its own, of examples; those without a row are NaN.

    Raises:
        QueryError: naming the query.
    """
    if not bool(scores.isfinite().any()):
        raise QueryError(
            f"query {query}: its scores are not finite; is there a NaN in it, or in what the model makes of it?"
        )


def records(store: StoreReader, indices: Tensor, **values: Tensor) -> list[dict[str, Any]]:
    """Examples, best first, with what is known of each; None stands for what is not.

    Args:
        store: for the columns.
        indices: dataset indices [k].
        values: by name, [k] each.
    """
    known = {name: store.column(name) for name in ("label", "loss", "step")}
    return [
        {
            "rank": rank,
            "index": index,
            **{name: float(column[rank - 1]) for name, column in values.items()},
            **{name: _known(column[index]) for name, column in known.items()},
        }
        for rank, index in enumerate(indices.tolist(), start=1)
    ]


def _known(value: np.generic) -> int | float | None:
    number = value.item()
    return None if (number == _INTEGER_UNKNOWN and isinstance(number, int)) or math.isnan(number) else number


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Records below their names; text to the left, numbers to the right."""
    if not rows:
        return "(none)"
    cells = [[*rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [isinstance(value, str) for value in rows[0].values()]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_TITLES = {"top": "largest scores (proponents)", "bottom": "smallest scores (opponents)"}


def queries_text(queries: Sequence[Mapping[str, Any]]) -> str:
    """Each query's tables."""
    return "\n\n".join(
        f"query {query['query']}: {title}\n{table(query[end])}"
        for query in queries
        for end, title in _TITLES.items()
        if end in query
    )


def writer_to(target: str, source: str) -> Callable[[Columns, Sequence[np.ndarray] | None], str]:
    """What writes a table of examples, by the target's suffix.

    Args:
        target: path to write.
        source: path of the file that is read.

    Raises:
        ValueError: if the suffix is neither .csv nor .npz, if there is no such folder, or if the target is the
            source.
    """
    path = Path(target)
    writers = {".csv": _write_csv, ".npz": _write_npz}
    if path.suffix not in writers:
        raise ValueError(f"`--to` must end in .csv or .npz, got {target!r}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"`--to {target}`: there is no folder {path.absolute().parent}.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"`--to {target}` is the file of gradients itself; name another.")

    def write(columns: Columns, scores: Sequence[np.ndarray] | None) -> str:
        joined = None if scores is None else np.stack(scores)
        writers[path.suffix](path, columns, joined)
        queries = "" if joined is None else f"; scores of {len(joined):,} quer{'y' if len(joined) == 1 else 'ies'}"
        return f"{path}: {len(columns['index']):,} examples, {', '.join(columns)}{queries}"

    return write


def _write_npz(path: Path, columns: Columns, scores: np.ndarray | None) -> None:
    arrays: dict[str, Any] = {**columns, **({} if scores is None else {"scores": scores})}
    np.savez(path, **arrays)


def _write_csv(path: Path, columns: Columns, scores: np.ndarray | None) -> None:
    added = {} if scores is None else {f"score_{q}": row for q, row in enumerate(scores)}
    everything = {**columns, **added}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(everything)
        writer.writerows(zip(*(column.tolist() for column in everything.values()), strict=True))


def plain(found: Any) -> Any:
    """The same with None for what is not a finite number, which JSON lacks."""
    if isinstance(found, Mapping):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found

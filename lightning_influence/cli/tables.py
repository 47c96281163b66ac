"""Examples as records, records as text, and all examples as a table in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence import exports
from lightning_influence.cli.progress import progress
from lightning_influence.errors import QueryError
from lightning_influence.exports import Columns
from lightning_influence.functional.ranking import top_k
from lightning_influence.store import StoreReader

_INTEGER_UNKNOWN = -1  # labels and steps, see `store.schema`


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
        ValueError: if the target is the source, or as `exports.check_table_path`.
        QueryError: as that.
    """
    path = Path(target)
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"`--to {target}` is the file of gradients itself; name another.")
    exports.check_table_path(path, "`--to`")

    def write(columns: Columns, scores: Sequence[np.ndarray] | None) -> str:
        joined = None if scores is None else np.stack(scores)
        added = {} if joined is None else exports.score_columns(joined)
        if path.suffix == ".npz" and joined is not None:
            added = {"scores": joined}
        exports.write_table(path, {**columns, **added}, watch=progress)
        queries = "" if joined is None else f"; scores of {len(joined):,} quer{'y' if len(joined) == 1 else 'ies'}"
        return f"{path}: {len(columns['index']):,} examples, {', '.join(columns)}{queries}"

    return write


def plain(found: Any) -> Any:
    """The same with None for what is not a finite number, which JSON lacks."""
    if isinstance(found, Mapping):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found

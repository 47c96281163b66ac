"""Is a file sound? Structure, checksums, counts, and whether each layer can be read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lightning_influence.cli.facts import counts_of, facts_of, megabytes
from lightning_influence.cli.progress import progress
from lightning_influence.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    InfluenceError,
    NotAStoreError,
    SchemaVersionError,
)
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader

_CHUNK = 1 << 24  # bytes between two steps of the progress bar


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        verdict: one line.
        problems: one line each; none if the file is sound.
    """

    verdict: str
    problems: list[str] = field(default_factory=list)


def check(path: str) -> Report:
    """Read all of a file.

    Args:
        path: of the file.

    Raises:
        StoreNotFoundError, StoreError: if there is none, or it may not be read.
    """
    try:
        store = StoreReader(path)
    except (NotAStoreError, SchemaVersionError, IncompleteStoreError, CorruptStoreError) as error:
        return Report(f"{path}: cannot be used", [str(error)])
    stores = [store.segment(number) for number in store.segments]
    datasets = [(each, *found) for each in stores for found in each.datasets()]
    problems = [*_checksum_problems(datasets)]
    for each in stores:
        problems += _count_problems(each)
    if not problems:
        problems += _content_problems(stores)
    if problems:
        return Report(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}; restore a copy or capture again",
            problems,
        )
    segments = f"{len(stores)} segment{'s' if len(stores) > 1 else ''}"
    return Report(
        f"{path}: sound; {segments}, {len(datasets)} datasets, {megabytes(Path(path).stat().st_size)}: checksums, "
        "counts and layers agree"
    )


def _checksum_problems(datasets: list[tuple[StoreReader, str, np.memmap, int]]) -> Iterator[str]:
    total = sum(array.nbytes for _, _, array, _ in datasets)
    with progress(None, total=total, unit="B", unit_scale=True) as bar:
        for store, name, array, claimed in datasets:
            data, found = array.reshape(-1).view(np.uint8), 0
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                found = zlib.crc32(part.data, found)
                bar.update(len(part))
            if found != claimed:
                yield f"{_place(store)}{name} has checksum {found:08x}, expected {claimed:08x}"


def _count_problems(store: StoreReader) -> Iterator[str]:
    """Attributes against the columns and arrays that they count."""
    for name, found in counts_of(store).items():
        claimed = store.attributes.get(name, found)
        if claimed != found:
            yield f"{_place(store)}attribute `{name}` is {claimed}, but the rows say {found}"
    written, valid = (store.column(name).astype(bool) for name in ("written", "valid"))
    if (valid & ~written).any():
        yield f"{_place(store)}{(valid & ~written).sum()} rows are valid, but were never written"
    if (written & (store.column("occurrences") < 1)).any():
        yield f"{_place(store)}rows were written of examples that occur less than once"


def _content_problems(stores: list[StoreReader]) -> Iterator[str]:
    """Documents and factors that are whole, but cannot be made sense of."""
    try:
        facts_of(stores[-1])
        for store in stores:
            for name, layer in InfluenceQuery(store).layers.items():
                if not bool(layer.Lambda.isfinite().all()):
                    yield f"{_place(store)}layer {name!r} has eigenvalues that are not finite"
    except InfluenceError as error:
        yield str(error)


def _place(store: StoreReader) -> str:
    return f"segment {store.number}: " if len(store.segments) > 1 else ""

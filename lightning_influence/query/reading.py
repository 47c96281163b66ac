"""Rows of all layers, some examples at a time, read while the ones before are worked on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_influence.query.places import Places
from lightning_influence.store.pages import Pages

Key = TypeVar("Key", bound=Hashable)
Maps = Mapping[Key, Mapping[str, np.ndarray]]
PagesOf = Mapping[Key, Mapping[str, Pages]]


class RowChunk(NamedTuple, Generic[Key]):
    """Some rows.

    Args:
        part: of the places.
        rows: their dataset indices.
        arrays: by source and name, tensors [n, ...] that are to be read only, valid until the next chunk is asked
            for.
    """

    part: slice
    rows: slice | np.ndarray
    arrays: dict[Key, dict[str, Tensor]]


def read_chunks(maps: Maps[Key], places: Places, step: int, device: torch.device) -> Iterator[RowChunk[Key]]:
    """One pass over the places' rows of all maps.

    Where the rows follow each other they are not copied: a thread reads the next chunk's pages from the disk.
    Pages are given back after use, so that no more than two chunks count as memory.

    Args:
        maps: each source's arrays [N, ...], by name.
        places: which rows.
        step: how many at a time.
        device: where the tensors are to be.
    """
    parts = places.parts(step)
    if not parts:
        return
    pages = {key: {name: Pages(array) for name, array in arrays.items()} for key, arrays in maps.items()}
    with ThreadPoolExecutor(1) as thread:
        read = _read(pages, places.rows(parts[0]))
        for number, part in enumerate(parts):
            following = places.rows(parts[number + 1]) if number + 1 < len(parts) else None
            ahead = None if following is None else thread.submit(_read, pages, following)
            rows = places.rows(part)
            yield RowChunk(part, rows, _tensors(read, device))
            _give_back(pages, places.rows(parts[max(number - 1, 0)]), rows)
            if ahead is not None:
                read = ahead.result()


def _read(pages: PagesOf[Key], rows: slice | np.ndarray) -> dict[Key, dict[str, np.ndarray]]:
    if isinstance(rows, slice):
        for each in pages.values():
            for array in each.values():
                array.touch(rows)
    return {key: {name: array.array[rows] for name, array in each.items()} for key, each in pages.items()}


def _tensors(read: Mapping[Key, Mapping[str, np.ndarray]], device: torch.device) -> dict[Key, dict[str, Tensor]]:
    return {
        key: {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        for key, arrays in read.items()
    }


def _give_back(pages: PagesOf[Key], before: slice | np.ndarray, rows: slice | np.ndarray) -> None:
    """Pages of a chunk and of the one before, whose last page may have been read again with this one's first."""
    used = slice(_ends(before)[0], _ends(rows)[1])
    for each in pages.values():
        for array in each.values():
            array.release(used)


def _ends(rows: slice | np.ndarray) -> tuple[int, int]:
    return (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]) + 1)

"""Rows of all layers, some examples at a time, read while the ones before are worked on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_influence.query.places import Places
from lightning_influence.store.pages import alias, release, touch

Key = TypeVar("Key", bound=Hashable)
Maps = Mapping[Key, Mapping[str, np.ndarray]]


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
    with ThreadPoolExecutor(1) as thread:
        read = _read(maps, places.rows(parts[0]))
        for number, part in enumerate(parts):
            following = places.rows(parts[number + 1]) if number + 1 < len(parts) else None
            ahead = None if following is None else thread.submit(_read, maps, following)
            rows = places.rows(part)
            yield RowChunk(part, rows, _tensors(read, device))
            before = places.rows(parts[max(number - 1, 0)])
            _give_back(maps, before, rows)
            if ahead is not None:
                read = ahead.result()


def _read(maps: Maps[Key], rows: slice | np.ndarray) -> dict[Key, dict[str, np.ndarray]]:
    found = {key: {name: array[rows] for name, array in arrays.items()} for key, arrays in maps.items()}
    if isinstance(rows, slice):
        for arrays in found.values():
            for array in arrays.values():
                touch(array)
    return found


def _tensors(read: Mapping[Key, Mapping[str, np.ndarray]], device: torch.device) -> dict[Key, dict[str, Tensor]]:
    return {
        key: {name: torch.from_numpy(alias(array)).to(device) for name, array in arrays.items()}
        for key, arrays in read.items()
    }


def _give_back(maps: Maps[Key], before: slice | np.ndarray, rows: slice | np.ndarray) -> None:
    """Pages of a chunk and of the one before, whose last page may have been read again with this one's first."""
    used = slice(_ends(before)[0], _ends(rows)[1])
    for arrays in maps.values():
        for array in arrays.values():
            release(array[used])


def _ends(rows: slice | np.ndarray) -> tuple[int, int]:
    return (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]) + 1)

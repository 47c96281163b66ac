"""Rows of all layers, some examples at a time, read while the ones before are worked on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_influence.query.places import Places
from lightning_influence.store.pages import Pages

Key = TypeVar("Key", bound=Hashable)
Maps = Mapping[Key, Mapping[str, np.ndarray]]
Rows: TypeAlias = slice | np.ndarray
PagesOf = Mapping[Key, Mapping[str, Pages]]


@dataclass(frozen=True)
class RowChunk(Generic[Key]):
    """Some rows.

    Args:
        part: of the places.
        rows: their dataset indices.
        arrays: by source and name, tensors [n, ...] that are to be read only, valid until the next chunk is asked
            for.
    """

    part: slice
    rows: Rows
    arrays: dict[Key, dict[str, Tensor]]


def read_chunks(maps: Maps[Key], places: Places, step: int, device: torch.device) -> Iterator[RowChunk[Key]]:
    """One pass over the places' rows of all maps.

    Where the rows follow each other they are not copied: a thread reads the next chunk's pages from the disk.
    Pages are given back after use, so that no more than three chunks count as memory.

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
    chunks = [places.rows(part) for part in parts]
    with ThreadPoolExecutor(1) as thread:
        read = _read(pages, chunks[0])
        for number, part in enumerate(parts):
            behind, following = chunks[max(number - 2, 0) : number], chunks[number + 1 : number + 2]
            ahead = thread.submit(_move_on, pages, behind, following)
            yield RowChunk(part, chunks[number], _tensors(read, device))
            read = ahead.result()
        _give_back(pages, chunks[-2:])


def _move_on(pages: PagesOf[Key], behind: list[Rows], following: list[Rows]) -> dict[Key, dict[str, np.ndarray]]:
    """Give back the last chunk with the one before, whose last page may have been read again; then read on."""
    _give_back(pages, behind)
    return _read(pages, following[0]) if following else {}


def _read(pages: PagesOf[Key], rows: Rows) -> dict[Key, dict[str, np.ndarray]]:
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


def _give_back(pages: PagesOf[Key], chunks: list[Rows]) -> None:
    if not chunks:
        return
    used = slice(_ends(chunks[0])[0], _ends(chunks[-1])[1])
    for each in pages.values():
        for array in each.values():
            array.release(used)


def _ends(rows: Rows) -> tuple[int, int]:
    return (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]) + 1)

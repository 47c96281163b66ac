"""Rows of all layers, some examples at a time, read while the ones before are worked on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_influence.query.budget import CHUNKS_READ
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

    Where the rows follow each other they are not copied: a thread reads the pages of the next few chunks from the
    disk, and gives back those of the last ones, so that no more than `CHUNKS_MAPPED` count as memory.

    Args:
        maps: each source's arrays [N, ...], by name.
        places: which rows.
        step: how many at a time.
        device: where the tensors are to be.
    """
    windows = places.parts(step * CHUNKS_READ)
    if not windows:
        return
    pages = {key: {name: Pages(array) for name, array in arrays.items()} for key, arrays in maps.items()}
    rows = [places.rows(window) for window in windows]
    with ThreadPoolExecutor(1) as thread:
        read = _read(pages, rows[0])
        for number, window in enumerate(windows):
            behind, following = rows[max(number - 2, 0) : number], rows[number + 1 : number + 2]
            ahead = thread.submit(_move_on, pages, behind, following)
            tensors = {key: {name: torch.from_numpy(a) for name, a in each.items()} for key, each in read.items()}
            for start in range(window.start, window.stop, step):
                part = slice(start, min(start + step, window.stop))
                inside = slice(part.start - window.start, part.stop - window.start)
                arrays = {
                    key: {name: tensor[inside].to(device) for name, tensor in each.items()}
                    for key, each in tensors.items()
                }
                yield RowChunk(part, places.rows(part), arrays)
            read = ahead.result()
        _give_back(pages, rows[-2:])


def _move_on(pages: PagesOf[Key], behind: list[Rows], following: list[Rows]) -> dict[Key, dict[str, np.ndarray]]:
    """Give back the last window with the one before, whose last page may have been read again; then read on."""
    _give_back(pages, behind)
    return _read(pages, following[0]) if following else {}


def _read(pages: PagesOf[Key], rows: Rows) -> dict[Key, dict[str, np.ndarray]]:
    if isinstance(rows, slice):
        for each in pages.values():
            for array in each.values():
                array.touch(rows)
    return {key: {name: array.array[rows] for name, array in each.items()} for key, each in pages.items()}


def _give_back(pages: PagesOf[Key], windows: list[Rows]) -> None:
    if not windows:
        return
    used = slice(_ends(windows[0])[0], _ends(windows[-1])[1])
    for each in pages.values():
        for array in each.values():
            array.release(used)


def _ends(rows: Rows) -> tuple[int, int]:
    return (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]) + 1)

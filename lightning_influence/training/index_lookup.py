"""Dataset indices that a batch itself tells, and what indices must be like."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_sampling import FIX

IndexFunction = Callable[[Any], Sequence[int] | Tensor]


class IndexLookup:
    """Reads the dataset index of each row out of a batch.

    Args:
        index_fn: A function from a batch to one dataset index per row.
        index_key: Instead, the key of a mapping, or place in a sequence, that holds them.

    Raises:
        ValueError: Both are given.
        TypeError: `index_key` is neither a string nor an integer.
    """

    def __init__(self, index_fn: IndexFunction | None, index_key: str | int | None) -> None:
        if index_fn is not None and index_key is not None:
            raise ValueError(f"Both `index_fn` and `index_key` ({index_key!r}) are given; pass one of them.")
        if index_key is not None and type(index_key) not in (str, int):
            raise TypeError(f"`index_key` must be a string or an integer, got {index_key!r}.")
        self._index_fn, self._index_key = index_fn, index_key
        self.name = "`index_fn`" if index_key is None else f"`index_key` {index_key!r}"

    def __bool__(self) -> bool:
        return self._index_fn is not None or self._index_key is not None

    def __call__(self, batch: Any) -> Any:
        """Whatever the user's function or batch has, unchecked.

        Raises:
            RowIndexError: In place of any exception on the way.
        """
        try:
            return self._index_fn(batch) if self._index_fn is not None else self._item(batch)
        except Exception as err:  # user code: whatever it raises must not end the run
            raise RowIndexError(f"{self.name} raised {type(err).__name__}: {err}") from err

    def _item(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):  # its rows and elements are no indices
            raise TypeError("the batch must be a mapping or a sequence that holds the indices, got a Tensor")
        return batch[self._index_key]


def to_indices(found: Any, source: str, num_examples: int | None) -> np.ndarray:
    """Check and convert to int64 [n]; with `batch_size=None` a sampler gives one bare index.

    Args:
        found: Indices, as a sampler or a batch has them.
        source: Where they are from, for errors.
        num_examples: What all must be below; None if unknown.

    Raises:
        RowIndexError: They are not one index per row.
    """
    try:
        indices = np.atleast_1d(found.cpu() if isinstance(found, Tensor) else found)
    except (TypeError, ValueError, RuntimeError):  # ragged, or not convertible
        indices = np.empty(0, dtype=object)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        got = f"{type(found).__name__} {reprlib.repr(found)}"
        raise RowIndexError(f"{source} must give one integer index per row, got {got}; {FIX}.")
    limit = np.inf if num_examples is None else num_examples
    outside = indices[(indices < 0) | (indices >= limit)]
    if outside.size:
        raise RowIndexError(
            f"{source} must give indices from 0 and below the dataset's length {limit}, got {outside[0]}; {FIX}."
        )
    return indices.astype(np.int64)

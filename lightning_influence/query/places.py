"""Which training examples a question is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_influence.errors import QueryError

Subset: TypeAlias = "Tensor | np.ndarray | Sequence[int] | Sequence[bool]"
"""Dataset indices, each once, or a mask bool [N]."""


class Places:
    """Training examples in the order of the file, and where each is in the answer.

    Args:
        num_examples: length of the dataset, N.
        indices: dataset indices in the answer's order, int64, each once; None for all.
    """

    def __init__(self, num_examples: int, indices: np.ndarray | None = None) -> None:
        self._count = num_examples if indices is None else len(indices)
        self._order = None if indices is None else np.argsort(indices, kind="stable")
        self._sorted = None if indices is None or self._order is None else indices[self._order]

    def __len__(self) -> int:
        return self._count

    def rows(self, part: slice) -> slice | np.ndarray:
        """Dataset indices of a part, ascending."""
        return part if self._sorted is None else self._sorted[part]

    def indices(self, part: slice) -> Tensor:
        """The same as a tensor int64."""
        if self._sorted is None:
            return torch.arange(part.start, part.stop)
        return torch.from_numpy(self._sorted[part])

    def columns(self, part: slice) -> slice | Tensor:
        """Where the part is in the answer."""
        return part if self._order is None else torch.from_numpy(self._order[part])

    def parts(self, step: int) -> list[slice]:
        """At most `step` at a time."""
        return [slice(start, min(start + step, self._count)) for start in range(0, self._count, step)]


def as_indices(subset: Subset, num_examples: int, name: str, where: str) -> np.ndarray:
    """Dataset indices as asked for, int64.

    Args:
        subset: indices or a mask.
        num_examples: N.
        name: of the argument, for messages.
        where: the file, for messages.

    Raises:
        QueryError: if they are no integers or mask, out of range, or one is named twice.
    """
    found = np.asarray(subset.cpu() if isinstance(subset, Tensor) else subset)
    if found.dtype == np.bool_:
        if found.shape != (num_examples,):
            raise QueryError(
                f"`{name}` is a mask of shape {found.shape}, but {where} has {num_examples} examples; pass one "
                "bool an example, or dataset indices."
            )
        return np.flatnonzero(found)
    found = found.reshape(-1)
    if len(found) and not np.issubdtype(found.dtype, np.integer):
        raise QueryError(f"`{name}` must be integers, dataset indices, or a mask of bools, got {found.dtype}.")
    found = found.astype(np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < num_examples:
        raise QueryError(
            f"`{name}` must lie in 0..{num_examples - 1}, the dataset of {where}, "
            f"got {found.min()}..{found.max()}."
        )
    if len(np.unique(found)) < len(found):
        raise QueryError(f"`{name}` names an example twice; name each once.")
    return found

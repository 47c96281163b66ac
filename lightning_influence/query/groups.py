"""Groups of training examples, and sums over them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.query.places import Places, Subset, as_indices

Groups: TypeAlias = "Tensor | np.ndarray | Sequence[Hashable] | Mapping[Hashable, Subset]"
"""A label for each training example, [N], or a mapping from names to dataset indices or masks (may overlap)."""


class Membership:
    """Which examples are in which groups.

    Args:
        groups: labels or a mapping.
        num_examples: length of the dataset, N.
        where: the file, for messages.

    Attributes:
        names: labels in ascending order, or the mapping's keys.
        members: examples that are in a group, ascending.

    Raises:
        QueryError: if there are not as many labels as examples, no groups, or indices that cannot be.
    """

    def __init__(self, groups: Groups, num_examples: int, where: str) -> None:
        self.names: list[Hashable]
        if isinstance(groups, Mapping):
            self.names = list(groups)
            each = [as_indices(groups[n], num_examples, f"groups[{n!r}]", where) for n in self.names]
            examples = np.concatenate([np.empty(0, np.int64), *each])
            numbers = np.repeat(np.arange(len(each)), [len(indices) for indices in each])
            order = np.argsort(examples, kind="stable")
            self._examples, self._groups = examples[order], numbers[order]
        else:
            labels = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
            if labels.shape != (num_examples,):
                raise QueryError(
                    f"`groups` must have one label for each of the {num_examples} examples of {where}, or be a "
                    f"mapping from names to their indices, got shape {labels.shape}."
                )
            found, self._groups = np.unique(labels, return_inverse=True)
            self.names, self._examples = found.tolist(), np.arange(num_examples)
        if not self.names:
            raise QueryError("`groups` is empty; give each example a label, or name groups of examples.")
        self.members = np.unique(self._examples)
        self.places = Places(num_examples, None if len(self.members) == num_examples else self.members)

    def add(self, sums: Tensor, rows: slice | np.ndarray, values: Tensor) -> None:
        """Add examples' values to their groups' sums.

        Args:
            sums: float64 [q, groups], on the CPU.
            rows: dataset indices of the examples, ascending.
            values: shape [q, n].
        """
        places, groups = self._within(rows)
        values = values.cpu()[:, places].to(sums.dtype)
        sums.scatter_add_(1, groups.expand(len(sums), -1), values)

    def count(self, chosen: Tensor) -> Tensor:
        """How many of each group's examples are among the chosen, bool [N] -> int64 [groups]."""
        inside = chosen.numpy()[self._examples]
        return torch.from_numpy(np.bincount(self._groups[inside], minlength=len(self.names)))

    def _within(self, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        """Of each membership of some examples, the place among them and the group."""
        first, last = (rows.start, rows.stop - 1) if isinstance(rows, slice) else (rows[0], rows[-1])
        span = slice(*np.searchsorted(self._examples, (first, last + 1)))
        places = self._examples[span] - first
        if not isinstance(rows, slice):
            places = np.searchsorted(rows, self._examples[span])
        return torch.from_numpy(places), torch.from_numpy(self._groups[span])

"""Which Kronecker factors a layer's Fisher block has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KroneckerStructure:
    """The form of A and S beside a gradient [o, i].

    Args:
        groups: the outputs fall into this many equal groups of neighbours with inputs, and so factors,
            of their own, as in a grouped convolution; there is one block A (x) S a group.
        full_A: whether A is a matrix; if not, it is taken to be diagonal.
        full_S: whether S is a matrix; if not, it is taken to be diagonal, as it is for a table of which
            single rows are looked up.
    """

    groups: int = 1
    full_A: bool = True
    full_S: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"`groups` must be a positive integer, got {self.groups!r}")

    @property
    def is_diagonal(self) -> bool:
        """Whether the basis is that of the parameters themselves, known without any covariance."""
        return not (self.full_A or self.full_S)

    def inputs_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Of A for a gradient [o, i]: [i, i], [g, i, i], or [i] for a diagonal one."""
        i = shape[1]
        return self._grouped(i, i) if self.full_A else self._grouped(i)

    def outputs_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Of S for a gradient [o, i]: [o, o], [g, o / g, o / g], or [o] for a diagonal one."""
        o = shape[0] // self.groups
        return self._grouped(o, o) if self.full_S else self._grouped(o)

    def _grouped(self, *sizes: int) -> tuple[int, ...]:
        return sizes if self.groups == 1 else (self.groups, *sizes)

    def to_builtins(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dict(vars(self))


FULL = KroneckerStructure()
DIAGONAL = KroneckerStructure(full_A=False, full_S=False)

"""The processes that capture one run together.

Each of them may fail by itself, and training must go on in all of them. So whatever can fail runs inside
`Processes.together`, after which all know whether it did, and nothing that can fail comes between that and
the collective operations that follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from lightning_influence.errors import OtherProcessError

_Value = TypeVar("_Value")


class Processes:
    """A group of processes, and this one's place in it; alone by default, where everything costs nothing.

    Args:
        rank: of this process.
        size: number of processes.
        group: through which they talk; None is torch's default group.
        device: on which the group's backend takes tensors.

    Attributes:
        device: on which the group's backend takes tensors.
        is_over: whether the processes know that one of them has failed; nothing may be said after that.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        group: distributed.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.size = rank, size
        self.is_over = False
        self.device = torch.device(device)
        self._group = group

    @property
    def is_first(self) -> bool:
        """Whether this is the one that makes files and speaks to the user."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block only if it went well in all processes.

        Raises:
            OtherProcessError: if it failed in another process, with the reason.
        """
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise
        self._tell(None)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors of the same shapes over the processes, in place."""
        if not self.is_alone:
            for tensor in tensors:
                distributed.all_reduce(tensor, group=self._group)

    def total(self, *numbers: float) -> list[float]:
        """Sums over the processes."""
        if self.is_alone:
            return list(numbers)
        numbers_ = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum_([numbers_])
        return numbers_.tolist()

    def from_first(self, value: _Value) -> _Value:
        """The first process's value, of any kind that can be pickled; the others' is not looked at."""
        if self.is_alone:
            return value
        values = [value if self.is_first else None]
        distributed.broadcast_object_list(values, src=0, group=self._group, device=self.device)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: _Value) -> list[_Value]:
        """All processes' values, in the order of their ranks."""
        if self.is_alone:
            return [value]
        values: list[_Value | None] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def _tell(self, error: Exception | None) -> None:
        """Say how it went; the others' failure is raised here, this one's by the caller."""
        if self.is_alone or self.is_over or not self.total(float(error is not None))[0]:
            return
        self.is_over = True
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            rank, reason = next((rank, reason) for rank, reason in enumerate(told) if reason)
            raise OtherProcessError(f"Process {rank} of {self.size} failed. {reason}")


ALONE = Processes()

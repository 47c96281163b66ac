"""`torchmetrics.Metric` with what large matrix sums need.

Five things differ from the plain base class. Processes are joined by an all-reduce in place (gather
and stack would hold one copy a process). `compute` keeps no second copy of its result. Loading a
state checks its shape. Casts such as `.to(torch.bfloat16)` move the sums but leave their precision. A
matrix of shape [1, 1], such as S of a layer with one output, stays a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class SumMetric(Metric):
    """A metric whose states are tensors that add up over batches and processes.

    Args:
        sync_on_compute: whether `compute` joins the processes, which all must call it then.
    """

    full_state_update = False

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=sync_on_compute)

    def add_sum(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Register a state of zeros that is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum", persistent=True)

    @property
    def sums(self) -> list[Tensor]:
        """The states themselves, in a fixed order, to be added up over processes in place."""
        return [getattr(self, name) for name in self._defaults]

    def load_sums(self, saved: Sequence[Tensor] | None) -> None:
        """Add sums that were saved, if they are of the same layer.

        Raises:
            ValueError: if their shapes are others.
        """
        if saved is None:
            return
        for own, tensor in zip(self.sums, saved, strict=True):
            if own.shape != tensor.shape:
                raise ValueError(
                    f"Sums must have shape {tuple(own.shape)}, got {tuple(tensor.shape)}: of another layer."
                )
            own += tensor.to(own.device)

    def _wrap_compute(self, compute: Callable) -> Callable:
        @functools.wraps(compute)
        def joined(*args: Any, **kwargs: Any) -> Any:  # the base class's would squeeze [1, 1] to a scalar
            with self.sync_context(
                self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
            ):
                return compute(*args, **kwargs)

        return joined

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for name in self._defaults:
            torch.distributed.all_reduce(getattr(self, name), group=process_group or self.process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def move(state: Tensor) -> Tensor:
            return state.to(fn(torch.empty(0, device=state.device, dtype=state.dtype)).device)

        return super()._apply(move, exclude_state)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._defaults:
            default, found = getattr(self, name), state_dict.get(prefix + name)
            if found is not None and found.shape != default.shape:
                raise ValueError(
                    f"State {prefix + name!r} must have shape {tuple(default.shape)}, "
                    f"got {tuple(found.shape)}: it belongs to another layer."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

"""Which of the examples that a distributed sampler draws are padding.

torch's `DistributedSampler` deals an epoch's examples to `num_replicas` processes in turn: the p-th
that process r draws stands in slot `p * num_replicas + r` of the epoch. So that every process gets
as many, it goes on from the epoch's first example once all are dealt: slots from the number of
examples on are padding. Each process knows its own from that; nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_influence.errors import RowIndexError

# What deals in turn, and what hands on in the order in which it is dealt.
_DEALING = (DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__)


@dataclass(frozen=True)
class Padding:
    """The padding of one process.

    Args:
        sampler: It repeats examples.
        is_dealt_in_turn: Whether rows come as `DistributedSampler` deals them; otherwise which of
            them are padding cannot be known.
    """

    sampler: DistributedSampler[Any]
    is_dealt_in_turn: bool

    def check(self) -> None:
        """Refuse what cannot be known.

        Raises:
            RowIndexError: Another class decides which examples are repeated, or in which order.
        """
        if not self.is_dealt_in_turn:
            raise RowIndexError(
                f"{type(self.sampler).__name__} may repeat examples so that each of {self.sampler.num_replicas} "
                "processes gets as many, and a class of your own deals them out, so which rows are repeats "
                "is unknown; give the sampler `drop_last=True`, or use torch's `DistributedSampler` and "
                "`BatchSampler`."
            )

    def mask(self, first: int, num_rows: int) -> np.ndarray:
        """Say of the rows `first, first + 1, ...` of a pass whether they are padding, bool [n]."""
        slots = np.arange(first, first + num_rows) * self.sampler.num_replicas + self.sampler.rank
        return slots >= len(self.sampler.dataset)  # type: ignore[arg-type]


def find_padding(sampler: Any) -> Padding | None:
    """Look for a distributed sampler that repeats examples, below batch samplers too.

    Args:
        sampler: What a `DataLoader` asks for indices: its batch sampler, or its sampler.

    Returns:
        None if nothing is repeated for want of examples: `drop_last=True`, a number of examples that
        divides, or no distributed sampler.
    """
    keeps_order = True
    while not isinstance(sampler, DistributedSampler):
        if getattr(sampler, "sampler", None) is None:
            return None
        keeps_order = keeps_order and getattr(sampler.__class__, "__iter__", None) is BatchSampler.__iter__
        sampler = sampler.sampler
    try:
        if sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
            return None
    except (AttributeError, TypeError):  # a class of one's own
        return Padding(sampler, is_dealt_in_turn=False)
    return Padding(sampler, is_dealt_in_turn=keeps_order and sampler.__class__.__iter__ in _DEALING)

"""One epoch's rows, on disk until they are merged: whole and nearly exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_influence.gradients import DenseGradient, FactoredGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.row_file import specs
from lightning_influence.store import StoreWriter


@dataclass(frozen=True)
class EpochRows:
    """One epoch's rows on disk.

    Args:
        epoch: its number.
        writer: of the unfinished file in which they are, open.
        plans: how the layers that were trained in it are stored, "pairs" or "dense".
        weights: mean learning rate of each of these layers' parameters.
        facts: what the merged file says of the epoch, plain values.
    """

    epoch: int
    writer: StoreWriter
    plans: Mapping[str, LayerPlan]
    weights: Mapping[str, float]
    facts: Mapping[str, Any]

    def read(self, name: str, rows: np.ndarray) -> FactoredGradient | DenseGradient:
        """A layer's gradients of some examples; zeros where it has none."""
        return self.plans[name].codec_without_basis().decode_gradient(self.arrays(name, rows))

    def has(self, name: str, plan: LayerPlan) -> bool:
        """Whether there are gradients of this very matrix of parameters (a bias may have been frozen since)."""
        own = self.plans.get(name)
        return own is not None and (own.shape, own.structure) == (plan.shape, plan.structure)

    def arrays(self, name: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """What is stored of some examples; of neighbours it is read at once."""
        is_range = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        wanted = slice(rows[0], rows[-1] + 1) if is_range else rows
        arrays = self.writer.read_rows(name, wanted, copies=False)  # float16, of which others are made
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def join(self) -> None:
        """Open the file again that an earlier run has left."""
        self.writer.join({name: specs(plan.codec_without_basis()) for name, plan in self.plans.items()})


def epoch_writer(path: Path, epoch: int, *, num_examples: int, store_id: str) -> StoreWriter:
    """Of one epoch's rows, beside the file at `path` that they will be merged into."""
    beside = path.with_name(f"{path.name}.epoch{epoch}")
    return StoreWriter(beside, num_examples=num_examples, store_id=store_id, segment=epoch)

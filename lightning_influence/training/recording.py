"""The recorder of an epoch that is written to the file as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import Processes
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreWriter
from lightning_influence.training.options import CaptureOptions


def segment_recorder(
    path: Path,
    plans: Mapping[str, LayerPlan],
    options: CaptureOptions,
    processes: Processes,
    *,
    epoch: int,
    num_examples: int,
    store_id: str,
    has_file: bool,
    bases: Mapping[str, Eigenbasis],
    keep_covariances: bool,
) -> Recorder:
    """Of one epoch.

    Args:
        path: of the file.
        plans: how layers are stored.
        options: what the user asked for.
        processes: that record together.
        epoch: its number.
        num_examples: length of the dataset.
        store_id: of the file.
        has_file: whether there is a finished file of this run, whose segments may be wanted.
        bases: from the epoch before.
        keep_covariances: for the next epoch's bases.
    """
    after = path if has_file and options.keeps_segments else None
    return Recorder(
        StoreWriter(path, num_examples=num_examples, store_id=store_id, segment=epoch, after=after),
        plans,
        bases=bases,
        bytes_per_example=options.bytes_per_example,
        keep_covariances=keep_covariances,
        covariance_positions=options.covariance_positions,
        processes=processes,
    )

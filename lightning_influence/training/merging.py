"""Capture of several epochs that become one row an example: each epoch's rows wait on disk until the end."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_influence.errors import CaptureError
from lightning_influence.functional.weights import weights_hash
from lightning_influence.layer_plan import COLUMN_BYTES, LayerPlan, expected_file_bytes
from lightning_influence.processes import Processes
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreWriter
from lightning_influence.training import report
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.training.index_layout import DatasetRange
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.staleness import Agreement
from lightning_influence.training.tracking import LayerTracking
from lightning_influence.trajectory import Trajectory, epoch_writer

EPOCH_FACTS = ("step_start", "step_end", "is_whole", "is_resumed", "batches_captured")
NOTE = "rows are sums over epochs"


class TrajectoryCapture:
    """The captured epochs of one fit, and their merging.

    Args:
        options: what the user asked for.
        path: of the file.
        store_id: its id.
        processes: that train together.
        num_epochs: how many will be captured, where that is certain.
    """

    def __init__(
        self, options: CaptureOptions, path: Path, store_id: str, processes: Processes, num_epochs: int | None
    ) -> None:
        self._num_epochs = num_epochs or 1
        self._options, self._path, self._store_id, self._processes = options, path, store_id, processes
        self._trajectory: Trajectory | None = None
        self._attributes: dict[str, Any] = {}  # of the first and the last captured epoch
        self._documents: dict[str, object] = {}
        self._tracking: LayerTracking | None = None  # of the last captured epoch

    @property
    def epochs(self) -> list[int]:
        """Those that wait to be merged."""
        return [] if self._trajectory is None else [epoch.epoch for epoch in self._trajectory.epochs]

    def recorder(self, plans: Mapping[str, LayerPlan], capture: EpochCapture, *, num_examples: int) -> Recorder:
        """Of the epoch that begins.

        Args:
            plans: how layers are stored until they are merged.
            capture: of it.
            num_examples: length of the dataset.

        Raises:
            CaptureError: if the disk has no room for all of them, or the dataset has another length than before.
        """
        epoch = capture.epoch
        if self._trajectory is None:
            self._trajectory = Trajectory(self._processes)
            self._check_room(plans, num_examples)
        others = [e.epoch for e in self._trajectory.epochs if e.writer.num_examples != num_examples]
        if others:
            raise CaptureError(
                f"The dataset has {num_examples} examples in epoch {epoch}, but had "
                f"{self._trajectory.epochs[0].writer.num_examples} in epoch {others[0]}: rows of one index may be "
                'of several examples; pass `trajectory="segments"` or `epochs="last"`.'
            )
        return Recorder(
            epoch_writer(self._path, epoch, num_examples=num_examples, store_id=self._store_id),
            plans,
            makes_factors=False,
            at_once=not capture.is_in_background,
            processes=self._processes,
        )

    def add(
        self, capture: EpochCapture, tracking: LayerTracking, datasets: Sequence[DatasetRange], *, is_whole: bool
    ) -> None:
        """Take over a captured epoch's rows, after its last batch."""
        assert self._trajectory is not None
        assert capture.recorder is not None
        with self._processes.together():
            attributes = capture.attributes(is_whole=is_whole)
            documents = capture.documents(tracking, datasets)
            rates = capture.learning_rates()
        facts = {k: attributes[k] for k in EPOCH_FACTS if k in attributes}
        try:
            self._trajectory.add(capture.recorder, epoch=capture.epoch, weights=rates, facts=facts)
        except CaptureError as error:  # no finite gradient, in any process
            capture.discard()
            rank_zero_warn(f"InfluenceCallback: epoch {capture.epoch} is not merged with the others. {error}")
            return
        kept = ("step_start", "weights_hash_start")
        first: dict[str, Any] = {key: self._attributes[key] for key in kept if key in self._attributes}
        is_whole = attributes["is_whole"] and self._attributes.get("is_whole", True)
        self._attributes = {**attributes, **first, "is_whole": is_whole}
        self._documents, self._tracking = documents, tracking

    def write(self, trainer: Trainer, model: LightningModule | None) -> tuple[int, Agreement]:
        """Merge the epochs and write the file, all processes together.

        Args:
            trainer: of the fit.
            model: at the weights that the file is for; None: those at the last captured epoch's end.

        Returns:
            The last captured epoch, and how well scores of stored rows agree with those of exact ones.
        """
        assert self._trajectory is not None
        began, epoch, agreement = time.monotonic(), self.epochs[-1], Agreement(note=NOTE)
        with self._processes.together():
            if self._processes.is_first:
                if model is not None:
                    self._attributes["weights_hash_end"] = weights_hash(model)
                self._leave_out()
                writer = StoreWriter(
                    self._path,
                    num_examples=self._trajectory.epochs[0].writer.num_examples,
                    store_id=self._store_id,
                    segment=epoch,
                )
                try:
                    options = self._options
                    merged = self._trajectory.merge(
                        writer, bytes_per_example=options.most_bytes, error_budget=options.error_budget
                    )
                    agreement = Agreement(codec=merged.codec_spearman, note=NOTE)
                    self._trajectory.finish(
                        writer,
                        merged,
                        attributes={
                            **self._attributes,
                            "trajectory": "merge",
                            "codec_spearman": merged.codec_spearman,
                            "staleness_spearman": math.nan,
                            "staleness_note": NOTE,
                        },
                        documents=self._documents,
                    )
                except BaseException:
                    writer.discard()
                    raise
                report.report_file(
                    trainer,
                    self._path,
                    epoch=epoch,
                    counts=merged.counts,
                    agreement=agreement,
                    seconds=time.monotonic() - began,
                    merged=self.epochs,
                )
        return epoch, agreement

    def state(self) -> dict[str, Any] | None:
        """What a resumed run needs, in plain values; None before the first captured epoch's end."""
        if self._trajectory is None or not self.epochs:
            return None
        return {
            "trajectory": self._trajectory.state(),
            "num_examples": self._trajectory.epochs[0].writer.num_examples,
            "attributes": dict(self._attributes),
            "documents": json.dumps(self._documents),
        }

    def resume(self, state: Mapping[str, Any] | None, expected: Sequence[int], kept: Collection[str]) -> None:
        """Go on with the epochs that an earlier run has captured, all processes together.

        Args:
            state: that run's; None if there is nothing.
            expected: epochs that should be there.
            kept: names of files that are needed, besides those of `state`.
        """
        found = None if state is None else state.get("trajectory")
        with self._processes.together():
            if found is not None:
                self._trajectory = Trajectory(self._processes)
                self._attributes, self._documents = dict(found["attributes"]), json.loads(found["documents"])
                self._trajectory.resume(
                    found["trajectory"], self._path, num_examples=found["num_examples"], store_id=self._store_id
                )
            if self._processes.is_first:
                self._clean(kept)
        missing = [epoch for epoch in expected if epoch not in self.epochs]
        if missing:
            rank_zero_warn(
                f"InfluenceCallback: training goes on, and rows of epochs {', '.join(map(str, missing))} are not "
                f"beside {self._path}, so they will not be in the file. Its document 'trajectory' says which are."
            )

    def _clean(self, kept: Collection[str]) -> None:
        """Delete rows of epochs that training has left, or whose notes are lost."""
        own = {epoch.writer.partial_path.name for epoch in self._trajectory.epochs} if self._trajectory else set()
        for file in self._path.parent.iterdir() if self._path.parent.exists() else ():
            is_rows = file.name.startswith(f"{self._path.name}.epoch") and file.name.endswith(
                f".{self._store_id[:8]}.partial"
            )
            if is_rows and file.name not in own and file.name not in kept:
                file.unlink(missing_ok=True)

    def _leave_out(self) -> None:
        """Say which layers are not in the merged rows, in the coverage too."""
        assert self._trajectory is not None
        without, frozen = self._trajectory.without_weight, self._trajectory.not_in_the_last
        if without and self._tracking is not None and set(without) < set(self._tracking.layers):
            self._tracking.drop(dict.fromkeys(without, "its learning rate was 0 in all captured epochs"))
            self._documents["coverage"] = self._tracking.coverage.to_builtins()
        for names, reason in ((without, "as it learnt in no epoch"), (frozen, "as it was frozen at last")):
            if names:
                rank_zero_warn(f"InfluenceCallback: {', '.join(names)}: not in the merged rows, {reason}.")
        for name, epochs in self._trajectory.left_out.items():
            rank_zero_warn(
                f"InfluenceCallback: epochs {', '.join(map(str, epochs))} add nothing to the merged rows of "
                f"{name}, whose gradient had another shape then, as if its bias was frozen in some epochs only."
            )

    def close(self, *, keeps_rows: bool) -> None:
        """Leave the epochs' rows to a resumed run, or delete them; may be called more than once."""
        if self._trajectory is None:
            return
        if keeps_rows and self.epochs:
            rank_zero_warn(
                f"InfluenceCallback: the rows of epochs {', '.join(map(str, self.epochs))} stay beside "
                f"{self._path} for a run that is resumed; delete {self._path.name}.epoch* and *.resume* if there "
                "will be none."
            )
        (self._trajectory.suspend if keeps_rows else self._trajectory.discard)()

    def _check_room(self, plans: Mapping[str, LayerPlan], num_examples: int) -> None:
        row = COLUMN_BYTES + sum(plan.codec_without_basis().bytes_per_row for plan in plans.values())
        wanted = expected_file_bytes(plans, self._num_epochs * row, num_examples)  # only one file has factors
        folder = next(parent for parent in self._path.parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise CaptureError(
                f"Rows of {self._num_epochs} epochs wait for their merging beside {self._path} and take about "
                f"{wanted / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Capture every n-th epoch (`epochs=n`), "
                'fewer layers (`layers=`), or pass `trajectory="segments"`, whose rows are compressed at once.'
            )

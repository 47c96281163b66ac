"""Which dataset index each row of a training batch has.

A `DataLoader` does not say which examples it put into a batch, and by `on_train_start` its workers
have already been sent the first ones. So what its sampler draws is recorded from
`strategy.process_dataloader` on, the one call that Lightning makes for every loader after it has
injected a distributed sampler and before it asks for an iterator.

Indices are those of `DataLoader.dataset`: for a `Subset`, positions in the subset. With several
loaders the datasets stand one after the other (`index_layout`). Rows that a distributed sampler
repeats, so that each process gets as many, have `NO_ROW` (`index_padding`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_layout import DatasetRange, PlacedLoader, lay_out, place_loaders
from lightning_influence.training.index_lookup import IndexFunction, IndexLookup, to_indices
from lightning_influence.training.index_sampling import FIX, Drawn, LoaderRecording, check_recordable, replace

NO_ROW = -1
"""The index of a row that is only there so that each process gets as many: drop its gradients."""
_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The rows of one batch.

    Args:
        indices: Dataset index of each row, or `NO_ROW`, int64 [n]: one loader's rows after another's.
        parts: How many of the rows each loader gave, in the order of `IndexRecorder.datasets`; 0 for
            one that is exhausted before the others. They sum to n.
    """

    indices: np.ndarray
    parts: tuple[int, ...]


class IndexRecorder:
    """Tells the dataset index of every row of every training batch.

    Call `install` in `setup("fit")`, `start_epoch` in `on_train_epoch_start`, `next_batch` in every
    `on_train_batch_start` (or `skip_rest` once, for the rest of an epoch), and `uninstall` in
    `teardown` and in `on_exception`. Training sees the same batches in the same order and the same
    random numbers as without it.

    With several loaders `index_fn` and `index_key` are asked about each loader's part of the batch,
    and answer with indices of that loader's dataset.

    Args:
        index_fn: A function from a batch, as `training_step` gets it, to one dataset index per row.
            Replaces recording, for data whose indices no sampler knows.
        index_key: The key (of a mapping) or place (in a sequence) under which a batch holds the
            dataset index of each row; instead of `index_fn`.
        num_examples: Number of examples, for datasets without a length: of all loaders together. If
            one dataset's length is smaller, this counts.

    Attributes:
        datasets: For each loader its dataset's name and range of indices; empty before the first
            `start_epoch` or `next_batch`, and if the rows cannot be known.

    Raises:
        ValueError: Both `index_fn` and `index_key` are given, or `num_examples` is below 1.
        TypeError: `index_key` is neither a string nor an integer.
    """

    def __init__(
        self,
        index_fn: IndexFunction | None = None,
        *,
        index_key: str | int | None = None,
        num_examples: int | None = None,
    ) -> None:
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {num_examples}.")
        self.datasets: tuple[DatasetRange, ...] = ()
        self._lookup = IndexLookup(index_fn, index_key)
        self._said_num_examples = num_examples
        self._trainer: Trainer | None = None
        self._loaders: list[PlacedLoader] = []
        self._recordings: dict[int, tuple[object, LoaderRecording | None]] = {}  # by the loader's id
        self._next_batch_idx: int | None = None
        self._problem: str | None = None  # None: not looked for yet; empty: none found
        self._patches = ExitStack()

    @property
    def num_examples(self) -> int | None:
        """Number of examples of all `datasets`; None if unknown."""
        lengths = [each.length for each in self.datasets]
        return sum(length or 0 for length in lengths) if lengths and None not in lengths else None

    def install(self, trainer: Trainer) -> None:
        """Watch the training loaders that `trainer` is about to make."""
        self.uninstall()
        self._trainer, self._problem, self.datasets = trainer, None, ()
        self._next_batch_idx = None
        original = trainer.strategy.process_dataloader
        patches = self._patches

        def is_recording() -> bool:  # not validating, and not uninstalled since
            return trainer.training and self._patches is patches

        def process_dataloader(dataloader: object) -> object:
            processed = original(dataloader)
            if is_recording():
                self._watch(processed, is_recording)
            return processed

        attributes = vars(trainer.strategy)
        replace(attributes, "process_dataloader", process_dataloader, patches)

    def uninstall(self) -> None:
        """Put everything back; may be called at any time and more than once."""
        self._unwatch(but=[])
        self._patches.close()
        self._patches, self._trainer, self._loaders, self._problem = ExitStack(), None, [], None

    def start_epoch(self) -> None:
        """Expect batch 0 next.

        Lightning skips `on_train_epoch_start` when it resumes in the middle of an epoch; the first
        batch may then have any number.
        """
        self._next_batch_idx = 0
        if self._problem is None and self._trainer is not None:
            self._arrange()

    def next_batch(self, batch: Any, batch_idx: int) -> BatchRows:
        """Return the dataset index of each row of `batch`.

        Args:
            batch: The batch, looked at by `index_fn` or with `index_key` only.
            batch_idx: Its number in the epoch, as Lightning counts.

        Returns:
            Indices in `0..num_examples - 1`, or `NO_ROW`; a sampler may repeat an index. That n is
            the number of rows is for the caller to check.

        Raises:
            RowIndexError: The indices cannot be known. Training is not harmed.
        """
        if self._problem is None:
            self._arrange()
        if self._problem:
            raise RowIndexError(self._problem)
        drawn = self._draw(batch_idx)
        parts = [self._rows(place, drawn[place], batch) for place in range(len(self._loaders))]
        return BatchRows(np.concatenate(parts), tuple(map(len, parts)))

    def skip_rest(self) -> None:
        """Keep no more indices of this epoch: `next_batch` will be called again in the next one."""
        for _, recording in self._recordings.values():
            if recording is not None:
                recording.skip_rest()

    def _watch(self, loader: object, is_recording: Callable[[], bool]) -> None:
        """Record a loader, unless its indices come from elsewhere and it has no padding to be told."""
        self._problem = None
        if id(loader) in self._recordings:  # processed again, as with `reload_dataloaders_every_n_epochs`
            return
        recording = None
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            recording = LoaderRecording(loader, is_recording)
            if self._lookup and recording.padding is None:
                recording.close()
                recording = None
        self._recordings[id(loader)] = loader, recording

    def _unwatch(self, but: Sequence[PlacedLoader]) -> None:
        """Let go of loaders, such as those of earlier epochs."""
        for key in set(self._recordings) - {id(each.loader) for each in but}:
            _, recording = self._recordings.pop(key)
            if recording is not None:
                recording.close()

    def _recording(self, place: int) -> LoaderRecording | None:
        return self._recordings.get(id(self._loaders[place].loader), (None, None))[1]

    def _arrange(self) -> None:
        """Find the run's loaders, and why the rows of their batches have no indices, if so."""
        self._problem, self._loaders, self.datasets = "", [], ()
        try:
            self._loaders = self._find_loaders()
            self._unwatch(but=self._loaders)
            self._check_loaders()
            self.datasets = lay_out(self._loaders, self._said_num_examples)
        except RowIndexError as err:
            self._problem = str(err)

    def _find_loaders(self) -> list[PlacedLoader]:
        if self._trainer is None:
            raise RowIndexError("`next_batch` works between `install` and `uninstall` only.")
        training_step = inspect.signature(self._trainer.lightning_module.training_step)
        if "dataloader_iter" in training_step.parameters:
            raise RowIndexError(
                "`training_step(dataloader_iter)` fetches its own batches, so their indices are "
                "unknown; write `training_step(batch, batch_idx)`."
            )
        return place_loaders(self._trainer.train_dataloader)

    def _check_loaders(self) -> None:
        assert self._trainer is not None
        is_recorded = False
        for place, each in enumerate(self._loaders):
            recording = self._recording(place)
            if not self._lookup or recording is not None:
                check_recordable(each.loader)
                is_recorded = True
            if recording is not None and recording.padding is not None:
                recording.padding.check()
        if is_recorded and len(self._loaders) > 1 and self._trainer.num_training_batches == math.inf:
            raise RowIndexError(
                "Several training dataloaders without a known number of batches are fetched ahead, so which "
                "pass over a loader a batch came from is unknown; give samplers and datasets a `__len__`, set "
                f"`limit_train_batches` to an integer, or {FIX}."
            )

    def _draw(self, batch_idx: int) -> list[Drawn | None]:
        """What each loader's sampler drew for a batch; None where it is exhausted or not recorded."""
        expected = batch_idx if self._next_batch_idx is None else self._next_batch_idx
        if self._next_batch_idx is None:
            self._check_resumable()
        recordings = [self._recording(place) for place in range(len(self._loaders))]
        skipped = batch_idx - expected  # Lightning counts a batch that is None, but calls no hook
        try:  # all or nothing, so that the queues stay in step
            passes = [recording.current(skipped) if recording is not None else None for recording in recordings]
        except RowIndexError as err:
            raise RowIndexError(
                f"No indices are recorded for batch {batch_idx} (batch {expected} comes next). {err}"
            ) from None
        drawn = [current.take(skipped) if current is not None else None for current in passes]
        self._next_batch_idx = batch_idx + 1
        if not self._lookup and all(each is None for each in drawn):
            raise RowIndexError(f"No indices are recorded for batch {batch_idx}: the sampler is exhausted; {FIX}.")
        return drawn

    def _check_resumable(self) -> None:
        """A loader that resumes in the middle may draw again what was trained on before."""
        for place, each in enumerate(self._loaders):
            if self._recording(place) is not None and hasattr(each.loader, "load_state_dict"):
                raise RowIndexError(
                    f"{type(each.loader).__name__} resumes in the middle of an epoch by a state of its own, so "
                    f"where its sampler stands is unknown; resume from the end of an epoch, or {FIX}."
                )

    def _rows(self, place: int, drawn: Drawn | None, batch: Any) -> np.ndarray:
        """One loader's rows of a batch, int64 [n]."""
        indices = self._indices(place, drawn, batch) + self.datasets[place].offset
        recording = self._recording(place)
        padding = recording.padding if recording is not None else None
        if padding is None or drawn is None:
            return indices
        if len(indices) != drawn.num_rows:
            raise RowIndexError(
                f"{self._lookup.name} gives {len(indices)} indices for {drawn.num_rows} examples, so which of the "
                f"rows a {type(padding.sampler).__name__} repeats is unknown; give the sampler `drop_last=True`."
            )
        return np.where(padding.mask(drawn.first, drawn.num_rows), NO_ROW, indices)

    def _indices(self, place: int, drawn: Drawn | None, batch: Any) -> np.ndarray:
        """The same in the loader's own dataset, without regard to padding."""
        length = self.datasets[place].length
        if self._lookup:
            part = self._loaders[place].part(batch)
            return to_indices(self._lookup(part), self._lookup.name, length) if part is not None else _NOTHING
        return to_indices(drawn.indices, "The sampler", length) if drawn is not None else _NOTHING

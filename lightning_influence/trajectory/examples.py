"""What the epochs' columns say of the examples, together."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from lightning_influence.row_file import RecordedCounts
from lightning_influence.store import StoreWriter
from lightning_influence.trajectory.rows import EpochRows

_COLUMNS = ("written", "valid", "occurrences", "loss", "label", "step", "learning_rate")


class Examples:
    """What the epochs' columns say of the examples, together."""

    def __init__(self, epochs: Iterable[EpochRows], num_examples: int) -> None:
        self._columns = [{name: epoch.writer.read_column(name) for name in _COLUMNS} for epoch in epochs]
        self._times = [
            np.where(columns["valid"].astype(bool) & columns["written"].astype(bool), columns["occurrences"], 0)
            for columns in self._columns
        ]  # of each epoch: how often each example's gradient counts
        self.valid = sum(self._times, start=np.zeros(num_examples, np.int64)) > 0
        self._written = np.zeros(num_examples, bool)
        for columns in self._columns:
            self._written |= columns["written"].astype(bool)

    def times_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """How often some examples' gradients count in each epoch, in order."""
        return [times[rows] for times in self._times]

    def sample(self, size: int) -> np.ndarray:
        """Up to so many examples, at random but always the same."""
        return self._order[:size]

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(0).permutation(np.flatnonzero(self.valid))  # an own generator

    def sample_in(self, number: int, size: int) -> np.ndarray:
        """Up to so many examples that an epoch has seen, in order, each as often as it counts.

        They are others for each epoch, if there are enough.
        """
        times, seen = self._times[number], np.roll(self._order, -number * size)
        drawn = np.sort(seen[times[seen] > 0][:size])
        return np.repeat(drawn, times[drawn])

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """The examples that have a row, some at a time."""
        valid = np.flatnonzero(self.valid)
        for start in range(0, len(valid), size):
            yield valid[start : start + size]

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of merged rows: what the last epoch that saw an example says, and how often it was seen in all."""
        merged = {name: self._columns[0][name][rows].copy() for name in ("loss", "label", "step", "learning_rate")}
        for columns in self._columns[1:]:
            seen = columns["written"][rows].astype(bool)
            for name, values in merged.items():
                values[seen] = columns[name][rows][seen]
        times = sum((times[rows] for times in self._times), start=np.zeros(len(rows), np.int64))
        return {**merged, "valid": np.ones(len(rows), np.uint8), "occurrences": times.astype(np.int32)}

    def write_invalid(self, writer: StoreWriter) -> None:
        """Mark examples of which no epoch had a finite gradient."""
        rows = np.flatnonzero(self._written & ~self.valid)
        columns = self.columns(rows) | {"valid": np.zeros(len(rows), np.uint8)}
        writer.write_rows(rows, columns=columns, arrays={})

    def counts(self) -> RecordedCounts:
        """Examples that any epoch has seen, and of these, those without any finite gradient."""
        written = int(self._written.sum())
        return RecordedCounts(written, written - int(self.valid.sum()), len(self.valid) - written)

"""The rows of one epoch on their way into the file: what each keeps, and where they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.blocks import Block
from lightning_influence.codecs import Codec, EigenCodec, allocate
from lightning_influence.errors import CaptureError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import Coordinates, EncodedGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layer_record import EigenRecord, LayerRecord, RowsFirstRecord
from lightning_influence.processes import Processes
from lightning_influence.row_choice import LEAST_EXAMPLES, RowTrial, bytes_untried
from lightning_influence.store import ArraySpec, StoreWriter

READ_EXAMPLES = 4096


@dataclass(frozen=True)
class RecordedCounts:
    """How many of the dataset's examples have rows.

    Args:
        written: rows that were seen in training.
        invalid: of these, rows with a non-finite gradient, which are in no factor.
        missing: examples that training did not see.
    """

    written: int
    invalid: int
    missing: int


class RowFile:
    """Encodes blocks of examples and writes them; of several processes into the same file.

    Args:
        writer: of the file; of several processes' writers the first process's makes it.
        plans: how each layer is stored.
        processes: that write together.

    Attributes:
        records: of the layers; empty until `lay_out` or `resume`.
    """

    def __init__(self, writer: StoreWriter, plans: Mapping[str, LayerPlan], processes: Processes) -> None:
        self.records: dict[str, LayerRecord] = {}
        self._writer, self._plans, self._processes = writer, plans, processes
        self._invalid: list[Block] = []  # while there is no file

    def lay_out(
        self,
        block: Block | None,
        bases: Mapping[str, Eigenbasis],
        covariances: Mapping[str, KroneckerCovariance],
        bytes_per_example: int,
        error_budget: float | None = None,
    ) -> None:
        """Choose what rows keep, and make the file, all processes together.

        Args:
            block: the first examples of this process, whose Lambda says which coordinates are worth keeping.
            bases: of the layers with the eigen codec.
            covariances: of the others.
            bytes_per_example: budget of the eigen codec over all its layers.
            error_budget: take no more of it than what this error of scores needs (`row_choice`), by the block.

        Raises:
            CaptureError: if no process has seen a finite gradient.
        """
        processes, eigen = self._processes, [n for n, plan in self._plans.items() if plan.codec == "eigen"]
        with processes.together():
            device = processes.device if block is None else block.device
            bases = {name: bases[name].to(device) for name in eigen}
            first = {name: _squares(name, basis, block) for name, basis in bases.items()}
        (examples,) = processes.total(0 if block is None else len(block))
        processes.sum_(first.values())
        with processes.together():
            if not examples:
                raise CaptureError("No row with a finite gradient was recorded; did the loss become NaN?")
            first = {name: squares / examples for name, squares in first.items()}
            wanted = _wanted_bytes(bases, first, block, bytes_per_example, error_budget)
        budget = wanted if error_budget is None else max(processes.gather(wanted))
        with processes.together():
            if not budget:
                budget = bytes_untried(int(examples), bytes_per_example, warns=processes.is_first)
            chosen = allocate(first, budget) if eigen else {}
            self.records = {
                name: EigenRecord(EigenCodec.of(bases[name], chosen[name]), first[name])
                if name in first
                else RowsFirstRecord(plan.codec_without_basis(), covariances.get(name))
                for name, plan in self._plans.items()
            }
            if processes.is_first:
                self._writer.create(self._arrays())
        with processes.together():
            if not processes.is_first:
                self._writer.join(self._arrays())
            invalid, self._invalid = self._invalid, []
            for part in invalid:
                self.write_invalid(part)

    def resume(
        self,
        records: Mapping[str, Any],
        bases: Mapping[str, Eigenbasis],
        covariances: Mapping[str, KroneckerCovariance],
        unfinished: str,
        step: int,
    ) -> None:
        """Go on with the unfinished file of an earlier run, all processes together.

        Args:
            records: their states.
            bases: as for `lay_out`.
            covariances: as for `lay_out`.
            unfinished: that file's name.
            step: of the checkpoint; rows from this step on are of a past that training has left.

        Raises:
            KeyError, ValueError: if layers are stored in another way now.
            StoreError: if the unfinished file is gone.
        """
        with self._processes.together():
            self.records = {
                name: EigenRecord.of_state(bases[name], records[name])
                if plan.codec == "eigen"
                else RowsFirstRecord(plan.codec_without_basis(), covariances.get(name))
                for name, plan in self._plans.items()
            }
            if self._processes.is_first:
                self._writer.take_over(self._arrays(), unfinished)
                self._writer.forget_rows(self._writer.read_column("step") >= step)
        self._writer.partial_path = self._processes.from_first(self._writer.partial_path)
        with self._processes.together():
            if not self._processes.is_first:
                self._writer.join(self._arrays())

    def write(self, block: Block | None) -> None:
        """Encode and write finite gradients."""
        if block is None:
            return
        gradients = block.gradients
        arrays = {name: _to_numpy(_encoded(record, gradients[name])) for name, record in self.records.items()}
        self._writer.write_rows(block.indices, columns=block.columns, arrays=arrays)

    def write_invalid(self, block: Block) -> None:
        """Mark examples without finite gradients."""
        if self.records:
            self._writer.write_rows(block.indices, columns=block.columns, arrays={})
        else:
            self._invalid.append(block)

    def counts(self) -> RecordedCounts:
        """Rows written, invalid and missing so far."""
        written = self._writer.read_column("written").astype(bool)
        valid = self._writer.read_column("valid").astype(bool)
        return RecordedCounts(int(written.sum()), int((written & ~valid).sum()), int((~written).sum()))

    def stored(self, indices: np.ndarray) -> dict[str, dict[str, Tensor]]:
        """The arrays of some rows, by layer, as they were written."""
        return {name: self._read(name, indices) for name in self.records}

    def valid_rows(self, name: str) -> Iterator[dict[str, Tensor]]:
        """All valid rows of a layer, each as often as its example was seen."""
        valid = torch.from_numpy(self._writer.read_column("valid")).bool()
        seen = torch.from_numpy(self._writer.read_column("occurrences"))
        for start in range(0, len(valid), READ_EXAMPLES):
            rows = slice(start, start + READ_EXAMPLES)
            times = seen[rows][valid[rows]]
            arrays = {key: array[valid[rows]] for key, array in self._read(name, rows).items()}
            is_once = bool((times == 1).all())
            yield arrays if is_once else {key: a.repeat_interleave(times, 0) for key, a in arrays.items()}

    def _read(self, name: str, indices: slice | np.ndarray) -> dict[str, Tensor]:
        return {key: torch.from_numpy(rows) for key, rows in self._writer.read_rows(name, indices).items()}

    def _arrays(self) -> dict[str, dict[str, ArraySpec]]:
        return {name: specs(record.codec) for name, record in self.records.items()}


def _squares(name: str, basis: Eigenbasis, block: Block | None) -> Tensor:
    """Sum of the squared coordinates of a block's gradients in a layer's basis."""
    if block is None:
        return basis.eigenvalues_A.new_zeros(basis.shape)
    return second_moment_sum(block.gradients[name], basis)


def _wanted_bytes(
    bases: Mapping[str, Eigenbasis],
    Lambdas: Mapping[str, Tensor],
    block: Block | None,
    most: int,
    error_budget: float | None,
) -> int:
    """The budget of this process's examples; 0 if it has too few to tell."""
    if error_budget is None or not Lambdas:
        return most
    if block is None or len(block) < LEAST_EXAMPLES:
        return 0
    return RowTrial(bases, Lambdas, block.gradients).least_bytes(error_budget, most)


def specs(codec: Codec) -> dict[str, ArraySpec]:
    """The row arrays of a layer, as a writer takes them."""
    return {name: ArraySpec(shape, dtype) for name, (shape, dtype) in codec.arrays().items()}


def _encoded(record: LayerRecord, gradient: LayerGradient) -> Mapping[str, Tensor]:
    if isinstance(gradient, EncodedGradient):
        return gradient.arrays
    return record.add(gradient if isinstance(gradient, Coordinates) else record.reduce(gradient))


def _to_numpy(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: array.cpu().numpy() for name, array in arrays.items()}

"""The core of capture without any framework: blocks of gradients in, one finished file out.

Steps are buffered into blocks of up to a thousand examples, so that covariances, rounding and
writing cost a few large operations instead of many small ones. A layer that needs an eigenbasis and
has none yet sends all blocks to a temporary spool, which is read again once at the end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_influence.blocks import Block, Spool
from lightning_influence.codecs import Codec, EigenCodec, select_coordinates
from lightning_influence.codecs.eigen import BYTES_PER_COORDINATE
from lightning_influence.errors import CaptureError, LayerError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.gradients import Coordinates, FactoredGradient, LayerGradient
from lightning_influence.layer_record import EigenRecord, LayerPlan, LayerRecord, RowsFirstRecord
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import StepGradients
from lightning_influence.store import COLUMNS, ArraySpec, StoreWriter

BLOCK_EXAMPLES = 1024
BLOCK_BYTES = 4 * 2**20  # larger steps gain nothing from being joined, and copying them costs
FIRST_EXAMPLES = 256  # at least, unless they take very much memory, by whose Lambda coordinates are chosen
FIRST_BYTES = 2**30
READ_EXAMPLES = 4096
COLUMN_BYTES = sum(np.dtype(dtype).itemsize for dtype, _ in COLUMNS.values())


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


class Recorder:
    """Writes one epoch's gradients and factors.

    Args:
        path: where the finished file will be.
        plans: how each layer is stored.
        num_examples: length of the dataset.
        store_id: what ties the file to its checkpoint.
        bases: eigenbases from the epoch before, for layers with the eigen codec.
        bytes_per_example: budget of the eigen codec over all its layers.
        keep_covariances: also sum the covariances of layers that have a basis, for the next epoch's.
        covariance_positions: how many positions of each example enter the covariances; None for all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plans: Mapping[str, LayerPlan],
        *,
        num_examples: int,
        store_id: str,
        bases: Mapping[str, Eigenbasis] | None = None,
        bytes_per_example: int = 8192,
        keep_covariances: bool = False,
        covariance_positions: int | None = None,
    ) -> None:
        self.plans = plans
        self.writer = StoreWriter(path, num_examples=num_examples, store_id=store_id)
        known = {n: diagonal_basis(plan.shape) for n, plan in plans.items() if plan.structure.is_diagonal}
        self._bases = {**known, **(bases or {})}
        self._bytes_per_example = bytes_per_example
        without_basis = {n for n, plan in plans.items() if plan.needs_basis and n not in self._bases}
        self._spool = Spool(self.writer.path) if without_basis else None
        self._covariances = {
            name: KroneckerCovariance(plan.shape, plan.structure, positions=covariance_positions)
            for name, plan in plans.items()
            if not plan.structure.is_diagonal
            and (keep_covariances or plan.codec != "eigen" or name in without_basis)
        }
        self._chooses_coordinates = any(plan.codec == "eigen" for plan in plans.values())
        self._is_first = True  # the next block, by which coordinates are chosen
        self._records: dict[str, LayerRecord] = {}
        self._buffer: list[Block] = []
        self._invalid: list[Block] = []
        self.loss: dict[str, object] = {}

    def update(self, step: StepGradients, indices: np.ndarray, *, step_index: int, learning_rate: float) -> None:
        """Take in one step's gradients.

        Args:
            step: of n examples.
            indices: their dataset indices, int64 [n].
            step_index: optimizer steps taken before this one.
            learning_rate: of the first parameter group at this step.
        """
        self._check_positions(step)
        self.loss = self.loss or step.scale.description
        step = StepGradients({name: self.reduce(name, g) for name, g in step.gradients.items()}, step.scale)
        self._buffer.append(Block.of_step(step, indices, step_index, learning_rate))
        examples = sum(len(block) for block in self._buffer)
        most, size = BLOCK_EXAMPLES, BLOCK_BYTES
        if self._is_first and self._chooses_coordinates:
            most, size = min(FIRST_EXAMPLES, BLOCK_EXAMPLES), FIRST_BYTES
        if examples >= most or sum(block.nbytes for block in self._buffer) >= size:
            self._flush()

    @property
    def reduced_layers(self) -> frozenset[str]:
        """Layers of which `reduce` takes a part; for these it may be called as soon as there are gradients."""
        return frozenset(name for name, record in self._records.items() if isinstance(record, EigenRecord))

    def reduce(self, name: str, gradient: LayerGradient) -> LayerGradient:
        """What rows will need of a layer's gradients, once it is known; call it once for each step."""
        record = self._records.get(name)
        if not isinstance(record, EigenRecord) or isinstance(gradient, Coordinates):
            return gradient
        if name in self._covariances:
            self._covariances[name].to(gradient.device).update(gradient.finite())
        return record.reduce(gradient)

    def next_bases(self) -> dict[str, Eigenbasis]:
        """Eigenbases of what was seen so far, for the layers with the eigen codec."""
        return {
            name: metric.eigenbasis() for name, metric in self._covariances.items() if self.plans[name].needs_basis
        }

    def factors(self) -> dict[str, ScoredLayer]:
        """Write what is buffered or spooled, and make every layer's factors.

        Raises:
            CaptureError: if not one row with a finite gradient was recorded.
        """
        self._flush()
        if self._spool is not None:
            self._bases |= self.next_bases()
            with self._spool as spool:
                for block in spool.blocks():
                    self._write(block)
            self._spool = None
        if not self._records:
            raise CaptureError("No row with a finite gradient was recorded; did the loss become NaN?")
        for block in self._invalid:
            self.writer.write_rows(block.indices, columns=block.columns, arrays={})
        return {name: record.finish(self._valid_rows(name)) for name, record in self._records.items()}

    def counts(self) -> RecordedCounts:
        """Rows written, invalid and missing so far."""
        written = self.writer.read_column("written").astype(bool)
        valid = self.writer.read_column("valid").astype(bool)
        return RecordedCounts(int(written.sum()), int((written & ~valid).sum()), int((~written).sum()))

    def stored_rows(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """The arrays of some rows, by layer, as they were written."""
        return {name: self._read(name, np.asarray(indices)) for name in self._records}

    def finish(
        self,
        layers: Mapping[str, ScoredLayer],
        *,
        attributes: Mapping[str, bool | int | float | str],
        documents: Mapping[str, object],
    ) -> None:
        """Add factors, attributes and documents, and put the finished file into place."""
        described = [
            {
                "name": name,
                "has_bias": self.plans[name].has_bias,
                "batch_dim": self.plans[name].batch_dim,
                "structure": self.plans[name].structure.to_builtins(),
                "codec": layer.codec.codec_id,
                "config": layer.codec.get_config(),
            }
            for name, layer in layers.items()
        ]
        counts = {f"rows_{name}": count for name, count in asdict(self.counts()).items()}
        bytes_per_row = sum(layer.codec.bytes_per_row for layer in layers.values())
        self.writer.finish(
            attributes={**attributes, **counts, "bytes_per_row": bytes_per_row},
            documents={**documents, "layers": described},
            factors={name: layer.to_arrays() for name, layer in layers.items()},
        )

    def discard(self) -> None:
        """Delete the unfinished file and the spool; may be called more than once."""
        self._buffer = []
        self.writer.discard()
        if self._spool is not None:
            self._spool.close()

    def _check_positions(self, step: StepGradients) -> None:
        for name, plan in self.plans.items():
            found = step.gradients[name].positions
            if plan.codec == "pairs" and not isinstance(step.gradients[name], FactoredGradient):
                raise LayerError(
                    f"Layer {name!r} was used in another way than in the first batch, so that its gradients are "
                    "no pairs; pass `codec='eigen'`."
                )
            if plan.codec == "pairs" and found > plan.positions:
                raise LayerError(
                    f"Layer {name!r} has {found} positions in an example, but rows of pairs were laid out "
                    f"for the {plan.positions} of the first batch; pass `codec='eigen'`, or pad all batches "
                    "alike."
                )

    def _flush(self) -> None:
        if not self._buffer:
            return
        block, invalid = Block.concatenate(self._buffer).split_invalid()
        self._buffer, self._is_first = [], False
        self._invalid.append(invalid)
        if not len(block):
            return
        for name, metric in self._covariances.items():
            if not isinstance(block.gradients[name], Coordinates):
                metric.to(block.device).update(block.gradients[name])
        if self._spool is None:
            self._write(block)
        else:
            self._spool.append(block)

    def _write(self, block: Block) -> None:
        if not self._records:
            self._bases = {name: _basis_on(block.device, basis) for name, basis in self._bases.items()}
            self._records = self._begin(block)
            self.writer.create({name: _specs(record.codec) for name, record in self._records.items()})
        gradients = block.gradients
        arrays = {
            name: _to_numpy(record.add(g if isinstance(g := gradients[name], Coordinates) else record.reduce(g)))
            for name, record in self._records.items()
        }
        self.writer.write_rows(block.indices, columns=block.columns, arrays=arrays)

    def _begin(self, block: Block) -> dict[str, LayerRecord]:
        """Lay out the rows; the first block's Lambda says which eigen-coordinates are worth keeping."""
        eigen = {name: self._bases[name] for name, plan in self.plans.items() if plan.codec == "eigen"}
        first = {name: second_moment_sum(block.gradients[name], eigen[name]) / len(block) for name in eigen}
        chosen = select_coordinates(first, self._bytes_per_example) if eigen else {}
        return {
            name: EigenRecord(EigenCodec(eigen[name], *chosen[name]), first[name])
            if name in eigen
            else RowsFirstRecord(plan.codec_without_basis(), self._covariances.get(name))
            for name, plan in self.plans.items()
        }

    def _read(self, name: str, indices: slice | np.ndarray) -> dict[str, Tensor]:
        return {key: torch.from_numpy(rows) for key, rows in self.writer.read_rows(name, indices).items()}

    def _valid_rows(self, name: str) -> Iterator[dict[str, Tensor]]:
        valid = torch.from_numpy(self.writer.read_column("valid")).bool()
        for start in range(0, len(valid), READ_EXAMPLES):
            rows = slice(start, start + READ_EXAMPLES)
            yield {key: array[valid[rows]] for key, array in self._read(name, rows).items()}


def expected_bytes_per_row(plans: Mapping[str, LayerPlan], bytes_per_example: int) -> int:
    """Bytes that one example's row arrays will take; exact for pairs, the most it can be for eigen."""
    pairs = sum(plan.codec_without_basis().bytes_per_row for plan in plans.values() if plan.codec != "eigen")
    coordinates = sum(o * i for o, i in (plan.shape for plan in plans.values() if plan.codec == "eigen"))
    return pairs + min(bytes_per_example, round(coordinates * BYTES_PER_COORDINATE))


def expected_file_bytes(plans: Mapping[str, LayerPlan], bytes_per_row: int, num_examples: int) -> int:
    """About the size of the whole file: rows, columns and float32 factors."""
    factors = 0
    for plan in plans.values():
        sides = (plan.structure.inputs_shape(plan.shape), plan.structure.outputs_shape(plan.shape), plan.shape)
        factors += 4 * sum(math.prod(side) for side in sides)
    return num_examples * (bytes_per_row + COLUMN_BYTES) + factors


def _basis_on(device: torch.device, basis: Eigenbasis) -> Eigenbasis:
    Q_A, Q_S = (None if Q is None else Q.to(device) for Q in (basis.Q_A, basis.Q_S))
    return Eigenbasis(Q_A, Q_S, basis.eigenvalues_A.to(device), basis.eigenvalues_S.to(device))


def _specs(codec: Codec) -> dict[str, ArraySpec]:
    return {name: ArraySpec(shape, dtype) for name, (shape, dtype) in codec.arrays().items()}


def _to_numpy(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: array.cpu().numpy() for name, array in arrays.items()}

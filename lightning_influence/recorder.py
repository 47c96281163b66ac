"""The core of capture without any framework: blocks of gradients in, one finished file out.

Steps are buffered into blocks of up to a thousand examples, so that covariances, rounding and
writing cost a few large operations instead of many small ones. A layer that needs an eigenbasis and
has none yet sends all blocks to a temporary spool, which is read again once at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_influence.blocks import Block, Spool
from lightning_influence.codecs import Codec, EigenCodec, select_coordinates
from lightning_influence.errors import CaptureError, LayerError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.gradients import Coordinates, FactoredGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layer_record import EigenRecord, LayerRecord, RowsFirstRecord
from lightning_influence.processes import ALONE, Processes
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import StepGradients
from lightning_influence.store import ArraySpec, StoreWriter

BLOCK_EXAMPLES = 1024
BLOCK_BYTES = 4 * 2**20  # larger steps gain nothing from being joined, and copying them costs
FIRST_EXAMPLES = 256  # at least, unless they take very much memory, by whose Lambda coordinates are chosen
FIRST_BYTES = 2**30
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


class Recorder:
    """Writes one epoch's gradients and factors.

    Several processes record into one file: each calls `update` with its own steps, `lay_out` once when
    `needs_layout`, `factors` and `finish`, all of them together.

    Args:
        writer: of the file; of several processes' writers the first process's makes it.
        plans: how each layer is stored.
        bases: eigenbases from the epoch before, for layers with the eigen codec.
        bytes_per_example: budget of the eigen codec over all its layers.
        keep_covariances: also sum the covariances of layers that have a basis, for the next epoch's.
        covariance_positions: how many positions of each example enter the covariances; None for all.
        processes: that record together.
    """

    def __init__(
        self,
        writer: StoreWriter,
        plans: Mapping[str, LayerPlan],
        *,
        bases: Mapping[str, Eigenbasis] | None = None,
        bytes_per_example: int = 8192,
        keep_covariances: bool = False,
        covariance_positions: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.plans = plans
        self.writer = writer
        self._processes = processes
        known = {n: diagonal_basis(plan.shape) for n, plan in plans.items() if plan.structure.is_diagonal}
        self._bases = {**known, **(bases or {})}
        self._bytes_per_example = bytes_per_example
        without_basis = {n for n, plan in plans.items() if plan.needs_basis and n not in self._bases}
        self._spool = Spool(self.writer.path) if without_basis else None
        self._covariances = {
            name: KroneckerCovariance(
                plan.shape, plan.structure, positions=covariance_positions, sync_on_compute=False
            )
            for name, plan in plans.items()
            if not plan.structure.is_diagonal
            and (keep_covariances or plan.codec != "eigen" or name in without_basis)
        }
        self._chooses_coordinates = any(plan.codec == "eigen" for plan in plans.values())
        self._records: dict[str, LayerRecord] = {}
        self._buffer: list[Block] = []
        self._invalid: list[Block] = []  # while there is no file
        self._seen = np.zeros(writer.num_examples, bool)  # by this process
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
        self._seen[indices] = True
        self.loss = self.loss or step.scale.description
        step = StepGradients({name: self.reduce(name, g) for name, g in step.gradients.items()}, step.scale)
        self._buffer.append(Block.of_step(step, indices, step_index, learning_rate))
        if self.needs_layout:
            if self._processes.is_alone and self.has_enough(*self.waiting):
                self._flush()
        elif sum(len(b) for b in self._buffer) >= BLOCK_EXAMPLES or self._buffered_bytes >= BLOCK_BYTES:
            self._flush()

    @property
    def needs_layout(self) -> bool:
        """Whether it is still to be chosen, by the first examples of all processes, what rows keep."""
        return not self._records and self._spool is None

    @property
    def waiting(self) -> tuple[int, int]:
        """Examples that wait for `lay_out`, and the bytes that they take."""
        return sum(len(block) for block in self._buffer), self._buffered_bytes

    def has_enough(self, examples: float, nbytes: float) -> bool:
        """Whether these are enough for `lay_out`."""
        if self._chooses_coordinates:
            return examples >= min(FIRST_EXAMPLES, BLOCK_EXAMPLES) or nbytes >= FIRST_BYTES
        return examples >= BLOCK_EXAMPLES or nbytes >= BLOCK_BYTES

    def lay_out(self) -> None:
        """Choose what rows keep, by what all processes have seen so far, and make the file."""
        with self._processes.together():
            block = self._taken()
        self._lay_out(block)
        with self._processes.together():
            self._write(block)

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
        """Write what is buffered or spooled, and make every layer's factors; empty but in the first process.

        Raises:
            CaptureError: if not one row with a finite gradient was recorded.
        """
        processes = self._processes
        if self.needs_layout:
            self.lay_out()
        with processes.together():
            self._flush()
        if not processes.is_alone:
            processes.sum_(t for m in self._covariances.values() for t in m.to(processes.device).sums)
        if self._spool is not None:
            self._write_spooled(self._spool)
        self._check_shared()
        records = self._records.values()
        processes.sum_(t for r in records if isinstance(r, EigenRecord) for t in r.eigenvalues.sums)
        if not processes.is_first:
            return {}
        return {name: record.finish(self._valid_rows(name)) for name, record in self._records.items()}

    def _check_shared(self) -> None:
        """Refuse an example that several processes saw: its row would be written by both at once."""
        if self._processes.is_alone:
            return
        seen = torch.from_numpy(self._seen.astype(np.int32)).to(self._processes.device)
        self._processes.sum_([seen])
        (shared,) = torch.nonzero(seen > 1, as_tuple=True)
        if len(shared):
            raise CaptureError(
                f"{len(shared)} examples were seen by several processes in one epoch (the first is "
                f"{int(shared[0])}), but a file holds one row an example; let each process draw its own, as "
                "`DistributedSampler` does."
            )

    def _write_spooled(self, spool: Spool) -> None:
        """Once the covariances are known: bases, then rows."""
        with self._processes.together():
            made = self.next_bases() if self._processes.is_first else {}
            made = {name: _basis_on(torch.device("cpu"), basis) for name, basis in made.items()}
        self._bases |= self._processes.from_first(made)
        with spool:
            with self._processes.together():
                blocks = spool.blocks()
                first = next(blocks, None)
            self._lay_out(first)
            with self._processes.together():
                for block in itertools.chain([] if first is None else [first], blocks):
                    self._write(block)
        self._spool = None

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
        with self._processes.together():
            if self._processes.is_first:
                self._finish(layers, attributes, documents)
            else:
                self.writer.leave()

    def _finish(
        self,
        layers: Mapping[str, ScoredLayer],
        attributes: Mapping[str, bool | int | float | str],
        documents: Mapping[str, object],
    ) -> None:
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

    @property
    def _buffered_bytes(self) -> int:
        return sum(block.nbytes for block in self._buffer)

    def _flush(self) -> None:
        block = self._taken()
        if block is None:
            return
        if self._spool is not None:
            self._spool.append(block)
            return
        if not self._records:
            self._lay_out(block)
        self._write(block)

    def _taken(self) -> Block | None:
        """The buffered examples with finite gradients, after the covariances have seen them."""
        if not self._buffer:
            return None
        block, invalid = Block.concatenate(self._buffer).split_invalid()
        self._buffer = []
        if len(invalid):
            self._write_invalid(invalid)
        if not len(block):
            return None
        for name, metric in self._covariances.items():
            if not isinstance(block.gradients[name], Coordinates):
                metric.to(block.device).update(block.gradients[name])
        return block

    def _write_invalid(self, block: Block) -> None:
        if self._records:
            self.writer.write_rows(block.indices, columns=block.columns, arrays={})
        else:
            self._invalid.append(block)

    def _write(self, block: Block | None) -> None:
        if block is None:
            return
        gradients = block.gradients
        arrays = {
            name: _to_numpy(record.add(g if isinstance(g := gradients[name], Coordinates) else record.reduce(g)))
            for name, record in self._records.items()
        }
        self.writer.write_rows(block.indices, columns=block.columns, arrays=arrays)

    def _lay_out(self, block: Block | None) -> None:
        """Choose what rows keep, and make the file; the first block's Lambda says which coordinates are worth it.

        Raises:
            CaptureError: if no process has seen a finite gradient.
        """
        processes, eigen = self._processes, [n for n, plan in self.plans.items() if plan.codec == "eigen"]
        with processes.together():
            device = processes.device if block is None else block.device
            self._bases = {name: _basis_on(device, basis) for name, basis in self._bases.items()}
            first = {name: self._squares(name, block) for name in eigen}
        (examples,) = processes.total(0 if block is None else len(block))
        if not examples:
            raise CaptureError("No row with a finite gradient was recorded; did the loss become NaN?")
        processes.sum_(first.values())
        with processes.together():
            first = {name: squares / examples for name, squares in first.items()}
            chosen = select_coordinates(first, self._bytes_per_example) if eigen else {}
            self._records = {
                name: EigenRecord(EigenCodec(self._bases[name], *chosen[name]), first[name])
                if name in first
                else RowsFirstRecord(plan.codec_without_basis(), self._covariances.get(name))
                for name, plan in self.plans.items()
            }
        self._make_file()

    def _make_file(self) -> None:
        arrays = {name: _specs(record.codec) for name, record in self._records.items()}
        with self._processes.together():
            if self._processes.is_first:
                self.writer.create(arrays)
        with self._processes.together():
            if not self._processes.is_first:
                self.writer.join(arrays)
            invalid, self._invalid = self._invalid, []
            for block in invalid:
                self._write_invalid(block)

    def _squares(self, name: str, block: Block | None) -> Tensor:
        """Sum of the squared coordinates of a block's gradients in a layer's basis."""
        basis = self._bases[name]
        if block is None:
            return basis.eigenvalues_A.new_zeros(basis.shape)
        return second_moment_sum(block.gradients[name], basis)

    def _read(self, name: str, indices: slice | np.ndarray) -> dict[str, Tensor]:
        return {key: torch.from_numpy(rows) for key, rows in self.writer.read_rows(name, indices).items()}

    def _valid_rows(self, name: str) -> Iterator[dict[str, Tensor]]:
        """All valid rows, each as often as its example was seen."""
        valid = torch.from_numpy(self.writer.read_column("valid")).bool()
        seen = torch.from_numpy(self.writer.read_column("occurrences"))
        for start in range(0, len(valid), READ_EXAMPLES):
            rows = slice(start, start + READ_EXAMPLES)
            times = seen[rows][valid[rows]]
            arrays = {key: array[valid[rows]] for key, array in self._read(name, rows).items()}
            is_once = bool((times == 1).all())
            yield arrays if is_once else {key: a.repeat_interleave(times, 0) for key, a in arrays.items()}


def _basis_on(device: torch.device, basis: Eigenbasis) -> Eigenbasis:
    Q_A, Q_S = (None if Q is None else Q.to(device) for Q in (basis.Q_A, basis.Q_S))
    return Eigenbasis(Q_A, Q_S, basis.eigenvalues_A.to(device), basis.eigenvalues_S.to(device))


def _specs(codec: Codec) -> dict[str, ArraySpec]:
    return {name: ArraySpec(shape, dtype) for name, (shape, dtype) in codec.arrays().items()}


def _to_numpy(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: array.cpu().numpy() for name, array in arrays.items()}

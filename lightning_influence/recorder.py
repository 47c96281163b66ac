"""The core of capture without any framework: blocks of gradients in, one finished file out.

Steps are buffered into blocks of up to a thousand examples, so that covariances, rounding and
writing cost a few large operations instead of many small ones. A layer that needs an eigenbasis and
has none yet sends all blocks to a temporary spool, which is read again once at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.blocks import Block, Spool, joined_until
from lightning_influence.errors import CaptureError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.fisher import LabelFactors
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.gradients import Coordinates, EncodedGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan, check_gradients
from lightning_influence.layer_record import EigenRecord, LayerRecord, describe_layers
from lightning_influence.processes import ALONE, Processes
from lightning_influence.row_file import RecordedCounts, RowFile
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import StepGradients
from lightning_influence.store import StoreWriter

BLOCK_EXAMPLES = 1024
BLOCK_BYTES = 4 * 2**20  # larger steps gain nothing from being joined, and copying them costs
FIRST_EXAMPLES = 256  # at least, unless they take very much memory, by whose Lambda coordinates are chosen
FIRST_BYTES = 2**30


class Recorder:
    """Writes one epoch's gradients and factors.

    Several processes record into one file: each calls `update` with its own steps, `lay_out` once when
    `needs_layout`, `factors` and `finish`, all of them together.

    Args:
        writer: of the file; of several processes' writers the first process's makes it.
        plans: how each layer is stored.
        bases: eigenbases from the epoch before, for layers with the eigen codec.
        bytes_per_example: budget of the eigen codec over all its layers.
        error_budget: as for `RowFile.lay_out`.
        keep_covariances: also sum the covariances of layers that have a basis, for the next epoch's.
        covariance_positions: how many positions of each example enter the covariances; None for all.
        makes_factors: whether `factors` will be called; rows that are merged later need no covariances.
        at_once: encode each step's gradients as soon as there are any, and gather no blocks.
        has_own_labels: whether covariances and Lambda are of gradients that `add_labels` is given, and not of
            those of the rows.
        processes: that record together.

    Attributes:
        covariances: of the layers that need any; after `end_rows` those of all processes.
        labels: sums over gradients that are not the rows' own; None if there are none.
    """

    def __init__(
        self,
        writer: StoreWriter,
        plans: Mapping[str, LayerPlan],
        *,
        bases: Mapping[str, Eigenbasis] | None = None,
        bytes_per_example: int = 8192,
        error_budget: float | None = None,
        keep_covariances: bool = False,
        covariance_positions: int | None = None,
        makes_factors: bool = True,
        at_once: bool = False,
        has_own_labels: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.plans = plans
        self._at_once = at_once
        self._block_examples = 1 if at_once else BLOCK_EXAMPLES
        self.writer = writer
        self._processes = processes
        known = {n: diagonal_basis(plan.shape) for n, plan in plans.items() if plan.structure.is_diagonal}
        self._bases = {**known, **(bases or {})}
        self._bytes_per_example, self.error_budget = bytes_per_example, error_budget
        without_basis = {n for n, plan in plans.items() if plan.needs_basis and n not in self._bases}
        self._spool = Spool(self.writer.path) if without_basis else None
        self.covariances = {
            name: KroneckerCovariance(p.shape, p.structure, positions=covariance_positions, sync_on_compute=False)
            for name, p in plans.items()
            if makes_factors
            and not p.structure.is_diagonal
            and (keep_covariances or p.codec != "eigen" or name in without_basis)
        }
        self.labels = LabelFactors(plans, self.covariances, self._bases, writer.path) if has_own_labels else None
        self._chooses_coordinates = any(plan.codec == "eigen" for plan in plans.values())
        self._rows = RowFile(writer, plans, processes)
        self._buffer: list[Block] = []
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
        check_gradients(self.plans, step.gradients)
        if self.labels is not None:
            self.labels.end_step()
        self._seen[indices] = True
        self.loss = self.loss or step.scale.description
        step = StepGradients({name: self.reduce(name, g) for name, g in step.gradients.items()}, step.scale)
        self._buffer.append(Block.of_step(step, indices, step_index, learning_rate))
        if self.needs_layout:
            if self._processes.is_alone and self.has_enough(*self.waiting):
                self._flush()
        elif sum(len(b) for b in self._buffer) >= self._block_examples or self._buffered_bytes >= BLOCK_BYTES:
            self._flush()

    @property
    def label_sink(self) -> Callable[[Mapping[str, LayerGradient]], None] | None:
        """`add_labels` if there are such labels."""
        return None if self.labels is None else self.add_labels

    def add_labels(self, gradients: Mapping[str, LayerGradient]) -> None:
        """Take in a pass of the step that `update` is given next, under labels that are not the rows'."""
        assert self.labels is not None
        records = self._rows.records.items()
        self.labels.add(gradients, {n: record.codec for n, record in records if isinstance(record, EigenRecord)})

    @property
    def examples(self) -> int:
        """How many different ones this process has seen."""
        return int(self._seen.sum())

    @property
    def needs_layout(self) -> bool:
        """Whether it is still to be chosen, by the first examples of all processes, what rows keep."""
        return not self._rows.records and self._spool is None

    @property
    def waiting(self) -> tuple[int, int]:
        """Examples that wait for `lay_out`, and the bytes that they take."""
        return sum(len(block) for block in self._buffer), self._buffered_bytes

    def has_enough(self, examples: float, nbytes: float) -> bool:
        """Whether these are enough for `lay_out`."""
        if self._chooses_coordinates:
            return examples >= min(FIRST_EXAMPLES, BLOCK_EXAMPLES) or nbytes >= FIRST_BYTES
        return examples >= self._block_examples or nbytes >= BLOCK_BYTES

    def lay_out(self) -> None:
        """Choose what rows keep, by what all processes have seen so far, and make the file."""
        with self._processes.together():
            block = self._taken()
        self._lay_out(block)
        with self._processes.together():
            self._rows.write(block)

    def _lay_out(self, block: Block | None) -> None:
        self._rows.lay_out(block, self._bases, self.covariances, self._bytes_per_example, self.error_budget)

    @property
    def reduced_layers(self) -> frozenset[str]:
        """Layers of which `reduce` makes less; for these it may be called as soon as there are gradients."""
        records = self._rows.records.items()
        return frozenset(name for name, record in records if self._at_once or isinstance(record, EigenRecord))

    def reduce(self, name: str, gradient: LayerGradient) -> LayerGradient:
        """What rows will need of a layer's gradients, once it is known; call it once for each step."""
        record = self._rows.records.get(name)
        if isinstance(gradient, Coordinates | EncodedGradient) or record is None:
            return gradient
        if not isinstance(record, EigenRecord):
            return self._encoded(name, gradient, record) if self._at_once else gradient
        if name in self.covariances and self.labels is None:
            self.covariances[name].to(gradient.device).update(gradient.finite())
        return record.reduce(gradient)

    def _encoded(self, name: str, gradient: LayerGradient, record: LayerRecord) -> EncodedGradient:
        check_gradients({name: self.plans[name]}, {name: gradient})
        finite = gradient.is_finite()
        if name in self.covariances and self.labels is None:
            self.covariances[name].to(gradient.device).update(gradient if finite.all() else gradient[finite])
        return EncodedGradient(record.add(gradient), finite, gradient.shape)

    def next_bases(self) -> dict[str, Eigenbasis]:
        """Eigenbases of what was seen so far, for the layers with the eigen codec."""
        metrics = self.covariances.items()
        return {name: metric.eigenbasis() for name, metric in metrics if self.plans[name].needs_basis}

    def counts(self) -> RecordedCounts:
        """Rows written, invalid and missing so far."""
        return self._rows.counts()

    def stored_rows(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """The arrays of some rows, by layer, as they were written."""
        return self._rows.stored(np.asarray(indices))

    def factors(self) -> dict[str, ScoredLayer]:
        """Write what is buffered or spooled, and make every layer's factors; empty but in the first process.

        Raises:
            CaptureError: if not one row with a finite gradient was recorded.
        """
        self.end_rows()
        processes = self._processes
        eigen = [record for record in self._rows.records.values() if isinstance(record, EigenRecord)]
        processes.sum_(total for record in eigen for total in record.eigenvalues.sums)
        layers: dict[str, ScoredLayer] = {}
        with processes.together():
            if processes.is_first:
                records = self._rows.records
                has_rows = self.labels is None  # Lambda is of them
                layers = {
                    name: record.finish(self._rows.valid_rows(name) if has_rows else ())
                    for name, record in records.items()
                }
        return layers if self.labels is None else self._under_labels(self.labels, layers)

    def _under_labels(self, labels: LabelFactors, layers: dict[str, ScoredLayer]) -> dict[str, ScoredLayer]:
        """The layers with the eigenvalues of their own labels."""
        processes = self._processes
        bases = {name: layer.basis for name, layer in layers.items()}
        if not processes.is_alone:
            bases = processes.from_first({name: basis.to("cpu") for name, basis in bases.items()})
        labels.finish(bases, processes)
        with processes.together():
            return {n: replace(layer, Lambda=labels.Lambda(n, layer.codec)) for n, layer in layers.items()}

    def end_rows(self) -> None:
        """Write what is buffered or spooled, and add up the processes' covariances.

        Raises:
            CaptureError: if not one row with a finite gradient was recorded.
        """
        processes = self._processes
        if self.needs_layout:
            self.lay_out()
        with processes.together():
            self._flush()
        if not processes.is_alone:
            processes.sum_(t for m in self.covariances.values() for t in m.to(processes.device).sums)
        if self._spool is not None:
            self._write_spooled(self._spool)
        if not processes.is_alone:
            _check_own(self._seen, processes)

    def _write_spooled(self, spool: Spool) -> None:
        """Once the covariances are known: bases, then rows."""
        with self._processes.together():
            made = self.next_bases() if self._processes.is_first else {}
            made = {name: basis.to("cpu") for name, basis in made.items()}
        self._bases |= self._processes.from_first(made)
        with spool:
            with self._processes.together():
                blocks = spool.blocks()
                first = joined_until(self.has_enough, blocks)
            self._lay_out(first)
            with self._processes.together():
                for block in itertools.chain([] if first is None else [first], blocks):
                    self._rows.write(block)
        self._spool = None

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
        counts = {f"rows_{name}": count for name, count in asdict(self.counts()).items()}
        bytes_per_row = sum(layer.codec.bytes_per_row for layer in layers.values())
        self.writer.finish(
            attributes={**attributes, **counts, "bytes_per_row": bytes_per_row},
            documents={**documents, "layers": describe_layers(self.plans, layers)},
            factors={name: layer.to_arrays() for name, layer in layers.items()},
        )

    def state(self) -> dict[str, Any] | None:
        """What `resume` needs to go on, in plain values; None while there are no rows, or with own labels."""
        if self.labels is not None:
            return None
        if self.needs_layout and self._processes.is_alone and not self._chooses_coordinates:
            self._flush()
        if not self._rows.records:
            return None
        self._flush()
        return {
            "covariances": {name: [t.detach().cpu() for t in m.sums] for name, m in self.covariances.items()},
            "records": {name: record.state() for name, record in self._rows.records.items()},
            "seen": torch.from_numpy(self._seen.astype(np.uint8)),
            "loss": dict(self.loss),
            "unfinished": self.writer.partial_path.name,
        }

    def resume(self, state: Mapping[str, Any], *, step: int, device: torch.device) -> None:
        """Go on with the rows that an earlier run has left in the unfinished file.

        Args:
            state: of that run's recorder.
            step: of the checkpoint; rows from this step on are of a past that training has left.
            device: where gradients will be.

        Raises:
            KeyError, ValueError: if layers are stored in another way now.
            StoreError: if the unfinished file is gone.
        """
        with self._processes.together():
            self._bases = {name: basis.to(device) for name, basis in self._bases.items()}
            for name, metric in self.covariances.items():
                metric.load_sums(state["covariances"].get(name))
                metric.to(device)
            self.loss = dict(state["loss"])
            self._seen = state["seen"].numpy().astype(bool)
        self._rows.resume(state["records"], self._bases, self.covariances, state["unfinished"], step)

    def suspend(self) -> None:
        """Leave the unfinished file for a resumed run; the spool goes."""
        self._buffer = []
        self.writer.suspend()
        for spool in (self._spool, self.labels):
            if spool is not None:
                spool.close()

    def discard(self) -> None:
        """Delete the unfinished file and the spool; may be called more than once."""
        self._buffer = []
        self.writer.discard()
        for spool in (self._spool, self.labels):
            if spool is not None:
                spool.close()

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
        if not self._rows.records:
            self._lay_out(block)
        self._rows.write(block)

    def _taken(self) -> Block | None:
        """The buffered examples with finite gradients, after the covariances have seen them."""
        if not self._buffer:
            return None
        block, invalid = Block.concatenate(self._buffer).split_invalid()
        self._buffer = []
        if len(invalid):
            self._rows.write_invalid(invalid)
        if not len(block):
            return None
        for name, metric in self.covariances.items() if self.labels is None else ():
            if not isinstance(block.gradients[name], Coordinates | EncodedGradient):
                metric.to(block.device).update(block.gradients[name])
        return block


def _check_own(seen: np.ndarray, processes: Processes) -> None:
    """Refuse an example that several processes saw: its row would be written by both at once."""
    times = torch.from_numpy(seen.astype(np.int32)).to(processes.device)
    processes.sum_([times])
    shared = torch.nonzero(times > 1).flatten()
    if len(shared):
        raise CaptureError(
            f"{len(shared)} examples were seen by several processes in one epoch (the first is {int(shared[0])}), "
            "but a file holds one row an example; let each process draw its own, as `DistributedSampler` does."
        )

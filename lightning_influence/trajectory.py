"""The trajectory: the gradients of several epochs, added up to one row an example.

Each captured epoch's rows wait on disk, whole and nearly exact (float16). When training is over they become
one row an example, in one eigenbasis a layer. With w_e the mean learning rate of epoch e and c_en how often it
has trained on example n (nearly always once),

    G_n = sum_e w_e c_en G_en / sum_e w_e,

the sum of TracIn (Pruthi et al. 2020, arXiv:2002.08484, Eq. (1)), but for the query's gradient, which is that of
the final weights, and in EK-FAC's metric: basis and Lambda are those of the epochs' Fisher matrices averaged
with the same weights. The weight is the epoch's and never a step's: within one epoch of a decaying schedule, a
step's would weigh examples by their place in the shuffled order. An epoch that did not see an example, or had no
finite gradient of it, adds nothing to its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import DenseCodec, EigenCodec, PairsCodec, select_coordinates
from lightning_influence.curvature import HeuristicDamping, get_curvature
from lightning_influence.errors import CaptureError
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.functional.products import inner_products
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layer_record import describe_layers
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.processes import ALONE, Processes
from lightning_influence.recorder import Recorder
from lightning_influence.row_file import RecordedCounts, specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreWriter

CHUNK_BYTES = 8 * 2**20  # of gradients that are added up at a time: what stays in a processor's cache
SAMPLES = 2048  # gradients, of all epochs together, of which Lambda is made
SAMPLED_EXAMPLES = 128  # at least, unless there are fewer
QUERIES = 16


@dataclass(frozen=True)
class EpochRows:
    """One epoch's rows on disk.

    Args:
        epoch: its number.
        writer: of the unfinished file in which they are, open.
        weights: mean learning rate of each layer's parameters in that epoch.
        facts: what the merged file says of the epoch, plain values.
    """

    epoch: int
    writer: StoreWriter
    weights: Mapping[str, float]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Merged:
    """What a merge has found.

    Args:
        layers: basis, Lambda and codec of each layer.
        counts: rows of the examples that any epoch has seen.
        codec_spearman: of scores of the stored rows and of the rows before they were rounded and cut; NaN with
            fewer than three examples.
    """

    layers: dict[str, ScoredLayer]
    counts: RecordedCounts
    codec_spearman: float


class Trajectory:
    """Epochs' rows, until they are merged.

    Several processes add what they have recorded together; the first one merges.

    Args:
        plans: how layers are stored until then, "pairs" or "dense".
        processes: that record together.
    """

    def __init__(self, plans: Mapping[str, LayerPlan], processes: Processes = ALONE) -> None:
        self.epochs: list[EpochRows] = []
        self._plans, self._processes = plans, processes
        self._codecs: dict[str, PairsCodec | DenseCodec] = {
            name: plan.codec_without_basis() for name, plan in plans.items()
        }
        self._covariances: dict[str, list[Tensor]] = {}  # by layer: weighted sums of A and S, on the CPU
        self._covariance_weights: dict[str, float] = {}

    def add(
        self, recorder: Recorder, *, epoch: int, weights: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        """Take over an epoch's rows, all processes together.

        Args:
            recorder: of the epoch, with all its steps; not to be used any more.
            epoch: its number.
            weights: by layer.
            facts: what the merged file is to say of the epoch, plain values.

        Raises:
            CaptureError: if not one row with a finite gradient was recorded.
        """
        recorder.end_rows()
        with self._processes.together():
            for name, metric in recorder.covariances.items():
                factors = [factor.detach().cpu() * weights[name] for factor in metric.compute()]
                if name in self._covariances:
                    factors = [a + b for a, b in zip(self._covariances[name], factors, strict=True)]
                self._covariances[name] = factors
                self._covariance_weights[name] = self._covariance_weights.get(name, 0.0) + weights[name]
            counts = {f"rows_{name}": count for name, count in asdict(recorder.counts()).items()}
            if not self._processes.is_first:
                recorder.writer.leave()
            self.epochs.append(EpochRows(epoch, recorder.writer, dict(weights), {**facts, **counts}))

    def merge(self, writer: StoreWriter, *, bytes_per_example: int) -> Merged:
        """Make and write one row an example; `write` of the writer's file ends it.

        Args:
            writer: of the file, new.
            bytes_per_example: budget of a row over all layers.

        Raises:
            CaptureError: if there are no epochs, or all weights of a layer are zero or not finite.
        """
        examples = _Examples(self.epochs, writer.num_examples)
        weights = self._weights()
        sample = examples.sample(max(SAMPLED_EXAMPLES, SAMPLES // len(self.epochs)))
        bases = {name: self._basis(name) for name in self._plans}
        Lambdas = {name: self._mean_squares(name, bases[name], sample, examples, weights[name]) for name in bases}
        chosen = select_coordinates(Lambdas, bytes_per_example)
        codecs = {name: EigenCodec(basis, *chosen[name]) for name, basis in bases.items()}
        layers = {name: ScoredLayer(bases[name], Lambdas[name], codec) for name, codec in codecs.items()}
        writer.create({name: specs(codec) for name, codec in codecs.items()})
        for rows in examples.chunks(self._chunk_examples()):
            arrays = {
                name: codec.encode(self._summed(name, rows, examples, weights[name]))
                for name, codec in codecs.items()
            }
            writer.write_rows(
                rows,
                columns=examples.columns(rows),
                arrays={name: {key: a.numpy() for key, a in named.items()} for name, named in arrays.items()},
            )
        examples.write_invalid(writer)
        agreement = self._agreement(layers, sample[:SAMPLED_EXAMPLES], examples, weights)
        return Merged(layers, examples.counts(), agreement)

    def finish(
        self,
        writer: StoreWriter,
        merged: Merged,
        *,
        attributes: Mapping[str, bool | int | float | str],
        documents: Mapping[str, object],
    ) -> None:
        """Add factors, attributes and documents, and put the merged file into place."""
        counts = {f"rows_{name}": count for name, count in asdict(merged.counts).items()}
        bytes_per_row = sum(layer.codec.bytes_per_row for layer in merged.layers.values())
        described = [{"epoch": e.epoch, "weights": dict(e.weights), **e.facts} for e in self.epochs]
        writer.finish(
            attributes={**attributes, **counts, "bytes_per_row": bytes_per_row, "epochs_merged": len(self.epochs)},
            documents={
                **documents,
                "layers": describe_layers(self._plans, merged.layers),
                "trajectory": {"weighting": "mean learning rate", "epochs": described},
            },
            factors={name: layer.to_arrays() for name, layer in merged.layers.items()},
        )

    def state(self) -> dict[str, Any]:
        """What `resume` needs, in plain values."""
        return {
            "covariances": {name: list(sums) for name, sums in self._covariances.items()},
            "covariance_weights": dict(self._covariance_weights),
            "epochs": [
                {
                    "epoch": epoch.epoch,
                    "unfinished": epoch.writer.partial_path.name,
                    "weights": dict(epoch.weights),
                    "facts": dict(epoch.facts),
                }
                for epoch in self.epochs
            ],
        }

    def resume(self, state: Mapping[str, Any], path: Path, *, num_examples: int, store_id: str) -> list[int]:
        """Go on with the rows that an earlier run has left, in all processes.

        Args:
            state: that run's.
            path: of the file that they will be merged into.
            num_examples: length of the dataset.
            store_id: of the run.

        Returns:
            Epochs whose rows are not there any more.

        Raises:
            StoreError: if a file is of another run or layout.
        """
        self._covariances = {name: list(sums) for name, sums in state["covariances"].items()}
        self._covariance_weights = dict(state["covariance_weights"])
        lost = []
        for entry in state["epochs"]:
            writer = epoch_writer(path, entry["epoch"], num_examples=num_examples, store_id=store_id)
            writer.partial_path = path.with_name(entry["unfinished"])
            if not writer.partial_path.exists():
                lost.append(entry["epoch"])
                continue
            if self._processes.is_first:
                writer.join({name: specs(codec) for name, codec in self._codecs.items()})
            self.epochs.append(EpochRows(entry["epoch"], writer, entry["weights"], entry["facts"]))
        return lost

    def suspend(self) -> None:
        """Leave the epochs' rows on disk for a resumed run; nothing may be added or merged any more."""
        for epoch in self.epochs:
            epoch.writer.suspend()
        self.epochs = []

    def discard(self) -> None:
        """Delete the epochs' rows; may be called more than once."""
        for epoch in self.epochs:
            epoch.writer.suspend()
            if self._processes.is_first:
                epoch.writer.partial_path.unlink(missing_ok=True)
        self.epochs = []

    def _weights(self) -> dict[str, list[float]]:
        """By layer, each epoch's share of the sum."""
        if not self.epochs:
            raise CaptureError("There are no captured epochs to merge.")
        shares = {}
        for name in self._plans:
            weights = [epoch.weights[name] for epoch in self.epochs]
            total = sum(weights)
            if not 0 < total < math.inf:
                raise CaptureError(
                    f"The learning rates of layer {name!r} in epochs {[e.epoch for e in self.epochs]} are {weights}, "
                    'so that they give epochs no weights; pass `trajectory="segments"`, which keeps epochs apart.'
                )
            shares[name] = [weight / total for weight in weights]
        return shares

    def _basis(self, name: str) -> Eigenbasis:
        plan = self._plans[name]
        if plan.structure.is_diagonal:
            return diagonal_basis(plan.shape)
        A, S = (factor / self._covariance_weights[name] for factor in self._covariances[name])
        return eigenbasis(A, S, plan.structure)

    def _mean_squares(
        self, name: str, basis: Eigenbasis, sample: np.ndarray, examples: _Examples, weights: list[float]
    ) -> Tensor:
        """Mean squared coordinates of the sampled examples' gradients, averaged over epochs."""
        total = torch.zeros(basis.shape)
        for number, share in enumerate(weights):
            times = examples.times(number, sample)
            seen = np.repeat(sample, times)
            if share and len(seen):
                total += second_moment_sum(self._read(name, number, seen), basis) * (share / len(seen))
        return total

    def _summed(self, name: str, rows: np.ndarray, examples: _Examples, weights: list[float]) -> LayerGradient:
        """The weighted sum over the epochs of some examples' gradients."""
        inputs, grads, dense = [], [], None
        for number, share in enumerate(weights):
            factor = torch.from_numpy(examples.times(number, rows) * share).float().view(-1, 1, 1)
            if not factor.any():
                continue
            gradient = self._read(name, number, rows)
            if isinstance(gradient, FactoredGradient):
                inputs.append(gradient.inputs)
                grads.append(gradient.output_grads.mul_(factor))
            elif dense is None:
                dense = gradient.dense().mul_(factor)
            else:
                dense.addcmul_(gradient.dense(), factor)
        if inputs:
            return FactoredGradient(torch.cat(inputs, dim=1), torch.cat(grads, dim=1))
        return DenseGradient(torch.zeros(len(rows), *self._plans[name].shape) if dense is None else dense)

    def _read(self, name: str, number: int, rows: np.ndarray) -> FactoredGradient | DenseGradient:
        arrays = self.epochs[number].writer.read_rows(name, rows)
        return self._codecs[name].decode_gradient({key: torch.from_numpy(array) for key, array in arrays.items()})

    def _chunk_examples(self) -> int:
        """How many examples' gradients are added up at a time."""
        most = 1
        for plan in self._plans.values():
            o, i = plan.shape
            is_pairs = plan.codec == "pairs"
            most = max(most, len(self.epochs) * plan.positions * (o + i) if is_pairs else 2 * o * i)
        return max(1, min(512, CHUNK_BYTES // (4 * most)))

    def _agreement(
        self,
        layers: Mapping[str, ScoredLayer],
        sample: np.ndarray,
        examples: _Examples,
        weights: Mapping[str, list[float]],
    ) -> float:
        """Of scores of stored and of exact rows; queries are gradients of the last epoch."""
        if len(sample) < 3:
            return math.nan
        asked_rows = sample[:QUERIES]
        scores = torch.zeros(2, len(asked_rows), len(sample))
        for name, layer in layers.items():
            inverse = get_curvature("ekfac").inverse_eigenvalues(layer.basis, layer.Lambda, HeuristicDamping())
            queries = self._read(name, len(self.epochs) - 1, asked_rows)
            asked = layer.basis.rotate(queries) * inverse
            rows = self._summed(name, sample, examples, weights[name])
            stored = layer.codec.scores(layer.codec.project(asked, layer.basis), layer.codec.encode(rows))
            scores += torch.stack([stored, inner_products(rows, layer.basis.rotate_back(asked))])
        others = ~torch.eye(len(asked_rows), len(sample), dtype=torch.bool)  # a query's own row is no news
        stored, exact = (each[others].view(len(asked_rows), -1) for each in scores)
        return mean_rank_correlation(stored, exact)


def epoch_writer(path: Path, epoch: int, *, num_examples: int, store_id: str) -> StoreWriter:
    """Of one epoch's rows, beside the file at `path` that they will be merged into."""
    beside = path.with_name(f"{path.name}.epoch{epoch}")
    return StoreWriter(beside, num_examples=num_examples, store_id=store_id, segment=epoch)


class _Examples:
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

    def times(self, number: int, rows: np.ndarray) -> np.ndarray:
        """How often an epoch's gradients of some examples count."""
        return self._times[number][rows]

    def sample(self, size: int) -> np.ndarray:
        """Up to so many examples, at random but always the same."""
        return np.random.default_rng(0).permutation(np.flatnonzero(self.valid))[:size]  # an own generator

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


_COLUMNS = ("written", "valid", "occurrences", "loss", "label", "step", "learning_rate")

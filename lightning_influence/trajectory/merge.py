"""The trajectory: the gradients of several epochs, added up to one row an example.

Each captured epoch's rows wait on disk, whole and nearly exact (float16). When training is over they become
one row an example, in one eigenbasis a layer. With w_e the mean learning rate of epoch e and c_en how often it
has trained on example n (nearly always once),

    G_n = sum_e w_e c_en G_en / sum_e w_e,

the sum of TracIn (Pruthi et al. 2020, arXiv:2002.08484), but for the query's gradient, which is that of
the final weights, and in EK-FAC's metric: basis and Lambda are those of the epochs' Fisher matrices averaged
with the same weights. The weight is the epoch's and never a step's: within one epoch of a decaying schedule, a
step's would weigh examples by their place in the shuffled order. An epoch that did not see an example, or had no
finite gradient of it, adds nothing to its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import DenseCodec, EigenCodec, choose_bits, select_coordinates
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
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.rows import EpochRows, epoch_writer

CHUNK_BYTES = 8 * 2**20  # of gradients that are added up at a time: what stays in a processor's cache
SAMPLES = 1024  # gradients, of all epochs together, of which Lambda is made
SAMPLED_EXAMPLES = 128  # at least, unless there are fewer
QUERIES = 16


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

    Several processes add what they have recorded together; the first one merges. The merged rows have the layers
    of the last epoch; to those that were not trained in an epoch, it adds nothing.

    Args:
        processes: that record together.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.epochs: list[EpochRows] = []
        self._processes = processes
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
            rows = EpochRows(epoch, recorder.writer, dict(recorder.plans), dict(weights), {**facts, **counts})
            self.epochs.append(rows)

    def merge(self, writer: StoreWriter, *, bytes_per_example: int) -> Merged:
        """Make and write one row an example; `write` of the writer's file ends it.

        Args:
            writer: of the file, new.
            bytes_per_example: budget of a row over all layers.

        Raises:
            CaptureError: if there are no epochs, or all weights of a layer are zero or not finite.
        """
        examples = Examples(self.epochs, writer.num_examples)
        weights = self._weights()
        sample = examples.sample(max(SAMPLED_EXAMPLES, SAMPLES // len(self.epochs)))
        bases = {name: self._basis(name) for name in self._plans}
        Lambdas = {name: self._mean_squares(name, bases[name], sample, examples, weights[name]) for name in bases}
        bits = choose_bits(Lambdas, bytes_per_example)
        chosen = select_coordinates(Lambdas, bytes_per_example, bits)
        codecs = {name: EigenCodec(basis, *chosen[name], bits) for name, basis in bases.items()}
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
                    "positions": {name: plan.positions for name, plan in epoch.plans.items()},
                    "weights": dict(epoch.weights),
                    "facts": dict(epoch.facts),
                }
                for epoch in self.epochs
            ],
        }

    def resume(
        self,
        state: Mapping[str, Any],
        plans: Mapping[str, LayerPlan],
        path: Path,
        *,
        num_examples: int,
        store_id: str,
    ) -> list[int]:
        """Go on with the rows that an earlier run has left, in all processes.

        Args:
            state: that run's.
            plans: of all layers, the same in both runs.
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
            positions = entry["positions"].items()
            own = {name: replace(plans[name], positions=number) for name, number in positions}
            epoch = EpochRows(entry["epoch"], writer, own, entry["weights"], entry["facts"])
            if self._processes.is_first:
                epoch.join()
            self.epochs.append(epoch)
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

    @property
    def _plans(self) -> Mapping[str, LayerPlan]:
        return self.epochs[-1].plans if self.epochs else {}

    def _weights(self) -> dict[str, list[float]]:
        """By layer, each epoch's share of the sum."""
        if not self.epochs:
            raise CaptureError("There are no captured epochs to merge.")
        shares = {}
        for name in self._plans:
            weights = [epoch.weights.get(name, 0.0) for epoch in self.epochs]
            total = sum(weights)
            if not 0 < total < math.inf:
                raise CaptureError(
                    f"The learning rates of layer {name!r} in epochs {[e.epoch for e in self.epochs]} are "
                    f"{weights}, which gives epochs no weights; "
                    'pass `trajectory="segments"`, which keeps epochs apart.'
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
        self, name: str, basis: Eigenbasis, sample: np.ndarray, examples: Examples, weights: list[float]
    ) -> Tensor:
        """Mean squared coordinates of the sampled examples' gradients, averaged over epochs."""
        total = torch.zeros(basis.shape)
        for number, share in enumerate(weights):
            times = examples.times(number, sample)
            seen = np.repeat(sample, times)
            if share and len(seen):
                total += second_moment_sum(self.epochs[number].read(name, seen), basis) * (share / len(seen))
        return total

    def _summed(self, name: str, rows: np.ndarray, examples: Examples, weights: list[float]) -> LayerGradient:
        """The weighted sum over the epochs of some examples' gradients."""
        inputs, grads = [], []
        is_dense = any(name in epoch.plans and epoch.plans[name].codec == "dense" for epoch in self.epochs)
        dense = torch.zeros(len(rows) if is_dense else 0, *self._plans[name].shape)
        for epoch, times, share in zip(self.epochs, examples.times_of(rows), weights, strict=True):
            factors = torch.from_numpy(times * share).float()
            if not factors.any():
                continue
            codec, arrays = epoch.plans[name].codec_without_basis(), epoch.arrays(name, rows)
            if isinstance(codec, DenseCodec):
                codec.add_to(dense, arrays, factors)
                continue
            pairs = codec.decode_gradient(arrays)
            pairs.output_grads.mul_(factors.view(-1, 1, 1))
            if is_dense:  # as where an earlier epoch had longer examples
                dense += pairs.dense()
            else:
                inputs.append(pairs.inputs)
                grads.append(pairs.output_grads)
        if is_dense:
            return DenseGradient(dense)
        if not inputs:
            return DenseGradient(torch.zeros(len(rows), *self._plans[name].shape))
        return FactoredGradient(torch.cat(inputs, dim=1), torch.cat(grads, dim=1))

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
        examples: Examples,
        weights: Mapping[str, list[float]],
    ) -> float:
        """Of scores of stored and of exact rows; queries are gradients of the last epoch."""
        if len(sample) < 3:
            return math.nan
        asked_rows = sample[:QUERIES]
        scores = torch.zeros(2, len(asked_rows), len(sample))
        for name, layer in layers.items():
            inverse = get_curvature("ekfac").inverse_eigenvalues(layer.basis, layer.Lambda, HeuristicDamping())
            queries = self.epochs[-1].read(name, asked_rows)
            asked = layer.basis.rotate(queries) * inverse
            rows = self._summed(name, sample, examples, weights[name])
            stored = layer.codec.scores(layer.codec.project(asked, layer.basis), layer.codec.encode(rows))
            scores += torch.stack([stored, inner_products(rows, layer.basis.rotate_back(asked))])
        others = ~torch.eye(len(asked_rows), len(sample), dtype=torch.bool)  # a query's own row is no news
        stored, exact = (each[others].view(len(asked_rows), -1) for each in scores)
        return mean_rank_correlation(stored, exact)

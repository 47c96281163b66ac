"""The trajectory: the gradients of several epochs, added up to one row an example.

Each captured epoch's rows wait on disk, whole and nearly exact (float16). When training is over they become
one row an example, in one eigenbasis a layer. With w_e the mean learning rate of epoch e and c_en how often it
has trained on example n (nearly always once),

    G_n = sum_e w_e c_en G_en / sum_e w_e,

the sum of TracIn (Pruthi et al. 2020, arXiv:2002.08484), but for the query's gradient, which is that of
the final weights, and in EK-FAC's metric. The weight is the epoch's and never a step's: within one epoch of a
decaying schedule, a step's would weigh examples by their place in the shuffled order. An epoch that did not see an
example, or had no finite gradient of it, adds nothing to its row.

Curvature is the plain mean over the epochs. Its basis is that of the gradients' own covariances
(`functional.gradient_covariance`), made of rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lightning_influence.background import side_by_side
from lightning_influence.codecs import EigenCodec, allocate
from lightning_influence.curvature import HeuristicDamping, get_curvature
from lightning_influence.errors import CaptureError
from lightning_influence.functional.products import inner_products
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layer_record import describe_layers
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.processes import ALONE, Processes
from lightning_influence.recorder import Recorder
from lightning_influence.row_choice import LEAST_EXAMPLES, RowTrial, bytes_untried
from lightning_influence.row_file import RecordedCounts, specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreWriter
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.layer import LayerTrajectory
from lightning_influence.trajectory.rows import EpochRows, epoch_writer

SAMPLED_EXAMPLES = 128  # whose sums are tried
TRIED_AT_LEAST = 32  # examples, whatever memory that takes
QUERIES = 8  # by which stored and exact rows are compared
TRIED_ELEMENTS = 2**27  # of gradients that are in memory at once, unless that is too few examples

_Made = TypeVar("_Made")


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
            counts = {f"rows_{name}": count for name, count in asdict(recorder.counts()).items()}
            if not self._processes.is_first:
                recorder.writer.leave()
            rows = EpochRows(epoch, recorder.writer, dict(recorder.plans), dict(weights), {**facts, **counts})
            self.epochs.append(rows)

    def merge(self, writer: StoreWriter, *, bytes_per_example: int, error_budget: float | None = None) -> Merged:
        """Make and write one row an example; `finish` puts the file into place.

        Args:
            writer: of the file, new.
            bytes_per_example: budget of a row over all layers.
            error_budget: take no more of it than what this error of scores needs (`row_choice`).

        Raises:
            CaptureError: if there are no epochs, or all weights are zero or not finite.
        """
        examples = Examples(self.epochs, writer.num_examples)
        trajectories = self._layers(examples)
        sample = examples.sample(SAMPLED_EXAMPLES)
        bases = _by_layer(LayerTrajectory.basis, trajectories)
        Lambdas = _by_layer(LayerTrajectory.mean_squares, trajectories, bases)
        if error_budget is not None and len(sample) < LEAST_EXAMPLES:
            bytes_per_example = bytes_untried(len(sample), bytes_per_example)
        elif error_budget is not None:
            tried = sample[: max(TRIED_AT_LEAST, TRIED_ELEMENTS // sum(L.numel() for L in Lambdas.values()))]
            gradients = {name: layer.summed(tried) for name, layer in trajectories.items()}
            bytes_per_example = RowTrial(bases, Lambdas, gradients).least_bytes(error_budget, bytes_per_example)
        chosen = allocate(Lambdas, bytes_per_example)
        codecs = {name: EigenCodec.of(basis, chosen[name]) for name, basis in bases.items()}
        layers = {name: ScoredLayer(bases[name], Lambdas[name], codec) for name, codec in codecs.items()}
        writer.create({name: specs(codec) for name, codec in codecs.items()})

        def encoded(rows: np.ndarray) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
            arrays = {name: codec.encode(trajectories[name].summed(rows)) for name, codec in codecs.items()}
            return rows, {name: {key: a.numpy() for key, a in named.items()} for name, named in arrays.items()}

        for codec in codecs.values():
            _ = codec.selection  # made once, before threads ask for it
        for rows, arrays in side_by_side(
            encoded, examples.chunks(min(layer.chunk_examples for layer in trajectories.values()))
        ):
            writer.write_rows(rows, columns=examples.columns(rows), arrays=arrays)
        examples.write_invalid(writer)
        agreement = _agreement(layers, sample, trajectories)
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
        weights = {name: self._weights_of(name) for name in merged.layers}
        described = [
            {"epoch": epoch.epoch, "weights": {name: own[number] for name, own in weights.items()}, **epoch.facts}
            for number, epoch in enumerate(self.epochs)
        ]
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
            "epochs": [
                {
                    "epoch": epoch.epoch,
                    "unfinished": epoch.writer.partial_path.name,
                    "plans": {name: plan.to_builtins() for name, plan in epoch.plans.items()},
                    "weights": dict(epoch.weights),
                    "facts": dict(epoch.facts),
                }
                for epoch in self.epochs
            ],
        }

    def resume(
        self,
        state: Mapping[str, Any],
        path: Path,
        *,
        num_examples: int,
        store_id: str,
    ) -> None:
        """Go on with the rows that an earlier run has left, as far as they are there, in all processes.

        Args:
            state: that run's.
            path: of the file that they will be merged into.
            num_examples: length of the dataset.
            store_id: of the run.

        Raises:
            StoreError: if a file is of another run or layout.
        """
        for entry in state["epochs"]:
            writer = epoch_writer(path, entry["epoch"], num_examples=num_examples, store_id=store_id)
            writer.partial_path = path.with_name(entry["unfinished"])
            if not writer.partial_path.exists():
                continue
            plans = {name: LayerPlan.of_builtins(values) for name, values in entry["plans"].items()}
            epoch = EpochRows(entry["epoch"], writer, plans, entry["weights"], entry["facts"])
            if self._processes.is_first:
                epoch.join()
            self.epochs.append(epoch)

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

    @property
    def without_weight(self) -> list[str]:
        """Layers of the last epoch that learnt in no epoch that is there: they are left out of the merged rows."""
        return [name for name in self._plans if not sum(self._weights_of(name))]

    @property
    def not_in_the_last(self) -> list[str]:
        """Layers that were trained in an earlier epoch only, which are left out too."""
        return sorted({name for epoch in self.epochs for name in epoch.plans} - set(self._plans))

    @property
    def left_out(self) -> dict[str, list[int]]:
        """By layer, epochs that add nothing to it, as it was another matrix of parameters then."""
        others = {
            name: [epoch.epoch for epoch in self.epochs if name in epoch.plans and not epoch.has(name, plan)]
            for name, plan in self._plans.items()
        }
        return {name: epochs for name, epochs in others.items() if epochs}

    def _weights_of(self, name: str) -> list[float]:
        """Each epoch's; 0 where the layer was not trained, or was another matrix."""
        plan = self._plans[name]
        return [epoch.weights[name] if epoch.has(name, plan) else 0.0 for epoch in self.epochs]

    def _layers(self, examples: Examples) -> dict[str, LayerTrajectory]:
        """Those that learnt, by name."""
        if not self.epochs:
            raise CaptureError("There are no captured epochs to merge.")
        weights = {name: self._weights_of(name) for name in self._plans}
        shares = {
            name: [weight / sum(own) for weight in own] for name, own in weights.items() if 0 < sum(own) < math.inf
        }
        if not shares or not all(math.isfinite(sum(own)) for own in weights.values()):
            name, own = next((n, w) for n, w in weights.items() if n not in shares)
            raise CaptureError(
                f"The learning rates of layer {name!r} in epochs {[e.epoch for e in self.epochs]} are "
                f"{own}, which gives epochs no weights; "
                'pass `trajectory="segments"`, which keeps epochs apart.'
            )
        return {
            name: LayerTrajectory(name, self._plans[name], self.epochs, own, examples)
            for name, own in shares.items()
        }


def _by_layer(
    function: Callable[..., _Made], layers: Mapping[str, LayerTrajectory], *others: Mapping[str, Any]
) -> dict[str, _Made]:
    """What a function makes of each layer, side by side."""
    made = side_by_side(lambda name: function(layers[name], *(other[name] for other in others)), layers)
    return dict(zip(layers, made, strict=True))


def _agreement(
    layers: Mapping[str, ScoredLayer], sample: np.ndarray, trajectories: Mapping[str, LayerTrajectory]
) -> float:
    """Of scores of stored and of exact rows; queries are gradients of the last epoch."""
    if len(sample) < 3:
        return math.nan
    asked = sample[:QUERIES]
    scores = sum(
        _by_layer(
            lambda trajectory, layer: _scores(trajectory, layer, asked, sample), trajectories, layers
        ).values()
    )
    assert isinstance(scores, torch.Tensor)
    others = ~torch.eye(len(asked), len(sample), dtype=torch.bool)  # a query's own row is no news
    stored, exact = (each[others].view(len(asked), -1) for each in scores)
    return mean_rank_correlation(stored, exact)


def _scores(
    trajectory: LayerTrajectory, layer: ScoredLayer, asked: np.ndarray, sample: np.ndarray
) -> torch.Tensor:
    """A layer's part of the scores of stored and of exact rows, shape [2, q, n]."""
    inverse = get_curvature("ekfac").inverse_eigenvalues(layer.basis, layer.Lambda, HeuristicDamping(0.1))
    step = trajectory.chunk_examples
    queries = torch.cat([layer.basis.rotate(part) * inverse for part in trajectory.last(asked)])
    projected, back = layer.codec.project(queries, layer.basis), layer.basis.rotate_back(queries)
    scores = torch.zeros(2, len(asked), len(sample), dtype=torch.float32)
    for start in range(0, len(sample), step):
        part = slice(start, start + step)
        rows = trajectory.summed(sample[part])
        scores[0, :, part] = layer.codec.scores(projected, layer.codec.encode(rows))
        scores[1, :, part] = inner_products(rows, back)
    return scores

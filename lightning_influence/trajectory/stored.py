"""Segments that a file keeps, merged afterwards to one row an example, without the data and without the model.

The sums are those of `trajectory.merge`, of what segments have kept of each epoch: with G'_en the gradient that
the row of example n in segment e stands for, rounded and, with codec "eigen", without the coordinates that were
cut off,

    G_n = sum_e w_e c_en G'_en / sum_e w_e.

The basis is that of the rows' own covariances, Lambda the mean of the squared coordinates of sampled rows in it,
both averaged over the segments. What was cut off is in no row, but its share is known: taking these coordinates to
be uncorrelated with all others, with variances Lambda_e, as EK-FAC does, they add

    Q_A,e diag(sum_o' Lambda_e,o'i') Q_A,e^T  to E[G^T G],  Q_S,e diag(sum_i' Lambda_e,o'i') Q_S,e^T  to E[G G^T],
    sum_{o'i'} (Q_S^T Q_S,e)_oo'^2 (Q_A^T Q_A,e)_ii'^2 Lambda_e,o'i'  to Lambda.

Merging while training rounds and cuts once, here it is done twice; so prefer that, and use this for files that are
there already.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import EigenCodec, PairsCodec, allocate
from lightning_influence.errors import QueryError
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import DenseGradient, LayerGradient
from lightning_influence.query import InfluenceQuery, described_layers
from lightning_influence.row_choice import DEFAULT_BYTES
from lightning_influence.row_file import specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.segments import mean_learning_rate, segments_up_to, weighted_segments
from lightning_influence.store import StoreReader, StoreWriter
from lightning_influence.trajectory.examples import Examples
from lightning_influence.trajectory.layer import (
    LAMBDA_EXAMPLES,
    LAMBDA_GRADIENTS,
    basis_covariance,
    basis_gradients,
)

Weighting = Literal["learning_rate", "mean"]
Watch = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]  # such as a progress bar
WEIGHTINGS = {"learning_rate": "mean learning rate", "mean": "equal"}
CHUNK_BYTES = 32 * 2**20  # of whole gradients of a layer at a time
NOTE = "rows are sums over epochs, of what segments had kept of them"
_IDENTITY = ("format", "schema_version", "complete", "store_id", "num_examples", "segment")  # the writer's own
_EPOCH_FACTS = ("step_start", "step_end", "is_whole", "is_resumed", "batches_captured")
_COUNTS = ("rows_written", "rows_invalid", "rows_missing")


@dataclass(frozen=True)
class StoredEpoch:
    """A segment that is merged.

    Args:
        store: reads it.
        layers: its bases, eigenvalues and codecs.
        share: of the sum.
    """

    store: StoreReader
    layers: Mapping[str, ScoredLayer]
    share: float

    @property
    def writer(self) -> StoredEpoch:
        """What `Examples` reads columns of."""
        return self

    def read_column(self, name: str) -> np.ndarray:
        """A copy of one column, [N]."""
        return self.store.column(name)

    def gradients(self, name: str, rows: np.ndarray) -> LayerGradient:
        """What a layer's rows stand for."""
        codec = self.layers[name].codec
        arrays = {key: torch.from_numpy(np.array(array[rows])) for key, array in self.store.rows(name).items()}
        return (
            codec.decode_gradient(arrays) if isinstance(codec, PairsCodec) else DenseGradient(codec.decode(arrays))
        )

    def cut_off(self, name: str) -> Tensor:
        """Second moments, in the segment's own basis, of what rows do not hold, [o, i]."""
        layer = self.layers[name]
        if not isinstance(layer.codec, EigenCodec):
            return torch.zeros(layer.basis.shape, dtype=torch.float32)
        return layer.Lambda.flatten().index_fill(0, layer.codec.coordinates, 0.0).view(layer.basis.shape)

    def cut_off_in(self, name: str, basis: Eigenbasis) -> Tensor:
        """The same in another basis."""
        own = self.layers[name].basis
        squared = Eigenbasis(
            _squared(basis.Q_A, own.Q_A), _squared(basis.Q_S, own.Q_S), basis.eigenvalues_A, basis.eigenvalues_S
        )
        return squared.rotate_dense(self.cut_off(name))

    def cut_off_moments(self, name: str) -> tuple[Tensor, Tensor]:
        """E[G^T G] and E[G G^T] of what rows do not hold, in the shapes of A and S."""
        own = self.layers[name].basis
        lost = self.cut_off(name).view(*own.eigenvalues_S.shape, -1)  # [o, i] or [g, o / g, i]
        return _matrix(own.Q_A, lost.sum(-2)), _matrix(own.Q_S, lost.sum(-1))


def merge_segments(
    store: StoreReader,
    path: str | os.PathLike[str],
    *,
    weighting: Weighting = "learning_rate",
    bytes_per_example: int = DEFAULT_BYTES,
    watch: Watch = iter,
) -> int:
    """Write a file with one row an example, for the weights of a segment, from it and all before it.

    Args:
        store: reads the segment of the model's weights.
        path: of the new file.
        weighting: of segments, by their mean learning rates or equally.
        bytes_per_example: budget of a row over all layers.
        watch: for the chunks of examples, one after the other.

    Returns:
        How many segments were merged.

    Raises:
        ValueError: if there is no such weighting, the budget is not positive, or the path is the file itself.
        QueryError: if there is nothing to merge, learning rates are not known, or factors are not of the labels.
        StoreError: if the new file cannot be written.
    """
    if bytes_per_example < 1:
        raise ValueError(f"`bytes_per_example` must be at least 1, got {bytes_per_example}.")
    epochs, weights = _epochs(store, path, weighting)
    examples = Examples(epochs, store.num_examples)  # type: ignore[arg-type]  # it reads columns only
    layers = _merged_layers(store, epochs, examples, bytes_per_example)
    writer = StoreWriter(path, num_examples=store.num_examples, store_id=store.store_id, segment=store.number)
    try:
        writer.create({name: specs(layer.codec) for name, layer in layers.items()})
        largest = max(layer.Lambda.numel() for layer in layers.values())
        for rows in watch(list(examples.chunks(max(1, min(512, CHUNK_BYTES // (4 * largest)))))):
            arrays = {
                name: layer.codec.encode(DenseGradient(_summed(name, epochs, rows, examples.times_of(rows))))
                for name, layer in layers.items()
            }
            writer.write_rows(
                rows,
                columns=examples.columns(rows),
                arrays={name: {key: array.numpy() for key, array in own.items()} for name, own in arrays.items()},
            )
        examples.write_invalid(writer)
        writer.finish(
            attributes=_attributes(store, epochs, examples, layers),
            documents=_documents(store, epochs, weights, layers, weighting),
            factors={name: layer.to_arrays() for name, layer in layers.items()},
        )
    except BaseException:
        writer.discard()
        raise
    return len(epochs)


def _epochs(
    store: StoreReader, path: str | os.PathLike[str], weighting: Weighting
) -> tuple[list[StoredEpoch], list[float]]:
    """The segments that count, and their weights before they are made to sum to 1."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {tuple(WEIGHTINGS)}, got {weighting!r}.")
    if Path(path).exists() and Path(path).samefile(store.path):
        raise ValueError(f"{path} is the file that is merged; name another.")
    stores = segments_up_to(store)
    if len(stores) < 2:
        raise QueryError(
            f"{store.path} has one segment up to number {store.number}, so there is nothing to merge; capture "
            'several epochs, with `epochs="every"` and `trajectory="segments"`.'
        )
    drawn = [each.number for each in stores if each.attributes.get("fisher", "empirical") != "empirical"]
    if drawn:
        raise QueryError(
            f"segments {drawn} of {store.path} have factors of gradients under drawn labels, whose eigenvalues in "
            'another basis cannot be told from rows; only those of `fisher="empirical"` can be merged.'
        )
    weighted = weighted_segments(store, weighting)
    weights = [mean_learning_rate(each.store) if weighting == "learning_rate" else 1.0 for each in weighted]
    return [StoredEpoch(each.store, InfluenceQuery(each.store).layers, each.weight) for each in weighted], weights


def _merged_layers(
    store: StoreReader, epochs: list[StoredEpoch], examples: Examples, nbytes: int
) -> dict[str, ScoredLayer]:
    structures = {
        entry["name"]: KroneckerStructure(**entry.get("structure", {})) for entry in described_layers(store)
    }
    bases = {name: _basis(name, epochs, examples, structure) for name, structure in structures.items()}
    Lambdas = {name: _mean_squares(name, basis, epochs, examples) for name, basis in bases.items()}
    chosen = allocate(Lambdas, nbytes)
    return {
        name: ScoredLayer(basis, Lambdas[name], EigenCodec.of(basis, chosen[name]))
        for name, basis in bases.items()
    }


def _basis(name: str, epochs: list[StoredEpoch], examples: Examples, structure: KroneckerStructure) -> Eigenbasis:
    shape = epochs[-1].layers[name].basis.shape
    if structure.is_diagonal:
        return diagonal_basis(shape)
    each = -(-basis_gradients(shape, structure) // len(epochs))
    drawn = [examples.sample_in(number, each) for number in range(len(epochs))]
    covariance = basis_covariance(shape, structure, sum(map(len, drawn)))
    for rows, epoch in zip(drawn, epochs, strict=True):
        for part in _parts(rows, shape):
            covariance.add(epoch.gradients(name, part), 1 / len(rows))
        covariance.add_moments(*epoch.cut_off_moments(name))
    return eigenbasis(*covariance.compute(), structure)


def _parts(rows: np.ndarray, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """As many rows at a time as their whole gradients may take."""
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape)))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _mean_squares(name: str, basis: Eigenbasis, epochs: list[StoredEpoch], examples: Examples) -> Tensor:
    """Lambda, averaged over the epochs that saw any examples."""
    total, counted = torch.zeros(basis.shape, dtype=torch.float32), 0
    for number, epoch in enumerate(epochs):
        seen = examples.sample_in(number, max(LAMBDA_EXAMPLES, -(-LAMBDA_GRADIENTS // len(epochs))))
        if not len(seen):
            continue
        for part in _parts(seen, basis.shape):
            total += second_moment_sum(epoch.gradients(name, part), basis) / len(seen)
        total += epoch.cut_off_in(name, basis)
        counted += 1
    return total / max(1, counted)


def _summed(name: str, epochs: list[StoredEpoch], rows: np.ndarray, times: list[np.ndarray]) -> Tensor:
    """The weighted sum over segments of some examples' gradients, [n, o, i]."""
    total = torch.zeros(len(rows), *epochs[-1].layers[name].basis.shape, dtype=torch.float32)
    for epoch, seen in zip(epochs, times, strict=True):
        factors = torch.from_numpy(seen * epoch.share).float()
        if factors.any():
            total.addcmul_(epoch.gradients(name, rows).dense(), factors.view(-1, 1, 1))
    return total


def _attributes(
    store: StoreReader, epochs: list[StoredEpoch], examples: Examples, layers: Mapping[str, ScoredLayer]
) -> dict[str, bool | int | float | str]:
    first = epochs[0].store.attributes
    kept = {name: value for name, value in store.attributes.items() if name not in _IDENTITY}
    begun: dict[str, Any] = {name: first[name] for name in ("step_start", "weights_hash_start") if name in first}
    counts = {f"rows_{name}": count for name, count in asdict(examples.counts()).items()}
    return {
        **kept,
        **begun,
        **counts,
        "is_whole": all(bool(epoch.store.attributes.get("is_whole", True)) for epoch in epochs),
        "bytes_per_row": sum(layer.codec.bytes_per_row for layer in layers.values()),
        "trajectory": "merge",
        "epochs_merged": len(epochs),
        "codec_spearman": float("nan"),
        "staleness_spearman": float("nan"),
        "staleness_note": NOTE,
    }


def _documents(
    store: StoreReader,
    epochs: list[StoredEpoch],
    weights: list[float],
    layers: Mapping[str, ScoredLayer],
    weighting: Weighting,
) -> dict[str, Any]:
    """The last segment's, which may count nothing itself, with the new codecs and what was merged."""
    names = [name.removeprefix("documents/") for name, _, _ in store.datasets() if name.startswith("documents/")]
    described = [
        {**entry, "codec": EigenCodec.codec_id, "config": layers[entry["name"]].codec.get_config()}
        for entry in described_layers(store)
    ]
    merged = [
        {
            "epoch": epoch.store.attributes.get("epoch", epoch.store.number),
            "weights": dict.fromkeys(layers, weight),
            **{n: epoch.store.attributes[n] for n in _EPOCH_FACTS + _COUNTS if n in epoch.store.attributes},
        }
        for epoch, weight in zip(epochs, weights, strict=True)
    ]
    return {
        **{name: store.document(name) for name in names},
        "layers": described,
        "trajectory": {"weighting": WEIGHTINGS[weighting], "epochs": merged},
    }


def _matrix(Q: Tensor | None, eigenvalues: Tensor) -> Tensor:
    """Q diag(eigenvalues) Q^T; a diagonal factor as it is."""
    return eigenvalues if Q is None else (Q * eigenvalues.unsqueeze(-2)) @ Q.mT


def _squared(Q: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Squared entries of own^T Q: how a rotation moves variances of uncorrelated coordinates."""
    return None if Q is None or own is None else (own.mT @ Q).square()

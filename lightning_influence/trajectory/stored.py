"""Segments that a file keeps, merged afterwards to one row an example, without the data and without the model.

The sums are those of `trajectory.merge`, of what segments have kept of each epoch: with G'_en the gradient that
the row of example n in segment e stands for, rounded and, with codec "eigen", without the coordinates that were
cut off,

    G_n = sum_e w_e c_en G'_en / sum_e w_e.

A and S of each segment are its eigenvectors and eigenvalues put together again; their weighted mean gives the
common basis, which is the online one's. Lambda is the mean of the squared coordinates of sampled rows in that
basis. What was cut off is in no row, but its share of Lambda is known: taking these coordinates to be uncorrelated
with all others, with variances Lambda_e, as EK-FAC does, they add

    sum_{o'i'} (Q_S^T Q_S,e)_oo'^2 (Q_A^T Q_A,e)_ii'^2 Lambda_e,o'i'.

Merging while training rounds and cuts once, here it is done twice; so prefer that, and use this for files that are
there already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import EigenCodec, allocate
from lightning_influence.errors import QueryError
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis, eigenbasis
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import DenseGradient
from lightning_influence.query import InfluenceQuery, described_layers
from lightning_influence.row_choice import DEFAULT_BYTES
from lightning_influence.row_file import specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.segments import mean_learning_rate, segments_up_to, weighted_segments
from lightning_influence.store import StoreReader, StoreWriter
from lightning_influence.trajectory.examples import Examples

Weighting = Literal["learning_rate", "mean"]
Watch = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]  # such as a progress bar
WEIGHTINGS = {"learning_rate": "mean learning rate", "mean": "equal"}
CHUNK_BYTES = 32 * 2**20  # of whole gradients of a layer at a time
SAMPLES = 1024  # rows, of all segments together, of which Lambda is made
SAMPLED_EXAMPLES = 128  # at least
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

    def gradients(self, name: str, rows: np.ndarray) -> Tensor:
        """What a layer's rows stand for, [n, o, i]."""
        arrays = {key: torch.from_numpy(np.array(array[rows])) for key, array in self.store.rows(name).items()}
        return self.layers[name].codec.decode(arrays)

    def covariances(self, name: str) -> tuple[Tensor, Tensor]:
        """A and S of the segment's basis, float64."""
        basis = self.layers[name].basis
        return _matrix(basis.Q_A, basis.eigenvalues_A), _matrix(basis.Q_S, basis.eigenvalues_S)

    def cut_off(self, name: str, basis: Eigenbasis) -> Tensor:
        """Second moments in another basis of what rows do not hold, [o, i]."""
        layer = self.layers[name]
        if not isinstance(layer.codec, EigenCodec):
            return torch.zeros(basis.shape)
        lost = layer.Lambda.flatten().index_fill(0, layer.codec.coordinates, 0.0).view(basis.shape)
        Q_A, Q_S = _squared(basis.Q_A, layer.basis.Q_A), _squared(basis.Q_S, layer.basis.Q_S)
        return Eigenbasis(Q_A, Q_S, basis.eigenvalues_A, basis.eigenvalues_S).rotate_dense(lost)


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
    bases = {name: _basis(name, epochs, structure) for name, structure in structures.items()}
    sample = examples.sample(max(SAMPLED_EXAMPLES, SAMPLES // len(epochs)))
    Lambdas = {name: _mean_squares(name, basis, epochs, examples, sample) for name, basis in bases.items()}
    chosen = allocate(Lambdas, nbytes)
    return {
        name: ScoredLayer(basis, Lambdas[name], EigenCodec.of(basis, chosen[name]))
        for name, basis in bases.items()
    }


def _basis(name: str, epochs: list[StoredEpoch], structure: KroneckerStructure) -> Eigenbasis:
    if structure.is_diagonal:
        return diagonal_basis(epochs[-1].layers[name].basis.shape)
    A, S = (
        sum(epoch.share * factor for epoch, factor in zip(epochs, factors, strict=True))
        for factors in zip(*(epoch.covariances(name) for epoch in epochs), strict=True)
    )
    assert isinstance(A, Tensor)
    assert isinstance(S, Tensor)
    return eigenbasis(A.float(), S.float(), structure)


def _mean_squares(
    name: str, basis: Eigenbasis, epochs: list[StoredEpoch], examples: Examples, sample: np.ndarray
) -> Tensor:
    """Lambda, averaged over the epochs that saw any of the sampled examples."""
    total, shares = torch.zeros(basis.shape), 0.0
    step = max(1, CHUNK_BYTES // (4 * total.numel()))
    for epoch, times in zip(epochs, examples.times_of(sample), strict=True):
        seen = np.repeat(sample, times)
        if not len(seen):
            continue
        squares = torch.zeros(basis.shape)
        for start in range(0, len(seen), step):
            squares += second_moment_sum(DenseGradient(epoch.gradients(name, seen[start : start + step])), basis)
        total += epoch.share * (squares / len(seen) + epoch.cut_off(name, basis))
        shares += epoch.share
    return total / shares if shares else total


def _summed(name: str, epochs: list[StoredEpoch], rows: np.ndarray, times: list[np.ndarray]) -> Tensor:
    """The weighted sum over segments of some examples' gradients, [n, o, i]."""
    total = torch.zeros(len(rows), *epochs[-1].layers[name].basis.shape)
    for epoch, seen in zip(epochs, times, strict=True):
        factors = torch.from_numpy(seen * epoch.share).float()
        if factors.any():
            total.addcmul_(epoch.gradients(name, rows), factors.view(-1, 1, 1))
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
    if Q is None:
        return eigenvalues.double()
    return (Q.double() * eigenvalues.double().unsqueeze(-2)) @ Q.double().mT


def _squared(Q: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Squared entries of own^T Q: how a rotation moves variances of uncorrelated coordinates."""
    return None if Q is None or own is None else (own.mT @ Q).square()

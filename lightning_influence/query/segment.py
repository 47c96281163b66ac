"""One segment of a file, opened for questions: its layers and which rows it has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_influence.curvature import (
    Curvature,
    DampedLayer,
    Damping,
    DampingOfLayers,
    damping_by_layer,
)
from lightning_influence.errors import CorruptStoreError
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import DenseGradient
from lightning_influence.penalties import read_penalties
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader
from lightning_influence.stored_rows import StoredRows


class OpenSegment:
    """What a segment says of its layers, on a device.

    Args:
        store: reads the segment.
        device: where to compute.

    Attributes:
        layers: by name, in the model's order.
        valid: which examples have a row, bool [N].

    Raises:
        CorruptStoreError: if what the file says of its layers does not fit its arrays.
    """

    def __init__(self, store: StoreReader, device: torch.device | str = "cpu") -> None:
        self.store = store
        self.device = torch.device(device)
        self.layers = {entry["name"]: _load_layer(store, entry, self.device) for entry in described_layers(store)}
        self.valid = torch.from_numpy(store.column("valid").astype(bool, copy=False))
        self._row_products: dict[str, Tensor] = {}

    @property
    def num_examples(self) -> int:
        """Length of the dataset, N."""
        return self.store.num_examples

    def dampings(self, curvature: Curvature, damping: Damping | DampingOfLayers) -> Mapping[str, Damping]:
        """Each layer's rule, by name, of one that may look at all of them."""
        if not isinstance(damping, DampingOfLayers):
            return dict.fromkeys(self.layers, damping)
        penalties = read_penalties(self.store, self.layers)
        seen = {n: DampedLayer(each.eigenvalues(curvature), *penalties[n]) for n, each in self.layers.items()}
        return damping_by_layer(damping, seen)

    @cached_property
    def _occurrences(self) -> Tensor:
        """How often training drew each example, int32 [N]."""
        written = self.store.column("written").astype(bool, copy=False)
        return torch.from_numpy(self.store.column("occurrences")).masked_fill_(torch.from_numpy(~written), 0)

    @cached_property
    def _all_occurrences(self) -> Tensor:
        return self._occurrences.sum().float()

    def removal_shares(self, rows: slice | np.ndarray) -> Tensor:
        """What some examples' scores count for their removal, [n] or []."""
        if self.store.attributes.get("trajectory") == "merge":
            return float(self.store.attributes["epochs_merged"]) / self._all_occurrences
        return self._occurrences[rows].float() / self._all_occurrences

    def decoded(self, name: str, indices: np.ndarray) -> DenseGradient:
        """A layer's rows as gradients [m, o, i], zero where there is none."""
        arrays = {
            key: torch.from_numpy(np.array(array[indices])).to(self.device)
            for key, array in self.store.rows(name).items()
        }
        found = self.layers[name].codec.decode(arrays)
        return DenseGradient(found.masked_fill(~self.valid[indices].to(self.device)[:, None, None], 0.0))

    def _rows(self, name: str) -> StoredRows:
        """A layer's valid rows, for a curvature that is made of them."""
        where, maps = f"layer {name!r} of {self.store.path}", self.store.rows(name)
        codec, valid = self.layers[name].codec, self.valid
        return StoredRows(where, maps, codec, valid, device=self.device, kept=self._row_products)


def described_layers(store: StoreReader) -> list[dict]:
    """What a file says of each of its layers, in the model's order.

    Raises:
        CorruptStoreError: unless it names just the layers that there are arrays for.
    """
    try:
        described = store.document("layers")
        names = [entry["name"] for entry in described]
        fits = bool(names) and sorted(names) == sorted(store.layers)
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptStoreError(
            f"{store.path}: the document 'layers' cannot be read: {error}. Restore a copy or capture again."
        ) from error
    if not fits:
        raise CorruptStoreError(
            f"{store.path}: the document 'layers' names {names}, but there are arrays for "
            f"{list(store.layers)}. Restore a copy or capture again."
        )
    return described


def _load_layer(store: StoreReader, entry: Mapping, device: torch.device) -> ScoredLayer:
    name = entry["name"]
    try:
        factors = store.factors(name)
        structure = KroneckerStructure(**entry.get("structure", {}))
        layer = ScoredLayer.from_arrays(factors, entry["codec"], entry["config"], structure, device)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptStoreError(
            f"{store.path}: layer {name!r} cannot be read: {type(error).__name__}: {error}. Restore a copy "
            "or capture again."
        ) from error
    found = {key: (array.shape[1:], array.dtype.str[1:]) for key, array in store.rows(name).items()}
    if found != layer.codec.arrays():
        raise CorruptStoreError(
            f"{store.path}: layer {name!r} must have the row arrays {layer.codec.arrays()}, found {found}. "
            "Restore a copy or capture again."
        )
    return layer

"""The valid rows of one layer of a file as vectors, some of them at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import Codec
from lightning_influence.errors import QueryError
from lightning_influence.store.pages import release

KEPT_BYTES = 256 * 2**20  # of inner products, of all layers together, for the next damping
BLOCK_ELEMENTS = 8 * 2**20  # of rows as vectors: 64 MB in float64


class StoredRows:
    """Reads a layer's rows for a curvature that is made of them.

    Args:
        name: of layer and file, for messages.
        arrays: the codec's arrays, by name, each [N, ...].
        codec: of the rows.
        valid: which rows count, bool [N].
        device: where the codec is, and where to compute.
        kept: inner products by name, which further questions share; they are added while there is room.

    Attributes:
        count: how many rows are valid.
        width: coordinates of a row.

    Raises:
        QueryError: if no row is valid, or the device has no float64.
    """

    def __init__(
        self,
        name: str,
        arrays: Mapping[str, np.ndarray],
        codec: Codec,
        valid: Tensor,
        *,
        device: torch.device,
        kept: dict[str, Tensor],
    ) -> None:
        self.name, self._maps, self._codec, self._kept = name, arrays, codec, kept
        self._places = valid.nonzero().flatten().numpy()
        self._device, self.count = device, len(self._places)
        if device.type == "mps":
            raise QueryError(
                f"{name}: `curvature='empirical_fisher'` needs float64, which {device} has not; move the model to "
                "the CPU, or ask with `curvature='ekfac'`."
            )
        if not self.count:
            raise QueryError(f"{name} has no valid rows; capture an epoch whose gradients are finite.")
        self.width = self._codec.vectors(self._read(slice(0, 1))).shape[1]

    def gram(self) -> Tensor:
        """Inner products of all rows, float64 [n, n], not to be changed."""
        if self.name in self._kept:
            return self._kept[self.name]
        products = self._products()
        if sum(others.nbytes for others in self._kept.values()) + products.nbytes <= KEPT_BYTES:
            self._kept[self.name] = products
        return products

    def _products(self) -> Tensor:
        products = torch.empty(self.count, self.count, dtype=torch.float64, device=self._device)
        parts = self._parts(self._codec.product_elements(self.width))
        for one in parts:
            arrays = self._read(one)
            for other in parts:
                if other.start < one.start:
                    products[one, other] = products[other, one].T
                else:
                    products[one, other] = self._codec.products(arrays, self._read(other))
        return products

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time: which of the valid ones, and they as vectors, float64 [m, k]."""
        for part in self._parts(self.width):
            yield part, self._codec.vectors(self._read(part)).double()

    def _parts(self, elements: int) -> list[slice]:
        """As many rows at a time as have room, if each takes so many elements."""
        step = max(1, min(BLOCK_ELEMENTS // elements, math.isqrt(BLOCK_ELEMENTS)))
        return [slice(start, min(start + step, self.count)) for start in range(0, self.count, step)]

    def _read(self, part: slice) -> dict[str, Tensor]:
        places = self._places[part]
        arrays = {name: torch.from_numpy(np.array(array[places])) for name, array in self._maps.items()}
        for array in self._maps.values():
            release(array[places[0] : places[-1] + 1])
        return {name: array.to(self._device) for name, array in arrays.items()}

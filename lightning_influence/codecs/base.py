"""The contract of a codec, and the registry of codecs by their id in a file.

A codec stores one layer's gradients G_n [o, i] as named arrays of one row an example, and answers
from the arrays. It holds no damping and no curvature: these come with the query, as weights in the
layer's eigenbasis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import LayerGradient


class Codec(ABC):
    """One layer's gradients <-> arrays."""

    codec_id: ClassVar[str]

    @abstractmethod
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape (without n) and NumPy dtype of each array."""

    @abstractmethod
    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """The arrays [n, ...] of n gradients."""

    @abstractmethod
    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i] that the arrays stand for."""

    @abstractmethod
    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """Preconditioned queries [q, o, i] in the basis, in the form that `scores` takes."""

    @abstractmethod
    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Inner products <query, G_n>, shape [q, n]."""

    @abstractmethod
    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """sum_oi weights_oi (Q_S^T G_n Q_A)_oi^2 with weights [o, i], shape [n]."""

    def vectors(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The rows in some orthonormal basis of what they can hold, shape [n, k]; the same basis for all rows."""
        return self.decode(arrays).flatten(1)

    def product_elements(self, width: int) -> int:
        """Numbers that `products` makes of a row, whose vector has `width`."""
        return width

    def products(self, arrays: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        """Inner products <G_n, G_m> of rows with other rows, float64 [n, m]."""
        return self.vectors(arrays).double() @ self.vectors(others).double().T

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Plain values from which `from_config` makes the codec again."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that the codec needs beside its config and the layer's basis."""
        return {}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> Codec:
        """The inverse of `get_config` and `state`.

        Raises:
            ValueError, KeyError or TypeError: if they do not describe a codec of this kind.
        """

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one example takes."""
        total = 0
        for shape, dtype in self.arrays().values():
            total += torch.Size(shape).numel() * int(dtype[-1])
        return total


_CODECS: dict[str, type[Codec]] = {}


def register_codec(codec: type[Codec]) -> type[Codec]:
    """Class decorator: make a codec known under its `codec_id`."""
    _CODECS[codec.codec_id] = codec
    return codec


def codec_from_config(
    codec_id: str, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis
) -> Codec:
    """Make a codec again from what a file says of it.

    Raises:
        ValueError: if no codec has that id; whatever `from_config` raises.
    """
    if codec_id not in _CODECS:
        raise ValueError(
            f"unknown codec {codec_id!r}, known are {sorted(_CODECS)}; use the version that wrote the file"
        )
    return _CODECS[codec_id].from_config(config, state, basis)


def split_rows(arrays: Mapping[str, Tensor], step: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The rows of a codec's arrays, at most `step` at a time."""
    count = len(next(iter(arrays.values())))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, {name: array[rows] for name, array in arrays.items()}

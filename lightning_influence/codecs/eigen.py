"""Eigen: the leading whitened coordinates of the gradient in the layer's Kronecker eigenbasis.

z = (Lambda_0 + delta_0)^-1/2 * (Q_S^T G Q_A), of which the coordinates with the largest
Lambda_0 / (Lambda_0 + delta_0) are kept, over all layers together, and rounded to 8 bits in groups
of 64. Whitening evens out the entries of a group; the query carries its inverse, so that damping and
curvature stay free. For layers used on sequences, whose pairs would take s (i + o) numbers.

Error: a kept entry of z is off by at most max|group of 64| / 254; what is not kept is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.codecs.base import Codec, register_codec
from lightning_influence.functional.coordinates import CoordinateSelection
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.quantize import (
    GROUP,
    dequantize_int8,
    group_count,
    quantize_int8,
)
from lightning_influence.gradients import LayerGradient

WHITENING_DAMPING = 0.1  # delta_0 as a multiple of the layer's mean Lambda_0
BYTES_PER_COORDINATE = 1 + 4 / GROUP  # an int8 code and its share of a float32 scale


@register_codec
class EigenCodec(Codec):
    """Stores some coordinates in the eigenbasis.

    Args:
        basis: the layer's eigenbasis, of shape (o, i).
        coordinates: int64 [k], positions of the kept coordinates in the flattened [o, i].
        whitening: float [k], their (Lambda_0 + delta_0)^1/2.
    """

    codec_id: ClassVar[str] = "eigen"

    def __init__(self, basis: Eigenbasis, coordinates: Tensor, whitening: Tensor) -> None:
        o, i = basis.shape
        if coordinates.ndim != 1 or coordinates.shape != whitening.shape or not len(coordinates):
            raise ValueError(
                "`coordinates` and `whitening` must be [k] with k >= 1, got "
                f"{tuple(coordinates.shape)} and {tuple(whitening.shape)}"
            )
        if coordinates.dtype != torch.int64 or whitening.dtype != basis.dtype:
            raise ValueError(
                f"`coordinates` must be int64 and `whitening` {basis.dtype}, "
                f"got {coordinates.dtype} and {whitening.dtype}"
            )
        if coordinates.min() < 0 or coordinates.max() >= o * i:
            found = f"{int(coordinates.min())}..{int(coordinates.max())}"
            raise ValueError(f"`coordinates` must lie in [0, {o * i}) for shape {(o, i)}, got {found}")
        self.basis, self.coordinates, self.whitening = basis, coordinates, whitening

    @functools.cached_property
    def selection(self) -> CoordinateSelection:
        """What makes the kept coordinates of gradients."""
        return CoordinateSelection(self.basis, self.coordinates)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """`codes` and their `scales`."""
        k = len(self.coordinates)
        return {"codes": ((k,), "i1"), "scales": ((group_count(k),), "f4")}

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Rotate, select, whiten, round."""
        return self.encode_coordinates(self.selection.of(gradient))

    def encode_coordinates(self, kept: Tensor) -> dict[str, Tensor]:
        """The arrays of coordinates [n, k] that were selected already."""
        codes, scales = quantize_int8(kept / self.whitening)
        return {"codes": codes, "scales": scales}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i], zero in the directions that were not kept."""
        o, i = self.basis.shape
        values = dequantize_int8(arrays["codes"], arrays["scales"]) * self.whitening
        coordinates = values.new_zeros(len(values), o * i)
        coordinates[:, self.coordinates] = values
        return self.basis.rotate_back(coordinates.unflatten(1, (o, i)))

    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """The kept coordinates of the queries times the whitening, shape [q, k]."""
        return coordinates.flatten(1)[:, self.coordinates] * self.whitening

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """One matrix product, shape [q, n]."""
        return projected @ dequantize_int8(arrays["codes"], arrays["scales"]).T

    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the kept coordinates, shape [n]."""
        values = dequantize_int8(arrays["codes"], arrays["scales"])
        return values.square() @ (weights.flatten()[self.coordinates] * self.whitening.square())

    def get_config(self) -> dict[str, Any]:
        """Nothing: the basis and the state say all."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Coordinates and whitening."""
        return {"coordinates": self.coordinates, "whitening": self.whitening}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> EigenCodec:
        """The inverse of `state`."""
        return cls(basis, state["coordinates"], state["whitening"])


def select_coordinates(Lambdas: Mapping[str, Tensor], bytes_per_example: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Choose the coordinates of all layers together that carry most of the preconditioned signal.

    Args:
        Lambdas: Lambda_0 of each layer, shape [o, i].
        bytes_per_example: the budget over all layers, kept to unless that leaves a layer without any
            coordinate: each gets at least one.

    Returns:
        For each layer the coordinates, int64 [k], most important first, and the whitening [k].

    Example:
        >>> chosen = select_coordinates({"a": torch.tensor([[4.0, 0.1], [1.0, 0.0]])}, 2)
        >>> chosen["a"][0].tolist()
        [0]
    """
    for_codes = bytes_per_example - 4 * len(Lambdas)  # the last group of each layer may be short
    budget = max(1, int(for_codes / BYTES_PER_COORDINATE))
    damped = {name: Lambda + WHITENING_DAMPING * Lambda.mean() for name, Lambda in Lambdas.items()}
    signal = {name: Lambdas[name] / damped[name].where(damped[name] > 0, 1) for name in Lambdas}
    chosen = {}
    for name, coordinates in _largest(signal, budget).items():
        whitening = damped[name].flatten()[coordinates].sqrt()
        chosen[name] = (coordinates, whitening.where(whitening > 0, 1))
    return chosen


def _largest(signal: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The places of the largest values of all layers together, by layer, largest first; at least one each."""
    everything = torch.cat([values.flatten() for values in signal.values()])
    kept = everything.topk(min(budget, len(everything))).indices
    chosen, start = {}, 0
    for name, values in signal.items():
        inside = (kept >= start) & (kept < start + values.numel())
        coordinates = kept[inside] - start  # topk sorts: most important first
        chosen[name] = coordinates if len(coordinates) else values.argmax()[None]
        start += values.numel()
    return chosen

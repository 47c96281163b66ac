"""Eigen: the leading whitened coordinates of the gradient in the layer's Kronecker eigenbasis.

z = (Lambda_0 + delta_0)^-1/2 * (Q_S^T G Q_A), of which the coordinates with the largest
Lambda_0 / (Lambda_0 + delta_0) are kept, over all layers together, and rounded: to 8 bits in groups
of 64, or to 2 or 4 bits in groups of 256 after a rotation (`functional.rotated`). Whitening evens out the
entries of a group; the query carries its inverse, so that damping and curvature stay free. For layers used on
sequences, whose pairs would take s (i + o) numbers, and for sums over epochs.

Error: with 8 bits a kept entry of z is off by at most max|group of 64| / 254; with 4 or 2 bits the squared
error of a group is about 1 % or 12 % of its square. What is not kept is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.codecs.base import Codec, register_codec, split_rows
from lightning_influence.functional.coordinates import CoordinateSelection
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.quantize import GROUP, dequantize_int8, group_count, quantize_int8
from lightning_influence.functional.rotated import (
    NOISE,
    ROTATED_GROUP,
    quantize_rotated,
    restore_rotated,
    rotate_groups,
    rotated_group_count,
)
from lightning_influence.gradients import CHUNK_ELEMENTS, LayerGradient

WHITENING_DAMPING = 0.1  # delta_0 as a multiple of the layer's mean Lambda_0
ENCODED_ELEMENTS = 2**18  # at a time: what stays in a processor's cache
BYTES_PER_COORDINATE = {  # a code and its share of a float32 scale
    8: 1 + 4 / GROUP,
    4: 1 / 2 + 4 / ROTATED_GROUP,
    2: 1 / 4 + 4 / ROTATED_GROUP,
}
LOST = {8: 0.0, **NOISE}  # of the squares, by rounding


@register_codec
class EigenCodec(Codec):
    """Stores some coordinates in the eigenbasis.

    Args:
        basis: the layer's eigenbasis, of shape (o, i).
        coordinates: int64 [k], positions of the kept coordinates in the flattened [o, i].
        whitening: float [k], their (Lambda_0 + delta_0)^1/2.
        bits: of a stored coordinate: 8, 4 or 2.
    """

    codec_id: ClassVar[str] = "eigen"

    def __init__(self, basis: Eigenbasis, coordinates: Tensor, whitening: Tensor, bits: int = 8) -> None:
        if bits not in BYTES_PER_COORDINATE:
            raise ValueError(f"`bits` must be one of {[*BYTES_PER_COORDINATE]}, got {bits!r}")
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
        self.basis, self.coordinates, self.whitening, self.bits = basis, coordinates, whitening, bits

    @functools.cached_property
    def selection(self) -> CoordinateSelection:
        """What makes the kept coordinates of gradients."""
        return CoordinateSelection(self.basis, self.coordinates)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """`codes` and their `scales`."""
        k = len(self.coordinates)
        if self.bits < 8:
            groups = rotated_group_count(k)
            return {"codes": ((groups * ROTATED_GROUP * self.bits // 8,), "u1"), "scales": ((groups,), "f4")}
        return {"codes": ((k,), "i1"), "scales": ((group_count(k),), "f4")}

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Rotate, select, whiten, round."""
        return self.encode_coordinates(self.selection.of(gradient))

    def encode_coordinates(self, kept: Tensor) -> dict[str, Tensor]:
        """The arrays of coordinates [n, k] that were selected already."""
        step = max(1, ENCODED_ELEMENTS // len(self.coordinates)) if kept.device.type == "cpu" else len(kept)
        parts = [self._encode_some(part) for part in kept.split(max(step, 1))]
        codes, scales = zip(*parts, strict=True)
        return {"codes": torch.cat(codes), "scales": torch.cat(scales)}

    def _encode_some(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            return quantize_int8(kept / self.whitening)
        k = len(self.coordinates)
        whitened = kept.new_zeros(len(kept), rotated_group_count(k) * ROTATED_GROUP)
        torch.div(kept, self.whitening, out=whitened[:, :k])
        return quantize_rotated(whitened, self.bits)

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i], zero in the directions that were not kept."""
        o, i = self.basis.shape
        values = self.vectors(arrays)
        coordinates = values.new_zeros(len(values), o * i)
        coordinates[:, self.coordinates] = values
        return self.basis.rotate_back(coordinates.unflatten(1, (o, i)))

    def vectors(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The kept coordinates, shape [n, k]."""
        return self._whitened(arrays) * self.whitening

    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """The kept coordinates of the queries times the whitening, rotated as the rows are, shape [q, k]."""
        if basis is not self.basis:
            coordinates = self.basis.rotate_dense(basis.rotate_back(coordinates))
        kept = coordinates.flatten(1)[:, self.coordinates] * self.whitening
        return kept if self.bits == 8 else rotate_groups(kept)

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """One matrix product, shape [q, n]."""
        return projected @ self._restored(arrays).T

    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the kept coordinates, shape [n]; in another basis, of the gradients made whole."""
        if basis is not self.basis:
            return self._quadratic_in(basis, weights, arrays)
        values = self._whitened(arrays)
        return values.square() @ (weights.flatten()[self.coordinates] * self.whitening.square())

    def _quadratic_in(self, basis: Eigenbasis, weights: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        step = max(1, CHUNK_ELEMENTS // weights.numel())
        parts = [
            (basis.rotate_dense(self.decode(rows)).square() * weights).sum((1, 2))
            for _, rows in split_rows(arrays, step)
        ]
        return torch.cat(parts) if parts else weights.new_zeros(0)

    def get_config(self) -> dict[str, Any]:
        """The bits; the basis and the state say all else."""
        return {"bits": self.bits}

    def _restored(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Whitened coordinates, still rotated if they were for rounding."""
        if self.bits == 8:
            return dequantize_int8(arrays["codes"], arrays["scales"])
        return restore_rotated(arrays["codes"], arrays["scales"], self.bits)

    def _whitened(self, arrays: Mapping[str, Tensor]) -> Tensor:
        restored = self._restored(arrays)
        return restored if self.bits == 8 else rotate_groups(restored)[:, : len(self.coordinates)]

    def state(self) -> dict[str, Tensor]:
        """Coordinates and whitening."""
        return {"coordinates": self.coordinates, "whitening": self.whitening}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> EigenCodec:
        """The inverse of `state`."""
        return cls(basis, state["coordinates"], state["whitening"], config.get("bits", 8))


def choose_bits(Lambdas: Mapping[str, Tensor], bytes_per_example: int) -> int:
    """How many bits a coordinate should have: few bits keep more coordinates, many bits lose less of each.

    Of what the coordinates' squares Lambda_0 / (Lambda_0 + delta_0) amount to, as much as possible is kept: 8 bits
    where all coordinates fit so, and 2 where that keeps many more.

    Args:
        Lambdas: as for `select_coordinates`.
        bytes_per_example: likewise.
    """
    signal = _signal(Lambdas)

    def kept(bits: int) -> float:
        chosen = select_coordinates(Lambdas, bytes_per_example, bits)
        squares = (float(signal[name].flatten()[places].square().sum()) for name, (places, _) in chosen.items())
        return (1 - LOST[bits]) * sum(squares)

    return max(BYTES_PER_COORDINATE, key=kept)


def select_coordinates(
    Lambdas: Mapping[str, Tensor], bytes_per_example: int, bits: int = 8
) -> dict[str, tuple[Tensor, Tensor]]:
    """Choose the coordinates of all layers together that carry most of the preconditioned signal.

    Args:
        Lambdas: Lambda_0 of each layer, shape [o, i].
        bytes_per_example: the budget over all layers, kept to unless that leaves a layer without any
            coordinate: each gets at least one.
        bits: of a stored coordinate.

    Returns:
        For each layer the coordinates, int64 [k], most important first, and the whitening [k].

    Example:
        >>> chosen = select_coordinates({"a": torch.tensor([[4.0, 0.1], [1.0, 0.0]])}, 2)
        >>> chosen["a"][0].tolist()
        [0]
    """
    damped, signal = _damped(Lambdas), _signal(Lambdas)
    count = _budget(len(Lambdas), bytes_per_example, bits)
    kept = _largest(signal, count)
    while count > 1 and (over := sum(_row_bytes(len(k), bits) for k in kept.values()) - bytes_per_example) > 0:
        count = max(1, count - max(1, int(over / BYTES_PER_COORDINATE[bits])))
        kept = _largest(signal, count)
    chosen = {}
    for name, coordinates in kept.items():
        whitening = damped[name].flatten()[coordinates].sqrt()
        chosen[name] = (coordinates, whitening.where(whitening > 0, 1))
    return chosen


def _row_bytes(k: int, bits: int) -> int:
    """What k coordinates of a layer take."""
    if bits == 8:
        return k + 4 * group_count(k)
    return rotated_group_count(k) * (ROTATED_GROUP * bits // 8 + 4)


def _budget(layers: int, bytes_per_example: int, bits: int) -> int:
    """Coordinates that about fit, when the last group of each layer is half full."""
    per_layer = 4 if bits == 8 else ROTATED_GROUP // 2 * bits / 8
    return max(1, int((bytes_per_example - per_layer * layers) / BYTES_PER_COORDINATE[bits]))


def _damped(Lambdas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: Lambda + WHITENING_DAMPING * Lambda.mean() for name, Lambda in Lambdas.items()}


def _signal(Lambdas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lambda_0 / (Lambda_0 + delta_0), at most 1."""
    return {name: Lambdas[name] / damped.where(damped > 0, 1) for name, damped in _damped(Lambdas).items()}


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

"""Eigen: the leading whitened coordinates of the gradient in the layer's Kronecker eigenbasis.

z = (Lambda_0 + delta_0)^-1/2 * (Q_S^T G Q_A), of which the coordinates that carry most of the scores are kept,
over all layers together, the more important ones with more bits (`codecs.allocation`): 8 bits in groups of 64, or
4 or 2 bits in groups of 256 after a rotation (`functional.rotated`). Whitening evens out the entries of a group;
the query carries its inverse, so that damping and curvature stay free. For layers used on sequences, whose pairs
would take s (i + o) numbers, and for sums over epochs.

Error: with 8 bits a kept entry of z is off by at most max|group of 64| / 254; with 4 or 2 bits the squared
error of a group is about 1 % or 12 % of its square. What is not kept is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.codecs.allocation import Allocation
from lightning_influence.codecs.base import Codec, register_codec, split_rows
from lightning_influence.codecs.tiers import Tier, tier_of
from lightning_influence.functional.coordinates import CoordinateSelection
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.rotated import ROTATED_GROUP
from lightning_influence.gradients import CHUNK_ELEMENTS, LayerGradient


@register_codec
class EigenCodec(Codec):
    """Stores some coordinates in the eigenbasis.

    Args:
        basis: the layer's eigenbasis, of shape (o, i).
        coordinates: int64 [k], positions of the kept coordinates in the flattened [o, i].
        whitening: float [k], their (Lambda_0 + delta_0)^1/2.
        tiers: bits of the first coordinates, fewer of the next, and so on; None for 8 bits each.
    """

    codec_id: ClassVar[str] = "eigen"

    def __init__(
        self, basis: Eigenbasis, coordinates: Tensor, whitening: Tensor, tiers: Sequence[Tier] | None = None
    ) -> None:
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
            span = f"{int(coordinates.min())}..{int(coordinates.max())}"
            raise ValueError(f"`coordinates` must lie in [0, {o * i}) for shape {(o, i)}, got {span}")
        self.tiers = (tier_of(8, len(coordinates)),) if tiers is None else tuple(tiers)
        if (found := sum(tier.size for tier in self.tiers)) != len(coordinates):
            raise ValueError(f"`tiers` must hold the {len(coordinates)} coordinates, got {found}")
        bits = [tier.bits for tier in self.tiers]
        if bits != sorted({*bits}, reverse=True):
            raise ValueError(f"`tiers` must have falling bits, each once, got {bits}; join those with the same")
        self.basis, self.coordinates, self.whitening = basis, coordinates, whitening

    @classmethod
    def of(cls, basis: Eigenbasis, allocation: Allocation) -> EigenCodec:
        """The codec of what rows are to keep."""
        return cls(basis, allocation.coordinates, allocation.whitening, allocation.tiers)

    @functools.cached_property
    def selection(self) -> CoordinateSelection:
        """What makes the kept coordinates of gradients."""
        return CoordinateSelection(self.basis, self.coordinates)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Codes and scales of each tier."""
        return {name: array for tier in self.tiers for name, array in tier.arrays().items()}

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Rotate, select, whiten, round."""
        return self.encode_coordinates(self.selection.of(gradient))

    def encode_coordinates(self, kept: Tensor) -> dict[str, Tensor]:
        """The arrays of coordinates [n, k] that were selected already."""
        arrays: dict[str, Tensor] = {}
        for tier, values, whitening in zip(
            self.tiers, self._split(kept), self._split(self.whitening), strict=True
        ):
            arrays |= tier.encode(values / whitening)
        return arrays

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
        kept = self._split(coordinates.flatten(1)[:, self.coordinates] * self.whitening)
        return torch.cat([tier.rotated(values) for tier, values in zip(self.tiers, kept, strict=True)], dim=1)

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Sums of each tier's products with the codes (`functional.code_products`), shape [q, n]."""
        parts = projected.split([tier.width for tier in self.tiers], dim=1)
        products = (tier.products(part, arrays) for tier, part in zip(self.tiers, parts, strict=True))
        return functools.reduce(torch.add, products)

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
        """The tiers; the basis and the state say all else."""
        if not self.tiers[0].suffix:  # of an older file
            return {"bits": self.tiers[0].bits}
        return {"tiers": [[tier.bits, tier.size] for tier in self.tiers]}

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values [..., k] by tiers."""
        return values.split([tier.size for tier in self.tiers], dim=-1)

    def _whitened(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tier.decode(arrays) for tier in self.tiers], dim=1)

    def state(self) -> dict[str, Tensor]:
        """Coordinates and whitening."""
        return {"coordinates": self.coordinates, "whitening": self.whitening}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> EigenCodec:
        """The inverse of `get_config` and `state`; older files have `bits` for all coordinates."""
        coordinates, whitening = state["coordinates"], state["whitening"]
        if "tiers" in config:
            tiers = [tier_of(int(bits), int(size)) for bits, size in config["tiers"]]
        else:
            tiers = [Tier(config.get("bits", 8), len(coordinates), multiple=ROTATED_GROUP)]
        return cls(basis, coordinates, whitening, tiers)

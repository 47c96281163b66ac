"""Pairs: the layer's inputs and output gradients themselves.

A gradient with s positions is the sum of s outer products d a^T, so the pair (a, d) holds all of it in
s (i + o) numbers instead of o i; for layers used on vectors (s = 1) nothing comes close in bytes.
Pairs need no eigenbasis and contain no damping, so the basis can be made after they were written.

Error: with `int8` each entry is off by at most max|group of 64| / 254; with `float16` by 2^-11 of
itself or 3e-8 of its row's largest; `float32` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.codecs.base import Codec, register_codec
from lightning_influence.functional import quantize
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.products import inner_products, weighted_squares
from lightning_influence.gradients import LayerGradient

PairsDtype = Literal["int8", "float16", "float32"]
_NUMPY = {"int8": "i1", "float16": "f2", "float32": "f4"}


@register_codec
class PairsCodec(Codec):
    """Stores (a, d) of each position.

    Args:
        shape: (o, i) of the layer's gradient.
        positions: the most positions an example can have; fewer are padded with zeros.
        has_bias: whether the last column is the bias's, whose input is always 1 and is not stored.
        dtype: of the stored entries.
    """

    codec_id: ClassVar[str] = "pairs"

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        positions: int = 1,
        has_bias: bool,
        dtype: PairsDtype = "int8",
    ) -> None:
        if dtype not in _NUMPY:
            raise ValueError(f"`dtype` must be one of {sorted(_NUMPY)}, got {dtype!r}")
        if min(*shape, positions) < 1 or shape[1] - has_bias < 1:
            raise ValueError(f"`shape` and `positions` must be positive, got {shape} and {positions}")
        self.shape, self.positions, self.has_bias, self.dtype = shape, positions, has_bias, dtype

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """`inputs`, `output_grads` and, unless float32, their scales."""
        o, i = self.shape
        specs: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, width in (("inputs", i - self.has_bias), ("output_grads", o)):
            specs[name] = ((self.positions, width), _NUMPY[self.dtype])
            if self.dtype != "float32":
                scales = quantize.group_count(width) if self.dtype == "int8" else 1
                specs[f"{name}_scales"] = ((self.positions, scales), "f4")
        return specs

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Round the pairs.

        Raises:
            ValueError: if there are more positions than the codec was made for.
        """
        missing = self.positions - gradient.positions
        if missing < 0:
            raise ValueError(f"{gradient.positions} positions, but rows were laid out for {self.positions}")
        inputs = gradient.inputs[..., :-1] if self.has_bias else gradient.inputs
        arrays: dict[str, Tensor] = {}
        for name, values in (("inputs", inputs), ("output_grads", gradient.output_grads)):
            padded = pad(values, (0, 0, 0, missing)) if missing else values
            if self.dtype == "float32":
                arrays[name] = padded.float()
            else:
                round_ = quantize.quantize_int8 if self.dtype == "int8" else quantize.quantize_float16
                arrays[name], arrays[f"{name}_scales"] = round_(padded)
        return arrays

    def decode_factors(self, arrays: Mapping[str, Tensor]) -> LayerGradient:
        """The gradients as they are stored, in factors."""
        inputs, output_grads = (
            self._decoded(arrays, "inputs"),
            self._decoded(arrays, "output_grads"),
        )
        if self.has_bias:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], dim=-1)
        return LayerGradient(inputs, output_grads)

    def _decoded(self, arrays: Mapping[str, Tensor], name: str) -> Tensor:
        if self.dtype == "float32":
            return arrays[name]
        restore = quantize.dequantize_int8 if self.dtype == "int8" else quantize.dequantize_float16
        return restore(arrays[name], arrays[f"{name}_scales"])

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i]."""
        return self.decode_factors(arrays).dense()

    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """Queries [q, o, i] in the layer's own coordinates."""
        return basis.rotate_back(coordinates)

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """<query, sum_s d a^T>, shape [q, n]."""
        return inner_products(self.decode_factors(arrays), projected)

    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the rotated gradients, shape [n]."""
        return weighted_squares(basis.rotate_factors(self.decode_factors(arrays)), weights)

    def get_config(self) -> dict[str, Any]:
        """Positions, bias and dtype; the shape is the basis's."""
        return {"positions": self.positions, "has_bias": self.has_bias, "dtype": self.dtype}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> PairsCodec:
        """The inverse of `get_config`."""
        return cls(
            basis.shape,
            positions=int(config["positions"]),
            has_bias=bool(config["has_bias"]),
            dtype=config["dtype"],
        )

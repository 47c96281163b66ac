"""Pairs: the layer's inputs and output gradients themselves.

A gradient with s positions is the sum of s outer products d a^T, so the pair (a, d) holds all of it in
s (i + o) numbers instead of o i; for layers used on vectors (s = 1) nothing comes close in bytes.
Pairs need no eigenbasis and contain no damping, so the basis can be made after they were written.

Error: with `int8` each entry is off by at most max|group of 64| / 254; with `float16` by 2^-11 of
itself or 3e-8 of its row's largest; `float32` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lightning_influence.codecs.base import Codec, register_codec
from lightning_influence.functional import quantize
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.products import inner_products, weighted_squares
from lightning_influence.functional.quantize import RowDtype
from lightning_influence.gradients import BiasedGradient, FactoredGradient, LayerGradient


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
        dtype: RowDtype = "int8",
    ) -> None:
        quantize.check_dtype(dtype)
        if min(*shape, positions) < 1 or shape[1] - has_bias < 1:
            raise ValueError(f"`shape` and `positions` must be positive, got {shape} and {positions}")
        self.shape, self.positions, self.has_bias, self.dtype = shape, positions, has_bias, dtype

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """`inputs`, `output_grads` and, unless float32, their scales."""
        o, i = self.shape
        inputs = quantize.rounded_arrays("inputs", (self.positions, i - self.has_bias), self.dtype)
        return inputs | quantize.rounded_arrays("output_grads", (self.positions, o), self.dtype)

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Round the pairs.

        Raises:
            ValueError: if there are more positions than the codec was made for, or no outer products.
        """
        if not isinstance(gradient, FactoredGradient):
            raise ValueError(f"{type(gradient).__name__} has no pairs; pass `codec='eigen'`")
        if gradient.positions > self.positions:
            raise ValueError(f"{gradient.positions} positions, but rows were laid out for {self.positions}")
        if gradient.positions < self.positions:
            gradient = gradient.padded(self.positions)
        inputs = gradient.bare_inputs if isinstance(gradient, BiasedGradient) else gradient.inputs
        inputs = inputs[..., : self.shape[1] - self.has_bias]
        rounded = quantize.round_rows("inputs", inputs, self.dtype)
        return rounded | quantize.round_rows("output_grads", gradient.output_grads, self.dtype)

    def decode_gradient(self, arrays: Mapping[str, Tensor]) -> FactoredGradient:
        """The gradients as they are stored, in factors."""
        inputs = quantize.restore_rows("inputs", arrays, self.dtype)
        output_grads = quantize.restore_rows("output_grads", arrays, self.dtype)
        gradient = FactoredGradient(inputs, output_grads)
        return gradient.with_ones() if self.has_bias else gradient

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i]."""
        return self.decode_gradient(arrays).dense()

    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """Queries [q, o, i] in the layer's own coordinates."""
        return basis.rotate_back(coordinates)

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """<query, sum_s d a^T>, shape [q, n]."""
        return inner_products(self.decode_gradient(arrays), projected)

    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the rotated gradients, shape [n]."""
        return weighted_squares(basis.rotate_factors(self.decode_gradient(arrays)), weights)

    def product_elements(self, width: int) -> int:
        """Just the pair, of a single outer product."""
        return sum(self.shape) if self.positions == 1 else width

    def products(self, arrays: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        """(d . d')(a . a') of single outer products; of others with the gradients made whole; float64 [n, m]."""
        if self.positions > 1:
            return super().products(arrays, others)
        one, other = self.decode_gradient(arrays), self.decode_gradient(others)
        grads = one.output_grads[:, 0].double() @ other.output_grads[:, 0].double().T
        return grads * (one.inputs[:, 0].double() @ other.inputs[:, 0].double().T)

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

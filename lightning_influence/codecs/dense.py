"""Dense: the gradient itself, entry by entry.

For layers whose gradient is no sum of a few outer products (normalizations, tables, convolutions), where
every entry is wanted: o i numbers an example, so for small layers only. Needs no eigenbasis.

Error: with `int8` each entry is off by at most max|group of 64| / 254; with `float16` by 2^-11 of itself or
3e-8 of its matrix's largest (of a sum of outer products: 1e-12 of |inputs| |output_grads|); `float32` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.codecs.base import Codec, register_codec, split_rows
from lightning_influence.functional import quantize
from lightning_influence.functional.code_products import code_products
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.quantize import RowDtype
from lightning_influence.gradients import CHUNK_ELEMENTS, DenseGradient, FactoredGradient, LayerGradient

FLOAT16_LARGEST = 2.0**15


@register_codec
class DenseCodec(Codec):
    """Stores the flattened gradient.

    Args:
        shape: (o, i) of the layer's gradient.
        dtype: of the stored entries.
    """

    codec_id: ClassVar[str] = "dense"

    def __init__(self, shape: tuple[int, int], *, dtype: RowDtype = "int8") -> None:
        quantize.check_dtype(dtype)
        if min(shape) < 1:
            raise ValueError(f"`shape` must be positive, got {shape}")
        self.shape, self.dtype = shape, dtype

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """`values` and, unless float32, their scales."""
        o, i = self.shape
        return quantize.rounded_arrays("values", (o * i,), self.dtype)

    def encode(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Round the entries."""
        if self.dtype == "float16" and isinstance(gradient, FactoredGradient):
            return _float16_products(gradient)
        return quantize.round_rows("values", gradient.dense().flatten(1), self.dtype)

    def decode_gradient(self, arrays: Mapping[str, Tensor]) -> DenseGradient:
        """The gradients as they are stored."""
        return DenseGradient(quantize.restore_rows("values", arrays, self.dtype).unflatten(1, self.shape))

    def add_to(self, total: Tensor, arrays: Mapping[str, Tensor], factors: Tensor) -> None:
        """Add the gradients times factors [n] to a total [n, o, i], in one pass for float16."""
        if self.dtype != "float16":
            total.addcmul_(self.decode(arrays), factors.view(-1, 1, 1))
            return
        scales = arrays["values_scales"] * factors.unsqueeze(1)
        total.flatten(1).addcmul_(arrays["values"].float(), scales)

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The gradients [n, o, i]."""
        return self.decode_gradient(arrays).values

    def project(self, coordinates: Tensor, basis: Eigenbasis) -> Tensor:
        """Queries [q, o, i] in the layer's own coordinates, flattened to [q, o i]."""
        return basis.rotate_back(coordinates).flatten(1)

    def scores(self, projected: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """One matrix product, shape [q, n]."""
        if self.dtype == "int8":
            return code_products(projected, arrays["values"], arrays["values_scales"], 8)
        parts = [
            projected @ self.decode(rows).flatten(1).T
            for _, rows in split_rows(arrays, max(1, CHUNK_ELEMENTS // projected.shape[1]))
        ]
        return torch.cat(parts, dim=1) if parts else projected.new_zeros(len(projected), 0)

    def quadratic(self, weights: Tensor, basis: Eigenbasis, arrays: Mapping[str, Tensor]) -> Tensor:
        """Weighted squares of the rotated gradients, shape [n]."""
        parts = [
            (basis.rotate_dense(dense).square() * weights).sum((1, 2))
            for _, dense in self.decode_gradient(arrays).dense_chunks()
        ]
        return torch.cat(parts) if parts else weights.new_zeros(0)

    def get_config(self) -> dict[str, Any]:
        """The dtype; the shape is the basis's."""
        return {"dtype": self.dtype}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], basis: Eigenbasis) -> DenseCodec:
        """The inverse of `get_config`."""
        return cls(basis.shape, dtype=config["dtype"])


def _float16_products(gradient: FactoredGradient) -> dict[str, Tensor]:
    """Round sums of outer products, in a single pass over them.

    No entry is larger than |inputs| |output_grads|, so that their product becomes the largest number there is
    room for, and the sums need not be searched for their largest entry.
    """
    scales = (gradient.bounds / FLOAT16_LARGEST).float()  # [n]
    divisors = scales.where(scales > 0, 1)[:, None, None]
    inputs, output_grads = gradient.tensors
    scaled = gradient.with_tensors([inputs, output_grads / divisors])
    return {"values": scaled.dense(torch.float16).flatten(1), "values_scales": scales.unsqueeze(1)}

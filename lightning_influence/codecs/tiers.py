"""A run of coordinates that are rounded to the same number of bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.functional.code_products import code_products
from lightning_influence.functional.quantize import GROUP, dequantize_int8, group_count, quantize_int8
from lightning_influence.functional.rotated import (
    NOISE,
    ROTATED_GROUP,
    ROTATED_TOGETHER,
    quantize_rotated,
    restore_rotated,
    rotate_groups,
    rotated_group_count,
)

BYTES_PER_COORDINATE = {  # a code and its share of a float32 scale
    8: 1 + 4 / GROUP,
    4: 1 / 2 + 4 / ROTATED_GROUP,
    2: 1 / 4 + 4 / ROTATED_GROUP,
}
LOST = {8: 5e-5, **NOISE}  # of the squares, by rounding a Gaussian


@dataclass(frozen=True)
class Tier:
    """So many coordinates of so many bits: 8 in groups of 64, or fewer after a rotation (`functional.rotated`).

    Args:
        bits: 8, 4 or 2.
        size: how many coordinates.
        multiple: the stored width of rotated ones is padded to a multiple of this.
        suffix: of the arrays' names.
    """

    bits: int
    size: int
    multiple: int = ROTATED_TOGETHER
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.bits not in BYTES_PER_COORDINATE:
            raise ValueError(f"`bits` must be one of {[*BYTES_PER_COORDINATE]}, got {self.bits!r}")
        if self.size < 1:
            raise ValueError(f"`size` must be positive, got {self.size}")

    @property
    def is_rotated(self) -> bool:
        """Whether entries are rotated before they are rounded."""
        return self.bits < 8

    @property
    def width(self) -> int:
        """Entries that are stored, with padding."""
        return -(-self.size // self.multiple) * self.multiple if self.is_rotated else self.size

    @property
    def nbytes(self) -> int:
        """Of a row."""
        groups = rotated_group_count(self.width) if self.is_rotated else group_count(self.width)
        return self.width * self.bits // 8 + 4 * groups

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape (without n) and NumPy dtype of codes and scales."""
        groups = rotated_group_count(self.width) if self.is_rotated else group_count(self.width)
        codes = ((self.width * self.bits // 8,), "u1" if self.is_rotated else "i1")
        return {f"codes{self.suffix}": codes, f"scales{self.suffix}": ((groups,), "f4")}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Codes and scales of values [n, size]."""
        if self.is_rotated:
            codes, scales = quantize_rotated(self._padded(values), self.bits)
        else:
            codes, scales = quantize_int8(values)
        return {f"codes{self.suffix}": codes, f"scales{self.suffix}": scales}

    def rotated(self, values: Tensor) -> Tensor:
        """Values [..., size] in the form [..., width] whose inner products with `restored` are theirs."""
        return rotate_groups(self._padded(values)) if self.is_rotated else values

    def products(self, rotated: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """Inner products of `rotated` queries [q, width] with the rows, shape [q, n]."""
        return code_products(rotated, arrays[f"codes{self.suffix}"], arrays[f"scales{self.suffix}"], self.bits)

    def restored(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What the arrays stand for, [n, width], still rotated."""
        codes, scales = arrays[f"codes{self.suffix}"], arrays[f"scales{self.suffix}"]
        return restore_rotated(codes, scales, self.bits) if self.is_rotated else dequantize_int8(codes, scales)

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """The values [n, size] that the arrays stand for."""
        restored = self.restored(arrays)
        return rotate_groups(restored)[:, : self.size] if self.is_rotated else restored

    def _padded(self, values: Tensor) -> Tensor:
        if self.width == values.shape[-1]:
            return values
        padded = values.new_zeros(*values.shape[:-1], self.width)
        padded[..., : self.size] = values
        return padded


def tier_of(bits: int, size: int) -> Tier:
    """A tier whose arrays are named by its bits."""
    return Tier(bits, size, suffix=f"_{bits}")

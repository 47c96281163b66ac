"""Rounding of rows to a few bits, with a scale for each group of neighbouring entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
INT8_MAX = 127
RowDtype = Literal["int8", "float16", "float32"]
_NUMPY = {"int8": "i1", "float16": "f2", "float32": "f4"}


def group_count(width: int) -> int:
    """Number of groups that a row of `width` entries has; the last one may be short."""
    return -(-width // GROUP)


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of 64 entries to int8 with the scale max|group| / 127.

    The error of an entry is at most half its group's scale: |x - x'| <= max|group| / 254,
    to float32's rounding (1e-43 where max|group| < 1.5e-36 makes the scale subnormal).

    Args:
        values: shape [..., d].

    Returns:
        Codes int8 [..., d] and scales float32 [..., ceil(d / 64)].

    Example:
        >>> codes, scales = quantize_int8(torch.tensor([[0.5, -1.0, 0.0]]))
        >>> codes.tolist(), dequantize_int8(codes, scales)[0, 1].item()
        ([[64, -127, 0]], -1.0)
    """
    width = values.shape[-1]
    groups = pad(values, (0, group_count(width) * GROUP - width)).unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).float() / INT8_MAX
    divisors = scales.where(scales > 0, 1).unsqueeze(-1)
    codes = (groups / divisors).round_().clamp_(-INT8_MAX, INT8_MAX)  # tiny scales round coarsely
    return codes.flatten(-2)[..., :width].to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values [..., d] of codes [..., d] and scales [..., ceil(d / 64)]."""
    return scale_groups(codes.float(), scales, GROUP)


def scale_groups(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """In place, each group of neighbours in [..., d], of which the last may be short, times its scale."""
    whole = values.shape[-1] // group
    values[..., : whole * group].unflatten(-1, (whole, group)).mul_(scales[..., :whole, None])
    values[..., whole * group :].mul_(scales[..., whole:])
    return values


def quantize_float16(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [..., d] to float16 after dividing by max|row|; scales are float32 [..., 1].

    Without the scale, gradients below 6e-8 would become zero.
    """
    scales = values.abs().amax(-1, keepdim=True).float()
    return (values / scales.where(scales > 0, 1)).half(), scales


def dequantize_float16(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values [..., d] of codes [..., d] and scales [..., 1]."""
    return codes.float() * scales


def check_dtype(dtype: str) -> None:
    """Refuse what rows cannot be rounded to.

    Raises:
        ValueError: unless it is "int8", "float16" or "float32".
    """
    if dtype not in get_args(RowDtype):
        raise ValueError(f"`dtype` must be one of {sorted(get_args(RowDtype))}, got {dtype!r}")


def rounded_arrays(name: str, shape: tuple[int, ...], dtype: RowDtype) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and NumPy dtype of the arrays that `round_rows` makes of rows of this shape."""
    arrays = {name: (shape, _NUMPY[dtype])}
    if dtype != "float32":
        scales = group_count(shape[-1]) if dtype == "int8" else 1
        arrays[f"{name}_scales"] = ((*shape[:-1], scales), "f4")
    return arrays


def round_rows(name: str, values: Tensor, dtype: RowDtype) -> dict[str, Tensor]:
    """Values [..., d] as the array `name` and, unless float32, their `<name>_scales`."""
    if dtype == "float32":
        return {name: values.float()}
    codes, scales = quantize_int8(values) if dtype == "int8" else quantize_float16(values)
    return {name: codes, f"{name}_scales": scales}


def restore_rows(name: str, arrays: Mapping[str, Tensor], dtype: RowDtype) -> Tensor:
    """The float32 values [..., d] of the arrays of `round_rows`."""
    if dtype == "float32":
        return arrays[name]
    restore = dequantize_int8 if dtype == "int8" else dequantize_float16
    return restore(arrays[name], arrays[f"{name}_scales"])

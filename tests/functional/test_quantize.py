"""Rounding stays within its documented bound for every float32 up to 1e38.

On top of each bound comes the rounding of float32 itself: 2^-22 of the group's largest for the scale
and the product. (At the very largest float32, 3.4e38, the product of code and scale can overflow;
covariances overflow long before.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from lightning_influence.functional.quantize import (
    GROUP,
    dequantize_float16,
    dequantize_int8,
    group_count,
    quantize_float16,
    quantize_int8,
)

FLOAT32_ROUNDING = 2.0**-22
LARGEST = 1e38
# Below this the scale max / 127 is subnormal and has no 24 bits.
SMALLEST_OF_FULL_PRECISION = 127 * float(np.finfo(np.float32).tiny)
WIDTHS = st.sampled_from([1, 2, 63, 64, 65, 128, 130])


@st.composite
def rows(draw: st.DrawFn, smallest: float = 0.0) -> Tensor:
    """Float32 [n, d] whose entries are zero or of a magnitude from `smallest` to the largest float32."""
    shape = (draw(st.integers(1, 3)), draw(WIDTHS))
    magnitude = draw(st.sampled_from([LARGEST, 1.0, 1e-20, smallest or 1e-40]))
    magnitude = max(magnitude, smallest)
    entries = st.floats(-1, 1, width=32)
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=entries)) * np.float32(magnitude))


def group_maxima(values: Tensor) -> Tensor:
    """max|group| for every entry, float64, the shape of `values`."""
    columns = [
        values[:, start : start + GROUP].double().abs().amax(1, keepdim=True).expand(-1, stop - start)
        for start, stop in _groups(values.shape[1])
    ]
    return torch.cat(columns, dim=1)


def _groups(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + GROUP, width)) for start in range(0, width, GROUP)]


@given(rows())
@settings(max_examples=150, deadline=None)
def test_int8_error_is_at_most_half_a_step(values: Tensor) -> None:
    restored = dequantize_int8(*quantize_int8(values))
    maxima = group_maxima(values)
    bound = maxima * (1 / 254 + FLOAT32_ROUNDING)
    ok = (restored.double() - values.double()).abs() <= bound
    assert bool(ok[maxima >= SMALLEST_OF_FULL_PRECISION].all())
    assert bool(restored.isfinite().all())


@given(rows(), st.sampled_from([2e-45, 1e-43, 1e-41, 1e-38, 1e-36]))
@settings(max_examples=100, deadline=None)
def test_int8_error_of_subnormal_scales_is_below_1e_43(values: Tensor, magnitude: float) -> None:
    # half a subnormal's unit in the scale, times 127, and half a step
    values = values.clamp(-1, 1) * torch.tensor(magnitude)
    restored = dequantize_int8(*quantize_int8(values))
    bound = group_maxima(values) * (1 / 254 + FLOAT32_ROUNDING) + 1e-43
    assert bool(((restored.double() - values.double()).abs() <= bound).all())


@given(rows())
@settings(max_examples=150, deadline=None)
def test_float16_error_is_within_its_bound(values: Tensor) -> None:
    restored = dequantize_float16(*quantize_float16(values))
    largest = values.double().abs().amax(1, keepdim=True)
    # 2^-11 of itself, or 3e-8 (2^-25, half of float16's smallest) of the row's largest; and half of
    # the smallest float32 where the result is subnormal
    bound = (values.double().abs() * 2.0**-11).maximum(largest * 2.0**-25)
    bound = bound + largest * 2.0**-46 + values.double().abs() * FLOAT32_ROUNDING + 1e-45
    assert bool(((restored.double() - values.double()).abs() <= bound).all())


@pytest.mark.parametrize("value", [1.0, LARGEST, -LARGEST, 1e-30])
def test_the_largest_of_a_group_comes_back_to_float32_rounding(value: float) -> None:
    values = torch.zeros(1, 70)
    values[0, 3] = value
    restored = dequantize_int8(*quantize_int8(values))
    torch.testing.assert_close(restored, values, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("quantize", "dequantize"),
    [(quantize_int8, dequantize_int8), (quantize_float16, dequantize_float16)],
)
def test_zeros_stay_exactly_zero(quantize, dequantize) -> None:
    values = torch.zeros(2, 3, 70)
    values[0, 0, 0] = 1.0
    restored = dequantize(*quantize(values))
    assert not restored.flatten()[1:].any()


@pytest.mark.parametrize(
    ("quantize", "dequantize"),
    [(quantize_int8, dequantize_int8), (quantize_float16, dequantize_float16)],
)
def test_rounding_twice_is_rounding_once(quantize, dequantize) -> None:
    values = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values)
    again, _ = quantize(dequantize(codes, scales))
    assert torch.equal(again, codes)


def test_tiny_gradients_survive_float16() -> None:
    values = torch.tensor([[1e-9, -3e-10, 5e-12]])  # all zero in plain float16
    torch.testing.assert_close(dequantize_float16(*quantize_float16(values)), values, rtol=2**-10, atol=0)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 128, 130])
def test_codes_and_scales_have_the_documented_shapes(width: int) -> None:
    values = torch.ones(2, 3, width)
    codes, scales = quantize_int8(values)
    assert (codes.shape, codes.dtype) == ((2, 3, width), torch.int8)
    assert (scales.shape, scales.dtype) == ((2, 3, group_count(width)), torch.float32)
    codes, scales = quantize_float16(values)
    assert (codes.shape, codes.dtype, scales.shape) == ((2, 3, width), torch.float16, (2, 3, 1))


def test_an_outlier_spoils_only_its_own_group() -> None:
    values = torch.full((1, 128), 0.01)
    values[0, 0] = 100.0
    restored = dequantize_int8(*quantize_int8(values))
    assert not restored[0, 1:64].any()
    torch.testing.assert_close(restored[0, 64:], values[0, 64:], rtol=1e-6, atol=0)

"""Products with codes against their slow twin, made whole in float64; few queries in integers, many in floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.functional import code_products as module
from lightning_influence.functional.code_products import BASE, DIGITS, FEW_QUERIES, code_products
from lightning_influence.functional.quantize import INT8_MAX, dequantize_int8, quantize_int8
from lightning_influence.functional.rotated import quantize_rotated, restore_rotated

N = 5
WIDTHS = (1, 63, 64, 65, 130, 1024, 1100, 2176)  # one group, short last groups, several spans of 16 groups
ROTATED_WIDTHS = (64, 192, 256, 320, 4096, 4160)


def rows(width: int, bits: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(n, width, generator=generator) * torch.logspace(0, -3, width)
    return quantize_int8(values) if bits == 8 else quantize_rotated(values, bits)


def queries(q: int, width: int) -> Tensor:
    return torch.randn(q, width, generator=torch.Generator().manual_seed(q)) * torch.logspace(1, -4, width)


def restored(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    values = dequantize_int8(codes, scales) if bits == 8 else restore_rotated(codes, scales, bits)
    return values.double()


def assert_as_exact_as_float32(found: Tensor, asked: Tensor, values: Tensor) -> None:
    """Off by some roundings of float32 of the sum of the products' sizes."""
    exact, sizes = asked.double() @ values.T, asked.double().abs() @ values.abs().T
    # three digits round an entry at 2^-24 of its group's largest, those of 2-bit codes at up to 2^-20
    bound = 2.0**-20 * sizes + 2.0**-20 * asked.abs().amax().double() * values.abs().sum(1)
    assert bool(((found.double() - exact).abs() <= bound).all())


every_width = pytest.mark.parametrize(
    ("width", "bits"), [(w, 8) for w in WIDTHS] + [(w, b) for w in ROTATED_WIDTHS for b in (4, 2)]
)


@every_width
@pytest.mark.parametrize("q", [1, FEW_QUERIES, FEW_QUERIES + 1, 20])
def test_products_are_those_of_the_rows_made_whole(width: int, bits: int, q: int) -> None:
    codes, scales = rows(width, bits)
    found = code_products(queries(q, width), codes, scales, bits)
    assert found.shape == (q, N)
    assert found.dtype == torch.float32
    assert_as_exact_as_float32(found, queries(q, width), restored(codes, scales, bits))


@every_width
def test_processors_without_int8_products_give_the_same(width: int, bits: int, monkeypatch) -> None:
    codes, scales = rows(width, bits)
    monkeypatch.setattr(module, "_has_int8_products", lambda: False)
    found = code_products(queries(1, width), codes, scales, bits)
    assert_as_exact_as_float32(found, queries(1, width), restored(codes, scales, bits))


@every_width
def test_integers_are_exact_wherever_they_are_computed(width: int, bits: int, monkeypatch) -> None:
    """On any processor: PyTorch's integer products are replaced by int64's."""
    codes, scales = rows(width, bits)
    monkeypatch.setattr(module, "_has_int8_products", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: (one.long() @ other.long()).int())
    found = code_products(queries(2, width), codes, scales, bits)
    assert_as_exact_as_float32(found, queries(2, width), restored(codes, scales, bits))


def test_three_digits_hold_an_entry_to_a_rounding_of_float32() -> None:
    asked = queries(2, 128)
    digits, units = module._digits(asked.unsqueeze(1), 2, 64)
    powers = (BASE ** -torch.arange(DIGITS)).double()
    back = torch.einsum("dqpgb,d,qg->qgb", digits.double(), powers, units.double()).flatten(1)
    largest = asked.unflatten(1, (2, 64)).abs().amax(2, keepdim=True).expand(-1, -1, 64).flatten(1)
    assert bool(((back - asked).abs() <= largest * (0.5 / INT8_MAX / BASE**2 + 2.0**-23)).all())


@pytest.mark.parametrize(("bits", "width"), [(8, 130), (4, 320), (2, 320)])
def test_blocks_leave_no_trace(bits: int, width: int, monkeypatch) -> None:
    codes, scales = rows(width, bits, n=50)
    for q in (1, FEW_QUERIES + 1, 20):
        monkeypatch.undo()
        whole = code_products(queries(q, width), codes, scales, bits)
        monkeypatch.setattr(module, "INTEGER_ROWS", 7)
        monkeypatch.setattr(module, "CACHED_ELEMENTS", 7 * width)
        monkeypatch.setattr(module, "MANY_ELEMENTS", 7 * width)
        parts = code_products(queries(q, width), codes, scales, bits)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("q", [1, 20])
def test_queries_that_are_not_finite_have_no_scores(q: int) -> None:
    codes, scales = rows(130, 8)
    asked = queries(q, 130)
    asked[0, 3] = torch.nan
    found = code_products(asked, codes, scales, 8)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("q", [0, 1, 20])
def test_no_rows_and_no_queries(q: int) -> None:
    codes, scales = rows(130, 8, n=0)
    assert code_products(queries(q, 130), codes, scales, 8).shape == (q, 0)
    codes, scales = rows(320, 4)
    assert code_products(queries(q, 320), codes, scales, 4).shape == (q, N)


def test_zero_queries_and_rows_score_zero() -> None:
    codes, scales = quantize_int8(torch.zeros(3, 70))
    assert not code_products(torch.zeros(1, 70), codes, scales, 8).any()
    assert not code_products(queries(1, 70), codes, scales, 8).any()

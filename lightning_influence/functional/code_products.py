"""Inner products of queries with rows of rounded codes, without making the rows whole in main memory.

A row's score is the sum over groups of its scale times (codes . query). Two ways to it, both over blocks of rows
that stay in a processor's cache:

- in floats: a block's codes times their scales, then one matrix product, which takes most of the time of many
  queries;
- in integers: the query in three digits, x = u (d_1 + d_2 / 254 + d_3 / 254^2) with u = max|group| / 127 and d
  int8, so that all products of codes and digits are exact, and x is off by at most max|group| 2^-24: no more than
  float32's own rounding. For few queries on processors with int8 dot products (VNNI, AMX), where making floats of
  the codes takes several times as long as reading them. Other x86 processors' int8 products saturate
  (https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html).

Reduced precision was measured and left out: two digits are 20 % faster and off by 2e-5 of the largest score, and
products of bfloat16 round their results to 8 bits on CPUs. Who can bear less than float32 in the products of many
queries says so to PyTorch: `torch.set_float32_matmul_precision("medium")`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.functional.quantize import GROUP, INT8_MAX, scale_groups
from lightning_influence.functional.rotated import ROTATED_GROUP

FEW_QUERIES = 3  # integers are faster
DIGITS, BASE = 3, 2.0 * INT8_MAX
GROUPS_TOGETHER = 16  # in a product of integers, which has a column for each of them: 48 for a query
INTEGER_ROWS = 1024
CACHED_ELEMENTS = 2**18
MANY_QUERIES = 16  # whose products want longer blocks, which need not stay in the cache
MANY_ELEMENTS = 2**21
DEVICE_ELEMENTS = 2**24  # where launching a kernel costs more than the memory


def code_products(queries: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Inner products <query, row> of all pairs, shape [q, n].

    Args:
        queries: shape [q, d]; of rotated codes rotated in the same way, with d a multiple of 64.
        codes: int8 [n, d] of `quantize_int8`, or uint8 [n, d bits / 8] of `quantize_rotated`.
        scales: float32, one for each group of 64 or, of rotated ones, 256 entries.
        bits: 8, or 4 or 2 of rotated codes.

    Example:
        >>> codes, scales = torch.tensor([[1, -2], [3, 0]], dtype=torch.int8), torch.tensor([[0.5], [2.0]])
        >>> code_products(torch.tensor([[1.0, 10.0]]), codes, scales, 8)
        tensor([[-9.5000,  6.0000]])
    """
    planes = 8 // bits
    group = GROUP if planes == 1 else ROTATED_GROUP // planes  # in bytes
    parts = _by_planes(queries, planes)
    if _suits_integers(queries, codes):
        products = _integer_products(parts, codes, scales, group)
    else:
        products = _float_products(parts, codes, scales, group)
    if planes > 1:  # codes are centered at their middle
        middle = (2**bits - 1) / 2
        whole = torch.ones_like(scales[:1])
        sums = _float_group_sums(queries, ROTATED_GROUP, whole.shape[1])
        products -= (middle * sums) @ scales.to(queries.dtype).T
    return products


def _suits_integers(queries: Tensor, codes: Tensor) -> bool:
    on_cpu = queries.device.type == codes.device.type == "cpu"
    few = 0 < len(queries) <= FEW_QUERIES and queries.dtype == torch.float32
    return on_cpu and few and _has_int8_products() and bool(queries.isfinite().all())


@functools.cache
def _has_int8_products() -> bool:
    """Whether int8 products are exact and fast."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported())


def _by_planes(queries: Tensor, planes: int) -> Tensor:
    """Queries [q, d] as [q, planes, bytes]: of a byte's codes the first ones, the second ones and so on."""
    return queries.unflatten(1, (-1, planes)).transpose(1, 2)


def _float_group_sums(values: Tensor, group: int, count: int) -> Tensor:
    """Sums over groups of neighbours, the last of which may be short: [q, d] to [q, count]."""
    return pad(values, (0, count * group - values.shape[1])).unflatten(1, (count, group)).sum(2)


def _blocks(codes: Tensor, rows: int) -> Iterator[slice]:
    for start in range(0, len(codes), rows):
        yield slice(start, start + rows)


def _planes_of(codes: Tensor, planes: int) -> Tensor:
    """The codes in the bytes [n, bytes], as int8 [n, planes, bytes]."""
    found = codes.new_empty(len(codes), planes, codes.shape[1])
    bits = 8 // planes
    torch.bitwise_right_shift(codes, 8 - bits, out=found[:, -1])
    for place in range(planes - 1):
        shifted = torch.bitwise_right_shift(codes, bits * place, out=found[:, place]) if place else codes
        torch.bitwise_and(shifted, 2**bits - 1, out=found[:, place])
    return found.view(torch.int8)


def _float_products(parts: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """With each block's codes made floats."""
    q, planes, width = parts.shape
    result = parts.new_empty(q, len(codes))
    flat = parts.flatten(1)
    step = max(1, _block_elements(parts) // max(1, planes * width))
    buffer = parts.new_empty(min(step, len(codes)), planes, width)
    for rows in _blocks(codes, step):
        integers = codes[rows].unsqueeze(1) if planes == 1 else _planes_of(codes[rows], planes)
        block = buffer[: len(integers)].copy_(integers)
        scale_groups(block, scales[rows].to(parts.dtype).unsqueeze(1), group)
        torch.mm(flat, block.flatten(1).T, out=result[:, rows])
    return result


def _block_elements(parts: Tensor) -> int:
    if parts.device.type != "cpu":
        return DEVICE_ELEMENTS
    return CACHED_ELEMENTS if len(parts) < MANY_QUERIES else MANY_ELEMENTS


def _integer_products(parts: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """With the queries made integers."""
    q, planes, _ = parts.shape
    digits, units = _digits(parts, scales.shape[1], group)
    spans = [
        (_spread(digits[:, :, :, span]), _fold(units[:, span]), slice(span.start * group, span.stop * group))
        for span in (slice(g, g + GROUPS_TOGETHER) for g in range(0, scales.shape[1], GROUPS_TOGETHER))
    ]
    result = parts.new_empty(q, len(codes))
    for rows in _blocks(codes, INTEGER_ROWS):
        sums = []  # of each group, [n, q, groups together]
        for matrix, fold, columns in spans:
            block = codes[rows, columns]
            if planes > 1:
                block = _planes_of(block, planes).flatten(1)
            products = torch._int_mm(block, _cut(matrix, planes, block.shape[1] // planes))
            sums.append((products.float() @ fold).unflatten(1, (q, -1)))
        scaled = torch.cat(sums, dim=2).mul_(scales[rows].unsqueeze(1))
        torch.sum(scaled, dim=2, out=result.T[rows])
    return result


def _digits(parts: Tensor, count: int, group: int) -> tuple[Tensor, Tensor]:
    """Queries in integers: digits int8 [digit, q, plane, group, bytes of a group] and units [q, group]."""
    rest = pad(parts, (0, count * group - parts.shape[2])).unflatten(2, (count, group))
    units = rest.abs().amax((1, 3)) / INT8_MAX
    rest = rest / units.where(units > 0, 1)[:, None, :, None]
    digits = []
    for _ in range(DIGITS):
        digits.append(rest.round().clamp_(-INT8_MAX, INT8_MAX))
        rest = (rest - digits[-1]) * BASE
    return torch.stack(digits).to(torch.int8), units


def _spread(digits: Tensor) -> Tensor:
    """A column for each query, digit and group, zero beside the group: [plane, group, byte, q digit group]."""
    count, q, planes, groups, width = digits.shape
    spread = digits.new_zeros(planes, groups, width, q, count, groups)
    where = torch.arange(groups)
    spread[:, where, :, :, :, where] = digits.permute(3, 2, 4, 1, 0)
    return spread.flatten(3)


def _cut(matrix: Tensor, planes: int, width: int) -> Tensor:
    """The rows of `_spread` [plane width, columns] that there are bytes for: the last group may be short."""
    return matrix.flatten(1, 2)[:, :width].reshape(planes * width, -1)


def _fold(units: Tensor) -> Tensor:
    """What makes sums of digits sums of entries: [q digit group, q group]."""
    q, groups = units.shape
    powers = BASE ** -torch.arange(DIGITS).to(units)
    blocks = units[:, None, :] * powers[None, :, None]  # [q, digit, group]
    fold = units.new_zeros(q, DIGITS, groups, q, groups)
    query, group = torch.arange(q)[:, None], torch.arange(groups)[None, :]
    fold[query, :, group, query, group] = blocks.transpose(1, 2)
    return fold.flatten(3).flatten(0, 2)

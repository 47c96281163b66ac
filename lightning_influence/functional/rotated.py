"""Rounding to 2 or 4 bits: entries are rotated, so that they look Gaussian, and rounded evenly.

The Hadamard rotation spreads an outlier over 64 entries, and its noise too (Ashkboos et al. 2024,
arXiv:2404.00456, rotate activations so). Then 256 entries have one step, in proportion to their root mean square:
that of the uniform quantiser with the least squared error for a Gaussian (Max 1960, "Quantizing for minimum
distortion").
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.functional.quantize import scale_groups

ROTATED_GROUP = 256
ROTATED_TOGETHER = 64
CHUNK_ELEMENTS = 2**19
STEPS = {2: 0.9957, 4: 0.3352}  # over the root mean square
NOISE = {2: 0.1188, 4: 0.01154}  # mean squared error over the mean square, of a Gaussian


def rotated_width(width: int) -> int:
    """Entries that `width` entries take: a multiple of 64."""
    return -(-width // ROTATED_TOGETHER) * ROTATED_TOGETHER


def rotated_group_count(width: int) -> int:
    """Number of steps that `width` entries take; the last may be that of fewer than 256 entries."""
    return -(-width // ROTATED_GROUP)


@functools.cache
def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < ROTATED_TOGETHER:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / ROTATED_TOGETHER**0.5


def rotate_groups(values: Tensor) -> Tensor:
    """Each 64 entries times a symmetric orthonormal matrix, which is its own inverse.

    Args:
        values: shape [..., d]; padded with zeros to a multiple of 64.

    Example:
        >>> rotated = rotate_groups(torch.eye(1, 100))
        >>> rotated.shape, round(float(rotate_groups(rotated)[0, 0]), 4)
        (torch.Size([1, 128]), 1.0)
    """
    missing = -values.shape[-1] % ROTATED_TOGETHER
    padded = pad(values, (0, missing)) if missing else values
    return (padded.unflatten(-1, (-1, ROTATED_TOGETHER)) @ _hadamard().to(values)).flatten(-2)


def quantize_rotated(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rotate and round.

    The squared error of a group is about `NOISE[bits]` of its square; in the rotated entries an error is at most
    half a step where they lie within the 2^bits steps, which are centred at 0.

    Args:
        values: shape [..., d].
        bits: 2 or 4.

    Returns:
        Codes uint8 [..., ceil(d / 64) 64 bits / 8], the first entry in the lowest bits, and steps float32
        [..., ceil(d / 256)].
    """
    width = rotated_width(values.shape[-1])
    flat = values.reshape(-1, values.shape[-1])
    codes = torch.empty(len(flat), width * bits // 8, dtype=torch.uint8, device=values.device)
    steps = torch.empty(len(flat), rotated_group_count(width), device=values.device, dtype=torch.float32)
    for rows in _chunks(flat):
        codes[rows], steps[rows] = _quantize(rotate_groups(flat[rows]), bits)
    lead = values.shape[:-1]
    return codes.view(*lead, codes.shape[1]), steps.view(*lead, steps.shape[1])


def _quantize(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and steps of rotated rows [n, d], which are used up."""
    steps = _group_norms(rotated).float() * STEPS[bits]
    largest = 2**bits - 1
    codes = scale_groups(rotated, 1 / steps.where(steps > 0, 1), ROTATED_GROUP)
    codes = codes.add_(largest / 2).round_().clamp_(0, largest)
    places = torch.tensor([2.0 ** (bits * place) for place in range(8 // bits)]).to(codes)
    return codes.unflatten(-1, (-1, 8 // bits)) @ places, steps  # below 256, so exact


def restore_rotated(codes: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The rotated float32 values [..., d] of codes and steps of `quantize_rotated`, d a multiple of 64."""
    largest = 2**bits - 1
    flat, flat_steps = codes.reshape(-1, codes.shape[-1]), steps.reshape(-1, steps.shape[-1])
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    values = torch.empty(len(flat), codes.shape[-1] * 8 // bits, device=codes.device, dtype=torch.float32)
    for rows in _chunks(values):
        places = (flat[rows].unsqueeze(-1) >> shifts) & largest  # [n, bytes, 8 / bits]
        values[rows] = scale_groups(places.flatten(1).float().sub_(largest / 2), flat_steps[rows], ROTATED_GROUP)
    return values.view(*codes.shape[:-1], values.shape[1])


def _chunks(values: Tensor) -> Iterator[slice]:
    """As many rows at a time as stay in a processor's cache."""
    step = max(1, CHUNK_ELEMENTS // max(1, values.shape[-1]))
    for start in range(0, len(values), step):
        yield slice(start, start + step)


def _group_norms(values: Tensor) -> Tensor:
    """The root mean square of each 256 entries, the last of which may be fewer; shape [n, groups]."""
    whole = values.shape[-1] // ROTATED_GROUP * ROTATED_GROUP
    norms = [values[:, :whole].unflatten(1, (-1, ROTATED_GROUP)).norm(dim=2) / ROTATED_GROUP**0.5]
    if whole < values.shape[-1]:
        rest = values[:, whole:]
        norms.append(rest.norm(dim=1, keepdim=True) / rest.shape[1] ** 0.5)
    return torch.cat(norms, dim=1)

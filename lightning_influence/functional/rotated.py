"""Rounding to 2 or 4 bits: entries are rotated, so that they look Gaussian, and rounded evenly.

The Hadamard rotation spreads an outlier over 64 entries, and its noise too (Ashkboos et al. 2024,
arXiv:2404.00456, rotate activations so). Then 256 entries have one step, in proportion to their root mean square:
that of the uniform quantiser with the least squared error for a Gaussian (Max 1960, "Quantizing for minimum
distortion").
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

ROTATED_GROUP = 256
ROTATED_TOGETHER = 64
STEPS = {2: 0.9957, 4: 0.3352}  # over the root mean square
NOISE = {2: 0.1188, 4: 0.01154}  # mean squared error over the mean square, of a Gaussian


def rotated_group_count(width: int) -> int:
    """Number of groups of 256 that `width` entries take."""
    return -(-width // ROTATED_GROUP)


@functools.cache
def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATED_TOGETHER:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / ROTATED_TOGETHER**0.5


def rotate_groups(values: Tensor) -> Tensor:
    """Each 64 entries times a symmetric orthonormal matrix, which is its own inverse.

    Args:
        values: shape [..., d]; padded with zeros to a multiple of 256.

    Example:
        >>> rotated = rotate_groups(torch.eye(1, 300))
        >>> rotated.shape, round(float(rotate_groups(rotated)[0, 0]), 4)
        (torch.Size([1, 512]), 1.0)
    """
    missing = -values.shape[-1] % ROTATED_GROUP
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
        Codes uint8 [..., ceil(d / 256) 256 bits / 8], the first entry in the lowest bits, and steps float32
        [..., ceil(d / 256)].
    """
    groups = rotate_groups(values).unflatten(-1, (-1, ROTATED_GROUP))
    steps = groups.norm(dim=-1).float() * (STEPS[bits] / ROTATED_GROUP**0.5)
    largest = 2**bits - 1
    codes = groups.div_(steps.where(steps > 0, 1).unsqueeze(-1))
    codes = codes.add_(largest / 2).round_().clamp_(0, largest).to(torch.uint8).flatten(-2)
    places = codes.unflatten(-1, (-1, 8 // bits))
    packed = places[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= places[..., place] << (place * bits)
    return packed, steps


def restore_rotated(codes: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The rotated float32 values [..., groups 256] of codes and steps of `quantize_rotated`."""
    largest = 2**bits - 1
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    places = (codes.unsqueeze(-1) >> shifts) & largest  # [..., bytes, 8 / bits]
    values = places.flatten(-2).float().sub_(largest / 2)
    return (values.unflatten(-1, (-1, ROTATED_GROUP)) * steps.unsqueeze(-1)).flatten(-2)

"""Which coordinates rows keep, and with how many bits, over all layers together.

With z = (Lambda_0 + delta_0)^-1/2 * Q_S^T G Q_A of a query and of an example, a score is sum_j z_j z'_j, to whose
square a coordinate adds about s_j^2, s = Lambda_0 / (Lambda_0 + delta_0). Rounding to b bits leaves the share
LOST[b] of it as noise, and leaving it out all of it. Bytes go where a byte gains most: b bits have those
coordinates whose s_j^2 (LOST[b'] - LOST[b]) is at least the level times the bytes beyond b' bits (reverse
water-filling; Cover and Thomas, "Elements of Information Theory", section 10.3.3), and the level is the one at
which the budget is spent, or the wanted share of the scores is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.codecs.tiers import BYTES_PER_COORDINATE, LOST, Tier, tier_of
from lightning_influence.functional.rotated import ROTATED_TOGETHER, rotated_width

WHITENING_DAMPING = 0.1  # delta_0 as a multiple of the layer's mean Lambda_0
LEAST_GAIN = 1e-12  # of a coordinate without any gradient: it comes last, but comes
TIE = 1e-6  # equal coordinates are taken one after the other
LEVELS = (-60.0, 10.0)  # as powers of 2: everything with 8 bits, and nothing
BISECTIONS = 40


@dataclass(frozen=True)
class Allocation:
    """What rows keep of a layer.

    Args:
        coordinates: int64 [k], places in the flattened [o, i], most important first.
        whitening: float [k], their (Lambda_0 + delta_0)^1/2.
        tiers: their bits, falling; the sizes add up to k.
    """

    coordinates: Tensor
    whitening: Tensor
    tiers: tuple[Tier, ...]

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return sum(tier.nbytes for tier in self.tiers)


def allocate(Lambdas: Mapping[str, Tensor], bytes_per_example: int) -> dict[str, Allocation]:
    """What to keep within a budget.

    Args:
        Lambdas: Lambda_0 of each layer, shape [o, i].
        bytes_per_example: over all layers, kept to unless that leaves a layer without any coordinate: each gets
            at least one.

    Example:
        >>> chosen = allocate({"a": torch.tensor([[4.0, 0.1], [1.0, 0.0]])}, 6)["a"]
        >>> chosen.coordinates.tolist(), chosen.nbytes
        ([0], 5)
    """
    ranked = _ranked(Lambdas, most=int(bytes_per_example / BYTES_PER_COORDINATE[2]) + 1)
    everything, nothing = LEVELS
    level = _nearest(everything, nothing, lambda level: _nbytes(_tiers(ranked, level)) <= bytes_per_example)
    return _allocations(ranked, level)


def allocate_for(Lambdas: Mapping[str, Tensor], spearman: float) -> dict[str, Allocation]:
    """The least to keep for an `expected_spearman` of scores; if none reaches it, everything.

    Args:
        Lambdas: as for `allocate`.
        spearman: below 1.
    """
    ranked = _ranked(Lambdas)
    everything, nothing = LEVELS
    level = _nearest(nothing, everything, lambda level: _expected(ranked, _tiers(ranked, level)) >= spearman)
    return _allocations(ranked, level)


def expected_spearman(Lambdas: Mapping[str, Tensor], kept: Mapping[str, Sequence[Tier]]) -> float:
    """Rank correlation of scores of rows with exact ones, were coordinates Gaussian and independent.

    It is that of scores whose linear correlation is the root of the share of the squares that is kept.

    Args:
        Lambdas: as for `allocate`.
        kept: each layer's tiers, of its most important coordinates.
    """
    return _expected(_ranked(Lambdas), kept)


@dataclass(frozen=True)
class _Ranked:
    """A layer's coordinates, most important first.

    Args:
        places: int64 [k], in the flattened [o, i].
        gains: float64 [k], s^2, falling.
        whitening: [k].
        total: sum of the gains of all coordinates, also of those that are not in `gains`.
        size: how many these are.
    """

    places: Tensor
    gains: Tensor
    whitening: Tensor
    total: float
    size: int


def _ranked(Lambdas: Mapping[str, Tensor], most: int | None = None) -> dict[str, _Ranked]:
    """Of each layer all coordinates, or the `most` important."""
    return {name: _rank(Lambda.flatten(), most) for name, Lambda in Lambdas.items()}


def _rank(Lambda: Tensor, most: int | None) -> _Ranked:
    size = len(Lambda)
    damped = Lambda + WHITENING_DAMPING * Lambda.mean()
    signal = Lambda / damped.where(damped > 0, 1)
    values, places = signal.topk(min(size, most or size))  # sorted
    order = torch.arange(len(values), device=values.device)
    gains = values.double().square().clamp(min=LEAST_GAIN) * (1 - TIE * order / size)
    whitening = damped[places].sqrt()
    total = float(signal.double().square().sum())
    return _Ranked(places, gains, whitening.where(whitening > 0, 1), total, size)


def _tiers(ranked: Mapping[str, _Ranked], level: float) -> dict[str, tuple[Tier, ...]]:
    """What a layer keeps at a level, the power of 2 that a byte has to gain."""
    bits, costs, losses = [0, 2, 4, 8], {0: 0.0, **BYTES_PER_COORDINATE}, {0: 1.0, **LOST}
    thresholds = [
        2.0**level * (costs[more] - costs[fewer]) / (losses[fewer] - losses[more])
        for fewer, more in itertools.pairwise(bits)
    ]  # of the gain, for 2, 4 and 8 bits: rising
    found = {}
    for name, layer in ranked.items():
        wanted = (layer.gains.unsqueeze(0) >= layer.gains.new_tensor(thresholds).unsqueeze(1)).sum(1)
        found[name] = _rounded(*wanted.tolist(), size=len(layer.gains))
    return found


def _rounded(two: int, four: int, eight: int, *, size: int) -> tuple[Tier, ...]:
    """The tiers of a layer that wants so many coordinates with at least 2, 4 and 8 bits, without padding.

    Rotated tiers are a multiple of 64, for which others of the layer's `size` coordinates move up.
    """
    eight = max(eight, int(two == 0))  # at least one coordinate
    rest = size - eight
    fours = min(rest, round((four - eight) / ROTATED_TOGETHER) * ROTATED_TOGETHER)
    twos = min(rest - fours, rotated_width(max(0, two - eight - fours)))
    tail = (twos or fours) % ROTATED_TOGETHER  # only at the layer's end
    if tail <= ROTATED_TOGETHER // 8 * (2 if twos else 4):  # 8 bits each take less than the padding
        eight, fours, twos = eight + tail, fours - tail * (not twos), twos - tail * (twos > 0)
    sizes = {8: eight, 4: fours, 2: twos}
    return tuple(tier_of(bits, number) for bits, number in sizes.items() if number)


def _nbytes(tiers: Mapping[str, Sequence[Tier]]) -> int:
    return sum(tier.nbytes for layer in tiers.values() for tier in layer)


def _expected(ranked: Mapping[str, _Ranked], kept: Mapping[str, Sequence[Tier]]) -> float:
    total = sum(layer.total for layer in ranked.values())
    share = sum(_kept(ranked[name].gains, tiers) for name, tiers in kept.items()) / total if total > 0 else 1.0
    return 6 / math.pi * math.asin(math.sqrt(min(1.0, share)) / 2)


def _kept(gains: Tensor, tiers: Sequence[Tier]) -> float:
    parts = gains[: sum(tier.size for tier in tiers)].split([tier.size for tier in tiers])
    return sum((1 - LOST[tier.bits]) * float(part.sum()) for tier, part in zip(tiers, parts, strict=True))


def _nearest(start: float, end: float, holds: Callable[[float], bool]) -> float:
    """The point nearest to the start where something holds that holds from there to the end."""
    if holds(start):
        return start
    for _ in range(BISECTIONS):
        middle = (start + end) / 2
        if holds(middle):
            end = middle
        else:
            start = middle
    return end


def _allocations(ranked: Mapping[str, _Ranked], level: float) -> dict[str, Allocation]:
    found = {}
    for name, tiers in _tiers(ranked, level).items():
        layer, k = ranked[name], sum(tier.size for tier in tiers)
        found[name] = Allocation(layer.places[:k], layer.whitening[:k], tiers)
    return found

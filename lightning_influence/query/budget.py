"""How many rows and how many queries are in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lightning_influence.codecs import Codec, EigenCodec
from lightning_influence.scoring import ScoredLayer

MEMORY_BUDGET = "1GB"
CHUNK_BYTES = 2**21  # of stored rows worked on at a time, which caches hold, unpacked, in part
LAYER_BYTES = 2**19  # of each layer, so that many layers have no small products
CHUNKS_READ = 4  # from the disk at a time
CHUNKS_MAPPED = 3 * CHUNKS_READ  # those being read, worked on, and given back
ROW_COPIES = 3  # of a layer's rows as float32 numbers
SCORE_COPIES = 4
UNPACKED = {"i1": 4, "f2": 4, "f4": 4, "u1": 16}  # bytes of float32 for an entry; packed ones hold up to 4
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(memory_budget: str | int) -> int:
    """Bytes of a budget.

    Raises:
        ValueError: if it is not positive, or no number of bytes.

    Example:
        >>> parse_bytes("1.5 GB"), parse_bytes("64KiB"), parse_bytes(4096)
        (1500000000, 65536, 4096)
    """
    value: float = math.nan
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool):
        value = memory_budget
    elif isinstance(memory_budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", memory_budget, re.IGNORECASE)
        if found and (found[2] or not found[3]):
            value = float(found[1]) * (BINARY_UNITS if found[3] else UNITS)[found[2].upper()]
    if not value >= 1:
        raise ValueError(
            f'`memory_budget` must be a positive number of bytes, such as "1GB", "256MiB" or an int, got '
            f"{memory_budget!r}."
        )
    return int(value)


def rows_at_once(codecs: Iterable[Codec], queries: int, budget: int) -> int:
    """Rows to work on at a time: half of the budget holds them, unpacked, with all that are mapped and scores."""
    codecs = list(codecs)
    stored = sum(codec.bytes_per_row for codec in codecs)
    a_row = CHUNKS_MAPPED * stored + ROW_COPIES * max(map(_unpacked, codecs)) + 4 * SCORE_COPIES * queries
    return max(1, min(budget // 2 // a_row, max(CHUNK_BYTES, len(codecs) * LAYER_BYTES) // stored))


def queries_at_once(layers: Iterable[ScoredLayer], budget: int) -> int:
    """Preconditioned queries that half of the budget holds."""
    return max(1, budget // 2 // sum(4 * _projected(layer) for layer in layers))


def preconditioned_at_once(layer: ScoredLayer, budget: int) -> int:
    """Dense gradients of a layer, with three copies, that an eighth of the budget holds."""
    return max(1, budget // 8 // (16 * layer.Lambda.numel()))


def _unpacked(codec: Codec) -> int:
    return sum(math.prod(shape) * UNPACKED[dtype] for shape, dtype in codec.arrays().values())


def _projected(layer: ScoredLayer) -> int:
    """Numbers of a preconditioned query."""
    codec = layer.codec
    return sum(tier.width for tier in codec.tiers) if isinstance(codec, EigenCodec) else layer.Lambda.numel()

"""Per-example gradients as a few named arrays, and scores straight from those arrays."""

from lightning_influence.codecs.allocation import Allocation, allocate, allocate_for, expected_spearman
from lightning_influence.codecs.base import Codec, codec_from_config
from lightning_influence.codecs.dense import DenseCodec
from lightning_influence.codecs.eigen import EigenCodec
from lightning_influence.codecs.pairs import PairsCodec

__all__ = [
    "Allocation",
    "Codec",
    "DenseCodec",
    "EigenCodec",
    "PairsCodec",
    "allocate",
    "allocate_for",
    "codec_from_config",
    "expected_spearman",
]

"""Per-example gradients as a few named arrays, and scores straight from those arrays."""

from lightning_influence.codecs.base import Codec, codec_from_config
from lightning_influence.codecs.dense import DenseCodec
from lightning_influence.codecs.eigen import EigenCodec, choose_bits, select_coordinates
from lightning_influence.codecs.pairs import PairsCodec

__all__ = [
    "Codec",
    "DenseCodec",
    "EigenCodec",
    "PairsCodec",
    "choose_bits",
    "codec_from_config",
    "select_coordinates",
]

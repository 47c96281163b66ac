"""How one layer's gradients become rows and factors while examples stream by.

Two ways, by codec. `pairs` rows need no eigenbasis: covariances are summed as the rows are written,
and basis and Lambda are made at the end, from the covariances and the stored rows. `eigen` rows need
a basis first: it comes from the epoch before (or from a first pass over spooled pairs), and Lambda is
summed as the rows are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_influence.codecs import Codec, EigenCodec, PairsCodec
from lightning_influence.codecs.pairs import PairsDtype
from lightning_influence.factors import EigenvalueCorrection, KroneckerCovariance
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import eigenbasis
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.scoring import ScoredLayer

CodecName = Literal["auto", "pairs", "pairs-float16", "pairs-float32", "eigen"]


@dataclass(frozen=True)
class LayerPlan:
    """How a layer's rows will be stored.

    Args:
        shape: (o, i) of the layer's gradient.
        has_bias: whether the gradient's last column is the bias's.
        codec: "pairs" or "eigen".
        positions: shared positions of an example, as the first batch had them.
        dtype: of stored pairs.
    """

    shape: tuple[int, int]
    has_bias: bool
    codec: Literal["pairs", "eigen"]
    positions: int
    dtype: PairsDtype = "int8"

    def pairs_codec(self) -> PairsCodec:
        """The codec for pairs of this layer."""
        return PairsCodec(self.shape, positions=self.positions, has_bias=self.has_bias, dtype=self.dtype)


def plan_layers(
    layers: Mapping[str, TrackedLayer], gradients: Mapping[str, LayerGradient], codec: CodecName
) -> dict[str, LayerPlan]:
    """Choose a codec for each layer from one batch's gradients.

    "auto" takes pairs where examples have one position, and eigen-coordinates for sequences.

    Raises:
        ValueError: if there is no codec of that name.
    """
    if codec not in get_args(CodecName):
        raise ValueError(f"`codec` must be one of {', '.join(get_args(CodecName))}, got {codec!r}.")
    family, _, dtype = codec.partition("-")
    plans = {}
    for name, layer in layers.items():
        positions = gradients[name].positions
        chosen = ("pairs" if positions == 1 else "eigen") if family == "auto" else family
        plans[name] = LayerPlan(layer.shape, layer.has_bias, chosen, positions, dtype or "int8")  # type: ignore[arg-type]
    return plans


class LayerRecord(ABC):
    """What a recorder needs of one layer."""

    codec: Codec

    @abstractmethod
    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Take in a block of finite gradients; returns their rows."""

    @abstractmethod
    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """The layer's factors; `blocks` yields all valid rows as they were written."""


class PairsRecord(LayerRecord):
    """Rows first, basis at the end.

    Args:
        codec: for the rows.
        covariance: shared with the recorder, which updates it before the rows are added.
    """

    def __init__(self, codec: PairsCodec, covariance: KroneckerCovariance) -> None:
        self.codec: PairsCodec = codec
        self.covariance = covariance

    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Round the pairs; the covariances are summed outside."""
        return self.codec.encode(gradient)

    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """Basis from the covariances, Lambda from the rows."""
        basis = eigenbasis(*self.covariance.compute())
        squares, examples = basis.Q_A.new_zeros(basis.shape), 0
        for arrays in blocks:
            gradient = self.codec.decode_factors(arrays)
            squares += second_moment_sum(gradient, basis)
            examples += len(gradient)
        return ScoredLayer(basis, squares / max(examples, 1), self.codec)


class EigenRecord(LayerRecord):
    """Basis first, Lambda along with the rows."""

    def __init__(self, codec: EigenCodec) -> None:
        self.codec: EigenCodec = codec
        self.eigenvalues = EigenvalueCorrection(codec.basis).to(codec.coordinates.device)

    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Sum the squared coordinates and round the leading ones."""
        self.eigenvalues.update(gradient)
        return self.codec.encode(gradient)

    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """Lambda over everything added."""
        return ScoredLayer(self.codec.basis, self.eigenvalues.compute(), self.codec)

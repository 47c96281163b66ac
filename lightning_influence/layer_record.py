"""How one layer's gradients become rows and factors while examples stream by.

Two ways, by codec. `pairs` and `dense` rows need no eigenbasis: covariances are summed as the rows are
written, and basis and Lambda are made at the end, from the covariances and the stored rows. `eigen` rows
need a basis first: it comes from the epoch before (or from a first pass over spooled gradients), and Lambda
is summed as the rows are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_influence.codecs import Codec, DenseCodec, EigenCodec, PairsCodec
from lightning_influence.factors import EigenvalueCorrection, KroneckerCovariance
from lightning_influence.functional.kronecker import diagonal_basis
from lightning_influence.functional.quantize import RowDtype
from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import Coordinates, FactoredGradient, LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.scoring import ScoredLayer

CodecName = Literal["auto", "pairs", "pairs-float16", "pairs-float32", "eigen"]


@dataclass(frozen=True)
class LayerPlan:
    """How a layer's rows will be stored.

    Args:
        shape: (o, i) of the layer's gradient.
        has_bias: whether the gradient's last column is the bias's.
        codec: "pairs", "dense" or "eigen".
        positions: shared positions of an example, as the first batch had them.
        dtype: of stored pairs or dense gradients.
        structure: which Kronecker factors there are.
        ends_in_ones: whether every input ends in the bias's 1, which pairs then leave out.
        batch_dim: the dimension of the layer's inputs that counts examples.
    """

    shape: tuple[int, int]
    has_bias: bool
    codec: Literal["pairs", "dense", "eigen"]
    positions: int
    dtype: RowDtype = "int8"
    structure: KroneckerStructure = FULL
    ends_in_ones: bool = False
    batch_dim: int = 0

    @property
    def needs_basis(self) -> bool:
        """Whether rows can be written only after covariances were seen."""
        return self.codec == "eigen" and not self.structure.is_diagonal

    def codec_without_basis(self) -> PairsCodec | DenseCodec:
        """The codec for rows that are written before there is a basis."""
        if self.codec == "dense":
            return DenseCodec(self.shape, dtype=self.dtype)
        return PairsCodec(self.shape, positions=self.positions, has_bias=self.ends_in_ones, dtype=self.dtype)


def plan_layers(
    layers: Mapping[str, TrackedLayer], gradients: Mapping[str, LayerGradient], codec: CodecName
) -> dict[str, LayerPlan]:
    """Choose a codec for each layer from one batch's gradients.

    "auto" takes pairs where an example's gradient is one outer product, and eigen-coordinates elsewhere.
    "pairs" takes dense gradients where the layer's are no outer products.

    Raises:
        ValueError: if there is no codec of that name.
    """
    if codec not in get_args(CodecName):
        raise ValueError(f"`codec` must be one of {', '.join(get_args(CodecName))}, got {codec!r}.")
    family, _, dtype = codec.partition("-")
    plans = {}
    for name, layer in layers.items():
        gradient = gradients[name]
        chosen = family
        if family == "auto":
            chosen = "pairs" if isinstance(gradient, FactoredGradient) and gradient.positions == 1 else "eigen"
        elif family == "pairs" and not isinstance(gradient, FactoredGradient):
            chosen = "dense"
        plans[name] = LayerPlan(
            layer.shape,
            layer.has_bias,
            chosen,  # type: ignore[arg-type]
            gradient.positions,
            dtype or "int8",  # type: ignore[arg-type]
            layer.structure,
            layer.ends_in_ones,
            layer.batch_dim,
        )
    return plans


class LayerRecord(ABC):
    """What a recorder needs of one layer."""

    codec: Codec

    def reduce(self, gradient: LayerGradient) -> LayerGradient:
        """What `add` needs of the gradients, if that is less; does not matter which of them are finite."""
        return gradient

    @abstractmethod
    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Take in a block of finite gradients, reduced; returns their rows."""

    @abstractmethod
    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """The layer's factors; `blocks` yields all valid rows as they were written."""


class RowsFirstRecord(LayerRecord):
    """Rows first, basis at the end.

    Args:
        codec: for the rows.
        covariance: shared with the recorder, which updates it before the rows are added; None where the
            basis is that of the parameters themselves.
    """

    def __init__(self, codec: PairsCodec | DenseCodec, covariance: KroneckerCovariance | None) -> None:
        self.codec: PairsCodec | DenseCodec = codec
        self.covariance = covariance

    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Round the gradients; the covariances are summed outside."""
        return self.codec.encode(gradient)

    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """Basis from the covariances, Lambda from the rows."""
        metric = self.covariance
        basis = diagonal_basis(self.codec.shape) if metric is None else metric.eigenbasis()
        correction = EigenvalueCorrection(basis).to(basis.eigenvalues_A.device)
        for arrays in blocks:
            correction.update(self.codec.decode_gradient(arrays).to(basis.eigenvalues_A.device))
        return ScoredLayer(basis, correction.compute(), self.codec)


class EigenRecord(LayerRecord):
    """Basis first, Lambda along with the rows.

    Only the coordinates that rows keep are made of every example. All that is asked of the others' Lambda is
    their mean, for the damping, so theirs is that of the first examples.

    Args:
        codec: for the rows.
        first_Lambda: of the first examples, by which the codec's coordinates were chosen.
    """

    def __init__(self, codec: EigenCodec, first_Lambda: Tensor) -> None:
        self.codec: EigenCodec = codec
        self.first_Lambda = first_Lambda
        self.eigenvalues = EigenvalueCorrection(codec.basis).to(codec.coordinates.device)

    def reduce(self, gradient: LayerGradient) -> Coordinates:
        """The kept coordinates."""
        return Coordinates(self.codec.selection.of(gradient).unsqueeze(1))

    def add(self, gradient: LayerGradient) -> dict[str, Tensor]:
        """Sum the squares of the kept coordinates and round them."""
        coordinates = gradient.dense()[:, 0]
        self.eigenvalues.update_some(coordinates, self.codec.coordinates)
        return self.codec.encode_coordinates(coordinates)

    def finish(self, blocks: Iterable[Mapping[str, Tensor]]) -> ScoredLayer:
        """Lambda over everything added, where there are coordinates."""
        Lambda = self.first_Lambda.flatten().clone()
        kept = self.codec.coordinates
        Lambda[kept] = self.eigenvalues.compute().flatten()[kept]
        return ScoredLayer(self.codec.basis, Lambda.view_as(self.first_Lambda), self.codec)

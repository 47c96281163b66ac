"""How one layer's gradients become rows and factors while examples stream by.

Two ways, by codec. `pairs` and `dense` rows need no eigenbasis: covariances are summed as the rows are
written, and basis and Lambda are made at the end, from the covariances and the stored rows. `eigen` rows
need a basis first: it comes from the epoch before (or from a first pass over spooled gradients), and Lambda
is summed as the rows are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_influence.codecs import Codec, DenseCodec, EigenCodec, PairsCodec
from lightning_influence.factors import EigenvalueCorrection, KroneckerCovariance
from lightning_influence.functional.kronecker import Eigenbasis, diagonal_basis
from lightning_influence.gradients import Coordinates, LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.scoring import ScoredLayer


class LayerRecord(ABC):
    """What a recorder needs of one layer."""

    codec: Codec

    def reduce(self, gradient: LayerGradient) -> LayerGradient:
        """What `add` needs of the gradients, if that is less; does not matter which of them are finite."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the rows and covariances."""
        return {}

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
        correction = EigenvalueCorrection(basis, sync_on_compute=False).to(basis.eigenvalues_A.device)
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
        self.eigenvalues = EigenvalueCorrection(codec.basis, sync_on_compute=False).to(codec.coordinates.device)

    @classmethod
    def of_state(cls, basis: Eigenbasis, state: Mapping[str, Tensor]) -> EigenRecord:
        """The record that `state` was of."""
        state = {name: value.to(basis.eigenvalues_A.device) for name, value in state.items()}
        config = {"tiers": state["tiers"].tolist()} if "tiers" in state else {}
        record = cls(EigenCodec.from_config(config, state, basis), state["first_Lambda"])
        record.eigenvalues.squares += state["squares"]
        record.eigenvalues.examples += state["examples"]
        return record

    def state(self) -> dict[str, Tensor]:
        """Which coordinates rows keep, with how many bits, and Lambda's sums."""
        values = {
            **self.codec.state(),
            "tiers": torch.tensor([[tier.bits, tier.size] for tier in self.codec.tiers]),
            "first_Lambda": self.first_Lambda,
            "squares": self.eigenvalues.squares,
            "examples": self.eigenvalues.examples,
        }
        return {name: value.detach().cpu().clone() for name, value in values.items()}

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


def describe_layers(plans: Mapping[str, LayerPlan], layers: Mapping[str, ScoredLayer]) -> list[dict[str, object]]:
    """What a file says of its layers, in the model's order."""
    return [
        {
            "name": name,
            "has_bias": plans[name].has_bias,
            "batch_dim": plans[name].batch_dim,
            "structure": plans[name].structure.to_builtins(),
            "codec": layer.codec.codec_id,
            "config": layer.codec.get_config(),
        }
        for name, layer in layers.items()
    ]

"""Layers that are not attributed, with a part of the reason that is given."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.layers.case import Uncovered


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class WithToken(nn.Module):
    """A class token of its own, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 3))
        self.inside = nn.Identity()


class Scale(nn.Module):
    """A type of layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():  # it is deprecated
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 2))


def quantization_aware() -> nn.Module:
    with warnings.catch_warnings():  # torch.ao.quantization is deprecated
        warnings.simplefilter("ignore")
        from torch.ao.nn.qat import Linear
        from torch.ao.quantization import get_default_qat_qconfig

        return Linear(3, 2, qconfig=get_default_qat_qconfig())


_RECURRENT = "inside of one fused function"
_OWN_FORWARD = "it has a `forward` of its own, which may differ from that of nn."

UNCOVERED = [
    *(Uncovered(f"nn.{k.__name__}", "", lambda k=k: k(3, 4), _RECURRENT) for k in (nn.RNN, nn.LSTM, nn.GRU)),
    Uncovered("nn.LSTM", "bidirectional, 2 layers", lambda: nn.LSTM(3, 4, 2, bidirectional=True), _RECURRENT),
    *(
        Uncovered(f"nn.{k.__name__}", "", lambda k=k: k(3, 4), _RECURRENT)
        for k in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    ),
    Uncovered("nn.Embedding", "max_norm", lambda: nn.Embedding(5, 3, max_norm=1.0), "`max_norm` rescales"),
    Uncovered("nn.EmbeddingBag", "max_norm", lambda: nn.EmbeddingBag(5, 3, max_norm=1.0), "`max_norm` rescales"),
    Uncovered(
        "nn.Embedding",
        "scale_grad_by_freq",
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        "look-ups in the whole batch",
    ),
    Uncovered(
        "nn.EmbeddingBag",
        "scale_grad_by_freq",
        lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True),
        "look-ups in the whole batch",
    ),
    Uncovered("nn.SyncBatchNorm", "", lambda: nn.SyncBatchNorm(3), "statistics are those of all processes"),
    Uncovered(
        "nn.Linear",
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
        "remove_parametrizations",
    ),
    Uncovered(
        "nn.Conv2d",
        "spectral_norm",
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 2, 2)),
        "remove_parametrizations",
    ),
    Uncovered(
        "nn.Linear", "orthogonal", lambda: parametrizations.orthogonal(nn.Linear(3, 3)), "remove_parametrizations"
    ),
    Uncovered("nn.Linear", "old weight_norm", old_weight_norm, "`torch.nn.utils.remove_weight_norm`"),
    Uncovered(
        "nn.Linear",
        "old spectral_norm",
        lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
        "`remove_spectral_norm` before training",
    ),
    Uncovered(
        "nn.Linear",
        "pruned",
        lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
        "`torch.nn.utils.prune.remove`",
    ),
    Uncovered("nn.Linear", "quantization-aware", quantization_aware, "it is quantized"),
    Uncovered("nn.Bilinear", "", lambda: nn.Bilinear(3, 4, 2), "nn.Bilinear multiplies two inputs"),
    Uncovered("nn.PReLU", "", lambda: nn.PReLU(3), "use nn.LeakyReLU"),
    Uncovered("nn.Linear", "own forward", lambda: OwnLinear(3, 2), f"{_OWN_FORWARD}Linear"),
    Uncovered("nn.Conv2d", "own forward", lambda: OwnConv(3, 2, 2), f"{_OWN_FORWARD}Conv2d"),
    Uncovered("nn.Embedding", "own forward", lambda: OwnEmbedding(3, 2), f"{_OWN_FORWARD}Embedding"),
    Uncovered("nn.LayerNorm", "own forward", lambda: OwnNorm(3), f"{_OWN_FORWARD}LayerNorm"),
    Uncovered("nn.BatchNorm2d", "own forward", lambda: OwnBatchNorm(3), f"{_OWN_FORWARD}BatchNorm2d"),
    Uncovered(
        "nn.MultiheadAttention",
        "own forward",
        lambda: OwnAttention(4, 2),
        f"{_OWN_FORWARD}MultiheadAttention",
    ),
    Uncovered("a parameter", "of a module with layers", WithToken, "outside of any layer"),
    Uncovered(
        "a parameter", "of nn.ParameterList", lambda: nn.ParameterList([torch.ones(3)]), "outside of any layer"
    ),
    Uncovered(
        "a parameter",
        "of nn.ParameterDict",
        lambda: nn.ParameterDict({"a": torch.ones(3)}),
        "outside of any layer",
    ),
    Uncovered("another layer", "", Scale, "register an adapter for it (`register_adapter`)"),
]

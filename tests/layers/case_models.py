"""The models of the cases: layers as they are used inside of others, and stand-ins for `transformers`' layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_with_frozen_bias() -> nn.Module:
    layer = nn.Linear(5, 3)
    layer.bias.requires_grad_(False)
    return layer


class Lora(nn.Module):
    """A low-rank update of a frozen layer, as PEFT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(5, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


class Positions(nn.Module):
    """Tokens [n, t] and positions that all examples share."""

    def __init__(self, *, has_batch: bool = False, is_first: bool = False, is_in_place: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 3), nn.Embedding(9, 3)
        self.has_batch, self.is_first, self.is_in_place = has_batch, is_first, is_in_place

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).flip(0)
        x, added = self.tokens(tokens), self.positions(places[None] if self.has_batch else places)
        if self.is_in_place:
            x += added
            return x
        return added + x if self.is_first else x + added


class Tied(nn.Module):
    """A table that is also the output layer."""

    def __init__(self, *, bias: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=padding_idx)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


class TiedByFunction(nn.Module):
    """The same, without a module for the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.hidden = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.hidden(self.embedding(tokens))), self.embedding.weight)


class WeightedBag(nn.EmbeddingBag):
    """Bags [n, s] whose weights are the second argument."""

    def __call__(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().__call__(rows, per_sample_weights=weights)


class SelfAttention(nn.Module):
    """Queries that are keys and values."""

    def __init__(
        self, *, is_training: bool = True, need_weights: bool = True, batch_first: bool = True, **options: bool
    ) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.train(is_training)
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=self.need_weights)[0]


class CrossAttention(nn.Module):
    """Queries, keys and values of their own."""

    def __init__(self, *, shares_key: bool = False, **options: bool | int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)  # type: ignore[arg-type]
        self.shares_key = shares_key

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, key if self.shares_key else value)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Conv1D(nn.Module):
    """`transformers.pytorch_utils.Conv1D`, known by its name and module."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return y.view(*x.shape[:-1], self.nf)


class LlamaRMSNorm(nn.Module):
    """In float32 at least, rounded before it meets the weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-3

    def normalized(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalized(x).to(x.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """With 1 added to the weight, and rounded afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        return ((1 + self.weight) * self.normalized(x)).to(x.dtype)


class T5LayerNorm(LlamaRMSNorm):
    """An RMS norm by another name."""

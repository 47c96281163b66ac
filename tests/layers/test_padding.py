"""Padding a batch further changes neither gradients nor factors, in any layer of a transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.factors import KroneckerCovariance
from lightning_influence.layers import track_layers
from lightning_influence.step import StepCapture

PADDING, IGNORED = 0, -100
LENGTHS = [5, 3, 2, 4]


class Padded(nn.Module):
    """A language model whose attention leaves padding out; a bag of the same words is added to each place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8, padding_idx=PADDING)
        self.bag = nn.EmbeddingBag(9, 8, padding_idx=PADDING)
        self.positions, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 8, 1)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        is_padding, s = tokens == PADDING, tokens.shape[1]
        x = self.table(tokens) + self.positions(torch.arange(s)) + self.bag(tokens).unsqueeze(1)
        normed = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        x = x + self.attention(normed, normed, normed, key_padding_mask=is_padding, need_weights=False)[0]
        x = self.block(x, src_key_padding_mask=is_padding)
        return F.linear(x, self.table.weight)


def batch(longest: int) -> tuple[Tensor, Tensor]:
    """Tokens and next tokens, padded to a length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(LENGTHS), longest), PADDING)
    targets = torch.full((len(LENGTHS), longest), IGNORED)
    for row, length in enumerate(LENGTHS):
        text = torch.randint(1, 9, (length + 1,), generator=generator)
        tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
    return tokens, targets


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Padded()


def measured(model: nn.Module, longest: int) -> dict[str, tuple[Tensor, ...]]:
    """Each layer's dense gradients and, where it has any, its A, S and number of positions."""
    tokens, targets = batch(longest)
    tracked, coverage = track_layers(model)
    assert coverage.share == 1
    with StepCapture(tracked) as capture:
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    found = {}
    for name, gradient in capture.gradients(len(LENGTHS)).gradients.items():
        found[name] = (gradient.dense(),)
        if not tracked[name].structure.is_diagonal:
            metric = KroneckerCovariance(tracked[name].shape, tracked[name].structure)
            metric.update(gradient)
            found[name] += (*metric.compute(), metric.positions)
    return found


@pytest.mark.parametrize("more", [1, 7])
def test_padding_further_changes_neither_gradients_nor_factors(model: nn.Module, more: int) -> None:
    short, long = measured(model, 5), measured(model, 5 + more)
    assert short.keys() == long.keys()
    for name, expected in short.items():
        assert expected[0].abs().sum() > 0, name
        for found, value in zip(long[name], expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

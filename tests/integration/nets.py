"""Small nets with one of everything: convolutions with normalization, and a transformer with shared tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Features [n, 5] as a signal of 5 points to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 3, padding="same", padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2, stride=2)
        self.group_norm = nn.GroupNorm(3, 6)
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x.unsqueeze(1))), inplace=True)
        x = torch.tanh(self.group_norm(self.grouped(x)))
        return self.head(F.leaky_relu(self.up(x)).mean(-1))


class SmallTransformer(nn.Module):
    """Tokens [n, s] to logits [n, s, 7]; the output layer is the table of tokens, used without a module.

    The first block is written out with `nn.MultiheadAttention`, the second is torch's own and has
    positions first, as torch's default is.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, norm_first=True)
        self.last_norm = nn.RMSNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        s = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(s)
        x = self.tokens(tokens) + self.positions(torch.arange(s))
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        x = self.block(x.transpose(0, 1), src_mask=mask).transpose(0, 1)
        return F.linear(self.last_norm(x), self.tokens.weight)

"""Small models, losses and random examples that the reference tests run on; o != i everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Example = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """5 -> 4 -> 3 with an in-place activation after the first layer."""

    def __init__(self, *, has_bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, bias=has_bias)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(F.elu(self.first(x), inplace=True)))


class TokenModel(nn.Module):
    """Tokens [n, s] to logits [n, s, 7]; the mixing layer (no bias) is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.down = nn.Linear(6, 4)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.down(self.embedding(tokens))
        x = x + torch.tanh(self.mix(x))
        x = x.cumsum(dim=1) / 2  # positions depend on earlier ones
        return self.head(x + torch.tanh(self.mix(x)))


def classification_loss(model: nn.Module, example: Example) -> Tensor:
    """Cross-entropy of one example x [i], y []."""
    x, y = example
    return F.cross_entropy(model(x[None]), y[None], reduction="sum")


def token_loss(model: nn.Module, example: Example) -> Tensor:
    """Cross-entropy summed over the tokens [s] whose target is not -100."""
    tokens, targets = example
    logits = model(tokens[None])[0]
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


def classification_examples(n: int, *, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return list(zip(features, labels, strict=True))


def token_examples(lengths: list[int], *, seed: int = 0) -> list[Example]:
    """One sequence a length; the last target of each is ignored."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        tokens = torch.randint(0, 7, (length + 1,), generator=generator)
        targets = tokens[1:].clone()
        targets[-1] = -100
        examples.append((tokens[:-1], targets))
    return examples


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded_classifier(*, has_bias: bool = True) -> Classifier:
    torch.manual_seed(1)
    return Classifier(has_bias=has_bias)


def seeded_token_model() -> TokenModel:
    torch.manual_seed(2)
    return TokenModel()

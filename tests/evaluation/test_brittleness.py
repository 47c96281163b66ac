"""Removing the top examples of each query, on a model whose predictions are known to rest on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.evaluation import Recipe, Retraining, margins, remove_top_k, retrain_subsets

POSITIVE, NEGATIVE = 8, 4
N = POSITIVE + NEGATIVE


class Vote(nn.Module):
    """Two logits, the share of the votes of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.votes = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.votes.expand(len(inputs), 2)


def count(model: nn.Module, subset: Any, seed: int) -> None:
    assert isinstance(model, Vote)
    with torch.no_grad():
        for label in subset:
            model.votes[label] += 1


LABELS = [0] * POSITIVE + [1] * NEGATIVE
QUERIES, CLASSES = torch.zeros(2, 1), torch.tensor([0, 1])
RETRAIN = functools.partial(
    retrain_subsets,
    Vote,
    LABELS,
    train=count,
    measure=lambda model: margins(model, QUERIES, CLASSES),
    progress=False,
)


def removed(scores: Tensor, numbers: Sequence[int]) -> Any:
    return remove_top_k(scores, numbers, retrain=RETRAIN)


def test_a_vote_flips_without_enough_of_its_voters() -> None:
    scores = torch.stack([torch.arange(N, 0, -1.0), torch.arange(float(N))])  # each class's own voters first
    found = removed(scores, [3, 4, 5, 6])
    assert found.baseline.tolist() == [4, -4]
    assert found.margins.tolist() == [[1, 0, -1, -2], [-7, -8, -7, -6]]
    assert found.flipped.tolist() == [0, 0, 1, 1]  # the second query had no prediction to flip
    assert found.data_support[0] == 5
    assert math.isnan(found.data_support[1])


def test_opponents_are_not_what_it_rests_on() -> None:
    found = removed(-torch.arange(N, 0, -1.0).expand(2, N), [1, 4])
    assert found.margins[0].tolist() == [5, 8]
    assert found.data_support[0] == math.inf


def test_examples_without_a_row_are_not_removed() -> None:
    scores = torch.full((2, N), torch.nan)
    scores[:, :2] = 1
    assert removed(scores, [2]).margins[0].tolist() == [2]


def test_no_more_are_removed_than_have_a_score() -> None:
    scores = torch.full((2, N), torch.nan)
    scores[:, 3:5] = -torch.inf
    assert removed(scores, [2]).removed == (2,)
    with pytest.raises(ValueError, match="asks for 3 examples, but query 0 has 2 scores that are not NaN"):
        removed(scores, [2, 3])


def test_margins_are_of_the_given_class() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert margins(nn.Identity(), logits, torch.tensor([1, 2])).tolist() == [2, -2]


def test_errors_name_the_argument() -> None:
    scores = torch.zeros(2, N)
    with pytest.raises(ValueError, match=r"`scores` must have shape \[q, N\], got \[12\]"):
        removed(scores[0], [1])
    for numbers in ([], [2, 1], [0], [N]):
        with pytest.raises(ValueError, match="`removed` must be increasing numbers from 1 to 11"):
            removed(scores, numbers)
    with pytest.raises(
        ValueError, match=r"a margin for each of the 3 queries of `scores`, shape \[4, 3\], got \[4, 2\]"
    ):
        removed(torch.zeros(3, N), [1])


def test_a_network_rests_on_the_examples_of_its_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    inputs = torch.randn(60, 4, generator=generator) / 5 + nn.functional.one_hot(labels, 4)
    queries, classes = inputs[:6], labels[:6]
    recipe = Recipe(
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        functools.partial(torch.optim.SGD, lr=0.5),
        epochs=4,
        batch_size=10,
    )
    retrain = functools.partial(
        retrain_subsets,
        lambda: nn.Linear(4, 2),
        torch.utils.data.TensorDataset(inputs, labels),
        train=recipe,
        measure=lambda model: margins(model, queries, classes),
        seeds=2,
        progress=False,
    )
    of_its_class = (labels[None] == classes[:, None]).float()
    at_random = torch.rand(6, 60, generator=generator)
    flipped = {
        name: remove_top_k(s, [30], retrain=retrain).flipped
        for name, s in {"class": of_its_class, "random": at_random}.items()
    }
    assert float(flipped["class"]) == 1
    assert float(flipped["random"]) == 0
    assert isinstance(retrain(torch.ones(1, 60, dtype=torch.bool)), Retraining)

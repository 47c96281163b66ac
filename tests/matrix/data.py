"""Data that comes in other ways than from one shuffled dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.integration.models import Task, vector_data
from tests.matrix import models
from tests.matrix.situation import BATCH, Expected, N, Situation, refused, shuffled

SHORT = 10  # examples of the second loader: five batches of two


class FirstTwoTask(Task):
    """Its batches are inputs, targets and what else there may be."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


class JoinedTask(Task):
    """One forward over the examples of all loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        inputs, targets = zip(*(part for part in parts if part is not None), strict=True)
        return super().training_step([torch.cat(inputs), torch.cat(targets)], batch_idx)


class Stream(IterableDataset):
    """The examples and their numbers, in another order than the dataset's and without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        examples = vector_data(N)
        return ((*examples[index], index) for index in reversed(range(N)))


def numbers(batch: Sequence[Tensor]) -> list[int]:
    """Each row's place in the dataset, which the batch brings."""
    return batch[2].tolist()


def streamed() -> DataLoader:
    """Batches of a stream."""
    return DataLoader(Stream(), batch_size=BATCH)


def with_repeats() -> DataLoader:
    """Draws with replacement: some examples twice or more, some never."""
    weights = torch.arange(1.0, N + 1)
    generator = torch.Generator().manual_seed(2)
    sampler = WeightedRandomSampler(weights.tolist(), N, generator=generator)
    return DataLoader(vector_data(N), batch_size=BATCH, sampler=sampler)


def subset() -> Dataset:
    """Every other example of a larger dataset; rows stand by the place in the subset."""
    return Subset(vector_data(2 * N), range(0, 2 * N, 2))


def short_data() -> TensorDataset:
    """Of the second loader."""
    return vector_data(SHORT, seed=4)


def both() -> Dataset:
    """The datasets of two loaders, one after the other."""
    return ConcatDataset([vector_data(N), short_data()])


def two_loaders(mode: str) -> CombinedLoader:
    """A long and a short one, shuffled."""
    return CombinedLoader({"long": shuffled(), "short": shuffled(short_data, batch_size=2)}, mode)


def combined(mode: str, rows: str) -> Situation:
    """Two loaders whose examples go through one forward."""
    return Situation(
        f"CombinedLoader, {mode}",
        Expected(rows=rows),
        task=JoinedTask,
        data=partial(two_loaders, mode),
        examples=both,
        is_quick=mode == "max_size",
    )


DATA = [
    Situation("WeightedRandomSampler", Expected(rows="13/9/0"), data=with_repeats),
    Situation("Subset", data=partial(shuffled, subset), examples=subset, is_quick=True),
    Situation(
        "batch sampler drops the last batch", Expected(rows="20/2/0"), data=partial(shuffled, drop_last=True)
    ),
    Situation("persistent workers", data=partial(shuffled, num_workers=2, persistent_workers=True)),
    Situation(
        "IterableDataset with index_fn",
        task=FirstTwoTask,
        data=streamed,
        influence={"index_fn": numbers, "num_examples": N},
    ),
    Situation(
        "IterableDataset with index_key",
        task=FirstTwoTask,
        data=streamed,
        influence={"index_key": 2, "num_examples": N},
    ),
    Situation("IterableDataset without index", refused("index_fn"), task=FirstTwoTask, data=streamed),
    combined("min_size", f"{20 + SHORT}/2/0"),
    combined("max_size", f"{N + SHORT}/0/0"),
    combined("max_size_cycle", f"{N + SHORT}/0/0"),
    Situation("mixup", refused("makes rows of several examples, as mixup and cutmix do"), task=models.MixupTask),
]

"""Rows that a distributed sampler repeats, so that each process gets as many, have no index."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Subset

from lightning_influence.errors import RowIndexError
from lightning_influence.training.indices import NO_ROW, IndexRecorder
from tests.training.index_driver import DATASET, Driver, Model, N, fit, make_loader, make_trainer


class OwnSampler(DistributedSampler[Any]):
    """Deals blocks instead of every other example."""

    def __iter__(self) -> Iterator[int]:
        start = self.rank * len(self)
        return iter([place % N for place in range(start, start + len(self))])


class BackwardsBatchSampler(BatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(super().__iter__())[::-1])


class SameBatchSampler(BatchSampler):
    """A subclass that keeps the order."""


def epochs(flat: list[int], *, num_epochs: int = 2) -> list[list[int]]:
    size = len(flat) // num_epochs
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def deal(world: int, make: Any, **options: Any) -> list[tuple[list[list[int]], list[list[int]]]]:
    """For each rank what it was trained on and what was recorded, in each of two epochs."""
    dealt = []
    for rank in range(world):
        model, driver = fit(make(world, rank), recorder=IndexRecorder(**options))
        assert driver.problems == []
        dealt.append((epochs(flat(model.truth)), epochs(flat(driver.recorded))))
    return dealt


def assert_padding_is_dropped(dealt: list[tuple[list[list[int]], list[list[int]]]], num_examples: int) -> None:
    for epoch in range(2):
        kept = [index for _, recorded in dealt for index in recorded[epoch] if index != NO_ROW]
        assert sorted(kept) == list(range(num_examples))
        for truth, recorded in dealt:
            assert all(found in (NO_ROW, true) for found, true in zip(recorded[epoch], truth[epoch], strict=True))


def sampler_of(world: int, rank: int, **options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(DATASET, num_replicas=world, rank=rank, **options)


LOADERS = {
    "sampler": lambda world, rank: make_loader(sampler=sampler_of(world, rank)),
    "no_shuffle": lambda world, rank: make_loader(sampler=sampler_of(world, rank, shuffle=False)),
    "workers": lambda world, rank: make_loader(sampler=sampler_of(world, rank), num_workers=1),
    "batch_sampler": lambda world, rank: DataLoader(
        DATASET, batch_sampler=SameBatchSampler(sampler_of(world, rank), 2, False)
    ),
    "batch_size_none": lambda world, rank: make_loader(batch_size=None, sampler=sampler_of(world, rank)),
    "batch_sampler_as_sampler": lambda world, rank: make_loader(
        batch_size=None, sampler=BatchSampler(sampler_of(world, rank), 2, False)
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_padding_has_no_row(name: str) -> None:
    assert_padding_is_dropped(deal(2, LOADERS[name]), N)


def test_padding_has_no_row_among_four_processes() -> None:
    assert_padding_is_dropped(deal(4, LOADERS["sampler"]), N)


def test_more_processes_than_examples() -> None:
    few = Subset(DATASET, range(2))

    def make(world: int, rank: int) -> DataLoader:
        return make_loader(few, sampler=DistributedSampler(few, num_replicas=world, rank=rank))

    assert_padding_is_dropped(deal(5, make), 2)


def test_padding_of_another_sampler_wrapped_by_lightning() -> None:
    def make(world: int, rank: int) -> DataLoader:
        every_second = [0, 2, 4, 6, 8]
        sampler = DistributedSamplerWrapper(every_second, num_replicas=world, rank=rank, shuffle=False)
        return make_loader(sampler=sampler)

    dealt = deal(2, make)
    assert [recorded[0] for _, recorded in dealt] == [[0, 4, 8], [2, 6, NO_ROW]]


@pytest.mark.parametrize("options", [{"index_fn": lambda batch: batch[1]}, {"index_key": 1}], ids=["fn", "key"])
def test_padding_has_no_row_with_indices_from_the_batch(options: dict[str, Any]) -> None:
    assert_padding_is_dropped(deal(2, LOADERS["sampler"], **options), N)


def test_padding_of_one_of_several_loaders() -> None:
    class Both(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["b"], batch_idx)

    loaders = {"a": make_loader(), "b": make_loader(sampler=sampler_of(2, 1, shuffle=False))}
    _, driver = fit(loaders, model=Both(), max_epochs=1)
    assert driver.recorded[1] == [4, 5, 6, 7, N + 9, NO_ROW]


NOT_PADDED = {
    "drop_last": lambda: make_loader(sampler=sampler_of(2, 1, drop_last=True)),
    "divides": lambda: make_loader(sampler=DistributedSampler(range(10), num_replicas=2, rank=1)),
    "unrepeated": lambda: make_loader(sampler=UnrepeatedDistributedSampler(DATASET, num_replicas=2, rank=0)),
    "own_sampler_drop_last": lambda: make_loader(
        sampler=OwnSampler(DATASET, num_replicas=2, rank=1, drop_last=True)
    ),
    "own_batch_sampler_drop_last": lambda: DataLoader(
        DATASET, batch_sampler=BackwardsBatchSampler(sampler_of(2, 1, drop_last=True), 2, False)
    ),
}


@pytest.mark.parametrize("name", NOT_PADDED)
def test_samplers_without_padding_lose_no_row(name: str) -> None:
    model, driver = fit(NOT_PADDED[name]())
    assert driver.problems == []
    assert driver.recorded == model.truth


REFUSED: dict[str, tuple[Any, str]] = {
    "own_sampler": (
        lambda: make_loader(sampler=OwnSampler(DATASET, num_replicas=2, rank=1)),
        "OwnSampler may repeat examples so that each of 2 processes .* is unknown; give the sampler `drop_last",
    ),
    "own_batch_sampler": (
        lambda: DataLoader(DATASET, batch_sampler=BackwardsBatchSampler(sampler_of(2, 1), 2, False)),
        "DistributedSampler may repeat examples .* torch's `DistributedSampler` and `BatchSampler`",
    ),
}


@pytest.mark.parametrize("options", [{}, {"index_key": 1}], ids=["recorded", "index_key"])
@pytest.mark.parametrize("name", REFUSED)
def test_padding_that_cannot_be_told_is_refused(name: str, options: dict[str, Any]) -> None:
    make, message = REFUSED[name]
    _, driver = fit(make(), recorder=IndexRecorder(**options), max_epochs=1)
    assert driver.recorded == []
    with pytest.raises(RowIndexError, match=message):
        raise RowIndexError(driver.problems[0])


def test_indices_from_the_batch_must_be_as_many_as_the_sampler_drew() -> None:
    recorder = IndexRecorder(lambda batch: batch[1][:2])
    _, driver = fit(make_loader(sampler=sampler_of(2, 1)), recorder=recorder, max_epochs=1)
    assert (
        "`index_fn` gives 2 indices for 4 examples, so which of the rows a DistributedSampler"
        in driver.problems[0]
    )


class WritingDriver(Driver):
    """Leaves its process's rows in a file."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(IndexRecorder(**options))
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {"truth": pl_module.truth, "recorded": self.recorded, "problems": self.problems}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


class Stream(IterableDataset):
    """Splits itself among processes."""

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank()
        return iter([DATASET[place] for place in range(rank, N - 1, 2)])


def train_two_processes(folder: Path, loader: Any, strategy: str, **options: Any) -> list[dict[str, Any]]:
    trainer = make_trainer(WritingDriver(folder, **options), strategy=strategy, devices=2)
    trainer.fit(Model(), loader)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("strategy", "loader_options"),
    [
        ("ddp_fork", {"shuffle": True}),
        ("ddp_fork", {"sampler": torch.utils.data.SubsetRandomSampler(range(N))}),
        ("ddp_spawn", {"shuffle": True, "num_workers": 1}),
    ],
    ids=["fork", "sampler_wrapped_by_lightning", "spawn_workers"],
)
def test_two_processes_have_each_example_once(
    tmp_path: Path, strategy: str, loader_options: dict[str, Any]
) -> None:
    found = train_two_processes(tmp_path, make_loader(**loader_options), strategy)
    assert [each["problems"] for each in found] == [[], []]
    dealt = [(epochs(flat(each["truth"])), epochs(flat(each["recorded"]))) for each in found]
    assert [len(epoch) for truth, _ in dealt for epoch in truth] == [6] * 4
    assert_padding_is_dropped(dealt, N)


@pytest.mark.ddp
def test_two_processes_with_a_stream_that_holds_indices(tmp_path: Path) -> None:
    loader = make_loader(Stream(), batch_size=2)
    found = train_two_processes(tmp_path, loader, "ddp_fork", index_key=1, num_examples=N - 1)
    assert [each["problems"] for each in found] == [[], []]
    assert [each["recorded"] for each in found] == [each["truth"] for each in found]

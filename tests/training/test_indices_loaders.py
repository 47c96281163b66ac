"""Several training dataloaders: their datasets stand one after the other."""

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import register_pytree_node
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_layout import place_loaders
from lightning_influence.training.indices import IndexRecorder
from tests.training.index_driver import DATASET, Driver, Model, N, fit, make_loader, make_trainer

SHORT = 3
SHORT_DATASET = TensorDataset(torch.ones(SHORT, 3), torch.arange(SHORT))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(SHORT_DATASET)


class UnsizedSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SHORT).tolist())


def parts_of(batch: Any) -> Iterator[Any]:
    """Each loader's part: rows and their indices, or None."""
    if batch is None or (isinstance(batch, list) and isinstance(batch[0], torch.Tensor)):
        yield batch
        return
    for child in batch.values() if isinstance(batch, dict) else batch:
        yield from parts_of(child)


class ManyModel(Model):
    """Remembers each loader's indices, one list a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        parts = list(parts_of(batch))
        self.truth.append([[] if part is None else part[1].tolist() for part in parts])
        return torch.stack([self.layers(part[0]).square().mean() for part in parts if part is not None]).sum()


def short_loader(**options: Any) -> DataLoader:
    return make_loader(SHORT_DATASET, **({"batch_size": 2, "shuffle": True} | options))


def long_loader(**options: Any) -> DataLoader:
    return make_loader(DATASET, **({"shuffle": True} | options))


def assert_all_recorded(model: Model, driver: Driver, *, num_batches: int) -> None:
    offsets = [each.offset for each in driver.recorder.datasets]
    assert driver.problems == []
    assert len(model.truth) == num_batches
    assert driver.parts == [tuple(map(len, parts)) for parts in model.truth]
    assert driver.recorded == [
        [offset + index for offset, part in zip(offsets, parts, strict=True) for index in part]
        for parts in model.truth
    ]


WORKERS = {"num_workers": 1}
COLLECTIONS: dict[str, tuple[Callable[[], Any], dict[str, Any], list[tuple[str, int]], int]] = {
    # name: loaders, Trainer arguments, datasets, batches in two epochs (3 of 11 examples, 2 of 3)
    "list": (lambda: [long_loader(), short_loader()], {}, [("0", N), ("1", SHORT)], 6),
    "list_of_one": (lambda: [long_loader()], {}, [("0", N)], 6),
    "min_size": (
        lambda: CombinedLoader({"long": long_loader(), "short": short_loader()}, "min_size"),
        {},
        [("long", N), ("short", SHORT)],
        4,
    ),
    "max_size": (
        lambda: CombinedLoader({"short": short_loader(), "long": long_loader()}, "max_size"),
        {},
        [("short", SHORT), ("long", N)],
        6,
    ),
    "max_size_workers": (
        lambda: CombinedLoader([short_loader(**WORKERS), long_loader()], "max_size"),
        {},
        [("0", SHORT), ("1", N)],
        6,
    ),
    "cycle": (
        lambda: CombinedLoader([short_loader(batch_size=3), long_loader(batch_size=2)], "max_size_cycle"),
        {},
        [("0", SHORT), ("1", N)],
        12,
    ),
    "cycle_workers": (
        lambda: [short_loader(**WORKERS), long_loader(batch_size=2, **WORKERS)],
        {},
        [("0", SHORT), ("1", N)],
        12,
    ),
    "cycle_persistent_workers": (
        lambda: [short_loader(persistent_workers=True, **WORKERS), long_loader(batch_size=2)],
        {},
        [("0", SHORT), ("1", N)],
        12,
    ),
    "nested": (
        lambda: {"a": [long_loader(), (short_loader(),)], "b": short_loader()},
        {},
        [("a/0", N), ("a/1/0", SHORT), ("b", SHORT)],
        6,
    ),
    "limit": (
        lambda: [short_loader(), long_loader()],
        {"limit_train_batches": 1},
        [("0", SHORT), ("1", N)],
        2,
    ),
    "reload_every_epoch": (
        lambda: [short_loader(), long_loader()],
        {"reload_dataloaders_every_n_epochs": 1},
        [("0", SHORT), ("1", N)],
        6,
    ),
    "unknown_length_with_limit": (
        lambda: [short_loader(sampler=UnsizedSampler(), shuffle=False), long_loader()],
        {"limit_train_batches": 3},
        [("0", SHORT), ("1", N)],
        6,
    ),
    "same_dataset_twice": (lambda: [long_loader(), long_loader()], {}, [("0", N), ("1", N)], 6),
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_rows_of_each_loader_equal_truth(name: str) -> None:
    make, options, datasets, num_batches = COLLECTIONS[name]
    model, driver = fit(make(), model=ManyModel(), **options)
    assert [(each.name, each.length) for each in driver.recorder.datasets] == datasets
    assert driver.recorder.num_examples == sum(length for _, length in datasets)
    assert_all_recorded(model, driver, num_batches=num_batches)


def test_an_exhausted_loader_gives_no_rows() -> None:
    _, driver = fit(CombinedLoader([short_loader(), long_loader()], "max_size"), model=ManyModel(), max_epochs=1)
    assert driver.parts == [(2, 4), (1, 4), (0, 3)]


def test_a_cycle_starts_a_short_loader_anew() -> None:
    loaders = [short_loader(shuffle=False), long_loader(batch_size=2)]
    _, driver = fit(loaders, model=ManyModel(), max_epochs=1)
    assert [rows[:count] for rows, (count, _) in zip(driver.recorded, driver.parts, strict=True)] == [
        [0, 1],
        [2],
    ] * 3


def test_hooks_may_iterate_several_loaders() -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            for loader in trainer.train_dataloader:
                assert len(list(loader)) == len(loader)

    model, driver = ManyModel(), Driver()
    loaders = [short_loader(**WORKERS), long_loader(batch_size=2)]
    make_trainer(Look(), driver, max_epochs=1).fit(model, loaders)
    assert_all_recorded(model, driver, num_batches=6)


def test_training_with_several_loaders_is_that_without_recorder() -> None:
    def train(*callbacks: pl.Callback) -> tuple[Any, ...]:
        pl.seed_everything(1, verbose=False)
        model = ManyModel()
        make_trainer(*callbacks).fit(model, [short_loader(), long_loader()])
        return model.truth, torch.nn.utils.parameters_to_vector(model.parameters()), torch.get_rng_state()

    plain, recorded = train(), train(Driver())
    assert recorded[0] == plain[0]
    assert torch.equal(recorded[1], plain[1])
    assert torch.equal(recorded[2], plain[2])


def test_samplers_of_all_loaders_are_put_back() -> None:
    loaders = [short_loader(), long_loader()]
    before = [loader.batch_sampler for loader in loaders]
    fit(loaders, model=ManyModel())
    assert [loader.batch_sampler for loader in loaders] == before


@pytest.mark.parametrize("options", [{"index_fn": lambda part: part[1]}, {"index_key": 1}], ids=["fn", "key"])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_batches_that_hold_indices_are_asked_part_by_part(options: dict[str, Any], mode: Any) -> None:
    loaders = {"long": long_loader(), "stream": make_loader(Stream(), batch_size=2)}
    recorder = IndexRecorder(**options, num_examples=N + SHORT)
    model, driver = fit(CombinedLoader(loaders, mode), model=ManyModel(), recorder=recorder)
    assert driver.recorder.datasets == (("long", 0, N), ("stream", N, SHORT))
    assert_all_recorded(model, driver, num_batches={"min_size": 4}.get(mode, 6))


def test_a_batch_of_another_structure_is_refused() -> None:
    class Joined(ManyModel):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (batch["a"],)

    _, driver = fit({"a": long_loader()}, model=Joined(), recorder=IndexRecorder(index_key=1), max_epochs=1)
    assert "The batch has no part 'a', as the training dataloaders have, but is a tuple" in driver.problems[0]


twice = long_loader()
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "stream_without_index": (
        lambda: [long_loader(), make_loader(Stream())],
        {"num_examples": N + SHORT},
        "Stream is an IterableDataset, whose rows have no index",
    ),
    "stream_without_length": (
        lambda: [long_loader(), make_loader(Stream())],
        {"index_key": 1},
        "loaders '1' have no length.*`num_examples=`",
    ),
    "two_streams": (
        lambda: [make_loader(Stream()), make_loader(Stream())],
        {"index_key": 1, "num_examples": 9},
        "loaders '0', '1' have no length.*give each a `__len__`",
    ),
    "wrong_sum": (
        lambda: [long_loader(), short_loader()],
        {"num_examples": 20},
        "`num_examples` is 20, but the training datasets have 14 examples; leave it out",
    ),
    "sum_below_what_is_known": (
        lambda: [long_loader(), make_loader(Stream())],
        {"index_key": 1, "num_examples": N - 1},
        "`num_examples` is 10, but the training datasets have 11",
    ),
    "unknown_number_of_batches": (
        lambda: [short_loader(sampler=UnsizedSampler(), shuffle=False), long_loader()],
        {},
        "without a known number of batches are fetched ahead.*`limit_train_batches`.*`index_fn=`",
    ),
    "one_loader_twice": (lambda: [twice, twice], {}, "loader is there twice; make two"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*IterableDataset.*")
def test_refusal_of_several_loaders_says_why(name: str) -> None:
    make, options, message = REFUSED[name]
    model, driver = fit(make(), model=ManyModel(), recorder=IndexRecorder(**options), max_epochs=1, max_steps=4)
    assert len(driver.problems) == len(model.truth) > 0
    assert driver.recorded == []
    assert driver.recorder.datasets == ()
    with pytest.raises(RowIndexError, match=message):
        raise RowIndexError(driver.problems[0])


def test_a_collection_that_is_one_iterable_to_lightning_is_one_loader() -> None:
    class Loaders(UserDict[str, DataLoader]):
        def __iter__(self) -> Iterator[Any]:
            return iter(long_loader())

    _, driver = fit(Loaders(a=long_loader()), max_epochs=1)
    assert "Row indices need a torch `DataLoader`, found Loaders" in driver.problems[0]


def test_keys_of_unknown_collections_are_not_guessed() -> None:
    class Pair:
        first, second = long_loader(), short_loader()

    register_pytree_node(Pair, lambda pair: ([pair.first, pair.second], None), lambda loaders, _: [*loaders])
    with pytest.raises(RowIndexError, match=r"nested in lists, tuples and dicts .* found Pair"):
        place_loaders(Pair())


def test_sequential_mode_is_refused_by_lightning() -> None:
    with pytest.raises(ValueError, match=r"does not support the .*sequential"):
        fit(CombinedLoader([short_loader(), long_loader()], "sequential"))

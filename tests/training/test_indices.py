"""Recorded indices against the truth: every example carries its own index in the batch."""

import gc
import pickle
import random
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_sampling import LoaderRecording
from lightning_influence.training.indices import IndexRecorder
from tests.training.index_driver import (
    DATASET,
    Driver,
    Model,
    N,
    Stream,
    assert_recorded,
    fit,
    make_loader,
    make_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")


class BucketSampler(Sampler[list[int]]):
    """Has a state and no length, and refills one list with batches of several sizes."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for size in (2, 4, 1):
            batch[:] = [(self.epoch + size + row) % N for row in range(size)]
            yield batch


class TensorBatchSampler(BatchSampler):
    def __iter__(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        return (torch.tensor(batch) for batch in super().__iter__())


class UnsizedSampler(Sampler[int]):
    """Without a length Lightning fetches one batch ahead."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


WORKERS = {"num_workers": 2}
LOADERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # name: DataLoader arguments, Trainer arguments, batches expected
    "in_order": ({}, {}, 6),
    "one_epoch": ({"shuffle": True}, {"max_epochs": 1}, 3),
    "shuffle": ({"shuffle": True}, {}, 6),
    "workers": ({"shuffle": True, **WORKERS}, {}, 6),
    "persistent_workers_and_limit": (
        {"shuffle": True, "persistent_workers": True, **WORKERS},
        {"limit_train_batches": 2},
        4,
    ),
    "spawned_worker": (
        {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
        {},
        6,
    ),
    "drop_last": ({"shuffle": True, "drop_last": True}, {}, 4),
    "limit_train_batches": ({"shuffle": True}, {"limit_train_batches": 2}, 4),
    "max_steps": ({"shuffle": True}, {"max_steps": 4}, 4),
    "batch_sampler": ({"batch_size": 1, "batch_sampler": BucketSampler()}, {}, 6),
    "batch_sampler_of_tensors": (
        {"batch_size": 1, "batch_sampler": TensorBatchSampler(RandomSampler(DATASET), 4, False)},
        {},
        6,
    ),
    "list_as_batch_sampler": ({"batch_size": 1, "batch_sampler": [[3, 1], [2]]}, {}, 4),
    "batch_size_none": ({"batch_size": None, "shuffle": False}, {}, 2 * N),
    "batch_sampler_as_sampler": (
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(DATASET), 4, False)},
        {},
        6,
    ),
    "sampler_without_length": ({"sampler": UnsizedSampler()}, {}, 6),
    "sampler_that_repeats": ({"sampler": WeightedRandomSampler([1.0] * N, 2 * N)}, {}, 12),
    "reload_every_epoch": (
        {"shuffle": True},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
        9,
    ),
    "reload_every_epoch_workers": (
        {"shuffle": True, **WORKERS},
        {"reload_dataloaders_every_n_epochs": 1},
        6,
    ),
    "overfit_batches": ({"shuffle": True}, {"overfit_batches": 2}, 4),
    "fast_dev_run": ({"shuffle": True}, {"fast_dev_run": 2}, 2),
    "accumulate": ({"shuffle": True}, {"accumulate_grad_batches": 2}, 6),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.filterwarnings("ignore:.*overfit on the training dataloader.*")
def test_recorded_indices_equal_truth(name: str) -> None:
    loader_options, trainer_options, num_batches = LOADERS[name]
    model, driver = fit(make_loader(**loader_options), **trainer_options)
    assert_recorded(model, driver, num_batches=num_batches)
    assert driver.recorder.num_examples == N


@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 0.5}, {"num_sanity_val_steps": 0}],
    ids=["val", "val_half_way", "val_loader_made_after_train_loader"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["own_loader", "train_loader"])
@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*")
def test_validation_is_not_recorded(options: dict[str, Any], shared: bool) -> None:
    train = make_loader(shuffle=True)
    model, driver = fit(train, train if shared else make_loader(), **options)
    assert_recorded(model, driver, num_batches=6)


def test_subset_indices_are_positions_in_the_subset() -> None:
    kept = [7, 2, 9, 4, 10]
    model, driver = fit(make_loader(Subset(DATASET, kept), shuffle=True))
    assert [[kept[i] for i in batch] for batch in driver.recorded] == model.truth
    assert driver.recorder.num_examples == len(kept)


def test_set_epoch_reaches_the_sampler() -> None:
    sampler = DistributedSampler(DATASET, num_replicas=2, rank=1, drop_last=True)
    model, driver = fit(make_loader(sampler=sampler))
    assert_recorded(model, driver, num_batches=4)
    assert model.truth[:2] != model.truth[2:]


def test_data_module_that_makes_new_loaders() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return make_loader(shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return make_loader()

    model, driver = fit(Data(), reload_dataloaders_every_n_epochs=1)
    assert_recorded(model, driver, num_batches=6)


@pytest.mark.parametrize("same_trainer", [False, True])
def test_fit_twice_with_one_callback(same_trainer: bool) -> None:
    model, driver = Model(), Driver()
    trainer = make_trainer(driver)
    trainer.fit(model, make_loader(shuffle=True))
    if same_trainer:
        trainer.fit_loop.max_epochs = 4
    else:
        trainer = make_trainer(driver)
    trainer.fit(model, make_loader(Subset(DATASET, range(8)), shuffle=True))
    assert_recorded(model, driver, num_batches=6 + 4)
    assert driver.recorder.num_examples == 8


def test_workers_that_were_started_before_fit() -> None:
    loader = make_loader(shuffle=True, num_workers=1, persistent_workers=True)
    next(iter(loader))
    model, driver = fit(loader)
    assert_recorded(model, driver, num_batches=6)


def test_batches_that_are_none_are_skipped() -> None:
    def collate(rows: list[Any]) -> Any:
        return None if rows[0][1] == 4 else torch.utils.data.default_collate(rows)

    model, driver = fit(make_loader(collate_fn=collate))
    assert_recorded(model, driver, num_batches=4)


def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class SaveAndStop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    make_trainer(SaveAndStop(), max_steps=4).fit(Model(), make_loader())
    model, driver = Model(), Driver()
    make_trainer(driver).fit(model, make_loader(shuffle=True), ckpt_path=tmp_path / "half.ckpt")
    assert_recorded(model, driver, num_batches=2)


def test_hooks_may_iterate_the_training_loader() -> None:
    class Look(pl.Callback):
        def look(self, trainer: pl.Trainer, *_: Any) -> None:
            assert len(list(trainer.train_dataloader)) == 3
            next(iter(trainer.train_dataloader))

        on_train_start = on_train_epoch_start = on_train_batch_end = look

    model, driver = Model(), Driver()
    make_trainer(Look(), driver).fit(model, make_loader(shuffle=True))
    assert_recorded(model, driver, num_batches=6)


def test_sampler_keeps_its_type_state_and_pickle() -> None:
    sampler = BucketSampler()

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            recording = trainer.train_dataloader.batch_sampler
            assert isinstance(recording, BucketSampler)
            assert recording is not sampler
            assert type(pickle.loads(pickle.dumps(recording))) is BucketSampler
            assert iter(recording).gi_frame is not None  # attributes of their iterator
            recording.epoch = 5
            assert sampler.epoch == recording.epoch == 5

    make_trainer(Look(), Driver()).fit(Model(), DataLoader(DATASET, batch_sampler=sampler))


def recording_of(driver: Driver) -> LoaderRecording:
    ((_, recording),) = driver.recorder._recordings.values()
    assert recording is not None
    return recording


def num_queued(recording: LoaderRecording) -> int:
    return sum(len(each.drawn) for each in recording.passes)


def test_memory_is_bounded_by_what_is_in_flight() -> None:
    in_flight: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            in_flight.append(num_queued(recording_of(driver)))

    driver = Driver()
    trainer = make_trainer(Count(), driver, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Model(), make_loader(batch_size=1, num_workers=1, shuffle=True))
    assert len(in_flight) == 2 * N
    assert max(in_flight) <= 2  # one worker, two batches ahead


def train_from_seed(*callbacks: pl.Callback, **loader_options: Any) -> tuple[Any, ...]:
    pl.seed_everything(1, verbose=False)
    model = Model()
    make_trainer(*callbacks, reload_dataloaders_every_n_epochs=1).fit(
        model, make_loader(shuffle=True, **loader_options), make_loader()
    )
    weights = torch.nn.utils.parameters_to_vector(model.parameters())
    numpy_state = np.random.get_state(legacy=False)["state"]["key"]  # type: ignore[call-overload, index]
    return model.truth, weights, torch.get_rng_state(), numpy_state, random.getstate()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_weights_and_random_state_are_those_without_recorder(num_workers: int) -> None:
    plain = train_from_seed(num_workers=num_workers)
    driver = Driver()
    recorded = train_from_seed(driver, num_workers=num_workers)
    assert driver.recorded == recorded[0] == plain[0]
    assert torch.equal(recorded[1], plain[1])
    assert torch.equal(recorded[2], plain[2])
    assert np.array_equal(recorded[3], plain[3])
    assert recorded[4] == plain[4]


@pytest.fixture
def sigint_handler() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(None, None), (ValueError, ValueError), (KeyboardInterrupt, SystemExit)],
    ids=["finished", "exception", "interrupted"],
)
@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.usefixtures("sigint_handler")
def test_everything_is_put_back(raised: Any, seen: Any, batch_size: int | None) -> None:
    class Failing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if raised is not None and batch_idx == 1:
                raise raised
            return super().training_step(batch, batch_idx)

    loader = make_loader(batch_size=batch_size)
    before = loader.sampler, loader.batch_sampler
    trainer = make_trainer(Driver())
    if seen is None:
        trainer.fit(Failing(), loader)
    else:
        with pytest.raises(seen):
            trainer.fit(Failing(), loader)
    assert "process_dataloader" not in vars(trainer.strategy)
    assert loader.sampler is before[0]
    assert loader.batch_sampler is before[1]


def test_uninstall_is_idempotent_and_leaves_the_recorder_picklable() -> None:
    recorder = IndexRecorder()
    recorder.uninstall()
    fit(make_loader(), recorder=recorder)
    recorder.uninstall()
    assert pickle.loads(pickle.dumps(recorder)).num_examples == N


def test_uninstall_keeps_a_strategy_method_set_by_others() -> None:
    trainer = make_trainer()
    mine = trainer.strategy.process_dataloader = lambda dataloader: dataloader
    recorder = IndexRecorder()
    recorder.install(trainer)
    assert trainer.strategy.process_dataloader is not mine
    recorder.uninstall()
    assert trainer.strategy.process_dataloader is mine


def test_two_recorders_on_one_trainer() -> None:
    model, first, second = Model(), Driver(), Driver()
    make_trainer(first, second).fit(model, make_loader(shuffle=True))
    assert_recorded(model, first, num_batches=6)
    assert_recorded(model, second, num_batches=6)


def test_uninstall_in_the_middle_of_training() -> None:
    left: list[int] = []

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *hook: Any) -> None:
            if trainer.global_step == 1:
                self.recording = recording_of(driver)
                driver.recorder.uninstall()
            left.append(num_queued(self.recording))

    model, driver = Model(), Driver()
    loader = make_loader(batch_size=1, num_workers=1, persistent_workers=True, shuffle=True)
    make_trainer(Stop(), driver).fit(model, loader)
    assert driver.recorded == model.truth[:1]
    assert len(driver.problems) == 2 * N - 1
    assert left == [0] * 2 * N


def test_data_of_earlier_epochs_is_let_go() -> None:
    datasets: list[weakref.ref[TensorDataset]] = []

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            dataset = TensorDataset(*DATASET.tensors)
            datasets.append(weakref.ref(dataset))
            return make_loader(dataset)

    class Count(pl.Callback):
        def on_train_end(self, *hook: Any) -> None:
            gc.collect()
            self.alive = sum(dataset() is not None for dataset in datasets)

    count = Count()
    trainer = make_trainer(Driver(), count, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Model(), Data())
    assert (len(datasets), count.alive) == (4, 1)


def test_install_lets_go_of_an_earlier_trainer() -> None:
    recorder, first, second = IndexRecorder(), make_trainer(), make_trainer()
    recorder.install(first)
    recorder.install(second)
    assert "process_dataloader" not in vars(first.strategy)
    assert "process_dataloader" in vars(second.strategy)


class PairSampler(BatchSampler):
    """Indices that are keys of more than one part."""

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([[(0, 1), (0, 2)]] * 3)


class NamedDataset(torch.utils.data.Dataset[Any]):
    def __getitem__(self, key: Any) -> Any:
        return DATASET[0]

    def __len__(self) -> int:
        return N


class OwnIterator(DataLoader):
    def __iter__(self) -> Any:
        return iter(list(DataLoader(self.dataset, batch_size=4)))


FIX = ".*pass `index_fn=`, a function from a batch to one dataset index per row"
REFUSED = {
    "iterable": (lambda: make_loader(Stream()), "Stream is an IterableDataset.*map-style" + FIX),
    "not_a_loader": (lambda: iter_of_batches, "need a torch `DataLoader`, found Batches" + FIX),
    "not_in_order": (
        lambda: make_loader(num_workers=1, in_order=False),
        "`DataLoader\\(in_order=False\\)`.*set `in_order=True`, or" + FIX,
    ),
    "pairs": (
        lambda: DataLoader(NamedDataset(), batch_sampler=PairSampler(RandomSampler(DATASET), 2, False)),
        "The sampler must give one integer index per row, got list .*\\(0, 1\\)" + FIX,
    ),
    "names": (
        lambda: DataLoader(NamedDataset(), batch_sampler=[["a", "b"]]),
        "The sampler must give one integer index per row, got list .*'a'" + FIX,
    ),
    "negative": (
        lambda: DataLoader(DATASET, batch_sampler=[[0, -1]]),
        "from 0 and below the dataset's length 11, got -1" + FIX,
    ),
    "own_iterator": (
        lambda: OwnIterator(DATASET, batch_size=4),
        "No indices are recorded for batch 0 .*" + FIX,
    ),
}


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter(make_loader())


iter_of_batches = Batches()


class AnyModel(Model):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.truth.append([batch_idx])
        return self.layers(torch.ones(2, 3)).mean()


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_why_and_training_goes_on(name: str) -> None:
    make, message = REFUSED[name]
    model, driver = fit(make(), model=AnyModel(), max_epochs=1)
    assert len(driver.problems) == len(model.truth) > 0
    assert driver.recorded == []
    with pytest.raises(RowIndexError, match=message):
        raise RowIndexError(driver.problems[0])


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")
def test_step_that_fetches_its_own_batches_is_refused() -> None:
    class Fetching(Model):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    _, driver = fit(make_loader(), model=Fetching(), max_epochs=1)
    assert "write `training_step(batch, batch_idx)`" in driver.problems[0]


def test_indices_are_right_again_once_a_second_iterator_is_let_go() -> None:
    class KeepForOneBatch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.kept = [iter(loader) for loader in trainer.train_dataloader]

        def on_train_batch_end(self, *_: Any) -> None:
            self.kept.clear()

    class First(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch[0], batch_idx)

    model, driver = First(), Driver()
    make_trainer(KeepForOneBatch(), driver, max_epochs=1).fit(model, [make_loader(shuffle=True)])
    assert len(driver.problems) == 1
    assert driver.recorded == model.truth[1:]


def test_a_loader_that_resumes_by_itself_in_the_middle_is_refused(tmp_path: Path) -> None:
    class Stateful(DataLoader):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class SaveAndStop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    make_trainer(SaveAndStop(), max_steps=1).fit(Model(), Stateful(DATASET, batch_size=4))
    model, driver = Model(), Driver()
    make_trainer(driver).fit(
        model, Stateful(DATASET, batch_size=4, shuffle=True), ckpt_path=tmp_path / "half.ckpt"
    )
    assert len(driver.problems) == 2
    assert "Stateful resumes in the middle of an epoch by a state of its own" in driver.problems[0]
    assert driver.recorded == model.truth[2:]  # the next epoch


def test_two_iterators_at_once_are_refused() -> None:
    class Keep(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.kept = iter(trainer.train_dataloader)

    driver = Driver()
    make_trainer(Keep(), driver, max_epochs=1).fit(Model(), make_loader())
    assert len(driver.problems) == 3
    assert "iterated 2 times at once" in driver.problems[0]


def test_asking_twice_for_a_batch_is_refused() -> None:
    class Twice(Driver):
        def on_train_batch_start(self, *hook: Any) -> None:
            super().on_train_batch_start(*hook)
            super().on_train_batch_start(*hook)

    driver = Twice()
    make_trainer(driver, max_epochs=1).fit(Model(), make_loader())
    assert "No indices are recorded for batch 0 (batch 1 comes next)" in driver.problems[0]


def test_asking_before_install_is_refused() -> None:
    with pytest.raises(RowIndexError, match="between `install` and `uninstall` only"):
        IndexRecorder().next_batch(None, 0)

"""Indices that a batch itself tells, by a function of it or under a key."""

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from lightning_influence.training.indices import IndexRecorder
from tests.training.index_driver import DATASET, Model, N, Stream, assert_recorded, fit, make_loader

pytestmark = pytest.mark.filterwarnings("ignore:.*IterableDataset.*")


class SizedStream(Stream):
    def __len__(self) -> int:
        return N


@pytest.mark.parametrize(
    "loader",
    [make_loader(), make_loader(SizedStream()), make_loader(num_workers=1, in_order=False)],
    ids=["map_style", "iterable_with_length", "not_in_order"],
)
def test_index_fn_replaces_recording(loader: DataLoader) -> None:
    model, driver = fit(loader, recorder=IndexRecorder(lambda batch: batch[1]))
    assert_recorded(model, driver, num_batches=6)
    assert driver.recorder.num_examples == N


def test_index_fn_without_dataset_length() -> None:
    model, driver = fit(make_loader(Stream()), recorder=IndexRecorder(lambda b: b[1].tolist()))
    assert_recorded(model, driver, num_batches=6)
    assert driver.recorder.num_examples is None


@pytest.mark.parametrize(
    ("index_fn", "message"),
    [
        (lambda batch: None, "`index_fn` must give one integer index per row, got NoneType"),
        (lambda batch: batch[0], "must give one integer index per row, got Tensor"),
        (lambda batch: batch[1].float(), "must give one integer index per row, got Tensor"),
        (lambda batch: [[1], [2, 3]], "must give one integer index per row, got list"),
        (lambda batch: batch[1] > 3, "must give one integer index per row, got Tensor"),
        (lambda batch: batch[1] + N, "below the dataset's length 11, got 11"),
        (lambda batch: batch["id"], "`index_fn` raised TypeError"),
    ],
    ids=["none", "rows", "float", "ragged", "bool", "out_of_range", "raises"],
)
def test_index_fn_is_checked(index_fn: Any, message: str) -> None:
    _, driver = fit(make_loader(), recorder=IndexRecorder(index_fn), max_epochs=1)
    assert len(driver.problems) == 3
    assert message in driver.problems[0]


class NamedModel(Model):
    """Trains on mappings."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch["x"], batch["id"]), batch_idx)


NAMED = [{"x": x, "id": index} for x, index in DATASET]


class SplitStream(Stream):
    """Splits itself among workers."""

    def __iter__(self) -> Any:
        worker = get_worker_info()
        return iter([DATASET[place] for place in range(worker.id, N, worker.num_workers)])


@pytest.mark.parametrize("options", [{}, {"batch_size": None}], ids=["batches", "single_rows"])
def test_index_key_of_a_mapping(options: dict[str, Any]) -> None:
    loader = make_loader(NAMED, shuffle=True, **options)
    model, driver = fit(loader, model=NamedModel(), recorder=IndexRecorder(index_key="id"))
    assert_recorded(model, driver, num_batches=2 * len(loader))


STREAMS = {
    "stream": ({}, {}, 6),
    "workers": ({"num_workers": 2}, {}, 8),
    "limit": ({"num_workers": 1}, {"limit_train_batches": 2}, 4),
    "in_no_order": ({"num_workers": 2, "in_order": False, "dataset": SplitStream()}, {}, 8),
}


@pytest.mark.parametrize("name", STREAMS)
def test_index_key_of_a_stream(name: str) -> None:
    loader_options, trainer_options, num_batches = STREAMS[name]
    loader = make_loader(**({"dataset": SplitStream() if name == "workers" else Stream()} | loader_options))
    recorder = IndexRecorder(index_key=1, num_examples=N)
    model, driver = fit(loader, recorder=recorder, **trainer_options)
    assert_recorded(model, driver, num_batches=num_batches)
    assert recorder.num_examples == N
    assert recorder.datasets == (("", 0, N),)


def test_num_examples_may_be_larger_than_the_dataset() -> None:
    recorder = IndexRecorder(lambda batch: batch[1] + 9, num_examples=N + 9)
    model, driver = fit(make_loader(), recorder=recorder)
    assert driver.recorded == [[index + 9 for index in batch] for batch in model.truth]
    assert recorder.num_examples == N + 9


def test_num_examples_below_the_dataset_is_refused() -> None:
    _, driver = fit(make_loader(), recorder=IndexRecorder(num_examples=N - 1), max_epochs=1)
    assert "`num_examples` is 10, but the training datasets have 11 examples" in driver.problems[0]


@pytest.mark.parametrize(
    ("index_key", "message"),
    [
        ("name", "`index_key` 'name' raised KeyError: 'name'"),
        (3, "`index_key` 3 raised KeyError: 3"),
        ("x", "`index_key` 'x' must give one integer index per row, got Tensor"),
    ],
)
def test_index_key_is_checked(index_key: Any, message: str) -> None:
    recorder = IndexRecorder(index_key=index_key)
    _, driver = fit(make_loader(NAMED), model=NamedModel(), recorder=recorder, max_epochs=1)
    assert len(driver.problems) == 3
    assert message in driver.problems[0]


def test_a_tensor_has_no_index_key() -> None:
    class TensorModel(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layers(batch).mean()

    loader = DataLoader(DATASET.tensors[0], batch_size=4)
    _, driver = fit(loader, model=TensorModel(), recorder=IndexRecorder(index_key=0), max_epochs=1)
    assert "`index_key` 0 raised TypeError: the batch must be a mapping or a sequence" in driver.problems[0]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Both `index_fn` and `index_key` \('id'\) are given; pass one"):
        IndexRecorder(len, index_key="id")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`index_key` must be a string or an integer, got 1\.5"):
        IndexRecorder(index_key=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_examples` must be at least 1, got 0"):
        IndexRecorder(num_examples=0)


def test_a_recorder_with_a_key_is_picklable() -> None:
    recorder = pickle.loads(pickle.dumps(IndexRecorder(index_key=1, num_examples=N)))
    model, driver = fit(make_loader(Stream()), recorder=recorder)
    assert_recorded(model, driver, num_batches=6)

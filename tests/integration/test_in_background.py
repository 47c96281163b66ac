"""Merged epochs are recorded by a second thread: training and rows must be those of one."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence.background import Background
from lightning_influence.errors import LayerError
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreReader
from lightning_influence.training import batch_capture, epoch
from tests.integration.lifecycle_models import BATCH, FEATURES, dataset, fit, loader
from tests.integration.models import stored_gradients
from tests.integration.test_trajectory import EPOCHS, Breaking, Convolutional, Decaying, train
from tests.integration.test_trajectory_cases import left_over, merged


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A core for the second thread, wherever this runs; bytes of the jobs that it was handed."""
    sizes: list[int] = []
    original = Background.submit

    def counted(self: Background, *args: Any, **options: Any) -> None:
        sizes.append(options["nbytes"])
        original(self, *args, **options)

    monkeypatch.setattr(Background, "submit", counted)
    monkeypatch.setattr(batch_capture, "usable_threads", lambda *_: 2)
    return sizes


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lightning_influence")]


class Noisy(Decaying):
    """Dropout, an activation in place, and a momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.Dropout(0.3)
        )


class Shifted(Decaying):
    """A parameter of its output's shape takes the output gradient's own memory as its `.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(BATCH, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layers(x) + self.shift, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Overwriting(Callback):
    """Uses the batch's memory again."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for tensor in batch:
            tensor.fill_(1)


CASES: dict[str, Any] = {
    "dropout, in place": (Noisy, loader, {}),
    "convolution": (Convolutional, loader, {}),
    "accumulated, clipped": (Noisy, loader, {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}),
    "gradients that become .grad": (Shifted, lambda: loader(drop_last=True), {"gradient_clip_val": 1e-3}),
}


@pytest.mark.parametrize(("make", "make_loader", "options"), CASES.values(), ids=CASES)
def test_training_and_rows_are_those_of_one_thread(tmp_path, jobs, make, make_loader, options):
    models = [make() for _ in range(3)]
    behind = train(tmp_path / "behind", models[0], make_loader(), Overwriting(), **options)
    assert len(jobs) >= 2 * EPOCHS
    assert not threads_of_ours()
    alone = train(tmp_path / "alone", models[1], make_loader(), influence={"background": False}, **options)
    fit(tmp_path, models[2], make_loader(), max_epochs=EPOCHS, **options)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(parameters[0], parameters[2])
        assert torch.equal(parameters[1], parameters[2])
    expected = stored_gradients(alone)
    for name, rows in stored_gradients(behind).items():  # 8 bits each, in bases that rounding may turn
        largest = float(expected[name].nan_to_num().abs().max())
        torch.testing.assert_close(rows, expected[name], rtol=0, atol=0.02 * largest, equal_nan=True)
    for column in ("written", "valid", "occurrences", "label", "step", "loss"):
        assert (StoreReader(behind).column(column) == StoreReader(alone).column(column)).all()


def test_two_runs_write_the_same_bits(tmp_path):
    one, two = (StoreReader(train(tmp_path / name, Noisy())) for name in ("one", "two"))
    for layer in one.layers:
        for name, array in one.factors(layer).items():
            assert (array == two.factors(layer)[name]).all()
        for name, array in one.rows(layer).items():
            assert (array == two.rows(layer)[name]).all()


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_workers_of_a_dataloader_are_forked_beside_it(tmp_path, jobs):
    path = train(tmp_path / "workers", Decaying(), DataLoader(dataset(), BATCH, num_workers=1), max_epochs=2)
    assert jobs
    alone = stored_gradients(train(tmp_path / "alone", Decaying(), DataLoader(dataset(), BATCH), max_epochs=2))
    for name, rows in stored_gradients(path).items():
        assert torch.equal(rows, alone[name])


# --- failures ----------------------------------------------------------------------------------------


def failing_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = Recorder.update

    def update(self: Recorder, *args: Any, **options: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if self.writer.segment == number:
            raise OSError("no space left on device")
        original(self, *args, **options)

    monkeypatch.setattr(Recorder, "update", update)


def test_an_error_of_the_thread_ends_capture_and_not_training(tmp_path, monkeypatch):
    failing_update(monkeypatch, number=2)
    model, alone = Decaying(), Decaying()
    with pytest.warns(UserWarning, match="training goes on. OSError: no space left"):
        path = train(tmp_path / "run", model, influence={"on_error": "warn"})
    assert model.trainer.state.finished
    assert merged(path) == [0, 1]
    assert not left_over(path.parent)
    assert not threads_of_ours()
    fit(tmp_path, alone, loader(), max_epochs=EPOCHS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_an_error_of_the_thread_ends_training_if_that_was_asked_for(tmp_path, monkeypatch):
    failing_update(monkeypatch, number=1)
    with pytest.raises(OSError, match="no space left"):
        train(tmp_path, Decaying())
    assert not threads_of_ours()


def test_an_exception_in_training_leaves_the_whole_epochs_and_no_thread(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path, Breaking(7))
    assert merged(tmp_path / "influence.h5") == [0, 1]
    assert not left_over(tmp_path)
    assert not threads_of_ours()


class Scribbling(Decaying):
    """Changes what it has computed when the step is over, from a given one on."""

    def __init__(self, scribble: Callable[[Tensor], Any], begins: int = 0) -> None:
        super().__init__()
        self.scribble, self.begins = scribble, begins

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.hidden = self.layers[:2](x)
        return F.cross_entropy(self.layers[2](self.hidden), y)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step > self.begins:
            self.scribble(self.hidden)


class Remembering(Decaying):
    """Keeps activations in a buffer that the next step writes again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(BATCH, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.memory = self.memory.detach()
        self.memory[: len(x)] = self.layers[:2](x)
        return F.cross_entropy(self.layers[2](self.memory[: len(x)]), y)


CHANGES: dict[str, Callable[[], Decaying]] = {
    "in place": lambda: Scribbling(lambda hidden: hidden.detach().fill_(0)),
    "uncounted": lambda: Scribbling(lambda hidden: hidden.data.fill_(0)),
    "of another library": lambda: Scribbling(lambda hidden: hidden.detach().numpy().fill(0)),
    "by the next step": Remembering,
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_activations_that_change_while_they_are_recorded_are_copied(tmp_path, jobs, lines, make):
    path = train(tmp_path / "behind", make())
    assert jobs
    said = [line for line in lines() if "layer 'layers.2' is changed in place after the backward" in line]
    assert len({*said}) == 1
    expected = stored_gradients(train(tmp_path / "still", Decaying()))
    for name, rows in stored_gradients(path).items():
        torch.testing.assert_close(rows, expected[name], rtol=0, atol=0.02 * float(expected[name].abs().max()))


def test_activations_that_change_later_than_was_looked_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch, "TRIED_BATCHES", 0)
    monkeypatch.setattr(epoch, "TRIED_LATER", 0)
    with pytest.raises(LayerError, match=r"'layers.2': its input .* changed in place .* `background=False`"):
        train(tmp_path / "behind", Scribbling(lambda hidden: hidden.detach().fill_(0), begins=4))
    assert merged(tmp_path / "behind" / "influence.h5") == [0]


class Copying(Callback):
    """Copies the trainer with all its callbacks."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        copy.deepcopy(trainer)


def test_a_trainer_is_copied_beside_it(tmp_path, jobs):
    train(tmp_path, Decaying(), loader(), Copying(), max_epochs=2)
    assert jobs
    assert not threads_of_ours()


# --- where there is no second thread -----------------------------------------------------------------


def test_without_a_core_for_it_there_is_no_thread(tmp_path, jobs, monkeypatch):
    monkeypatch.setattr(batch_capture, "usable_threads", lambda *_: 1)
    train(tmp_path / "one core", Decaying(), max_epochs=2)
    monkeypatch.setattr(batch_capture, "usable_threads", lambda *_: 2)
    train(tmp_path / "last epoch", Decaying(), max_epochs=2, influence={"epochs": "last"})
    assert not jobs


@pytest.mark.ddp
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_have_a_thread_each(tmp_path):
    path = train(tmp_path, Decaying(), strategy="ddp_fork", devices=2)
    assert merged(path) == [0, 1, 2, 3]
    assert StoreReader(path).column("occurrences").tolist() == [EPOCHS] * 10
    assert not left_over(tmp_path)

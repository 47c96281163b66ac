"""Which epochs the file holds: the last, every one, every n-th or those of a list; whatever ends the run."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import CaptureError, WeightsMismatchError
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import BATCH, Classifier, N, Stream, fit, loader
from tests.integration.models import stored_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*has no length"),
]
CODECS = ["pairs-float32", "eigen"]
BATCHES = 3  # of an epoch


def train(
    folder: Path,
    *callbacks: pl.Callback,
    model: pl.LightningModule | None = None,
    codec: Any = "pairs",
    **options: Any,
) -> Path:
    """Train with capture; the path of the file."""
    path = folder / "influence.h5"
    epochs = options.pop("epochs", "last")
    capture = InfluenceCallback(path, codec=codec, epochs=epochs, trajectory="segments", on_error="raise")
    fit(folder, Classifier() if model is None else model, loader(), capture, *callbacks, **options)
    return path


def segments(path: Path) -> list[int]:
    """The epochs in the file, every byte of them checked."""
    reader = StoreReader(path)
    for number in reader.segments:
        segment = reader.segment(number)
        segment.verify_rows()
        assert segment.attributes["epoch"] == segment.attributes["segment"] == number
        assert segment.column("written").all()
    return list(reader.segments)


class Ending(Classifier):
    """Asks for the end, raises, or is killed, in a step."""

    def __init__(self, step: int, how: str = "raise") -> None:
        super().__init__()
        self.step, self.how = step, how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.step:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise ZeroDivisionError
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Losing(Classifier):
    """Its score gets worse from the third epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.log("score", abs(self.current_epoch - 2.0), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


# --- which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "max_epochs", "expected"),
    [
        ("last", 4, [3]),
        ("every", 3, [0, 1, 2]),
        (1, 3, [0, 1, 2]),
        (2, 5, [0, 2, 4]),  # counted back from the final one
        (2, 4, [1, 3]),
        (3, 2, [1]),
        (9, 3, [2]),
        ([0, 3], 4, [0, 3]),
        ([1], 4, [1]),
        ([3, 1, 1], 5, [1, 3]),
        ([1, 8], 3, [1]),
    ],
)
def test_the_file_holds_the_epochs_that_were_asked_for(
    tmp_path: Path, epochs: Any, max_epochs: int, expected: list[int]
) -> None:
    assert segments(train(tmp_path, epochs=epochs, max_epochs=max_epochs)) == expected


@pytest.mark.parametrize(
    ("epochs", "expected"), [("last", [4]), ("every", [0, 1, 2, 3, 4]), (2, [1, 3]), ([0, 3], [0, 3])]
)
def test_early_stopping_keeps_the_epochs_before_it(tmp_path: Path, epochs: Any, expected: list[int]) -> None:
    stopping = EarlyStopping("score", patience=2, check_on_train_epoch_end=True)
    assert segments(train(tmp_path, stopping, model=Losing(), epochs=epochs, max_epochs=9)) == expected


@pytest.mark.parametrize(("epochs", "expected"), [("last", [2]), ("every", [0, 1, 2]), (2, [1])])
def test_a_limit_of_steps_within_an_epoch_leaves_the_whole_epochs(
    tmp_path: Path, epochs: Any, expected: list[int]
) -> None:
    with pytest.warns(UserWarning, match="epoch 3 ended before its last batch") if epochs != 2 else pytest.warns():
        path = train(tmp_path, epochs=epochs, max_epochs=-1, max_steps=3 * BATCHES + 2)
    assert segments(path) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["influence.h5"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("step", [0, 4])
def test_a_stop_that_waits_for_min_epochs_leaves_the_epoch_that_was_the_last(
    tmp_path: Path, step: int, codec: str
) -> None:
    model = Ending(step, "stop")
    path = train(tmp_path, model=model, codec=codec, min_epochs=3, max_epochs=9)
    assert segments(path) == [2]
    assert InfluenceModule.attach(model, path).store.number == 2


@pytest.mark.parametrize("codec", CODECS)
def test_each_segment_equals_the_file_of_a_run_that_ended_with_its_epoch(tmp_path: Path, codec: str) -> None:
    every = train(tmp_path / "every", codec=codec, epochs="every", max_epochs=3)
    for epoch in segments(every):
        last = train(tmp_path / str(epoch), codec=codec, max_epochs=epoch + 1)
        segment, alone = StoreReader(every, epoch), StoreReader(last)
        for column in ("written", "valid", "loss", "step", "learning_rate", "label", "occurrences"):
            np.testing.assert_array_equal(segment.column(column), alone.column(column), column)
        for key in ("epoch", "step_start", "step_end", "weights_hash_start", "weights_hash_end", "rows_written"):
            assert segment.attributes[key] == alone.attributes[key], key
        for layer in alone.layers:
            for name, rows in alone.rows(layer).items():
                found = segment.rows(layer)[name]
                if codec == "eigen":  # its basis is of sums that were grouped otherwise
                    np.testing.assert_allclose(found, rows, rtol=1e-5, atol=float(name == "codes_8"))
                else:
                    np.testing.assert_array_equal(found, rows)
            for name, factor in alone.factors(layer).items():
                # eigenvectors turn with the rounding of sums, the more the closer their eigenvalues are
                np.testing.assert_allclose(segment.factors(layer)[name], factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
def test_an_epoch_after_one_that_is_not_kept_has_the_basis_of_the_one_before(tmp_path: Path, codec: str) -> None:
    listed = train(tmp_path / "listed", codec=codec, epochs=[0, 3], max_epochs=4)
    last = train(tmp_path / "last", codec=codec, max_epochs=4)
    for name, gradients in stored_gradients(last).items():
        torch.testing.assert_close(stored_gradients(listed)[name], gradients, rtol=0, atol=0)


def test_each_epochs_checkpoint_finds_its_own_segment(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    path = train(tmp_path, saving, epochs=[0, 2], max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 2):
        module = InfluenceModule.from_checkpoint(tmp_path / "saved" / f"epoch={epoch}.ckpt", Classifier())
        assert (module.store.path, module.store.number) == (path, epoch)
    for epoch in (1, 3):
        with pytest.raises(WeightsMismatchError, match=r"epochs? 0"):
            InfluenceModule.from_checkpoint(tmp_path / "saved" / f"epoch={epoch}.ckpt", Classifier())


@pytest.mark.parametrize("epochs", ["every", [0, 1]])
def test_keeping_several_epochs_leaves_training_bit_identical(tmp_path: Path, epochs: Any) -> None:
    captured, alone = Classifier(), Classifier()
    train(tmp_path, model=captured, epochs=epochs, max_epochs=3)
    fit(tmp_path, alone, loader(), max_epochs=3)
    assert all(map(torch.equal, captured.parameters(), alone.parameters()))


# --- what ends a run before its time --------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_an_epoch_that_ends_in_an_exception_leaves_those_before(tmp_path: Path, codec: str) -> None:
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, model=Ending(2 * BATCHES + 1), codec=codec, epochs="every", max_epochs=4)
    assert segments(tmp_path / "influence.h5") == [0, 1]
    assert [each.name for each in tmp_path.iterdir()] == ["influence.h5"]


@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_a_run_that_is_killed_leaves_the_epochs_before(tmp_path: Path) -> None:
    options = {"model": Ending(2 * BATCHES + 1, "kill"), "epochs": "every", "max_epochs": 4}
    child = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path,), kwargs=options)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert segments(tmp_path / "influence.h5") == [0, 1]


def test_a_new_run_does_not_keep_the_segments_of_the_one_before_it(tmp_path: Path) -> None:
    train(tmp_path, epochs="every", max_epochs=3)
    assert segments(train(tmp_path, epochs=[1], max_epochs=2)) == [1]


# --- what the file says of it ---------------------------------------------------------------------


class OfStream(Classifier):
    """Each example brings its number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch[:2], batch_idx)


class Numbered(Stream):
    def __iter__(self) -> Any:
        return ((x, y, index) for index, (x, y) in enumerate(super().__iter__()))


@pytest.mark.parametrize(
    ("options", "captured", "planned", "written"),
    [({}, 3, 3, 10), ({"limit_train_batches": 2}, 2, 2, 8), ({"overfit_batches": 1}, 1, 1, 4)],
)
def test_the_file_says_how_many_batches_and_rows_there_are(
    tmp_path: Path, options: dict[str, Any], captured: int, planned: int, written: int
) -> None:
    found = StoreReader(train(tmp_path, **options)).attributes
    assert (found["batches_captured"], found["batches_planned"]) == (captured, planned)
    assert (found["rows_written"], found["rows_missing"], found["rows_invalid"]) == (written, N - written, 0)
    assert (found["rows"], found["is_resumed"], found["processes"]) == ("online", False, 1)
    assert (found["epoch"], found["step_start"], found["step_end"]) == (1, captured, 2 * captured)


def test_the_number_of_batches_of_a_stream_is_not_planned(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    capture = InfluenceCallback(path, index_key=2, num_examples=N, on_error="raise")
    fit(tmp_path, OfStream(), DataLoader(Numbered(), BATCH), capture, max_epochs=2)
    found = StoreReader(path).attributes
    assert (found["batches_captured"], found["batches_planned"], found["rows_written"]) == (3, -1, N)


# --- what cannot be asked for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "epochs", ["first", 0, -1, True, False, [], [-1], [0, True], ["0"], [1.0], 1.5, None, (0, 1), {0}]
)
def test_other_values_of_epochs_are_refused_with_those_that_there_are(epochs: Any) -> None:
    said = (
        "`epochs` must be 'last', 'every', a number n >= 1 (every n-th) or a list of epochs, counted from 0, got "
    )
    with pytest.raises(ValueError, match=re.escape(said + repr(epochs))):
        InfluenceCallback(epochs=epochs)


@pytest.mark.parametrize("epochs", [[4], [7, 4]])
def test_a_list_of_epochs_that_will_not_come_is_refused_at_the_start(tmp_path: Path, epochs: list[int]) -> None:
    model = Ending(0)
    with pytest.raises(CaptureError, match=re.escape(f"`epochs={epochs}` names epochs counted from 0")):
        train(tmp_path, model=model, epochs=epochs, max_epochs=4)
    assert not (tmp_path / "influence.h5").exists()


def test_epochs_that_never_came_are_said_at_the_end(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training ended without a complete captured epoch"):
        path = train(tmp_path, model=Ending(0, "stop"), epochs=[3], max_epochs=9)
    assert not path.exists()

"""The callback's life in a real `Trainer`: what it leaves behind, whatever ends the run."""

import csv
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceError, InfluenceModule
from lightning_influence.errors import (
    CaptureError,
    LayerError,
    LossNotRecognizedError,
    RowIndexError,
    StoreError,
    UnsupportedTrainingError,
)
from lightning_influence.store import StoreReader
from lightning_influence.training.surroundings import check_supported, has_exact_average
from tests.integration.lifecycle_models import (
    BATCH,
    CLASSES,
    FEATURES,
    Classifier,
    Flattening,
    HandwrittenLoss,
    Manual,
    N,
    Stream,
    TwoLoaders,
    WithLBFGS,
    dataset,
    fit,
    loader,
    make_trainer,
)

# A few examples rank noisily even where nothing aged; some tests read these warnings themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*training_step.* returned .None."),
    pytest.mark.filterwarnings("ignore:.*has no length"),
]
MANY, MANY_BATCH = 1536, 256  # more than one block, so that unfinished files are on the disk


@contextmanager
def our_warnings() -> Iterator[list[str]]:
    """The messages of the warnings that the callback gives meanwhile."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message) for each in caught if "InfluenceCallback" in str(each.message)]


def assert_nothing_is_left(model: nn.Module, trainer: pl.Trainer | None = None) -> None:
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks), name
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert trainer is None or "process_dataloader" not in vars(trainer.strategy)


def written(path: Path) -> list[bool]:
    return StoreReader(path).column("written").astype(bool).tolist()


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


class WithData(Classifier):
    """Brings its own data."""

    def train_dataloader(self) -> DataLoader:
        return loader()


# --- exceptions of the user's ---------------------------------------------------------------------


class Failing(Classifier):
    """Raises in one batch, after noting which files there are."""

    def __init__(self, folder: Path, error: type[BaseException], place: str, epoch: int, batch: int) -> None:
        super().__init__()
        self.folder, self.error, self.place, self.when = folder, error, place, (epoch, batch)
        self.files: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        self._fail("training_step", batch_idx)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._fail("on_train_batch_end", batch_idx)

    def _fail(self, place: str, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == self.when and place == self.place:
            self.files = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
            raise self.error("the user's own")


def fit_and_fail(
    folder: Path, error: type[BaseException], place: str, codec: Any = "pairs"
) -> tuple[Failing, InfluenceCallback, pl.Trainer]:
    """Train for one epoch until the exception, with unfinished files on the disk by then."""
    callback = InfluenceCallback(folder / "influence.h5", codec=codec)
    model = Failing(folder, error, place, 0, 4)
    trainer = make_trainer(folder.parent, callback, max_epochs=1)
    expected = SystemExit if error is KeyboardInterrupt else error
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(expected):
            trainer.fit(model, loader(MANY, MANY_BATCH))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further Ctrl-C
    return model, callback, trainer


EXCEPTIONS = [
    (ZeroDivisionError, "training_step"),
    (ZeroDivisionError, "on_train_batch_end"),
    (KeyboardInterrupt, "training_step"),
]


@pytest.mark.parametrize(("error", "place"), EXCEPTIONS)
def test_an_exception_in_the_captured_epoch_leaves_no_hook_mode_or_file(
    tmp_path: Path, error: type[BaseException], place: str
) -> None:
    folder = tmp_path / "out"
    model, _, trainer = fit_and_fail(folder, error, place)
    assert [name.rpartition(".")[2] for name in model.files] == ["partial"]  # there was one to delete
    assert list(folder.iterdir()) == []
    assert_nothing_is_left(model, trainer)


def test_an_exception_leaves_no_spool(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    model, _, _ = fit_and_fail(folder, ZeroDivisionError, "training_step", codec="eigen")
    assert any("spool" in name for name in model.files)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("error", "place"), EXCEPTIONS)
def test_an_exception_leaves_an_older_file_as_it_was(
    tmp_path: Path, error: type[BaseException], place: str
) -> None:
    folder = tmp_path / "out"
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(folder / "influence.h5"))
    before = (folder / "influence.h5").read_bytes()
    fit_and_fail(folder, error, place)
    assert [path.name for path in folder.iterdir()] == ["influence.h5"]
    assert (folder / "influence.h5").read_bytes() == before


@pytest.mark.parametrize(("error", "place"), EXCEPTIONS)
def test_the_fit_after_an_exception_works_with_the_same_callback(
    tmp_path: Path, error: type[BaseException], place: str
) -> None:
    folder = tmp_path / "out"
    _, callback, _ = fit_and_fail(folder, error, place)
    with our_warnings() as messages:
        fit(tmp_path, Classifier(0.0), loader(), callback)
    assert messages == []
    assert written(folder / "influence.h5") == [True] * N


def test_an_exception_before_the_captured_epoch_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    model = Failing(folder, ZeroDivisionError, "training_step", 0, 1)
    trainer = make_trainer(tmp_path, InfluenceCallback(folder / "influence.h5"))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, loader())
    assert not folder.exists()
    assert_nothing_is_left(model, trainer)


def test_an_exception_after_the_last_batch_keeps_the_complete_file(tmp_path: Path) -> None:
    model = Failing(tmp_path, ZeroDivisionError, "on_train_batch_end", 1, 2)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    assert written(tmp_path / "influence.h5") == [True] * N
    assert_nothing_is_left(model)


def test_a_finished_fit_leaves_no_hook_mode_or_other_file(tmp_path: Path) -> None:
    model = Classifier()
    trainer = fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    assert [path.name for path in tmp_path.iterdir()] == ["influence.h5"]
    assert_nothing_is_left(model, trainer)


# --- failures of ours -----------------------------------------------------------------------------


def doubling(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A batch with twice the rows that the sampler asked for."""
    return [torch.stack(column).repeat_interleave(2, dim=0) for column in zip(*rows, strict=True)]


def without_numbers() -> DataLoader:
    examples = dataset()
    return DataLoader(TensorDataset(torch.full((N, FEATURES), torch.nan), examples.tensors[1]), BATCH)


def a_file_as_folder(folder: Path) -> Path:
    (folder / "taken").write_text("a file")
    return folder / "taken" / "influence.h5"


def a_directory(folder: Path) -> Path:
    (folder / "influence.h5").mkdir()
    return folder / "influence.h5"


def a_closed_folder(folder: Path) -> Path:
    (folder / "closed").mkdir(mode=0o500)
    return folder / "closed" / "influence.h5"


def a_path(folder: Path) -> Path:
    return folder / "influence.h5"


FAILURES: dict[str, tuple[Callable, Callable, Callable, dict, type[InfluenceError], str]] = {
    "unseen loss": (HandwrittenLoss, loader, a_path, {}, LossNotRecognizedError, 'pass `loss="mean"`'),
    "no folder": (Classifier, loader, a_file_as_folder, {}, StoreError, "cannot be made a directory"),
    "closed folder": (Classifier, loader, a_closed_folder, {}, StoreError, "Permission denied|permission"),
    "path is a directory": (Classifier, loader, a_directory, {}, StoreError, "must name a file"),
    "all gradients NaN": (Classifier, without_numbers, a_path, {}, CaptureError, "did the loss become NaN"),
    "no such layer": (
        Classifier,
        loader,
        a_path,
        {"layers": ["encoder.*"]},
        LayerError,
        "there are: layers.0",
    ),
    "doubled rows": (
        Classifier,
        lambda: loader(collate_fn=doubling),
        a_path,
        {},
        RowIndexError,
        "saw 8 rows in a batch of 4.*pass `index_fn=`",
    ),
    "flattened rows": (Flattening, loader, a_path, {}, RowIndexError, "leave the layer out with `layers=`"),
    "iterable dataset": (
        Classifier,
        lambda: DataLoader(Stream(), BATCH),
        a_path,
        {},
        RowIndexError,
        "use a map-style dataset",
    ),
    "unknown length": (
        Classifier,
        lambda: DataLoader(Stream(), BATCH),
        a_path,
        {"index_fn": lambda batch: range(len(batch[0]))},
        UnsupportedTrainingError,
        "give it a `__len__`",
    ),
    "two loaders": (TwoLoaders, lambda: [loader(), loader()], a_path, {}, RowIndexError, "ConcatDataset"),
    "LBFGS": (
        WithLBFGS,
        loader,
        a_path,
        {},
        UnsupportedTrainingError,
        "calls its closure once",
    ),
}


@pytest.fixture(params=FAILURES, ids=str)
def failure(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable, Callable, Path, dict, type, str]:
    if request.param == "closed folder" and os.name == "posix" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    model, data, path, options, error, match = FAILURES[request.param]
    return model, data, path(tmp_path), options, error, match


def test_a_failure_of_ours_gives_one_warning_that_says_what_to_do(failure: tuple, tmp_path: Path) -> None:
    model, data, path, options, error, match = failure
    with our_warnings() as messages:
        fit(tmp_path, model(), data(), InfluenceCallback(path, **options))
    (message,) = messages
    assert re.search(f"(?s)has stopped capturing; training goes on. {error.__name__}: .*{match}", message)


@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_a_failure_of_ours_leaves_training_as_it_is_without_the_callback(failure: tuple, tmp_path: Path) -> None:
    model, data, path, options, _, _ = failure
    alone, watched = model(), model()
    fit(tmp_path, alone, data())
    trainer = fit(tmp_path, watched, data(), InfluenceCallback(path, **options))
    assert_same_weights(watched, alone)
    assert_nothing_is_left(watched, trainer)
    assert not path.is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_on_error_raise_ends_training_with_the_error(failure: tuple, tmp_path: Path) -> None:
    model, data, path, options, error, match = failure
    watched = model()
    with pytest.raises(error, match=f"(?s){match}"):
        fit(tmp_path, watched, data(), InfluenceCallback(path, on_error="raise", **options))
    assert_nothing_is_left(watched)
    assert not list(tmp_path.rglob("*.partial"))


def train_on_a_full_disk(folder: Path, results: Connection) -> None:
    """In a process of its own, whose files may not grow beyond a page."""
    import resource

    for descriptor in (1, 2):  # or what Lightning prints would be too long a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    model = Classifier()
    with our_warnings() as messages:
        fit(folder, model, loader(), InfluenceCallback(folder / "influence.h5"))
    results.send((messages, [parameter.detach().tolist() for parameter in model.parameters()]))


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit on file sizes in a forked process")
def test_training_completes_on_a_full_disk_with_one_warning_and_no_file(tmp_path: Path) -> None:
    results, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=train_on_a_full_disk, args=(tmp_path, sender))
    process.start()
    sender.close()
    (message,), weights = results.recv()  # EOFError: training did not complete
    process.join()
    assert "training goes on. StoreError: no room for" in message
    assert "Free space" in message
    assert list(tmp_path.iterdir()) == []
    alone = Classifier()
    fit(tmp_path, alone, loader())
    assert weights == [parameter.tolist() for parameter in alone.parameters()]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_splits_the_model_is_refused_with_a_reason(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), num_nodes=1)
    with pytest.raises(UnsupportedTrainingError, match=rf"{strategy.__name__}.*whole weights.*strategy=\"ddp\""):
        check_supported(trainer)  # type: ignore[arg-type]


def test_gradients_that_a_communication_hook_averages_are_not_compared() -> None:
    device, hook = torch.device("cuda"), object()
    for strategy, is_exact in [(hook, False), (None, True)]:
        strategy = SimpleNamespace(_ddp_comm_hook=strategy, root_device=device)
        assert has_exact_average(SimpleNamespace(strategy=strategy)) is is_exact  # type: ignore[arg-type]


def test_several_machines_are_refused_with_a_reason(tmp_path: Path) -> None:
    trainer = SimpleNamespace(strategy=make_trainer(tmp_path).strategy, num_nodes=2)
    with pytest.raises(UnsupportedTrainingError, match=r"one machine.*num_nodes=2.*shared memory"):
        check_supported(trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"), [("codec", "zip"), ("fisher", "true"), ("loss", "max"), ("on_error", "ignore")]
)
def test_an_unknown_choice_is_refused_with_the_known_ones(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be one of '.*got '{value}'"):
        InfluenceCallback(**{option: value})


def test_layers_that_are_a_string_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`layers` must be a list .* got the string 'layers\.0'"):
        InfluenceCallback(layers="layers.0")


def test_an_index_fn_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`index_fn` must be a function .* got 'index'"):
        InfluenceCallback(index_fn="index")


def test_a_budget_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="`bytes_per_example` must be positive or None, got 0"):
        InfluenceCallback(bytes_per_example=0)


# --- how a run ends -------------------------------------------------------------------------------


def test_one_epoch_is_captured_whole(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(tmp_path / "influence.h5"), max_epochs=1)
    assert StoreReader(tmp_path / "influence.h5").attributes["epoch"] == 0
    assert written(tmp_path / "influence.h5") == [True] * N


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_the_final_epoch_is_captured(tmp_path: Path, codec: Any) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(path, codec=codec), max_epochs=3)
    facts = StoreReader(path).attributes
    assert (facts["epoch"], facts["step_start"], facts["step_end"]) == (2, 6, 9)


def test_steps_that_end_within_an_epoch_leave_the_epoch_before_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    with our_warnings() as messages:
        fit(tmp_path, Classifier(0.0), loader(), InfluenceCallback(path), max_epochs=-1, max_steps=8)
    facts = StoreReader(path).attributes
    assert (facts["epoch"], facts["step_start"], facts["step_end"]) == (1, 3, 6)
    assert len(messages) == 1
    assert "epoch 2 ended before its last batch" in messages[0]
    assert f"{path} holds epoch 1" in messages[0]
    assert [each.name for each in tmp_path.iterdir()] == ["influence.h5"]


PART = "ended before its last batch, and no whole one was captured before"


def is_whole(path: Path) -> bool:
    return bool(StoreReader(path).attributes["is_whole"])


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_steps_that_end_within_the_first_epoch_leave_a_file_that_says_so(tmp_path: Path, codec: Any) -> None:
    path = tmp_path / "influence.h5"
    with our_warnings() as messages:
        model = Classifier()
        fit(tmp_path, model, loader(), InfluenceCallback(path, codec=codec), max_epochs=-1, max_steps=2)
    assert f"epoch 0 {PART}: {path} holds the 8 of 10 examples" in messages[0]
    facts = StoreReader(path).attributes
    assert (is_whole(path), facts["batches_captured"], facts["batches_planned"]) == (False, 2, 3)
    assert sum(written(path)) == 8
    assert "a part of it" in InfluenceModule.attach(model, path).summary()


class Logging(Classifier):
    """Logs its loss, for early stopping."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True)
        return loss


def test_early_stopping_leaves_the_epoch_that_turned_out_to_be_the_last(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    stopping = EarlyStopping("loss", patience=1, mode="max")  # stops as soon as the loss has fallen
    trainer = fit(tmp_path, Logging(), loader(), InfluenceCallback(path), stopping, max_epochs=9)
    assert 0 < trainer.current_epoch < 9
    assert StoreReader(path).attributes["epoch"] == trainer.current_epoch - 1
    assert StoreReader(path).attributes["step_end"] == trainer.global_step


def test_a_time_limit_leaves_the_last_complete_epoch(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    timer = Timer(timedelta(microseconds=1), interval="epoch", verbose=False)
    trainer = fit(tmp_path, Classifier(), loader(), InfluenceCallback(path), timer, max_epochs=9)
    assert trainer.current_epoch == 1
    assert StoreReader(path).attributes["epoch"] == 0


def test_a_time_limit_within_the_first_epoch_leaves_a_part_of_it(tmp_path: Path) -> None:
    timer = Timer(timedelta(microseconds=1), interval="step", verbose=False)
    callback = InfluenceCallback(tmp_path / "influence.h5")
    with pytest.warns(UserWarning, match=PART):
        fit(tmp_path, Classifier(), loader(), callback, timer, max_epochs=9)
    assert not is_whole(tmp_path / "influence.h5")


class Stopping(Classifier):
    """The user's code ends the run in some batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.when = (epoch, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if (self.current_epoch, batch_idx) == self.when:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 2)])
def test_a_stop_before_the_epoch_that_seemed_certain_is_warned_of(tmp_path: Path, epoch: int, batch: int) -> None:
    with our_warnings() as messages:
        callback = InfluenceCallback(tmp_path / "influence.h5")
        fit(tmp_path, Stopping(epoch, batch), loader(), callback, max_epochs=3)
    assert len(messages) == 1
    assert "(epoch 2 was to be captured), so" in messages[0]
    assert "was not written" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_a_stop_within_the_captured_epoch_leaves_a_part_of_it_and_says_so(tmp_path: Path) -> None:
    with our_warnings() as messages:
        fit(tmp_path, Stopping(1, 1), loader(), InfluenceCallback(tmp_path / "influence.h5"))
    assert f"epoch 1 {PART}" in messages[0]
    assert not is_whole(tmp_path / "influence.h5")


@pytest.mark.parametrize(
    ("data", "options", "seen"),
    [
        ({"shuffle": False}, {"limit_train_batches": 2}, 8),
        ({"shuffle": False, "drop_last": True}, {}, 8),
        ({"shuffle": False}, {"overfit_batches": 1}, 4),
    ],
)
def test_examples_that_the_epoch_left_out_are_marked_missing(
    tmp_path: Path, data: dict, options: dict, seen: int
) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(**data), InfluenceCallback(path), **options)
    assert written(path) == [True] * seen + [False] * (N - seen)
    facts = StoreReader(path).attributes
    assert (facts["rows_written"], facts["rows_missing"], facts["rows_invalid"]) == (seen, N - seen, 0)


class SkippingSteps(Classifier):
    """Returns no loss for some batches of every epoch."""

    def __init__(self, *skipped: int) -> None:
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_examples_of_a_step_without_loss_are_marked_missing(tmp_path: Path, skipped: int) -> None:
    path = tmp_path / "influence.h5"
    data = loader(shuffle=False)
    with our_warnings() as messages:
        fit(tmp_path, SkippingSteps(skipped), data, InfluenceCallback(path), max_epochs=2)
    assert not [message for message in messages if "stopped" in message]
    assert written(path) == [row // BATCH != skipped for row in range(N)]


class SkippingTheRest(Classifier):
    """Ends each epoch before its last batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


def test_an_epoch_that_the_user_cuts_short_leaves_a_part_of_it_and_no_hook(tmp_path: Path) -> None:
    model = SkippingTheRest()
    with our_warnings() as messages:
        trainer = fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    assert any(f"epoch 1 {PART}" in message for message in messages)
    assert not is_whole(tmp_path / "influence.h5")
    assert_nothing_is_left(model, trainer)


def test_a_fast_development_run_leaves_no_file_and_the_older_one_untouched(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(path), fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(path), fast_dev_run=True)
    assert path.read_bytes() == b"older"


def test_no_epochs_leave_no_file_and_no_warning(tmp_path: Path) -> None:
    model = Classifier()
    with our_warnings() as messages:
        callback = InfluenceCallback(tmp_path / "influence.h5")
        trainer = fit(tmp_path, model, loader(), callback, max_epochs=0)
    assert messages == []
    assert list(tmp_path.iterdir()) == []
    assert_nothing_is_left(model, trainer)


def test_a_second_fit_with_the_same_callback_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    callback = InfluenceCallback(path)
    ids = []
    for _ in range(2):
        fit(tmp_path, Classifier(), loader(), callback)
        ids.append(StoreReader(path).store_id)
    assert ids[0] != ids[1]


def test_a_second_fit_of_the_same_trainer_captures_its_own_final_epoch(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    model = Classifier()
    trainer = fit(tmp_path, model, loader(), InfluenceCallback(path))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader())
    assert StoreReader(path).attributes["epoch"] == 3


def test_a_checkpoint_after_a_second_fit_with_nothing_to_do_still_belongs_to_the_file(tmp_path: Path) -> None:
    model = Classifier()
    trainer = fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt", weights_only=False)
    influence = InfluenceModule.from_checkpoint(tmp_path / "late.ckpt", Classifier)
    assert influence.store.path == tmp_path / "influence.h5"


class Validating(Classifier):
    """Validates and tests with the training data."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", super().training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


@pytest.mark.parametrize("interval", [1, 1.0])
def test_validation_within_and_after_the_captured_epoch_leaves_its_rows_alone(
    tmp_path: Path, interval: float
) -> None:
    path = tmp_path / "influence.h5"
    trainer = make_trainer(tmp_path, InfluenceCallback(path), val_check_interval=interval)
    trainer.fit(Validating(0.0), loader(), loader())
    reader = StoreReader(path)
    assert reader.column("label").tolist() == dataset().tensors[1].tolist()
    assert reader.attributes["rows_invalid"] == 0


def test_validating_testing_and_predicting_capture_nothing(tmp_path: Path) -> None:
    model = Validating()
    trainer = make_trainer(tmp_path, InfluenceCallback(tmp_path / "influence.h5"))
    with our_warnings() as messages:
        trainer.validate(model, loader(), verbose=False)
        trainer.test(model, loader(), verbose=False)
        trainer.predict(model, loader())
    assert messages == []
    assert list(tmp_path.iterdir()) == []
    assert_nothing_is_left(model, trainer)


def test_a_termination_signal_leaves_no_file_and_no_hook(tmp_path: Path) -> None:
    class Terminated(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if (self.current_epoch, batch_idx) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    model, folder = Terminated(), tmp_path / "out"
    with pytest.raises(SIGTERMException):
        fit(tmp_path, model, loader(), InfluenceCallback(folder / "influence.h5"))
    assert not folder.exists() or list(folder.iterdir()) == []
    assert_nothing_is_left(model)


class Normalizing(Classifier):
    """With batch statistics, for which weight averaging adds an epoch without any backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_weight_averaging_leaves_the_last_epoch_with_backwards(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    callback = InfluenceCallback(path, layers=["layers.*"])
    with our_warnings() as messages:
        trainer = fit(tmp_path, Normalizing(), loader(), callback, averaging, max_epochs=3)
    assert trainer.current_epoch == 4
    assert StoreReader(path).attributes["epoch"] == 2
    assert not [message for message in messages if "stopped capturing" in message]


def test_searches_for_a_learning_rate_or_batch_size_are_not_captured(tmp_path: Path) -> None:
    class Searched(WithData):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return loader(batch_size=self.batch_size)

    path, model = tmp_path / "influence.h5", Searched()
    searches = [
        BatchSizeFinder(max_trials=1, steps_per_trial=2),
        LearningRateFinder(num_training_steps=4, update_attr=True),
    ]
    trainer = make_trainer(tmp_path, InfluenceCallback(path), *searches, enable_checkpointing=True)
    with our_warnings() as messages:
        trainer.fit(model)
    assert not [message for message in messages if "aged" not in message]
    facts = StoreReader(path).attributes
    assert (facts["epoch"], facts["rows_written"], facts["step_end"]) == (1, N, trainer.global_step)


def resumed(tmp_path: Path, saving: ModelCheckpoint, first: dict, then: dict) -> Path:
    """Train, then go on from the checkpoint with another trainer; the path of the second file."""
    saving.dirpath = str(tmp_path / "checkpoints")
    fit(tmp_path, Classifier(), loader(), saving, enable_checkpointing=True, **first)
    path = tmp_path / "second.h5"
    trainer = make_trainer(tmp_path, InfluenceCallback(path), **then)
    trainer.fit(Classifier(), loader(), ckpt_path=saving.best_model_path, weights_only=True)
    return path


@pytest.mark.filterwarnings("ignore:.*[Bb]e aware that when using `ckpt_path`")
@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_a_run_resumed_between_epochs_has_a_file(tmp_path: Path, codec: str) -> None:
    path = resumed(tmp_path, ModelCheckpoint(), {"max_epochs": 1}, {"max_epochs": 2})
    assert StoreReader(path).attributes["epoch"] == 1
    assert written(path) == [True] * N


@pytest.mark.filterwarnings("ignore:.*[Bb]e aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_within_its_final_epoch_says_what_is_missing(tmp_path: Path) -> None:
    every_step = ModelCheckpoint(every_n_train_steps=1)
    with pytest.warns(UserWarning, match="resumed within epoch 0.* of 10 examples are missing from .*second.h5"):
        path = resumed(tmp_path, every_step, {"max_epochs": 1, "max_steps": 2}, {"max_epochs": 1})
    assert StoreReader(path).attributes["is_resumed"] is True
    assert 0 < sum(written(path)) <= BATCH


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_stand_at_their_dataset_index(tmp_path: Path, num_workers: int) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(num_workers=num_workers), InfluenceCallback(path), max_epochs=1)
    assert StoreReader(path).column("label").tolist() == dataset().tensors[1].tolist()


def test_losses_of_an_unchanged_model_equal_a_recomputation(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    model = Classifier(learning_rate=0.0)
    fit(tmp_path, model, loader(), InfluenceCallback(path))
    x, y = dataset().tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y, reduction="none")
    found = torch.from_numpy(StoreReader(path).column("loss"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # other batches, other rounding


class Scheduled(Classifier):
    """Halves the learning rate after every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_rows_tell_the_learning_rate_that_was_in_force_at_their_step(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Scheduled(), loader(shuffle=False), InfluenceCallback(path))
    assert StoreReader(path).column("learning_rate").tolist() == [2.0 ** -(3 + row // BATCH) for row in range(N)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_tell_the_number_of_steps_that_were_taken_before_theirs(tmp_path: Path, accumulation: int) -> None:
    path = tmp_path / "influence.h5"
    data, callback = loader(shuffle=False), InfluenceCallback(path)
    fit(tmp_path, Classifier(), data, callback, accumulate_grad_batches=accumulation)
    start = StoreReader(path).attributes["step_start"]
    assert start == -(-3 // accumulation)
    expected = [start + row // BATCH // accumulation for row in range(N)]
    assert StoreReader(path).column("step").tolist() == expected


def backwards_index(batch: Any) -> list[int]:
    x, _ = batch
    order = dataset().tensors[0]
    return [N - 1 - int((order == row).all(1).nonzero()) for row in x]


def test_index_fn_decides_where_the_rows_stand(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(path, index_fn=backwards_index))
    assert StoreReader(path).column("label").tolist() == dataset().tensors[1].flip(0).tolist()


def test_manual_optimization_is_captured(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Manual(), loader(), InfluenceCallback(path))
    assert StoreReader(path).column("label").tolist() == dataset().tensors[1].tolist()


def test_a_declared_loss_is_captured(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, HandwrittenLoss(), loader(), InfluenceCallback(path, loss="mean"))
    assert written(path) == [True] * N


# --- what is said ---------------------------------------------------------------------------------


def test_the_log_says_at_the_start_what_will_be_captured(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), loader(), InfluenceCallback(path))
    start = f"InfluenceCallback: captures the final epoch into {path}: 2 layers (2 as pairs), 100.0%"
    assert any(line.startswith(start) for line in lines())


def test_the_log_says_at_the_end_what_there_is(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(0.0), loader(drop_last=True), InfluenceCallback(path))
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    end = f"InfluenceCallback: epoch 1 is in {path}: 8 rows, 2 missing, 0 invalid (80.0% of the dataset), "
    rest = f"{size}, staleness 1.000, rounding leaves Spearman"
    assert any(line.startswith(end) and rest in line for line in lines())


def test_the_counts_and_the_staleness_are_logged_as_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "logs", 0)
    callback = InfluenceCallback(tmp_path / "influence.h5")
    fit(tmp_path, Classifier(0.0), loader(drop_last=True), callback, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("influence/rows_written")]
    found = {name.partition("/")[2]: float(value) for name, value in row.items() if "influence/" in name}
    size = os.path.getsize(tmp_path / "influence.h5") / 1e6
    assert found.pop("staleness_spearman") == pytest.approx(1, abs=1e-6)
    assert found.pop("codec_spearman") == pytest.approx(1, abs=1e-2)  # int8
    assert 0 < found.pop("finish_seconds") < 60
    counts = {"rows_written": 8, "rows_missing": 2, "rows_invalid": 0, "coverage_percent": 80}
    assert found == {**counts, "file_megabytes": size}
    assert row["step"] == "4"


class Scale(nn.Module):
    """A layer of the user's own, which no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class AsSteps(nn.Module):
    """Takes the features for time steps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(-1))[0].squeeze(-1)


class WithFirst(Classifier):
    """The classifier with another layer in front."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


@pytest.mark.parametrize(
    ("first", "line"),
    [
        (Scale, "  not attributed: first (Scale, 3 parameters, 8.6%): "),
        (lambda: nn.PReLU(FEATURES), "  not attributed: first (PReLU, 3 parameters, 8.6%): "),
        (
            lambda: AsSteps(nn.GRU(1, 1)),
            "  not attributed: first.inner (GRU, 12 parameters, 27.3%): nn.GRU applies",
        ),
    ],
)
def test_a_layer_that_is_not_supported_is_named_in_one_warning(
    tmp_path: Path, first: Callable[[], nn.Module], line: str
) -> None:
    model = WithFirst(first())
    with our_warnings() as messages:
        fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    (message,) = [message for message in messages if "attributed" in message]
    assert any(found.startswith(line) for found in message.splitlines())


def test_a_selection_of_layers_is_no_reason_to_warn(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    with our_warnings() as messages:
        fit(tmp_path, WithFirst(Scale()), loader(), InfluenceCallback(path, layers=["layers.2"]))
    assert not [message for message in messages if "attributed" in message]
    assert StoreReader(path).layers == ("layers.2",)


class UsedElsewhere(Classifier):
    """Uses a weight outside of its layer's forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x) + F.linear(x, self.layers[0].weight)[:, :CLASSES], y)


class NeverCalled(Classifier):
    """Has a layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (UsedElsewhere, r"layers\.0 \(Linear, 20 parameters, 62\.5%\): its weight is also used outside"),
        (NeverCalled, r"head \(Linear, 6 parameters, 15\.8%\): no call of it took part"),
    ],
)
def test_a_layer_whose_gradients_are_not_whole_is_left_out_and_named(
    tmp_path: Path, model: Callable[[], Classifier], line: str
) -> None:
    path = tmp_path / "influence.h5"
    with pytest.warns(UserWarning, match=rf"(?s)InfluenceCallback: .*not attributed: {line}"):
        fit(tmp_path, model(), loader(), InfluenceCallback(path))
    assert line.partition(" ")[0].replace("\\", "") not in StoreReader(path).layers
    assert written(path) == [True] * N


class Finetuning(Classifier):
    """Its first layer is trained in some epochs only."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_train_epoch_start(self) -> None:
        self.layers[0].requires_grad_(self.current_epoch == self.epoch)


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_a_layer_that_is_unfrozen_for_the_captured_epoch_is_captured(tmp_path: Path, codec: Any) -> None:
    model = Finetuning(epoch=1)
    model.layers[0].requires_grad_(False)
    fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5", codec=codec))
    influence = InfluenceModule.attach(model, tmp_path / "influence.h5")
    assert influence.store.layers == ("layers.0", "layers.2")
    assert influence.coverage.share == 1
    assert sum(layer.parameters for layer in influence.coverage.layers) == 32


def test_a_layer_that_is_frozen_before_the_captured_epoch_is_not_in_the_file(tmp_path: Path) -> None:
    model = Finetuning(epoch=0)
    fit(tmp_path, model, loader(), InfluenceCallback(tmp_path / "influence.h5"))
    influence = InfluenceModule.attach(model, tmp_path / "influence.h5")
    assert influence.store.layers == ("layers.2",)
    assert [layer.name for layer in influence.coverage.layers] == ["layers.2"]


# --- command line, several callbacks --------------------------------------------------------------


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_influence.InfluenceCallback
      init_args:
"""


def run_cli(folder: Path, **init_args: Any) -> None:
    arguments = "".join(f"{name}: {value}\n" for name, value in init_args.items())
    config = folder / "config.yaml"
    config.write_text(CONFIG + textwrap.indent(arguments, " " * 8))
    LightningCLI(WithData, save_config_callback=None, args=["fit", "--config", str(config)])


def test_the_command_line_trains_and_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    run_cli(tmp_path, path=path, layers="[layers.2]", codec="pairs-float16", on_error="raise")
    assert StoreReader(path).layers == ("layers.2",)
    assert written(path) == [True] * N


@pytest.mark.parametrize("epochs", ["every", "2", "[0, 1]"])
def test_the_command_line_takes_epochs(tmp_path: Path, epochs: str) -> None:
    path = tmp_path / "influence.h5"
    run_cli(tmp_path, path=path, epochs=epochs, trajectory="segments", on_error="raise")
    assert StoreReader(path).segments == ((1,) if epochs == "2" else (0, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codecs", "pairs"),
        ("codec", "zip"),
        ("bytes_per_example", "many"),
        ("layers", "a.b"),
        ("epochs", "evry"),
        ("rows", "finl"),
        ("trajectory", "merged"),
    ],
)
def test_the_command_line_rejects_what_the_callback_does_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, value: str
) -> None:
    with pytest.raises(SystemExit):
        run_cli(tmp_path, path=tmp_path / "influence.h5", **{name: value})
    assert name in capsys.readouterr().err


def test_two_callbacks_write_two_files(tmp_path: Path) -> None:
    paths = [tmp_path / "first.h5", tmp_path / "last.h5"]
    callbacks = [
        InfluenceCallback(path, layers=[layer])
        for path, layer in zip(paths, ["layers.0", "layers.2"], strict=True)
    ]
    model = Classifier()
    fit(tmp_path, model, loader(), *callbacks)
    first, last = (StoreReader(path) for path in paths)
    assert (first.layers, last.layers) == (("layers.0",), ("layers.2",))
    assert first.store_id != last.store_id
    assert written(paths[0]) == written(paths[1]) == [True] * N
    assert_nothing_is_left(model)

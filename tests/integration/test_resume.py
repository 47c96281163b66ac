"""Training that goes on from a checkpoint: what the file holds of the run before, and what it says is missing.

The sampler's order is fixed, so that what each step of each run sees is known: Lightning goes on in an epoch with
as many batches as were left, and draws these from the start of the order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lightning_influence import InfluenceCallback
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import make_trainer
from tests.integration.models import Mlp, Task, seeded, stored_factors, stored_gradients, vector_data
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import linear_layer_names, per_example_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*[Bb]e aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*training was resumed within epoch"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
]
N, BATCH, BATCHES, EPOCHS = 640, 128, 5, 3  # the eigen codec lays its file out after 256 examples
SEEN_BEFORE, SAVED, CRASH = 3, 13, 14  # batches of the final epoch before the checkpoint; its step; the crash's
LOST = np.arange(SEEN_BEFORE * BATCH, N)  # positions in the order that no run but the lost one has seen
AGAIN = np.arange((BATCHES - SEEN_BEFORE) * BATCH)  # positions that both have seen
KEPT = np.arange(len(AGAIN), SEEN_BEFORE * BATCH)  # that only the run before the checkpoint has seen
CODECS = ["pairs-float32", "eigen"]


class ByEpoch(Sampler[int]):
    """An order for each epoch, whenever it is drawn."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.epoch).tolist())


def order(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(N)


def data() -> DataLoader:
    return DataLoader(vector_data(N), batch_size=BATCH, sampler=ByEpoch())


class Ending(Task):
    """Its run ends in a step, if it is told so, by an exception or by a kill."""

    def __init__(
        self, rate: float = 0.1, at: int | None = None, how: Literal["exception", "kill"] = "exception"
    ) -> None:
        super().__init__(seeded(Mlp), optimizer=partial(torch.optim.SGD, lr=rate))
        self.at, self.how = at, how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.at is not None and self.trainer.global_step == self.at:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("the end")
        return super().training_step(batch, batch_idx)


def train(
    folder: Path, model: Task, *, codec: Any, after: int | None = None, every: int | None = None, **options: Any
) -> Path:
    """Train, with a checkpoint at the end of each epoch or every few steps; the path of the file.

    Args:
        folder: for file and checkpoints.
        model: to train.
        codec: of the callback.
        after: step of the checkpoint to go on from.
        every: number of steps between checkpoints.
        options: `epochs` and `rows` for the callback, other `callbacks`, and all others for the trainer.
    """
    path = folder / "influence.h5"
    others = options.pop("callbacks", [])
    own: Any = {name: options.pop(name) for name in ("epochs", "rows", "trajectory") if name in options}
    callback = InfluenceCallback(path, codec=codec, on_error="raise", covariance_positions=None, **own)
    saving = ModelCheckpoint(folder / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=every)
    trainer = make_trainer(
        folder, callback, saving, *others, **{"max_epochs": EPOCHS, "enable_checkpointing": True, **options}
    )
    checkpoint = None if after is None else folder / "saved" / f"step={after}.ckpt"
    trainer.fit(model, data(), ckpt_path=checkpoint, weights_only=None if after is None else True)
    return path


def train_until_the_end_comes(folder: Path, model: Ending, **options: Any) -> None:
    if model.how == "exception":
        with pytest.raises(ZeroDivisionError):
            train(folder, model, **options)
        return
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder, model), kwargs=options)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def resume_in_the_final_epoch(
    folder: Path, codec: str, *, rate: float = 0.1, how: Literal["exception", "kill"] = "exception"
) -> Path:
    """The crash comes a step after the checkpoint from which training goes on."""
    train_until_the_end_comes(folder, Ending(rate, CRASH, how), codec=codec, every=SAVED)
    return train(folder, Ending(rate), codec=codec, every=SAVED, after=SAVED)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def assert_same(path: Path, other: Path, rows: np.ndarray | None = None) -> None:
    """Rows and columns to the last bit and, if all rows are meant, factors to rounding."""
    mine, theirs = StoreReader(path), StoreReader(other)
    mine.verify_rows()
    chosen = slice(None) if rows is None else rows
    for column in ("written", "valid", "loss", "step", "learning_rate", "label", "occurrences"):
        np.testing.assert_array_equal(mine.column(column)[chosen], theirs.column(column)[chosen], column)
    assert mine.layers == theirs.layers
    for layer in mine.layers:
        for name, array in mine.rows(layer).items():
            np.testing.assert_array_equal(array[chosen], theirs.rows(layer)[name][chosen], f"{layer} {name}")
        if rows is None:
            for name, factor in mine.factors(layer).items():
                # sums are grouped otherwise, by which eigenvectors of close eigenvalues turn
                np.testing.assert_allclose(factor, theirs.factors(layer)[name], rtol=1e-4, atol=1e-4)


# --- between epochs -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, BATCHES])
@pytest.mark.parametrize("codec", CODECS)
def test_a_run_resumed_between_epochs_has_the_file_of_the_run_that_never_stopped(
    tmp_path: Path, codec: str, every: int | None
) -> None:
    whole = train(tmp_path / "whole", Ending(), codec=codec)
    folder = tmp_path / "resumed"
    train_until_the_end_comes(folder, Ending(at=10), codec=codec, every=every)
    resumed = train(folder, Ending(), codec=codec, every=every, after=10)
    assert_same(resumed, whole)
    assert not StoreReader(resumed).attributes["is_resumed"]
    assert files(folder) == {"influence.h5"}


@pytest.mark.parametrize("codec", CODECS)
def test_the_steps_before_the_checkpoint_count_in_a_basis_that_is_being_prepared(
    tmp_path: Path, codec: str
) -> None:
    train_until_the_end_comes(tmp_path, Ending(0.0, 9), codec=codec, every=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*training was resumed within epoch 2")
        path = train(tmp_path, Ending(0.0), codec=codec, every=8, after=8)
    reader = StoreReader(path)
    assert reader.column("occurrences").tolist() == [1] * N  # of the final epoch
    assert not reader.attributes["is_resumed"]
    # The epoch before saw its first three batches, and two more: the same two as at first.
    seen = np.concatenate([order(1)[:384], order(1)[:256]]) if codec == "eigen" else np.arange(N)
    assert_covariances_are_of(path, torch.from_numpy(seen), autograd(Ending()))


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_resumed_within_an_epoch_that_is_not_looked_at_has_all_rows(tmp_path: Path, codec: str) -> None:
    train_until_the_end_comes(tmp_path, Ending(at=4), codec=codec, every=3)
    reader = StoreReader(train(tmp_path, Ending(), codec=codec, every=3, after=3))
    assert reader.column("occurrences").tolist() == [1] * N
    assert not reader.attributes["is_resumed"]
    assert (reader.attributes["batches_captured"], reader.attributes["batches_planned"]) == (BATCHES, BATCHES)


# --- within the captured epoch --------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["exception", pytest.param("kill", marks=pytest.mark.skipif(os.name != "posix", reason="kills"))]
)
@pytest.mark.parametrize("codec", CODECS)
def test_rows_from_before_the_checkpoint_survive_and_the_lost_runs_do_not(
    tmp_path: Path, codec: str, how: Any
) -> None:
    whole = train(tmp_path / "whole", Ending(), codec=codec)
    folder = tmp_path / "resumed"
    resumed, last = resume_in_the_final_epoch(folder, codec, how=how), order(EPOCHS - 1)
    reader = StoreReader(resumed)
    assert_same(resumed, whole, last[KEPT])
    assert reader.column("occurrences")[last].tolist() == [2] * len(AGAIN) + [1] * len(KEPT) + [0] * len(LOST)
    assert set(reader.column("step")[last[AGAIN]]) == {13, 14}
    assert set(reader.column("step")[last[KEPT]]) == {12}
    assert not reader.column("written")[last[LOST]].any()
    assert all(not array[last[LOST]].any() for layer in reader.layers for array in reader.rows(layer).values())
    assert files(folder) == {"influence.h5"}


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_resumed_within_the_captured_epoch_says_so_and_what_is_missing(tmp_path: Path, codec: str) -> None:
    with pytest.warns(UserWarning, match="resumed within epoch 2.*256 of 640 examples are missing"):
        path = resume_in_the_final_epoch(tmp_path, codec)
    found = StoreReader(path).attributes
    assert found["is_resumed"]
    assert (found["rows_written"], found["rows_missing"], found["rows_invalid"]) == (384, 256, 0)
    assert (found["batches_captured"], found["batches_planned"]) == (5, 5)
    assert (found["epoch"], found["step_start"], found["step_end"]) == (2, 10, 15)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_and_factors_of_both_runs_equal_autograds(tmp_path: Path, codec: str) -> None:
    path = resume_in_the_final_epoch(tmp_path, codec, rate=0.0)
    times = torch.from_numpy(StoreReader(path).column("occurrences")).long()
    written = times > 0
    true = autograd(Ending())
    for name, stored in stored_gradients(path).items():
        error = (stored[written].double() - true[name][written]).norm() / true[name][written].norm()
        assert error < (1e-6 if codec != "eigen" else 0.02)  # int8
        basis, Lambda = stored_factors(path)[name]
        expected = eigenvalue_correction(true[name].repeat_interleave(times, 0), basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    if codec != "eigen":  # whose basis is of the epoch before
        assert_covariances_are_of(path, torch.arange(N).repeat_interleave(times), true)


def assert_covariances_are_of(path: Path, seen: Tensor, true: dict[str, Tensor]) -> None:
    """The first layer's A and S, from the examples' inputs and gradients, whose last column is the bias's."""
    inputs = torch.cat([vector_data(N).tensors[0], torch.ones(N, 1)], 1)
    A, S = covariances(inputs[seen, None], true["net.first"][seen, None, :, -1])
    basis, _ = stored_factors(path)["net.first"]
    for Q, eigenvalues, expected in ((basis.Q_A, basis.eigenvalues_A, A), (basis.Q_S, basis.eigenvalues_S, S)):
        torch.testing.assert_close(Q @ eigenvalues.diag() @ Q.T, expected, atol=1e-5, rtol=1e-5)


def autograd(model: Task) -> dict[str, Tensor]:
    """Each example's gradients in float64, [N, o, i], by the layer's name in the file."""

    def loss(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return model.loss(net(example[0][None]), example[1][None])

    examples = vector_data(N)
    found = per_example_gradients(model.net, [examples[n] for n in range(N)], loss, linear_layer_names(model.net))
    return {f"net.{name}": gradient for name, gradient in found.items()}


@pytest.mark.parametrize("codec", CODECS)
def test_rows_at_the_final_weights_are_of_the_examples_that_either_run_has_seen(
    tmp_path: Path, codec: str
) -> None:
    train_until_the_end_comes(tmp_path, Ending(at=CRASH), codec=codec, every=SAVED, rows="final")
    with pytest.warns(UserWarning, match="256 of 640 examples are missing"):
        path = train(tmp_path, Ending(), codec=codec, every=SAVED, after=SAVED, rows="final")
    reader, last = StoreReader(path), order(EPOCHS - 1)
    assert reader.column("written")[last].tolist() == [1] * (len(AGAIN) + len(KEPT)) + [0] * len(LOST)
    assert reader.attributes["is_resumed"]
    assert set(reader.column("occurrences")) == {0, 1}
    assert files(tmp_path) == {"influence.h5"}


@pytest.mark.parametrize("codec", CODECS)
def test_rows_at_the_final_weights_of_a_run_resumed_between_epochs_are_those_of_one_that_never_stopped(
    tmp_path: Path, codec: str
) -> None:
    whole = train(tmp_path / "whole", Ending(), codec=codec, rows="final")
    train_until_the_end_comes(tmp_path / "resumed", Ending(at=10), codec=codec, rows="final")
    assert_same(train(tmp_path / "resumed", Ending(), codec=codec, after=10, rows="final"), whole)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_survive_in_a_checkpoint_that_the_exception_itself_saves(tmp_path: Path, codec: str) -> None:
    whole = train(tmp_path / "whole", Ending(), codec=codec)
    folder = tmp_path / "resumed"
    folder.mkdir()
    saving = OnExceptionCheckpoint(str(folder / "saved"), f"step={SAVED}")
    train_until_the_end_comes(folder, Ending(at=SAVED), codec=codec, every=100, callbacks=[saving])
    resumed, last = train(folder, Ending(), codec=codec, after=SAVED), order(EPOCHS - 1)
    assert_same(resumed, whole, last[KEPT])
    assert StoreReader(resumed).column("written").sum() == N - len(LOST)
    assert files(folder) == {"influence.h5"}


# --- what was kept is gone, or of another run -----------------------------------------------------


def kept(folder: Path) -> tuple[Path, Path]:
    """The side file and the unfinished file that a run has left, and no others."""
    (side,), (unfinished,) = folder.glob("*.resume0"), folder.glob("*.partial")
    assert files(folder) == {side.name, unfinished.name}
    return side, unfinished


def spoil(what: str, folder: Path) -> None:
    side, unfinished = kept(folder)
    if what == "no side file":
        side.unlink()
    elif what == "no unfinished file":
        unfinished.unlink()
    elif what == "damaged":
        side.write_bytes(side.read_bytes()[:100])
    else:
        side.write_bytes((folder.parent / "other" / "side").read_bytes())


@pytest.mark.parametrize("what", ["no side file", "no unfinished file", "damaged", "of another step"])
@pytest.mark.parametrize("codec", CODECS)
def test_without_what_was_kept_the_rows_from_before_the_checkpoint_are_missing_and_flagged(
    tmp_path: Path, codec: str, what: str
) -> None:
    folder, model = tmp_path / "run", Ending(at=CRASH)
    if what == "of another step":
        other = tmp_path / "other"
        train_until_the_end_comes(other, Ending(at=CRASH), codec=codec, every=12)
        kept(other)[0].rename(other / "side")
    train_until_the_end_comes(folder, model, codec=codec, every=SAVED)
    spoil(what, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = train(folder, Ending(), codec=codec, every=SAVED, after=SAVED)
    said = [str(each.message) for each in caught if "InfluenceCallback" in str(each.message)]
    assert any("384 of 640 examples are missing" in each for each in said)
    assert any("does not help to resume" in each for each in said) == (what in ("damaged", "of another step"))
    reader, last = StoreReader(path), order(EPOCHS - 1)
    reader.verify_rows()
    assert reader.column("written")[last].tolist() == [1] * len(AGAIN) + [0] * (N - len(AGAIN))
    assert reader.attributes["is_resumed"]
    assert files(folder) == {"influence.h5"}


def test_a_run_that_crashes_again_before_the_next_checkpoint_goes_on_from_the_same_rows(tmp_path: Path) -> None:
    train_until_the_end_comes(tmp_path, Ending(at=CRASH), codec="pairs", every=SAVED)
    train_until_the_end_comes(tmp_path, Ending(at=CRASH), codec="pairs", every=SAVED, after=SAVED)
    kept(tmp_path)
    path = train(tmp_path, Ending(), codec="pairs", every=SAVED, after=SAVED)
    found = StoreReader(path).column("written")[order(EPOCHS - 1)]
    assert found.tolist() == [1] * (len(AGAIN) + len(KEPT)) + [0] * len(LOST)


# --- several epochs -------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [5, 8])
def test_a_resumed_run_keeps_earlier_segments_and_drops_those_of_the_past_that_it_left(
    tmp_path: Path, after: int
) -> None:
    options = {"codec": "pairs-float32", "epochs": "every", "trajectory": "segments"}
    every = None if after == 5 else 4
    path = train(tmp_path, Ending(), every=every, **options)
    before = StoreReader(path)
    assert before.segments == (0, 1, 2)
    resumed = StoreReader(train(tmp_path, Ending(), every=every, after=after, max_epochs=2, **options))
    assert resumed.segments == (0, 1)
    assert resumed.store_id == before.store_id
    mine, theirs = resumed.segment(0), before.segment(0)
    assert mine.attributes == theirs.attributes
    for layer in mine.layers:
        assert all(np.array_equal(rows, theirs.rows(layer)[name]) for name, rows in mine.rows(layer).items())
    assert resumed.segment(1).attributes["is_resumed"] == (after == 8)
    assert files(tmp_path) == {"influence.h5"}


# --- what is left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_an_exception_without_a_checkpoint_in_the_epoch_leaves_nothing(tmp_path: Path, codec: str) -> None:
    train_until_the_end_comes(tmp_path, Ending(at=CRASH), codec=codec, every=100)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_that_ends_within_an_epoch_by_itself_leaves_its_rows_for_one_that_is_resumed(
    tmp_path: Path, codec: str
) -> None:
    with pytest.warns(UserWarning, match=r"epoch 2 ended before its last batch.*left in .*\.partial.*delete"):
        train(tmp_path, Ending(), codec=codec, every=SAVED, max_epochs=-1, max_steps=14)
    assert {name.rpartition(".")[2] for name in files(tmp_path)} == {"h5", "partial", "resume0"}
    assert StoreReader(tmp_path / "influence.h5").attributes["epoch"] == 1
    path = train(tmp_path, Ending(), codec=codec, every=SAVED, after=SAVED)
    assert files(tmp_path) == {"influence.h5"}
    assert StoreReader(path).attributes["batches_captured"] == StoreReader(path).attributes["batches_planned"]
    assert (StoreReader(path).column("step") < SAVED).any()


@pytest.mark.parametrize("codec", CODECS)
def test_checkpoints_in_every_step_leave_the_file_and_training_as_they_are(tmp_path: Path, codec: str) -> None:
    models = Ending(), Ending()
    often = train(tmp_path / "often", models[0], codec=codec, every=1)
    assert_same(often, train(tmp_path / "seldom", models[1], codec=codec))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert files(often.parent) == {"influence.h5"}


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("codec", CODECS)
def test_two_processes_resume_within_the_captured_epoch(tmp_path: Path, codec: str) -> None:
    both: Any = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": True, "codec": codec}
    model = Ending(0.0, 8)  # a process has 320 examples, or three batches, an epoch: steps 6, 7 and 8 are captured
    with pytest.raises(Exception, match="the end"):
        train(tmp_path, model, every=7, **both)
    path = train(tmp_path, Ending(0.0), every=7, after=7, **both)
    reader = StoreReader(path)
    reader.verify_rows()
    times = torch.from_numpy(reader.column("occurrences")).long()
    assert reader.attributes["is_resumed"]
    assert reader.attributes["processes"] == 2
    assert reader.attributes["rows_missing"] == 2 * 64  # the last, short batches
    true, written = autograd(Ending()), times > 0
    for name, stored in stored_gradients(path).items():
        error = (stored[written].double() - true[name][written]).norm() / true[name][written].norm()
        assert error < (1e-5 if codec != "eigen" else 0.02)  # int8
        basis, Lambda = stored_factors(path)[name]
        expected = eigenvalue_correction(true[name].repeat_interleave(times, 0), basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert files(tmp_path) == {"influence.h5"}


def test_a_checkpoint_of_weights_only_leaves_what_a_resumed_run_needs(tmp_path: Path) -> None:
    """It cannot be resumed from, so what is kept stays that of the last whole checkpoint."""
    weights = ModelCheckpoint(tmp_path / "weights", save_weights_only=True, every_n_train_steps=1)
    callback = InfluenceCallback(tmp_path / "influence.h5", codec="pairs-float32", on_error="raise")
    whole = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=SAVED)
    model = Ending(0.1, CRASH)
    trainer = make_trainer(tmp_path, callback, whole, weights, max_epochs=EPOCHS, enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, data())
    (kept,) = tmp_path.glob("*.resume0")
    assert torch.load(kept, weights_only=True)["step"] == SAVED

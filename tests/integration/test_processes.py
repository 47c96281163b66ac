"""Two gloo ranks on the CPU against one process; ranks that die, and ranks whose capture fails.

The dataset has 23 examples, so that one rank gets one of them twice. Weights stand still where two runs are
compared, for two ranks take half as many steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, loader, make_trainer
from tests.integration.models import vector_data
from tests.matrix.children import run_forked
from tests.matrix.measuring import contents, error_of, file_status, segments
from tests.matrix.processes import ODD, fails_on_one_rank, processes
from tests.matrix.running import Trained, digest, train, train_here
from tests.matrix.situation import Run, Situation

pytestmark = pytest.mark.ddp
FORKED = processes("forked", "ddp_fork")
WAYS = {
    "ddp_fork, pairs": FORKED,
    "ddp_fork, eigen": processes("forked, eigen", "ddp_fork", codec="eigen"),
    "ddp_spawn, pairs": processes("spawned", "ddp_spawn"),
    "ddp, pairs": processes("ddp x 2", "ddp"),  # the script finds it by this name
}


# --- the same file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS.keys())
def files(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Situation, Trained, StoreReader, StoreReader]:
    """How it was run, what came of it, and the files of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    situation: Situation = request.param
    alone = replace(situation, trainer=dict, process="this")
    train(alone, folder / "one", is_captured=True, is_still=True)
    trained = train(situation, folder / "two", is_captured=True, is_still=True)
    status, held = file_status(folder / "two" / "influence.h5")
    assert status == "epoch 1"  # and no shard or unfinished file beside it
    return situation, trained, StoreReader(folder / "one" / "influence.h5"), held[-1]


def test_two_ranks_leave_one_row_for_every_example(files: tuple) -> None:
    _, _, one, two = files
    for name in ("written", "valid", "label", "occurrences"):
        assert two.column(name).tolist() == one.column(name).tolist(), name
    assert two.column("label").tolist() == vector_data(ODD).tensors[1].tolist()
    assert two.attributes["rows_written"] == ODD
    assert two.attributes["rows_missing"] == two.attributes["rows_invalid"] == 0
    assert two.num_examples == ODD


def test_two_ranks_store_the_true_gradients(files: tuple) -> None:
    situation, trained, _, two = files
    found = contents(two, situation, trained.weights)
    assert found.rows == f"{ODD}/0/0"
    assert abs(found.ratio - 1) <= situation.expected.tolerance


def test_factors_of_two_ranks_are_those_of_one_process(files: tuple) -> None:
    """A and S put together again, Lambda in the file's own basis: eigenvectors have no unique sign."""
    situation, trained, one, two = files
    assert contents(two, situation, trained.weights).factors <= 1e-6
    assert two.layers == one.layers
    for name in one.layers:
        (A, S), (other_A, other_S) = (covariances_of(reader, name) for reader in (one, two))
        assert error_of(other_A, A) <= 1e-6
        assert error_of(other_S, S) <= 1e-6


def covariances_of(reader: StoreReader, layer: str) -> list[Tensor]:
    stored = {key: torch.from_numpy(array).double() for key, array in reader.factors(layer).items()}
    return [stored[f"Q_{side}"] @ stored[f"eigenvalues_{side}"].diag() @ stored[f"Q_{side}"].T for side in "AS"]


def test_scores_of_two_ranks_are_those_of_one_process(files: tuple) -> None:
    situation, _, one, two = files
    model = still_model(situation)
    asked = list(vector_data(5, seed=7).tensors)
    expected, found = (InfluenceModule.attach(model, reader).scores(asked) for reader in (one, two))
    assert found.shape == (5, ODD)
    assert error_of(found, expected) <= 1e-4


def still_model(situation: Situation) -> LightningModule:
    """The model as it was and, at learning rate 0, is."""
    return Run(situation, Path("unused"), None, is_still=True).module


# --- ranks that do not make it -----------------------------------------------------------------------


class Witness(Callback):
    """Notes, for each rank, what is warned of and the weights that it ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        def show(message: Any, *rest: Any, **more: Any) -> None:
            if "InfluenceCallback" in str(message):
                with (self.folder / "said").open("a") as file:
                    file.write(f"{trainer.global_rank}: {str(message).splitlines()[0]}\n")

        warnings.simplefilter("always")
        warnings.showwarning = show  # in this rank's process only

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        (self.folder / f"weights-{trainer.global_rank}").write_text(digest(weights))


class Dies(Callback):
    """One rank is gone, without a word, in the middle of the captured epoch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.global_rank) == (1, 1, self.rank):
            os._exit(9)


def witnesses(folder: Path) -> list[Callback]:
    return [Witness(folder)]


def dies(rank: int, folder: Path) -> list[Callback]:
    return [Witness(folder), Dies(rank)]


def outcome(situation: Situation, folder: Path, *, is_captured: bool = True) -> int:
    """The exit code of a process that trains."""
    folder.mkdir(parents=True, exist_ok=True)
    target = partial(train_here, situation, folder, is_captured=is_captured, is_still=False)
    return run_forked(target, folder / "output")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_leaves_no_whole_file_and_no_hang(rank: int, tmp_path: Path) -> None:
    assert outcome(replace(FORKED, callbacks=partial(dies, rank)), tmp_path) != 0
    assert not (tmp_path / "influence.h5").exists()


def test_a_rank_that_dies_leaves_the_older_file_and_the_next_run_replaces_it(tmp_path: Path) -> None:
    path, alone = tmp_path / "influence.h5", replace(FORKED, trainer=dict, process="this")
    train(alone, tmp_path, is_captured=True, is_still=False)
    before = path.read_bytes()
    assert outcome(replace(FORKED, callbacks=partial(dies, 1)), tmp_path) != 0
    assert path.read_bytes() == before
    train(alone, tmp_path, is_captured=True, is_still=False)
    assert StoreReader(path).attributes["rows_written"] == ODD
    assert path.read_bytes() != before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_ends_capture_on_all_with_one_warning(rank: int, tmp_path: Path) -> None:
    failing = replace(FORKED, callbacks=witnesses, influence={"index_fn": partial(fails_on_one_rank, rank)})
    for name, is_captured in (("plain", False), ("failing", True)):
        assert outcome(failing, tmp_path / name, is_captured=is_captured) == 0
    for each in range(2):  # training went on, and is the same to the last bit
        plain, captured = (tmp_path / name / f"weights-{each}" for name in ("plain", "failing"))
        assert captured.read_text() == plain.read_text()
    (said,) = (tmp_path / "failing" / "said").read_text().splitlines()
    assert "has stopped capturing; training goes on" in said
    assert [each.name for each in (tmp_path / "failing").iterdir() if "influence.h5" in each.name] == []


def test_a_failure_on_one_rank_is_told_with_its_reason(tmp_path: Path) -> None:
    failing = replace(FORKED, callbacks=witnesses, influence={"index_fn": partial(fails_on_one_rank, 1)})
    assert outcome(failing, tmp_path) == 0
    assert "the user's own" in (tmp_path / "said").read_text()


def test_each_epoch_of_two_ranks_is_a_whole_one_where_the_run_may_stop(tmp_path: Path) -> None:
    """Ranks agree on when a file is finished, again and again."""
    rolling = replace(FORKED, trainer=partial(with_limit, FORKED.trainer), callbacks=witnesses)
    assert outcome(rolling, tmp_path) == 0
    status, held = file_status(tmp_path / "influence.h5")
    assert status == "epoch 1"
    assert segments(held[-1])[-1].attributes["rows_written"] == ODD


def with_limit(options: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Steps end in the third epoch, after one of its three batches."""
    return {**options(), "max_epochs": 3, "max_steps": 7}


def fork_and_save(folder: Path) -> None:
    callback = InfluenceCallback(folder / "influence.h5", on_error="raise")
    trainer = make_trainer(folder, callback, strategy="ddp_fork", devices=2)
    trainer.fit(Classifier(), loader(23))
    trainer.save_checkpoint(folder / "last.ckpt")


def test_a_checkpoint_saved_by_the_process_that_forked_the_others_finds_their_file(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    assert run_forked(partial(fork_and_save, tmp_path), output) == 0, output.read_text()
    influence = InfluenceModule.from_checkpoint(tmp_path / "last.ckpt", Classifier)
    assert influence.store.attributes["processes"] == 2

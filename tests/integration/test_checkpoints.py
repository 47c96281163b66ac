"""Every checkpoint of a run names its file, also those of weights only."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.attachment import CHECKPOINT_KEY, STATE_KEY
from lightning_influence.errors import StoreNotFoundError
from lightning_influence.store import StoreReader
from tests.integration.checkpoint_runs import (
    EPOCHS,
    TrainedWeights,
    Validated,
    checkpoints,
    has_weights,
    load,
    mismatch,
    saver,
    states,
    train,
)
from tests.integration.lifecycle_models import fit, loader, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]

SAVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "save-last": ({"save_last": True}, {}),
    "save-last-as-link": ({"save_last": "link"}, {}),
    "monitor": ({"monitor": "score", "save_last": True}, {}),
    "monitor-in-training": ({"monitor": "train_score"}, {}),
    "every-second-validation": ({}, {"check_val_every_n_epoch": 2}),
    "every-second-validation-monitored": ({"monitor": "score"}, {"check_val_every_n_epoch": 2}),
    "validation-within-epochs": ({}, {"val_check_interval": 0.5}),
    "every-step": ({"every_n_train_steps": 1}, {}),
    "every-third-step": ({"every_n_train_steps": 3}, {}),
    "at-train-epoch-end": ({"save_on_train_epoch_end": True}, {"val_check_interval": 1 / 3}),
    "at-validation-end": ({"save_on_train_epoch_end": False}, {}),
}


class WeightsOnly(ModelCheckpoint):
    """Another class, because two savers of one class and the same options cannot be in one trainer."""


@pytest.mark.parametrize("name", SAVERS)
def test_a_checkpoint_with_the_final_weights_opens_the_file_and_no_other_does(tmp_path: Path, name: str) -> None:
    saving, options = SAVERS[name]
    saving = {"filename": "{epoch}-{step}", "save_top_k": -1} | saving
    folders = {False: tmp_path / "all" / "checkpoints", True: tmp_path / "weights" / "checkpoints"}
    savers = [
        ModelCheckpoint(dirpath=folders[False], **saving),
        WeightsOnly(dirpath=folders[True], save_weights_only=True, **saving),
    ]
    trained = TrainedWeights()
    trainer = train(tmp_path, trained, *savers, **options)
    for weights_only, folder in folders.items():
        trainer.save_checkpoint(folder / "late.ckpt", weights_only=weights_only)
        final, others = [], []
        for path in checkpoints(folder.parent):
            (state,) = states(path)
            (final if has_weights(path, trained.weights) else others).append(path)
            assert ("callbacks" in load(path)) != weights_only
            assert state["status"] == ("complete" if path in final else "capturing")
        assert len(final) > 1  # one that Lightning saved by itself, too
        for path in final:
            assert InfluenceModule.from_checkpoint(path, Validated).store.path.samefile(tmp_path / "influence.h5")
        text = mismatch(others[-1])
        assert [path for path in final if f"Load {path}, which has them." in text]
        assert "saved before capture was complete" in text


def test_two_callbacks_are_both_in_a_checkpoint_of_weights_only(tmp_path: Path) -> None:
    files = [tmp_path / "one.h5", tmp_path / "two.h5"]
    train(tmp_path, *map(InfluenceCallback, files), saver(tmp_path, save_weights_only=True, save_top_k=1))
    (path,) = checkpoints(tmp_path)
    assert [state["path"] for state in states(path)] == [str(file) for file in files]


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_of_two_callbacks_lists_both_files(tmp_path: Path, weights_only: bool) -> None:
    files = [tmp_path / "one.h5", tmp_path / "two.h5"]
    saving = saver(tmp_path, save_weights_only=weights_only, save_top_k=1)
    train(tmp_path, *map(InfluenceCallback, files), saving)
    (path,) = checkpoints(tmp_path)
    with pytest.raises(StoreNotFoundError, match=r"names 2 files .*one\.h5, .*two\.h5; pass `store=`"):
        InfluenceModule.from_checkpoint(path, Validated)
    for file in files:
        assert InfluenceModule.from_checkpoint(path, Validated, store=file).store.path == file


def test_a_checkpoint_of_a_run_without_the_callback_asks_for_store(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Validated(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    assert CHECKPOINT_KEY not in load(tmp_path / "plain.ckpt")
    with pytest.raises(StoreNotFoundError, match=r"names no file .*without the callback.*pass `store=`"):
        InfluenceModule.from_checkpoint(tmp_path / "plain.ckpt", Validated)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_that_are_written_by_another_thread_carry_it_too(tmp_path: Path, weights_only: bool) -> None:
    saving = saver(tmp_path, save_weights_only=weights_only, save_top_k=1)
    train(tmp_path, saving, plugins=[AsyncCheckpointIO()])
    (path,) = checkpoints(tmp_path)
    assert InfluenceModule.from_checkpoint(path, Validated).store.path.samefile(tmp_path / "influence.h5")


def test_a_checkpoint_of_weights_only_holds_what_it_does_without_us_and_one_key(tmp_path: Path) -> None:
    trainer, plain = train(tmp_path), fit(tmp_path, Validated(), loader(), max_epochs=EPOCHS)
    for each, name in ((trainer, "ours.ckpt"), (plain, "plain.ckpt")):
        each.save_checkpoint(tmp_path / name, weights_only=True)
    ours, theirs = load(tmp_path / "ours.ckpt"), load(tmp_path / "plain.ckpt")
    assert ours.keys() - theirs.keys() == {CHECKPOINT_KEY}
    assert all(type(value) is str for state in ours[CHECKPOINT_KEY] for value in state.values())
    assert has_weights(tmp_path / "ours.ckpt", theirs["state_dict"])


def test_a_failed_capture_adds_nothing(tmp_path: Path) -> None:
    class Handwritten(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return -self(x).log_softmax(-1).gather(-1, y[:, None]).mean()

    with pytest.warns(UserWarning, match="has stopped capturing"):
        trainer = train(tmp_path, model=Handwritten())
    trainer.save_checkpoint(tmp_path / "late.ckpt", weights_only=True)
    assert states(tmp_path / "late.ckpt") == []


# --- and leaves no trace elsewhere ----------------------------------------------------------------


def test_a_second_fit_attaches_once_and_to_the_second_file(tmp_path: Path) -> None:
    callback = InfluenceCallback(tmp_path / "influence.h5")
    trainer = train(tmp_path, callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, loader())
    trainer.save_checkpoint(tmp_path / "second.ckpt", weights_only=True)
    (first,), (second,) = states(tmp_path / "first.ckpt"), states(tmp_path / "second.ckpt")
    assert first[STATE_KEY] != second[STATE_KEY] == StoreReader(tmp_path / "influence.h5").store_id


def test_a_callback_that_goes_to_another_trainer_leaves_the_first(tmp_path: Path) -> None:
    callback = InfluenceCallback(tmp_path / "influence.h5")
    first = train(tmp_path, callback, max_epochs=1)
    assert "save_checkpoint" in vars(first.strategy)
    second = train(tmp_path, callback, max_epochs=1)
    assert "save_checkpoint" not in vars(first.strategy)
    assert "save_checkpoint" in vars(second.strategy)


def test_one_of_two_callbacks_leaves_and_the_other_stays(tmp_path: Path) -> None:
    one, two = InfluenceCallback(tmp_path / "one.h5"), InfluenceCallback(tmp_path / "two.h5")
    first = train(tmp_path, one, two, max_epochs=1)
    train(tmp_path, one, max_epochs=1)
    first.save_checkpoint(tmp_path / "late.ckpt", weights_only=True)
    (state,) = states(tmp_path / "late.ckpt")
    assert Path(state["path"]) == tmp_path / "two.h5"


def test_what_others_put_in_place_of_saving_still_runs_and_is_put_back(tmp_path: Path) -> None:
    callback, saved = InfluenceCallback(tmp_path / "influence.h5"), []
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    theirs = trainer.strategy.save_checkpoint = lambda checkpoint, path, **kwargs: saved.append(checkpoint)
    trainer.fit(Validated(), loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt", weights_only=True)
    (checkpoint,) = saved
    assert len(checkpoint[CHECKPOINT_KEY]) == 1
    train(tmp_path, callback, max_epochs=1)
    assert trainer.strategy.save_checkpoint is theirs


def test_a_trainer_can_be_copied_and_its_copy_saves_by_itself(tmp_path: Path) -> None:
    trainer = train(tmp_path, saver(tmp_path))
    saving = vars(trainer.strategy)["save_checkpoint"]
    copied = copy.deepcopy(trainer.strategy)
    assert vars(copied)["save_checkpoint"] is not saving
    assert vars(copied)["save_checkpoint"]._strategy is copied


def test_what_stands_in_for_saving_can_be_pickled_with_its_strategy(tmp_path: Path) -> None:
    strategy = train(tmp_path, saver(tmp_path)).strategy
    strategy.save_checkpoint.states.clear()
    strategy.model = strategy.lightning_module.trainer = None
    strategy._lightning_module = strategy._lightning_optimizers = None
    strategy.optimizers = strategy.lr_scheduler_configs = []
    copied = pickle.loads(pickle.dumps(strategy))
    copied.save_checkpoint({"epoch": 1}, tmp_path / "pickled.ckpt")
    assert load(tmp_path / "pickled.ckpt") == {"epoch": 1}

"""A file names the checkpoint that it belongs to, where another one was loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.attachment import matching_segment
from lightning_influence.errors import StoreError, StoreNotFoundError, WeightsMismatchError
from lightning_influence.store import StoreReader
from tests.integration.checkpoint_runs import (
    EPOCHS,
    Normalizing,
    TrainedWeights,
    Validated,
    checkpoints,
    has_weights,
    load,
    mismatch,
    saver,
    train,
)
from tests.plain_loop import record
from tests.reference.models import classification_examples, seeded_classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*normalize over the batch in training"),
]


def best_and_last(folder: Path) -> tuple[Path, Path]:
    """Checkpoints of epoch 1 and of the end."""
    best = saver(folder, monitor="score", save_top_k=1, filename="best")
    train(folder, best, saver(folder, save_top_k=1, filename="last"))
    return Path(best.best_model_path), folder / "checkpoints" / "last.ckpt"


def test_a_best_checkpoint_is_refused_and_the_error_names_the_last(tmp_path: Path) -> None:
    best, last = best_and_last(tmp_path)
    assert load(best)["epoch"] == 1
    text = mismatch(best)
    assert f"Load {last}, which has them." in text
    assert f"the weights at the end of epoch {EPOCHS - 1} (step 12)" in text
    assert "capture(model, loader, path)" in text
    assert InfluenceModule.from_checkpoint(last, Validated).store.path.samefile(tmp_path / "influence.h5")


def test_a_folder_that_moved_names_its_own_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    best, last = best_and_last(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    best, last = (tmp_path / "there" / path.relative_to(tmp_path / "here") for path in (best, last))
    assert f"Load {last}, which has them." in mismatch(best)
    assert InfluenceModule.from_checkpoint(last, Validated).store.path.samefile(tmp_path / "there/influence.h5")


def test_a_file_that_was_renamed_is_given_as_store(tmp_path: Path) -> None:
    best, last = best_and_last(tmp_path)
    renamed = (tmp_path / "influence.h5").rename(tmp_path / "other.h5")
    with pytest.raises(StoreNotFoundError, match="Pass `store=` with the file's path"):
        InfluenceModule.from_checkpoint(last, Validated)
    assert InfluenceModule.from_checkpoint(last, Validated, store=renamed).store.path == renamed
    assert f"Load {last}, which has them." in mismatch(best, store=renamed)


def test_a_checkpoint_elsewhere_is_told_of_those_near_the_file(tmp_path: Path) -> None:
    best, last = best_and_last(tmp_path)
    (tmp_path / "far").mkdir()
    best = Path(shutil.move(best, tmp_path / "far" / "best.ckpt"))
    assert f"Load {last}, which has them." in mismatch(best, store=tmp_path / "influence.h5")


def test_without_the_right_checkpoint_the_error_says_what_to_look_for(tmp_path: Path) -> None:
    best, last = best_and_last(tmp_path)
    last.write_bytes(last.read_bytes()[:100])  # what cannot be read is passed over
    text = mismatch(best)
    assert "which has them" not in text
    assert "Load the checkpoint saved at the end of that epoch; none was found near" in text


def test_a_last_checkpoint_that_is_no_newer_than_the_best_is_told_what_to_do(tmp_path: Path) -> None:
    saving = saver(tmp_path, monitor="score", save_top_k=1, save_last=True)
    train(tmp_path, saving)
    if load(Path(saving.last_model_path))["epoch"] == EPOCHS - 1:  # so did some versions of Lightning
        assert InfluenceModule.from_checkpoint(saving.last_model_path, Validated)
        return
    assert "A `ModelCheckpoint()` without `monitor` keeps it" in mismatch(Path(saving.last_model_path))


def test_a_model_at_hand_is_told_of_the_checkpoints_near_the_file(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"last\.ckpt, which has them"):
        InfluenceModule.attach(Validated(), tmp_path / "influence.h5")


def test_weights_that_loading_changed_are_not_looked_for_elsewhere(tmp_path: Path) -> None:
    class Halved(Validated):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {name: value / 2 for name, value in checkpoint["state_dict"].items()}

    _, last = best_and_last(tmp_path)
    assert f"{last} has them, but Halved changed them" in mismatch(last, Halved)


def test_a_model_of_other_parameters_is_refused_all_the_same(tmp_path: Path) -> None:
    best_and_last(tmp_path)
    with pytest.raises(WeightsMismatchError, match="Load the checkpoint saved at the end of that epoch"):
        InfluenceModule.attach(nn.Linear(2, 2), tmp_path / "influence.h5")


# --- averaged weights -----------------------------------------------------------------------------

needs_averaging = pytest.mark.skipif(
    not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="in Lightning since 2.6"
)


def averaging(name: str) -> pl.Callback:
    options = {"decay": 0.5} if name == "EMAWeightAveraging" else {}
    return getattr(lightning_callbacks, name)(**options)


@needs_averaging
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "ours-last"])
@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_an_averages_checkpoint_is_refused_and_the_error_says_where_the_trained_weights_are(
    tmp_path: Path, name: str, ours_first: bool
) -> None:
    trained, ours = TrainedWeights(), InfluenceCallback(tmp_path / "influence.h5")
    both = [ours, averaging(name)] if ours_first else [averaging(name), ours]
    trainer = train(tmp_path, *both, trained, saver(tmp_path, save_top_k=1, save_last=False))
    (path,) = checkpoints(tmp_path)
    assert has_weights(path, trained.weights, "current_model_state")
    assert not has_weights(path, trained.weights)
    text = mismatch(path)
    assert "Its run averages weights" in text
    assert f"{path} has them beside their average: load its `current_model_state`" in text
    assert "capture(model, loader, path)" in text
    with pytest.raises(WeightsMismatchError, match="beside their average"):
        InfluenceModule.attach(trainer.lightning_module, tmp_path / "influence.h5")
    model = Validated()
    model.load_state_dict(load(path)["current_model_state"])  # as the error says
    InfluenceModule.attach(model, tmp_path / "influence.h5")


@needs_averaging
def test_a_checkpoint_of_weights_only_has_the_trained_weights_until_training_ends(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, averaging("EMAWeightAveraging"), saver(tmp_path, save_weights_only=True, save_top_k=1)
    )
    (path,) = checkpoints(tmp_path)  # Lightning asks no callback, so it is not the average's
    assert InfluenceModule.from_checkpoint(path, Validated)
    late = tmp_path / "checkpoints" / "late.ckpt"
    trainer.save_checkpoint(late, weights_only=True)
    assert f"Load {path}, which has them." in mismatch(late)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "ours-last"])
def test_stochastic_averaging_replaces_the_weights_after_the_checkpoint_that_the_file_belongs_to(
    tmp_path: Path, ours_first: bool
) -> None:
    trained, ours = TrainedWeights(), InfluenceCallback(tmp_path / "influence.h5")
    both = [ours, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    trainer = train(tmp_path, *(both if ours_first else both[::-1]), trained, saver(tmp_path, save_top_k=1))
    (path,) = checkpoints(tmp_path)
    late = tmp_path / "checkpoints" / "late.ckpt"
    trainer.save_checkpoint(late)
    assert has_weights(path, trained.weights)
    assert not has_weights(late, trained.weights)
    text = mismatch(late)
    assert "Its run averages weights" in text
    assert f"Load {path}, which has them." in text
    assert "capture(model, loader, path)" in text
    InfluenceModule.from_checkpoint(path, Validated)


@pytest.mark.parametrize("keeps_all", [True, False])
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "ours-last"])
def test_stochastic_averaging_with_batch_norm_ends_with_weights_that_no_file_has(
    tmp_path: Path, ours_first: bool, keeps_all: bool
) -> None:
    trained, ours = TrainedWeights(), InfluenceCallback(tmp_path / "influence.h5", layers=["layers.*"])
    both = [ours, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    saving = saver(tmp_path, save_top_k=-1 if keeps_all else 1)
    train(tmp_path, *(both if ours_first else both[::-1]), trained, saving, model=Normalizing())
    last = Path(saving.best_model_path)
    assert load(last)["epoch"] == EPOCHS  # the one more, without a backward
    assert not has_weights(last, trained.weights)
    text = mismatch(last, Normalizing)
    assert "Its run averages weights" in text
    right = [path for path in checkpoints(tmp_path) if has_weights(path, trained.weights)]
    assert len(right) == keeps_all
    if right:
        assert f"Load {right[0]}, which has them." in text
        InfluenceModule.from_checkpoint(right[0], Normalizing)
    else:
        assert "none was found near" in text
        assert "capture(model, loader, path)" in text


# --- several epochs in one file -------------------------------------------------------------------


@pytest.fixture
def joined(tmp_path: Path) -> tuple[StoreReader, Path]:
    """A file of two epochs, and the folder of their checkpoints `epoch=0-step=3` and `epoch=1-step=6`."""
    callback = InfluenceCallback(tmp_path / "influence.h5", epochs="every", trajectory="segments")
    train(tmp_path, callback, saver(tmp_path), max_epochs=2)
    return StoreReader(tmp_path / "influence.h5"), tmp_path / "checkpoints"


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_gets_the_epoch_that_it_belongs_to(joined: tuple[StoreReader, Path], epoch: int) -> None:
    store, folder = joined
    path = folder / f"epoch={epoch}-step={3 * (epoch + 1)}.ckpt"
    model = Validated.load_from_checkpoint(path, weights_only=True)
    assert matching_segment(model, store).attributes["epoch"] == epoch


def test_weights_of_no_epoch_are_refused_with_all_of_them(joined: tuple[StoreReader, Path]) -> None:
    match = r"epoch 1 \(step 6\), or SHA-256 .* epoch 0 \(step 3\); found"
    with pytest.raises(WeightsMismatchError, match=match):
        matching_segment(Validated(), joined[0])


def test_a_file_without_a_hash_is_refused(tmp_path: Path) -> None:
    model = seeded_classifier()
    store = record(tmp_path / "run.h5", model, classification_examples(4)).store
    with pytest.raises(StoreError, match="has no attribute 'weights_hash_end'"):
        matching_segment(model, store)

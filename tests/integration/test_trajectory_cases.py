"""What merging captured epochs must survive: layers that come and go, runs that resume, epochs that fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import CaptureError, LayerError, UnsupportedTrainingError
from lightning_influence.store import StoreReader
from lightning_influence.training.epoch import EpochCapture
from lightning_influence.trajectory import EpochRows, Trajectory
from tests.integration.lifecycle_models import Classifier, dataset, loader, make_trainer
from tests.integration.models import stored_gradients
from tests.integration.test_trajectory import EPOCHS, Breaking, Decaying, train

READ_BYTES = 64 * 2**20  # of float32 gradients at a time, as elsewhere


def merged(path: Path) -> list[int]:
    """The epochs that are in a file."""
    return [epoch["epoch"] for epoch in StoreReader(path).document("trajectory")["epochs"]]


def left_over(folder: Path) -> list[str]:
    """Files of capture beside the finished one."""
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != "influence.h5")


def run(
    folder: Path,
    model: pl.LightningModule,
    *callbacks: Callback,
    after: int | None = None,
    max_epochs: int = EPOCHS,
    **influence: Any,
) -> Path:
    """Train with a checkpoint an epoch, from the beginning or from the checkpoint of a step."""
    path, saved = folder / "influence.h5", folder / "saved"
    capture = InfluenceCallback(path, **{"epochs": "every", "on_error": "raise", **influence})
    saving = ModelCheckpoint(saved, filename="{step}", save_top_k=-1)
    trainer = make_trainer(folder, capture, saving, *callbacks, max_epochs=max_epochs, enable_checkpointing=True)
    trainer.fit(model, loader(), ckpt_path=None if after is None else saved / f"step={after}.ckpt")
    return path


def run_until_it_breaks(*args: Any, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        run(*args, **options)


# --- layers ------------------------------------------------------------------------------------------


class HeadOnly(Classifier):
    """Its first layer needs gradients, but no optimizer has it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers[2].parameters(), lr=0.1)


class HeadFirst(Classifier):
    """Its first layer learns at rate 0."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.layers[0].parameters(), "lr": 0.0},
            {"params": self.layers[2].parameters(), "lr": 0.1},
        ]
        return torch.optim.SGD(groups)


@pytest.mark.parametrize("make", [HeadOnly, HeadFirst])
def test_a_layer_that_never_learns_does_not_cost_the_others_their_file(tmp_path, make):
    assert "layers.2" in StoreReader(train(tmp_path, make())).layers


@pytest.mark.parametrize("is_trained_at_first", [True, False])
def test_a_bias_that_is_frozen_or_unfrozen_between_epochs_does_not_cost_the_file(tmp_path, is_trained_at_first):
    class Changing(Decaying):
        def on_train_epoch_start(self) -> None:
            self.layers[0].bias.requires_grad_((self.current_epoch == 0) == is_trained_at_first)

    with pytest.warns(UserWarning, match="epochs 0 add nothing to the merged rows of layers.0"):
        reader = StoreReader(train(tmp_path, Changing()))
    assert set(reader.layers) == {"layers.0", "layers.2"}
    weights = [epoch["weights"] for epoch in reader.document("trajectory")["epochs"]]
    assert [own["layers.0"] for own in weights] == pytest.approx([0.0, 0.5, 0.25, 0.125])
    assert [own["layers.2"] for own in weights] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


class OnSequences(pl.LightningModule):
    """Two linear layers on positions, wide enough that pairs of the first batch are smaller than gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 40), nn.Linear(40, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.last(self.first(x).tanh()).mean(1), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EverLonger(Dataset):
    """Eight sequences, two of each length."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1 + index // 2, 3), float(index)), index % 2


def test_batches_longer_than_the_first_one_are_merged(tmp_path):
    data = DataLoader(EverLonger(), 2, sampler=[2, 3, 0, 1, 4, 5, 6, 7])  # of two positions, one, three, four
    reader = StoreReader(train(tmp_path, OnSequences(), data))
    assert reader.column("occurrences").tolist() == [EPOCHS] * 8


def test_after_a_first_batch_of_single_positions_the_error_says_what_to_pass(tmp_path):
    with pytest.raises(LayerError, match="pass `codec='eigen'`"):
        train(tmp_path, OnSequences(), DataLoader(EverLonger(), 2))
    reader = StoreReader(train(tmp_path, OnSequences(), DataLoader(EverLonger(), 2), influence={"codec": "eigen"}))
    assert reader.column("occurrences").tolist() == [EPOCHS] * 8


@pytest.mark.parametrize("lengths", [(4, 10), (10, 4)])
def test_a_dataset_of_another_length_in_a_later_epoch_is_refused_in_words(tmp_path, lengths):
    class Reloading(Classifier):
        def train_dataloader(self) -> DataLoader:
            return loader(lengths[min(self.trainer.current_epoch, 1)])

    capture = InfluenceCallback(tmp_path / "influence.h5", epochs="every", on_error="raise")
    trainer = make_trainer(tmp_path, capture, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(CaptureError, match=r"4.*10|10.*4"):
        trainer.fit(Reloading())


# --- learning rates ----------------------------------------------------------------------------------


class WithoutRate(Classifier):
    """As optimizers do that find the rate by themselves."""

    def configure_optimizers(self) -> Any:
        class RateIsNone(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                self.param_groups[0]["lr"] = 0.1
                loss = super().step(closure)
                self.param_groups[0]["lr"] = None
                return loss

        optimizer = RateIsNone(self.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


def test_unknown_learning_rates_are_refused_in_words(tmp_path):
    with pytest.raises(UnsupportedTrainingError, match=r"learning rates, but that of layer 'layers.0' is None"):
        train(tmp_path, WithoutRate())


# --- resumed runs ------------------------------------------------------------------------------------


def test_a_resumed_run_that_captures_no_epoch_writes_all_documents(tmp_path):
    run_until_it_breaks(tmp_path, Breaking(7), epochs=[0], max_epochs=3)
    model = Decaying()
    path = run(tmp_path, model, after=6, epochs=[0], max_epochs=3)
    assert "merged from epochs 0" in InfluenceModule.attach(model, path).summary()


class Freezing(Callback):
    """Freezes the first layer, from an epoch on."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        model.layers[0].requires_grad_(trainer.current_epoch < self.epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        model.layers[0].requires_grad_(trainer.current_epoch < self.epoch)


class Unfreezing(Freezing):
    """Unfreezes it."""

    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        model.layers[0].requires_grad_(trainer.current_epoch >= self.epoch)

    on_train_epoch_start = on_train_start


@pytest.mark.parametrize("kind", [Freezing, Unfreezing])
@pytest.mark.parametrize(("breaks_at", "after"), [(4, 3), (7, 6)])
def test_a_resumed_run_keeps_epochs_in_which_other_layers_were_trained(tmp_path, kind, breaks_at, after):
    run_until_it_breaks(tmp_path, Breaking(breaks_at), kind(1))
    assert merged(run(tmp_path, Decaying(), kind(1), after=after)) == [0, 1, 2, 3]
    assert not left_over(tmp_path)


def test_layers_that_change_after_a_resumed_epoch_are_no_reason_to_warn(tmp_path, recwarn):
    run_until_it_breaks(tmp_path, Breaking(4), Unfreezing(2))
    assert merged(run(tmp_path, Decaying(), Unfreezing(2), after=3)) == [0, 1, 2, 3]
    assert not [warning for warning in recwarn if "Capture begins anew" in str(warning.message)]


def test_a_finished_run_that_is_trained_longer_says_which_epochs_are_not_in_the_new_file(tmp_path):
    run(tmp_path, Decaying(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"InfluenceCallback: .*epochs 0, 1|InfluenceCallback: .*before epoch 2"):
        assert merged(run(tmp_path, Decaying(), after=6)) == [2, 3]


def test_lost_notes_of_the_run_before_are_told_and_its_rows_do_not_stay(tmp_path):
    run_until_it_breaks(tmp_path, Breaking(7))
    for file in tmp_path.glob("*resume*"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"InfluenceCallback: .*epochs 0, 1|InfluenceCallback: .*before epoch 2"):
        run(tmp_path, Decaying(), after=6)
    assert not left_over(tmp_path)


def test_a_run_resumed_from_an_older_checkpoint_leaves_no_rows_of_the_past(tmp_path):
    run_until_it_breaks(tmp_path, Breaking(10))
    run(tmp_path, Decaying(), after=3)
    assert not left_over(tmp_path)


def test_a_run_that_ended_while_it_merged_is_merged_when_it_is_resumed(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def end(*args: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Trajectory, "merge", end)
        with pytest.raises(Killed):
            run(tmp_path, Decaying())
    assert left_over(tmp_path)  # all that is needed is there
    assert merged(run(tmp_path, Decaying(), after=12)) == [0, 1, 2, 3]


def test_sums_of_an_interrupted_run_are_no_segment_of_a_resumed_one(tmp_path):
    run_until_it_breaks(tmp_path, Breaking(7))
    reader = StoreReader(run(tmp_path, Decaying(), after=6, trajectory="segments"))
    kinds = [reader.segment(number).attributes.get("trajectory") for number in reader.segments]
    assert "merge" not in kinds


# --- what is asked of the file -----------------------------------------------------------------------


def test_examples_that_were_drawn_twice_are_removed_twice_and_not_four_times(tmp_path):
    sampler = RandomSampler(dataset(), replacement=True, num_samples=20)
    model = Decaying()
    path = train(tmp_path, model, DataLoader(dataset(), 4, sampler=sampler))
    influence = InfluenceModule.attach(model, path)
    occurrences = influence.store.column("occurrences")
    assert occurrences.sum() == 20 * EPOCHS
    assert len(set(occurrences.tolist())) > 1
    queries, removed = dataset()[:2], np.flatnonzero(occurrences)[:3]
    scores = influence.scores(queries)[:, removed]  # of rows in which each draw has its part
    expected = -scores.sum(1) / 20  # draws of an epoch
    torch.testing.assert_close(influence.removal_effect(queries, removed), expected)


# --- several processes -------------------------------------------------------------------------------


class Still(Classifier):
    """Hardly learns, so that the order of the data does not matter."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1e-9)


@pytest.mark.ddp
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_merge_into_the_file_of_one(tmp_path):
    alone = train(tmp_path / "one", Still())
    together = train(tmp_path / "two", Still(), strategy="ddp_fork", devices=2)
    assert merged(together) == merged(alone) == [0, 1, 2, 3]
    assert StoreReader(together).column("occurrences").tolist() == [EPOCHS] * 10
    ours, theirs = stored_gradients(together), stored_gradients(alone)
    for name, rows in ours.items():  # each rounded to 8 bits, in bases that rounding turned
        torch.testing.assert_close(rows, theirs[name], rtol=0, atol=0.02 * float(rows.abs().max()))
    assert not left_over(tmp_path / "two")


# --- failures ----------------------------------------------------------------------------------------


class Diverging(Decaying):
    """Its loss is no number in its last epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        factor = float("nan") if self.current_epoch == EPOCHS - 1 else 1.0
        return super().training_step(batch, batch_idx) * factor


@pytest.mark.filterwarnings("ignore:InfluenceCallback has stopped capturing")
def test_an_epoch_that_fails_does_not_cost_the_whole_ones_before_it(tmp_path):
    assert merged(train(tmp_path, Diverging(), influence={"on_error": "warn"})) == [0, 1, 2]


def test_a_merge_that_fails_does_not_end_training(tmp_path):
    model = Classifier(learning_rate=0.0)
    with pytest.warns(UserWarning, match="training goes on. CaptureError: The learning"):
        train(tmp_path, model, influence={"on_error": "warn"})
    assert model.trainer.state.finished
    assert not list(tmp_path.iterdir())


def test_an_epoch_that_fails_late_does_not_end_training_nor_cost_the_others(tmp_path, monkeypatch):
    original = EpochCapture.add

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        if self.epoch == 2:
            raise OSError("no space left on device")
        return original(self, *args, **options)

    monkeypatch.setattr(EpochCapture, "add", failing)
    model = Decaying()
    with pytest.warns(UserWarning, match="training goes on. OSError: no space left"):
        path = train(tmp_path, model, influence={"on_error": "warn"})
    assert model.trainer.state.finished
    assert merged(path) == [0, 1]


@pytest.mark.parametrize(
    "averaging",
    [lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2), lambda: EMAWeightAveraging(decay=0.5)],
    ids=["SWA", "EMA"],
)
def test_weights_that_are_replaced_after_the_merge_are_warned_of(tmp_path, averaging):
    with pytest.warns(UserWarning, match=r"InfluenceCallback: .*WeightAveraging"):
        train(tmp_path, None, None, averaging())


# --- memory ------------------------------------------------------------------------------------------


class Wide(Classifier):
    """Its factors are larger than all its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 2))


def test_epochs_that_wait_need_no_room_for_factors_of_their_own(tmp_path, monkeypatch):
    """One file has them: 2 x 160 kB."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500_000})())
    assert merged(train(tmp_path, Wide())) == [0, 1, 2, 3]


class Long(OnSequences):
    """A layer whose gradient is smaller than its pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(256, 256), nn.Linear(256, 2)


def test_a_merge_reads_no_more_gradients_at_a_time_than_fit_into_memory(tmp_path, monkeypatch):
    read, largest = EpochRows.read, [0]

    def watched(rows: EpochRows, name: str, wanted: np.ndarray) -> Any:
        gradient = read(rows, name, wanted)
        largest.append(gradient.nbytes)
        return gradient

    monkeypatch.setattr(EpochRows, "read", watched)
    n = 640
    data = DataLoader(TensorDataset(torch.randn(n, 1, 256).expand(-1, 130, -1), torch.arange(n) % 2), 32)
    train(tmp_path, Long(), data, max_epochs=1, influence={"layers": ["first"]})
    assert max(largest) <= READ_BYTES

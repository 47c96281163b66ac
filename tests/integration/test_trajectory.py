"""Several captured epochs, merged into one row an example for the final weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_influence import HeuristicDamping, InfluenceCallback, InfluenceModule
from lightning_influence.errors import CaptureError
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import BATCH, Classifier, N, dataset, fit, loader, make_trainer
from tests.integration.models import stored_arrays, stored_gradients
from tests.reference.trajectory import (
    Epoch,
    averaged_fisher,
    merged_gradients,
    merged_kfac_scores,
    merged_scores,
)

EPOCHS = 4
INT8 = 1 / 127  # of the largest entry of a group: half a step each, and the sum of the float16 before it


class Decaying(Classifier):
    """Its first layer learns ten times as fast as its last, and both ever less."""

    def configure_optimizers(self) -> Any:
        first, last = self.layers[0], self.layers[2]
        optimizer = torch.optim.SGD(
            [{"params": first.parameters(), "lr": 1.0}, {"params": last.parameters(), "lr": 0.1}], momentum=0.5
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Convolutional(pl.LightningModule):
    """A convolution, a normalization and a linear layer on positions: gradients that are no single pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv1d(1, 3, 2), nn.LayerNorm(2), nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.head(self.norm(self.conv(x[:, None]).tanh()))  # [n, 3 channels, 2]
        return F.cross_entropy(hidden.mean(1), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(
    folder: Path,
    model: pl.LightningModule | None = None,
    data: Any = None,
    *callbacks: pl.Callback,
    influence: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Train with every epoch captured; the path of the file."""
    path = folder / "influence.h5"
    capture = InfluenceCallback(path, **{"epochs": "every", "on_error": "raise", **(influence or {})})
    options = {"max_epochs": EPOCHS, **options}
    fit(folder, model or Decaying(), data or loader(), capture, *callbacks, **options)
    return path


def segments_of(folder: Path, model: pl.LightningModule, data: Any = None, **options: Any) -> list[StoreReader]:
    """The same run with every epoch kept, exactly."""
    influence = {"trajectory": "segments", "codec": "pairs-float32"}
    reader = StoreReader(train(folder, model, data, influence=influence, **options))
    return [reader.segment(number) for number in reader.segments]


def epochs_of(segments: list[StoreReader], layer: str, rates: list[float]) -> list[Epoch]:
    """What the reference takes, of a layer with a bias."""
    epochs = []
    for segment, rate in zip(segments, rates, strict=True):
        arrays = {name: array.double()[:, 0] for name, array in stored_arrays(segment, layer).items()}
        inputs = torch.cat([arrays["inputs"], torch.ones(N, 1)], 1)
        times = torch.from_numpy(segment.column("occurrences") * segment.column("valid")).double()
        epochs.append(Epoch(inputs, arrays["output_grads"], times, rate))
    return epochs


RATES = {"layers.0": [0.5**e for e in range(EPOCHS)], "layers.2": [0.1 * 0.5**e for e in range(EPOCHS)]}
DATA = {
    "all examples": loader,
    "the last batch dropped": lambda: loader(drop_last=True),
    "drawn with replacement": lambda: DataLoader(
        dataset(), BATCH, sampler=RandomSampler(dataset(), replacement=True, num_samples=2 * N)
    ),
}


@pytest.mark.parametrize("make_loader", DATA.values(), ids=DATA)
def test_rows_are_the_sums_of_the_epochs_gradients_weighted_by_mean_learning_rates(tmp_path, make_loader):
    merged = stored_gradients(train(tmp_path / "merged", Decaying(), make_loader()))
    segments = segments_of(tmp_path / "segments", Decaying(), make_loader())
    for layer, rates in RATES.items():
        expected = merged_gradients(epochs_of(segments, layer, rates))
        seen = ~merged[layer].isnan().any((1, 2))
        assert seen.sum() >= N - 2
        torch.testing.assert_close(
            merged[layer].double()[seen], expected[seen], atol=4 * INT8 * float(expected.abs().max()), rtol=0
        )
        torch.testing.assert_close(expected[~seen], torch.zeros_like(expected[~seen]))


@pytest.mark.parametrize("damping", [0.1, 1.0])
@pytest.mark.parametrize(("curvature", "reference"), [("ekfac", merged_scores), ("kfac", merged_kfac_scores)])
def test_scores_are_those_of_the_averaged_fisher_matrix(tmp_path, damping, curvature, reference):
    model = Decaying()
    path = train(tmp_path / "merged", model)
    segments = segments_of(tmp_path / "segments", Decaying())
    influence = InfluenceModule.attach(model, path)
    queries = dataset()[:3]
    scores = influence.scores(queries, curvature=curvature, damping=HeuristicDamping(damping), per_layer=True)
    asked = influence._gradients(queries, None)
    for layer, rates in RATES.items():
        epochs = epochs_of(segments, layer, rates)
        expected = reference(asked[layer].dense().double(), epochs, damping=damping)
        torch.testing.assert_close(
            scores[layer].double(), expected, rtol=0, atol=0.02 * float(expected.abs().max())
        )


class Pausing(Decaying):
    """Learns nothing in its second epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1, 0, 0.5, 0.2][epoch % 4])
        ]


def test_an_epoch_in_which_a_layer_did_not_learn_is_no_part_of_its_curvature(tmp_path):
    """Whatever the others weigh."""
    found = InfluenceQuery(StoreReader(train(tmp_path / "merged", Pausing()))).layers
    segments = segments_of(tmp_path / "segments", Pausing())
    for layer in RATES:
        first, _, third, last = epochs_of(segments, layer, [1.0] * EPOCHS)
        _, _, Lambda = averaged_fisher([first, third, last])
        assert float(found[layer].Lambda.sum()) == pytest.approx(float(Lambda.sum()), rel=2e-3)  # float16 rows
        leading = Lambda > 0.01 * Lambda.max()
        assert leading.sum() >= 2
        found_leading = found[layer].Lambda.flatten().sort(descending=True).values[: int(leading.sum())].double()
        expected = Lambda.flatten().sort(descending=True).values[: int(leading.sum())]
        torch.testing.assert_close(found_leading, expected, rtol=0.02, atol=0)


def test_rows_of_layers_on_positions_are_sums_too(tmp_path):
    merged = stored_gradients(train(tmp_path / "merged", Convolutional()))
    path = train(
        tmp_path / "segments",
        Convolutional(),
        influence={"trajectory": "segments", "codec": "pairs-float32"},
    )
    reader = StoreReader(path)
    queries = [InfluenceQuery(reader.segment(number)) for number in reader.segments]
    assert set(merged) == {"conv", "norm", "head"}
    for name, rows in merged.items():
        epochs = [query.layers[name].codec.decode(stored_arrays(query.store, name)) for query in queries]
        expected = torch.stack(epochs).mean(0)
        torch.testing.assert_close(rows, expected, rtol=0, atol=4 * INT8 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [Decaying, Convolutional])
def test_training_is_not_changed(tmp_path, make):
    captured, alone = make(), make()
    train(tmp_path, captured)
    fit(tmp_path, alone, loader(), max_epochs=EPOCHS)
    for ours, theirs in zip(captured.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("epochs", "expected"), [("every", [0, 1, 2, 3]), (2, [1, 3]), ([0, 2], [0, 2]), (1, [0, 1, 2, 3])]
)
def test_the_file_is_for_the_final_weights_and_says_which_epochs_are_in(tmp_path, epochs, expected):
    model = Decaying()
    path = train(tmp_path, model, influence={"epochs": epochs})
    InfluenceModule.attach(model, path)
    reader = StoreReader(path)
    described = reader.document("trajectory")["epochs"]
    assert [epoch["epoch"] for epoch in described] == expected
    assert [epoch["weights"]["layers.2"] for epoch in described] == pytest.approx([0.1 * 0.5**e for e in expected])
    assert reader.attributes["epochs_merged"] == len(expected)
    assert reader.column("occurrences").tolist() == [len(expected)] * N
    assert [file.name for file in tmp_path.iterdir()] == ["influence.h5"]
    reader.verify_rows()


def test_an_epoch_that_was_cut_short_adds_no_rows_and_the_file_is_for_the_final_weights(tmp_path):
    model = Decaying()
    with pytest.warns(UserWarning, match=r"epoch 2 ended .* Epochs 0, 1, which are whole, will be merged"):
        path = train(tmp_path, model, max_epochs=-1, max_steps=8)
    reader = InfluenceModule.attach(model, path).store
    assert [epoch["epoch"] for epoch in reader.document("trajectory")["epochs"]] == [0, 1]


def test_a_run_that_stops_early_merges_what_there_is(tmp_path):
    class Stopping(Decaying):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

    model = Stopping()
    stopping = EarlyStopping("loss", min_delta=10.0, patience=2, check_on_train_epoch_end=True)
    path = train(tmp_path, model, None, stopping, max_epochs=9)
    reader = InfluenceModule.attach(model, path).store
    assert [epoch["epoch"] for epoch in reader.document("trajectory")["epochs"]] == [0, 1, 2]


class Breaking(Decaying):
    """Raises in a step."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.step, self.error = step, error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.step:
            raise self.error("stop")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_its_whole_epochs_merged(tmp_path, error):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_exception=False)
    with pytest.raises((RuntimeError, SystemExit)):
        train(tmp_path, Breaking(7, error), None, saving, enable_checkpointing=True)
    influence = InfluenceModule.from_checkpoint(tmp_path / "epoch=1.ckpt", Decaying())
    assert [epoch["epoch"] for epoch in influence.store.document("trajectory")["epochs"]] == [0, 1]
    assert influence.scores(dataset()[:2]).isfinite().all()


def test_a_resumed_run_merges_the_epochs_of_both(tmp_path):
    whole = stored_gradients(train(tmp_path / "whole"))
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path, Breaking(7), None, saving, enable_checkpointing=True)
    capture = InfluenceCallback(tmp_path / "influence.h5", epochs="every", on_error="raise")
    trainer = make_trainer(tmp_path, capture, max_epochs=EPOCHS)
    model = Decaying()
    trainer.fit(model, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    reader = InfluenceModule.attach(model, tmp_path / "influence.h5").store
    assert [epoch["epoch"] for epoch in reader.document("trajectory")["epochs"]] == [0, 1, 2, 3]
    assert reader.column("occurrences").tolist() == [EPOCHS] * N
    resumed = stored_gradients(tmp_path / "influence.h5")
    for name, rows in whole.items():  # the order of the data after the checkpoint is another
        assert F.cosine_similarity(rows.flatten(1), resumed[name].flatten(1)).min() > 0.9
    assert not [file for file in tmp_path.iterdir() if "epoch0" in file.name or "resume" in file.name]


def test_examples_without_any_finite_gradient_are_marked(tmp_path):
    x, y = dataset().tensors
    x = x.clone()
    x[3] = torch.nan

    class Masked(Decaying):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y, reduction="none").nan_to_num(0.0).mean()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    path = train(tmp_path, Masked(), DataLoader(TensorDataset(x, y), 1))
    reader = StoreReader(path)
    assert np.flatnonzero(reader.column("valid") == 0).tolist() == [3]
    assert reader.attributes["rows_invalid"] == 1
    assert stored_gradients(path)["layers.0"][[0, 1, 2, 4]].isfinite().all()


def test_learning_rates_of_zero_give_epochs_no_weights(tmp_path):
    with pytest.raises(CaptureError, match=r"learning rates of layer 'layers.0' in epochs \[0, 1, 2, 3\]"):
        train(tmp_path, Classifier(learning_rate=0.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["pairs", "pairs-float16"])
def test_pairs_are_refused(codec):
    with pytest.raises(ValueError, match=re.escape("`codec` must be 'auto' or 'eigen'")):
        InfluenceCallback(epochs="every", codec=codec)


def test_rows_that_the_disk_has_no_room_for_are_refused_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CaptureError, match=r"4 epochs wait .* GB are free"):
        train(tmp_path)


def test_the_summary_says_what_the_rows_are(tmp_path):
    model = Decaying()
    summary = InfluenceModule.attach(model, train(tmp_path, model)).summary()
    assert "merged from epochs 0, 1, 2, 3" in summary
